//! Why a pull ended without an image.
//!
//! Cloneable, because several jobs may wait for one layer; the store's error, which is not, is shared.

use std::sync::Arc;

use store::Digest;

use crate::registries::RegistryError;
use crate::registries::encoding::WindowTooLarge;

/// A pull's failure.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PullError {
    /// The registry, the archive, or what they sent.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The digest is right, but what it names cannot be unpacked.
    #[error("{what} is corrupt ({why}): build and push the image again")]
    CorruptLayer {
        /// The layer.
        what: String,
        /// What the decoder says.
        why: String,
    },
    /// The bytes are no layer, however they are called.
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
        /// Which bound, and what to do.
        why: WindowTooLarge,
    },
    /// Bytes after the end of the compressed stream.
    #[error("{what} sends more after its {encoding} stream ends: build and push the image again")]
    TrailingBytes {
        /// The layer.
        what: String,
        /// How it is packed.
        encoding: String,
    },
    /// This blob was verified before, as another layer.
    #[error(
        "{what} is said to be {claimed}, but its content was verified as {known}: the image's config is wrong, build and push it again"
    )]
    WrongDiffId {
        /// The layer.
        what: String,
        /// What the config says.
        claimed: Digest,
        /// What was found before.
        known: Digest,
    },
    /// The tar inside is not acceptable, or is not the one that the config names.
    #[error("{0}")]
    Unpack(String),
    /// The shared store refuses.
    #[error(transparent)]
    Store(Arc<store::Error>),
    /// The coordinator's database refuses.
    #[error("{0}")]
    StateDb(String),
    /// The job was cancelled, or the coordinator stops.
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
