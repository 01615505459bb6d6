//! The store as a registry: the content behind the pull side of the OCI distribution protocol.
//!
//! **Names.** Docker's `registry-mirrors` stand for Docker Hub, so `library/debian` is `docker.io/library/debian`. Another
//! registry is named by containerd's `?ns=HOST`, or by the first part of the path: `quay.io/team/app`, or `127.0.0.1_5000/app`
//! for a registry with a port, because a repository's name cannot contain a colon.
//!
//! **Manifests and layers.** The store holds manifests and configs byte for byte. It holds layers unpacked: they come back as the
//! exact tar, but not as the compressed bytes that the manifest names. So there are two forms of an image:
//!
//! - the *original*: manifest (and index) byte for byte, layers as the registry sent them. It can be served as long as all of the
//!   image's layers are in the [`BlobCache`].
//! - the *plain* form: a manifest that names the uncompressed layers by their diffIDs. The config, and so the image ID, is the
//!   same; the manifest's digest differs.
//!
//! A tag gives the original if its layers can be had, else the plain form. If the registry has an index of several platforms, the
//! store has the image of one of them. Engines that fetch from the registry whatever is missing here get the original index, as
//! long as the image of the store can be had as it was pushed. All other clients get that index narrowed to the one entry that can
//! be had: a client of another platform is told so, and a client that copies everything finds everything. A client that accepts
//! no indexes gets the one manifest, as from a registry. An index that names the image only through another index is replaced by
//! one that names it directly.
//!
//! A digest gives the document with that digest. The original manifest is given only if its layers can be had, so that the client
//! otherwise asks the registry itself instead of finding layers missing. What the store lacks is answered as not found, and the
//! client turns to the registry.
//!
//! A blob is served only through a repository that has it, and only to callers who may see an image of that repository that
//! contains the blob. Access is decided for each image of the catalogue, because a repository may hold some that a caller may see
//! and some that they may not.

mod document;
mod generated;
mod request;

use std::collections::HashSet;
use std::fs::File;
use std::num::NonZeroUsize;

use lru::LruCache;
use parking_lot::Mutex;
use store::catalogue::Catalogue;
use store::image::{ImageRecord, ImageRef};
use store::reader::Store;
use store::{Digest, Error};

pub use crate::http::mirror::document::Document;
use crate::http::mirror::generated::Index;
use crate::http::mirror::request::path_name;
pub use crate::http::mirror::request::{Ask, Misasked};
use crate::identity::caller::Images;
use crate::registries::blob_cache::BlobCache;
use crate::registries::image::manifest;

/// A blob's source and length.
#[derive(Debug)]
pub enum Blob {
    /// A document of the store: a config.
    Document(Vec<u8>),
    /// A layer as its registry sent it, with its length.
    Original(File, u64),
    /// A layer's tar, reassembled from the store: diffID and length.
    Tar(Digest, u64),
}

impl Blob {
    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Blob::Document(bytes) => bytes.len() as u64,
            Blob::Original(_, len) | Blob::Tar(_, len) => *len,
        }
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The sources of answers.
pub struct Mirror<'a> {
    /// The store.
    pub store: &'a Store,
    /// The present catalogue.
    pub catalogue: &'a Catalogue,
    /// Layers as registries sent them.
    pub originals: &'a BlobCache,
    /// Digests of generated documents.
    pub plains: &'a Plains,
    /// The images that the caller may see.
    pub seen: &'a Images,
}

/// What a client can do with an index of several platforms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Indexes {
    /// The client gets what is missing here from the registry that is mirrored.
    Completed,
    /// Everything that the index names must be here.
    Taken,
    /// The client accepts manifests only.
    Untaken,
}

/// Digests of generated documents, by their originals: of plain manifests by manifest and config, of narrowed indexes by the index
/// and its one entry. The same image always gives the same document. To find the document with a given digest, the digests for
/// all images of a repository are needed.
pub struct Plains(Mutex<LruCache<(Digest, Digest), Digest>>);

/// About as many as a large store has images.
const PLAINS_KEPT: NonZeroUsize = NonZeroUsize::new(50_000).unwrap();

impl Default for Plains {
    fn default() -> Plains {
        Plains(Mutex::new(LruCache::new(PLAINS_KEPT)))
    }
}

impl Mirror<'_> {
    fn images_of<'b>(&'b self, reference: &ImageRef) -> impl Iterator<Item = &'b ImageRecord> {
        let repository = reference.canonical_repository();
        let images = self.catalogue.images().map(AsRef::as_ref);
        images.filter(move |image| image.repository == repository && self.seen.contain_record(image))
    }

    fn has_originals(&self, image: &ImageRecord) -> bool {
        image.layers.iter().all(|layer| self.originals.has(&layer.blob))
    }

    fn document(&self, digest: Digest) -> Result<Document, Error> {
        let bytes = self.store.blob(&digest)?;
        let media_type = manifest::media_type(&bytes, None, "a manifest");
        let media_type = media_type.map_err(|error| Error::corrupt(format!("manifest {digest}"), error.to_string()))?;
        Ok(Document { digest, media_type, bytes })
    }

    /// The manifest, or the index for clients that accept one, that a tag or a digest names.
    pub fn manifest(&self, reference: &ImageRef, indexes: Indexes) -> Result<Option<Document>, Error> {
        let Some(digest) = reference.digest() else {
            let found = self.catalogue.find(reference).filter(|state| self.seen.contain_record(&state.image));
            return found.map(|state| self.tagged(reference, &state.image, indexes)).transpose();
        };
        for image in self.images_of(reference) {
            if [image.manifest, image.target].contains(digest) && self.has_originals(image) {
                return self.document(*digest).map(Some);
            }
        }
        for image in self.images_of(reference) {
            let plain = self.plain_digest(image)?;
            if plain == *digest {
                return self.plain(image).map(Some);
            }
            let originals = Some(image.manifest).filter(|_| self.has_originals(image));
            for only in [Some(plain), originals].into_iter().flatten() {
                if self.narrowed_digest(image, only)? == Some(*digest) {
                    let only = if only == plain { self.plain(image)? } else { self.document(only)? };
                    return self.narrowed(image, &only).map(Some);
                }
            }
        }
        Ok(None)
    }

    /// Whether the store has an image, even if its manifest cannot be had as it was pushed, or knows the digest as an entry of an
    /// image's index: then the image is one of another platform.
    pub fn knows(&self, reference: &ImageRef) -> Result<bool, Error> {
        let Some(digest) = reference.digest() else { return Ok(self.catalogue.find(reference).is_some()) };
        for image in self.images_of(reference) {
            if [image.manifest, image.target].contains(digest) {
                return Ok(true);
            }
            if image.target != image.manifest && self.index(image)?.digests().any(|named| named == digest.to_string()) {
                return Ok(true);
            }
        }
        Ok(self.manifest(reference, Indexes::Untaken)?.is_some())
    }

    /// The document that a tag names.
    fn tagged(&self, reference: &ImageRef, image: &ImageRecord, indexes: Indexes) -> Result<Document, Error> {
        let has_originals = self.has_originals(image);
        let only = if has_originals { self.document(image.manifest)? } else { self.plain(image)? };
        match indexes {
            Indexes::Untaken => Ok(only),
            _ if image.target == image.manifest => Ok(only),
            Indexes::Completed if has_originals => self.document(image.target),
            Indexes::Taken if self.is_whole(reference, image)? => self.document(image.target),
            Indexes::Completed | Indexes::Taken => self.narrowed(image, &only),
        }
    }

    fn index(&self, image: &ImageRecord) -> Result<Index, Error> {
        Index::parse(&self.store.blob(&image.target)?)
            .map_err(|error| Error::corrupt(format!("index {}", image.target), error.to_string()))
    }

    /// Whether everything that an image's index names can be had as it was pushed.
    fn is_whole(&self, reference: &ImageRef, image: &ImageRecord) -> Result<bool, Error> {
        let index = self.index(image)?;
        let had: HashSet<String> = self
            .images_of(reference)
            .filter(|image| self.has_originals(image))
            .map(|image| image.manifest.to_string())
            .collect();
        Ok(index.digests().all(|digest| had.contains(digest)))
    }

    /// An image's index, narrowed to the one entry `only` that the store has. If no entry can be made for it, `only` itself. The
    /// same image gives the same bytes.
    fn narrowed(&self, image: &ImageRecord, only: &Document) -> Result<Document, Error> {
        let Some(bytes) = self.index(image)?.narrowed(image, only) else { return Ok(only.clone()) };
        let media_type = manifest::media_type(&bytes, None, "an index");
        let media_type =
            media_type.map_err(|error| Error::corrupt(format!("index {}", image.target), error.to_string()))?;
        let digest = Digest::of(&bytes);
        self.plains.0.lock().put((image.target, only.digest), digest);
        Ok(Document { digest, media_type, bytes })
    }

    /// The digest of the narrowed index; `None` for an image without an index.
    fn narrowed_digest(&self, image: &ImageRecord, only: Digest) -> Result<Option<Digest>, Error> {
        if image.target == image.manifest {
            return Ok(None);
        }
        if let Some(known) = self.plains.0.lock().get(&(image.target, only)) {
            return Ok(Some(*known));
        }
        let only = if only == image.manifest { self.document(only)? } else { self.plain(image)? };
        self.narrowed(image, &only).map(|narrowed| Some(narrowed.digest))
    }

    fn plain_digest(&self, image: &ImageRecord) -> Result<Digest, Error> {
        if let Some(known) = self.plains.0.lock().get(&(image.manifest, image.config)) {
            return Ok(*known);
        }
        self.plain(image).map(|plain| plain.digest)
    }

    /// The manifest that names an image's uncompressed layers. The same image gives the same bytes.
    fn plain(&self, image: &ImageRecord) -> Result<Document, Error> {
        let config_len = self.store.blob(&image.config)?.len();
        let (media_type, bytes) = generated::plain(&self.store.blob(&image.manifest)?, config_len, image)
            .map_err(|error| Error::corrupt(format!("manifest {}", image.manifest), error.to_string()))?;
        let digest = Digest::of(&bytes);
        self.plains.0.lock().put((image.manifest, image.config), digest);
        Ok(Document { digest, media_type: media_type.to_owned(), bytes })
    }

    /// A blob of a repository, if the repository has it.
    pub fn blob(&self, reference: &ImageRef, digest: &Digest) -> Result<Option<Blob>, Error> {
        for image in self.images_of(reference) {
            if image.config == *digest {
                return self.store.blob(digest).map(|bytes| Some(Blob::Document(bytes)));
            }
            for layer in &image.layers {
                if layer.blob == *digest
                    && let Some((file, len)) = self.originals.get(digest)
                {
                    return Ok(Some(Blob::Original(file, len)));
                }
                if layer.diff_id == *digest {
                    return Ok(Some(Blob::Tar(*digest, layer.size)));
                }
            }
        }
        Ok(None)
    }

    /// A repository's tags, sorted; `None` if there is no such repository.
    pub fn tags(&self, reference: &ImageRef) -> Option<Vec<String>> {
        let mut images = self.images_of(reference).peekable();
        images.peek()?;
        let mut tags: Vec<String> = images.filter_map(|image| image.tag.clone()).collect();
        tags.sort_unstable();
        Some(tags)
    }

    /// All repositories, sorted, named as in the protocol's paths.
    pub fn repositories(&self) -> Vec<String> {
        let seen = self.catalogue.images().filter(|image| self.seen.contain_record(image));
        let mut names: Vec<String> = seen.map(|image| path_name(&image.repository)).collect();
        names.sort_unstable();
        names.dedup();
        names
    }
}
