//! Which index each layer has.
//!
//! A layer's index names the packs and chunks that its files are made of, and is itself named by the diffID, which does not cover it: the
//! same tar unpacked into a store with other packs has another index. So the catalogue says which bytes it is, and whoever reads an
//! index compares. It is said for the layers of images alone, and forgotten with the last image that has the layer.

use serde::{Deserialize, Serialize};

use crate::catalogue::Catalogue;
use crate::digest::{ContentDigest, Digest};
use crate::image::ImageRecord;

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
    /// How many times images have it.
    references: u32,
    index: Option<ContentDigest>,
}

impl Catalogue {
    /// The BLAKE3 digest that the layer's index must have; nothing where the catalogue, being older software's, does not say.
    pub fn index_of(&self, layer: &Digest) -> Option<&ContentDigest> {
        self.layers.get(layer)?.index.as_ref()
    }

    /// Whether an image has the layer.
    pub fn has_layer(&self, layer: &Digest) -> bool {
        self.layers.contains_key(layer)
    }

    /// The indexes of all layers of which it is known.
    pub fn indexes(&self) -> impl Iterator<Item = IndexRecord> {
        self.layers.iter().filter_map(|(layer, state)| Some(IndexRecord { layer: *layer, index: state.index? }))
    }

    /// An image has come.
    pub(super) fn refer(&mut self, image: &ImageRecord) {
        for layer in &image.layers {
            self.layers.entry(layer.diff_id).or_default().references += 1;
        }
    }

    /// An image has gone.
    pub(super) fn release(&mut self, image: &ImageRecord) {
        for layer in &image.layers {
            let Some(state) = self.layers.get_mut(&layer.diff_id) else { continue };
            state.references = state.references.saturating_sub(1);
            if state.references == 0 {
                self.layers.remove(&layer.diff_id);
            }
        }
    }

    /// These are the indexes of layers that images have.
    pub(super) fn set_indexes(&mut self, records: impl IntoIterator<Item = IndexRecord>) {
        for IndexRecord { layer, index } in records {
            if let Some(state) = self.layers.get_mut(&layer) {
                state.index = Some(index);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::tests::image;
    use crate::catalogue::{Change, Generation};

    #[test]
    fn a_layers_index_is_known_as_long_as_an_image_has_the_layer() {
        let (one, two) = (image("r/a", Some("1"), 1), image("r/b", Some("1"), 1));
        let layer = one.layers[0].diff_id;
        let record = IndexRecord { layer, index: ContentDigest::of(b"index") };
        let mut catalogue = Catalogue::default();
        let commit = |catalogue: &mut Catalogue, changes: Vec<Change>, indexes: Vec<IndexRecord>| {
            let next = Generation { indexes, ..catalogue.next_change(1, changes) };
            let next = Generation::decode(&next.encode().unwrap()).unwrap();
            catalogue.apply(next).unwrap();
        };
        let removal = |image: &ImageRecord| Change::Remove {
            repository: image.repository.clone(),
            tag: image.tag.clone(),
            target: image.target,
        };
        commit(&mut catalogue, vec![Change::Set(one.clone())], vec![record.clone()]);
        commit(&mut catalogue, vec![Change::Set(two.clone())], Vec::new());
        assert_eq!(catalogue.index_of(&layer), Some(&record.index));
        let whole = Generation::decode(&catalogue.whole(9, 1).encode().unwrap()).unwrap();
        let mut reader = Catalogue::default();
        reader.apply(whole).unwrap();
        assert_eq!(reader.indexes().collect::<Vec<_>>(), std::slice::from_ref(&record));
        commit(&mut catalogue, vec![removal(&one)], Vec::new());
        assert_eq!(catalogue.index_of(&layer), Some(&record.index), "the other image has it still");
        commit(&mut catalogue, vec![removal(&two)], Vec::new());
        assert!(!catalogue.has_layer(&layer));
        commit(&mut catalogue, vec![Change::Set(one)], Vec::new());
        assert_eq!(catalogue.index_of(&layer), None, "it may come back with another one");
        commit(&mut catalogue, Vec::new(), vec![record.clone()]);
        assert_eq!(catalogue.index_of(&layer), Some(&record.index));
    }
}
