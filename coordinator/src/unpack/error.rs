//! Why a layer is not published.

use std::io;

use store::Digest;

/// Why a layer was not published.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The store refused or failed.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The stream broke off; its source knows why.
    #[error("its tar stream could not be read: {0}")]
    Read(#[source] io::Error),
    /// Nobody wants the layer any more.
    #[error("cancelled")]
    Stopped,
    /// Docker would not accept the stream as a tar.
    #[error("its tar is not valid at byte {at}: {why}")]
    Tar {
        /// Offset in the stream.
        at: u64,
        /// The rule that the stream breaks.
        why: String,
    },
    /// One entry breaks a rule.
    #[error("its entry {name:?} {why}")]
    Entry {
        /// The entry's name.
        name: String,
        /// The rule that the entry breaks.
        why: String,
    },
    /// The stream is not the one that the image's config names.
    #[error("its content is {found}, but the image's config says diffID {expected}")]
    DiffId {
        /// The diffID in the config.
        expected: Digest,
        /// The digest of the stream.
        found: Digest,
    },
}
