//! The daemon: puts everything together, mounts, serves, and ends cleanly.
//!
//! Threads: FUSE workers, which never wait; the two pools, one for waiting for the shared disk and one for the local
//! disk; those that serve data files of native trees, and those that mount such; one thread each for signals, the control socket, eviction, traces, image misses, the
//! lease, the catalogue's refresh, idle native trees, and the clock that tells requests that their time is up.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use coordinator_api::host::{LAYERS_MAX, LeaseRequest, NAMES_MAX};
use coordinator_api::{Client, ClientError};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;
use signal_hook::low_level::signal_name;
use store::Digest;
use store::image::ImageRef;

use crate::content::cache::Cache;
use crate::content::cache::disk::Disk;
use crate::content::indexes::Indexes;
use crate::content::prefetch::Prefetcher;
use crate::filesystem::Filesystem;
use crate::filesystem::io_mode::ModeInUse;
use crate::mount::cache_dir::{self, CacheDir, TREES};
use crate::mount::config::{Config, TreeChoice};
use crate::mount::control_socket::{
    self, Advance, Answers, ChainTree, NamedStart, Request, Status, TreeKind, TreeStatus,
};
use crate::mount::fuse::Server;
use crate::mount::mountpoint::{self, Mounted};
use crate::mount::native_mount;
use crate::mount::native_trees::NativeTrees;
use crate::os::fuse_limits;
use crate::os::oom_score;
use crate::os::pool::Pools;
use crate::source::catalogue::{CatalogueWatcher, Refreshed};
use crate::source::failure::Failure;
use crate::source::metrics::Metrics;
use crate::source::shared_store::SharedStore;
use crate::uplink::lease::roots::{LinkedChains, Roots};
use crate::uplink::lease::{self, Lease, Renewal};
use crate::uplink::recorder::{ContainerStart, Recorder, trace_upload};

/// Threads that may wait for the shared disk: enough to fill its pipe at some milliseconds a request.
const REMOTE_THREADS: usize = 32;
/// Threads for the local disk and the processor: enough for a disk that serves requests in parallel, few beside the
/// containers.
const LOCAL_THREADS: usize = 8;
/// How often the catalogue is refreshed.
const REFRESH: Duration = Duration::from_secs(3);
/// How often native trees that nobody uses are looked for.
const IDLE_TREES: Duration = Duration::from_secs(10);
/// How often native trees are looked at whose images have started.
const STARTED_TREES: Duration = Duration::from_secs(1);
/// How often the deadlines of requests are checked.
const TICK: Duration = Duration::from_millis(100);
/// How long a mount waits at its start for the shared disk to say what it holds.
const START: Duration = Duration::from_secs(10);
/// How much the kernel reads around a page fault and ahead of a sequential reader, bytes: one piece, which is what a
/// touch of it fetches anyway.
///
/// Measured on two cores and a local disk with 128, 256, 512 and 1024 KiB (medians of 5), a cold start of Python from an
/// empty local cache takes 0.42, 0.42, 0.42, 0.40 s and fetches 12.1, 12.5, 12.5, 12.5 MB; reading 256 MiB from the
/// local cache in order runs at 945, 1005, 829, 1017 MB/s. None of this decides; more only drops into memory
/// what nobody asked for.
const READ_AHEAD: u64 = 256 << 10;
/// Signals upon which other daemons reload or tell their state. They are no reason to take the mount away from running
/// containers.
const IGNORED: [i32; 3] = [SIGHUP, SIGUSR1, SIGUSR2];
/// How long the last requests of a mount may take after it was taken out of the tree.
const GRACE: Duration = Duration::from_secs(2);

/// Why a daemon cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is not valid.
    #[error(transparent)]
    Config(#[from] crate::mount::config::Error),
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

/// Everything behind a mount.
struct Components {
    shared_store: Arc<SharedStore>,
    watcher: Arc<CatalogueWatcher>,
    indexes: Arc<Indexes>,
    cache: Arc<Cache>,
    filesystem: Arc<Filesystem>,
    /// What mounts native trees, or why nothing does.
    native: Result<Arc<NativeTrees>, String>,
    prefetcher: Arc<Prefetcher>,
    recorder: Arc<Recorder>,
    metrics: Arc<Metrics>,
    open_mode: Arc<ModeInUse>,
    lease: Option<Lease>,
    linked: Arc<LinkedChains>,
    started: Instant,
}

impl Components {
    fn new(config: &Config, cache_dir: &Path, lease: Option<Lease>) -> Result<Components, Error> {
        let descriptors = raise_descriptor_limit();
        let metrics = Arc::new(Metrics::default());
        let read_timeout = fuse_limits::read_timeout(config.read_timeout);
        let shared_store = Arc::new(SharedStore::new(&config.store, read_timeout, Arc::clone(&metrics)));
        let pools = Pools::new(LOCAL_THREADS, REMOTE_THREADS);
        let watcher =
            Arc::new(CatalogueWatcher::new(Arc::clone(&shared_store), pools.clone(), cache_dir.join("catalogue")));
        first_look(&shared_store, &watcher)?;
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
        let cache = Arc::new(cache);
        let indexes =
            Indexes::new(cache_dir.join("indexes"), Arc::clone(&shared_store), pools.clone(), Arc::clone(&cache));
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
        let open_mode = Arc::new(ModeInUse::new(config.open));
        let filesystem = Arc::new(filesystem);
        filesystem.hold_indexes();
        let native = native_trees(config, &filesystem, cache_dir.join(TREES))?;
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
            open_mode,
            lease,
            linked,
            started: Instant::now(),
        })
    }

    fn status(&self, config: &Config, mountpoint: &Mounted, cache_dir: &Path) -> Status {
        let snapshot = self.watcher.snapshot();
        let (layers_opened, chains_opened) = self.filesystem.opened();
        let status = self.lease.as_ref().map(Lease::status).unwrap_or_default();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
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
    metadata: PathBuf,
) -> Result<Result<Arc<NativeTrees>, String>, Error> {
    let ways = config.tree.ways();
    if ways.is_empty() {
        return Ok(Err("the configuration says so".to_owned()));
    }
    match NativeTrees::new(Arc::clone(filesystem), config.workers, metadata, ways) {
        Ok(native) => Ok(Ok(Arc::new(native))),
        Err(error) if config.tree != TreeChoice::Auto => Err(error.into()),
        Err(error) => {
            tracing::info!("engines get the mount's own trees, because native ones cannot be mounted here: {error}");
            Ok(Err(error.to_string()))
        }
    }
}

/// What the lease's thread reports about this host.
struct HostReport {
    components: Arc<Components>,
    id: String,
    mountpoint: PathBuf,
    cache_dir: PathBuf,
    roots: RefCell<Roots>,
}

impl lease::Report for HostReport {
    fn layers(&self) -> BTreeSet<Digest> {
        let mut layers = self.components.filesystem.in_use();
        layers.extend(self.roots.borrow_mut().layers(&self.cache_dir, &self.mountpoint, SystemTime::now()));
        layers
    }

    fn request(&self, layers: &BTreeSet<Digest>) -> LeaseRequest {
        let (counters, disk) = (self.components.metrics.snapshot(), self.components.cache.disk());
        // If there are more layers than a renewal can name, those that dockerd can start at any time come first.
        let led_to = self.roots.borrow_mut().layers(&self.cache_dir, &self.mountpoint, SystemTime::now());
        let others = layers.iter().filter(|layer| !led_to.contains(layer));
        let named = led_to.iter().chain(others).take(LAYERS_MAX).map(ToString::to_string);
        let mut images = self.components.watcher.snapshot().images_of(layers);
        images.truncate(NAMES_MAX);
        LeaseRequest {
            id: self.id.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            mountpoint: self.mountpoint.display().to_string(),
            images,
            layers: named.collect(),
            cache_used: disk.used(),
            cache_limit: disk.limit(),
            reads_hit: counters.reads_hit,
            reads_missed: counters.reads_missed,
            uptime_seconds: self.components.started.elapsed().as_secs(),
        }
    }
}

/// How long the store is looked into for a chain that is not known. Clients wait longer for an answer.
const LOOK: Duration = Duration::from_secs(2);
/// How often a client is told how far a prefetch is.
const PROGRESS: Duration = Duration::from_millis(200);

impl Components {
    /// Answers on the control socket.
    fn answer(&self, request: Request, config: &Config, mountpoint: &Mounted, cache_dir: &Path) -> Answers {
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

/// Reads the catalogue. While the shared disk is away, a host that has seen the store before can still mount.
fn first_look(shared_store: &Arc<SharedStore>, watcher: &Arc<CatalogueWatcher>) -> Result<(), Error> {
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

fn start(name: &str, action: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    std::thread::Builder::new().name(name.to_owned()).spawn(action).map(|_| ()).map_err(Error::Thread)
}

/// Raises this process's limit of descriptors as far as it may; returns how many of them cache files may take.
fn raise_descriptor_limit() -> usize {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 256 };
    let raised = setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok();
    let limit = if raised { hard } else { soft };
    usize::try_from(limit / 2).unwrap_or(usize::MAX).min(crate::content::cache::DESCRIPTORS)
}

/// Mounts and serves until unmounted or told to end. Calls `ready` once the mount can be used.
pub fn run(config: &Config, ready: impl FnOnce()) -> Result<(), Error> {
    oom_score::lower();
    let path = mountpoint::prepare(&config.mountpoint)?;
    let cache_dir = CacheDir::claim(&config.cache)?;
    let client = config.coordinator.clone().map(|address| Client::new(address, &config.credentials)).transpose()?;
    let (lease, renewal) = client.clone().map(|client| Lease::new(client, config.host_name.clone())).unzip();
    let components = Arc::new(Components::new(config, cache_dir.path(), lease)?);
    let listener = control_socket::listen(cache_dir.path())
        .map_err(|error| cache_dir::Error::unusable(cache_dir.path(), &error))?;
    start_threads(&components)?;
    let recorder = Arc::clone(&components.recorder);
    if let Some(client) = client.clone() {
        let filesystem = Arc::clone(&components.filesystem);
        start("cachefs-misses", move || filesystem.misses().run(client))?;
    }
    start("cachefs-traces", move || trace_upload::run(&recorder, client))?;
    let signals = Signals::new(IGNORED.iter().chain(&[SIGTERM, SIGINT])).map_err(Error::Thread)?;
    let device = mountpoint::mount(&path)?;
    let leased = renewal.map_or(Ok(()), |renewal| start_lease(&components, renewal, &path, cache_dir.path()));
    let served =
        leased.and_then(|()| serve(config, &components, &path, cache_dir.path(), listener, device, signals, ready));
    if served.is_err() {
        let _ = mountpoint::detach(&path);
    }
    control_socket::remove(cache_dir.path());
    served
}

#[expect(clippy::too_many_arguments, reason = "these are the components of one running mount, used once")]
fn serve(
    config: &Config,
    components: &Arc<Components>,
    path: &Path,
    cache_dir: &Path,
    listener: std::os::unix::net::UnixListener,
    device: std::os::fd::OwnedFd,
    signals: Signals,
    ready: impl FnOnce(),
) -> Result<(), Error> {
    let open_mode = Arc::clone(&components.open_mode);
    let server = Server::new(Arc::clone(&components.filesystem), device, config.workers, open_mode, cache_dir)
        .map_err(Error::Fuse)?;
    if let Err(error) = mountpoint::set_read_ahead(path, READ_AHEAD) {
        tracing::info!("the kernel keeps its own read-ahead on {}: {error}", path.display());
    }
    let mounted = mountpoint::mounted_on(path).ok_or_else(|| mountpoint::Error::NotMounted(path.to_owned()))?;
    if let Ok(native) = &components.native {
        begin_native_trees(native, &server, components, &mounted)?;
    }
    let (config, told, dir) = (config.clone(), Arc::clone(components), cache_dir.to_owned());
    start("cachefs-control", move || {
        control_socket::serve(&listener, move |request| told.answer(request, &config, &mounted, &dir));
    })?;
    let (mounted, dir) = (path.to_owned(), cache_dir.to_owned());
    start("cachefs-signals", move || end_on_signal(signals, &mounted, &dir))?;
    tracing::info!("mounted on {}", path.display());
    ready();
    server.run().map_err(Error::Fuse)?;
    if let Ok(native) = &components.native {
        // Containers may still run from them.
        native.finish();
    }
    // Removed before the process ends, so that whoever waits for the end is not told that something still uses the
    // mount.
    control_socket::remove(cache_dir);
    components.recorder.finish();
    if let Some(lease) = &components.lease {
        lease.release();
    }
    components.cache.remember_use();
    tracing::info!("unmounted {}", path.display());
    Ok(())
}

/// Mounts native trees from now on, and starts the thread that takes idle ones away.
fn begin_native_trees(
    native: &Arc<NativeTrees>,
    server: &Server,
    components: &Arc<Components>,
    mounted: &Mounted,
) -> Result<(), Error> {
    native.begin(
        &mounted.path,
        mounted.device_number(),
        Arc::new(server.forget_chains(Arc::clone(&components.filesystem))),
    );
    let (native, shared_store) = (Arc::clone(native), Arc::clone(&components.shared_store));
    let recorder = Arc::clone(&components.recorder);
    start("cachefs-trees", move || {
        let mut looked = Instant::now();
        loop {
            std::thread::sleep(STARTED_TREES);
            native.read_far_ahead(|chain| recorder.is_recording_of(chain));
            if looked.elapsed() < IDLE_TREES {
                continue;
            }
            looked = Instant::now();
            // What is looked up while the store hangs holds the kernel up where chains are forgotten.
            if shared_store.answered().is_some_and(|at| at.elapsed() < IDLE_TREES) {
                native.take_idle_away(Instant::now());
            }
        }
    })
}

/// Starts the thread that tells the coordinator what is in use.
fn start_lease(components: &Arc<Components>, renewal: Renewal, path: &Path, cache_dir: &Path) -> Result<(), Error> {
    let id = lease::host_id(cache_dir).map_err(|error| cache_dir::Error::unusable(cache_dir, &error))?;
    let (components, mountpoint, cache_dir) = (Arc::clone(components), path.to_owned(), cache_dir.to_owned());
    let report = HostReport { components, id, mountpoint, cache_dir, roots: RefCell::default() };
    start("cachefs-lease", move || renewal.run(&report))
}

/// Starts the background threads.
fn start_threads(components: &Arc<Components>) -> Result<(), Error> {
    let cache = Arc::clone(&components.cache);
    start("cachefs-evict", move || cache.keep_room())?;
    let refreshed = Arc::clone(components);
    start("cachefs-refresh", move || {
        let mut swept = false;
        loop {
            let (told, sweep) = (Arc::clone(&refreshed), !swept);
            swept = refreshed.shared_store.answered().is_some();
            let sweep = sweep && swept;
            refreshed.watcher.refresh(
                refreshed.shared_store.deadline(),
                Box::new(move |result| {
                    let Ok(result) = result else { return };
                    if sweep {
                        told.indexes.sweep(&result.snapshot.layers().iter().copied().collect());
                    }
                    told.prefetcher.look_ahead();
                }),
            );
            std::thread::sleep(REFRESH);
        }
    })?;
    let timed = Arc::clone(components);
    start("cachefs-clock", move || {
        loop {
            std::thread::sleep(TICK);
            let now = Instant::now();
            let late = timed.cache.expire(now) + timed.indexes.expire(now) + timed.watcher.expire(now);
            timed.metrics.store_timeouts.add(late as u64);
        }
    })
}

/// Waits for SIGTERM or SIGINT, then unmounts and ends the process; a mount that is in use is taken out of the tree.
/// Signals in [`IGNORED`] are only logged.
fn end_on_signal(mut signals: Signals, path: &Path, cache_dir: &Path) {
    let is_ignored = |signal: &i32| {
        let is_ignored = IGNORED.contains(signal);
        if is_ignored {
            let name = signal_name(*signal).unwrap_or("a signal");
            tracing::info!("{name} is ignored: a changed configuration is read at the next start");
        }
        is_ignored
    };
    if signals.forever().find(|signal| !is_ignored(signal)).is_none() {
        return;
    }
    match mountpoint::unmount(path) {
        Ok(()) | Err(mountpoint::Error::NotMounted(_)) => {}
        Err(error) => {
            tracing::warn!("{error}; told to end, so it is detached, and its users will find it disconnected");
            if let Err(error) = mountpoint::detach(path) {
                tracing::error!("{error}");
            }
        }
    }
    // Normally the connection ends now and with it the process; users of a detached mount could keep it for ever.
    std::thread::sleep(GRACE);
    control_socket::remove(cache_dir);
    std::process::exit(0);
}
