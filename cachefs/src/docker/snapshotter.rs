//! `cachefs snapshotter`: the crate of that name, over a mount of this host.
//!
//! The daemon of the mount says where a chain's tree is, and holds the layers of what engines have here in its lease: the root
//! is noted in the daemon's cache directory before a tree is handed out, and again whenever the mount comes back with another one.
//!
//! The snapshotter does not need the mount to start, nor to go on: images that containerd fetched itself work without it, and
//! those of the store again as soon as it is back. Its socket may be handed over by systemd; then containerd's requests wait
//! while it is restarted, instead of failing.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use listenfd::ListenFd;
use snapshotter::bounded::Bounded;
use snapshotter::server::{self, ServeError};
use snapshotter::snapshotter::Snapshotter;
use snapshotter::trees::{Tree, Trees};
use store::Digest;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::docker::mount::{self, MountError};
use crate::mount::control_socket::{self, ChainTree, Request};
use crate::os::private_files::{self, Refusal};

/// The entry of a root that shows that it is one.
const METADATA: &str = "metadata.redb";

/// What the help says last.
pub const EXAMPLE: &str = "\
Example:
  cachefs snapshotter --mount /run/cachefs/mnt

and in containerd's configuration, /etc/containerd/config.toml:
  [proxy_plugins.cachefs]
    type = \"snapshot\"
    address = \"/run/cachefs/snapshotter.sock\"
    [proxy_plugins.cachefs.exports]
      root = \"/var/lib/cachefs-snapshotter\"";

/// How often it is seen to that the mount knows of the root.
const NOTE: Duration = Duration::from_secs(5);

/// Arguments of `cachefs snapshotter`.
#[derive(Debug, Args)]
pub struct SnapshotterArgs {
    /// The socket that containerd is told of; one that systemd hands over goes first
    #[arg(long, value_name = "PATH", default_value = "/run/cachefs/snapshotter.sock")]
    socket: PathBuf,
    /// Where snapshots lie, on a local disk; each containerd needs its own
    #[arg(long, value_name = "DIR", default_value = "/var/lib/cachefs-snapshotter")]
    root: PathBuf,
    /// Where the store is mounted with cachefs mount
    #[arg(long)]
    mount: PathBuf,
}

/// Why the snapshotter cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The mount cannot be used.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The root cannot be used.
    #[error("{} cannot hold snapshots: {refusal}", path.display())]
    Root {
        /// The root.
        path: PathBuf,
        /// What is wrong with it.
        refusal: Refusal,
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

/// The trees that the daemon of a mount tells of. The mount may go and come back with another cache directory at any time.
#[derive(Clone)]
struct DaemonTrees {
    mountpoint: PathBuf,
    /// Where the snapshots lie.
    root: PathBuf,
    bounded: Arc<Bounded>,
}

impl DaemonTrees {
    /// Lets `action` work with the mount's cache directory, after the root is noted there.
    fn with_cache<R: Send + 'static>(
        &self,
        action: impl FnOnce(&Path) -> io::Result<R> + Send + 'static,
    ) -> io::Result<R> {
        mount::with_cache(&self.bounded, (&self.mountpoint, &self.root), action)
    }

    /// Sees to it, again and again, that the mount's daemon holds the layers of what is here, also after it came back anew.
    fn keep_noted(&self) {
        loop {
            let _ = self.with_cache(|_| Ok(()));
            std::thread::sleep(NOTE);
        }
    }
}

impl Trees for DaemonTrees {
    fn tree(&self, chain: &Digest) -> io::Result<Option<Tree>> {
        let request = Request::Tree { chain: *chain };
        let found: Option<ChainTree> = self.with_cache(move |cache| control_socket::ask(cache, &request))?;
        Ok(found.map(|ChainTree { path, layers }| Tree { path, layers }))
    }
}

/// Serves until SIGTERM or SIGINT. Calls `ready` once containerd can connect.
pub fn run(args: &SnapshotterArgs, ready: impl FnOnce()) -> Result<(), Error> {
    private_files::close_umask();
    let mountpoint = mount::canonical(&args.mount)?;
    let refused = |refusal| Error::Root { path: args.root.clone(), refusal };
    let root = private_files::claim(&args.root, METADATA).map_err(refused)?;
    if let Err(error) = mount::serving(&mountpoint) {
        tracing::warn!("until then, containerd fetches everything for itself: {error}");
    }
    let trees = DaemonTrees { mountpoint, root: root.clone(), bounded: Arc::default() };
    let snapshotter = Arc::new(Snapshotter::open(&root, trees.clone())?);
    std::thread::Builder::new().name("snapshotter-note".to_owned()).spawn(move || trees.keep_noted())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let served = runtime.block_on(async {
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        let inherited = ListenFd::from_env().take_unix_listener(0)?;
        let is_ours = inherited.is_none();
        let listener = match inherited {
            Some(listener) => {
                listener.set_nonblocking(true)?;
                UnixListener::from_std(listener)?
            }
            None => listen(&args.socket)?,
        };
        tracing::info!("snapshots in {} are served", root.display());
        ready();
        server::serve(listener, snapshotter, stop).await?;
        if is_ours {
            let _ = std::fs::remove_file(&args.socket);
        }
        Ok(())
    });
    // Whatever still waits for a mount that hangs is left behind.
    runtime.shutdown_background();
    served
}

/// Listens on a socket of its own.
fn listen(path: &Path) -> Result<UnixListener, Error> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    Ok(server::listen(path)?)
}
