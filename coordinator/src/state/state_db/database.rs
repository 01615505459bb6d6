//! The coordinator's state in a key-value database, whichever [`super::engine`] the program was built with.
//!
//! Families: `jobs` (number, big-endian, so that they are in order -> JSON), `blobs` (blob digest -> diffID), `chunks` (piece digest ->
//! location), `profiles` (chainID -> JSON), and one for each [`Table`] (bytes -> bytes). Jobs are written with a synced log; the other
//! families need not be.

use std::path::{Path, PathBuf};

use store::chunk::PieceLocation;
use store::profile::PrefetchProfile;
use store::{ContentDigest, Digest};

use crate::state::job::{JobId, PullJob};
use crate::state::state_db::engine::{self, Change, Engine, Files, Kind};
use crate::state::state_db::{Durability, KeyValue, StateDb, StateError, Table};
use crate::unpack::ChunkLocations;

const JOBS: &str = "jobs";
const BLOBS: &str = "blobs";
const CHUNKS: &str = "chunks";
const PROFILES: &str = "profiles";

/// How many records one write removes.
const FORGET_AT_ONCE: usize = 4096;

/// The engines that this program was built with. The first one makes new databases.
const KINDS: &[Kind] = &[
    #[cfg(feature = "rocksdb")]
    crate::state::state_db::rocks::KIND,
    #[cfg(feature = "fjall")]
    crate::state::state_db::fjall::KIND,
];
const _: () =
    assert!(!KINDS.is_empty(), "the coordinator needs a database: build it with the feature rocksdb or fjall");

/// A database in a directory.
pub struct StateDatabase {
    engine: Box<dyn Engine>,
    path: PathBuf,
}

impl StateDatabase {
    /// Opens the database in the existing directory `state`, or creates one with the first engine of this build. A database that another
    /// engine of this build has made is opened with that one.
    pub fn open(state: &Path) -> Result<StateDatabase, StateError> {
        let present = KINDS.iter().find(|kind| state.join(kind.files.directory).exists());
        StateDatabase::open_as(present.unwrap_or(&KINDS[0]), state)
    }

    /// Like [`StateDatabase::open`], with a given engine. A directory that holds another engine's database is refused: an empty database
    /// beside it would know of no job.
    fn open_as(kind: &Kind, state: &Path) -> Result<StateDatabase, StateError> {
        let own = kind.files;
        let is_foreign = |files: &&Files| **files != own && state.join(files.directory).exists();
        if let Some(Files { engine: other, .. }) = engine::ALL.iter().find(is_foreign) {
            let why = format!(
                "it was made by a build with {other}, and this one has {}: use a build with {other}",
                own.engine
            );
            return Err(StateError::Open { path: state.to_owned(), why });
        }
        let engine = (kind.open)(state, &state.join(own.directory), &families())?;
        Ok(StateDatabase { engine, path: state.to_owned() })
    }

    /// Wraps an open database.
    #[cfg(test)]
    pub(crate) fn on(engine: Box<dyn Engine>) -> StateDatabase {
        StateDatabase { engine, path: PathBuf::new() }
    }

    fn failed(&self, why: impl ToString) -> StateError {
        StateError::Access { path: self.path.clone(), why: why.to_string() }
    }

    fn get(&self, family: &str, key: &[u8]) -> Result<Option<Vec<u8>>, StateError> {
        self.engine.get(family, key).map_err(|why| self.failed(why))
    }

    fn change(&self, family: &str, changes: &[Change<'_>], durability: Durability) -> Result<(), StateError> {
        self.engine.change(family, changes, durability).map_err(|why| self.failed(why))
    }
}

/// All families of the database.
pub(super) fn families() -> Vec<&'static str> {
    [JOBS, BLOBS, CHUNKS, PROFILES].into_iter().chain(Table::ALL.map(Table::name)).collect()
}

impl StateDb for StateDatabase {
    fn jobs(&self) -> Result<Vec<PullJob>, StateError> {
        let mut jobs = Vec::new();
        let walked = self.engine.walk(JOBS, &mut |key, value| {
            match serde_json::from_slice(value) {
                Ok(job) => jobs.push(job),
                Err(error) => tracing::warn!("job {key:02x?} in the database is not understood and left out: {error}"),
            }
            true
        });
        walked.map_err(|why| self.failed(why))?;
        Ok(jobs)
    }

    fn put_job(&self, job: &PullJob) -> Result<(), StateError> {
        self.put_jobs(std::slice::from_ref(job))
    }

    fn put_jobs(&self, jobs: &[PullJob]) -> Result<(), StateError> {
        let mut written = Vec::new();
        for job in jobs {
            written.push((job.id.0.to_be_bytes(), serde_json::to_vec(job).map_err(|error| self.failed(error))?));
        }
        let changes: Vec<Change<'_>> = written.iter().map(|(key, text)| (&key[..], Some(&text[..]))).collect();
        self.change(JOBS, &changes, Durability::Synced)
    }

    fn remove_jobs(&self, jobs: &[JobId]) -> Result<(), StateError> {
        let keys: Vec<[u8; 8]> = jobs.iter().map(|job| job.0.to_be_bytes()).collect();
        let changes: Vec<Change<'_>> = keys.iter().map(|key| (&key[..], None)).collect();
        self.change(JOBS, &changes, Durability::Eventual)
    }

    fn diff_id_of(&self, blob: &Digest) -> Result<Option<Digest>, StateError> {
        let found = self.get(BLOBS, blob.as_bytes())?;
        Ok(found.and_then(|bytes| <[u8; 32]>::try_from(bytes).ok()).map(Digest::from_bytes))
    }

    fn record_blob(&self, blob: &Digest, diff_id: &Digest) -> Result<(), StateError> {
        self.change(BLOBS, &[(blob.as_bytes(), Some(diff_id.as_bytes()))], Durability::Eventual)
    }

    fn profile(&self, chain: &Digest) -> Result<Option<PrefetchProfile>, StateError> {
        let Some(bytes) = self.get(PROFILES, chain.as_bytes())? else { return Ok(None) };
        match PrefetchProfile::decode(&bytes) {
            Ok(profile) => Ok(Some(profile)),
            Err(error) => {
                tracing::warn!("the profile of chain {chain} in the database is left out: {error}");
                Ok(None)
            }
        }
    }

    fn profiled_chains(&self) -> Result<Vec<Digest>, StateError> {
        let mut chains = Vec::new();
        let walked = self.engine.walk(PROFILES, &mut |key, _| {
            chains.extend(<[u8; 32]>::try_from(key).map(Digest::from_bytes));
            true
        });
        walked.map_err(|why| self.failed(why))?;
        Ok(chains)
    }

    fn put_profile(&self, profile: &PrefetchProfile) -> Result<(), StateError> {
        let bytes = profile.encode().map_err(|error| self.failed(error))?;
        self.change(PROFILES, &[(profile.chain().as_bytes(), Some(&bytes))], Durability::Eventual)
    }

    fn remove_profile(&self, chain: &Digest) -> Result<(), StateError> {
        self.change(PROFILES, &[(chain.as_bytes(), None)], Durability::Eventual)
    }

    fn records(&self, table: Table) -> Result<Vec<KeyValue>, StateError> {
        let mut records = Vec::new();
        let walked = self.engine.walk(table.name(), &mut |key, value| {
            records.push((key.to_vec(), value.to_vec()));
            true
        });
        walked.map_err(|why| self.failed(why))?;
        Ok(records)
    }

    fn record(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StateError> {
        self.get(table.name(), key)
    }

    fn change_records(&self, table: Table, changes: &[Change<'_>], durability: Durability) -> Result<(), StateError> {
        self.change(table.name(), changes, durability)
    }

    fn locations(&self) -> &dyn ChunkLocations {
        self
    }

    fn forget_locations(&self, gone: &dyn Fn(&PieceLocation) -> bool) -> Result<u64, StateError> {
        let (mut batch, mut forgotten, mut failed): (Vec<Vec<u8>>, _, _) = (Vec::new(), 0, Ok(()));
        let remove = |keys: &mut Vec<Vec<u8>>| {
            let changes: Vec<Change<'_>> = keys.iter().map(|key| (&key[..], None)).collect();
            let removed = self.change(CHUNKS, &changes, Durability::Eventual);
            keys.clear();
            removed
        };
        let walked = self.engine.walk(CHUNKS, &mut |key, value| {
            // An entry that cannot be read is of no use either.
            if PieceLocation::decode(value).is_ok_and(|location| !gone(&location)) {
                return true;
            }
            batch.push(key.to_vec());
            forgotten += 1;
            if batch.len() >= FORGET_AT_ONCE {
                failed = remove(&mut batch);
            }
            failed.is_ok()
        });
        walked.map_err(|why| self.failed(why))?;
        failed?;
        remove(&mut batch)?;
        Ok(forgotten)
    }

    fn forget_all_locations(&self) -> Result<(), StateError> {
        self.engine.clear(CHUNKS).map_err(|why| self.failed(why))
    }
}

impl ChunkLocations for StateDatabase {
    fn get(&self, piece: &ContentDigest) -> Option<PieceLocation> {
        let found = StateDatabase::get(self, CHUNKS, piece.as_bytes());
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
        let encoded: Vec<_> = pieces.iter().map(|(digest, location)| (digest, location.encode())).collect();
        let changes: Vec<Change<'_>> =
            encoded.iter().map(|(digest, location)| (&digest.as_bytes()[..], Some(&location[..]))).collect();
        if let Err(error) = self.change(CHUNKS, &changes, Durability::Eventual) {
            tracing::warn!("pieces of a new layer will be stored again by others: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::job::tests::job;

    #[test]
    fn records_are_kept_by_table_and_key() {
        for kind in KINDS {
            let dir = tempfile::tempdir().unwrap();
            {
                let state_db = StateDatabase::open_as(kind, dir.path()).unwrap();
                let put: [(&[u8], Option<&[u8]>); 3] = [(b"b", Some(b"2")), (b"a", Some(b"1")), (b"c", Some(b"3"))];
                state_db.change_records(Table::Events, &put, Durability::Synced).unwrap();
                state_db.change_records(Table::Events, &[(b"c", None)], Durability::Eventual).unwrap();
            }
            let state_db = StateDatabase::open_as(kind, dir.path()).unwrap();
            let kept = [(b"a".to_vec(), b"1".to_vec()), (b"b".to_vec(), b"2".to_vec())];
            assert_eq!(state_db.records(Table::Events).unwrap(), kept);
            assert_eq!(state_db.record(Table::Events, b"b").unwrap(), Some(b"2".to_vec()));
            assert_eq!(state_db.record(Table::Events, b"c").unwrap(), None);
        }
    }

    #[test]
    fn pieces_are_forgotten_by_where_they_lie_or_all_at_once() {
        for kind in KINDS {
            let dir = tempfile::tempdir().unwrap();
            let state_db = StateDatabase::open_as(kind, dir.path()).unwrap();
            let piece = |n: u32| ContentDigest::of(&n.to_le_bytes());
            let location = |n: u32| {
                let digest = piece(n % 2);
                let codec = store::chunk::Codec::Plain;
                let chunk =
                    store::chunk::ChunkRef { pack: digest, offset: n.into(), stored_len: 1, raw_len: 1, codec, digest };
                PieceLocation { chunk, start: 0, len: 1 }
            };
            let all: Vec<_> = (0..10_000).map(|n| (piece(n), location(n))).collect();
            state_db.locations().put(&all);
            assert_eq!(state_db.forget_locations(&|location| location.chunk.pack == piece(1)), Ok(5000));
            assert_eq!(state_db.locations().get(&piece(6)), Some(location(6)));
            assert_eq!(state_db.locations().get(&piece(7)), None);
            state_db.forget_all_locations().unwrap();
            assert!((0..10_000).all(|n| state_db.locations().get(&piece(n)).is_none()));
            state_db.locations().put(&all[..1]);
            assert_eq!(state_db.locations().get(&piece(0)), Some(location(0)));
        }
    }

    #[test]
    fn jobs_and_facts_survive_reopening() {
        for kind in KINDS {
            let dir = tempfile::tempdir().unwrap();
            let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
            {
                let state_db = StateDatabase::open_as(kind, dir.path()).unwrap();
                for id in [300, 2, 1] {
                    state_db.put_job(&job(id, 0)).unwrap();
                }
                state_db.remove_jobs(&[JobId(2)]).unwrap();
                state_db.record_blob(&a, &b).unwrap();
                state_db.put_profile(&PrefetchProfile::new(a)).unwrap();
                state_db.put_profile(&PrefetchProfile::new(b)).unwrap();
                state_db.remove_profile(&b).unwrap();
                assert_eq!(
                    StateDatabase::open_as(kind, dir.path()).err(),
                    Some(StateError::InUse { path: dir.path().to_owned() })
                );
            }
            let state_db = StateDatabase::open_as(kind, dir.path()).unwrap();
            let ids: Vec<_> = state_db.jobs().unwrap().iter().map(|job| job.id.0).collect();
            assert_eq!(ids, [1, 300]);
            assert_eq!(state_db.diff_id_of(&a), Ok(Some(b)));
            assert_eq!(state_db.diff_id_of(&b), Ok(None));
            assert_eq!(state_db.profiled_chains(), Ok(vec![a]));
            assert_eq!(state_db.profile(&a), Ok(Some(PrefetchProfile::new(a))));
            assert_eq!(state_db.profile(&b), Ok(None));
        }
    }

    #[test]
    fn a_database_that_is_there_is_opened_with_its_own_engine() {
        for kind in KINDS {
            let dir = tempfile::tempdir().unwrap();
            let made = StateDatabase::open_as(kind, dir.path()).unwrap();
            made.change_records(Table::Events, &[(b"a", Some(b"1"))], Durability::Synced).unwrap();
            drop(made);
            let found = StateDatabase::open(dir.path()).unwrap();
            assert_eq!(found.record(Table::Events, b"a").unwrap().unwrap(), b"1", "{}", kind.files.engine);
        }
    }

    #[test]
    fn another_engines_database_is_refused_and_left_alone() {
        for kind in KINDS {
            for Files { engine: other, directory } in engine::ALL.iter().filter(|files| **files != kind.files) {
                let dir = tempfile::tempdir().unwrap();
                std::fs::create_dir(dir.path().join(directory)).unwrap();
                let error = StateDatabase::open_as(kind, dir.path()).err().unwrap().to_string();
                assert!(error.contains(&format!("use a build with {other}")), "{error}");
                assert!(!dir.path().join(kind.files.directory).exists());
            }
        }
    }

    #[test]
    fn what_was_answered_outlives_the_process() {
        for kind in KINDS {
            let dir = tempfile::tempdir().unwrap();
            let copy = tempfile::tempdir().unwrap();
            let state_db = StateDatabase::open_as(kind, dir.path()).unwrap();
            for number in 0..100_u32 {
                let key = number.to_be_bytes();
                state_db.change_records(Table::Events, &[(&key, Some(b"x"))], Durability::Eventual).unwrap();
            }
            // The files as a process that is killed now would leave them.
            let copied = std::process::Command::new("cp")
                .arg("-a")
                .arg(dir.path().join(kind.files.directory))
                .arg(copy.path())
                .status();
            assert!(copied.unwrap().success());
            let found = StateDatabase::open_as(kind, copy.path()).unwrap();
            assert_eq!(found.records(Table::Events).unwrap().len(), 100, "{}", kind.files.engine);
        }
    }
}
