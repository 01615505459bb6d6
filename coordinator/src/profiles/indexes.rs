//! The layers' indexes, kept in memory while traces of their images come in.

use std::sync::Arc;

use parking_lot::Mutex;
use store::Digest;
use store::layer::LayerIndex;
use store::reader::Store;

/// Indexes are kept up to this many bytes together; a larger one is not kept.
const KEPT_BYTES: usize = 32 << 20;

/// Reads indexes, and keeps the most recently used ones.
pub(super) struct Indexes {
    store: Store,
    /// Guards the list, last used first; never held during I/O.
    kept: Mutex<Vec<Arc<LayerIndex>>>,
}

impl Indexes {
    /// Reads the indexes of `store`.
    pub(super) fn new(store: Store) -> Indexes {
        Indexes { store, kept: Mutex::new(Vec::new()) }
    }

    /// The index of a layer. Blocks on the shared disk.
    pub(super) fn get(&self, diff_id: &Digest) -> Result<Arc<LayerIndex>, store::Error> {
        let found = self.kept.lock().iter().find(|index| index.diff_id() == *diff_id).cloned();
        let index = match found {
            Some(index) => index,
            None => Arc::new(self.store.index(diff_id)?),
        };
        let mut kept = self.kept.lock();
        kept.retain(|other| other.diff_id() != *diff_id);
        kept.insert(0, Arc::clone(&index));
        let mut bytes = 0;
        kept.retain(|index| {
            bytes += index.raw_len();
            bytes <= KEPT_BYTES
        });
        Ok(index)
    }
}
