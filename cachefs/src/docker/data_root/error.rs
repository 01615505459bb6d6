//! What can go wrong with a data-root; the message of each error is one sentence.

use std::io;
use std::path::{Path, PathBuf};

use crate::docker::files::FileError;
use crate::docker::mount::MountError;
use crate::docker::tar_split::TarSplitError;

/// A failure of `cachefs data-root`. Every message names the object, what is wrong and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path is not a directory.
    #[error("{} is not a directory: give dockerd's data-root (create it first if it is new)", path.display())]
    NotADirectory {
        /// The path that was given.
        path: PathBuf,
    },
    /// dockerd keeps its images there with another storage driver.
    #[error("{} belongs to dockerd's storage driver {driver}, and only overlay2 can share layers: set \"storage-driver\": \"overlay2\" in daemon.json and start dockerd once, or use another data-root", path.display())]
    Driver {
        /// The data-root.
        path: PathBuf,
        /// The driver found.
        driver: String,
    },
    /// dockerd keeps its images in containerd.
    #[error("dockerd keeps the images of {} in containerd, where a data-root has no say: run cachefs snapshotter for that containerd, or set \"features\": {{\"containerd-snapshotter\": false}} in daemon.json", path.display())]
    InContainerd {
        /// The data-root.
        path: PathBuf,
    },
    /// Container layers cannot live on this file system.
    #[error("{} lies on {kind}, where overlay2 cannot keep containers: use a data-root on a local file system such as ext4 or xfs", path.display())]
    FileSystem {
        /// The data-root.
        path: PathBuf,
        /// The file system's name.
        kind: &'static str,
    },
    /// A data-root of dockerd with user namespaces.
    #[error("{} is a data-root with remapped users, whose layers cannot be shared: run dockerd without userns-remap", path.display())]
    Remapped {
        /// The data-root.
        path: PathBuf,
    },
    /// The mount point serves no layers.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// `sync` or `status` before `init`.
    #[error("{} has not been prepared: run cachefs data-root init {} --mount MOUNTPOINT --store DIR first", path.display(), path.display())]
    NotPrepared {
        /// The data-root.
        path: PathBuf,
    },
    /// Nothing says where the store is.
    #[error("the daemon of {} does not say which store it serves: add --store DIR", path.display())]
    NoStore {
        /// The mount point.
        path: PathBuf,
    },
    /// The store is not the one that the data-root was prepared for.
    #[error("{} was prepared for another store than {}: run cachefs data-root init {} to change it", path.display(), store.display(), path.display())]
    OtherStore {
        /// The data-root.
        path: PathBuf,
        /// The store given.
        store: PathBuf,
    },
    /// An older version has prepared the data-root.
    #[error("{} was prepared by an older cachefs: stop dockerd, run cachefs data-root remove {} and cachefs data-root init again", path.display(), path.display())]
    OldLayout {
        /// The data-root.
        path: PathBuf,
    },
    /// dockerd runs, and what is asked for cannot be done beside it.
    #[error("dockerd{} runs on {} and would not see the change: stop it (systemctl stop docker.socket docker.service), run this command again and start it", process(*pid), path.display())]
    Running {
        /// The data-root.
        path: PathBuf,
        /// Its process id; 0 if it cannot be seen from here.
        pid: u32,
    },
    /// Something local needs what is to be removed.
    #[error("{} still needs images of the store for {}: remove these (docker rm, docker rmi, docker builder prune), stop dockerd and run this command again", path.display(), users.join(", "))]
    InUse {
        /// The data-root.
        path: PathBuf,
        /// What needs them.
        users: Vec<String>,
    },
    /// A file of the data-root cannot be understood.
    #[error("{} cannot be understood ({why}): repair it or move it away", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// dockerd runs, but neither systemd's `docker.service` nor a given command controls it.
    #[error("dockerd on {} is not run by systemd's docker.service: stop it, run this command again and start it, or give --restart-command", path.display())]
    Unmanaged {
        /// The data-root.
        path: PathBuf,
    },
    /// A command that stops or starts dockerd failed.
    #[error("`{command}` failed ({why}): look into dockerd's log, then run cachefs data-root sync again")]
    Control {
        /// The command line.
        command: String,
        /// Its exit status, or why it could not be run.
        why: String,
    },
    /// dockerd still runs after it was told to stop.
    #[error("dockerd on {} still runs {seconds} seconds after `{command}`: stop it and run cachefs data-root sync again", path.display())]
    StillRunning {
        /// The data-root.
        path: PathBuf,
        /// The command line.
        command: String,
        /// How long it was given, seconds.
        seconds: u64,
    },
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// An error of the store.
    #[error(transparent)]
    Store(#[from] store::Error),
}

/// The module's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl From<TarSplitError> for Error {
    fn from(error: TarSplitError) -> Error {
        match error {
            TarSplitError::Store(error) => Error::Store(error),
            TarSplitError::File(error) => Error::File(error),
        }
    }
}

fn process(pid: u32) -> String {
    if pid == 0 { String::new() } else { format!(" (process {pid})") }
}

impl Error {
    /// Classifies an I/O error met while doing `action` to `path`.
    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> Error {
        FileError::io(action, path, source).into()
    }
}
