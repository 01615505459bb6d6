//! Why an operation failed, in the classes by which containerd decides what to do.

use std::io;
use std::path::{Path, PathBuf};

use store::Digest;

use crate::filter::FilterError;

/// Result of an operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such snapshot.
    #[error("snapshot {0} does not exist")]
    NotFound(String),
    /// The name is taken; for a target, the store has it.
    #[error("snapshot {0} already exists")]
    AlreadyExists(String),
    /// The request can never be carried out.
    #[error("{0}")]
    InvalidArgument(String),
    /// The request cannot be carried out as things are.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The filter of a listing is wrong.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The mount of the shared store does not answer.
    #[error("the tree {} cannot be read: {source}; see that cachefs is mounted there (cachefs status)", path.display())]
    Tree {
        /// The tree.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// The store has lost what a snapshot is made of.
    #[error(
        "snapshot {name} is of layers that the store no longer has ({chain}): remove its containers and its image, and pull it again"
    )]
    Gone {
        /// The snapshot.
        name: String,
        /// The chain.
        chain: Digest,
    },
    /// The local disk failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, a verb.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// Another process has the root open.
    #[error("{} is in use by another snapshotter: give each containerd a snapshotter with a root of its own", .0.display())]
    InUse(PathBuf),
    /// The metadata cannot be read or written.
    #[error("the snapshots' metadata cannot be used: {0}")]
    Metadata(Box<redb::Error>),
    /// A record is not what this version writes.
    #[error("the record of snapshot {name} is damaged: {source}")]
    Record {
        /// The snapshot.
        name: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

impl Error {
    /// Whether the database takes nothing any more until it is opened again, as after a full disk.
    pub(crate) fn is_final(&self) -> bool {
        matches!(self, Error::Metadata(error) if matches!(**error, redb::Error::PreviousIo | redb::Error::Io(_)))
    }

    /// For [`Result::map_err`]: a failure of the local disk.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { action, path, source }
    }
}

macro_rules! from_metadata {
    ($($error:ty),+) => {
        $(impl From<$error> for Error {
            fn from(error: $error) -> Error {
                Error::Metadata(Box::new(error.into()))
            }
        })+
    };
}

from_metadata!(redb::DatabaseError, redb::TransactionError, redb::TableError, redb::StorageError, redb::CommitError);
