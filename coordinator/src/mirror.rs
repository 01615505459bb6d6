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
//! A tag gives the original where it can, else the plain form. A digest gives what has that digest: the original manifest only
//! where its layers can be had, so that a client goes to the registry itself instead of finding them missing. What the
//! store does not have is not found, and the client goes upstream.
//!
//! A blob is served only through a repository that has it, and to those who may see an image of it that has the blob: what somebody may
//! see is decided for each image of the catalogue, for a repository may hold some that are for them and some that are not.

use std::fs::File;
use std::num::NonZeroUsize;

use lru::LruCache;
use parking_lot::Mutex;
use store::catalogue::Catalogue;
use store::image::{ImageRecord, ImageRef, canonical_registry};
use store::reader::Store;
use store::{Digest, Error};

use crate::access::Images;
use crate::blob_cache::BlobCache;
use crate::registry::manifest::{self, DOCKER_LAYER, DOCKER_MANIFEST, OCI_LAYER, OCI_MANIFEST};

/// What is asked for, below `/v2/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// All repositories.
    Catalog,
    /// A repository's tags.
    Tags(ImageRef),
    /// A manifest or an index, by tag or digest.
    Manifest(ImageRef),
    /// A config, a manifest or a layer of a repository.
    Blob(ImageRef, Digest),
}

/// A path that asks for nothing that there can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Misasked {
    /// It is none of the protocol's.
    Path,
    /// What it names is no repository.
    Name,
    /// What it names is no tag and no digest.
    Reference,
    /// What it names is no digest.
    Digest,
}

impl Ask {
    /// Parses what follows `/v2/`; `ns` names the registry that is mirrored.
    pub fn parse(path: &str, ns: Option<&str>) -> Result<Ask, Misasked> {
        if path == "_catalog" {
            return Ok(Ask::Catalog);
        }
        let named = |repository: &str, suffix: &str| -> Option<ImageRef> {
            let name = match (ns, repository.split_once('/')) {
                (Some(ns), _) => format!("{}/{repository}", canonical_registry(ns)),
                (None, Some((host, rest))) if with_port(host).is_some() => format!("{}/{rest}", with_port(host)?),
                (None, Some((host, _))) if host.contains('.') || host == "localhost" => repository.to_owned(),
                (None, _) => format!("docker.io/{repository}"),
            };
            // What follows is the protocol's to say, not part of the name.
            if repository.contains([':', '@']) {
                return None;
            }
            format!("{name}{suffix}").parse().ok()
        };
        if let Some(repository) = path.strip_suffix("/tags/list") {
            return named(repository, "").map(Ask::Tags).ok_or(Misasked::Name);
        }
        // The last two parts decide: a repository may have parts of the same names.
        let (repository, kind, reference) = path
            .rsplit_once('/')
            .and_then(|(rest, last)| rest.rsplit_once('/').map(|(repository, kind)| (repository, kind, last)))
            .ok_or(Misasked::Path)?;
        if kind == "blobs" {
            let image = named(repository, "").ok_or(Misasked::Name)?;
            return reference.parse().map(|digest| Ask::Blob(image, digest)).map_err(|_| Misasked::Digest);
        }
        if kind != "manifests" {
            let is_manifest = path.contains("/manifests/");
            return Err(if is_manifest { Misasked::Reference } else { Misasked::Path });
        }
        named(repository, "").ok_or(Misasked::Name)?;
        let separator = if reference.contains(':') { '@' } else { ':' };
        named(repository, &format!("{separator}{reference}")).map(Ask::Manifest).ok_or(Misasked::Reference)
    }
}

/// `127.0.0.1:5000` for `127.0.0.1_5000`; hosts have no underscores.
fn with_port(text: &str) -> Option<String> {
    let (host, port) = text.rsplit_once('_')?;
    let is_host = host.contains('.') || host == "localhost";
    (is_host && port.parse::<u16>().is_ok()).then(|| format!("{host}:{port}"))
}

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

/// The digests of the plain manifests that were made, by the originals: the same image gives the same one, and to find out which one
/// has a digest all of a repository must be known.
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

    /// The manifest that a tag or a digest names.
    pub fn manifest(&self, reference: &ImageRef) -> Result<Option<Document>, Error> {
        let Some(digest) = reference.digest() else {
            let found = self.catalogue.find(reference).filter(|state| self.seen.contain_record(&state.image));
            let Some(state) = found else { return Ok(None) };
            return match self.has_originals(&state.image) {
                true => self.document(state.image.target).map(Some),
                false => self.plain(&state.image).map(Some),
            };
        };
        for image in self.images_of(reference) {
            if [image.manifest, image.target].contains(digest) && self.has_originals(image) {
                return self.document(*digest).map(Some);
            }
        }
        for image in self.images_of(reference) {
            if self.plain_digest(image)? == *digest {
                return self.plain(image).map(Some);
            }
        }
        Ok(None)
    }

    fn plain_digest(&self, image: &ImageRecord) -> Result<Digest, Error> {
        if let Some(known) = self.plains.0.lock().get(&(image.manifest, image.config)) {
            return Ok(*known);
        }
        self.plain(image).map(|plain| plain.digest)
    }

    /// The manifest that names the uncompressed layers. The same image gives the same bytes.
    fn plain(&self, image: &ImageRecord) -> Result<Document, Error> {
        let original: serde_json::Value = serde_json::from_slice(&self.store.blob(&image.manifest)?)
            .map_err(|error| Error::corrupt(format!("manifest {}", image.manifest), error.to_string()))?;
        let docker = image.media_type == DOCKER_MANIFEST;
        let (media_type, layer_type) = if docker { (DOCKER_MANIFEST, DOCKER_LAYER) } else { (OCI_MANIFEST, OCI_LAYER) };
        let layers = image
            .layers
            .iter()
            .map(|layer| serde_json::json!({"mediaType": layer_type, "digest": layer.diff_id, "size": layer.size}));
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": original["config"],
            "layers": layers.collect::<Vec<_>>(),
        });
        let bytes = manifest.to_string().into_bytes();
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

/// What the protocol calls a repository, on the paths of this mirror without `ns`.
pub fn path_name(repository: &str) -> String {
    match repository.strip_prefix("docker.io/") {
        Some(path) => path.to_owned(),
        None => match repository.split_once('/') {
            Some((host, path)) => format!("{}/{path}", host.replace(':', "_")),
            None => repository.to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(path: &str, ns: Option<&str>) -> Option<String> {
        match Ask::parse(path, ns).ok()? {
            Ask::Catalog => Some("catalog".to_owned()),
            Ask::Tags(image) => Some(format!("tags {}", image.canonical_repository())),
            Ask::Manifest(image) => Some(format!(
                "manifest {} {}",
                image.canonical_repository(),
                image.digest().map(ToString::to_string).or(image.tag().map(str::to_owned))?
            )),
            Ask::Blob(image, digest) => Some(format!("blob {} {digest}", image.canonical_repository())),
        }
    }

    #[test]
    fn paths_name_repositories_of_registries() {
        let digest = Digest::of(b"x");
        for (path, ns, expected) in [
            ("_catalog", None, "catalog".to_owned()),
            ("library/debian/manifests/12", None, "manifest docker.io/library/debian 12".to_owned()),
            ("debian/manifests/12", None, "manifest docker.io/library/debian 12".to_owned()),
            ("me/app/tags/list", None, "tags docker.io/me/app".to_owned()),
            ("quay.io/team/app/manifests/v1", None, "manifest quay.io/team/app v1".to_owned()),
            ("127.0.0.1_5000/a/b/manifests/v1", None, "manifest 127.0.0.1:5000/a/b v1".to_owned()),
            ("a/b/manifests/v1", Some("127.0.0.1:5000"), "manifest 127.0.0.1:5000/a/b v1".to_owned()),
            ("library/a/manifests/v1", Some("registry-1.docker.io"), "manifest docker.io/library/a v1".to_owned()),
            (&format!("a/blobs/{digest}"), None, format!("blob docker.io/library/a {digest}")),
            ("q.io/team/blobs/app/manifests/1", None, "manifest q.io/team/blobs/app 1".to_owned()),
            ("q.io/a/blobs/manifests/1", None, "manifest q.io/a/blobs 1".to_owned()),
            ("q.io/a/tags/list/manifests/1", None, "manifest q.io/a/tags/list 1".to_owned()),
            (&format!("q.io/a/manifests/b/blobs/{digest}"), None, format!("blob q.io/a/manifests/b {digest}")),
            ("q.io/a/manifests/tags/list", None, "tags q.io/a/manifests".to_owned()),
            (&format!("a/manifests/{digest}"), None, format!("manifest docker.io/library/a {digest}")),
        ] {
            assert_eq!(parsed(path, ns), Some(expected), "{path}");
        }
        for (bad, why) in [
            ("", Misasked::Path),
            ("a", Misasked::Path),
            ("a/manifests/", Misasked::Reference),
            ("a/manifests/sha256:1", Misasked::Reference),
            ("a/blobs/sha256:1", Misasked::Digest),
            ("A/manifests/x", Misasked::Name),
            ("../manifests/x", Misasked::Name),
            ("a:1/tags/list", Misasked::Name),
            ("a:1/blobs/sha256:1", Misasked::Name),
            ("a/manifests/x/y", Misasked::Reference),
        ] {
            assert_eq!(Ask::parse(bad, None), Err(why), "{bad}");
        }
        assert_eq!(path_name("docker.io/library/a"), "library/a");
        assert_eq!(path_name("127.0.0.1:5000/a/b"), "127.0.0.1_5000/a/b");
    }
}
