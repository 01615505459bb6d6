//! The images of the store as the API shows them.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The images, in the order of their names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageList {
    /// The catalogue generation that was read.
    pub generation: u64,
    /// The images.
    pub images: Vec<Image>,
    /// Set if there are more: where the next page continues.
    #[serde(rename = "continue", default, skip_serializing_if = "Option::is_none")]
    pub next_page: Option<String>,
}

/// One image: a name that points to a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// The image's name in its familiar form, e.g. `debian:12`.
    pub name: String,
    /// The repository in its canonical form, e.g. `docker.io/library/debian`.
    pub repository: String,
    /// The tag; none for an image that was pulled by digest alone.
    pub tag: Option<String>,
    /// The manifest's digest.
    pub manifest: String,
    /// The config's digest: Docker's image id.
    pub config: String,
    /// `os/architecture[/variant]`.
    pub platform: String,
    /// Number of layers.
    pub layers: usize,
    /// Bytes of all layers' tar streams.
    pub size: u64,
    /// Bytes of all layers as they are transferred.
    pub compressed_size: u64,
    /// When this version was published.
    #[schema(value_type = String, format = DateTime)]
    pub published_at: Timestamp,
    /// Whether the name is pinned: retention leaves it alone, and people must insist to remove it.
    #[serde(default)]
    pub pinned: bool,
}

/// One image in full.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ImageDetail {
    /// What the list shows.
    #[serde(flatten)]
    pub image: Image,
    /// The layers, lowest first.
    pub layers_detail: Vec<ImageLayer>,
    /// What the name pointed to, newest first, the present version included.
    pub history: Vec<ImageVersion>,
    /// The OCI image config, as its registry has it.
    #[schema(value_type = Object)]
    pub config_document: Box<serde_json::value::RawValue>,
}

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageLayer {
    /// Digest of the layer's tar.
    pub diff_id: String,
    /// Digest of the layer as it is transferred.
    pub digest: String,
    /// Bytes of the tar.
    pub size: u64,
    /// Bytes as it is transferred.
    pub compressed_size: u64,
    /// OCI or Docker media type.
    pub media_type: String,
}

/// What a name pointed to at some time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageVersion {
    /// The manifest's digest.
    pub manifest: String,
    /// When the name began to point to it.
    #[schema(value_type = String, format = DateTime)]
    pub published_at: Timestamp,
}
