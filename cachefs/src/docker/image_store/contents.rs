//! What the store's catalogue asks of an image store: images by config, layers by their ids.
//!
//! The id of a layer is the one that the engines themselves give it, so that they find it when they pull an image that has it:
//! the diffID of a base layer, and for others the digest of the text `<parent's id>+<diffID>`, all in hex.
//!
//! An image that the engines could not use is left out, and keeps no other image away.

use std::collections::{BTreeMap, BTreeSet};

use store::Digest;
use store::image::ImageRecord;
use store::image_config::ImageConfig;
use store::reader::Store;

use super::documents::{Blob, compression};

/// One layer on top of its parents.
#[derive(Debug)]
pub(super) struct Layer {
    /// The id of what lies below.
    pub(super) parent: Option<Digest>,
    pub(super) diff_id: Digest,
    /// The chainID of the layer and all below it.
    pub(super) chain: Digest,
    /// Bytes of its tar.
    pub(super) size: u64,
    pub(super) blob: Option<Blob>,
}

/// One image.
#[derive(Debug)]
pub(super) struct Image {
    /// Names with tags, or with digests where there is no tag.
    pub(super) names: BTreeSet<String>,
    /// The id of its top layer.
    pub(super) top: Digest,
    /// The manifest.
    pub(super) manifest: Digest,
    /// All documents that name it: manifests and indexes.
    pub(super) targets: BTreeSet<Digest>,
}

/// Everything that an image store should have of a store.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// Images by the digest of their config.
    pub(super) images: BTreeMap<Digest, Image>,
    /// Layers by id.
    pub(super) layers: BTreeMap<Digest, Layer>,
}

impl Contents {
    /// Reads what is wanted.
    pub(super) fn read(store: &Store) -> Result<Contents, store::Error> {
        let mut contents = Contents::default();
        for image in store.catalogue()?.images() {
            match usable(store, image) {
                Ok(()) => contents.add(image),
                Err(why) => tracing::warn!("image {} is left out: {why}", image.familiar_name()),
            }
        }
        Ok(contents)
    }

    fn add(&mut self, record: &ImageRecord) {
        let mut parent = None;
        for (layer, chain) in record.layers.iter().zip(record.chain_ids()) {
            let blob = compression(&layer.media_type);
            let blob = blob.map(|compression| Blob { digest: layer.blob, size: layer.blob_size, compression });
            let id = layer_id(parent.as_ref(), &layer.diff_id);
            let layer = Layer { parent, diff_id: layer.diff_id, chain, size: layer.size, blob };
            self.layers.entry(id).or_insert(layer);
            parent = Some(id);
        }
        let Some(top) = parent else { return };
        let name = match &record.tag {
            Some(tag) => format!("{}:{tag}", record.repository),
            None => format!("{}@{}", record.repository, record.target),
        };
        let image = self.images.entry(record.config).or_insert_with(|| Image {
            names: BTreeSet::new(),
            top,
            manifest: record.manifest,
            targets: BTreeSet::new(),
        });
        image.names.insert(name);
        image.targets.extend([record.manifest, record.target]);
    }

    /// The diffIDs of a layer and all below it, base first.
    pub(super) fn diff_ids(&self, id: &Digest) -> Vec<Digest> {
        let above = |layer: &&Layer| layer.parent.and_then(|parent| self.layers.get(&parent));
        let downwards = std::iter::successors(self.layers.get(id), above);
        let mut diff_ids: Vec<_> = downwards.map(|layer| layer.diff_id).collect();
        diff_ids.reverse();
        diff_ids
    }

    /// Leaves out the images that stand on a layer, and the layers that no other image needs.
    pub(super) fn leave_out(&mut self, without: &BTreeSet<Digest>) {
        let chain = |layers: &BTreeMap<Digest, Layer>, top: Digest| -> BTreeSet<Digest> {
            std::iter::successors(Some(top), |id| layers.get(id).and_then(|layer| layer.parent)).collect()
        };
        let layers = &self.layers;
        self.images.retain(|_, image| chain(layers, image.top).is_disjoint(without));
        let needed: BTreeSet<Digest> = self.images.values().flat_map(|image| chain(&self.layers, image.top)).collect();
        self.layers.retain(|chain, _| needed.contains(chain));
    }
}

/// The id that the engines give a layer.
fn layer_id(parent: Option<&Digest>, diff_id: &Digest) -> Digest {
    parent.map_or(*diff_id, |parent| Digest::of(format!("{}+{}", parent.hex(), diff_id.hex()).as_bytes()))
}

/// Why the engines cannot use an image, if that is so.
fn usable(store: &Store, image: &ImageRecord) -> Result<(), String> {
    if image.platform.os != "linux" {
        return Err(format!("it is for {}", image.platform));
    }
    let config = store.blob(&image.config).map_err(|error| error.to_string())?;
    ImageConfig::parse(&config).map_err(|error| format!("its config cannot be used: {error}"))?;
    if image.layers.is_empty() { Err("it has no layer".to_owned()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The ids that Podman 4.3 gave to these layers.
    #[test]
    fn layers_have_the_ids_that_podman_gives_them() {
        let digest = |hex: &str| Digest::from_hex(hex).unwrap();
        let base = digest("146f8c1209fcfa50f7a512bee0cd00bed56961eb5c3431eaaa4c543aad8b4ad7");
        let above = digest("64979436245729afe66780cccc4f9d91da6e6e968581c9750b53c175a4293978");
        assert_eq!(layer_id(None, &base), base);
        let id = digest("e10a5387eabd8e423e188216a93e66430a35479976c825e51be9a0abb1c1c701");
        assert_eq!(layer_id(Some(&base), &above), id);
    }
}
