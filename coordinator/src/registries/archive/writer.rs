//! An image as a tar that `docker load`, `podman load` and `skopeo` accept.
//!
//! The archive is what Docker 25 and later write: an OCI layout with `manifest.json` added for older readers. Layers are uncompressed tars,
//! byte for byte those that were pushed, so a layer's digest in the archive is its diffID. The archive's length is known before the first
//! byte, and the same image gives the same bytes.

use std::collections::HashSet;
use std::io;

use store::Digest;
use store::image::{ImageRecord, LayerRecord};
use store::reader::Store;

use crate::registries::image::manifest::{OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST};

/// The size of a tar block.
const BLOCK: u64 = 512;

/// An archive whose content is fixed but not yet written.
#[derive(Debug)]
pub struct ArchivePlan {
    documents: Vec<(String, Vec<u8>)>,
    layers: Vec<LayerRecord>,
}

/// A part of an archive.
#[derive(Debug)]
pub enum Member {
    /// These bytes.
    Bytes(Vec<u8>),
    /// A layer's tar, of the length that its record says.
    Layer(LayerRecord),
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

impl ArchivePlan {
    /// Plans the archive of `image`.
    pub fn new(store: &Store, image: &ImageRecord) -> Result<ArchivePlan, store::Error> {
        let config = store.blob(&image.config)?;
        let descriptor = |media_type: &str, digest: &Digest, size: u64| serde_json::json!({"mediaType": media_type, "digest": digest, "size": size});
        let layers: Vec<_> =
            image.layers.iter().map(|layer| descriptor(OCI_LAYER, &layer.diff_id, layer.size)).collect();
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": descriptor(OCI_CONFIG, &image.config, config.len() as u64),
            "layers": layers,
        });
        let manifest = manifest.to_string().into_bytes();
        let manifest_digest = Digest::of(&manifest);
        let mut root = descriptor(OCI_MANIFEST, &manifest_digest, manifest.len() as u64);
        if image.tag.is_some() {
            root["annotations"] = serde_json::json!({
                "io.containerd.image.name": format!("{}:{}", image.repository, image.tag.as_deref().unwrap_or_default()),
                "org.opencontainers.image.ref.name": image.tag,
            });
        }
        let index = serde_json::json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [root]});
        let list = serde_json::json!([{
            "Config": blob_path(&image.config),
            "RepoTags": image.tag.as_ref().map(|_| vec![image.familiar_name()]),
            "Layers": image.layers.iter().map(|layer| blob_path(&layer.diff_id)).collect::<Vec<_>>(),
        }]);
        let documents = vec![
            ("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
            ("index.json".to_owned(), index.to_string().into_bytes()),
            ("manifest.json".to_owned(), list.to_string().into_bytes()),
            (blob_path(&manifest_digest), manifest),
            (blob_path(&image.config), config),
        ];
        let mut seen = HashSet::new();
        let layers = image.layers.iter().filter(|layer| seen.insert(layer.diff_id)).cloned().collect();
        Ok(ArchivePlan { documents, layers })
    }

    /// The archive's length in bytes.
    pub fn length(&self) -> u64 {
        let member = |size: u64| BLOCK + size.next_multiple_of(BLOCK);
        let documents: u64 = self.documents.iter().map(|(_, bytes)| member(bytes.len() as u64)).sum();
        let layers: u64 = self.layers.iter().map(|layer| member(layer.size)).sum();
        documents + layers + 2 * BLOCK
    }

    /// All parts of the archive, in order. Together they have [`ArchivePlan::length`] bytes.
    pub fn into_members(self) -> impl Iterator<Item = io::Result<Member>> + Send + 'static {
        let document = |(name, bytes): (String, Vec<u8>)| {
            let mut member = header(&name, bytes.len() as u64)?.as_bytes().to_vec();
            member.extend_from_slice(&bytes);
            member.extend(padding(bytes.len() as u64));
            Ok(Member::Bytes(member))
        };
        let layer = |layer: LayerRecord| {
            let size = layer.size;
            let head = header(&blob_path(&layer.diff_id), size).map(|header| Member::Bytes(header.as_bytes().to_vec()));
            // An empty part is left out, because it would end the stream.
            let pad = Some(padding(size)).filter(|pad| !pad.is_empty()).map(|pad| Ok(Member::Bytes(pad)));
            [Some(head), Some(Ok(Member::Layer(layer))), pad].into_iter().flatten()
        };
        let end = std::iter::once_with(|| Ok(Member::Bytes(vec![0; 2 * BLOCK as usize])));
        self.documents.into_iter().map(document).chain(self.layers.into_iter().flat_map(layer)).chain(end)
    }
}

/// A member's header. Names are short and sizes above 8 GiB are written in the GNU way, as Docker does.
fn header(name: &str, size: u64) -> io::Result<tar::Header> {
    let mut header = tar::Header::new_gnu();
    header.set_path(name)?;
    header.set_size(size);
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_entry_type(tar::EntryType::Regular);
    header.set_cksum();
    Ok(header)
}

fn padding(size: u64) -> Vec<u8> {
    vec![0; (size.next_multiple_of(BLOCK) - size) as usize]
}
