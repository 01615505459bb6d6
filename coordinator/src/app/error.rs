//! Why a coordinator does not start, or stops.

use std::io;
use std::path::{Path, PathBuf};

use store::lease::TIME_TO_LIVE;

use crate::app::listener::ListenError;
use crate::app::private_directory::{self, PrivateError};
use crate::registries::oci::transport::TransportError;
use crate::state::state_db::StateError;

/// Why a coordinator does not start, or stops.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The catalogue is damaged.
    #[error(
        "{0}: start once with --salvage-catalogue to go on with what can be read, then run cachefsctl fsck --rebuild"
    )]
    Catalogue(store::Error),
    /// The superblock and its copy are both lost.
    #[error(
        "{0}, and its copy is lost too, but the directory has a store's directories: start once with --salvage-superblock to write it anew"
    )]
    Superblock(store::Error),
    /// A directory is not this coordinator's alone.
    #[error(transparent)]
    Private(#[from] PrivateError),
    /// The state database failed.
    #[error(transparent)]
    StateDb(#[from] StateError),
    /// The HTTP client for registries could not be set up.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A directory cannot be created.
    #[error("cannot create directory {}: {source}; create it or choose another one", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A socket or address cannot be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The thread that renews the lease could not be started.
    #[error(
        "the thread that renews the lease cannot be started: {0}; raise the number of processes that this user may have"
    )]
    Thread(io::Error),
    /// The lease could not be renewed in time.
    #[error("the lease on the store could not be renewed for {} seconds ({last}): check the shared disk and start again", TIME_TO_LIVE.as_secs())]
    LeaseLost {
        /// The error of the last attempt.
        last: store::Error,
    },
}

/// Damage that is met when the lease is first taken is the catalogue's, because nothing else is read then.
pub(super) fn first_failure(error: store::Error) -> ServeError {
    match error {
        error if error.is_of_object() && !matches!(error, store::Error::Unsupported { .. }) => {
            ServeError::Catalogue(error)
        }
        error => error.into(),
    }
}

pub(super) fn make_directory(path: &Path) -> Result<(), ServeError> {
    private_directory::make_public(path).map_err(|source| ServeError::Directory { path: path.to_owned(), source })
}
