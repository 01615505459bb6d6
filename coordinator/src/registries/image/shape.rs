//! The kind of a document: by its `mediaType`, by its `Content-Type` header, and by its fields, which must not contradict each other.
//!
//! CVE-2021-41190 is about two programs that read the same digest as different things: one as an index, the other as an image. So a
//! document that is both is refused, as is one whose header and `mediaType` or fields disagree about this. Registries that call everything
//! `text/plain` are common and harmless: then the fields decide.

use serde::Deserialize;
use serde::de::IgnoredAny;
use store::go_json;

use crate::registries::error::RegistryError;

/// OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Docker schema 2 manifest.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker manifest list.
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Docker schema 1 manifest.
const SCHEMA_1: &str = "application/vnd.docker.distribution.manifest.v1+json";

/// The two kinds of documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// One image.
    Manifest,
    /// Several images to choose from.
    Index,
}

impl Shape {
    /// The kind that a media type stands for, if it is a known one.
    pub fn of_type(media_type: &str) -> Option<Shape> {
        match media_type {
            OCI_MANIFEST | DOCKER_MANIFEST => Some(Shape::Manifest),
            OCI_INDEX | DOCKER_LIST => Some(Shape::Index),
            _ => None,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Shape::Manifest => "an image",
            Shape::Index => "an index",
        }
    }
}

/// The fields that say what a document is.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Fields {
    schema_version: u64,
    media_type: String,
    config: Option<IgnoredAny>,
    layers: Option<IgnoredAny>,
    manifests: Option<IgnoredAny>,
}

impl Fields {
    /// The kind that they imply; an error if they imply both.
    fn shape(&self) -> Result<Option<Shape>, &'static str> {
        match (self.manifests.is_some(), self.config.is_some() || self.layers.is_some()) {
            (true, true) => Err("it is an index and an image at the same time"),
            (true, false) => Ok(Some(Shape::Index)),
            (false, true) => Ok(Some(Shape::Manifest)),
            (false, false) => Ok(None),
        }
    }
}

/// The media type of a manifest: its own `mediaType` if it has one, otherwise the header's if it is a known one, otherwise the one that its
/// fields imply.
pub fn media_type(bytes: &[u8], header: Option<&str>, what: &str) -> Result<String, RegistryError> {
    let malformed = |why: String| RegistryError::Malformed { what: what.to_owned(), why };
    let fields: Fields = go_json::from_slice(bytes).map_err(|error| malformed(error.to_string()))?;
    if fields.schema_version == 1 {
        return Ok(SCHEMA_1.to_owned());
    }
    let header = header.map(|text| text.split(';').next().unwrap_or_default().trim()).unwrap_or_default();
    let header = header.to_ascii_lowercase();
    let by_header = Shape::of_type(&header);
    let by_fields = fields.shape().map_err(|why| malformed(why.to_owned()))?;
    let found = match (fields.media_type.is_empty(), by_header, by_fields) {
        (false, _, _) => fields.media_type,
        (true, Some(_), _) => header.clone(),
        (true, None, Some(Shape::Manifest)) => OCI_MANIFEST.to_owned(),
        (true, None, Some(Shape::Index)) => OCI_INDEX.to_owned(),
        (true, None, None) if header.is_empty() => OCI_MANIFEST.to_owned(),
        (true, None, None) => header.clone(),
    };
    let Some(own) = Shape::of_type(&found) else { return Ok(found) };
    for (who, other) in [("its header", by_header), ("what it holds", by_fields)] {
        if let Some(other) = other.filter(|other| *other != own) {
            let why = format!("it calls itself {} and {who} makes it {}", own.word(), other.word());
            return Err(malformed(why));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(document: &str, header: Option<&str>) -> Result<String, String> {
        media_type(document.as_bytes(), header, "a").map_err(|error| error.to_string())
    }

    const IMAGE: &str = r#"{"schemaVersion":2,"config":{},"layers":[]}"#;
    const LIST: &str = r#"{"schemaVersion":2,"manifests":[]}"#;

    #[test]
    fn a_document_is_what_it_says_or_what_its_header_says_or_what_it_holds() {
        let named =
            |media_type: &str, rest: &str| format!(r#"{{"schemaVersion":2,"mediaType":"{media_type}",{rest}}}"#);
        for (document, header, expected) in [
            (named(DOCKER_MANIFEST, r#""config":{},"layers":[]"#), Some("text/plain"), DOCKER_MANIFEST),
            (named(OCI_MANIFEST, r#""config":{},"layers":[]"#), Some(DOCKER_MANIFEST), OCI_MANIFEST),
            (
                named("", r#""config":{},"layers":[]"#),
                Some("Application/VND.docker.distribution.manifest.v2+json; charset=utf-8"),
                DOCKER_MANIFEST,
            ),
            (IMAGE.to_owned(), Some("application/octet-stream"), OCI_MANIFEST),
            (LIST.to_owned(), Some("application/json"), OCI_INDEX),
            (LIST.to_owned(), None, OCI_INDEX),
            (LIST.to_owned(), Some(DOCKER_LIST), DOCKER_LIST),
            (r#"{"schemaVersion":2,"mediaType":null,"layers":null,"manifests":[]}"#.to_owned(), None, OCI_INDEX),
            (r#"{"MANIFESTS":[],"manifests":[{}]}"#.to_owned(), None, OCI_INDEX),
            (r#"{"schemaVersion":1,"fsLayers":[]}"#.to_owned(), Some("text/plain"), SCHEMA_1),
            (named("application/x", r#""layers":[]"#), Some(OCI_MANIFEST), "application/x"),
            (r#"{"schemaVersion":2}"#.to_owned(), Some("text/html"), "text/html"),
        ] {
            assert_eq!(of(&document, header).as_deref(), Ok(expected), "{document} {header:?}");
        }
    }

    #[test]
    fn what_may_be_read_in_two_ways_is_refused() {
        for (document, header) in [
            (r#"{"schemaVersion":2,"config":{},"layers":[],"manifests":[]}"#.to_owned(), None),
            (r#"{"layers":[],"manifests":[{}]}"#.to_owned(), Some(OCI_INDEX)),
            (IMAGE.to_owned(), Some(OCI_INDEX)),
            (LIST.to_owned(), Some(DOCKER_MANIFEST)),
            (format!(r#"{{"mediaType":"{OCI_INDEX}","manifests":[]}}"#), Some(OCI_MANIFEST)),
            (format!(r#"{{"mediaType":"{OCI_INDEX}","layers":[]}}"#), Some(OCI_INDEX)),
            (r#"{"layers":[],"Manifests":[]}"#.to_owned(), None),
            (r#"{"layers":[],"mediaType":1}"#.to_owned(), None),
            (format!("{IMAGE}x"), None),
            (format!("\u{feff}{IMAGE}"), None),
            ("[]".to_owned(), None),
        ] {
            assert!(of(&document, header).is_err(), "{document} {header:?}");
        }
    }
}
