//! The native trees of one mount: mounted when somebody looks a chain up in `trees`, taken away when nobody has for long.
//!
//! A native tree is mounted on top of its chain's own root, `MOUNT/chains/<chainID>`. So one path leads to the tree of either kind: where
//! no native tree is mounted, or a mount namespace does not see it, the mount's own tree is there. An overlay on top holds the file
//! system by itself, so a tree may be taken away while containers run from it; the next container then gets one of its own, which shares no
//! memory with theirs. That is why trees stay for an hour.
//!
//! The metadata of a mounted tree lies in `CACHE/trees/<chainID>`. It is written anew for each mount and used by nobody else: what an
//! earlier daemon has left is removed.
//!
//! All mounting and unmounting runs on the local pool or on the thread that takes idle trees away. It walks paths below the mount, so it
//! must never run on a FUSE worker.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use parking_lot::Mutex;
use store::Digest;

use crate::filesystem::Filesystem;
use crate::filesystem::tree_mounter::TreeMounter;
use crate::mount::data_files::DataFiles;
use crate::mount::native_mount::{self, Error, NativeMount};
use crate::os::pool::{Pools, Priority};
use crate::source::failure::Failure;

/// How many trees stay mounted that nobody has looked up lately.
const KEPT: usize = 64;
/// How long a tree stays mounted after it was last looked up.
const IDLE: Duration = Duration::from_secs(3600);
/// After a tree could not be mounted, nobody tries again for this long.
const PAUSE: Duration = Duration::from_secs(60);
/// Metadata of all mounted trees may take this part of the cache's room.
const PART_OF_CACHE: u64 = 8;

type Done = Box<dyn FnOnce() + Send>;
/// Has the kernel forget a chain's root.
type Forget = dyn Fn(&Digest) + Send + Sync;

/// What is known about a chain's native tree.
enum Tree {
    /// A thread is about to mount it, to see whether it is still there, or to take it away; these wait for that.
    Busy(Vec<Done>),
    /// It was mounted, and last looked up at this time.
    Mounted(NativeMount, Instant),
    /// It could not be mounted at this time.
    Failed(Instant),
}

/// The native trees of one mount.
pub struct NativeTrees {
    filesystem: Arc<Filesystem>,
    data_files: DataFiles,
    pools: Pools,
    /// `CACHE/trees`
    metadata: PathBuf,
    /// How much metadata there may be, bytes.
    metadata_max: u64,
    /// Guards where trees are mounted; nothing before the mount is there, and after it has ended.
    place: Mutex<Option<Place>>,
    /// Guards what is known; never held during I/O, nor while a callback runs.
    trees: Mutex<HashMap<Digest, Tree>>,
}

/// Where trees are mounted.
#[derive(Clone)]
struct Place {
    /// `MOUNT/chains`
    chains: PathBuf,
    /// The device number of the mount that is there.
    device: u64,
    forget: Arc<Forget>,
}

impl NativeTrees {
    /// Serves data files, and tries whether this kernel mounts native trees. Nothing is mounted before [`NativeTrees::begin`]. `metadata`
    /// is a directory of the local cache, `cache_limit` the room of that.
    pub fn new(
        filesystem: Arc<Filesystem>,
        pools: Pools,
        workers: usize,
        metadata: PathBuf,
        cache_limit: u64,
    ) -> Result<NativeTrees, Error> {
        for left in fs::read_dir(&metadata).map_err(Error::Write)? {
            left.and_then(|left| fs::remove_file(left.path())).map_err(Error::Write)?;
        }
        let data_files = DataFiles::serve(Arc::clone(&filesystem), workers)?;
        let probe = metadata.join("probe");
        let probed = native_mount::probe(&data_files, &probe);
        let _ = fs::remove_file(&probe);
        if let Err(error) = probed {
            data_files.finish();
            return Err(error);
        }
        let metadata_max = cache_limit / PART_OF_CACHE;
        let (place, trees) = Default::default();
        Ok(NativeTrees { filesystem, data_files, pools, metadata, metadata_max, place, trees })
    }

    /// From now on trees are mounted in the mount at `mountpoint`, whose device is `device`. `forget` has the kernel forget the root of
    /// a chain, whose tree was taken away.
    pub fn begin(self: &Arc<Self>, mountpoint: &Path, device: u64, forget: Arc<Forget>) {
        *self.place.lock() = Some(Place { chains: mountpoint.join("chains"), device, forget });
        let this: Arc<dyn TreeMounter> = Arc::clone(self) as _;
        self.filesystem.mount_natively(Arc::downgrade(&this));
    }

    /// How many trees are mounted.
    pub fn mounted(&self) -> usize {
        self.trees.lock().values().filter(|tree| matches!(tree, Tree::Mounted(..))).count()
    }

    /// Mounts nothing any more, and waits until nobody uses a tree.
    pub fn finish(&self) {
        self.place.lock().take();
        self.data_files.finish();
    }

    /// Takes trees away that nobody has looked up for long, those that nobody can look up any more, and the least recently used of too
    /// many. Call it now and then, not on a FUSE worker.
    pub fn take_idle_away(self: &Arc<Self>, now: Instant) {
        for (chain, mounted) in self.idle(now) {
            let taken = self.take_away(&chain, mounted.device);
            let left = match taken {
                Ok(()) => None,
                Err(error) => {
                    tracing::debug!("the native tree of chain {chain} stays: {error}");
                    Some(Tree::Mounted(mounted, now))
                }
            };
            self.settle(&chain, left);
        }
    }

    /// The trees that are to go, which are busy from now on.
    fn idle(&self, now: Instant) -> Vec<(Digest, NativeMount)> {
        let trees = self.trees.lock();
        let mounted = trees.iter().filter_map(|(chain, tree)| match tree {
            Tree::Mounted(mounted, used) => Some((*used, *chain, *mounted)),
            Tree::Busy(_) | Tree::Failed(_) => None,
        });
        let mounted: Vec<_> = mounted.collect();
        drop(trees);
        let is_known: HashMap<Digest, bool> =
            mounted.iter().map(|(_, chain, _)| (*chain, self.filesystem.knows_chain(chain))).collect();
        let mut idle = superfluous(mounted, |chain| is_known[chain], now, self.metadata_max);
        let mut trees = self.trees.lock();
        // Somebody may have looked one up meanwhile.
        idle.retain(|(chain, mounted)| matches!(trees.get(chain), Some(Tree::Mounted(now, _)) if now == mounted));
        for (chain, _) in &idle {
            trees.insert(*chain, Tree::Busy(Vec::new()));
        }
        idle
    }

    fn take_away(&self, chain: &Digest, device: u64) -> io::Result<()> {
        let place = self.place()?;
        let path = place.chains.join(chain.hex());
        if fs::symlink_metadata(&path)?.dev() == device {
            match umount2(&path, MntFlags::UMOUNT_NOFOLLOW) {
                Ok(()) => {}
                Err(Errno::EBUSY) => return Err(Errno::EBUSY.into()),
                Err(error) => {
                    tracing::warn!("the native tree {} cannot be unmounted: {error}", path.display());
                    return Err(error.into());
                }
            }
        }
        let _ = fs::remove_file(self.metadata.join(chain.hex()));
        // Or the chain's layers would seem to be in use.
        (place.forget)(chain);
        Ok(())
    }

    fn place(&self) -> io::Result<Place> {
        self.place.lock().clone().ok_or_else(|| io::Error::other("the mount has ended"))
    }

    /// Sees to it that a tree is mounted; `known` is what was mounted before. Runs on the local pool.
    fn ensure(self: Arc<Self>, chain: Digest, known: Option<NativeMount>, attempt: Attempt) {
        let panicked = |_| Err(io::Error::other("there is a fault in this program").into());
        let mounted = std::panic::catch_unwind(AssertUnwindSafe(|| self.mount_now(&chain, known)));
        match mounted.unwrap_or_else(panicked) {
            Ok(mounted) => self.settle(&chain, Some(Tree::Mounted(mounted, Instant::now()))),
            // The index of one of its layers may be gone.
            Err(Error::Layer(failure)) if attempt == Attempt::First => self.recover(chain, failure),
            Err(error) => {
                tracing::warn!("chain {chain} has no native tree for now, the mount's own is used: {error}");
                self.settle(&chain, Some(Tree::Failed(Instant::now())));
            }
        }
    }

    fn mount_now(&self, chain: &Digest, known: Option<NativeMount>) -> Result<NativeMount, Error> {
        let place = self.place()?;
        let path = place.chains.join(chain.hex());
        let device = fs::symlink_metadata(&path)?.dev();
        match known {
            Some(mounted) if mounted.device == device => return Ok(mounted),
            // Another mount may have taken the place of this one.
            _ if device != place.device => return Err(io::Error::other("something else is mounted there").into()),
            _ => {}
        }
        let metadata = self.metadata.join(chain.hex());
        // Of a tree that is no longer mounted, but may be in use.
        let _ = fs::remove_file(&metadata);
        let mounted =
            native_mount::mount(&self.filesystem, &self.data_files, chain, (&metadata, self.metadata_max), &path);
        if mounted.is_err() {
            let _ = fs::remove_file(&metadata);
        }
        mounted
    }

    fn recover(self: Arc<Self>, chain: Digest, failure: Failure) {
        let filesystem = Arc::clone(&self.filesystem);
        filesystem.recover_chain(&chain, failure, move |recovered| {
            let again = Arc::clone(&self);
            match recovered {
                Ok(()) => {
                    let ensure = move || again.ensure(chain, None, Attempt::Last);
                    self.pools.local.submit(Priority::Demand, ensure);
                }
                Err(failure) => {
                    tracing::warn!("chain {chain} has no native tree for now, the mount's own is used: {failure}");
                    self.settle(&chain, Some(Tree::Failed(Instant::now())));
                }
            }
        });
    }

    /// Ends the business with a tree, and tells those who wait for it. If it was taken away meanwhile, they get it again.
    fn settle(self: &Arc<Self>, chain: &Digest, tree: Option<Tree>) {
        let gone = tree.is_none();
        let mut trees = self.trees.lock();
        let before = match tree {
            Some(tree) => trees.insert(*chain, tree),
            None => trees.remove(chain),
        };
        drop(trees);
        let Some(Tree::Busy(waiting)) = before else { return };
        for done in waiting {
            if gone { Arc::clone(self).mount(*chain, done) } else { done() }
        }
    }
}

/// Of mounted trees, and when each was last looked up, those that have been idle for long or are not known any more, and the least
/// recently used where there are too many or they have too much metadata.
fn superfluous(
    mut mounted: Vec<(Instant, Digest, NativeMount)>,
    is_known: impl Fn(&Digest) -> bool,
    now: Instant,
    metadata_max: u64,
) -> Vec<(Digest, NativeMount)> {
    mounted.sort_by_key(|(used, chain, _)| (std::cmp::Reverse(*used), *chain));
    let mut metadata = 0;
    let mut idle = Vec::new();
    for (position, (used, chain, tree)) in mounted.into_iter().enumerate() {
        metadata += tree.len;
        let is_idle = now.saturating_duration_since(used) > IDLE || !is_known(&chain);
        if position >= KEPT || metadata > metadata_max || is_idle {
            idle.push((chain, tree));
        }
    }
    idle
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Attempt {
    First,
    Last,
}

impl TreeMounter for NativeTrees {
    fn mount(self: Arc<Self>, chain: Digest, done: Done) {
        let mut trees = self.trees.lock();
        let known = match trees.get_mut(&chain) {
            Some(Tree::Busy(waiting)) => return waiting.push(done),
            Some(Tree::Failed(at)) if at.elapsed() < PAUSE => {
                drop(trees);
                return done();
            }
            Some(Tree::Mounted(mounted, _)) => Some(*mounted),
            Some(Tree::Failed(_)) | None => None,
        };
        trees.insert(chain, Tree::Busy(vec![done]));
        drop(trees);
        let this = Arc::clone(&self);
        self.pools.local.submit(Priority::Demand, move || this.ensure(chain, known, Attempt::First));
    }

    fn in_use(&self) -> BTreeSet<Digest> {
        self.data_files.in_use()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::thread::JoinHandle;

    use super::*;
    use crate::filesystem::io_mode::{ModeInUse, OpenMode};
    use crate::filesystem::native_tree::tests::contents;
    use crate::filesystem::tests::{host, image};
    use crate::fixture::{Host, TIMEOUT};
    use crate::mount::fuse::Server;
    use crate::mount::mountpoint;

    /// A mount with native trees. Everything is unmounted when it is dropped.
    struct Served {
        native: Arc<NativeTrees>,
        mountpoint: tempfile::TempDir,
        metadata: PathBuf,
        server: Option<JoinHandle<io::Result<()>>>,
    }

    impl Served {
        fn new(host: &Host, cache: &Path) -> Served {
            let metadata = cache.join("trees");
            fs::create_dir(&metadata).unwrap();
            fs::write(metadata.join("left"), "by another daemon").unwrap();
            let (filesystem, pools) = (Arc::clone(&host.filesystem), Pools::new(2, 2));
            let native = NativeTrees::new(Arc::clone(&filesystem), pools, 2, metadata.clone(), 1 << 30).unwrap();
            assert_eq!(fs::read_dir(&metadata).unwrap().count(), 0);
            let (native, mountpoint) = (Arc::new(native), tempfile::tempdir().unwrap());
            let path = mountpoint.path().canonicalize().unwrap();
            let (device, mode) = (mountpoint::mount(&path).unwrap(), Arc::new(ModeInUse::new(OpenMode::NoOpen)));
            let server = Server::new(Arc::clone(&filesystem), device, 4, mode, cache).unwrap();
            let number = mountpoint::mounted_on(&path).unwrap().device_number();
            native.begin(&path, number, Arc::new(server.forget_chains(filesystem)));
            let server = Some(std::thread::spawn(|| server.run()));
            Served { native, mountpoint, metadata, server }
        }
    }

    impl Drop for Served {
        fn drop(&mut self) {
            let _ = mountpoint::detach(&self.mountpoint.path().canonicalize().unwrap());
            let served = self.server.take().map(JoinHandle::join);
            if !std::thread::panicking() {
                served.unwrap().unwrap().unwrap();
                self.native.finish();
            }
        }
    }

    /// SEMANTICS: "A native tree is mounted when it is first looked up, and goes when nobody has looked it up for an hour."
    #[test]
    fn an_idle_tree_goes_with_its_hold_on_its_layers_and_comes_back() {
        let (store, cache, chain, diff_ids) = image(&contents());
        let host = host(&store, &cache);
        let served = Served::new(&host, cache.path());
        let (native, in_use) = (&served.native, || host.filesystem.in_use());
        let tree = served.mountpoint.path().join("trees").join(chain.strip_prefix("chains/").unwrap());
        let all: BTreeSet<Digest> = diff_ids.into_iter().collect();
        assert_eq!((native.mounted(), in_use()), (0, BTreeSet::new()));
        let open = File::open(tree.join("large")).unwrap();
        assert_eq!((native.mounted(), in_use()), (1, all.clone()));
        assert_eq!(fs::read_dir(&served.metadata).unwrap().count(), 1);

        let mut now = Instant::now();
        native.take_idle_away(now + IDLE / 2);
        assert_eq!(native.mounted(), 1, "not idle for long");
        now += IDLE * 2;
        native.take_idle_away(now);
        assert_eq!(native.mounted(), 1, "a file is open");
        drop(open);
        now += IDLE * 2;
        native.take_idle_away(now);
        assert_eq!((native.mounted(), fs::read_dir(&served.metadata).unwrap().count()), (0, 0));
        let asked = Instant::now();
        while !in_use().is_empty() {
            assert!(asked.elapsed() < TIMEOUT * 100, "in use: {:?}", in_use());
        }
        // A link is kept by the kernel for a second, and leads to the mount's own tree meanwhile.
        assert!(tree.join("large").is_file());
        let asked = Instant::now();
        while native.mounted() == 0 {
            assert!(tree.join("large").is_file() && asked.elapsed() < TIMEOUT * 100);
        }
        assert_eq!(in_use(), all);
    }

    #[test]
    fn the_least_recently_used_of_too_many_trees_go() {
        let begin = Instant::now();
        let tree = |n: u64, len: u64| {
            let used = begin + Duration::from_secs(n);
            (used, Digest::of(&n.to_le_bytes()), NativeMount { device: n, len })
        };
        let gone = |trees: Vec<_>, after: u64, most: u64| -> BTreeSet<u64> {
            let now = begin + Duration::from_secs(after);
            let unknown = Digest::of(&99u64.to_le_bytes());
            superfluous(trees, |chain| *chain != unknown, now, most).into_iter().map(|(_, tree)| tree.device).collect()
        };
        let many = || (0..KEPT as u64 + 2).map(|n| tree(n, 1)).collect();
        assert_eq!(gone(many(), 100, 1000), BTreeSet::from([0, 1]));
        assert_eq!(gone(many(), 100, 10), (0..KEPT as u64 - 8).collect());
        assert_eq!(gone(vec![tree(1, 5), tree(2, 600), tree(3, 5)], 4, 100), BTreeSet::from([1, 2]));
        assert_eq!(gone(vec![tree(1, 5), tree(2, 5)], IDLE.as_secs() + 2, 100), BTreeSet::from([1]));
        assert_eq!(gone(vec![tree(1, 5), tree(99, 5)], 100, 100), BTreeSet::from([99]), "nobody can look it up");
        assert_eq!(gone(Vec::new(), 0, 0), BTreeSet::new());
    }
}
