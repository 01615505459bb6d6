//! Which blobs were found to be which layers: naming a layer is not having it.
//!
//! A config says which diffIDs an image has; anybody can write one that names somebody else's. So a layer that the store
//! has counts for an image only if (1) the blob that its manifest names was once read to its end and found to be that
//! layer, and (2) the image's repository answers for that blob now ([`Registry::shows`]). Anything else is
//! fetched and verified, although the store has it.
//!
//! What was verified is remembered in three places, looked at in this order: the database; the records that coordinators share
//! ([`Table::Verified`]), for layers that are in the store before an image refers to them, so that the next leader need not
//! fetch them again; and the catalogue, whose images were published from verified blobs.
//!
//! [`Registry::shows`]: crate::registry::Registry::shows

use std::collections::HashSet;
use std::sync::Arc;

use store::Digest;
use store::publisher::Publisher;

use crate::encoding::Encoding;
use crate::journal::{Durability, Journal, JournalError, Table};
use crate::pull::error::PullError;
use crate::registry::RemoteLayer;

/// What was verified. All of it blocks on the database.
pub struct VerifiedBlobs {
    journal: Arc<dyn Journal>,
    publisher: Arc<Publisher>,
}

/// A blob, and what it is or is said to be.
type Pair = (Digest, Digest);

impl From<JournalError> for PullError {
    fn from(error: JournalError) -> PullError {
        PullError::Journal(error.to_string())
    }
}

impl VerifiedBlobs {
    /// What `journal` and the publisher's catalogue know.
    pub fn new(journal: Arc<dyn Journal>, publisher: Arc<Publisher>) -> VerifiedBlobs {
        VerifiedBlobs { journal, publisher }
    }

    /// The layer that a blob was found to be, as the database knows it.
    fn diff_id_of(&self, blob: &Digest) -> Result<Option<Digest>, JournalError> {
        if let Some(known) = self.journal.diff_id_of(blob)? {
            return Ok(Some(known));
        }
        let shared = self.journal.record(Table::Verified, blob.as_bytes())?;
        Ok(shared.and_then(|bytes| <[u8; 32]>::try_from(bytes).ok()).map(Digest::from_bytes))
    }

    /// Whether the layer's blob was found to be the layer.
    pub fn contain(&self, layer: &RemoteLayer) -> Result<bool, PullError> {
        // The digest of a bare tar is its diffID.
        let is_tar = layer.encoding == Encoding::Plain && layer.blob == layer.diff_id;
        Ok(is_tar || self.diff_id_of(&layer.blob)? == Some(layer.diff_id))
    }

    /// Refuses layers of the image `image` that contradict what was verified, and takes over from the catalogue what only that
    /// knows of them.
    pub fn check(&self, image: &str, layers: &[RemoteLayer]) -> Result<(), PullError> {
        let mut unknown: HashSet<Pair> = HashSet::new();
        for layer in layers {
            match self.diff_id_of(&layer.blob)? {
                Some(known) if known != layer.diff_id => {
                    let what = format!("layer {} of {image}", layer.blob);
                    return Err(PullError::WrongDiffId { what, claimed: layer.diff_id, known });
                }
                Some(_) => {}
                None => _ = unknown.insert((layer.blob, layer.diff_id)),
            }
        }
        if unknown.is_empty() {
            return Ok(());
        }
        let catalogue = self.publisher.catalogue();
        let published = catalogue.images().flat_map(|image| &image.layers).map(|layer| (layer.blob, layer.diff_id));
        let found: HashSet<Pair> = published.filter(|pair| unknown.contains(pair)).collect();
        Ok(found.iter().try_for_each(|(blob, diff_id)| self.journal.record_blob(blob, diff_id))?)
    }

    /// Remembers a verified blob, for other coordinators, too.
    pub fn record(&self, layer: &RemoteLayer) -> Result<(), JournalError> {
        let change: (&[u8], Option<&[u8]>) = (layer.blob.as_bytes(), Some(layer.diff_id.as_bytes()));
        self.journal.change_records(Table::Verified, &[change], Durability::Synced)?;
        self.journal.record_blob(&layer.blob, &layer.diff_id)
    }

    /// The catalogue knows these layers from now on: what coordinators share of them is not needed any more.
    pub fn published(&self, layers: &[RemoteLayer]) -> Result<(), JournalError> {
        let mut changes: Vec<(&[u8], Option<&[u8]>)> = Vec::new();
        for layer in layers {
            if self.journal.record(Table::Verified, layer.blob.as_bytes())?.is_some() {
                changes.push((layer.blob.as_bytes(), None));
            }
        }
        if changes.is_empty() {
            return Ok(());
        }
        self.journal.change_records(Table::Verified, &changes, Durability::Eventual)
    }

    /// Forgets what coordinators share of layers that the store does not have (any more), or that an image refers to: jobs
    /// that failed leave it. For a leader's beginning.
    pub fn prune(&self) -> Result<(), PullError> {
        let catalogue = self.publisher.catalogue();
        let shared = self.journal.records(Table::Verified)?;
        if shared.is_empty() {
            return Ok(());
        }
        let published: HashSet<Digest> =
            catalogue.images().flat_map(|image| &image.layers).map(|layer| layer.blob).collect();
        let mut gone = Vec::new();
        for (blob, diff_id) in &shared {
            let pair = (<[u8; 32]>::try_from(blob.as_slice()), <[u8; 32]>::try_from(diff_id.as_slice()));
            let needed = match pair {
                (Ok(blob), Ok(diff_id)) => {
                    !published.contains(&Digest::from_bytes(blob))
                        && self.publisher.store().has_layer(&Digest::from_bytes(diff_id))?
                }
                _ => false,
            };
            if !needed {
                gone.push((blob.as_slice(), None));
            }
        }
        Ok(self.journal.change_records(Table::Verified, &gone, Durability::Eventual)?)
    }
}
