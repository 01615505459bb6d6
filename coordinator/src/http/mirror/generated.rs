//! Documents that the mirror generates from originals: plain manifests, and indexes with one entry.
//!
//! Originals are read as Go reads JSON, both when they are pulled and here: whatever was pulled can be served. Generated
//! documents contain those parts of the original that engines know; the rest stays in the original. The same originals give the
//! same bytes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Error, json};
use store::go_json;
use store::image::ImageRecord;

use super::document::Document;
use crate::registries::image::manifest::{
    DOCKER_CONFIG, DOCKER_LAYER, DOCKER_MANIFEST, OCI_CONFIG, OCI_LAYER, OCI_MANIFEST,
};

type Annotations = BTreeMap<String, String>;

/// A document's annotations. Invalid ones are ignored, because the rest can be read without them.
fn annotations(document: &[u8]) -> Annotations {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Annotated {
        annotations: Annotations,
    }
    go_json::from_slice::<Annotated>(document).unwrap_or_default().annotations
}

/// The part of a manifest that the plain form takes over.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Original {
    config: OriginalConfig,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct OriginalConfig {
    media_type: String,
    annotations: Annotations,
}

/// Generates the manifest that names an image's uncompressed layers, from the original and the length of its config. Returns
/// media type and bytes.
pub(super) fn plain(original: &[u8], config_len: usize, image: &ImageRecord) -> Result<(&'static str, Vec<u8>), Error> {
    let Original { config } = go_json::from_slice(original)?;
    let (media_type, layer_type, config_type) = if image.media_type == DOCKER_MANIFEST {
        (DOCKER_MANIFEST, DOCKER_LAYER, DOCKER_CONFIG)
    } else {
        (OCI_MANIFEST, OCI_LAYER, OCI_CONFIG)
    };
    let config_type = if config.media_type.is_empty() { config_type } else { &config.media_type };
    let layer = |layer: &store::image::LayerRecord| json!({"mediaType": layer_type, "digest": layer.diff_id, "size": layer.size});
    let mut manifest = json!({
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": {"mediaType": config_type, "digest": image.config, "size": config_len},
        "layers": image.layers.iter().map(layer).collect::<Vec<_>>(),
    });
    if !config.annotations.is_empty() {
        manifest["config"]["annotations"] = json!(config.annotations);
    }
    let annotations = annotations(original);
    if !annotations.is_empty() {
        manifest["annotations"] = json!(annotations);
    }
    Ok((media_type, manifest.to_string().into_bytes()))
}

/// The part of an index that the narrowed one takes over.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Index {
    #[serde(default)]
    media_type: String,
    #[serde(default)]
    manifests: Vec<IndexEntry>,
    #[serde(skip)]
    annotations: Annotations,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct IndexEntry {
    media_type: String,
    digest: String,
    size: u64,
    #[serde(skip_serializing_if = "Annotations::is_empty")]
    annotations: Annotations,
    #[serde(skip_serializing_if = "Option::is_none")]
    platform: Option<EntryPlatform>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct EntryPlatform {
    architecture: String,
    os: String,
    #[serde(rename = "os.version", skip_serializing_if = "String::is_empty")]
    os_version: String,
    #[serde(rename = "os.features", skip_serializing_if = "Vec::is_empty")]
    os_features: Vec<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    variant: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    features: Vec<String>,
}

impl Index {
    /// Reads an index.
    pub(super) fn parse(bytes: &[u8]) -> Result<Index, Error> {
        let mut index: Index = go_json::from_slice(bytes)?;
        index.annotations = annotations(bytes);
        Ok(index)
    }

    /// The digests that the index names.
    pub(super) fn digests(&self) -> impl Iterator<Item = &str> {
        self.manifests.iter().map(|entry| entry.digest.as_str())
    }

    /// The entry for an image: its own, or one made from its record if the index names it through another index. `None` if the
    /// record does not state the architecture: no engine would take the entry for its own.
    fn entry(&self, image: &ImageRecord) -> Option<IndexEntry> {
        let own = image.manifest.to_string();
        let named = self.manifests.iter().find(|entry| entry.digest == own).cloned();
        named.or_else(|| {
            let platform = EntryPlatform {
                architecture: image.platform.architecture.clone(),
                os: image.platform.os.clone(),
                variant: image.platform.variant.clone().unwrap_or_default(),
                ..EntryPlatform::default()
            };
            let is_told = !platform.architecture.is_empty();
            is_told.then(|| IndexEntry { platform: Some(platform), ..IndexEntry::default() })
        })
    }

    /// This index with the one entry `only` for an image; `None` if no entry can be made.
    pub(super) fn narrowed(&self, image: &ImageRecord, only: &Document) -> Option<Vec<u8>> {
        let entry = IndexEntry {
            media_type: only.media_type.clone(),
            digest: only.digest.to_string(),
            size: only.bytes.len() as u64,
            ..self.entry(image)?
        };
        let mut index = json!({"schemaVersion": 2, "manifests": [entry]});
        if !self.media_type.is_empty() {
            index["mediaType"] = json!(self.media_type);
        }
        if !self.annotations.is_empty() {
            index["annotations"] = json!(self.annotations);
        }
        Some(index.to_string().into_bytes())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use store::Digest;
    use store::image::{LayerRecord, Platform, RequestedBy};

    use super::*;
    use crate::registries::image::manifest::{DOCKER_LIST, OCI_INDEX};

    fn image() -> ImageRecord {
        let layer = LayerRecord {
            diff_id: Digest::of(b"tar"),
            size: 7,
            blob: Digest::of(b"gz"),
            blob_size: 5,
            media_type: String::new(),
        };
        ImageRecord {
            repository: "q.io/a".into(),
            tag: None,
            target: Digest::of(b"index"),
            manifest: Digest::of(b"manifest"),
            media_type: DOCKER_MANIFEST.into(),
            config: Digest::of(b"config"),
            platform: "linux/arm/v7".parse::<Platform>().unwrap(),
            layers: vec![layer],
            published_at: 0,
            ordered_by: RequestedBy::Operator,
        }
    }

    fn json_of(bytes: &[u8]) -> Value {
        serde_json::from_slice(bytes).unwrap()
    }

    #[test]
    fn a_plain_manifest_is_made_of_whatever_was_pulled() {
        let image = image();
        let bare = json!({"schemaVersion": 2, "mediaType": DOCKER_MANIFEST,
            "config": {"mediaType": DOCKER_CONFIG, "digest": image.config, "size": 6},
            "layers": [{"mediaType": DOCKER_LAYER, "digest": image.layers[0].diff_id, "size": 7}]});
        for original in [
            format!("{{\"config\":{{\"mediaType\":\"{DOCKER_CONFIG}\",\"size\":99}}}}").into_bytes(),
            b"{\"Config\":{\"SIZE\":6},\"x\":1e999}".to_vec(),
            b"{\"config\":{},\"x\":\"\xe9\\ud800\"}".to_vec(),
            format!("{{\"config\":{{}},\"x\":{}{}}}", "[".repeat(500), "]".repeat(500)).into_bytes(),
            b"{\"config\":{},\"annotations\":{\"a\":1}}".to_vec(),
        ] {
            let (media_type, made) = plain(&original, 6, &image).unwrap();
            assert_eq!((media_type, json_of(&made)), (DOCKER_MANIFEST, bare.clone()));
        }
        let upper =
            plain(b"{\"Config\":{\"MediaType\":\"text/html\"},\"Annotations\":{\"a\":\"\xe9\"}}", 6, &image).unwrap().1;
        assert_eq!(json_of(&upper)["config"]["mediaType"], "text/html");
        assert_eq!(json_of(&upper)["annotations"], json!({"a": "\u{fffd}"}));
        let noted = plain(b"{\"config\":{},\"annotations\":{\"a\":\"b\"}}", 6, &image).unwrap().1;
        assert_eq!(json_of(&noted)["annotations"], json!({"a": "b"}));
    }

    #[test]
    fn an_index_of_one_entry_is_made_of_whatever_was_pulled() {
        let image = image();
        let only =
            Document { digest: Digest::of(b"only"), media_type: DOCKER_MANIFEST.into(), bytes: b"12345".to_vec() };
        let narrowed =
            |index: String| json_of(&Index::parse(index.as_bytes()).unwrap().narrowed(&image, &only).unwrap());
        let entry = json!({"mediaType": DOCKER_MANIFEST, "digest": only.digest, "size": 5,
            "platform": {"os": "linux", "architecture": "arm", "variant": "v7"}});
        let platform = r#""platform":{"OS":"linux","architecture":"arm","variant":"v7","os.version":null}"#;
        let upper = format!(
            r#"{{"mediaType":"{DOCKER_LIST}","Manifests":[{{"digest":"x"}},{{"Digest":"{}","x":1e999,{platform}}}]}}"#,
            image.manifest
        );
        let expected = json!({"schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": [entry]});
        assert_eq!(narrowed(upper), expected);
        // Nested: the outer index names only another index.
        let nested =
            format!(r#"{{"mediaType":"{OCI_INDEX}","manifests":[{{"digest":"x"}}],"annotations":{{"a":"b"}}}}"#);
        let expected =
            json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry], "annotations": {"a": "b"}});
        assert_eq!(narrowed(nested), expected);
        let empty = Index::parse(b"{\"manifests\":null}").unwrap();
        assert_eq!(empty.digests().count(), 0);
        let platform = Platform { architecture: String::new(), ..image.platform.clone() };
        assert!(empty.narrowed(&ImageRecord { platform, ..image }, &only).is_none(), "for which processor?");
    }
}
