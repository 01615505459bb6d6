//! Which blobs were found to be which layers: naming a layer is not having it.
//!
//! A config says which diffIDs an image has, and anybody can write one that names somebody else's. So a layer that is already in the store
//! counts for an image only if (1) the image's registry once sent, completely, the blob that the manifest names, and it was found to be the
//! layer, and (2) the image's repository answers for that blob now ([`Registry::confirm_blob`]). A registry that lies can say yes to (2), but it
//! cannot have sent what it does not have. Anything else is fetched and verified although the store has it, once for each registry.
//!
//! Verified blobs are remembered in three places: [`Table::Shown`] of the database; [`Table::Verified`], which coordinators share, for
//! layers that are in the store before an image refers to them, so that the next leader need not fetch them again; and the catalogue, whose
//! images were published from verified blobs of their registries. The length of the blob is kept with it, because manifests may say
//! otherwise. The database also knows which layer each blob is, whatever the registry.
//!
//! [`Registry::confirm_blob`]: crate::registries::Registry::confirm_blob

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use store::Digest;
use store::publisher::Publisher;

use crate::jobs::pull::error::PullError;
use crate::registries::RemoteLayer;
use crate::state::state_db::{Durability, StateDb, StateError, Table};

/// The verified blobs. All methods block on the database.
pub struct VerifiedBlobs {
    state_db: Arc<dyn StateDb>,
    publisher: Arc<Publisher>,
}

/// A blob, and the layer that it is or is said to be.
type Pair = (Digest, Digest);

/// The record of a blob: the layer's 32 bytes, then the blob's length, which older coordinators did not write.
fn value(diff_id: &Digest, size: u64) -> Vec<u8> {
    [diff_id.as_bytes().as_slice(), &size.to_le_bytes()].concat()
}

fn size_in(value: &[u8]) -> Option<u64> {
    value.get(32..)?.first_chunk().copied().map(u64::from_le_bytes)
}

impl From<StateError> for PullError {
    fn from(error: StateError) -> PullError {
        PullError::StateDb(error.to_string())
    }
}

/// The key of a blob from a registry: 32 bytes of the digest, then the registry's name.
fn key(host: &str, blob: &Digest) -> Vec<u8> {
    [blob.as_bytes().as_slice(), host.as_bytes()].concat()
}

/// The digest at the beginning of a key or a value.
fn digest(bytes: &[u8]) -> Option<Digest> {
    bytes.first_chunk::<32>().copied().map(Digest::from_bytes)
}

/// The registry of a canonical repository.
fn host_of(repository: &str) -> &str {
    repository.split_once('/').map_or(repository, |(host, _)| host)
}

impl VerifiedBlobs {
    /// Uses what `state_db` and the publisher's catalogue know.
    pub fn new(state_db: Arc<dyn StateDb>, publisher: Arc<Publisher>) -> VerifiedBlobs {
        VerifiedBlobs { state_db, publisher }
    }

    /// The size of the layer's blob, if the registry `host` once sent the blob and it was found to be the layer.
    pub fn size(&self, host: &str, layer: &RemoteLayer) -> Result<Option<u64>, PullError> {
        let key = key(host, &layer.blob);
        for table in [Table::Shown, Table::Verified] {
            if let Some(known) = self.state_db.record(table, &key)? {
                let is_layer = digest(&known) == Some(layer.diff_id);
                return Ok(is_layer.then(|| size_in(&known).unwrap_or(layer.claimed)));
            }
        }
        Ok(None)
    }

    /// Refuses layers of the image `image` that contradict what was verified. Takes over from the catalogue what only the catalogue knows
    /// of them.
    pub fn check(&self, host: &str, image: &str, layers: &[RemoteLayer]) -> Result<(), PullError> {
        let mut unknown: HashSet<Pair> = HashSet::new();
        for layer in layers {
            match self.state_db.diff_id_of(&layer.blob)? {
                Some(known) if known != layer.diff_id => {
                    let what = format!("layer {} of {image}", layer.blob);
                    return Err(PullError::WrongDiffId { what, claimed: layer.diff_id, known });
                }
                _ => {}
            }
            if self.size(host, layer)?.is_none() {
                unknown.insert((layer.blob, layer.diff_id));
            }
        }
        if unknown.is_empty() {
            return Ok(());
        }
        let catalogue = self.publisher.catalogue();
        let of_registry = catalogue.images().filter(|image| host_of(&image.repository) == host);
        let published = of_registry.flat_map(|image| &image.layers);
        let found: HashMap<Pair, u64> = published
            .map(|layer| ((layer.blob, layer.diff_id), layer.blob_size))
            .filter(|(pair, _)| unknown.contains(pair))
            .collect();
        Ok(found.iter().try_for_each(|((blob, diff_id), size)| self.remember(host, blob, diff_id, *size))?)
    }

    /// Records, for this coordinator, what a registry's blob was found to be.
    fn remember(&self, host: &str, blob: &Digest, diff_id: &Digest, size: u64) -> Result<(), StateError> {
        let key = key(host, blob);
        self.state_db.change_records(Table::Shown, &[(&key, Some(&value(diff_id, size)))], Durability::Eventual)?;
        self.state_db.record_blob(blob, diff_id)
    }

    /// Records a blob of `size` bytes that `host` sent and that was verified, for other coordinators as well.
    pub fn record(&self, host: &str, layer: &RemoteLayer, size: u64) -> Result<(), StateError> {
        let (key, value) = (key(host, &layer.blob), value(&layer.diff_id, size));
        let change: (&[u8], Option<&[u8]>) = (&key, Some(&value));
        self.state_db.change_records(Table::Verified, &[change], Durability::Synced)?;
        self.remember(host, &layer.blob, &layer.diff_id, size)
    }

    /// To be called once the catalogue knows these layers: what coordinators share about them is no longer needed.
    pub fn published(&self, host: &str, layers: &[RemoteLayer]) -> Result<(), StateError> {
        let mut gone: Vec<Vec<u8>> = Vec::new();
        for key in layers.iter().map(|layer| key(host, &layer.blob)) {
            if self.state_db.record(Table::Verified, &key)?.is_some() {
                gone.push(key);
            }
        }
        self.forget(&gone)
    }

    fn forget(&self, gone: &[Vec<u8>]) -> Result<(), StateError> {
        if gone.is_empty() {
            return Ok(());
        }
        let changes: Vec<(&[u8], Option<&[u8]>)> = gone.iter().map(|key| (key.as_slice(), None)).collect();
        self.state_db.change_records(Table::Verified, &changes, Durability::Eventual)
    }

    /// Forgets what coordinators share about layers that are not in the store (any more), or that an image refers to. Failed jobs leave
    /// such records. To be called when a leader begins.
    pub fn prune(&self) -> Result<(), PullError> {
        let shared = self.state_db.records(Table::Verified)?;
        if shared.is_empty() {
            return Ok(());
        }
        let catalogue = self.publisher.catalogue();
        let key_of = |repository: &str, blob: &Digest| key(host_of(repository), blob);
        let published: HashSet<Vec<u8>> = catalogue
            .images()
            .flat_map(|image| image.layers.iter().map(|layer| key_of(&image.repository, &layer.blob)))
            .collect();
        let mut gone = Vec::new();
        for (key, diff_id) in shared {
            let is_here = match digest(&diff_id) {
                Some(diff_id) => self.publisher.store().has_layer(&diff_id)?,
                None => false,
            };
            if !is_here || published.contains(&key) {
                gone.push(key);
            }
        }
        Ok(self.forget(&gone)?)
    }
}
