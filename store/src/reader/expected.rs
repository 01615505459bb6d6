//! Checks that a layer's index is the one that the catalogue names.
//!
//! A store remembers the newest catalogue that was read through it. An index that differs from it may have been
//! replaced since (a repair unpacks a layer again), so the catalogue is read once more before the index is refused. If
//! no catalogue can be read, the index's own digest must suffice: a host reads on while the catalogue is damaged.

use std::sync::PoisonError;

use crate::catalogue::Catalogue;
use crate::digest::{ContentDigest, Digest};
use crate::error::{Error, Result};
use crate::reader::Store;

impl Store {
    /// Remembers a catalogue that was read, if it is the newest.
    pub(super) fn remember(&self, catalogue: &Catalogue) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.as_ref().is_none_or(|known| known.generation() <= catalogue.generation()) {
            *known = Some(catalogue.clone());
        }
    }

    fn remembered(&self) -> Option<Catalogue> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).clone();
        known.or_else(|| self.catalogue().ok())
    }

    /// Refuses an index if the catalogue names another one for the layer.
    pub(super) fn check_index(&self, layer: &Digest, found: &ContentDigest) -> Result<()> {
        let differs = |catalogue: Catalogue| catalogue.index_of(layer).is_some_and(|index| index != found);
        if !self.remembered().is_some_and(differs) || !self.catalogue().is_ok_and(differs) {
            return Ok(());
        }
        Err(Error::corrupt(format!("the index of layer {layer}"), "it is not the one that the catalogue names"))
    }
}
