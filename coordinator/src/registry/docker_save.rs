//! The `docker save` format: `manifest.json` names configs, tags and layer tars.
//!
//! It has no registry manifest, so one is made: an OCI manifest over the layers as they lie in the archive, which for
//! bare tars means that a layer's digest is its diffID. Old archives store a repeated layer as a symbolic link.

use std::collections::HashMap;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use store::Digest;
use store::image::ImageRef;

use crate::encoding::{Encoding, MAGIC_LEN};
use crate::registry::Document;
use crate::registry::archive::{Blob, Contents, Kept, Members, Span, check_images, unreadable};
use crate::registry::error::RegistryError;
use crate::registry::go_json;
use crate::registry::manifest::{MAX_CONFIG, MAX_LAYERS, OCI_CONFIG, OCI_LAYER, OCI_MANIFEST};

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

/// The part of a config that gives bare layers their digests.
#[derive(Deserialize)]
struct Config {
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<Digest>,
}

/// Reads `manifest.json` and what it names.
pub(crate) fn read(members: &Members, name: Option<&ImageRef>) -> Result<Contents, RegistryError> {
    let list: Vec<Saved> = parse(&members.read("manifest.json", MAX_LIST)?, "manifest.json")?;
    if name.is_some() && list.len() > 1 {
        return Err(unreadable(format!("it holds {} images: --name can name only one", list.len())));
    }
    check_images(list.iter().map(|saved| saved.repo_tags.as_ref().map_or(1, |tags| tags.len().max(1))).sum())?;
    let (mut contents, mut read) = (Contents::default(), Already::default());
    for saved in &list {
        let manifest = add_image(members, saved, &mut contents, &mut read)?;
        for name in names(saved, name)? {
            contents.images.push((name, manifest.clone()));
        }
    }
    Ok(contents)
}

/// What was read of the archive already: images share configs and layers, and each is read once.
#[derive(Default)]
struct Already {
    configs: HashMap<String, ReadConfig>,
    layers: HashMap<u64, (Digest, String)>,
    kept: Kept,
}

/// A config that was read.
#[derive(Clone)]
struct ReadConfig {
    digest: Digest,
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
        let diff_ids = parse::<Config>(&bytes, name)?.rootfs.diff_ids.into();
        let config = ReadConfig { digest: Digest::of(&bytes), bytes, diff_ids };
        self.configs.insert(name.to_owned(), config.clone());
        Ok(config)
    }

    /// A layer's digest and media type: a bare tar is named by its diffID, a compressed one must be hashed.
    fn layer(&mut self, members: &Members, span: Span, diff_id: Digest) -> Result<(Digest, String), RegistryError> {
        if let Some(known) = self.layers.get(&span.offset) {
            return Ok(known.clone());
        }
        let suffix = match Encoding::sniff(&members.head(span, MAGIC_LEN)?) {
            Encoding::Gzip => "+gzip",
            Encoding::Zstd => "+zstd",
            _ => return Ok((diff_id, OCI_LAYER.to_owned())),
        };
        let layer = (members.digest(span)?, format!("{OCI_LAYER}{suffix}"));
        self.layers.insert(span.offset, layer.clone());
        Ok(layer)
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T, RegistryError> {
    go_json::from_slice(bytes).map_err(|error| unreadable(format!("its {what} cannot be understood ({error})")))
}

/// The names of one image: what the user says, or its tags.
fn names(saved: &Saved, name: Option<&ImageRef>) -> Result<Vec<ImageRef>, RegistryError> {
    if let Some(name) = name {
        return Ok(vec![name.clone()]);
    }
    let tags = saved.repo_tags.as_deref().unwrap_or_default();
    if tags.is_empty() {
        return Err(unreadable(format!("image {} in it has no name: give one with --name", saved.config)));
    }
    tags.iter().map(|tag| tag.parse().map_err(|error: store::Error| unreadable(error.to_string()))).collect()
}

/// Adds the blobs of one image, and makes its manifest.
fn add_image(
    members: &Members,
    saved: &Saved,
    contents: &mut Contents,
    read: &mut Already,
) -> Result<Document, RegistryError> {
    let ReadConfig { digest: config_digest, bytes: config, diff_ids } = read.config(members, &saved.config)?;
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
        let (digest, media_type) = read.layer(members, span, *diff_id)?;
        contents.blobs.insert(digest, Blob::Member(span));
        layers.push(serde_json::json!({"mediaType": media_type, "digest": digest, "size": span.size}));
    }
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": OCI_CONFIG, "digest": config_digest, "size": config.len()},
        "layers": layers,
    });
    let bytes = bytes::Bytes::from(manifest.to_string());
    read.kept.count(&bytes)?;
    let document = Document { digest: Digest::of(&bytes), media_type: OCI_MANIFEST.to_owned(), bytes };
    contents.blobs.insert(config_digest, Blob::Made(config));
    Ok(document)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_docker_reads_them() {
        let text = br#"[{"config": "a.json", "repotags": null, "LAYERS": ["l.tar"], "Parent": 1}, {"Config": "b", "Layers": null}]"#;
        let list: Vec<Saved> = parse(text, "manifest.json").unwrap();
        assert_eq!((list[0].config.as_str(), &list[0].layers[..]), ("a.json", &["l.tar".to_owned()][..]));
        assert!(list[0].repo_tags.is_none() && list[1].layers.is_empty());
        assert!(parse::<Vec<Saved>>(b"{}", "manifest.json").err().unwrap().to_string().contains("manifest.json"));
    }
}
