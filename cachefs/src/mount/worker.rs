//! The worker: puts everything together, serves what the keeper has mounted, and ends cleanly.
//!
//! It may follow another one that has served the same mount and died ([`super::keeper`]). Then the kernel and its users wait for it,
//! some of its own threads perhaps among them: before it serves it must touch neither the mount nor wait for the shared disk.
//!
//! Threads: FUSE threads, which never wait; the two pools, one for waiting for the shared disk and one for the local
//! disk; those that serve data files of native trees, and those that mount such; one thread each for the keeper, its knowledge that this lives, the control socket, eviction, traces, image misses, the
//! lease, the catalogue's refresh, idle native trees, and the clock that tells requests that their time is up.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use coordinator_api::Client;
use coordinator_api::host::{LAYERS_MAX, LeaseRequest, NAMES_MAX};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;
use store::Digest;

use crate::filesystem::io_mode::OpenMode;
use crate::mount::cache_dir;
pub use crate::mount::components::Error;
use crate::mount::components::{Components, KeptMount, start};
use crate::mount::config::Config;
use crate::mount::control_socket;
use crate::mount::fuse::Server;
use crate::mount::link::{self, Link, Notice};
use crate::mount::mountpoint::{self, Mounted};
use crate::mount::native_trees::NativeTrees;
use crate::os::oom_score;
use crate::uplink::lease::roots::Roots;
use crate::uplink::lease::{self, Lease, Renewal};
use crate::uplink::recorder::trace_upload;

/// How often the catalogue is refreshed.
const REFRESH: Duration = Duration::from_secs(3);
/// How often native trees that nobody uses are looked for.
const IDLE_TREES: Duration = Duration::from_secs(10);
/// How often native trees are looked at whose images have started.
const STARTED_TREES: Duration = Duration::from_secs(1);
/// How often the deadlines of requests are checked.
const TICK: Duration = Duration::from_millis(100);
/// How much the kernel reads around a page fault and ahead of a sequential reader, bytes: one piece, which is what a
/// touch of it fetches anyway.
///
/// Measured on two cores and a local disk with 128, 256, 512 and 1024 KiB (medians of 5), a cold start of Python from an
/// empty local cache takes 0.42, 0.42, 0.42, 0.40 s and fetches 12.1, 12.5, 12.5, 12.5 MB; reading 256 MiB from the
/// local cache in order runs at 945, 1005, 829, 1017 MB/s. None of this decides; more only drops into memory
/// what nobody asked for.
const READ_AHEAD: u64 = 256 << 10;
/// Signals that are the keeper's business.
const IGNORED: [i32; 5] = [SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2];
/// How long the last requests of a mount may take after it was taken out of the tree.
const GRACE: Duration = Duration::from_secs(2);

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

/// Serves the mount of the keeper that has started this process, until it is unmounted or told to end. An error is told to the keeper, too.
pub fn run(config: &Config) -> Result<(), Error> {
    oom_score::lower();
    // Whoever wants the mount to end tells the keeper; a terminal or a service manager tells all processes.
    let _ignored = Signals::new(IGNORED).map_err(Error::Thread)?;
    let of_keeper = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    of_keeper.map_err(|error| Error::Begin(error.into()))?;
    link::live().map_err(Error::Begin)?;
    let (link, handed) = Link::begin().map_err(Error::Begin)?;
    let (link, _lock) = (Arc::new(link), handed.lock);
    let state = Arc::new(handed.state);
    let mount = KeptMount {
        device: handed.device,
        state,
        data: handed.data,
        earlier: handed.earlier,
        mount_device: handed.mount_device,
        link: Arc::clone(&link),
    };
    let served = run_kept(config, mount);
    link.tell(&match &served {
        Ok(()) => Notice::Ended,
        Err(error) => Notice::Failed(error.to_string()),
    });
    served
}

fn run_kept(config: &Config, mut mount: KeptMount) -> Result<(), Error> {
    let path = config.mountpoint.clone();
    let cache_dir = &*config.cache;
    let client = config.coordinator.clone().map(|address| Client::new(address, &config.credentials)).transpose()?;
    let (lease, renewal) = client.clone().map(|client| Lease::new(client, config.host_name.clone())).unzip();
    let components = Arc::new(Components::new(config, &mut mount, lease)?);
    let unusable = |error: io::Error| cache_dir::Error::unusable(cache_dir, &error);
    let listener = control_socket::listen(cache_dir).map_err(unusable)?;
    start_threads(&components)?;
    let recorder = Arc::clone(&components.recorder);
    if let Some(client) = client.clone() {
        let filesystem = Arc::clone(&components.filesystem);
        start("cachefs-misses", move || filesystem.misses().run(client))?;
    }
    start("cachefs-traces", move || trace_upload::run(&recorder, client))?;
    renewal.map_or(Ok(()), |renewal| start_lease(&components, renewal, &path, cache_dir))?;
    let served = serve(config, &components, &path, listener, &mount);
    control_socket::remove(cache_dir);
    served
}

fn serve(
    config: &Config,
    components: &Arc<Components>,
    path: &Path,
    listener: std::os::unix::net::UnixListener,
    mount: &KeptMount,
) -> Result<(), Error> {
    let (open_mode, filesystem) = (Arc::clone(&components.open_mode), Arc::clone(&components.filesystem));
    let server = Server::new(filesystem, &mount.device, config.fuse_threads, open_mode, &config.cache, &mount.state);
    let server = server.map_err(Error::Fuse)?;
    if let Err(error) = mountpoint::set_read_ahead(path, READ_AHEAD) {
        tracing::info!("the kernel keeps its own read-ahead on {}: {error}", path.display());
    }
    let mounted = mount.mounted(path).unwrap_or_else(|| Mounted::ended(path));
    if let Ok(native) = &components.native {
        begin_native_trees(native, &server, components, &mounted)?;
    }
    let (served, told, shown) = (config.clone(), Arc::clone(components), mounted.clone());
    start("cachefs-control", move || {
        control_socket::serve(&listener, move |request| told.answer(request, &served, &shown, &served.cache));
    })?;
    let (ended, cache_dir, link) = (mounted, config.cache.clone(), Arc::clone(&mount.link));
    start("cachefs-keeper", move || end_when_told(&link, &ended, &cache_dir))?;
    tracing::info!("{} {}", if mount.earlier > 0 { "took over" } else { "mounted on" }, path.display());
    // Passthrough is not resumed: which files are open in which mode is not recorded.
    let can_resume = server.can_resume() && config.open != OpenMode::Passthrough;
    mount.link.tell(&Notice::Ready { can_resume });
    server.run().map_err(Error::Fuse)?;
    if let Ok(native) = &components.native {
        // Containers may still run from them.
        native.finish();
    }
    // Removed before the process ends, so that whoever waits for the end is not told that something still uses the
    // mount.
    control_socket::remove(&config.cache);
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
                        let (named, in_use) = (result.snapshot.layers(), told.filesystem.in_use());
                        told.indexes.sweep(&named.union(&in_use).copied().collect());
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

/// Waits until the keeper says so, then unmounts and ends the process; a mount that is in use is taken out of the tree.
fn end_when_told(link: &Link, mounted: &Mounted, cache_dir: &Path) {
    link.wait_for_end();
    let is_there = mountpoint::mounted_on(&mounted.path).as_ref() == Some(mounted);
    match if is_there { mountpoint::unmount(&mounted.path) } else { Ok(()) } {
        Ok(()) | Err(mountpoint::Error::NotMounted(_)) => {}
        Err(error) => {
            tracing::warn!("{error}; told to end, so it is detached, and its users will find it disconnected");
            if let Err(error) = mountpoint::detach(&mounted.path) {
                tracing::error!("{error}");
            }
        }
    }
    // Normally the connection ends now and with it the process; users of a detached mount could keep it for ever.
    std::thread::sleep(GRACE);
    control_socket::remove(cache_dir);
    link.tell(&Notice::Ended);
    std::process::exit(0);
}
