//! Layer indexes: fetched once from the store, unpacked into the cache directory, and mapped.
//!
//! A copy's name holds its BLAKE3 digest, and the copy is read and compared once when it is first mapped: a torn or damaged
//! one is dropped and fetched again. Where the local disk takes no copy, the index stays in memory.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use store::layer::LayerIndex;
use store::{ContentDigest, Digest};

use crate::failure::{Failure, Result};
use crate::origin::Origin;
use crate::pool::{Pools, Priority};
use crate::single_flight::{Boarding, Done, Flights};

/// Where layer indexes come from.
pub struct Indexes {
    dir: PathBuf,
    origin: Arc<Origin>,
    pools: Pools,
    /// Guards what is known of the copies: by layer, the digest in the name.
    known: Mutex<HashMap<Digest, ContentDigest>>,
    flights: Flights<Digest, Arc<LayerIndex>>,
}

impl Indexes {
    /// Indexes with copies in `dir`, which must exist.
    pub fn new(dir: PathBuf, origin: Arc<Origin>, pools: Pools) -> Indexes {
        let entries = fs::read_dir(&dir).into_iter().flatten().flatten();
        let known = entries.filter_map(|entry| parse_name(entry.file_name().to_str()?)).collect();
        Indexes { dir, origin, pools, known: Mutex::new(known), flights: Flights::default() }
    }

    /// Calls `done` with the layer's index.
    pub fn load(self: &Arc<Self>, diff_id: Digest, deadline: Instant, done: Done<Arc<LayerIndex>>) {
        if self.flights.board(diff_id, deadline, done) == Boarding::First {
            let this = Arc::clone(self);
            self.pools.local.submit(Priority::Demand, move || {
                let _guard = this.flights.guard(vec![diff_id]);
                let known = this.known.lock().get(&diff_id).copied();
                if let Some(index) = known.and_then(|digest| this.map_copy(&diff_id, &digest)) {
                    return this.flights.end(&diff_id, Ok(Arc::new(index)));
                }
                let fetching = Arc::clone(&this);
                this.pools.remote.submit(Priority::Demand, move || {
                    let _guard = fetching.flights.guard(vec![diff_id]);
                    fetching.flights.end(&diff_id, fetching.obtain(diff_id));
                });
            });
        }
    }

    /// Tells those who waited too long.
    pub fn expire(&self, now: Instant) -> usize {
        self.flights.expire(now)
    }

    /// Removes the copies of layers that no image has any more.
    pub fn sweep(&self, keep: &HashSet<Digest>) {
        let gone: Vec<_> = self.known.lock().extract_if(|layer, _| !keep.contains(layer)).collect();
        for (layer, digest) in gone {
            let _ = fs::remove_file(self.path(&layer, &digest));
        }
    }

    fn path(&self, diff_id: &Digest, digest: &ContentDigest) -> PathBuf {
        self.dir.join(format!("{}.{}", diff_id.hex(), digest.hex()))
    }

    fn obtain(&self, diff_id: Digest) -> Result<Arc<LayerIndex>> {
        let raw = self.origin.fetch(|| self.flights.is_wanted(&diff_id), |store| store.raw_index(&diff_id))?;
        self.origin.metrics().indexes_fetched.one();
        let damaged = |error: store::Error| {
            tracing::error!("{error}");
            Failure::from(&error)
        };
        match self.keep(&diff_id, &raw) {
            Ok(path) => LayerIndex::map(&path).or_else(|_| LayerIndex::from_bytes(raw)).map(Arc::new).map_err(damaged),
            Err(error) => {
                self.origin.metrics().cache_write_errors.one();
                tracing::warn!(
                    "the index of layer {diff_id} stays in memory, for the local cache takes no copy: {error}"
                );
                LayerIndex::from_bytes(raw).map(Arc::new).map_err(damaged)
            }
        }
    }

    /// Maps the local copy, if it is whole.
    fn map_copy(&self, diff_id: &Digest, digest: &ContentDigest) -> Option<LayerIndex> {
        let path = self.path(diff_id, digest);
        match hash_file(&path) {
            Ok(found) if found == *digest => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            _ => {
                self.origin.metrics().damaged_in_cache.one();
                tracing::warn!("the cached index of layer {diff_id} was damaged and is fetched again");
                let _ = fs::remove_file(&path);
                return None;
            }
        }
        LayerIndex::map(&path).ok().filter(|index| index.diff_id() == *diff_id)
    }

    fn keep(&self, diff_id: &Digest, raw: &[u8]) -> std::io::Result<PathBuf> {
        let digest = ContentDigest::of(raw);
        let path = self.path(diff_id, &digest);
        let temporary = self.dir.join(format!("{}.tmp", diff_id.hex()));
        fs::create_dir_all(&self.dir)?;
        let written = fs::write(&temporary, raw).and_then(|()| fs::rename(&temporary, &path));
        if let Err(error) = written {
            let _ = fs::remove_file(&temporary);
            return Err(error);
        }
        self.known.lock().insert(*diff_id, digest);
        Ok(path)
    }
}

fn parse_name(name: &str) -> Option<(Digest, ContentDigest)> {
    let (layer, digest) = name.split_once('.')?;
    Some((Digest::from_hex(layer)?, ContentDigest::from_hex(digest)?))
}

/// The BLAKE3 digest of a file's bytes.
pub fn hash_file(path: &Path) -> std::io::Result<ContentDigest> {
    let mut file = File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(ContentDigest::from_bytes(*hasher.finalize().as_bytes())),
            n => _ = hasher.update(&buffer[..n]),
        }
    }
}
