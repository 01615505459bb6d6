//! Registries that are reached over the network, as the rest of the coordinator sees them.
//!
//! What a tag points to is always asked. A manifest or config that is known by its digest and already in the store is not fetched again,
//! but its repository must prove that it has it, too.

use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use http::header;
use store::Digest;
use store::image::{ImageRef, Platform};
use store::reader::Store;

use crate::registries::error::RegistryError;
use crate::registries::image::manifest::{self, ACCEPT, Descriptor, MAX_CONFIG, MAX_MANIFEST};
use crate::registries::image::resolve::{Documents, Kind, resolve};
use crate::registries::limits::Limits;
use crate::registries::oci::blob::BlobDownload;
use crate::registries::oci::client::{Ask, OciClient, Verb};
use crate::registries::oci::docker_config::CredentialStore;
use crate::registries::oci::reference::{reference, stated_digest};
use crate::registries::oci::transport::{Transport, TransportError, TransportSettings};
use crate::registries::{BlobStream, Document, Registry, RemoteLayer, ResolvedImage};

/// All registries that are reached over the network.
#[derive(Clone)]
pub struct OciRegistry {
    pub(super) client: Arc<OciClient>,
    store: Store,
}

impl OciRegistry {
    /// Sets up connections and credentials; nothing is contacted. `store` is where documents may be found without fetching them.
    pub fn new(
        settings: &TransportSettings,
        credentials: CredentialStore,
        store: Store,
        limits: Arc<Limits>,
    ) -> Result<OciRegistry, TransportError> {
        Ok(OciRegistry::over(Transport::new(settings, limits)?, credentials, store))
    }

    /// The same over an existing transport.
    pub(crate) fn over(transport: Transport, credentials: CredentialStore, store: Store) -> OciRegistry {
        OciRegistry { client: Arc::new(OciClient::new(transport, credentials)), store }
    }
}

impl Registry for OciRegistry {
    fn resolve<'a>(
        &'a self,
        image: &'a ImageRef,
        platform: Option<&'a Platform>,
    ) -> BoxFuture<'a, Result<ResolvedImage, RegistryError>> {
        async move {
            let documents = Repository { client: &self.client, store: &self.store, image };
            let root = documents.root().await?;
            resolve(&documents, &image.to_string(), root, platform).await
        }
        .boxed()
    }

    fn confirm_blob<'a>(
        &'a self,
        image: &'a ImageRef,
        layer: &'a RemoteLayer,
    ) -> BoxFuture<'a, Result<(), RegistryError>> {
        async move {
            let what = format!("layer {} of {image}", layer.blob);
            let repository = Repository { client: &self.client, store: &self.store, image };
            repository.confirm(format!("blobs/{}", layer.blob), None, &what, missing_blob(image, &what)).await
        }
        .boxed()
    }

    fn layer(&self, image: &ImageRef, layer: &RemoteLayer) -> BlobStream {
        BlobDownload::new(Arc::clone(&self.client), image.clone(), layer).into_stream()
    }
}

/// The documents of one image's repository.
struct Repository<'a> {
    client: &'a OciClient,
    store: &'a Store,
    image: &'a ImageRef,
}

impl Repository<'_> {
    /// The document that the image's tag or digest points to.
    async fn root(&self) -> Result<Document, RegistryError> {
        let what = format!("the manifest of {}", self.image);
        self.manifest(&reference(self.image), self.image.digest().copied(), &what).await
    }

    /// Fetches one manifest or index. It is verified against `expected` or, for a tag, against the digest that the registry states, if any.
    async fn manifest(&self, reference: &str, expected: Option<Digest>, what: &str) -> Result<Document, RegistryError> {
        let absent =
            RegistryError::UnknownImage { registry: self.image.registry().to_owned(), image: self.image.to_string() };
        let path = format!("manifests/{reference}");
        let ask = Ask { image: self.image, path, accept: Some(ACCEPT), offset: 0, what, absent, verb: Verb::Get };
        let (headers, bytes) = self.client.document(&ask, MAX_MANIFEST).await?;
        let stated = stated_digest(&headers);
        let header = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type = manifest::media_type(&bytes, header, what)?;
        let actual = Digest::of(&bytes);
        match expected.or(stated) {
            Some(expected) if expected != actual => {
                Err(RegistryError::DigestMismatch { what: what.to_owned(), expected, actual })
            }
            _ => Ok(Document { digest: actual, media_type, bytes }),
        }
    }

    /// A verified document from the store; `None` if it is missing or cannot be read there.
    async fn stored(&self, digest: Digest) -> Option<Bytes> {
        let store = self.store.clone();
        tokio::task::spawn_blocking(move || store.blob(&digest)).await.ok()?.ok().map(Bytes::from)
    }

    /// Checks that the repository has what lies at `path`; fails with `absent` if not. Some registries do not support HEAD: they get a GET,
    /// and its body is not read.
    async fn confirm(
        &self,
        path: String,
        accept: Option<&'static str>,
        what: &str,
        absent: RegistryError,
    ) -> Result<(), RegistryError> {
        let image = self.image;
        let mut ask = Ask { image, path, accept, offset: 0, what, absent, verb: Verb::Head { unless: None } };
        let head = self.client.head(&ask).await?;
        if head.is_some() {
            return Ok(());
        }
        ask.verb = Verb::Get;
        self.client.answered(&ask).await
    }

    /// Fetches and verifies a config.
    async fn config(&self, descriptor: &Descriptor, what: &str) -> Result<Document, RegistryError> {
        let expected = descriptor.digest(what)?;
        let absent = missing_blob(self.image, what);
        let path = format!("blobs/{expected}");
        let ask = Ask { image: self.image, path, accept: None, offset: 0, what, absent, verb: Verb::Get };
        let (_, bytes) = self.client.document(&ask, MAX_CONFIG).await?;
        match Digest::of(&bytes) {
            actual if actual == expected => {
                Ok(Document { digest: actual, media_type: descriptor.media_type.clone(), bytes })
            }
            actual => Err(RegistryError::DigestMismatch { what: what.to_owned(), expected, actual }),
        }
    }
}

impl Documents for Repository<'_> {
    fn fetch<'a>(
        &'a self,
        kind: Kind,
        descriptor: &'a Descriptor,
        what: &'a str,
    ) -> BoxFuture<'a, Result<Document, RegistryError>> {
        async move {
            let digest = descriptor.digest(what)?;
            let stored = self.stored(digest).await;
            // The store has documents of all repositories; this one must prove that it has them, too.
            if stored.is_some() {
                let absent = missing_blob(self.image, what);
                match kind {
                    Kind::Manifest => self.confirm(format!("manifests/{digest}"), Some(ACCEPT), what, absent).await?,
                    Kind::Config => self.confirm(format!("blobs/{digest}"), None, what, absent).await?,
                }
            }
            match (stored, kind) {
                (Some(bytes), Kind::Manifest) => {
                    let media_type = manifest::media_type(&bytes, Some(&descriptor.media_type), what)?;
                    Ok(Document { digest, media_type, bytes })
                }
                (Some(bytes), Kind::Config) => {
                    Ok(Document { digest, media_type: descriptor.media_type.clone(), bytes })
                }
                (None, Kind::Manifest) => self.manifest(&digest.to_string(), Some(digest), what).await,
                (None, Kind::Config) => self.config(descriptor, what).await,
            }
        }
        .boxed()
    }
}

/// The error if the registry lacks a blob of `image`.
fn missing_blob(image: &ImageRef, what: &str) -> RegistryError {
    RegistryError::MissingBlob { registry: image.registry().to_owned(), what: what.to_owned() }
}
