//! The `docker save` format: `manifest.json` names configs, tags and layer tars.
//!
//! It has no registry manifest, so one is made: an OCI manifest over the layers as they lie in the archive, which for
//! bare tars means that a layer's digest is its diffID. Old archives store a repeated layer as a symbolic link.

use serde::Deserialize;
use store::Digest;
use store::image::ImageRef;

use crate::encoding::{Encoding, MAGIC_LEN};
use crate::registry::Document;
use crate::registry::archive::{Blob, Contents, Members, Span, unreadable};
use crate::registry::error::RegistryError;
use crate::registry::manifest::{MAX_CONFIG, OCI_CONFIG, OCI_LAYER, OCI_MANIFEST};

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
    let mut contents = Contents::default();
    for saved in &list {
        let manifest = add_image(members, saved, &mut contents)?;
        for name in names(saved, name)? {
            contents.images.push((name, manifest.clone()));
        }
    }
    Ok(contents)
}

fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8], what: &str) -> Result<T, RegistryError> {
    serde_json::from_slice(bytes).map_err(|error| unreadable(format!("its {what} cannot be understood ({error})")))
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
fn add_image(members: &Members, saved: &Saved, contents: &mut Contents) -> Result<Document, RegistryError> {
    let config = members.read(&saved.config, MAX_CONFIG)?;
    let diff_ids = parse::<Config>(&config, &saved.config)?.rootfs.diff_ids;
    if diff_ids.len() != saved.layers.len() {
        let why = format!("{} names {} layers and manifest.json {}", saved.config, diff_ids.len(), saved.layers.len());
        return Err(unreadable(why));
    }
    let config_digest = Digest::of(&config);
    let mut layers = Vec::new();
    for (name, diff_id) in saved.layers.iter().zip(&diff_ids) {
        let span =
            members.find(name).ok_or_else(|| unreadable(format!("it lacks layer {name}: save the image again")))?;
        let (digest, media_type) = identify(members, span, *diff_id)?;
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
    let document = Document { digest: Digest::of(&bytes), media_type: OCI_MANIFEST.to_owned(), bytes };
    contents.blobs.insert(config_digest, Blob::Made(config));
    Ok(document)
}

/// A layer's digest and media type: a bare tar is named by its diffID, a compressed one must be hashed.
fn identify(members: &Members, span: Span, diff_id: Digest) -> Result<(Digest, String), RegistryError> {
    match Encoding::sniff(&members.head(span, MAGIC_LEN)?) {
        Encoding::Gzip => Ok((members.digest(span)?, format!("{OCI_LAYER}+gzip"))),
        Encoding::Zstd => Ok((members.digest(span)?, format!("{OCI_LAYER}+zstd"))),
        _ => Ok((diff_id, OCI_LAYER.to_owned())),
    }
}
