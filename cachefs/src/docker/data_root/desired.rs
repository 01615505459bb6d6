//! What the store's catalogue asks of a data-root: images, layers and names.
//!
//! An image that dockerd could not load is left out and reported with the reason. It never keeps the other images away,
//! and what the data-root has of it stays. One exception: a config that dockerd cannot read, or could not start with,
//! is removed from a data-root that an earlier version has given it to.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use store::Digest;
use store::catalogue::Catalogue;
use store::image::{ImageRecord, familiar};
use store::image_config::ImageConfig;
use store::reader::Store;

use super::error::Result;

/// The most layers of an image that dockerd mounts.
const DEPTH_MAX: usize = 125;

/// One layer on top of its parents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DesiredLayer {
    /// The chainID of what lies below.
    pub(super) parent: Option<Digest>,
    /// The layer's own name.
    pub(super) diff_id: Digest,
}

/// An image left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Skipped {
    /// The image, as a person would name it.
    pub(super) image: String,
    /// Why dockerd could not load it.
    pub(super) why: String,
}

/// Where a registry has a layer: the blob's digest and the canonical repository.
pub(super) type BlobSource = (Digest, String);

/// Everything that a data-root should have of a store.
#[derive(Debug, Default)]
pub(super) struct DesiredState {
    /// The catalogue's generation.
    pub(super) generation: u64,
    /// Configs by image ID.
    pub(super) images: BTreeMap<Digest, Vec<u8>>,
    /// Layers by chainID.
    pub(super) layers: BTreeMap<Digest, DesiredLayer>,
    /// ChainIDs, every parent before its children.
    pub(super) order: Vec<Digest>,
    /// Names in Docker's familiar form, and the image of each.
    pub(super) references: BTreeMap<String, Digest>,
    /// Where registries have each layer, by diffID.
    pub(super) origins: BTreeMap<Digest, BTreeSet<BlobSource>>,
    /// Images that cannot be offered.
    pub(super) skipped: Vec<Skipped>,
    /// Names, images and layers of skipped images: neither added nor removed.
    pub(super) untouchable: Untouchable,
    /// Images whose config dockerd cannot use: they are removed, and so are their names.
    pub(super) unusable: BTreeSet<Digest>,
}

/// What is neither added nor removed.
#[derive(Debug, Default)]
pub(super) struct Untouchable {
    /// Names.
    pub(super) references: BTreeSet<String>,
    /// Image IDs.
    pub(super) images: BTreeSet<Digest>,
    /// ChainIDs.
    pub(super) layers: BTreeSet<Digest>,
}

/// The chainIDs of layers, base first.
pub(super) fn chain_ids(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut below: Option<Digest> = None;
    diff_ids.iter().map(|diff_id| *below.insert(Digest::chain(below.as_ref(), diff_id))).collect()
}

/// The names that dockerd has for an image it pulled: the tag, and the digest of what the tag names.
fn names(image: &ImageRecord) -> Vec<String> {
    let repository = familiar(&image.repository);
    let tag = image.tag.as_ref().map(|tag| format!("{repository}:{tag}"));
    tag.into_iter().chain([format!("{repository}@{}", image.target)]).collect()
}

impl DesiredState {
    /// Reads what is wanted.
    pub(super) fn read(store: &Store) -> Result<DesiredState> {
        let catalogue: Catalogue = store.catalogue()?;
        let mut wanted = DesiredState { generation: catalogue.generation(), ..DesiredState::default() };
        for image in catalogue.images() {
            match loadable(store, image) {
                Ok(config) => wanted.add(image, config),
                Err(Unloadable::Image(why)) => wanted.skip(image, why),
                Err(Unloadable::Config(why)) => wanted.drop_config(image, why),
            }
        }
        Ok(wanted)
    }

    fn add(&mut self, image: &ImageRecord, config: Vec<u8>) {
        self.images.insert(image.config, config);
        for name in names(image) {
            self.references.insert(name, image.config);
        }
        let mut parent = None;
        for (layer, chain) in image.layers.iter().zip(image.chain_ids()) {
            if self.layers.insert(chain, DesiredLayer { parent, diff_id: layer.diff_id }).is_none() {
                self.order.push(chain);
            }
            let origins = self.origins.entry(layer.diff_id).or_default();
            origins.insert((layer.blob, image.repository.clone()));
            parent = Some(chain);
        }
    }

    /// The layers of a chain, base first.
    pub(super) fn diff_ids(&self, chain: &Digest) -> Vec<Digest> {
        let above = |layer: &&DesiredLayer| layer.parent.and_then(|parent| self.layers.get(&parent));
        let downwards = std::iter::successors(self.layers.get(chain), above);
        let mut diff_ids: Vec<_> = downwards.map(|layer| layer.diff_id).collect();
        diff_ids.reverse();
        diff_ids
    }

    /// Leaves an image out, and leaves alone what the data-root has of it.
    pub(super) fn skip(&mut self, image: &ImageRecord, why: String) {
        self.skipped.push(Skipped { image: image.familiar_name(), why });
        self.untouchable.references.extend(names(image));
        self.untouchable.images.insert(image.config);
        self.untouchable.layers.extend(image.chain_ids());
    }

    /// Leaves an image out whose config dockerd cannot use, and keeps what its names meant before.
    fn drop_config(&mut self, image: &ImageRecord, why: String) {
        self.skip(image, why);
        self.untouchable.images.remove(&image.config);
        self.unusable.insert(image.config);
    }
}

/// Why dockerd could not load an image.
enum Unloadable {
    /// Because of the image itself.
    Image(String),
    /// Because of its config.
    Config(String),
}

/// The config of an image that dockerd can load, or why it cannot.
fn loadable(store: &Store, image: &ImageRecord) -> Result<Vec<u8>, Unloadable> {
    if image.platform.os != "linux" {
        let why = format!("it is for {}, and Docker on Linux runs linux images only", image.platform);
        return Err(Unloadable::Image(why));
    }
    if image.layers.len() > DEPTH_MAX {
        let why = format!("it has {} layers, and Docker mounts {DEPTH_MAX} at most", image.layers.len());
        return Err(Unloadable::Image(why));
    }
    let config = store.blob(&image.config).map_err(|e| Unloadable::Image(e.to_string()))?;
    let read = ImageConfig::parse(&config);
    let read = read.map_err(|e| Unloadable::Config(format!("Docker cannot use its config: {e}")))?;
    if read.diff_ids.iter().eq(image.layers.iter().map(|layer| &layer.diff_id)) {
        Ok(config)
    } else {
        Err(Unloadable::Image("its config lists other layers than the store has".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use store::image::{LayerRecord, Platform};

    fn image(repository: &str, tag: Option<&str>, layers: &[&[u8]]) -> ImageRecord {
        let layer = |bytes: &&[u8]| {
            let diff_id = Digest::of(bytes);
            LayerRecord { diff_id, size: 1, blob: Digest::of(b"gz"), blob_size: 1, media_type: String::new() }
        };
        ImageRecord {
            repository: repository.into(),
            tag: tag.map(str::to_owned),
            target: Digest::of(b"target"),
            manifest: Digest::of(b"manifest"),
            media_type: String::new(),
            config: Digest::of(repository.as_bytes()),
            platform: Platform::host(),
            layers: layers.iter().map(layer).collect(),
            published_at: 0,
            ordered_by: store::image::RequestedBy::Operator,
        }
    }

    #[test]
    fn shared_layers_are_wanted_once_and_parents_come_first() {
        let mut wanted = DesiredState::default();
        wanted.add(&image("docker.io/library/a", Some("v"), &[b"1", b"2", b"3"]), Vec::new());
        wanted.add(&image("q.io/b", None, &[b"1", b"2", b"4"]), Vec::new());
        assert_eq!(wanted.order.len(), 4);
        for (position, chain) in wanted.order.iter().enumerate() {
            let parent = wanted.layers[chain].parent;
            assert!(parent.is_none_or(|parent| wanted.order[..position].contains(&parent)));
        }
        let target = Digest::of(b"target");
        let names: Vec<_> = wanted.references.keys().cloned().collect();
        assert_eq!(names, ["a:v".to_owned(), format!("a@{target}"), format!("q.io/b@{target}")]);
        assert_eq!(wanted.origins[&Digest::of(b"1")].len(), 2);
    }

    #[test]
    fn chains_are_named_by_all_that_lies_below() {
        let (one, two) = (Digest::of(b"1"), Digest::of(b"2"));
        assert_eq!(chain_ids(&[one, two]), [one, Digest::of(format!("{one} {two}").as_bytes())]);
    }
}
