//! Indexes that come with a startup pack: one request brings all that a start lacks.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use store::Digest;
use store::layer::SealedIndex;

use super::{Indexes, Promised};
use crate::os::pool::Priority;

/// The layers whose indexes are to come; loads of them wait. What has not come when this is dropped, for whatever reason, or when loads
/// have waited for long enough, is fetched from its own place.
pub struct Expected {
    indexes: Arc<Indexes>,
    layers: Arc<Promised>,
}

impl Indexes {
    /// Takes over the fetches of those of these layers' indexes that this host does not have and nobody fetches.
    pub fn expect(self: &Arc<Self>, layers: &[Digest]) -> Expected {
        let lacking = layers.iter().copied().filter(|layer| !self.is_here(layer));
        let layers = lacking.filter(|layer| self.fetches.reserve(*layer)).collect::<Vec<_>>();
        let is_empty = layers.is_empty();
        let layers = Arc::new(Promised { until: self.shared_store.hint_deadline(), layers: Mutex::new(layers) });
        if !is_empty {
            self.promised.lock().push(Arc::clone(&layers));
        }
        Expected { indexes: Arc::clone(self), layers }
    }

    fn is_here(&self, layer: &Digest) -> bool {
        match self.opened.lock().get(layer) {
            Some(opened) => !opened.copy.is_lost(),
            None => self.known.lock().contains_key(layer),
        }
    }

    /// Fetches an index here and now, if this host does not have it and nobody fetches it. Blocks on the shared disk.
    pub fn fetch_now(&self, layer: &Digest) {
        if !self.is_here(layer) && self.fetches.reserve(*layer) {
            self.bring(*layer);
        }
    }

    /// Fetches from their own places what was promised, is late, and is waited for. A startup pack is a hint, whose file may hang where others answer.
    pub(super) fn give_up_promises(self: &Arc<Self>, now: Instant) {
        let mut late = Vec::new();
        self.promised.lock().retain(|promised| {
            let mut layers = promised.layers.lock();
            if promised.until <= now {
                late.extend(layers.extract_if(.., |layer| self.fetches.is_wanted(layer)));
            }
            !layers.is_empty()
        });
        late.iter().for_each(|layer| self.fetch(*layer));
    }
}

impl Expected {
    /// Whether no index is to come.
    pub fn is_empty(&self) -> bool {
        self.layers.layers.lock().is_empty()
    }

    /// Takes a layer's index; one that is not expected, or not any more, is left.
    pub fn deliver(&self, layer: &Digest, sealed: SealedIndex) {
        let mut layers = self.layers.layers.lock();
        let Some(place) = layers.iter().position(|expected| expected == layer) else { return };
        let (layer, indexes) = (layers.swap_remove(place), Arc::clone(&self.indexes));
        drop(layers);
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
        let left = std::mem::take(&mut *self.layers.layers.lock());
        left.iter().for_each(|layer| self.indexes.fetch(*layer));
    }
}
