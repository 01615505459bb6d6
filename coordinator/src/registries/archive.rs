//! Images in a tar: `docker save` archives, including those from before Docker 1.10, and OCI layouts.
//!
//! The archive is indexed once, and its members are then read in place. Nothing is extracted, so member names are only keys and can do no
//! harm. All formats are reduced to the same contents: named roots, and blobs by digest.

pub(super) mod contents;
pub(super) mod docker_save;
pub(super) mod image_v1;
pub(super) mod member_index;
pub(super) mod members;
pub(super) mod oci_layout;
pub mod spool;
pub mod writer;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use store::Digest;
use store::image::{ImageRef, Platform};
use tokio::io::{AsyncReadExt, AsyncSeekExt};

use crate::registries::archive::contents::Contents;
use crate::registries::archive::member_index::{BLOCK, Blob, Members, Span, unreadable};
use crate::registries::error::RegistryError;
use crate::registries::image::manifest::{Descriptor, MAX_CONFIG};
use crate::registries::image::resolve::{Documents, Kind, resolve};
use crate::registries::{BlobStream, Document, Registry, RemoteLayer, ResolvedImage};

/// An indexed archive.
#[derive(Debug)]
pub struct Archive {
    members: Arc<Members>,
    contents: Contents,
}

impl Archive {
    /// Indexes the tar at `path`. `name` is the name for its only image, or for the only one that has none. Blocks.
    pub fn open(path: &Path, name: Option<&ImageRef>) -> Result<Archive, RegistryError> {
        let members = Members::index(path)?;
        let contents = if members.find("manifest.json").is_some() {
            docker_save::read(&members, name)?
        } else if members.find("index.json").is_some() {
            oci_layout::read(&members, name)?
        } else if members.find(image_v1::REPOSITORIES).is_some() {
            image_v1::read(&members, name)?
        } else {
            return Err(unreadable(
                "it holds neither manifest.json or repositories (docker save) nor index.json (OCI layout): save the image again",
            ));
        };
        match (contents.images.is_empty(), contents.unnamed.first()) {
            (true, Some(image)) => Err(unreadable(format!("image {image} in it has no name: give one with --name"))),
            (true, None) => Err(unreadable("it holds no image")),
            (false, _) => Ok(Archive { members: Arc::new(members), contents }),
        }
    }

    /// The names of its images.
    pub fn names(&self) -> impl Iterator<Item = &ImageRef> {
        self.contents.images.iter().map(|(name, _)| name)
    }

    /// The images that are left out because they have no name, one sentence each.
    pub fn left_out(&self) -> Vec<String> {
        let sentence =
            |image: &String| format!("image {image} is left out: it has no name; load the archive again with --name");
        self.contents.unnamed.iter().map(sentence).collect()
    }

    fn blob(&self, digest: &Digest, what: &str) -> Result<Blob, RegistryError> {
        let found = self.contents.blobs.get(digest).cloned();
        found.ok_or_else(|| unreadable(format!("it lacks {what} ({digest}): save the image again")))
    }
}

impl Registry for Archive {
    fn resolve<'a>(
        &'a self,
        image: &'a ImageRef,
        platform: Option<&'a Platform>,
    ) -> BoxFuture<'a, Result<ResolvedImage, RegistryError>> {
        async move {
            let root = self.contents.images.iter().find(|(name, _)| name == image).map(|(_, root)| root.clone());
            let root = root.ok_or_else(|| unreadable(format!("it holds no image {image}")))?;
            resolve(self, &image.to_string(), root, platform).await
        }
        .boxed()
    }

    fn host<'a>(&self, _image: &'a ImageRef) -> &'a str {
        ""
    }

    fn confirm_blob<'a>(
        &'a self,
        image: &'a ImageRef,
        layer: &'a RemoteLayer,
    ) -> BoxFuture<'a, Result<(), RegistryError>> {
        let what = format!("layer {} of {image}", layer.blob);
        let members = Arc::clone(&self.members);
        async move {
            // A member's name is only a claim, so its bytes are hashed.
            let Blob::Member(span) = self.blob(&layer.blob, &what)? else { return Ok(()) };
            let digested = tokio::task::spawn_blocking(move || members.digest(span));
            let actual = digested.await.map_err(|_| unreadable("reading it was interrupted"))??;
            let expected = layer.blob;
            if actual != expected {
                return Err(RegistryError::DigestMismatch { what, expected, actual });
            }
            Ok(())
        }
        .boxed()
    }

    fn layer(&self, image: &ImageRef, layer: &RemoteLayer) -> BlobStream {
        let what = format!("layer {} of {image}", layer.blob);
        match self.blob(&layer.blob, &what) {
            Err(error) => stream::once(async { Err(error) }).boxed(),
            Ok(Blob::Made(bytes)) => stream::once(async { Ok(bytes) }).boxed(),
            Ok(Blob::Member(span)) => read_span(self.members.path.clone(), span),
        }
    }
}

impl Documents for Archive {
    fn fetch<'a>(
        &'a self,
        _kind: Kind,
        descriptor: &'a Descriptor,
        what: &'a str,
    ) -> BoxFuture<'a, Result<Document, RegistryError>> {
        async move {
            let expected = descriptor.digest(what)?;
            let blob = self.blob(&expected, what)?;
            let members = Arc::clone(&self.members);
            let read = tokio::task::spawn_blocking(move || members.blob_bytes(&blob, MAX_CONFIG));
            let bytes = read.await.map_err(|_| unreadable("reading it was interrupted"))??;
            let actual = Digest::of(&bytes);
            if actual != expected {
                return Err(RegistryError::DigestMismatch { what: what.to_owned(), expected, actual });
            }
            Ok(Document { digest: actual, media_type: descriptor.media_type.clone(), bytes })
        }
        .boxed()
    }
}

/// A member's bytes as a stream.
fn read_span(path: PathBuf, span: Span) -> BlobStream {
    let failed = |error: io::Error| unreadable(format!("reading it failed: {error}"));
    let open = async move {
        let mut file = tokio::fs::File::open(&path).await.map_err(failed)?;
        file.seek(io::SeekFrom::Start(span.offset)).await.map_err(failed)?;
        let reader = tokio_util::io::ReaderStream::with_capacity(file.take(span.size), BLOCK);
        Ok(reader.map_err(failed))
    };
    open.into_stream().try_flatten().boxed()
}
