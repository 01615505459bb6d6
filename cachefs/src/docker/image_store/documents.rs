//! `images.json` and `layers.json`, as containers/storage reads them. Digests are names there: hex for ids, `sha256:` before
//! those of contents.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use store::Digest;

/// One element of `images.json`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct ImageEntry {
    pub(super) id: String,
    pub(super) digest: Digest,
    pub(super) names: Vec<String>,
    pub(super) layer: String,
    pub(super) metadata: &'static str,
    pub(super) big_data_names: Vec<String>,
    pub(super) big_data_sizes: BTreeMap<String, usize>,
    pub(super) big_data_digests: BTreeMap<String, Digest>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) created: Option<jiff::Timestamp>,
}

/// One element of `layers.json`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct LayerEntry {
    pub(super) id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) parent: Option<String>,
    pub(super) diff_digest: Digest,
    pub(super) diff_size: u64,
    #[serde(flatten)]
    pub(super) blob: Option<Blob>,
}

/// A layer as its registry has it, so that it is neither compressed nor uploaded again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Blob {
    #[serde(rename = "compressed-diff-digest")]
    pub(super) digest: Digest,
    #[serde(rename = "compressed-size")]
    pub(super) size: u64,
    pub(super) compression: u8,
}

/// The number of a compression in containers/storage, by the media type of a layer.
pub(super) fn compression(media_type: &str) -> Option<u8> {
    let (_, kind) = media_type.rsplit_once("tar")?;
    match kind {
        "" => Some(0),
        ".gzip" | "+gzip" => Some(2),
        "+zstd" => Some(4),
        _ => None,
    }
}

/// The name of the file that holds a piece of an image's data.
pub(super) fn data_file(name: &str) -> String {
    if name.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        name.to_owned()
    } else {
        format!("={}", STANDARD.encode(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_those_of_the_library() {
        assert_eq!(data_file("manifest"), "manifest");
        assert_eq!(data_file("sha256:61"), "=c2hhMjU2OjYx");
        for (media_type, number) in [
            ("application/vnd.docker.image.rootfs.diff.tar.gzip", Some(2)),
            ("application/vnd.oci.image.layer.v1.tar", Some(0)),
            ("application/vnd.oci.image.layer.v1.tar+zstd", Some(4)),
            ("application/x", None),
        ] {
            assert_eq!(compression(media_type), number, "{media_type}");
        }
    }
}
