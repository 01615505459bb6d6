//! Where images come from: the [`Registry`] trait, and the types that describe a resolved image.
//!
//! There are two implementations: [`crate::registries::oci::registry::OciRegistry`] speaks the distribution protocol to a real registry,
//! [`archive::Archive`] reads a docker-save tar or an OCI layout. Both end in the same walk ([`image::resolve`]): index, manifest, config,
//! layers.
//!
//! Invariants: a [`Document`] is verified against its digest before anyone sees it; layer bytes are **not** verified
//! here (the puller hashes them as they pass); no error and no log line holds a secret or a signed URL.

pub mod blob_cache;
pub mod compression;
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

use crate::registries::compression::Compression;
pub use error::RegistryError;

/// The bytes of a layer as they are transferred, that is before the layer is decompressed, in order.
pub type BlobStream = BoxStream<'static, Result<Bytes, RegistryError>>;

/// A small JSON document that matches its digest.
#[derive(Debug, Clone)]
pub struct Document {
    /// Its digest.
    pub digest: Digest,
    /// Its media type.
    pub media_type: String,
    /// The exact bytes.
    pub bytes: Bytes,
}

/// One layer that can be fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteLayer {
    /// Digest of the uncompressed tar, from the image's config.
    pub diff_id: Digest,
    /// Digest of the bytes as transferred.
    pub blob: Digest,
    /// Number of bytes as transferred, according to the manifest; 0 if the manifest does not say. This may be wrong: only the digest proves
    /// the content.
    pub claimed: u64,
    /// OCI or Docker media type.
    pub media_type: String,
    /// The compression that the media type implies.
    pub encoding: Compression,
}

/// The result of looking up an image name: its documents, and the layers to fetch.
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

/// Lists tags and checks what they point to, without fetching images. Schedules use this.
pub trait TagLister: Send + Sync {
    /// The tags of `image`'s repository, in the registry's order.
    fn tags<'a>(&'a self, image: &'a ImageRef) -> BoxFuture<'a, Result<Vec<String>, RegistryError>>;

    /// Checks what `image`'s tag points to now, given the digest that it pointed to before. Takes one conditional request if the registry
    /// supports it.
    fn look<'a>(&'a self, image: &'a ImageRef, known: Option<Digest>) -> BoxFuture<'a, Result<TagLook, RegistryError>>;
}

/// The result of [`TagLister::look`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TagLook {
    /// The tag points to the same digest as before.
    Same,
    /// The tag points to this digest.
    At(Digest),
}

/// A source of images.
pub trait Registry: Send + Sync {
    /// Looks `image` up for `platform`. Without a platform, the coordinator's own is meant, but an image of another platform is accepted if
    /// it is the only one.
    fn resolve<'a>(
        &'a self,
        image: &'a ImageRef,
        platform: Option<&'a Platform>,
    ) -> BoxFuture<'a, Result<ResolvedImage, RegistryError>>;

    /// The registry whose limits apply to `image`; empty for images that come from no registry.
    fn host<'a>(&self, image: &'a ImageRef) -> &'a str {
        image.registry()
    }

    /// Checks that the repository of `image` has the layer's blob now, without fetching it. Fails if it does not.
    fn confirm_blob<'a>(
        &'a self,
        image: &'a ImageRef,
        layer: &'a RemoteLayer,
    ) -> BoxFuture<'a, Result<(), RegistryError>>;

    /// Streams the bytes of one layer of `image`. No request is made before the stream is first polled. The stream ends where the sender
    /// says that the blob ends, or with an error.
    fn layer(&self, image: &ImageRef, layer: &RemoteLayer) -> BlobStream;
}
