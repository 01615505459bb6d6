//! A registry whose documents are given byte by byte, so that tests can make them as odd as they need.

use std::collections::HashMap;
use std::io::Write as _;

use anyhow::Result;
use serde_json::{Value, json};

use super::scripted::{Reply, ScriptedRegistry};
use crate::images::digest_of;

/// Media type of Docker's manifest.
pub const MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Media type of Docker's config.
pub const CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// Media type of Docker's layer.
const LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";

/// The contents of the registry's one repository `app`.
#[derive(Debug, Default)]
pub struct Documents {
    /// By digest and by tag.
    manifests: HashMap<String, (String, Vec<u8>)>,
    /// By digest.
    blobs: HashMap<String, Vec<u8>>,
}

/// A layer, and the digest of its tar.
#[derive(Debug, Clone)]
pub struct BareLayer {
    /// The layer's descriptor, as in manifests.
    pub descriptor: Value,
    /// The digest of the tar, as in configs.
    pub diff_id: String,
}

impl Documents {
    /// Stores a blob and returns its descriptor.
    pub fn blob(&mut self, media_type: &str, bytes: Vec<u8>) -> Value {
        let descriptor = json!({"mediaType": media_type, "digest": digest_of(&bytes), "size": bytes.len()});
        self.blobs.insert(digest_of(&bytes), bytes);
        descriptor
    }

    /// Stores an empty layer.
    pub fn layer(&mut self) -> Result<BareLayer> {
        let tar = [0; 1024];
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&tar)?;
        Ok(BareLayer { descriptor: self.blob(LAYER, encoder.finish()?), diff_id: digest_of(&tar) })
    }

    /// Stores a manifest or index under its digest and these tags, and returns its descriptor.
    pub fn manifest(&mut self, media_type: &str, bytes: Vec<u8>, tags: &[&str]) -> Value {
        let digest = digest_of(&bytes);
        for name in tags.iter().copied().chain([digest.as_str()]) {
            self.manifests.insert(name.to_owned(), (media_type.to_owned(), bytes.clone()));
        }
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    }

    /// Stores an image, which is a manifest of this config and layer.
    pub fn image(&mut self, config: Vec<u8>, layer: &BareLayer, tags: &[&str]) -> Value {
        let config = self.blob(CONFIG, config);
        let manifest =
            json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer.descriptor]});
        self.manifest(MANIFEST, manifest.to_string().into_bytes(), tags)
    }

    /// Serves all documents.
    pub fn serve(self) -> Result<ScriptedRegistry> {
        ScriptedRegistry::start(move |seen| self.reply(seen.path()).unwrap_or(Reply::status(404)))
    }

    fn reply(&self, path: &str) -> Option<Reply> {
        if path == "/v2/" {
            return Some(Reply::body("application/json", "{}"));
        }
        let (kind, name) = path.strip_prefix("/v2/app/")?.split_once('/')?;
        if kind == "blobs" {
            return Some(Reply::body("application/octet-stream", self.blobs.get(name)?.clone()));
        }
        let (media_type, bytes) = self.manifests.get(name)?;
        Some(Reply::body(media_type, bytes.clone()).with("Docker-Content-Digest", &digest_of(bytes)))
    }
}
