//! What a data-root holds: read from dockerd's files, never from its memory.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use store::Digest;
use store::image_config::diff_ids;

use super::desired::chain_ids;
use super::error::{Error, Result};
use super::layer;
use super::references::References;
use super::root::Root;
use crate::docker::files;

/// A layer as the layer database has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PresentLayer {
    /// Its directory's name in the graph driver.
    pub(super) cache_id: String,
    /// The layer's own name.
    pub(super) diff_id: Digest,
    /// The chainID of what lies below.
    pub(super) parent: Option<Digest>,
}

/// An image as the image database has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PresentImage {
    /// The chainID of its top layer.
    pub(super) top: Option<Digest>,
    /// The local image it was built from.
    pub(super) parent: Option<Digest>,
}

/// All that matters about a data-root's state.
#[derive(Debug, Clone, Default)]
pub(super) struct ActualState {
    /// Layers by chainID.
    pub(super) layers: BTreeMap<Digest, PresentLayer>,
    /// Images by ID.
    pub(super) images: BTreeMap<Digest, PresentImage>,
    /// Names.
    pub(super) references: References,
    /// Images of containers, stopped ones too, with the containers' names.
    pub(super) container_images: BTreeMap<Digest, BTreeSet<String>>,
    /// Top layers of containers.
    pub(super) container_layers: BTreeSet<Digest>,
    /// Layers that BuildKit's cache may use.
    pub(super) build_cache: BTreeSet<Digest>,
}

impl ActualState {
    /// Reads a data-root. An entry that cannot be understood counts as absent: dockerd does not load it either.
    pub(super) fn read(root: &Root) -> Result<ActualState> {
        let layers = layers(root)?;
        let build_cache = build_cache(root, layers.keys())?;
        Ok(ActualState {
            layers,
            images: images(root)?,
            references: References::read(root)?,
            container_images: container_images(root)?,
            container_layers: container_layers(root)?,
            build_cache,
        })
    }

    /// The chainIDs of a layer and of all below it.
    pub(super) fn chain(&self, top: Digest) -> BTreeSet<Digest> {
        let mut seen = BTreeSet::new();
        let mut at = Some(top);
        // A damaged database may lead round in a circle.
        while let Some(chain) = at.filter(|chain| seen.insert(*chain)) {
            at = self.layers.get(&chain).and_then(|layer| layer.parent);
        }
        seen
    }
}

/// The digest in a small file.
fn digest_in(path: &std::path::Path) -> Result<Option<Digest>> {
    Ok(files::read_text(path)?.and_then(|text| text.parse().ok()))
}

fn layers(root: &Root) -> Result<BTreeMap<Digest, PresentLayer>> {
    let mut layers = BTreeMap::new();
    for name in files::names(&root.layer_db().join("sha256"))? {
        let Some(chain) = Digest::from_hex(&name) else { continue };
        let entry = root.layer_entry(&chain);
        let cache_id = files::read_text(&entry.join("cache-id"))?.filter(|id| !id.is_empty());
        let has_size = files::read_text(&entry.join("size"))?.is_some_and(|size| size.parse::<i64>().is_ok());
        let (diff_id, parent) = (digest_in(&entry.join("diff"))?, digest_in(&entry.join("parent"))?);
        let (true, Some(cache_id), Some(diff_id)) = (has_size, cache_id, diff_id) else { continue };
        // What a crash has emptied: dockerd does not load it, or cannot save it.
        let is_named_right = Digest::chain(parent.as_ref(), &diff_id) == chain;
        let is_ours = cache_id == layer::cache_id(&chain);
        if is_named_right && !(is_ours && is_empty(&entry.join("tar-split.json.gz"))) {
            layers.insert(chain, PresentLayer { cache_id, diff_id, parent });
        }
    }
    Ok(layers)
}

fn is_empty(path: &std::path::Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| meta.len() == 0)
}

fn images(root: &Root) -> Result<BTreeMap<Digest, PresentImage>> {
    let mut images = BTreeMap::new();
    for name in files::names(&root.image_content())? {
        let Some(id) = Digest::from_hex(&name) else { continue };
        let path = root.image_content().join(&name);
        let config = std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
        if Digest::of(&config) != id {
            continue;
        }
        let Ok(diff_ids) = diff_ids(&config) else { continue };
        let parent = digest_in(&root.image_metadata().join(&name).join("parent"))?;
        images.insert(id, PresentImage { top: chain_ids(&diff_ids).pop(), parent });
    }
    Ok(images)
}

/// The part of a container's description that names it and its image.
#[derive(Deserialize)]
struct Container {
    #[serde(rename = "Name", default)]
    name: String,
    #[serde(rename = "Image")]
    image: String,
}

fn container_images(root: &Root) -> Result<BTreeMap<Digest, BTreeSet<String>>> {
    let mut images: BTreeMap<Digest, BTreeSet<String>> = BTreeMap::new();
    for id in files::names(&root.containers())? {
        let text = files::read_text(&root.containers().join(&id).join("config.v2.json"))?;
        let Some(container) = text.and_then(|text| serde_json::from_str::<Container>(&text).ok()) else { continue };
        let Ok(image) = container.image.parse() else { continue };
        let name = container.name.trim_start_matches('/');
        images.entry(image).or_default().insert(if name.is_empty() { id } else { name.to_owned() });
    }
    Ok(images)
}

fn container_layers(root: &Root) -> Result<BTreeSet<Digest>> {
    let dir = root.container_layers();
    let parents = files::names(&dir)?.into_iter().map(|name| digest_in(&dir.join(name).join("parent")));
    Ok(parents.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
}

/// Layers that are named anywhere in BuildKit's databases: perhaps more than it uses, never fewer.
fn build_cache<'a>(root: &Root, layers: impl Iterator<Item = &'a Digest>) -> Result<BTreeSet<Digest>> {
    const PREFIX: &[u8] = b"sha256:";
    let mut named = BTreeSet::new();
    for name in files::names(&root.build_cache())?.into_iter().filter(|name| name.ends_with(".db")) {
        let path = root.build_cache().join(name);
        let bytes = std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
        named.extend(
            bytes
                .windows(PREFIX.len() + 64)
                .filter(|window| window.starts_with(PREFIX))
                .filter_map(|window| std::str::from_utf8(window).ok().and_then(|text| text.parse::<Digest>().ok())),
        );
    }
    Ok(layers.filter(|chain| named.contains(chain)).copied().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_root_is_read_and_damage_is_absence() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        root.make_directories().unwrap();
        assert!(ActualState::read(&root).unwrap().layers.is_empty());
        let (bad, diff) = (Digest::of(b"bad"), Digest::of(b"diff"));
        let good = Digest::chain(None, &diff);
        let above = Digest::chain(Some(&good), &diff);
        let ours = Digest::chain(Some(&above), &diff);
        for (chain, cache_id, size, parent) in [
            (good, "abc", "7", None),
            (bad, "abc", "", None),
            (above, "def", "7", Some("")),
            (ours, &ours.hex(), "7", Some("")),
        ] {
            let entry = root.layer_entry(&chain);
            std::fs::create_dir_all(&entry).unwrap();
            for (name, text) in [("cache-id", cache_id), ("size", size), ("diff", &diff.to_string())] {
                std::fs::write(entry.join(name), text).unwrap();
            }
            if let Some(parent) = parent {
                std::fs::write(entry.join("parent"), parent).unwrap();
            }
        }
        std::fs::write(root.layer_entry(&ours).join("parent"), above.to_string()).unwrap();
        std::fs::write(root.layer_entry(&ours).join("tar-split.json.gz"), "").unwrap();
        let config = format!("{{\"rootfs\":{{\"diff_ids\":[\"{diff}\"]}}}}");
        let id = Digest::of(config.as_bytes());
        std::fs::write(root.image_content().join(id.hex()), &config).unwrap();
        std::fs::write(root.image_content().join(bad.hex()), &config).unwrap();
        std::fs::create_dir_all(root.containers().join("c1")).unwrap();
        std::fs::write(
            root.containers().join("c1/config.v2.json"),
            format!("{{\"Image\":\"{id}\",\"Name\":\"/web\"}}"),
        )
        .unwrap();
        std::fs::create_dir_all(root.build_cache()).unwrap();
        std::fs::write(root.build_cache().join("snapshots.db"), format!("\0\x01{good}\0{id}")).unwrap();
        let present = ActualState::read(&root).unwrap();
        let layer = PresentLayer { cache_id: "abc".into(), diff_id: diff, parent: None };
        assert_eq!(present.layers, BTreeMap::from([(good, layer)]));
        assert_eq!(present.images, BTreeMap::from([(id, PresentImage { top: Some(diff), parent: None })]));
        assert_eq!(present.container_images, BTreeMap::from([(id, BTreeSet::from(["web".to_owned()]))]));
        assert_eq!(present.build_cache, BTreeSet::from([good]));
    }
}
