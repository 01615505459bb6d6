//! Images in a tar: `docker save` archives, also of before Docker 1.10, and OCI layouts.
//!
//! The archive is indexed once and its members are then read where they lie; nothing is extracted, so member names are
//! only keys and can do no harm. All formats become the same thing: named roots, and blobs by digest.

pub(super) mod docker_save;
pub(super) mod image_v1;
pub(super) mod members;
pub(super) mod oci_layout;
pub mod spool;
pub mod writer;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use serde_json::json;
use store::Digest;
use store::image::{ImageRef, Platform};
use tokio::io::{AsyncReadExt, AsyncSeekExt};

use crate::registries::archive::members::{Member, each_member};
use crate::registries::encoding::Encoding;
use crate::registries::error::RegistryError;
use crate::registries::image::manifest::{
    self, Descriptor, MAX_CONFIG, MAX_MANIFEST, OCI_CONFIG, OCI_LAYER, OCI_MANIFEST,
};
use crate::registries::image::resolve::{Documents, Kind, resolve};
use crate::registries::{BlobStream, Document, Registry, RemoteLayer, ResolvedImage};

/// More images than one archive may hold: each becomes a job.
pub(crate) const IMAGES_MAX: usize = 1000;
/// Bytes of all manifests and configs of an archive, which are kept while it is read.
const DOCUMENTS_MAX: usize = 64 << 20;
/// A chain of links longer than this is a circle.
const MAX_LINKS: usize = 16;
/// How much of a layer is read at once.
const BLOCK: usize = 256 << 10;

/// An archive, indexed.
#[derive(Debug)]
pub struct Archive {
    members: Arc<Members>,
    contents: Contents,
}

/// What a format's reader found.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    /// Names and what they point to.
    pub(crate) images: Vec<(ImageRef, Document)>,
    /// Blobs by digest.
    pub(crate) blobs: HashMap<Digest, Blob>,
    /// What the archive calls images that have no name and were given none: they are left out.
    pub(crate) unnamed: Vec<String>,
}

/// Which images of an archive the user's name is for: the only one, or the only one that has none.
pub(crate) struct Naming<'a> {
    name: Option<&'a ImageRef>,
    is_for_all: bool,
}

impl<'a> Naming<'a> {
    /// Of each image, whether it has no name.
    pub(crate) fn of(
        name: Option<&'a ImageRef>,
        unnamed: impl Iterator<Item = bool>,
    ) -> Result<Naming<'a>, RegistryError> {
        let unnamed: Vec<bool> = unnamed.collect();
        let (images, nameless) = (unnamed.len(), unnamed.iter().filter(|unnamed| **unnamed).count());
        if name.is_some() && images > 1 && nameless != 1 {
            let which =
                if nameless == 0 { "and all have names".to_owned() } else { format!("{nameless} without a name") };
            return Err(unreadable(format!("it holds {images} images, {which}: --name can name only one")));
        }
        Ok(Naming { name, is_for_all: images == 1 })
    }

    /// The name that an image gets instead of its own.
    pub(crate) fn instead(&self, is_unnamed: bool) -> Option<&'a ImageRef> {
        self.name.filter(|_| self.is_for_all || is_unnamed)
    }
}

/// Where a blob is.
#[derive(Debug, Clone)]
pub(crate) enum Blob {
    /// In the archive.
    Member(Span),
    /// Made by us (the manifest of a docker-save image).
    Made(Bytes),
}

/// A member's place in the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) offset: u64,
    /// Its length.
    pub(crate) size: u64,
}

/// The archive's members by name.
#[derive(Debug)]
pub(crate) struct Members {
    path: PathBuf,
    file: File,
    spans: HashMap<String, Span>,
    links: HashMap<String, String>,
}

/// An archive that cannot be read.
pub(crate) fn unreadable(why: impl Into<String>) -> RegistryError {
    RegistryError::Archive { why: why.into() }
}

impl Archive {
    /// Indexes the tar at `path`. `name` names an image that has no name in the archive. Blocks.
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

    /// What it holds and is left out, one sentence each.
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

    fn shows<'a>(&'a self, image: &'a ImageRef, layer: &'a RemoteLayer) -> BoxFuture<'a, Result<(), RegistryError>> {
        let what = format!("layer {} of {image}", layer.blob);
        let members = Arc::clone(&self.members);
        async move {
            // A member's name is what somebody wrote, so its bytes must show what it is.
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

impl Members {
    fn index(path: &Path) -> Result<Members, RegistryError> {
        let opened = |error: io::Error| unreadable(format!("{}: {error}", path.display()));
        let file = File::open(path).map_err(opened)?;
        let length = file.metadata().map_err(opened)?.len();
        let mut members = Members { path: path.to_owned(), file, spans: HashMap::new(), links: HashMap::new() };
        let index = File::open(path).map_err(opened)?;
        each_member(&index, length, |member| members.add(member, length))?;
        Ok(members)
    }

    fn add(&mut self, member: Member, length: u64) -> Result<(), RegistryError> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let name = normal(&text(&member.name));
        match member.kind {
            0 | b'0' | b'7' => {
                let span = Span { offset: member.offset, size: member.size };
                if span.offset.checked_add(span.size).is_none_or(|end| end > length) {
                    return Err(unreadable(format!("it is cut off within {name}: copy it again")));
                }
                self.spans.insert(name, span);
            }
            b'2' => {
                let target = text(&member.link);
                let base = name.rsplit_once('/').map_or("", |(base, _)| base);
                let target =
                    if target.starts_with('/') { normal(&target) } else { normal(&format!("{base}/{target}")) };
                self.links.insert(name, target);
            }
            b'1' => {
                self.links.insert(name, normal(&text(&member.link)));
            }
            _ => {}
        }
        Ok(())
    }

    /// Where the member `name` is, links followed.
    pub(crate) fn find(&self, name: &str) -> Option<Span> {
        let mut name = normal(name);
        for _ in 0..MAX_LINKS {
            if let Some(span) = self.spans.get(&name) {
                return Some(*span);
            }
            name = self.links.get(&name)?.clone();
        }
        None
    }

    /// All members, for readers that go by digest.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.spans.keys().chain(self.links.keys()).map(String::as_str)
    }

    /// A small member whole.
    pub(crate) fn read(&self, name: &str, limit: u64) -> Result<Bytes, RegistryError> {
        let span = self.find(name).ok_or_else(|| unreadable(format!("it lacks {name}: save the image again")))?;
        self.read_whole(span, limit)
    }

    /// A blob whole.
    pub(crate) fn blob_bytes(&self, blob: &Blob, limit: u64) -> Result<Bytes, RegistryError> {
        match blob {
            Blob::Made(bytes) => Ok(bytes.clone()),
            Blob::Member(span) => self.read_whole(*span, limit),
        }
    }

    /// The first bytes of a member.
    pub(crate) fn head(&self, span: Span, count: usize) -> Result<Vec<u8>, RegistryError> {
        let head = Span { size: span.size.min(count as u64), ..span };
        Ok(self.read_whole(head, count as u64)?.to_vec())
    }

    /// A member's bytes, one after another.
    pub(crate) fn reader(&self, span: Span) -> impl BufRead + '_ {
        BufReader::with_capacity(BLOCK, MemberReader { members: self, at: span.offset, end: span.offset + span.size })
    }

    /// The digest of a member.
    pub(crate) fn digest(&self, span: Span) -> Result<Digest, RegistryError> {
        let mut hasher = store::digest::Sha256::new();
        let mut at = span.offset;
        let end = span.offset + span.size;
        let mut block = vec![0; BLOCK];
        while at < end {
            let count = (end - at).min(BLOCK as u64) as usize;
            self.read_exact(&mut block[..count], at)?;
            hasher.update(&block[..count]);
            at += count as u64;
        }
        Ok(hasher.finish())
    }

    fn read_whole(&self, span: Span, limit: u64) -> Result<Bytes, RegistryError> {
        if span.size > limit {
            return Err(unreadable(format!("a document in it has {} bytes; at most {limit} are read", span.size)));
        }
        let mut bytes = vec![0; span.size as usize];
        self.read_exact(&mut bytes, span.offset)?;
        Ok(bytes.into())
    }

    fn read_exact(&self, bytes: &mut [u8], offset: u64) -> Result<(), RegistryError> {
        let read = self.file.read_exact_at(bytes, offset);
        read.map_err(|error| unreadable(format!("reading {} failed: {error}", self.path.display())))
    }
}

/// Reads a member where it lies.
struct MemberReader<'a> {
    members: &'a Members,
    at: u64,
    end: u64,
}

impl Read for MemberReader<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let count = (self.end - self.at).min(out.len() as u64) as usize;
        self.members.file.read_exact_at(&mut out[..count], self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

/// A layer of an image that has no registry manifest.
#[derive(Debug, Clone)]
pub(crate) struct SavedLayer {
    /// The digest of its bytes as they lie in the archive.
    pub(crate) digest: Digest,
    pub(crate) span: Span,
    pub(crate) encoding: Encoding,
}

impl SavedLayer {
    fn media_type(&self) -> String {
        let suffix = match self.encoding {
            Encoding::Gzip => "+gzip",
            Encoding::Zstd => "+zstd",
            // They have no type that others know; what is called a tar is read by its first bytes.
            Encoding::Plain | Encoding::Bzip2 | Encoding::Xz => "",
        };
        format!("{OCI_LAYER}{suffix}")
    }
}

/// Adds the blobs of an image that has no registry manifest, and makes one.
pub(crate) fn saved_image(
    config: Bytes,
    layers: &[SavedLayer],
    contents: &mut Contents,
    kept: &mut Kept,
) -> Result<Document, RegistryError> {
    let descriptor =
        |layer: &SavedLayer| json!({"mediaType": layer.media_type(), "digest": layer.digest, "size": layer.span.size});
    let config_digest = Digest::of(&config);
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": OCI_CONFIG, "digest": config_digest, "size": config.len()},
        "layers": layers.iter().map(descriptor).collect::<Vec<_>>(),
    });
    let bytes = Bytes::from(manifest.to_string());
    kept.count(&bytes)?;
    contents.blobs.extend(layers.iter().map(|layer| (layer.digest, Blob::Member(layer.span))));
    contents.blobs.insert(config_digest, Blob::Made(config));
    Ok(Document { digest: Digest::of(&bytes), media_type: OCI_MANIFEST.to_owned(), bytes })
}

/// Refuses more images than an archive may hold.
pub(crate) fn check_images(count: usize) -> Result<(), RegistryError> {
    if count > IMAGES_MAX {
        Err(unreadable(format!("it holds {count} images; at most {IMAGES_MAX} are taken: save fewer at a time")))
    } else {
        Ok(())
    }
}

/// Counts the bytes of documents that are kept.
#[derive(Debug, Default)]
pub(crate) struct Kept(usize);

impl Kept {
    /// Counts one more document.
    pub(crate) fn count(&mut self, document: &Bytes) -> Result<(), RegistryError> {
        self.0 += document.len();
        if self.0 > DOCUMENTS_MAX {
            Err(unreadable("its manifests and configs have more than 64 MiB: save fewer images at a time"))
        } else {
            Ok(())
        }
    }
}

/// A manifest or index among the blobs, as a root.
pub(crate) fn root(members: &Members, blob: &Blob, descriptor: &Descriptor) -> Result<Document, RegistryError> {
    let what = format!("manifest {}", descriptor.digest);
    let bytes = members.blob_bytes(blob, MAX_MANIFEST)?;
    let expected = descriptor.digest(&what)?;
    let actual = Digest::of(&bytes);
    if actual != expected {
        return Err(RegistryError::DigestMismatch { what, expected, actual });
    }
    let stated = Some(descriptor.media_type.as_str()).filter(|text| !text.is_empty());
    let media_type = manifest::media_type(&bytes, stated, &what)?;
    Ok(Document { digest: actual, media_type, bytes })
}

/// A member's name without `./`, `//` and `..`: a key, not a path.
fn normal(name: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}
