//! How the mount answers opens of files, and which I/O mode each open file is in.
//!
//! With passthrough the kernel wants one I/O mode per inode for as long as any descriptor of it is open, and one backing
//! file for all of them; an open that disagrees fails with EIO. So the first open decides, those that come while it
//! is open join it, and after the last close the next open decides anew:
//!
//! ```text
//!            enter(Cached)            join
//!   closed ----------------> cached  ------+
//!     ^  \                   ^   |   <-----+
//!     |   \ enter(Passthrough(b))|
//!     |    \                     | last leave
//!     |     +-----> passthrough(b) ... join gives the same b
//!     |                          |
//!     +--------------------------+
//! ```
//!
//! An open is counted before it is answered, and until the kernel has sent its release, which the kernel does after it
//! has left the mode itself. So this table never takes an inode for closed that the kernel has open.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::node::Node;

/// How opens of files are answered. SEMANTICS.md says what each means for a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OpenMode {
    /// The kernel is told that files need no open.
    NoOpen,
    /// The kernel reads the local cache's file itself, if all of it is there.
    Passthrough,
    /// Each open gets a descriptor whose reads the kernel may cache.
    Cached,
}

impl fmt::Display for OpenMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OpenMode::NoOpen => "no-open",
            OpenMode::Passthrough => "passthrough",
            OpenMode::Cached => "cached",
        })
    }
}

/// The mode of a running mount: the one that was wanted, until it turned out not to work here.
#[derive(Debug)]
pub struct ModeInUse {
    wanted: OpenMode,
    fallen_back: AtomicBool,
}

impl ModeInUse {
    /// A mount that is to use `wanted`.
    pub fn new(wanted: OpenMode) -> ModeInUse {
        ModeInUse { wanted, fallen_back: AtomicBool::new(false) }
    }

    /// The mode that was asked for. After a fallback, files may still be open in it.
    pub fn wanted(&self) -> OpenMode {
        self.wanted
    }

    /// The mode of new opens.
    pub fn get(&self) -> OpenMode {
        if self.fallen_back.load(Ordering::Relaxed) { OpenMode::Cached } else { self.wanted }
    }

    /// Uses [`OpenMode::Cached`] from now on, and logs why, once.
    pub fn fall_back(&self, why: &dyn std::fmt::Display) {
        if !self.fallen_back.swap(true, Ordering::Relaxed) {
            tracing::warn!("{} cannot be used here ({why}): files are opened in the mode `cached`", self.wanted);
        }
    }
}

/// Tables among which the nodes are divided, so that FUSE threads rarely contend.
const SHARDS: usize = 16;

/// The I/O mode of an open inode. `B` is the handle that keeps a backing file registered with the kernel.
#[derive(Debug)]
pub enum IoMode<B> {
    /// Reads go through the kernel's page cache to the daemon.
    Cached,
    /// The kernel reads the backing file.
    Passthrough(Arc<B>),
}

impl<B> Clone for IoMode<B> {
    fn clone(&self) -> IoMode<B> {
        match self {
            IoMode::Cached => IoMode::Cached,
            IoMode::Passthrough(backing) => IoMode::Passthrough(Arc::clone(backing)),
        }
    }
}

struct OpenFile<B> {
    count: u64,
    mode: IoMode<B>,
}

type Shard<B> = HashMap<Node, OpenFile<B>>;

/// All open files.
pub struct OpenFiles<B> {
    /// Each guards a part of the table. Under it no backing file is dropped and nothing is asked of the kernel.
    shards: [Mutex<Shard<B>>; SHARDS],
}

impl<B> Default for OpenFiles<B> {
    fn default() -> OpenFiles<B> {
        OpenFiles { shards: std::array::from_fn(|_| Mutex::default()) }
    }
}

impl<B> OpenFiles<B> {
    fn shard(&self, node: Node) -> &Mutex<Shard<B>> {
        &self.shards[node.number() as usize % SHARDS]
    }

    /// Counts one more open of a node that is open, and returns its mode; a closed node is left to
    /// [`OpenFiles::enter`].
    pub fn join(&self, node: Node) -> Option<IoMode<B>> {
        let mut table = self.shard(node).lock();
        let file = table.get_mut(&node)?;
        file.count += 1;
        Some(file.mode.clone())
    }

    /// Counts one more open; `wanted` is the mode if the node is still closed. Returns the mode to answer with.
    pub fn enter(&self, node: Node, wanted: IoMode<B>) -> IoMode<B> {
        let mut table = self.shard(node).lock();
        let (mode, unwanted) = match table.entry(node) {
            Entry::Occupied(mut entry) => {
                entry.get_mut().count += 1;
                (entry.get().mode.clone(), Some(wanted))
            }
            Entry::Vacant(entry) => (entry.insert(OpenFile { count: 1, mode: wanted }).mode.clone(), None),
        };
        drop(table);
        drop(unwanted);
        mode
    }

    /// Counts one open less. After the last one the backing file is released.
    pub fn leave(&self, node: Node) {
        let mut table = self.shard(node).lock();
        let Entry::Occupied(mut entry) = table.entry(node) else { return };
        entry.get_mut().count -= 1;
        let closed = (entry.get().count == 0).then(|| entry.remove());
        drop(table);
        drop(closed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_mode_that_fails_is_not_tried_again() {
        let mode = ModeInUse::new(OpenMode::Passthrough);
        assert_eq!(mode.get(), OpenMode::Passthrough);
        mode.fall_back(&"the test says so");
        assert_eq!((mode.get(), mode.wanted()), (OpenMode::Cached, OpenMode::Passthrough));
    }

    /// What one descriptor's open was answered with.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Answer {
        Cached,
        Backing(u32),
    }

    fn answer(mode: &IoMode<u32>) -> Answer {
        match mode {
            IoMode::Cached => Answer::Cached,
            IoMode::Passthrough(backing) => Answer::Backing(**backing),
        }
    }

    #[derive(Debug, Clone, Copy)]
    enum Step {
        /// An open looks whether its node is open, and if not goes off to find a backing file.
        Begin(u64),
        /// The nth of those opens comes back.
        Arrive(usize),
        /// The node's content is in the local cache, or no longer.
        Complete(u64, bool),
        /// The nth open descriptor is closed.
        Close(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0u64..3).prop_map(Step::Begin),
            (0usize..8).prop_map(Step::Arrive),
            (0u64..3, any::<bool>()).prop_map(|(node, complete)| Step::Complete(node, complete)),
            (0usize..8).prop_map(Step::Close),
        ];
        proptest::collection::vec(step, 0..200)
    }

    proptest! {
        /// SEMANTICS: "An inode has one I/O mode while it is open."
        /// The kernel's rule, in every order of concurrent opens: all descriptors of an inode agree, and the backing
        /// file is known as long as one of them is open, no longer.
        #[test]
        fn all_descriptors_of_an_inode_have_one_mode(steps in steps()) {
            let files = OpenFiles::<u32>::default();
            let (mut complete, mut next) = ([false; 3], 0);
            let (mut under_way, mut open) = (Vec::new(), Vec::<(u64, Answer)>::new());
            let mut known = Vec::<(u32, std::sync::Weak<u32>)>::new();
            for step in steps {
                let mut opened = None;
                match step {
                    Step::Begin(node) => match files.join(Node::from_number(node)) {
                        Some(mode) => opened = Some((node, answer(&mode))),
                        None => under_way.push(node),
                    },
                    Step::Arrive(at) if at < under_way.len() => {
                        let node = under_way.remove(at);
                        let wanted = if complete[node as usize] {
                                next += 1;
                                let backing = Arc::new(next);
                                known.push((next, Arc::downgrade(&backing)));
                                IoMode::Passthrough(backing)
                            } else { IoMode::Cached };
                        opened = Some((node, answer(&files.enter(Node::from_number(node), wanted))));
                    }
                    Step::Complete(node, now) => complete[node as usize] = now,
                    Step::Close(at) if at < open.len() => {
                        let (node, _) = open.remove(at);
                        files.leave(Node::from_number(node));
                    }
                    Step::Arrive(_) | Step::Close(_) => {}
                }
                if let Some((node, answer)) = opened {
                    prop_assert!(open.iter().all(|(other, theirs)| *other != node || *theirs == answer));
                    open.push((node, answer));
                }
                for (backing, alive) in &known {
                    let used = open.iter().any(|(_, answer)| *answer == Answer::Backing(*backing));
                    prop_assert_eq!(alive.strong_count() > 0, used);
                }
            }
        }
    }
}
