//! Indexes that come with a startup pack: one request brings all that a start lacks.

use std::sync::Arc;

use store::Digest;
use store::layer::SealedIndex;

use super::Indexes;
use crate::os::pool::Priority;

/// The layers whose indexes are to come; loads of them wait. What has not come when this is dropped, for whatever reason, is fetched from its
/// own place.
pub struct Expected {
    indexes: Arc<Indexes>,
    layers: Vec<Digest>,
}

impl Indexes {
    /// Takes over the fetches of those of these layers' indexes that this host does not have and nobody fetches.
    pub fn expect(self: &Arc<Self>, layers: &[Digest]) -> Expected {
        let is_here = |layer: &Digest| match self.opened.lock().get(layer) {
            Some(opened) => !opened.copy.is_lost(),
            None => self.known.lock().contains_key(layer),
        };
        let lacking = layers.iter().copied().filter(|layer| !is_here(layer));
        let layers = lacking.filter(|layer| self.fetches.reserve(*layer)).collect();
        Expected { indexes: Arc::clone(self), layers }
    }
}

impl Expected {
    /// Whether no index is to come.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// Takes a layer's index; one that is not expected, or not any more, is left.
    pub fn deliver(&mut self, layer: &Digest, sealed: SealedIndex) {
        let Some(place) = self.layers.iter().position(|expected| expected == layer) else { return };
        let (layer, indexes) = (self.layers.swap_remove(place), Arc::clone(&self.indexes));
        // The processors share the unpacking.
        self.indexes.pools.local.submit(Priority::Demand, move || {
            let _guard = indexes.fetches.guard(vec![layer]);
            match indexes.unpack(&sealed) {
                Ok(unpacked) => {
                    let index = indexes.adopt(layer, unpacked);
                    indexes.fetches.end(&layer, index);
                }
                Err(error) => {
                    tracing::warn!("{error}, as it came with a startup pack: it is read in its own place");
                    indexes.fetch(layer);
                }
            }
        });
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.layers.iter().for_each(|layer| self.indexes.fetch(*layer));
    }
}
