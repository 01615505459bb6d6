//! The engine on RocksDB. No other file uses RocksDB. A family is a column family.

use std::path::Path;
use std::sync::Arc;

use rocksdb::{
    BlockBasedOptions, BoundColumnFamily, Cache, ColumnFamilyDescriptor, DBWithThreadMode, IteratorMode, MultiThreaded,
    Options, WriteBatch, WriteOptions,
};

use crate::state::state_db::engine::{Change, Engine, Kind, ROCKSDB, Visitor};
use crate::state::state_db::{Durability, StateError};

/// How RocksDB is opened.
pub(super) const KIND: Kind = Kind { files: ROCKSDB, open };

/// Memory for all reads together, in bytes: the whole coordinator is to stay small.
const CACHE_BYTES: usize = 32 << 20;
/// Memory for writes, per column family, in bytes.
const WRITE_BUFFER_BYTES: usize = 8 << 20;
/// File descriptors: the process's limit may be low.
const MAX_OPEN_FILES: i32 = 256;

struct RocksEngine(DBWithThreadMode<MultiThreaded>);

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

fn open(state: &Path, directory: &Path, families: &[&'static str]) -> Result<Box<dyn Engine>, StateError> {
    let cache = Cache::new_lru_cache(CACHE_BYTES);
    let families = families.iter().map(|name| family(name, &cache));
    let path = state.to_owned();
    match DBWithThreadMode::open_cf_descriptors(&options(), directory, families) {
        Ok(database) => Ok(Box::new(RocksEngine(database))),
        Err(error) if error.as_ref().contains("lock") && error.kind() == rocksdb::ErrorKind::IOError => {
            Err(StateError::InUse { path })
        }
        Err(error) => Err(StateError::Open { path, why: error.into_string() }),
    }
}

impl RocksEngine {
    fn family(&self, name: &str) -> Result<Arc<BoundColumnFamily<'_>>, String> {
        self.0.cf_handle(name).ok_or_else(|| format!("it has no table {name}"))
    }

    fn write(&self, batch: WriteBatch, durability: Durability) -> Result<(), String> {
        let mut options = WriteOptions::default();
        options.set_sync(durability == Durability::Synced);
        self.0.write_opt(batch, &options).map_err(rocksdb::Error::into_string)
    }
}

impl Engine for RocksEngine {
    fn get(&self, family: &str, key: &[u8]) -> Result<Option<Vec<u8>>, String> {
        self.0.get_cf(&self.family(family)?, key).map_err(rocksdb::Error::into_string)
    }

    fn walk(&self, family: &str, visit: &mut Visitor<'_>) -> Result<(), String> {
        for entry in self.0.iterator_cf(&self.family(family)?, IteratorMode::Start) {
            let (key, value) = entry.map_err(rocksdb::Error::into_string)?;
            if !visit(&key, &value) {
                break;
            }
        }
        Ok(())
    }

    fn change(&self, family: &str, changes: &[Change<'_>], durability: Durability) -> Result<(), String> {
        let family = self.family(family)?;
        let mut batch = WriteBatch::default();
        for (key, value) in changes {
            match value {
                Some(value) => batch.put_cf(&family, key, value),
                None => batch.delete_cf(&family, key),
            }
        }
        self.write(batch, durability)
    }

    fn clear(&self, family: &str) -> Result<(), String> {
        let handle = self.family(family)?;
        let mut last = self.0.iterator_cf(&handle, IteratorMode::End);
        let Some(last) = last.next() else { return Ok(()) };
        let (mut end, _) = last.map_err(rocksdb::Error::into_string).map(|(key, value)| (key.into_vec(), value))?;
        // A range excludes its end. The last key plus one byte is the smallest key after it.
        end.push(0);
        let mut batch = WriteBatch::default();
        batch.delete_range_cf(&handle, &[][..], &end[..]);
        self.write(batch, Durability::Synced)
    }
}
