//! A journal in memory, for tests of what stands above it.

use std::collections::{BTreeMap, HashMap};

use parking_lot::Mutex;
use store::chunk::PieceLocation;
use store::profile::PrefetchProfile;
use store::{ContentDigest, Digest};

use crate::job::{JobId, PullJob};
use crate::journal::{Durability, Journal, JournalError, Record, Table};
use crate::unpack::ChunkLocations;

/// One table's records.
type Records = BTreeMap<Vec<u8>, Vec<u8>>;

/// Remembers until it is dropped.
#[derive(Default)]
pub(crate) struct MemoryJournal {
    jobs: Mutex<BTreeMap<JobId, PullJob>>,
    blobs: Mutex<HashMap<Digest, Digest>>,
    profiles: Mutex<HashMap<Digest, PrefetchProfile>>,
    records: Mutex<HashMap<Table, Records>>,
    chunks: Mutex<HashMap<ContentDigest, PieceLocation>>,
}

impl Journal for MemoryJournal {
    fn jobs(&self) -> Result<Vec<PullJob>, JournalError> {
        Ok(self.jobs.lock().values().cloned().collect())
    }

    fn put_job(&self, job: &PullJob) -> Result<(), JournalError> {
        self.jobs.lock().insert(job.id, job.clone());
        Ok(())
    }

    fn remove_jobs(&self, jobs: &[JobId]) -> Result<(), JournalError> {
        jobs.iter().for_each(|id| drop(self.jobs.lock().remove(id)));
        Ok(())
    }

    fn diff_id_of(&self, blob: &Digest) -> Result<Option<Digest>, JournalError> {
        Ok(self.blobs.lock().get(blob).copied())
    }

    fn record_blob(&self, blob: &Digest, diff_id: &Digest) -> Result<(), JournalError> {
        self.blobs.lock().insert(*blob, *diff_id);
        Ok(())
    }

    fn profile(&self, chain: &Digest) -> Result<Option<PrefetchProfile>, JournalError> {
        Ok(self.profiles.lock().get(chain).cloned())
    }

    fn profiled_chains(&self) -> Result<Vec<Digest>, JournalError> {
        Ok(self.profiles.lock().keys().copied().collect())
    }

    fn put_profile(&self, profile: &PrefetchProfile) -> Result<(), JournalError> {
        self.profiles.lock().insert(profile.chain(), profile.clone());
        Ok(())
    }

    fn remove_profile(&self, chain: &Digest) -> Result<(), JournalError> {
        self.profiles.lock().remove(chain);
        Ok(())
    }

    fn records(&self, table: Table) -> Result<Vec<Record>, JournalError> {
        let records = self.records.lock();
        let own = records.get(&table).into_iter().flatten();
        Ok(own.map(|(key, value)| (key.clone(), value.clone())).collect())
    }

    fn record(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, JournalError> {
        Ok(self.records.lock().get(&table).and_then(|records| records.get(key)).cloned())
    }

    fn change_records(
        &self,
        table: Table,
        changes: &[(&[u8], Option<&[u8]>)],
        _durability: Durability,
    ) -> Result<(), JournalError> {
        let mut tables = self.records.lock();
        let records = tables.entry(table).or_default();
        for (key, value) in changes {
            match value {
                Some(value) => _ = records.insert(key.to_vec(), value.to_vec()),
                None => _ = records.remove(*key),
            }
        }
        Ok(())
    }

    fn locations(&self) -> &dyn ChunkLocations {
        self
    }

    fn forget_locations(&self, gone: &dyn Fn(&PieceLocation) -> bool) -> Result<u64, JournalError> {
        let mut chunks = self.chunks.lock();
        let before = chunks.len();
        chunks.retain(|_, location| !gone(location));
        Ok((before - chunks.len()) as u64)
    }

    fn forget_all_locations(&self) -> Result<(), JournalError> {
        self.chunks.lock().clear();
        Ok(())
    }
}

impl ChunkLocations for MemoryJournal {
    fn get(&self, piece: &ContentDigest) -> Option<PieceLocation> {
        self.chunks.lock().get(piece).copied()
    }

    fn put(&self, pieces: &[(ContentDigest, PieceLocation)]) {
        self.chunks.lock().extend(pieces.iter().copied());
    }
}
