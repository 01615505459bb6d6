//! What can go wrong with a request to the mount, and the errno that the container sees.
//!
//! One type for the whole read path. It is cheap to clone, because one failed fetch may have many waiters. The error
//! behind it is logged once, where it happened.

use nix::errno::Errno;

/// Why a request cannot be answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// No such name.
    #[error("no such file or directory")]
    Absent,
    /// A node number that this daemon never gave out.
    #[error("unknown node")]
    UnknownNode,
    /// A directory was needed.
    #[error("not a directory")]
    NotDirectory,
    /// Something other than a directory was needed.
    #[error("is a directory")]
    IsDirectory,
    /// A symbolic link or a regular file was needed.
    #[error("wrong kind of file")]
    WrongKind,
    /// No such extended attribute.
    #[error("no such attribute")]
    NoAttribute,
    /// The caller's buffer does not hold the value.
    #[error("buffer too small")]
    TooSmall,
    /// A seek past the end, or for data where there is none.
    #[error("no data there")]
    NoData,
    /// The shared store did not answer within the read timeout.
    #[error("the shared store did not answer in time")]
    TimedOut,
    /// The shared store answered with an error.
    #[error("the shared store cannot be read")]
    Unreachable,
    /// What the shared store holds does not match its digest.
    #[error("the shared store is damaged there")]
    Damaged,
    /// The layer's index, which is needed to answer, does not fit into the local cache.
    #[error("the layer's index does not fit into the local cache: give it more with --cache-size")]
    NoRoom,
}

impl Failure {
    /// The errno table of SEMANTICS.md.
    pub fn errno(&self) -> i32 {
        let errno = match self {
            Failure::Absent => Errno::ENOENT,
            // The kernel only knows numbers that we gave out, so a number from elsewhere is a file handle gone stale.
            Failure::UnknownNode => Errno::ESTALE,
            Failure::NotDirectory => Errno::ENOTDIR,
            Failure::IsDirectory => Errno::EISDIR,
            Failure::WrongKind => Errno::EINVAL,
            Failure::NoAttribute => Errno::ENODATA,
            Failure::TooSmall => Errno::ERANGE,
            Failure::NoData => Errno::ENXIO,
            // EIO, not ETIMEDOUT or EAGAIN: programs treat a read that fails with EIO as failed, and do not spin.
            Failure::TimedOut | Failure::Unreachable | Failure::Damaged | Failure::NoRoom => Errno::EIO,
        };
        errno as i32
    }
}

/// An error of the store while this host reads from it.
impl From<&store::Error> for Failure {
    fn from(error: &store::Error) -> Failure {
        use store::Error::{Corrupt, Fenced, Full, Held, Invalid, Io, Missing, NotAStore, ReadOnly, Unsupported};
        match error {
            Missing { .. } => Failure::Absent,
            Corrupt { .. } | Unsupported { .. } | Invalid { .. } => Failure::Damaged,
            NotAStore { .. } | Io { .. } | Full { .. } | ReadOnly { .. } | Held { .. } | Fenced { .. } => {
                Failure::Unreachable
            }
        }
    }
}

/// The result of a request.
pub type Result<T> = std::result::Result<T, Failure>;

/// Converts a result of the store, and logs its error.
pub(crate) fn stored<T>(result: store::error::Result<T>) -> Result<T> {
    result.map_err(|error| {
        match &error {
            // What the local disk does not give is fetched from the store, and that attempt logs its own error.
            store::Error::Io { .. } => tracing::debug!("{error}"),
            error => tracing::error!("{error}"),
        }
        Failure::from(&error)
    })
}
