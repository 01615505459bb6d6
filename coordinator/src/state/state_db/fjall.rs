//! The engine on fjall, which is Rust only. No other file uses fjall. A family is a keyspace.

use std::collections::HashMap;
use std::path::Path;

use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};

use crate::state::state_db::engine::{Change, Engine, FJALL, Kind, Visitor};
use crate::state::state_db::{Durability, StateError};

/// How fjall is opened.
pub(super) const KIND: Kind = Kind { files: FJALL, open };

/// Memory for all reads together, in bytes: the whole coordinator is to stay small.
const CACHE_BYTES: u64 = 32 << 20;
/// Memory for writes, per family, in bytes.
const WRITE_BUFFER_BYTES: u64 = 8 << 20;
/// File descriptors: the process's limit may be low.
const MAX_OPEN_FILES: usize = 256;
/// Threads that write to disk and clean up.
const WORKERS: usize = 2;

struct FjallEngine {
    database: Database,
    families: HashMap<&'static str, Keyspace>,
}

fn open(state: &Path, directory: &Path, families: &[&'static str]) -> Result<Box<dyn Engine>, StateError> {
    let failed = |error: fjall::Error| match error {
        fjall::Error::Locked => StateError::InUse { path: state.to_owned() },
        other => StateError::Open { path: state.to_owned(), why: other.to_string() },
    };
    let builder = Database::builder(directory).cache_size(CACHE_BYTES);
    let builder = builder.max_cached_files(Some(MAX_OPEN_FILES)).worker_threads(WORKERS);
    let database = builder.open().map_err(failed)?;
    let options = || KeyspaceCreateOptions::default().max_memtable_size(WRITE_BUFFER_BYTES);
    let families = families.iter().map(|name| Ok((*name, database.keyspace(name, options)?)));
    let families = families.collect::<Result<_, _>>().map_err(failed)?;
    Ok(Box::new(FjallEngine { database, families }))
}

fn words(error: fjall::Error) -> String {
    error.to_string()
}

impl FjallEngine {
    fn family(&self, name: &str) -> Result<&Keyspace, String> {
        self.families.get(name).ok_or_else(|| format!("it has no table {name}"))
    }
}

impl Engine for FjallEngine {
    fn get(&self, family: &str, key: &[u8]) -> Result<Option<Vec<u8>>, String> {
        Ok(self.family(family)?.get(key).map_err(words)?.map(|value| value.to_vec()))
    }

    fn walk(&self, family: &str, visit: &mut Visitor<'_>) -> Result<(), String> {
        for entry in self.family(family)?.iter() {
            let (key, value) = entry.into_inner().map_err(words)?;
            if !visit(&key, &value) {
                break;
            }
        }
        Ok(())
    }

    fn change(&self, family: &str, changes: &[Change<'_>], durability: Durability) -> Result<(), String> {
        let family = self.family(family)?;
        let mode = match durability {
            Durability::Synced => PersistMode::SyncAll,
            // Handed to the kernel: it outlives the process.
            Durability::Eventual => PersistMode::Buffer,
        };
        let mut batch = self.database.batch().durability(Some(mode));
        for (key, value) in changes {
            match value {
                Some(value) => batch.insert(family, *key, *value),
                None => batch.remove(family, *key),
            }
        }
        batch.commit().map_err(words)
    }

    fn clear(&self, family: &str) -> Result<(), String> {
        self.family(family)?.clear().map_err(words)?;
        self.database.persist(PersistMode::SyncAll).map_err(words)
    }
}
