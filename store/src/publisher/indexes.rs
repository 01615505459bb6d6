//! Which index each layer has, recorded in the catalogue.
//!
//! An image is committed together with the digests of its layers' indexes: as read back when this leader published
//! them, else as the catalogue has them or as they lie in the store. A layer that is published again although images
//! have it (a repair) has its new index recorded before it gets its name, because until then there is no index that a
//! host could refuse.

use std::fs;

use crate::catalogue::{Catalogue, Change, Generation, IndexRecord};
use crate::digest::{ContentDigest, Digest};
use crate::error::{Error, Result};
use crate::publisher::Publisher;
use crate::publisher::holds::lock;

impl Publisher {
    /// The digest of a layer's index as it lies in the store.
    pub(super) fn index_digest(&self, layer: &Digest) -> Result<ContentDigest> {
        let path = self.store.layout().index(layer);
        fs::read(&path).map(|sealed| ContentDigest::of(&sealed)).map_err(|e| Error::io("read", &path, e))
    }

    /// Sets a layer's index: commits it at once if an image has the layer, else together with the first image that
    /// does.
    pub(super) fn expect_index(&self, layer: &Digest, index: ContentDigest) -> Result<()> {
        let mut catalogue = lock(&self.catalogue);
        if catalogue.has_layer(layer) && catalogue.index_of(layer) != Some(&index) {
            self.check()?;
            self.look_at_chain(&mut catalogue)?;
            let indexes = vec![IndexRecord { layer: *layer, index }];
            let next = Generation { indexes, ..catalogue.next_change(self.epoch, Vec::new()) };
            self.write(&mut catalogue, next)?;
        }
        lock(&self.indexes).insert(*layer, index);
        Ok(())
    }

    /// The indexes of all layers of the images that `changes` set.
    pub(super) fn indexes_of(&self, catalogue: &Catalogue, changes: &[Change]) -> Result<Vec<IndexRecord>> {
        let mut records: Vec<IndexRecord> = Vec::new();
        for change in changes {
            let Change::Set(image) = change else { continue };
            for layer in image.layers.iter().map(|layer| layer.diff_id) {
                if records.iter().any(|record| record.layer == layer) {
                    continue;
                }
                let published = lock(&self.indexes).get(&layer).copied();
                let index = match published.or_else(|| catalogue.index_of(&layer).copied()) {
                    Some(index) => index,
                    None => self.index_digest(&layer)?,
                };
                records.push(IndexRecord { layer, index });
            }
        }
        Ok(records)
    }

    /// Forgets indexes that were committed.
    pub(super) fn forget_indexes(&self, records: &[IndexRecord]) {
        let mut indexes = lock(&self.indexes);
        records.iter().for_each(|record| _ = indexes.remove(&record.layer));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::catalogue::tests::image;
    use crate::image::{ImageRecord, LayerRecord};
    use crate::publisher::tests::{new_store, read_f, stage};
    use crate::publisher::{Published, Suspect};
    use crate::reader::Store;

    #[test]
    fn an_index_that_the_catalogue_does_not_name_is_refused_until_it_does() {
        let (dir, publisher) = new_store();
        let (staging, diff_id, pack) = stage(&publisher, b"hello");
        publisher.publish_layer(staging, &diff_id, Some(&pack)).unwrap();
        let mut record: ImageRecord = (*image("r/a", Some("1"), 1)).clone();
        record.layers = vec![LayerRecord { diff_id, ..record.layers[0].clone() }];
        for digest in [record.manifest, record.config] {
            let path = publisher.store().layout().blob(&digest);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, b"x").unwrap();
        }
        publisher.commit(vec![Change::Set(Arc::new(record))]).unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(read_f(&store, &diff_id).unwrap(), b"hello");
        // Another index of the same layer, valid in itself: compressed at another level, it unpacks to the same bytes.
        let path = store.layout().index(&diff_id);
        let own = fs::read(&path).unwrap();
        let raw = crate::layer::unseal(&own, &diff_id).unwrap();
        let mut other = own[..64].to_vec();
        other.extend(zstd::encode_all(&raw[..], 19).unwrap());
        assert_ne!(other, own);
        fs::write(&path, &other).unwrap();
        let error = store.index(&diff_id).unwrap_err().to_string();
        assert!(error.contains("not the one that the catalogue names"), "{error}");
        assert!(Store::open(dir.path()).unwrap().index(&diff_id).is_err(), "nor by whoever comes new");
        // A repair: the layer is unpacked anew, and its new index is recorded.
        publisher.quarantine(Suspect::Layer(diff_id)).unwrap();
        let (staging, _, _) = stage(&publisher, b"hello");
        fs::write(staging.index(), &other).unwrap();
        assert_eq!(publisher.publish_layer(staging, &diff_id, Some(&pack)).unwrap(), Published::New);
        assert_eq!(read_f(&store, &diff_id).unwrap(), b"hello", "also by whoever knew the old one");
        publisher.quarantine(Suspect::Layer(diff_id)).unwrap();
        let kept = store.layout().quarantined(&path);
        fs::write(&kept, &own).unwrap();
        publisher.reinstate(Suspect::Layer(diff_id)).unwrap();
        assert_eq!(read_f(&store, &diff_id).unwrap(), b"hello", "and of what is put back");
        assert!(lock(&publisher.indexes).len() <= 1);
    }
}
