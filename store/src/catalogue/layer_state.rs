//! What the catalogue knows of one layer.

use serde::{Deserialize, Serialize};

use crate::digest::{ContentDigest, Digest};

/// The index that a layer has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexRecord {
    /// The layer's diffID.
    pub layer: Digest,
    /// BLAKE3 of the file `index`, as it lies in the store.
    pub index: ContentDigest,
}

/// What is known of a layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct LayerState {
    /// The number of references from images.
    pub(super) references: u32,
    pub(super) index: Option<ContentDigest>,
}
