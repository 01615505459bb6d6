//! Which index each layer has.
//!
//! A layer's index says in which packs and chunks its files lie. Its path is the diffID, which does not cover it: the
//! same tar unpacked into a store with other packs has another index. So the catalogue records the digest of each
//! index, and readers compare it. It does so for the layers of images alone, and forgets an index with the last image
//! that has the layer.

use crate::catalogue::Catalogue;
use crate::catalogue::layer_state::IndexRecord;
use crate::digest::{ContentDigest, Digest};
use crate::image::ImageRecord;

impl Catalogue {
    /// The BLAKE3 digest that the layer's index must have; `None` if no image has the layer, or the catalogue does not
    /// say because older software wrote it.
    pub fn index_of(&self, layer: &Digest) -> Option<&ContentDigest> {
        self.layers.get(layer)?.index.as_ref()
    }

    /// Whether an image has the layer.
    pub fn has_layer(&self, layer: &Digest) -> bool {
        self.layers.contains_key(layer)
    }

    /// All indexes that are known, with their layers.
    pub fn indexes(&self) -> impl Iterator<Item = IndexRecord> {
        self.layers.iter().filter_map(|(layer, state)| Some(IndexRecord { layer: *layer, index: state.index? }))
    }

    /// Counts the references of an image that was added.
    pub(super) fn refer(&mut self, image: &ImageRecord) {
        for layer in &image.layers {
            self.layers.entry(layer.diff_id).or_default().references += 1;
        }
    }

    /// Drops the references of an image that was removed.
    pub(super) fn release(&mut self, image: &ImageRecord) {
        for layer in &image.layers {
            let Some(state) = self.layers.get_mut(&layer.diff_id) else { continue };
            state.references = state.references.saturating_sub(1);
            if state.references == 0 {
                self.layers.remove(&layer.diff_id);
            }
        }
    }

    /// Records the indexes of layers; those of layers that no image has are ignored.
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
