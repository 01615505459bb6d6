//! What a worker consists of, put together, and what it answers on the control socket.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use coordinator_api::ClientError;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use store::Digest;
use store::image::ImageRef;

use crate::content::cache::Cache;
use crate::content::cache::disk::Disk;
use crate::content::indexes::Indexes;
use crate::content::prefetch::Prefetcher;
use crate::filesystem::Filesystem;
use crate::filesystem::io_mode::ModeInUse;
use crate::filesystem::kernel_state::{KernelState, Record};
use crate::mount::cache_dir::{self, TREES};
use crate::mount::config::{Config, TreeChoice};
use crate::mount::control_socket::{Advance, Answers, ChainTree, NamedStart, Request, Status, TreeKind, TreeStatus};
use crate::mount::data_files::{DataMount, LetGo};
use crate::mount::link::{Link, Notice};
use crate::mount::mountpoint::{self, Mounted};
use crate::mount::native_mount;
use crate::mount::native_trees::NativeTrees;
use crate::os::fuse_limits;
use crate::os::pool::Pools;
use crate::source::catalogue::{CatalogueWatcher, Refreshed};
use crate::source::failure::Failure;
use crate::source::metrics::Metrics;
use crate::source::shared_store::SharedStore;
use crate::uplink::lease::Lease;
use crate::uplink::lease::roots::LinkedChains;
use crate::uplink::recorder::{ContainerStart, Recorder};

/// Threads that may wait for the shared disk: enough to fill its pipe at some milliseconds a request.
const REMOTE_THREADS: usize = 32;
/// Threads for the local disk and the processor: enough for a disk that serves requests in parallel, few beside the
/// containers.
const LOCAL_THREADS: usize = 8;
/// How long a mount waits at its start for the shared disk to say what it holds.
const START: Duration = Duration::from_secs(10);

/// Why a worker cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is not valid.
    #[error(transparent)]
    Config(#[from] crate::mount::config::Error),
    /// The keeper has not handed everything over.
    #[error("cannot begin: {0}")]
    Begin(io::Error),
    /// The mount point cannot be used.
    #[error(transparent)]
    Mountpoint(#[from] mountpoint::Error),
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The client that talks to the coordinator cannot be made.
    #[error(transparent)]
    Coordinator(#[from] ClientError),
    /// The cache directory cannot be used.
    #[error(transparent)]
    Cache(#[from] cache_dir::Error),
    /// Native trees were asked for, and cannot be mounted.
    #[error("native trees cannot be mounted on this machine: {0}; mount with --tree auto or --tree fuse")]
    NativeTrees(#[from] native_mount::Error),
    /// The shared disk is away, and there is nothing to start from.
    #[error("store {} does not answer: check that the shared disk is mounted and well", .0.display())]
    Silent(PathBuf),
    /// The connection to the kernel failed.
    #[error("the FUSE connection failed: {0}")]
    Fuse(io::Error),
    /// A thread cannot be started.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
}

/// A mount that a keeper holds.
pub(super) struct KeptMount {
    pub(super) device: OwnedFd,
    pub(super) state: Arc<KernelState>,
    pub(super) data: Result<DataMount, String>,
    pub(super) earlier: u32,
    /// Its device, as the mount table shows it.
    pub(super) mount_device: String,
    pub(super) link: Arc<Link>,
}

impl KeptMount {
    /// The mount, if it is still where it was mounted. One that is not is served to its end.
    pub(super) fn mounted(&self, path: &Path) -> Option<Mounted> {
        mountpoint::mounted_on(path).filter(|mounted| mounted.device == self.mount_device)
    }
}

/// Everything behind a mount.
pub(super) struct Components {
    pub(super) shared_store: Arc<SharedStore>,
    pub(super) watcher: Arc<CatalogueWatcher>,
    pub(super) indexes: Arc<Indexes>,
    pub(super) cache: Arc<Cache>,
    pub(super) filesystem: Arc<Filesystem>,
    /// What mounts native trees, or why nothing does.
    pub(super) native: Result<Arc<NativeTrees>, String>,
    pub(super) prefetcher: Arc<Prefetcher>,
    pub(super) recorder: Arc<Recorder>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) open_mode: Arc<ModeInUse>,
    pub(super) lease: Option<Lease>,
    pub(super) linked: Arc<LinkedChains>,
    pub(super) restarts: u32,
    pub(super) started: Instant,
}

impl Components {
    pub(super) fn new(config: &Config, mount: &mut KeptMount, lease: Option<Lease>) -> Result<Components, Error> {
        let cache_dir = &*config.cache;
        let descriptors = raise_descriptor_limit();
        let metrics = Arc::new(Metrics::default());
        let read_timeout = fuse_limits::read_timeout(config.read_timeout);
        let shared_store = Arc::new(SharedStore::new(&config.store, read_timeout, Arc::clone(&metrics)));
        let pools = Pools::new(LOCAL_THREADS, REMOTE_THREADS);
        let watcher =
            Arc::new(CatalogueWatcher::new(Arc::clone(&shared_store), pools.clone(), cache_dir.join("catalogue")));
        first_look(&shared_store, &watcher, mount.earlier)?;
        let disk = Disk::new(cache_dir.join("objects"), config.limit)
            .map_err(|error| cache_dir::Error::unusable(cache_dir, &error))?;
        let recorder = Arc::new(Recorder::new(cache_dir.join("traces")));
        let cache = Cache::new(
            Arc::clone(&shared_store),
            pools.clone(),
            disk,
            descriptors,
            config.prefetch,
            Arc::clone(&recorder),
        );
        let (cache, indexes) = (Arc::new(cache), cache_dir.join("indexes"));
        let indexes = Indexes::new(indexes, Arc::clone(&shared_store), pools.clone(), Arc::clone(&cache));
        let indexes = Arc::new(indexes);
        let prefetcher = Arc::new(Prefetcher::new(
            Arc::clone(&shared_store),
            pools.clone(),
            Arc::clone(&watcher),
            Arc::clone(&indexes),
            Arc::clone(&cache),
            Arc::clone(&recorder),
        ));
        let linked = Arc::new(LinkedChains::new(cache_dir, pools.clone()));
        let filesystem = Filesystem::new(
            Arc::clone(&watcher),
            Arc::clone(&indexes),
            Arc::clone(&cache),
            Arc::clone(&prefetcher),
            Arc::clone(&linked),
            read_timeout,
            cache_dir,
        );
        let filesystem = Arc::new(filesystem.resume(&mount.state));
        filesystem.hold_indexes();
        let native = native_trees(config, &filesystem, mount)?;
        Ok(Components {
            shared_store,
            watcher,
            indexes,
            cache,
            filesystem,
            native,
            prefetcher,
            recorder,
            metrics,
            open_mode: Arc::new(ModeInUse::new(config.open)),
            lease,
            linked,
            restarts: mount.earlier,
            started: Instant::now(),
        })
    }

    fn status(&self, config: &Config, mountpoint: &Mounted, cache_dir: &Path) -> Status {
        let keeper = rustix::process::getppid().map_or(0, rustix::process::Pid::as_raw_pid);
        let snapshot = self.watcher.snapshot();
        let (layers_opened, chains_opened) = self.filesystem.opened();
        let status = self.lease.as_ref().map(Lease::status).unwrap_or_default();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: u32::try_from(keeper).unwrap_or_default(),
            worker: std::process::id(),
            restarts: self.restarts,
            mountpoint: mountpoint.path.clone(),
            unmounted: !mountpoint::is_mounted(mountpoint),
            store: config.store.clone(),
            store_answered_seconds_ago: self.shared_store.answered().map(|at| at.elapsed().as_secs()),
            coordinator: config.coordinator.as_ref().map(ToString::to_string),
            lease_renewed_seconds_ago: status.renewed.map(|at| at.elapsed().as_secs()),
            lease_error: status.error,
            open: self.open_mode.get(),
            tree: match &self.native {
                Ok(native) => TreeStatus { kind: native.way().into(), why: None, mounted: native.mounted() },
                Err(why) => TreeStatus { kind: TreeKind::Fuse, why: Some(why.clone()), mounted: 0 },
            },
            generation: snapshot.catalogue().generation(),
            images: snapshot.catalogue().images().count(),
            layers_opened,
            chains_opened,
            cache: cache_dir.to_owned(),
            cache_used: self.cache.disk().used(),
            cache_limit: self.cache.disk().limit(),
            counters: self.metrics.snapshot(),
        }
    }
}

/// What mounts native trees, or why nothing does, as the configuration wants it and the kernel allows it.
fn native_trees(
    config: &Config,
    filesystem: &Arc<Filesystem>,
    mount: &mut KeptMount,
) -> Result<Result<Arc<NativeTrees>, String>, Error> {
    let made = std::mem::replace(&mut mount.data, Err(String::new()));
    let had_trees = mount.state.earlier.iter().any(|record| matches!(record, Record::Trees(_)));
    if mount.earlier > 0 && !had_trees {
        return Ok(Err("they could not be mounted when the mount began".to_owned()));
    }
    let native = match made {
        // Nobody has a choice.
        Err(why) if config.tree.ways().is_empty() => return Ok(Err(why)),
        Err(why) => Err(native_mount::Error::Mount(io::Error::other(why))),
        Ok(data) => {
            let link = Arc::clone(&mount.link);
            let data: (DataMount, LetGo) = (data, Box::new(move || link.tell(&Notice::LetGo)));
            let (threads, state) = (config.fuse_threads, Arc::clone(&mount.state));
            NativeTrees::new(Arc::clone(filesystem), threads, config.cache.join(TREES), config.tree.ways(), data, state)
        }
    };
    match native {
        Ok(native) => Ok(Ok(Arc::new(native))),
        // Containers run from trees that an earlier worker has mounted: nobody else would serve those.
        Err(error) if had_trees || config.tree != TreeChoice::Auto => Err(error.into()),
        Err(error) => {
            tracing::info!("engines get the mount's own trees, because native ones cannot be mounted here: {error}");
            Ok(Err(error.to_string()))
        }
    }
}

/// How long the store is looked into for a chain that is not known. Clients wait longer for an answer.
const LOOK: Duration = Duration::from_secs(2);
/// How often a client is told how far a prefetch is.
const PROGRESS: Duration = Duration::from_millis(200);

impl Components {
    /// Answers on the control socket.
    pub(super) fn answer(&self, request: Request, config: &Config, mountpoint: &Mounted, cache_dir: &Path) -> Answers {
        match request {
            Request::Status => Answers::one(&self.status(config, mountpoint, cache_dir)),
            Request::Starts => {
                let snapshot = self.watcher.snapshot();
                let named = |start: ContainerStart| {
                    let images = snapshot.names(&start.chain).map(|image| image.familiar_name()).collect();
                    NamedStart { images, start }
                };
                Answers::one(&self.recorder.starts().into_iter().map(named).collect::<Vec<_>>())
            }
            Request::Prefetch { image } => self.prefetch(&image),
            Request::Tree { chain } => Answers::one(&self.tree(&chain, mountpoint)),
        }
    }

    /// Where a chain's tree is. A mount that was taken away, and lives on for what uses it, has no trees for others.
    fn tree(&self, chain: &Digest, mountpoint: &Mounted) -> Option<ChainTree> {
        if !mountpoint::is_mounted(mountpoint) {
            return None;
        }
        let known = self.watcher.snapshot().chain(chain).or_else(|| self.look_for(chain));
        let layers = known.or_else(|| self.linked.layers(chain))?;
        Some(ChainTree { path: mountpoint::tree(&mountpoint.path, chain), layers })
    }

    /// Looks into the store for a chain that may be new. Without an answer of the store, it is unknown.
    fn look_for(&self, chain: &Digest) -> Option<Vec<Digest>> {
        let asked = Instant::now();
        // A look that had begun before may have missed it.
        while asked.elapsed() < LOOK {
            let (send, receive) = std::sync::mpsc::channel();
            let told = move |refreshed: Result<Refreshed, Failure>| _ = send.send(refreshed.map(|seen| seen.started));
            self.watcher.refresh(asked + LOOK, Box::new(told));
            match receive.recv_timeout(LOOK) {
                Ok(Ok(started)) if started < asked => {}
                _ => break,
            }
        }
        self.watcher.snapshot().chain(chain)
    }

    fn prefetch(&self, image: &str) -> Answers {
        let refused =
            |why: String| Answers::one(&Advance { chunks: 0, done: 0, lacking: 0, error: Some(why), is_over: true });
        let reference: ImageRef = match image.parse() {
            Ok(reference) => reference,
            Err(error) => return refused(format!("{error}")),
        };
        let snapshot = self.watcher.snapshot();
        let Some(chain) = snapshot.catalogue().find(&reference).and_then(|tag| tag.image.chain_ids().pop()) else {
            return refused(format!("image {image} is not in the store: pull it with cachefsctl pull {image}"));
        };
        let (send, receive) = std::sync::mpsc::channel();
        self.prefetcher.whole(&chain, move |begun| _ = send.send(begun));
        let progress = match receive.recv() {
            Ok(Ok(progress)) => progress,
            Ok(Err(failure)) => return refused(format!("image {image} cannot be read: {failure}")),
            Err(_) => return refused(format!("image {image} cannot be read: its layers' indexes did not come")),
        };
        let (mut is_first, mut was_last) = (true, false);
        Answers::many(move || {
            if was_last {
                return None;
            }
            if !std::mem::take(&mut is_first) {
                std::thread::sleep(PROGRESS);
            }
            was_last = progress.is_over();
            let (chunks, done, lacking) = (progress.chunks, progress.done(), progress.lacking());
            Some(Advance { chunks, done, lacking, error: None, is_over: was_last })
        })
    }
}

/// Reads the catalogue. While the shared disk is away, a host that has seen the store before can still mount. A worker that takes a mount over
/// does not wait for it.
fn first_look(shared_store: &Arc<SharedStore>, watcher: &Arc<CatalogueWatcher>, earlier: u32) -> Result<(), Error> {
    if earlier > 0 {
        return Ok(());
    }
    let (send, receive) = std::sync::mpsc::channel();
    let (look_store, look_watcher) = (Arc::clone(shared_store), Arc::clone(watcher));
    let look = move || {
        let looked = look_store.open().and_then(|store| look_watcher.update(store));
        let _ = send.send(looked.map(|_| ()));
    };
    start("cachefs-start", look)?;
    let looked = receive
        .recv_timeout(START)
        .map_err(|_| Error::Silent(shared_store.root().to_owned()))
        .and_then(|looked| Ok(looked?));
    match looked {
        Err(error) if watcher.has_state() && may_pass(&error) => {
            tracing::warn!(
                "starting from what this host's cache knows, because the shared store cannot be read: {error}"
            );
            Ok(())
        }
        looked => looked,
    }
}

/// Whether a store that cannot be read now may become readable without anybody changing it.
fn may_pass(error: &Error) -> bool {
    use store::Error::{Io, Missing, NotAStore};
    matches!(error, Error::Silent(_) | Error::Store(Io { .. } | Missing { .. } | NotAStore { .. }))
}

/// Starts a thread.
pub(super) fn start(name: &str, action: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    std::thread::Builder::new().name(name.to_owned()).spawn(action).map(|_| ()).map_err(Error::Thread)
}

/// Raises this process's limit of descriptors as far as it may; returns how many of them cache files may take.
fn raise_descriptor_limit() -> usize {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 256 };
    let raised = setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok();
    let limit = if raised { hard } else { soft };
    usize::try_from(limit / 2).unwrap_or(usize::MAX).min(crate::content::cache::DESCRIPTORS)
}
