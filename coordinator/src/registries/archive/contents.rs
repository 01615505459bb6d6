//! The contents of an archive in the form that all formats share: named roots, and blobs by digest.

use std::collections::HashMap;

use bytes::Bytes;
use serde_json::json;
use store::Digest;
use store::image::ImageRef;

use crate::registries::Document;
use crate::registries::archive::member_index::{Blob, Members, Span, unreadable};
use crate::registries::compression::Compression;
use crate::registries::error::RegistryError;
use crate::registries::image::manifest::{self, Descriptor, MAX_MANIFEST, OCI_CONFIG, OCI_LAYER, OCI_MANIFEST};

/// Maximum number of images that one archive may hold: each becomes a job.
pub(crate) const IMAGES_MAX: usize = 1000;
/// Maximum number of bytes of all manifests and configs of an archive, which stay in memory while it is read.
const DOCUMENTS_MAX: usize = 64 << 20;
/// What the reader of a format found.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    /// Image names, and the document that each points to.
    pub(crate) images: Vec<(ImageRef, Document)>,
    /// Blobs by digest.
    pub(crate) blobs: HashMap<Digest, Blob>,
    /// How the archive refers to images that have no name and were given none. They are left out.
    pub(crate) unnamed: Vec<String>,
}

/// Decides which image of an archive gets the user's name: the only one, or the only one that has none.
pub(crate) struct Naming<'a> {
    name: Option<&'a ImageRef>,
    is_for_all: bool,
}

impl<'a> Naming<'a> {
    /// Takes, for each image, whether it has no name. Fails if `name` could be meant for several.
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

    /// The name that an image gets instead of its own, if any.
    pub(crate) fn instead(&self, is_unnamed: bool) -> Option<&'a ImageRef> {
        self.name.filter(|_| self.is_for_all || is_unnamed)
    }
}

/// A layer of an image that has no registry manifest.
#[derive(Debug, Clone)]
pub(crate) struct SavedLayer {
    /// The digest of its bytes as stored in the archive.
    pub(crate) digest: Digest,
    pub(crate) span: Span,
    pub(crate) encoding: Compression,
}

impl SavedLayer {
    fn media_type(&self) -> String {
        let suffix = match self.encoding {
            Compression::Gzip => "+gzip",
            Compression::Zstd => "+zstd",
            // No media type for these is in common use. A layer that is declared as a tar is recognised by its first bytes.
            Compression::Plain | Compression::Bzip2 | Compression::Xz => "",
        };
        format!("{OCI_LAYER}{suffix}")
    }
}

/// Adds the blobs of an image that has no registry manifest, and makes a manifest for it.
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

/// Counts the bytes of documents that are kept in memory.
#[derive(Debug, Default)]
pub(crate) struct Kept(usize);

impl Kept {
    /// Counts one more document; fails beyond the limit.
    pub(crate) fn count(&mut self, document: &Bytes) -> Result<(), RegistryError> {
        self.0 += document.len();
        if self.0 > DOCUMENTS_MAX {
            Err(unreadable("its manifests and configs have more than 64 MiB: save fewer images at a time"))
        } else {
            Ok(())
        }
    }
}

/// Reads and verifies the manifest or index in `blob`, to serve as a root.
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
