//! The content of a played registry: one image `app:1`, in the documents that its behaviour requires.

use std::collections::HashMap;
use std::io::Write as _;

use anyhow::Result;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::behaviour::Behaviour;
use crate::images::archive::{Archive, Header, Kind};
use crate::images::digest_of;

const DOCKER: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const OCI: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const SCHEMA_1: &str = "application/vnd.docker.distribution.manifest.v1+json";
const SCHEMA_1_SIGNED: &str = "application/vnd.docker.distribution.manifest.v1+prettyjws";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// A manifest or index.
#[derive(Debug, Clone)]
pub(super) struct Document {
    /// Its correct media type.
    pub(super) media_type: &'static str,
    /// Its bytes.
    pub(super) bytes: Vec<u8>,
}

/// Everything that the registry can serve.
#[derive(Debug, Clone, Default)]
pub(super) struct Content {
    /// By digest, and under the tag.
    pub(super) manifests: HashMap<String, Document>,
    /// By digest.
    pub(super) blobs: HashMap<String, Vec<u8>>,
    /// The digest of the layer's blob.
    pub(super) layer: String,
}

fn architecture() -> (&'static str, &'static str) {
    match std::env::consts::ARCH {
        "aarch64" => ("arm64", "amd64"),
        _ => ("amd64", "arm64"),
    }
}

fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

/// The image while it is put together.
struct Parts<'a> {
    behaviour: &'a Behaviour,
    content: Content,
}

impl Parts<'_> {
    fn is(&self, document: &str) -> bool {
        self.behaviour.is("document", document)
    }

    fn put(&mut self, media_type: &'static str, bytes: Vec<u8>) -> Value {
        let digest = digest_of(&bytes);
        let size = bytes.len();
        self.content.manifests.insert(digest.clone(), Document { media_type, bytes });
        json!({"mediaType": media_type, "digest": digest, "size": size})
    }

    fn put_blob(&mut self, bytes: Vec<u8>) -> (String, usize) {
        let (digest, size) = (digest_of(&bytes), bytes.len());
        self.content.blobs.insert(digest.clone(), bytes);
        (digest, size)
    }

    /// Stores the layer's blob and returns its descriptor and diffID.
    fn layer(&mut self, number: u64, is_oci: bool) -> Result<(Value, String)> {
        let mut tar = Archive::new(Vec::new());
        // The content is incompressible, so that a part of it can be cut off. It differs for each image, so that no client has it already.
        let noise: Vec<u8> =
            (0..200_u64).flat_map(|n| digest_of(&[number, n].map(u64::to_le_bytes).concat()).into_bytes()).collect();
        tar.add(&Header::new(Kind::File, "noise"), noise.as_slice())?;
        let tar = tar.finish()?;
        let diff_id = digest_of(&tar);
        let blob = match self.behaviour.get("document") {
            "layer plain" => tar,
            "layer zstd" => zstd::encode_all(&tar[..], 1)?,
            _ => gzip(&tar)?,
        };
        let media_type = match self.behaviour.get("document") {
            "layer untyped" => "",
            "layer octet-stream" => "application/octet-stream",
            "layer plain" => "application/vnd.docker.image.rootfs.diff.tar",
            "layer zstd" => "application/vnd.oci.image.layer.v1.tar+zstd",
            "layer foreign" | "layer foreign and absent" => "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            "layer nondistributable" => "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            "layer odd" => "application/vnd.example.squashfs",
            _ if is_oci => OCI_LAYER,
            _ => DOCKER_LAYER,
        };
        let inline = STANDARD.encode(&blob);
        let (digest, size) = self.put_blob(blob);
        self.content.layer.clone_from(&digest);
        let mut descriptor = json!({"mediaType": media_type, "digest": digest, "size": size});
        if media_type.contains("foreign") || media_type.contains("nondistributable") {
            descriptor["urls"] = json!(["http://127.0.0.1:9/layer"]);
        }
        if self.is("layer foreign and absent") {
            self.content.blobs.remove(&digest);
        }
        if self.is("inline data") {
            descriptor["data"] = json!(inline);
        }
        resize(&mut descriptor, self.behaviour.get("document").strip_prefix("size "));
        Ok((descriptor, diff_id))
    }

    /// Stores config and layer, and returns the image's manifest with its media type.
    fn manifest(&mut self, number: u64) -> Result<(&'static str, Value)> {
        let document = self.behaviour.get("document");
        let is_oci =
            ["oci", "layer zstd", "layer nondistributable", "nested", "attestations", "config empty", "inline data"]
                .iter()
                .any(|word| document.contains(word));
        let (layer, diff_id) = self.layer(number, is_oci)?;
        let has_layers = !document.ends_with(" layers");
        let diff_ids = if has_layers && document != "too few diff_ids" { json!([diff_id]) } else { json!([]) };
        let mut config = json!({"os": "linux", "architecture": architecture().0, "config": {"Cmd": ["/x"]}, "comment": number.to_string(),
            "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        if document == "null layers" {
            config["rootfs"]["diff_ids"] = Value::Null;
        }
        let config = if document == "config empty" { json!({}) } else { config };
        let (digest, size) = self.put_blob(config.to_string().into_bytes());
        let config_type = match document {
            "config untyped" => "",
            "config octet-stream" => "application/octet-stream",
            "config json" => "application/json",
            "config html" => "text/html",
            "config helm" => "application/vnd.cncf.helm.config.v1+json",
            "config empty" => "application/vnd.oci.empty.v1+json",
            _ if is_oci => OCI_CONFIG,
            _ => DOCKER_CONFIG,
        };
        let media_type = if is_oci { OCI } else { DOCKER };
        let mut manifest = json!({"schemaVersion": 2, "mediaType": media_type,
            "config": {"mediaType": config_type, "digest": digest, "size": size}, "layers": [layer]});
        resize(&mut manifest["config"], document.strip_prefix("config size "));
        let fields = manifest.as_object_mut();
        match (document, fields) {
            ("oci untyped", Some(fields)) => drop(fields.remove("mediaType")),
            ("absent layers", Some(fields)) => drop(fields.remove("layers")),
            ("no layers", Some(fields)) => drop(fields.insert("layers".to_owned(), json!([]))),
            ("null layers", Some(fields)) => drop(fields.insert("layers".to_owned(), Value::Null)),
            ("config type absent", Some(fields)) => {
                drop(fields["config"].as_object_mut().map(|config| config.remove("mediaType")))
            }
            _ => {}
        }
        Ok((media_type, manifest))
    }

    /// Builds the document that the tag points to.
    fn root(&mut self, number: u64) -> Result<Document> {
        let (media_type, manifest) = self.manifest(number)?;
        let text = manifest.to_string();
        let document = self.behaviour.get("document");
        let odd = match document {
            "key twice" => Some(text.replacen('{', "{\"layers\":[],", 1)),
            "key in another case" => Some(text.replace("\"layers\"", "\"Layers\"")),
            "trailing bytes" => Some(format!("{text}xyz")),
            "bom" => Some(format!("\u{feff}{text}")),
            _ => None,
        };
        if let Some(odd) = odd {
            self.put(media_type, odd.clone().into_bytes());
            return Ok(Document { media_type, bytes: odd.into_bytes() });
        }
        if document.starts_with("schema 1") {
            let (media_type, bytes) = self.schema_1(document == "schema 1 signed");
            self.put(media_type, bytes.clone());
            return Ok(Document { media_type, bytes });
        }
        let is_index = document.contains("index")
            || document.contains("list")
            || document.contains("platform")
            || ["attestations", "duplicates", "only 386", "variants"].contains(&document);
        let mut descriptor = self.put(media_type, text.clone().into_bytes());
        resize(&mut descriptor, document.strip_prefix("index with sizes "));
        if !is_index {
            return Ok(Document { media_type, bytes: text.into_bytes() });
        }
        let list_type = if media_type == OCI { OCI_INDEX } else { DOCKER_LIST };
        let index = self.index(list_type, &manifest, &descriptor);
        let bytes = index.to_string().into_bytes();
        let inner = self.put(list_type, bytes.clone());
        if document != "nested index" {
            return Ok(Document { media_type: list_type, bytes });
        }
        let entry = at(&inner, "linux", architecture().0, None);
        let outer = json!({"schemaVersion": 2, "mediaType": list_type, "manifests": [entry]}).to_string().into_bytes();
        self.put(list_type, outer.clone());
        Ok(Document { media_type: list_type, bytes: outer })
    }

    fn index(&mut self, list_type: &str, manifest: &Value, descriptor: &Value) -> Value {
        let (own, other) = architecture();
        let good = at(descriptor, "linux", own, None);
        // An image that does not exist. A client that chooses it is found out.
        let absent = json!({"mediaType": descriptor["mediaType"], "digest": digest_of(b"absent"), "size": 10});
        let arm = |variant| at(&absent, "linux", "arm", Some(variant));
        let entries = match self.behaviour.get("document") {
            "attestations" => {
                json!([at(&absent, "unknown", "unknown", None), good, at(&absent, "unknown", "unknown", None)])
            }
            "duplicates" => json!([good, at(&absent, "linux", own, None)]),
            "other platform" => json!([at(descriptor, "linux", other, None)]),
            "other platforms" => json!([at(descriptor, "linux", other, None), at(&absent, "linux", "s390x", None)]),
            "only 386" => json!([at(&absent, "linux", "s390x", None), at(descriptor, "linux", "386", None)]),
            "variants" => json!([
                arm("v5"),
                arm("v7"),
                at(&absent, "windows", own, None),
                good,
                at(&absent, "linux", other, Some("v8"))
            ]),
            "without platform" => json!([descriptor]),
            "empty index" => json!([]),
            "null index" => Value::Null,
            _ => json!([at(&absent, "linux", other, None), good]),
        };
        let mut index = json!({"schemaVersion": 2, "mediaType": list_type, "manifests": entries});
        if self.is("index and image") {
            index["config"] = manifest["config"].clone();
            index["layers"] = manifest["layers"].clone();
        }
        index
    }

    /// The image in the format that was used until 2016.
    fn schema_1(&self, is_signed: bool) -> (&'static str, Vec<u8>) {
        let history = json!({"id": "0".repeat(64), "os": "linux", "architecture": architecture().0}).to_string();
        let document = json!({"schemaVersion": 1, "name": "app", "tag": "1", "architecture": architecture().0,
            "fsLayers": [{"blobSum": self.content.layer}], "history": [{"v1Compatibility": history}]});
        if !is_signed {
            return (SCHEMA_1, document.to_string().into_bytes());
        }
        let mut signed = document;
        signed["signatures"] = json!([{"header": {"alg": "ES256"}, "signature": "x", "protected": "e30"}]);
        (SCHEMA_1_SIGNED, signed.to_string().into_bytes())
    }
}

/// Changes the size in a descriptor.
fn resize(descriptor: &mut Value, how: Option<&str>) {
    let right = descriptor["size"].as_u64().unwrap_or_default();
    match how {
        None => {}
        Some("absent") => drop(descriptor.as_object_mut().map(|fields| fields.remove("size"))),
        Some("null") => descriptor["size"] = Value::Null,
        Some("too small") => descriptor["size"] = json!(right / 2),
        Some("too large") => descriptor["size"] = json!(right * 1000),
        Some("negative") => descriptor["size"] = json!(-1),
        Some("beyond Go's integers") => descriptor["size"] = json!(10_000_000_000_000_000_000_u64),
        Some(_) => descriptor["size"] = json!(0),
    }
}

/// A descriptor with a platform added.
fn at(descriptor: &Value, os: &str, architecture: &str, variant: Option<&str>) -> Value {
    let mut entry = descriptor.clone();
    entry["platform"] = json!({"os": os, "architecture": architecture});
    if let Some(variant) = variant {
        entry["platform"]["variant"] = json!(variant);
    }
    entry
}

impl Content {
    /// The image with this number.
    pub(super) fn new(behaviour: &Behaviour, number: u64) -> Result<Self> {
        let mut parts = Parts { behaviour, content: Self::default() };
        let root = parts.root(number)?;
        parts.content.manifests.insert("1".to_owned(), root);
        Ok(parts.content)
    }
}

/// The media type of the same kind of document in the other family.
pub(super) fn dialect(media_type: &str) -> &'static str {
    match media_type {
        DOCKER => OCI,
        OCI => DOCKER,
        DOCKER_LIST => OCI_INDEX,
        _ => DOCKER_LIST,
    }
}

/// The media type of the other kind (manifest or index) in the same family.
pub(super) fn other_kind(media_type: &str) -> &'static str {
    match media_type {
        DOCKER => DOCKER_LIST,
        OCI => OCI_INDEX,
        DOCKER_LIST => DOCKER,
        _ => OCI,
    }
}

/// The bytes compressed for transfer, with gzip.
pub(super) fn packed(bytes: &[u8]) -> Vec<u8> {
    gzip(bytes).unwrap_or_default()
}
