//! What the containers and images of engines' own storages need of an image store: it stays, whatever the catalogue says.
//!
//! An engine notes nothing in a store that it only reads. So their storages are read: the lower directories of their layers name
//! ours by links, and an image that was given another name there is a copy of our entry, without its documents.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::Deserialize;
use store::Digest;

use crate::docker::files::{self, FileError};

/// What is in use.
#[derive(Debug, Default)]
pub(super) struct InUse {
    /// Names of links to layers.
    pub(super) links: BTreeSet<String>,
    /// Ids of images.
    pub(super) images: BTreeSet<Digest>,
    /// Ids of the layers that these images are made of.
    pub(super) layers: BTreeSet<Digest>,
}

#[derive(Deserialize)]
struct LocalImage {
    id: String,
    #[serde(default)]
    layer: String,
}

impl InUse {
    /// Reads engines' storages. One that is not there uses nothing; one that cannot be read is an error, because it may.
    pub(super) fn read(graph_roots: &[PathBuf]) -> Result<InUse, FileError> {
        let mut used = InUse::default();
        for root in graph_roots {
            let overlay = root.join("overlay");
            for name in files::names(&overlay)? {
                // Beside layers there are files, and base layers have no list.
                let Ok(lower) = std::fs::read_to_string(overlay.join(name).join("lower")) else { continue };
                used.links.extend(lower.trim().split(':').filter_map(|link| Some(link.strip_prefix("l/")?.to_owned())));
            }
            let path = root.join("overlay-images/images.json");
            let Some(text) = files::read_text(&path)?.filter(|text| !text.is_empty()) else { continue };
            let images: Vec<LocalImage> =
                serde_json::from_str(&text).map_err(|e| FileError::io("understand", &path, e.into()))?;
            used.images.extend(images.iter().filter_map(|image| Digest::from_hex(&image.id)));
            used.layers.extend(images.iter().filter_map(|image| Digest::from_hex(&image.layer)));
        }
        Ok(used)
    }
}
