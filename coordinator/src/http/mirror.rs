//! The store as a registry: what the pull side of the OCI distribution protocol is answered from.
//!
//! **Names.** Docker's `registry-mirrors` stand for Docker Hub, so `library/debian` is `docker.io/library/debian`. Another registry
//! is named by containerd's `?ns=HOST`, or by the first part of the path: `quay.io/team/app`, and `127.0.0.1_5000/app` for one
//! with a port, because a repository's name cannot hold a colon.
//!
//! **Manifests and layers.** Manifests and configs are in the store byte for byte. Layers are unpacked there, and come back as the
//! exact tar, but not as the compressed bytes that the manifest names. So there are two forms of an image:
//!
//! - the *original*: manifest (and index) byte for byte, layers as the registry sent them. It can be served as long as all of the
//!   image's layers are in the [`BlobCache`].
//! - the *plain* one: a manifest that names the uncompressed layers, by their diffIDs. Config, and so the image ID, is the same;
//!   the manifest's digest is another one.
//!
//! A tag gives the original where it can, else the plain form. Where its registry has an index of several platforms, the store has the
//! image of one. Then an engine that goes to the registry for what is missing here gets the original index, as long as its own image
//! can be had as it was pushed. Everybody else gets that index with the one entry that can be had: who is of another platform is told
//! so, and who copies everything finds everything. A client that takes no indexes gets the one manifest, as from a registry. An index
//! that names the image only through another index comes back as one that names it itself.
//!
//! A digest gives what has that digest: the original manifest only
//! where its layers can be had, so that a client goes to the registry itself instead of finding them missing. What the
//! store does not have is not found, and the client goes upstream.
//!
//! A blob is served only through a repository that has it, and to those who may see an image of it that has the blob: what somebody may
//! see is decided for each image of the catalogue, for a repository may hold some that are for them and some that are not.

mod ask;
mod made;

use std::collections::HashSet;
use std::fs::File;
use std::num::NonZeroUsize;

use lru::LruCache;
use parking_lot::Mutex;
use store::catalogue::Catalogue;
use store::image::{ImageRecord, ImageRef};
use store::reader::Store;
use store::{Digest, Error};

use crate::http::mirror::ask::path_name;
pub use crate::http::mirror::ask::{Ask, Misasked};
use crate::http::mirror::made::Index;
use crate::identity::caller::Images;
use crate::registries::blob_cache::BlobCache;
use crate::registries::image::manifest;

/// A small document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Its digest.
    pub digest: Digest,
    /// What it is.
    pub media_type: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// A blob's bytes, and where they come from.
#[derive(Debug)]
pub enum Blob {
    /// A document of the store.
    Document(Vec<u8>),
    /// A layer as its registry sent it.
    Original(File, u64),
    /// A layer's tar, put together from the store.
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

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What the answers are made from.
pub struct Mirror<'a> {
    /// The store.
    pub store: &'a Store,
    /// Its images.
    pub catalogue: &'a Catalogue,
    /// Layers as they were sent.
    pub originals: &'a BlobCache,
    /// The digests of plain manifests.
    pub plains: &'a Plains,
    /// The images that whoever asks may see.
    pub seen: &'a Images,
}

/// What a client makes of an index of several platforms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Indexes {
    /// What it names and is not here comes from the registry that this is a mirror for.
    Completed,
    /// What it names must be here.
    Taken,
    /// The client takes manifests alone.
    Untaken,
}

/// The digests of the documents that were made, by the originals: plain manifests by manifest and config, indexes by the whole index
/// and their one entry. The same image gives the same one, and to find out which one has a digest all of a repository must be known.
pub struct Plains(Mutex<LruCache<(Digest, Digest), Digest>>);

/// As many as a large store has images.
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

    /// The manifest that a tag or a digest names, as an index for those who take one.
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

    /// What a tag names.
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

    /// An image's index.
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

    /// An image's index with the one entry that the store has, which is `only` here, or that alone where no entry can be made for it.
    /// The same image gives the same bytes.
    fn narrowed(&self, image: &ImageRecord, only: &Document) -> Result<Document, Error> {
        let Some(bytes) = self.index(image)?.narrowed(image, only) else { return Ok(only.clone()) };
        let media_type = manifest::media_type(&bytes, None, "an index");
        let media_type =
            media_type.map_err(|error| Error::corrupt(format!("index {}", image.target), error.to_string()))?;
        let digest = Digest::of(&bytes);
        self.plains.0.lock().put((image.target, only.digest), digest);
        Ok(Document { digest, media_type, bytes })
    }

    /// The digest of that; nothing for an image without an index.
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

    /// The manifest that names the uncompressed layers. The same image gives the same bytes.
    fn plain(&self, image: &ImageRecord) -> Result<Document, Error> {
        let config_len = self.store.blob(&image.config)?.len();
        let (media_type, bytes) = made::plain(&self.store.blob(&image.manifest)?, config_len, image)
            .map_err(|error| Error::corrupt(format!("manifest {}", image.manifest), error.to_string()))?;
        let digest = Digest::of(&bytes);
        self.plains.0.lock().put((image.manifest, image.config), digest);
        Ok(Document { digest, media_type: media_type.to_owned(), bytes })
    }

    /// A blob of a repository.
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

    /// A repository's tags, in order; nothing if there is no such repository.
    pub fn tags(&self, reference: &ImageRef) -> Option<Vec<String>> {
        let mut images = self.images_of(reference).peekable();
        images.peek()?;
        let mut tags: Vec<String> = images.filter_map(|image| image.tag.clone()).collect();
        tags.sort_unstable();
        Some(tags)
    }

    /// The repositories, in order, as the protocol's paths name them.
    pub fn repositories(&self) -> Vec<String> {
        let seen = self.catalogue.images().filter(|image| self.seen.contain_record(image));
        let mut names: Vec<String> = seen.map(|image| path_name(&image.repository)).collect();
        names.sort_unstable();
        names.dedup();
        names
    }
}
