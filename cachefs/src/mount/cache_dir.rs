//! The local cache's directory: made or checked, closed to others, and locked for one daemon.

use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::mount::control_socket::{self, Request, Status};
use crate::mount::mountpoint::DYING;
use crate::os::private_files;

/// The directory for metadata of native trees in a cache directory.
pub const TREES: &str = "trees";

/// Why a cache directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something is wrong with it.
    #[error("cache directory {} cannot be used: {why}", path.display())]
    Unusable {
        /// The directory.
        path: PathBuf,
        /// What is wrong, and what to do.
        why: String,
    },
    /// Another daemon uses it.
    #[error("cache directory {} is in use by {holder}", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
        /// Who has it and why, and what to do.
        holder: String,
    },
}

impl Error {
    /// A directory in which something could not be done.
    pub fn unusable(path: &Path, error: &io::Error) -> Error {
        Error::Unusable { path: path.to_owned(), why: reason(error) }
    }
}

/// A cache directory that no other daemon uses as long as this lives.
#[derive(Debug)]
pub struct CacheDir {
    path: PathBuf,
    lock: File,
}

impl CacheDir {
    /// Creates the directory if it does not exist, closes it to others or refuses it, checks that it can be written,
    /// and locks it.
    pub fn claim(path: &Path) -> Result<CacheDir, Error> {
        let unusable = |error: io::Error| Error::unusable(path, &error);
        let refused = |refusal: private_files::Refusal| match refusal {
            private_files::Refusal::Io(error) => unusable(error),
            refusal => Error::Unusable { path: path.to_owned(), why: refusal.to_string() },
        };
        let path = private_files::claim(path, "objects").map_err(refused)?;
        let open = || File::options().create(true).truncate(false).write(true).mode(0o600).open(path.join("lock"));
        let lock = open().map_err(unusable)?;
        let asked = Instant::now();
        while let Err(error) = lock.try_lock() {
            match error {
                TryLockError::WouldBlock if asked.elapsed() < DYING => std::thread::sleep(DYING / 100),
                TryLockError::WouldBlock => {
                    let holder = holder(control_socket::ask(&path, &Request::Status).ok().as_ref());
                    return Err(Error::InUse { path, holder });
                }
                TryLockError::Error(error) => return Err(unusable(error)),
            }
        }
        for directory in ["indexes", "objects", "traces", TREES] {
            private_files::directory(&path.join(directory)).map_err(refused)?;
        }
        private_files::close_files(&path).map_err(unusable)?;
        Ok(CacheDir { path, lock })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What keeps it locked, as long as anybody has it open.
    pub fn lock(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }
}

/// Who has a cache directory, if its daemon answers, and what to do.
fn holder(daemon: Option<&Status>) -> String {
    let Some(Status { pid, mountpoint, unmounted, .. }) = daemon else {
        return "another cachefs daemon: stop that one, or give this one its own".to_owned();
    };
    let path = mountpoint.display();
    if *unmounted {
        format!(
            "another cachefs daemon, {pid}: {path} was unmounted, and the containers that use it keep its daemon until they end; stop \
             them, or give this one its own"
        )
    } else {
        format!("another cachefs daemon, {pid}, which serves {path}: unmount that, or give this one its own")
    }
}

/// What is wrong with a cache directory, and what to do.
fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => {
            "it is not a directory; choose another one".into()
        }
        io::ErrorKind::ReadOnlyFilesystem => "it lies on a read-only file system; choose another one".into(),
        io::ErrorKind::PermissionDenied => "it may not be written; run cachefs as root, or choose another one".into(),
        io::ErrorKind::StorageFull => "its disk is full; free some space".into(),
        _ => error.to_string(),
    }
}
