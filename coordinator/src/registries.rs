//! Where images come from: the trait, and what a resolved image is.
//!
//! Two implementations: [`crate::registries::oci::client::OciRegistry`] speaks the distribution protocol to a real registry, [`archive::Archive`]
//! reads a docker-save tar or an OCI layout. Both end in the same walk ([`image::resolve`]): index, manifest, config, layers.
//!
//! Invariants: a [`Document`] is verified against its digest before anyone sees it; layer bytes are **not** verified
//! here (the puller hashes them as they pass); no error and no log line holds a secret or a signed URL.

pub mod blob_cache;
pub mod encoding;
pub mod image;
pub mod limits;
pub mod oci;
pub mod webhook;

pub mod archive;
pub mod error;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use store::Digest;
use store::image::{ImageRef, Platform};

use crate::registries::encoding::Encoding;
pub use error::RegistryError;

/// Layer bytes as they travel, in order, from the first to the last.
pub type BlobStream = BoxStream<'static, Result<Bytes, RegistryError>>;

/// A small JSON document that matches its digest.
#[derive(Debug, Clone)]
pub struct Document {
    /// Its digest.
    pub digest: Digest,
    /// What it is.
    pub media_type: String,
    /// The exact bytes.
    pub bytes: Bytes,
}

/// One layer that can be fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteLayer {
    /// Digest of the tar, as the image's config says.
    pub diff_id: Digest,
    /// Digest of the bytes as they travel.
    pub blob: Digest,
    /// Number of bytes as they travel, as the manifest says; 0 where it says nothing. Only the digest proves the content: this may
    /// be wrong.
    pub claimed: u64,
    /// OCI or Docker media type.
    pub media_type: String,
    /// What the media type says about packing.
    pub encoding: Encoding,
}

/// A name, looked up: all documents, and what to fetch.
#[derive(Debug, Clone)]
pub struct ResolvedImage {
    /// The platform that was chosen.
    pub platform: Platform,
    /// The manifest list or index that the manifest was chosen from.
    pub index: Option<Document>,
    /// The manifest.
    pub manifest: Document,
    /// The image config.
    pub config: Document,
    /// Layers, lowest first.
    pub layers: Vec<RemoteLayer>,
}

/// Looks at tags without fetching anything: for schedules.
pub trait TagLister: Send + Sync {
    /// The tags of `image`'s repository, in the registry's order.
    fn tags<'a>(&'a self, image: &'a ImageRef) -> BoxFuture<'a, Result<Vec<String>, RegistryError>>;

    /// What `image`'s tag points to now, given what it pointed to before: one conditional request.
    fn look<'a>(&'a self, image: &'a ImageRef, known: Option<Digest>) -> BoxFuture<'a, Result<TagLook, RegistryError>>;
}

/// What a look at a tag found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TagLook {
    /// It points to where it did.
    Same,
    /// It points here.
    At(Digest),
}

/// A place that images come from.
pub trait Registry: Send + Sync {
    /// Looks `image` up for `platform` (none: the coordinator's own, but an image of another one is accepted when it
    /// is the only one).
    fn resolve<'a>(
        &'a self,
        image: &'a ImageRef,
        platform: Option<&'a Platform>,
    ) -> BoxFuture<'a, Result<ResolvedImage, RegistryError>>;

    /// The registry whose limits hold for `image`; empty for what comes from elsewhere.
    fn host<'a>(&self, image: &'a ImageRef) -> &'a str {
        image.registry()
    }

    /// Asks whether the repository of `image` has the layer's blob now, without fetching it; an error if it has not.
    fn shows<'a>(&'a self, image: &'a ImageRef, layer: &'a RemoteLayer) -> BoxFuture<'a, Result<(), RegistryError>>;

    /// The bytes of one layer of `image`. Nothing is asked before the stream is first polled. The stream ends where
    /// the blob does as far as its sender says, or with an error.
    fn layer(&self, image: &ImageRef, layer: &RemoteLayer) -> BlobStream;
}
