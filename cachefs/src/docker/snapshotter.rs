//! `cachefs snapshotter`: the crate of that name, over a mount of this host.
//!
//! The daemon of the mount says where a chain's tree is, and holds the layers of what engines have here in its lease: the root
//! is noted in the daemon's cache directory before the first snapshot is handed out.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use coordinator_api::quantity::parse_duration;
use snapshotter::server::{self, ServeError};
use snapshotter::snapshotter::Snapshotter;
use snapshotter::trees::{Tree, Trees};
use store::Digest;
use tokio::signal::unix::{SignalKind, signal};

use crate::docker::mount::{self, MountError};
use crate::mount::control_socket::{self, ChainTree, Request};
use crate::os::private_files::{self, Refusal};
use crate::uplink::lease::roots;

/// The entry of a root that shows that it is one.
const METADATA: &str = "metadata.redb";

/// What the help says last.
pub const EXAMPLE: &str = "\
Example:
  cachefs snapshotter --mount /run/cachefs/mnt

and in containerd's configuration, /etc/containerd/config.toml:
  [proxy_plugins.cachefs]
    type = \"snapshot\"
    address = \"/run/cachefs/snapshotter.sock\"";

/// How much longer than its wait for an image the daemon may take to answer.
const MARGIN: Duration = Duration::from_secs(30);

/// Arguments of `cachefs snapshotter`.
#[derive(Debug, Args)]
pub struct SnapshotterArgs {
    /// The socket that containerd is told of
    #[arg(long, value_name = "PATH", default_value = "/run/cachefs/snapshotter.sock")]
    socket: PathBuf,
    /// Where snapshots lie, on a local disk; each containerd needs its own
    #[arg(long, value_name = "DIR", default_value = "/var/lib/cachefs-snapshotter")]
    root: PathBuf,
    /// Where the store is mounted with cachefs mount
    #[arg(long)]
    mount: PathBuf,
    /// Let the coordinator bring images that the store lacks, if it pulls on demand, and wait at most so long for each; then,
    /// or while the coordinator is away, containerd pulls for itself
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pull_through: Option<Duration>,
}

/// Why the snapshotter cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The mount cannot be used.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The daemon of the mount does not tell its cache directory.
    #[error("the mount {} does not tell its cache directory: unmount it and mount it again", .0.display())]
    NoCache(PathBuf),
    /// The root cannot be used.
    #[error("{} cannot hold snapshots: {refusal}", path.display())]
    Root {
        /// The root.
        path: PathBuf,
        /// What is wrong with it.
        refusal: Refusal,
    },
    /// The root cannot be noted, so its layers would not be held.
    #[error("cannot note in {} that {} uses the mount: {source}", cache.display(), root.display())]
    Register {
        /// The cache directory.
        cache: PathBuf,
        /// The root.
        root: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// The snapshots cannot be opened.
    #[error(transparent)]
    Snapshots(#[from] snapshotter::error::Error),
    /// The socket cannot be served.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The program cannot run.
    #[error("cannot start: {0}")]
    Start(#[from] io::Error),
}

/// The trees that the daemon of a mount tells of.
struct DaemonTrees {
    mountpoint: PathBuf,
    /// How long an engine waits for an image that the coordinator brings.
    pull_through: Option<Duration>,
}

impl DaemonTrees {
    /// The daemon's cache directory. The mount may have been made anew, with another one.
    fn cache(&self) -> io::Result<PathBuf> {
        mount::cache(&self.mountpoint).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

fn tree(ChainTree { path, layers }: ChainTree) -> Tree {
    Tree { path, layers }
}

impl Trees for DaemonTrees {
    fn tree(&self, chain: &Digest) -> io::Result<Option<Tree>> {
        let found: Option<ChainTree> = control_socket::ask(&self.cache()?, &Request::Tree { chain: *chain })?;
        Ok(found.map(tree))
    }

    fn bring(&self, chain: &Digest, image: &str) -> io::Result<Option<Tree>> {
        let Some(limit) = self.pull_through else { return Ok(None) };
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let request = Request::PullThrough { chain: *chain, image: image.to_owned(), limit_ms };
        // The daemon asks the coordinator twice and then looks into the store.
        let found: Option<ChainTree> = control_socket::ask_within(&self.cache()?, &request, limit + MARGIN)?;
        Ok(found.map(tree))
    }
}

/// Serves until SIGTERM or SIGINT. Calls `ready` once containerd can connect.
pub fn run(args: &SnapshotterArgs, ready: impl FnOnce()) -> Result<(), Error> {
    private_files::close_umask();
    let mountpoint = mount::serving(&args.mount)?;
    let refused = |refusal| Error::Root { path: args.root.clone(), refusal };
    let root = private_files::claim(&args.root, METADATA).map_err(refused)?;
    let trees = DaemonTrees { mountpoint: mountpoint.clone(), pull_through: args.pull_through };
    let snapshotter = Arc::new(Snapshotter::open(&root, trees)?);
    register(&mountpoint, &root)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        if let Some(directory) = args.socket.parent() {
            std::fs::create_dir_all(directory)?;
        }
        let listener = server::listen(&args.socket)?;
        tracing::info!("snapshots in {} are served on {}", root.display(), args.socket.display());
        ready();
        server::serve(listener, snapshotter, stop).await?;
        let _ = std::fs::remove_file(&args.socket);
        Ok(())
    })
}

/// Notes the root with the mount's daemon, so that its lease holds what is linked there.
fn register(mountpoint: &Path, root: &Path) -> Result<(), Error> {
    let cache = mount::cache(mountpoint).ok_or_else(|| Error::NoCache(mountpoint.to_owned()))?;
    roots::register(&cache, root).map_err(|source| Error::Register { cache, root: root.to_owned(), source })
}
