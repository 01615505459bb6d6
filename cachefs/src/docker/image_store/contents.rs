//! What the store's catalogue asks of an image store: images by config, layers by chain.
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
    /// The chainID of what lies below.
    pub(super) parent: Option<Digest>,
    pub(super) diff_id: Digest,
    /// Bytes of its tar.
    pub(super) size: u64,
    pub(super) blob: Option<Blob>,
}

/// One image.
#[derive(Debug)]
pub(super) struct Image {
    /// Names with tags, or with digests where there is no tag.
    pub(super) names: BTreeSet<String>,
    /// The chainID of its top layer.
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
    /// Layers by chainID.
    pub(super) layers: BTreeMap<Digest, Layer>,
}

impl Contents {
    /// Reads what is wanted.
    pub(super) fn read(store: &Store) -> Result<Contents, store::Error> {
        let mut contents = Contents::default();
        for image in store.catalogue()?.images() {
            match usable(store, image) {
                Ok(top) => contents.add(image, top),
                Err(why) => tracing::warn!("image {} is left out: {why}", image.familiar_name()),
            }
        }
        Ok(contents)
    }

    fn add(&mut self, record: &ImageRecord, top: Digest) {
        let mut parent = None;
        for (layer, chain) in record.layers.iter().zip(record.chain_ids()) {
            let blob = compression(&layer.media_type);
            let blob = blob.map(|compression| Blob { digest: layer.blob, size: layer.blob_size, compression });
            let layer = Layer { parent, diff_id: layer.diff_id, size: layer.size, blob };
            self.layers.entry(chain).or_insert(layer);
            parent = Some(chain);
        }
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

    /// The layers of a chain, base first.
    pub(super) fn diff_ids(&self, chain: &Digest) -> Vec<Digest> {
        let above = |layer: &&Layer| layer.parent.and_then(|parent| self.layers.get(&parent));
        let downwards = std::iter::successors(self.layers.get(chain), above);
        let mut diff_ids: Vec<_> = downwards.map(|layer| layer.diff_id).collect();
        diff_ids.reverse();
        diff_ids
    }

    /// Leaves out the images that stand on a layer, and the layers that no other image needs.
    pub(super) fn leave_out(&mut self, without: &BTreeSet<Digest>) {
        let chain = |layers: &BTreeMap<Digest, Layer>, top: Digest| -> BTreeSet<Digest> {
            std::iter::successors(Some(top), |chain| layers.get(chain).and_then(|layer| layer.parent)).collect()
        };
        let layers = &self.layers;
        self.images.retain(|_, image| chain(layers, image.top).is_disjoint(without));
        let needed: BTreeSet<Digest> = self.images.values().flat_map(|image| chain(&self.layers, image.top)).collect();
        self.layers.retain(|chain, _| needed.contains(chain));
    }
}

/// The chainID of an image's top layer, or why the engines cannot use it.
fn usable(store: &Store, image: &ImageRecord) -> Result<Digest, String> {
    if image.platform.os != "linux" {
        return Err(format!("it is for {}", image.platform));
    }
    let config = store.blob(&image.config).map_err(|error| error.to_string())?;
    ImageConfig::parse(&config).map_err(|error| format!("its config cannot be used: {error}"))?;
    image.chain_ids().last().copied().ok_or_else(|| "it has no layer".to_owned())
}
