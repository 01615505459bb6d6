//! Why a pull ended without an image.
//!
//! Cloneable, because several jobs may wait for one layer. The store's error is not cloneable, so it is shared.

use std::sync::Arc;

use store::Digest;

use crate::registries::RegistryError;
use crate::registries::compression::WindowTooLarge;

/// Why a pull failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PullError {
    /// The registry or the archive failed, or sent something wrong.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The digest is right, but the blob cannot be unpacked.
    #[error("{what} is corrupt ({why}): build and push the image again")]
    CorruptLayer {
        /// The layer.
        what: String,
        /// The decoder's message.
        why: String,
    },
    /// The bytes are no layer, whatever their media type says.
    #[error(
        "{what} is neither a tar nor packed with gzip, zstd, bzip2 or xz, but its media type {media_type} says otherwise: push the image again"
    )]
    WrongEncoding {
        /// The layer.
        what: String,
        /// Its media type.
        media_type: String,
    },
    /// The digest is right, but unpacking would take too much memory.
    #[error("{what} cannot be unpacked: {why} and push the image again")]
    WindowTooLarge {
        /// The layer.
        what: String,
        /// Which bound is exceeded, and what to do.
        why: WindowTooLarge,
    },
    /// Bytes after the end of the compressed stream.
    #[error("{what} sends more after its {encoding} stream ends: build and push the image again")]
    TrailingBytes {
        /// The layer.
        what: String,
        /// The compression.
        encoding: String,
    },
    /// The blob was verified before, as another layer.
    #[error(
        "{what} is said to be {claimed}, but its content was verified as {known}: the image's config is wrong, build and push it again"
    )]
    WrongDiffId {
        /// The layer.
        what: String,
        /// The diffID in the config.
        claimed: Digest,
        /// The diffID that was found before.
        known: Digest,
    },
    /// The tar inside is not acceptable, or is not the one that the config names.
    #[error("{0}")]
    Unpack(String),
    /// The shared store failed.
    #[error(transparent)]
    Store(Arc<store::Error>),
    /// The coordinator's database failed.
    #[error("{0}")]
    StateDb(String),
    /// The job was cancelled, or the coordinator is stopping.
    #[error("cancelled")]
    Cancelled,
}

impl PullError {
    /// Whether the shared disk was full: the job can then simply be retried.
    pub fn is_full(&self) -> bool {
        matches!(self, PullError::Store(error) if matches!(**error, store::Error::Full { .. }))
    }
}

impl From<store::Error> for PullError {
    fn from(error: store::Error) -> PullError {
        PullError::Store(Arc::new(error))
    }
}
