//! The `docker save` format: `manifest.json` names configs, tags and layer tars.
//!
//! The format has no registry manifest, so one is made: an OCI manifest of the layers as stored in the archive. For uncompressed tars, a
//! layer's digest is therefore its diffID. Old archives store a repeated layer as a symbolic link.

use std::collections::HashMap;
use std::sync::Arc;

use serde::Deserialize;
use store::image::ImageRef;
use store::{Digest, go_json, image_config};

use crate::registries::Document;
use crate::registries::archive::contents::{Contents, Kept, Naming, SavedLayer, check_images, saved_image};
use crate::registries::archive::member_index::{Members, Span, unreadable};
use crate::registries::compression::{Compression, MAGIC_LEN};
use crate::registries::error::RegistryError;
use crate::registries::image::manifest::{MAX_CONFIG, MAX_LAYERS};

/// The longest `manifest.json` that is read.
const MAX_LIST: u64 = 16 << 20;

/// One image of `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Vec<String>,
}

impl Saved {
    /// Its names; empty for an image without one.
    fn tags(&self) -> &[String] {
        self.repo_tags.as_deref().unwrap_or_default()
    }
}

/// Reads `manifest.json` and what it names.
pub(crate) fn read(members: &Members, name: Option<&ImageRef>) -> Result<Contents, RegistryError> {
    let list: Vec<Saved> = saved_images(&members.read("manifest.json", MAX_LIST)?)?;
    let is_unnamed = |saved: &Saved| saved.tags().is_empty();
    let named = Naming::of(name, list.iter().map(is_unnamed))?;
    check_images(list.iter().map(|saved| saved.tags().len().max(1)).sum())?;
    let (mut contents, mut read) = (Contents::default(), Already::default());
    for saved in &list {
        let names = match named.instead(is_unnamed(saved)) {
            Some(name) => vec![name.clone()],
            None => names(saved)?,
        };
        if names.is_empty() {
            contents.unnamed.push(saved.config.clone());
            continue;
        }
        let manifest = add_image(members, saved, &mut contents, &mut read)?;
        for name in names {
            contents.images.push((name, manifest.clone()));
        }
    }
    Ok(contents)
}

/// Configs and layers that have been read already: images share them, and each is read once.
#[derive(Default)]
struct Already {
    configs: HashMap<String, ReadConfig>,
    layers: HashMap<u64, SavedLayer>,
    kept: Kept,
}

/// A config that was read.
#[derive(Clone)]
struct ReadConfig {
    bytes: bytes::Bytes,
    diff_ids: Arc<[Digest]>,
}

impl Already {
    fn config(&mut self, members: &Members, name: &str) -> Result<ReadConfig, RegistryError> {
        if let Some(known) = self.configs.get(name) {
            return Ok(known.clone());
        }
        let bytes = members.read(name, MAX_CONFIG)?;
        self.kept.count(&bytes)?;
        let diff_ids = image_config::diff_ids(&bytes).map_err(|error| not_understood(name, &error))?.into();
        let config = ReadConfig { bytes, diff_ids };
        self.configs.insert(name.to_owned(), config.clone());
        Ok(config)
    }

    /// A layer as stored in the archive. The digest of an uncompressed tar is its diffID; a compressed one must be hashed.
    fn layer(&mut self, members: &Members, span: Span, diff_id: Digest) -> Result<SavedLayer, RegistryError> {
        if let Some(known) = self.layers.get(&span.offset) {
            return Ok(known.clone());
        }
        let encoding = Compression::sniff(&members.head(span, MAGIC_LEN)?);
        if encoding == Compression::Plain {
            return Ok(SavedLayer { digest: diff_id, span, encoding });
        }
        let layer = SavedLayer { digest: members.digest(span)?, span, encoding };
        self.layers.insert(span.offset, layer.clone());
        Ok(layer)
    }
}

/// Parses the list of images. What follows it is ignored, as dockerd does.
fn saved_images(bytes: &[u8]) -> Result<Vec<Saved>, RegistryError> {
    go_json::first_from_slice(bytes).map_err(|error| not_understood("manifest.json", &error))
}

fn not_understood(what: &str, error: &dyn std::error::Error) -> RegistryError {
    unreadable(format!("its {what} cannot be understood ({error})"))
}

/// The names of one image: its tags.
fn names(saved: &Saved) -> Result<Vec<ImageRef>, RegistryError> {
    saved.tags().iter().map(|tag| tag.parse().map_err(|error: store::Error| unreadable(error.to_string()))).collect()
}

/// Adds the blobs of one image, and makes its manifest.
fn add_image(
    members: &Members,
    saved: &Saved,
    contents: &mut Contents,
    read: &mut Already,
) -> Result<Document, RegistryError> {
    let ReadConfig { bytes: config, diff_ids } = read.config(members, &saved.config)?;
    if diff_ids.len() != saved.layers.len() {
        let why = format!("{} names {} layers and manifest.json {}", saved.config, diff_ids.len(), saved.layers.len());
        return Err(unreadable(why));
    }
    if diff_ids.len() > MAX_LAYERS {
        let why = format!("{} names {} layers; at most {MAX_LAYERS} can be stored", saved.config, diff_ids.len());
        return Err(unreadable(why));
    }
    let mut layers = Vec::new();
    for (name, diff_id) in saved.layers.iter().zip(diff_ids.iter()) {
        let span =
            members.find(name).ok_or_else(|| unreadable(format!("it lacks layer {name}: save the image again")))?;
        layers.push(read.layer(members, span, *diff_id)?);
    }
    saved_image(config, &layers, contents, &mut read.kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_docker_reads_them() {
        let text = br#"[{"config": "a.json", "repotags": null, "LAYERS": ["l.tar"], "Parent": 1}, {"Config": "b", "Layers": null}]"#;
        let list: Vec<Saved> = saved_images(text).unwrap();
        assert_eq!((list[0].config.as_str(), &list[0].layers[..]), ("a.json", &["l.tar".to_owned()][..]));
        assert!(list[0].repo_tags.is_none() && list[1].layers.is_empty());
        assert_eq!(saved_images(b"[]\n{").unwrap().len(), 0);
        assert!(saved_images(b"{}").err().unwrap().to_string().contains("manifest.json"));
    }
}
