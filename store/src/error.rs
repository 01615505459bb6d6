//! Errors of a store, named for what the caller can do about them.

use std::io;
use std::path::{Path, PathBuf};

/// A failure of the store. Every message names the object, what is wrong and what to do, in one sentence.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The named thing is not in the store.
    #[error("{what} is not in the store")]
    Missing {
        /// The object, as a person would name it.
        what: String,
    },
    /// Bytes do not match their digest or break the format's rules; the object must be fetched again.
    #[error("{what} is damaged: {why}")]
    Corrupt {
        /// The object, as a person would name it.
        what: String,
        /// The rule that does not hold.
        why: String,
    },
    /// The directory exists but holds no store.
    #[error("{} is not a cachefs store: {why}", path.display())]
    NotAStore {
        /// The directory.
        path: PathBuf,
        /// What is missing or different.
        why: String,
    },
    /// Written by newer software, with features that this one does not know.
    #[error("{what} needs a newer cachefs: {why}; upgrade this program")]
    Unsupported {
        /// The object.
        what: String,
        /// Version or feature bits.
        why: String,
    },
    /// Another coordinator leads this store.
    #[error("store {} is led by {holder} (epoch {epoch}): wait for it or stop it", path.display())]
    Held {
        /// The store's directory.
        path: PathBuf,
        /// The leader's own name.
        holder: String,
        /// The leader's fencing epoch.
        epoch: u64,
    },
    /// This coordinator's epoch has been superseded: it must not write any more.
    #[error(
        "this coordinator (epoch {mine}) has been replaced by epoch {current} and may no longer write to the store: restart it to stand by"
    )]
    Fenced {
        /// This coordinator's epoch.
        mine: u64,
        /// The epoch found in the store.
        current: u64,
    },
    /// No space left on the shared disk.
    #[error("the disk of {} is full: free space and try again", path.display())]
    Full {
        /// The file that was being written.
        path: PathBuf,
    },
    /// The store lies on a read-only file system, or its permissions forbid writing.
    #[error("{} cannot be written: {source}; mount the shared disk read-write for the coordinator", path.display())]
    ReadOnly {
        /// The file that was being written.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// An image reference, digest or name that is not well formed.
    #[error("{what:?} is not a valid {kind}: {why}")]
    Invalid {
        /// What kind of name it should have been.
        kind: &'static str,
        /// The text.
        what: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// Any other answer of the operating system.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Classifies an I/O error met while doing `action` to `path`.
    pub fn io(action: &'static str, path: &Path, source: io::Error) -> Error {
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::NotFound => Error::Missing { what: path.display().to_string() },
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::Full { path },
            io::ErrorKind::ReadOnlyFilesystem => Error::ReadOnly { path, source },
            _ => Error::Io { action, path, source },
        }
    }

    /// An [`Error::Corrupt`]: `what` breaks a rule of the format.
    pub fn corrupt(what: impl Into<String>, why: impl Into<String>) -> Error {
        Error::Corrupt { what: what.into(), why: why.into() }
    }

    /// Whether the object itself is at fault, rather than the disk or the caller.
    pub fn is_of_object(&self) -> bool {
        matches!(self, Error::Missing { .. } | Error::Corrupt { .. } | Error::Unsupported { .. })
    }

    /// Whether the object is simply absent.
    pub fn is_missing(&self) -> bool {
        matches!(self, Error::Missing { .. })
    }
}
