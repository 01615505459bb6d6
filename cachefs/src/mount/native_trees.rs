//! The native trees of one mount: mounted when somebody looks a chain up in `trees`, taken away when nobody has for long.
//!
//! A native tree is mounted on top of its chain's own root, `MOUNT/chains/<chainID>`. So one path leads to the tree of either kind: where
//! no native tree is mounted, or a mount namespace does not see it, the mount's own tree is there. An overlay on top holds the file
//! system by itself, so a tree may be taken away while containers run from it; the next container then gets one of its own, which shares no
//! memory with theirs. That is why trees stay for an hour.
//!
//! The metadata of a mounted tree lies in `CACHE/trees/<chainID>`. It is written anew for each mount and used by nobody else: what is left
//! there when the mount begins is removed. A worker that takes the mount over finds the trees that are mounted.
//!
//! All mounting and unmounting runs on pools of its own or on the thread that takes idle trees away. It walks paths below the mount, whose
//! look-ups may need the other pools, so it must run neither there nor on a FUSE thread. Trees that are there are looked at on one pool and
//! new ones mounted on another, because metadata of a large image takes seconds to write.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::MetadataExt;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use store::Digest;

use crate::filesystem::Filesystem;
use crate::filesystem::kernel_state::{KernelState, Record};
use crate::filesystem::tree_mounter::{TreeMounter, Way};
use crate::mount::data_files::{DataFiles, DataMount, LetGo};
use crate::mount::mountpoint::{self, Mounted};
use crate::mount::native_mount::{self, Error, NativeMount};
use crate::os::pool::{Pool, Priority};
use crate::os::private_files;
use crate::source::failure::Failure;

/// How many trees are mounted at once, and how many mounted ones are looked at.
const MOUNTING: usize = 2;
const LOOKING: usize = 4;
/// How many trees stay mounted that nobody has looked up lately.
const KEPT: usize = 64;
/// How long a tree stays mounted after it was last looked up.
const IDLE: Duration = Duration::from_secs(3600);
/// After a tree could not be mounted, nobody tries again for this long.
const PAUSE: Duration = Duration::from_secs(60);
/// The same for a tree of which no metadata can be written, however often that is tried.
const LONG_PAUSE: Duration = Duration::from_secs(24 * 3600);
/// How often a tree is tried whose layers' indexes have to be fetched again: what is lost shows one layer at a time.
const ATTEMPTS: u32 = 128;
/// How much of a tree's metadata is read ahead of a container, bytes.
const READ_AHEAD_MAX: u64 = 8 << 20;
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
    /// It could not be mounted, and nobody tries again before this time.
    Failed(Instant),
}

/// The native trees of one mount.
pub struct NativeTrees {
    filesystem: Arc<Filesystem>,
    data_files: DataFiles,
    way: Way,
    looking: Pool,
    mounting: Pool,
    /// `CACHE/trees`
    metadata: PathBuf,
    /// Guards where trees are mounted; nothing before the mount is there, and after it has ended.
    place: Mutex<Option<Place>>,
    /// Guards what is known; never held during I/O, nor while a callback runs.
    trees: Mutex<HashMap<Digest, Tree>>,
    /// Guards which trees the kernel reads far ahead in.
    far: Mutex<Vec<NativeMount>>,
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
    /// Serves data files, and tries whether this kernel mounts native trees in one of these ways. Nothing is mounted before
    /// [`NativeTrees::begin`]. `metadata` is a directory of the local cache.
    pub fn new(
        filesystem: Arc<Filesystem>,
        threads: usize,
        metadata: PathBuf,
        ways: &[Way],
        data: (DataMount, LetGo),
        state: Arc<KernelState>,
    ) -> Result<NativeTrees, Error> {
        let known = state.earlier.iter().find_map(|record| match record {
            Record::Trees(way) => Some(*way),
            _ => None,
        });
        if known.is_none() {
            for left in fs::read_dir(&metadata).map_err(Error::Write)? {
                left.and_then(|left| fs::remove_file(left.path())).map_err(Error::Write)?;
            }
        }
        let data_files = DataFiles::serve(Arc::clone(&filesystem), threads, data, Arc::clone(&state))?;
        let way = match known.map_or_else(|| try_out(&data_files, ways, &metadata.join("probe")), Ok) {
            Ok(way) => way,
            Err(error) => {
                data_files.finish();
                return Err(error);
            }
        };
        if known.is_none() {
            state.record(&Record::Trees(way));
        }
        let (place, trees, far) = Default::default();
        let (looking, mounting) = (Pool::new("cachefs-look", LOOKING), Pool::new("cachefs-mount", MOUNTING));
        Ok(NativeTrees { filesystem, data_files, way, looking, mounting, metadata, place, trees, far })
    }

    /// From now on trees are mounted in the mount at `mountpoint`, whose device is `device`. `forget` has the kernel forget the root of
    /// a chain, whose tree was taken away.
    pub fn begin(self: &Arc<Self>, mountpoint: &Path, device: u64, forget: Arc<Forget>) {
        *self.place.lock() = Some(Place { chains: mountpoint.join("chains"), device, forget });
        let mounted = self.mounted_earlier(mountpoint, device);
        self.remove_others(&mounted);
        self.trees.lock().extend(mounted);
        let this: Arc<dyn TreeMounter> = Arc::clone(self) as _;
        self.filesystem.mount_natively(Arc::downgrade(&this));
    }

    /// The trees that an earlier worker has mounted, by the mount table. How far the kernel reads ahead in them stays as it is.
    fn mounted_earlier(&self, mountpoint: &Path, device: u64) -> Vec<(Digest, Tree)> {
        // Another mount may have taken the place of this one.
        if mountpoint::mounted_on(mountpoint).is_none_or(|mounted| mounted.device_number() != device) {
            return Vec::new();
        }
        let mounted =
            mountpoint::mounted().into_iter().filter(|mounted| mountpoint::is_native_tree(mounted, mountpoint));
        let tree = |mounted: Mounted| {
            let chain = Digest::from_hex(mounted.path.file_name()?.to_str()?)?;
            let len = fs::metadata(self.metadata.join(chain.hex())).map_or(0, |meta| meta.len());
            let mounted = NativeMount { device: mounted.device_number(), len, backing: None };
            Some((chain, Tree::Mounted(mounted, Instant::now())))
        };
        mounted.filter_map(tree).collect()
    }

    /// Removes the metadata of trees that are not mounted: an earlier worker may have died over them.
    fn remove_others(&self, mounted: &[(Digest, Tree)]) {
        let names: BTreeSet<OsString> = mounted.iter().map(|(chain, _)| chain.hex().into()).collect();
        let all = fs::read_dir(&self.metadata).into_iter().flatten().flatten();
        for left in all.filter(|entry| !names.contains(&entry.file_name())) {
            let _ = fs::remove_file(left.path());
        }
    }

    /// How the kernel gets at the files of trees.
    pub fn way(&self) -> Way {
        self.way
    }

    /// How many trees are mounted.
    pub fn mounted(&self) -> usize {
        self.trees.lock().values().filter(|tree| matches!(tree, Tree::Mounted(..))).count()
    }

    /// Has the kernel read far ahead in the trees of images that are not starting. Call it now and then.
    pub fn read_far_ahead(&self, is_starting: impl Fn(&Digest) -> bool) {
        let mounted: Vec<_> = self.mounted_now().into_iter().map(|(_, chain, mounted)| (chain, mounted)).collect();
        let mut far = self.far.lock();
        far.retain(|known| mounted.iter().any(|(_, mounted)| mounted == known));
        let near = mounted.into_iter().filter(|(chain, mounted)| !far.contains(mounted) && !is_starting(chain));
        let near: Vec<_> = near.map(|(_, mounted)| mounted).collect();
        far.extend(&near);
        drop(far);
        near.iter().for_each(NativeMount::read_far_ahead);
    }

    /// Mounts nothing any more, and waits until nobody uses a tree.
    pub fn finish(&self) {
        self.place.lock().take();
        self.data_files.finish();
    }

    /// Takes trees away that nobody has looked up for long, those that nobody can look up any more, and the least recently used of too
    /// many. Call it now and then, not on a FUSE thread.
    pub fn take_idle_away(self: &Arc<Self>, now: Instant) {
        for (chain, mounted) in self.idle(now) {
            if !self.begin_to_take_away(&chain, &mounted) {
                continue;
            }
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

    /// The trees that are mounted, each with when it was last looked up.
    fn mounted_now(&self) -> Vec<(Instant, Digest, NativeMount)> {
        let trees = self.trees.lock();
        let mounted = trees.iter().filter_map(|(chain, tree)| match tree {
            Tree::Mounted(mounted, used) => Some((*used, *chain, *mounted)),
            Tree::Busy(_) | Tree::Failed(_) => None,
        });
        mounted.collect()
    }

    /// The trees that are to go.
    fn idle(&self, now: Instant) -> Vec<(Digest, NativeMount)> {
        superfluous(self.mounted_now(), |chain| self.filesystem.knows_chain(chain), now, self.metadata_max())
    }

    /// How much metadata there may be, bytes.
    fn metadata_max(&self) -> u64 {
        self.filesystem.cache_limit() / PART_OF_CACHE
    }

    /// Makes a tree busy, unless somebody has to do with it just now.
    fn begin_to_take_away(&self, chain: &Digest, mounted: &NativeMount) -> bool {
        let mut trees = self.trees.lock();
        let is_free = matches!(trees.get(chain), Some(Tree::Mounted(there, _)) if there == mounted);
        if is_free {
            trees.insert(*chain, Tree::Busy(Vec::new()));
        }
        is_free
    }

    fn take_away(&self, chain: &Digest, device: u64) -> io::Result<()> {
        let (place, path, there) = self.look_at(chain)?;
        if there != device && there != place.device {
            return Err(io::Error::other("something else is mounted on it"));
        }
        if there == device
            && let Err(error) = mountpoint::unmount_one(&path)
        {
            if !matches!(error, mountpoint::Error::InUse(_)) {
                tracing::warn!("a native tree stays: {error}");
            }
            return Err(io::Error::other(error));
        }
        let _ = fs::remove_file(self.metadata.join(chain.hex()));
        // Or the chain's layers would seem to be in use.
        (place.forget)(chain);
        Ok(())
    }

    fn place(&self) -> io::Result<Place> {
        self.place.lock().clone().ok_or_else(|| io::Error::other("the mount has ended"))
    }

    /// The root of a chain, and the device number of what is mounted there.
    fn look_at(&self, chain: &Digest) -> io::Result<(Place, PathBuf, u64)> {
        let place = self.place()?;
        let path = place.chains.join(chain.hex());
        let device = fs::symlink_metadata(&path)?.dev();
        Ok((place, path, device))
    }

    /// Sees whether a tree is still there, and has it mounted again if it is not.
    fn look_again(self: Arc<Self>, chain: Digest, mounted: NativeMount) {
        match self.look_at(&chain) {
            Ok((_, _, device)) if device == mounted.device => {
                read_ahead(&self.metadata.join(chain.hex()));
                self.settle(&chain, Some(Tree::Mounted(mounted, Instant::now())));
            }
            Ok(_) => {
                let this = Arc::clone(&self);
                self.mounting.submit(Priority::Demand, move || this.mount_now(chain, ATTEMPTS));
            }
            Err(error) => self.fail(&chain, &error.into()),
        }
    }

    /// Mounts a tree. If the index of one of its layers is gone, that is fetched, and the tree tried again.
    fn mount_now(self: Arc<Self>, chain: Digest, attempts: u32) {
        let panicked = |_| Err(io::Error::other("there is a fault in this program").into());
        let mounted = std::panic::catch_unwind(AssertUnwindSafe(|| self.try_to_mount(&chain)));
        match mounted.unwrap_or_else(panicked) {
            Ok(mounted) => self.settle(&chain, Some(Tree::Mounted(mounted, Instant::now()))),
            Err(Error::Layer(failure)) if attempts > 1 => self.recover(chain, failure, attempts - 1),
            Err(error) => self.fail(&chain, &error),
        }
    }

    fn try_to_mount(&self, chain: &Digest) -> Result<NativeMount, Error> {
        let (place, path, there) = self.look_at(chain)?;
        // Another mount may have taken the place of this one.
        if there != place.device {
            return Err(io::Error::other("something else is mounted there").into());
        }
        // The cache directory may be emptied at any time.
        private_files::directory(&self.metadata).map_err(|error| Error::Write(io::Error::other(error.to_string())))?;
        let metadata = self.metadata.join(chain.hex());
        // Of a tree that is no longer mounted, but may be in use.
        let _ = fs::remove_file(&metadata);
        let within = (&*metadata, self.metadata_max());
        let mounted = native_mount::mount(&self.filesystem, (&self.data_files, self.way), chain, within, &path);
        if mounted.is_err() {
            let _ = fs::remove_file(&metadata);
        }
        mounted
    }

    fn recover(self: Arc<Self>, chain: Digest, failure: Failure, attempts: u32) {
        let filesystem = Arc::clone(&self.filesystem);
        filesystem.recover_chain(&chain, failure, move |recovered| match recovered {
            Ok(()) => {
                let this = Arc::clone(&self);
                self.mounting.submit(Priority::Demand, move || this.mount_now(chain, attempts));
            }
            Err(failure) => self.fail(&chain, &failure.into()),
        });
    }

    /// Notes that a tree cannot be mounted: for a while, or for long if no other attempt can end otherwise.
    fn fail(self: &Arc<Self>, chain: &Digest, error: &Error) {
        tracing::warn!("chain {chain} has no native tree for now, the mount's own is used: {error}");
        let pause = match error {
            Error::Large(_) | Error::Inexpressible(_) => LONG_PAUSE,
            Error::Layer(_) | Error::Write(_) | Error::Mount(_) => PAUSE,
        };
        self.settle(chain, Some(Tree::Failed(Instant::now() + pause)));
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

/// Tries which of these ways works.
fn try_out(data_files: &DataFiles, ways: &[Way], probe: &Path) -> Result<Way, Error> {
    let way = native_mount::probe(data_files, ways, probe);
    let _ = fs::remove_file(probe);
    way
}

/// Has the kernel read metadata into memory that is not there, in few large requests. By itself it reads page after page as a container looks
/// for names.
fn read_ahead(metadata: &Path) {
    let advised = File::open(metadata).and_then(|file| {
        Ok(rustix::fs::fadvise(&file, 0, NonZeroU64::new(READ_AHEAD_MAX), rustix::fs::Advice::WillNeed)?)
    });
    if let Err(error) = advised {
        tracing::debug!("{} is not read ahead: {error}", metadata.display());
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

impl TreeMounter for NativeTrees {
    fn mount(self: Arc<Self>, chain: Digest, done: Done) {
        let mut trees = self.trees.lock();
        let known = match trees.get_mut(&chain) {
            Some(Tree::Busy(waiting)) => return waiting.push(done),
            Some(Tree::Failed(until)) if Instant::now() < *until => {
                drop(trees);
                return done();
            }
            Some(Tree::Mounted(mounted, _)) => Some(*mounted),
            Some(Tree::Failed(_)) | None => None,
        };
        trees.insert(chain, Tree::Busy(vec![done]));
        drop(trees);
        let this = Arc::clone(&self);
        match known {
            Some(mounted) => self.looking.submit(Priority::Demand, move || this.look_again(chain, mounted)),
            None => self.mounting.submit(Priority::Demand, move || this.mount_now(chain, ATTEMPTS)),
        }
    }

    fn in_use(&self) -> BTreeSet<Digest> {
        self.data_files.in_use()
    }
}

#[cfg(test)]
mod tests {
    use std::thread::JoinHandle;

    use super::*;
    use crate::filesystem::io_mode::{ModeInUse, OpenMode};
    use crate::filesystem::native_tree::tests::contents;
    use crate::filesystem::tests::{host, image};
    use crate::fixture::{Host, TIMEOUT};
    use crate::mount::data_files;
    use crate::mount::fuse::Server;

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
            fs::write(metadata.join("left"), "by another worker").unwrap();
            let filesystem = Arc::clone(&host.filesystem);
            let data: (_, LetGo) = (data_files::mount().unwrap(), Box::new(|| ()));
            let native =
                NativeTrees::new(Arc::clone(&filesystem), 2, metadata.clone(), &[Way::Files], data, Arc::default());
            let native = native.unwrap();
            assert_eq!(fs::read_dir(&metadata).unwrap().count(), 0);
            let (native, mountpoint) = (Arc::new(native), tempfile::tempdir().unwrap());
            let path = mountpoint.path().canonicalize().unwrap();
            let (device, mode) = (mountpoint::mount(&path).unwrap(), Arc::new(ModeInUse::new(OpenMode::NoOpen)));
            let state = KernelState::default();
            let server = Server::new(Arc::clone(&filesystem), &device, 4, mode, cache, &state).unwrap();
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
    fn the_kernel_reads_far_ahead_once_an_image_has_started() {
        let (store, cache, chain, _) = image(&contents());
        let host = host(&store, &cache);
        let served = Served::new(&host, cache.path());
        let (native, name) = (&served.native, chain.strip_prefix("chains/").unwrap());
        let tree = served.mountpoint.path().join("trees").join(name);
        // Other processes mount native trees too, and then it is not known which is which.
        let mut now = Instant::now();
        let mounted = (0..50).find_map(|_| {
            let asked = Instant::now();
            while native.mounted() == 0 {
                assert!(tree.join("large").is_file() && asked.elapsed() < TIMEOUT * 100);
            }
            let (_, _, mounted) = native.mounted_now()[0];
            if mounted.read_ahead().is_none() {
                now += IDLE * 2;
                native.take_idle_away(now);
                return None;
            }
            Some(mounted)
        });
        let mounted = mounted.unwrap();
        let before = mounted.read_ahead().unwrap();
        assert_ne!(before.trim(), "512");
        let id = Digest::from_hex(name).unwrap();
        native.read_far_ahead(|chain| *chain == id);
        assert_eq!(mounted.read_ahead().unwrap(), before, "it is starting");
        native.read_far_ahead(|_| false);
        assert_eq!(mounted.read_ahead().unwrap().trim(), "512");
    }

    #[test]
    fn the_least_recently_used_of_too_many_trees_go() {
        let begin = Instant::now();
        let tree = |n: u64, len: u64| {
            let used = begin + Duration::from_secs(n);
            (used, Digest::of(&n.to_le_bytes()), NativeMount { device: n, len, backing: None })
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
