//! Objects that a collection must leave alone because somebody in this process relies on them.
//!
//! - A [`Hold`] keeps layers and blobs by digest. Whoever will rely on an object found in the store takes the hold
//!   **before** looking for it. A collection looks at the holds and renames under one lock, so either it sees the hold,
//!   or the holder sees that the object is gone.
//! - **Touched** packs are those of layers that got their names while the running collection was under way, or were
//!   about to when it began. A pack is noted before its layer gets its name, and claimed by the layer's hold until the
//!   layer has it. So a collection that judged a pack by the layers it found does not remove it.
//! - A [`Working`] ticket stands for work that may have asked where pieces lie, and has yet to tell where its own do. A
//!   collection first tells the database to forget what is to go, and then waits for the tickets that were out by then:
//!   after that, nobody has an old answer. The layer that the work published is held by its ticket. Otherwise the layer
//!   might be removed, and the database be told of its pieces afterwards.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::hash::Hash;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::digest::{ContentDigest, Digest};

/// All holds and claims, and the touched packs; see the module's head.
#[derive(Debug, Default)]
pub(super) struct Relied {
    /// How many holds each digest has.
    held: HashMap<Digest, usize>,
    /// All digests that were held at some time since the last collection began.
    lately: HashSet<Digest>,
    /// How many claims each pack has, by layers that are about to get their names.
    claimed: HashMap<ContentDigest, usize>,
    /// Packs that were claimed when the running collection began or since; `None` while none runs.
    touched: Option<HashSet<ContentDigest>>,
}

impl Relied {
    /// Whether anybody holds the digest.
    pub(super) fn is_held(&self, digest: &Digest) -> bool {
        self.held.contains_key(digest)
    }

    /// All digests that are held.
    pub(super) fn held(&self) -> HashSet<Digest> {
        self.held.keys().copied().collect()
    }

    /// Whether the pack belongs to a layer that the running collection may not have found.
    pub(super) fn is_touched(&self, pack: &ContentDigest) -> bool {
        self.touched.as_ref().is_some_and(|touched| touched.contains(pack))
    }

    /// Begins to note touched packs; returns what was held since the last collection began. `None` if one is running
    /// already.
    pub(super) fn begin(&mut self) -> Option<HashSet<Digest>> {
        if self.touched.is_some() {
            return None;
        }
        self.touched = Some(self.claimed.keys().copied().collect());
        let now = self.held.keys().copied().collect();
        Some(std::mem::replace(&mut self.lately, now))
    }

    /// Ends the collection.
    pub(super) fn end(&mut self) {
        self.touched = None;
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps objects from being collected until it is dropped.
#[derive(Debug)]
pub struct Hold {
    relied: Arc<Mutex<Relied>>,
    digests: Vec<Digest>,
    packs: Vec<ContentDigest>,
}

impl Hold {
    pub(super) fn new(relied: &Arc<Mutex<Relied>>) -> Hold {
        Hold { relied: Arc::clone(relied), digests: Vec::new(), packs: Vec::new() }
    }

    /// Holds more digests: diffIDs of layers, digests of blobs. May wait for one rename on the shared disk.
    pub fn add(&mut self, digests: impl IntoIterator<Item = Digest>) {
        let mut relied = lock(&self.relied);
        for digest in digests {
            *relied.held.entry(digest).or_default() += 1;
            relied.lately.insert(digest);
            self.digests.push(digest);
        }
    }

    /// Claims packs for a layer that is about to get its name. To be called before looking whether the packs are there;
    /// the hold must be kept until the layer has its name.
    pub(super) fn claim(&mut self, packs: impl IntoIterator<Item = ContentDigest>) {
        let mut relied = lock(&self.relied);
        for pack in packs {
            *relied.claimed.entry(pack).or_default() += 1;
            if let Some(touched) = &mut relied.touched {
                touched.insert(pack);
            }
            self.packs.push(pack);
        }
    }
}

/// Takes one from a count; a count that becomes 0 is removed.
fn release<K: Hash + Eq>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut relied = lock(&self.relied);
        self.digests.iter().for_each(|digest| release(&mut relied.held, digest));
        self.packs.iter().for_each(|pack| release(&mut relied.claimed, pack));
    }
}

/// All work that is in progress.
#[derive(Debug, Default)]
pub(super) struct InProgress {
    /// The tickets that are out, and the number of the next one.
    tickets: Mutex<(BTreeSet<u64>, u64)>,
    returned: Condvar,
}

/// A ticket for work that may know where pieces lie. Dropping it ends the work.
#[derive(Debug)]
pub struct Working {
    work: Arc<InProgress>,
    number: u64,
    /// The hold on what the work published.
    published: Mutex<Option<Hold>>,
}

impl Working {
    /// Holds what the work publishes until the work is over.
    pub(super) fn keep(&self, hold: Hold) {
        *lock(&self.published) = Some(hold);
    }
}

impl InProgress {
    /// Begins work; returns its ticket.
    pub(super) fn begin(self: &Arc<Self>) -> Arc<Working> {
        let mut tickets = lock(&self.tickets);
        let number = tickets.1;
        tickets.1 += 1;
        tickets.0.insert(number);
        Arc::new(Working { work: Arc::clone(self), number, published: Mutex::default() })
    }

    /// Waits until all work that has begun by now is over. Returns false if it is not after `patience`, or once `stop`
    /// returns true.
    pub(super) fn wait(&self, patience: Duration, stop: &dyn Fn() -> bool) -> bool {
        const LOOK: Duration = Duration::from_millis(200);
        let begun = Instant::now();
        let mut tickets = lock(&self.tickets);
        let end = tickets.1;
        while tickets.0.range(..end).next().is_some() {
            if begun.elapsed() >= patience || stop() {
                return false;
            }
            tickets = self.returned.wait_timeout(tickets, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        lock(&self.work.tickets).0.remove(&self.number);
        self.work.returned.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_held_until_its_last_hold_is_gone_and_remembered_once() {
        let relied = Arc::default();
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let mut first = Hold::new(&relied);
        first.add([a, b]);
        let mut second = Hold::new(&relied);
        second.add([a]);
        drop(first);
        assert!(lock(&relied).is_held(&a) && !lock(&relied).is_held(&b));
        assert_eq!(lock(&relied).begin(), Some(HashSet::from([a, b])));
        assert_eq!(lock(&relied).begin(), None, "one collection at a time");
        lock(&relied).end();
        drop(second);
        assert!(!lock(&relied).is_held(&a));
        assert_eq!(lock(&relied).begin(), Some(HashSet::from([a])), "it was held when the last one began");
        lock(&relied).end();
        assert_eq!(lock(&relied).begin(), Some(HashSet::new()));
    }

    #[test]
    fn claimed_packs_are_noted_from_before_a_collection_until_its_end() {
        let relied: Arc<Mutex<Relied>> = Arc::default();
        let [before, ahead, during] = [b"before", b"ahead.", b"during"].map(|name| ContentDigest::of(name));
        let touched = |pack: &ContentDigest| lock(&relied).is_touched(pack);
        let claim = |pack: ContentDigest| {
            let mut hold = Hold::new(&relied);
            hold.claim([pack]);
            hold
        };
        drop(claim(before));
        let (one, other) = (claim(ahead), claim(ahead));
        drop(one);
        assert!(!touched(&ahead), "no collection runs");
        lock(&relied).begin();
        drop((other, claim(during)));
        assert_eq!([before, ahead, during].map(|pack| touched(&pack)), [false, true, true]);
        lock(&relied).end();
        lock(&relied).begin();
        assert_eq!([before, ahead, during].map(|pack| touched(&pack)), [false; 3], "all of it is over");
    }

    #[test]
    fn earlier_work_is_waited_for_and_later_work_is_not() {
        let work: Arc<InProgress> = Arc::default();
        let long = Duration::from_secs(600);
        assert!(work.wait(long, &|| false));
        let early = work.begin();
        assert!(!work.wait(Duration::ZERO, &|| false) && !work.wait(long, &|| true));
        let asked = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                // By the first call of `stop`, the wait has noted which work it waits for: the work that begins below
                // is later.
                let told = std::cell::Cell::new(false);
                work.wait(long, &|| {
                    if !told.replace(true) {
                        asked.wait();
                    }
                    false
                })
            });
            asked.wait();
            let _later = work.begin();
            drop(early);
            assert!(waiting.join().unwrap());
        });
    }
}
