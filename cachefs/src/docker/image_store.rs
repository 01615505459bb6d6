//! `cachefs image-store`: an additional image store of containers/storage, for Podman, Buildah and CRI-O.
//!
//! These engines read images from the directories that `additionalimagestores` in storage.conf names, and never write there.
//! This module keeps such a directory on the local disk; a layer's `diff` in it is a link to the merged tree of its chain in
//! the mount. It follows the catalogue: what is published appears, what is removed goes, and no engine is restarted, for each
//! of their commands looks whether the lists have changed.
//!
//! Invariants: whatever a list names is complete (`tree`); a crash at any point leaves lists that can be read; the layers that
//! containers and images of the engine's own storage stand on stay, even if their image is gone.
//!
//! Module order (imports point up this list only):
//!
//! - `error`: errors.
//! - `documents`: the lists, as containers/storage reads them.
//! - `contents`: what the store's catalogue asks for. `in_use`: what the engines' own containers and images need.
//! - `tree`: the directory.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use snapshotter::bounded::Bounded;
use store::reader::Store;

use crate::docker::mount::{self, MountError};
use crate::mount::control_socket::{self, Request, Status};
use crate::os::private_files;

mod contents;
mod documents;
mod error;
mod in_use;
mod tree;

pub use error::Error;

use contents::Contents;
use tree::{Changes, Tree};

/// What the help says last.
pub const EXAMPLE: &str = "\
Example:
  cachefs image-store /var/lib/cachefs-image-store --mount /run/cachefs/mnt

and in /etc/containers/storage.conf:
  [storage.options]
  additionalimagestores = [\"/var/lib/cachefs-image-store\"]";

/// How often the catalogue's generation is asked for.
const POLL: Duration = Duration::from_secs(1);
/// How often the directory is looked through without a change of the catalogue: to repair it, and to let go of what was kept for
/// a container that is gone.
const REVIEW: Duration = Duration::from_secs(300);

/// Arguments of `cachefs image-store`.
#[derive(Debug, Args)]
pub struct ImageStoreArgs {
    /// The directory to keep, on a local disk
    #[arg(default_value = "/var/lib/cachefs-image-store")]
    dir: PathBuf,
    /// Where the store is mounted with cachefs mount
    #[arg(long)]
    mount: PathBuf,
    /// An engine's own storage, whose containers and images keep what they stand on; may be given more than once
    #[arg(long, value_name = "DIR", default_value = "/var/lib/containers/storage")]
    graph_root: Vec<PathBuf>,
    /// Bring the directory up to date and end, instead of following the catalogue
    #[arg(long)]
    once: bool,
}

/// Keeps the directory until the process is ended, or brings it up to date once. Calls `ready` when that was done for the first
/// time.
pub fn run(args: &ImageStoreArgs, ready: impl FnOnce()) -> Result<(), Error> {
    private_files::close_umask();
    let mountpoint = mount::canonical(&args.mount)?;
    let refused = |refusal| Error::Directory { path: args.dir.clone(), refusal };
    let root = private_files::claim(&args.dir, tree::IMAGES).map_err(refused)?;
    let tree = Tree::open(&root, &mountpoint)?;
    let keeper = Keeper { tree, mountpoint, root, graph_roots: args.graph_root.clone(), bounded: Arc::default() };
    if args.once {
        mount::serving(&keeper.mountpoint)?;
        let status = keeper.status().ok_or_else(|| MountError::NotMounted(keeper.mountpoint.clone()))?;
        keeper.update(&status)?;
        ready();
        return Ok(());
    }
    keeper.follow(ready)
}

/// What keeps one directory.
struct Keeper {
    tree: Tree,
    mountpoint: PathBuf,
    root: PathBuf,
    graph_roots: Vec<PathBuf>,
    bounded: Arc<Bounded>,
}

impl Keeper {
    /// What the mount's daemon says, after the directory is noted with it: it then holds the layers in the store.
    fn status(&self) -> Option<Status> {
        let ask = |cache: &Path| control_socket::ask(cache, &Request::Status);
        mount::with_cache(&self.bounded, (&self.mountpoint, &self.root), ask).ok()
    }

    fn update(&self, status: &Status) -> Result<(), Error> {
        let store = Store::open(&status.store)?;
        let contents = Contents::read(&store)?;
        let changes = self.tree.update(&store, contents, &self.graph_roots)?;
        if changes != Changes::default() {
            let Changes { images, layers } = changes;
            tracing::info!("{}: {images} images, {layers} layers have come or gone", self.root.display());
        }
        Ok(())
    }

    /// Follows the catalogue. While the mount or the store is away the directory stays as it is.
    fn follow(&self, ready: impl FnOnce()) -> ! {
        let mut ready = Some(ready);
        let (mut done, mut failure) = (None, String::new());
        let mut reviewed = Instant::now();
        loop {
            let status = self.status();
            let at = status.as_ref().map(|status| (status.store.clone(), status.generation));
            let outcome = match &status {
                None => Err(MountError::NotMounted(self.mountpoint.clone()).into()),
                Some(_) if at == done && reviewed.elapsed() < REVIEW => Ok(()),
                Some(status) => self.update(status).map(|()| reviewed = Instant::now()),
            };
            match outcome {
                Ok(()) => {
                    (done, failure) = (at, String::new());
                    if let Some(ready) = ready.take() {
                        ready();
                    }
                }
                Err(error) => {
                    let message = error.to_string();
                    if message != failure {
                        tracing::warn!("{} stays as it is: {message}", self.root.display());
                    }
                    failure = message;
                }
            }
            std::thread::sleep(POLL);
        }
    }
}
