//! The journal in RocksDB: the only file that names it.
//!
//! Column families: `jobs` (number, big-endian, so that they are in order -> JSON), `blobs` (blob digest -> diffID),
//! `chunks` (chunk digest -> location), `profiles` (chainID -> JSON), and one for each [`Table`] (bytes -> bytes). Jobs are written with a synced log; the others need not be.

use std::path::{Path, PathBuf};

use rocksdb::{
    BlockBasedOptions, BoundColumnFamily, Cache, ColumnFamilyDescriptor, DBWithThreadMode, IteratorMode, MultiThreaded,
    Options, WriteBatch, WriteOptions,
};
use store::chunk::PieceLocation;
use store::profile::PrefetchProfile;
use store::{ContentDigest, Digest};

use crate::job::{JobId, PullJob};
use crate::journal::{Durability, Journal, JournalError, Record, Table};
use crate::unpack::ChunkLocations;

const JOBS: &str = "jobs";
const BLOBS: &str = "blobs";
const CHUNKS: &str = "chunks";
const PROFILES: &str = "profiles";

/// Memory for all reads together: the whole coordinator is to stay small.
const CACHE_BYTES: usize = 32 << 20;
/// Memory for writes, per column family.
const WRITE_BUFFER_BYTES: usize = 8 << 20;
/// Records that are removed with one write.
const FORGET_AT_ONCE: usize = 4096;
/// Descriptors: the process's limit may be low.
const MAX_OPEN_FILES: i32 = 256;

type Database = DBWithThreadMode<MultiThreaded>;

/// A journal in a directory.
pub struct RocksJournal {
    database: Database,
    path: PathBuf,
}

fn options() -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_max_open_files(MAX_OPEN_FILES);
    options.set_keep_log_file_num(4);
    options.set_max_total_wal_size(64 << 20);
    options
}

fn family(name: &str, cache: &Cache) -> ColumnFamilyDescriptor {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(cache);
    blocks.set_bloom_filter(10.0, false);
    let mut options = Options::default();
    options.set_block_based_table_factory(&blocks);
    options.set_write_buffer_size(WRITE_BUFFER_BYTES);
    options.set_compression_type(rocksdb::DBCompressionType::Lz4);
    ColumnFamilyDescriptor::new(name, options)
}

impl RocksJournal {
    /// Opens or creates the journal in the existing directory `state`.
    pub fn open(state: &Path) -> Result<RocksJournal, JournalError> {
        let cache = Cache::new_lru_cache(CACHE_BYTES);
        let own = [JOBS, BLOBS, CHUNKS, PROFILES].into_iter();
        let families = own.chain(Table::ALL.map(Table::name)).map(|name| family(name, &cache)).collect::<Vec<_>>();
        let path = state.to_owned();
        match Database::open_cf_descriptors(&options(), state.join("journal"), families) {
            Ok(database) => Ok(RocksJournal { database, path }),
            Err(error) if error.as_ref().contains("lock") && error.kind() == rocksdb::ErrorKind::IOError => {
                Err(JournalError::InUse { path })
            }
            Err(error) => Err(JournalError::Open { path, why: error.into_string() }),
        }
    }

    fn failed(&self, why: impl Into<String>) -> JournalError {
        JournalError::Access { path: self.path.clone(), why: why.into() }
    }

    fn family(&self, name: &str) -> Result<std::sync::Arc<BoundColumnFamily<'_>>, JournalError> {
        self.database.cf_handle(name).ok_or_else(|| self.failed(format!("it has no table {name}")))
    }

    fn get(&self, family: &str, key: &[u8]) -> Result<Option<Vec<u8>>, JournalError> {
        let found = self.database.get_cf(&self.family(family)?, key);
        found.map_err(|error| self.failed(error.into_string()))
    }

    fn write(&self, batch: WriteBatch, synced: Durability) -> Result<(), JournalError> {
        let mut options = WriteOptions::default();
        options.set_sync(synced == Durability::Synced);
        self.database.write_opt(batch, &options).map_err(|error| self.failed(error.into_string()))
    }
}

impl Journal for RocksJournal {
    fn jobs(&self) -> Result<Vec<PullJob>, JournalError> {
        let mut jobs = Vec::new();
        for entry in self.database.iterator_cf(&self.family(JOBS)?, IteratorMode::Start) {
            let (key, value) = entry.map_err(|error| self.failed(error.into_string()))?;
            match serde_json::from_slice(&value) {
                Ok(job) => jobs.push(job),
                Err(error) => tracing::warn!("job {key:02x?} in the database is not understood and left out: {error}"),
            }
        }
        Ok(jobs)
    }

    fn put_job(&self, job: &PullJob) -> Result<(), JournalError> {
        let text = serde_json::to_vec(job).map_err(|error| self.failed(error.to_string()))?;
        let mut batch = WriteBatch::default();
        batch.put_cf(&self.family(JOBS)?, job.id.0.to_be_bytes(), text);
        self.write(batch, Durability::Synced)
    }

    fn put_jobs(&self, jobs: &[PullJob]) -> Result<(), JournalError> {
        let mut batch = WriteBatch::default();
        for job in jobs {
            let text = serde_json::to_vec(job).map_err(|error| self.failed(error.to_string()))?;
            batch.put_cf(&self.family(JOBS)?, job.id.0.to_be_bytes(), text);
        }
        self.write(batch, Durability::Synced)
    }

    fn remove_jobs(&self, jobs: &[JobId]) -> Result<(), JournalError> {
        let mut batch = WriteBatch::default();
        for job in jobs {
            batch.delete_cf(&self.family(JOBS)?, job.0.to_be_bytes());
        }
        self.write(batch, Durability::Eventual)
    }

    fn diff_id_of(&self, blob: &Digest) -> Result<Option<Digest>, JournalError> {
        let found = self.get(BLOBS, blob.as_bytes())?;
        Ok(found.and_then(|bytes| <[u8; 32]>::try_from(bytes).ok()).map(Digest::from_bytes))
    }

    fn record_blob(&self, blob: &Digest, diff_id: &Digest) -> Result<(), JournalError> {
        let mut batch = WriteBatch::default();
        batch.put_cf(&self.family(BLOBS)?, blob.as_bytes(), diff_id.as_bytes());
        self.write(batch, Durability::Eventual)
    }

    fn profile(&self, chain: &Digest) -> Result<Option<PrefetchProfile>, JournalError> {
        let Some(bytes) = self.get(PROFILES, chain.as_bytes())? else { return Ok(None) };
        match PrefetchProfile::decode(&bytes) {
            Ok(profile) => Ok(Some(profile)),
            Err(error) => {
                tracing::warn!("the profile of chain {chain} in the database is left out: {error}");
                Ok(None)
            }
        }
    }

    fn profiled_chains(&self) -> Result<Vec<Digest>, JournalError> {
        let mut chains = Vec::new();
        for entry in self.database.iterator_cf(&self.family(PROFILES)?, IteratorMode::Start) {
            let (key, _) = entry.map_err(|error| self.failed(error.into_string()))?;
            chains.extend(<[u8; 32]>::try_from(&*key).map(Digest::from_bytes));
        }
        Ok(chains)
    }

    fn put_profile(&self, profile: &PrefetchProfile) -> Result<(), JournalError> {
        let bytes = profile.encode().map_err(|error| self.failed(error.to_string()))?;
        let mut batch = WriteBatch::default();
        batch.put_cf(&self.family(PROFILES)?, profile.chain().as_bytes(), bytes);
        self.write(batch, Durability::Eventual)
    }

    fn remove_profile(&self, chain: &Digest) -> Result<(), JournalError> {
        let mut batch = WriteBatch::default();
        batch.delete_cf(&self.family(PROFILES)?, chain.as_bytes());
        self.write(batch, Durability::Eventual)
    }

    fn records(&self, table: Table) -> Result<Vec<Record>, JournalError> {
        let entries = self.database.iterator_cf(&self.family(table.name())?, IteratorMode::Start);
        let owned = |(key, value): (Box<[u8]>, Box<[u8]>)| (key.into_vec(), value.into_vec());
        entries.map(|entry| entry.map(owned).map_err(|error| self.failed(error.into_string()))).collect()
    }

    fn record(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, JournalError> {
        self.get(table.name(), key)
    }

    fn change_records(
        &self,
        table: Table,
        changes: &[(&[u8], Option<&[u8]>)],
        durability: Durability,
    ) -> Result<(), JournalError> {
        let family = self.family(table.name())?;
        let mut batch = WriteBatch::default();
        for (key, value) in changes {
            match value {
                Some(value) => batch.put_cf(&family, key, value),
                None => batch.delete_cf(&family, key),
            }
        }
        self.write(batch, durability)
    }

    fn locations(&self) -> &dyn ChunkLocations {
        self
    }

    fn forget_locations(&self, gone: &dyn Fn(&PieceLocation) -> bool) -> Result<u64, JournalError> {
        let family = self.family(CHUNKS)?;
        let (mut batch, mut forgotten) = (WriteBatch::default(), 0);
        for entry in self.database.iterator_cf(&family, IteratorMode::Start) {
            let (key, value) = entry.map_err(|error| self.failed(error.into_string()))?;
            // What cannot be read is of no use either.
            if PieceLocation::decode(&value).is_ok_and(|location| !gone(&location)) {
                continue;
            }
            batch.delete_cf(&family, key);
            forgotten += 1;
            if batch.len() >= FORGET_AT_ONCE {
                self.write(std::mem::take(&mut batch), Durability::Eventual)?;
            }
        }
        self.write(batch, Durability::Eventual)?;
        Ok(forgotten)
    }

    fn forget_all_locations(&self) -> Result<(), JournalError> {
        let mut batch = WriteBatch::default();
        // Keys are digests of 32 bytes: one byte more is behind all of them.
        batch.delete_range_cf(&self.family(CHUNKS)?, &[0; 32][..], &[0xff; 33][..]);
        self.write(batch, Durability::Synced)
    }
}

impl ChunkLocations for RocksJournal {
    fn get(&self, piece: &ContentDigest) -> Option<PieceLocation> {
        let found = RocksJournal::get(self, CHUNKS, piece.as_bytes());
        let decoded = found.map(|bytes| bytes.map(|bytes| PieceLocation::decode(&bytes)));
        match decoded {
            Ok(location) => location.and_then(Result::ok),
            Err(error) => {
                tracing::warn!("a piece may be stored twice: {error}");
                None
            }
        }
    }

    fn put(&self, pieces: &[(ContentDigest, PieceLocation)]) {
        let written = self.family(CHUNKS).and_then(|family| {
            let mut batch = WriteBatch::default();
            for (digest, location) in pieces {
                batch.put_cf(&family, digest.as_bytes(), location.encode());
            }
            self.write(batch, Durability::Eventual)
        });
        if let Err(error) = written {
            tracing::warn!("pieces of a new layer will be stored again by others: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::tests::job;

    #[test]
    fn records_are_kept_by_table_and_key() {
        let dir = tempfile::tempdir().unwrap();
        {
            let journal = RocksJournal::open(dir.path()).unwrap();
            let put: [(&[u8], Option<&[u8]>); 3] = [(b"b", Some(b"2")), (b"a", Some(b"1")), (b"c", Some(b"3"))];
            journal.change_records(Table::Events, &put, Durability::Synced).unwrap();
            journal.change_records(Table::Events, &[(b"c", None)], Durability::Eventual).unwrap();
        }
        let journal = RocksJournal::open(dir.path()).unwrap();
        let kept = [(b"a".to_vec(), b"1".to_vec()), (b"b".to_vec(), b"2".to_vec())];
        assert_eq!(journal.records(Table::Events).unwrap(), kept);
        assert_eq!(journal.record(Table::Events, b"b").unwrap(), Some(b"2".to_vec()));
        assert_eq!(journal.record(Table::Events, b"c").unwrap(), None);
    }

    #[test]
    fn pieces_are_forgotten_by_where_they_lie_or_all_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let journal = RocksJournal::open(dir.path()).unwrap();
        let piece = |n: u32| ContentDigest::of(&n.to_le_bytes());
        let location = |n: u32| {
            let digest = piece(n % 2);
            let codec = store::chunk::Codec::Plain;
            let chunk =
                store::chunk::ChunkRef { pack: digest, offset: n.into(), stored_len: 1, raw_len: 1, codec, digest };
            PieceLocation { chunk, start: 0, len: 1 }
        };
        let all: Vec<_> = (0..10_000).map(|n| (piece(n), location(n))).collect();
        journal.locations().put(&all);
        assert_eq!(journal.forget_locations(&|location| location.chunk.pack == piece(1)), Ok(5000));
        assert_eq!(journal.locations().get(&piece(6)), Some(location(6)));
        assert_eq!(journal.locations().get(&piece(7)), None);
        journal.forget_all_locations().unwrap();
        assert!((0..10_000).all(|n| journal.locations().get(&piece(n)).is_none()));
        journal.locations().put(&all[..1]);
        assert_eq!(journal.locations().get(&piece(0)), Some(location(0)));
    }

    #[test]
    fn jobs_and_facts_survive_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        {
            let journal = RocksJournal::open(dir.path()).unwrap();
            for id in [300, 2, 1] {
                journal.put_job(&job(id, 0)).unwrap();
            }
            journal.remove_jobs(&[JobId(2)]).unwrap();
            journal.record_blob(&a, &b).unwrap();
            journal.put_profile(&PrefetchProfile::new(a)).unwrap();
            journal.put_profile(&PrefetchProfile::new(b)).unwrap();
            journal.remove_profile(&b).unwrap();
            assert_eq!(RocksJournal::open(dir.path()).err(), Some(JournalError::InUse { path: dir.path().to_owned() }));
        }
        let journal = RocksJournal::open(dir.path()).unwrap();
        let ids: Vec<_> = journal.jobs().unwrap().iter().map(|job| job.id.0).collect();
        assert_eq!(ids, [1, 300]);
        assert_eq!(journal.diff_id_of(&a), Ok(Some(b)));
        assert_eq!(journal.diff_id_of(&b), Ok(None));
        assert_eq!(journal.profiled_chains(), Ok(vec![a]));
        assert_eq!(journal.profile(&a), Ok(Some(PrefetchProfile::new(a))));
        assert_eq!(journal.profile(&b), Ok(None));
    }
}
