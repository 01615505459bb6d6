//! Layer indexes: fetched once from the store, unpacked into the local cache, and read there block by block.
//!
//! A copy of an index is a cache file like any other, named by the BLAKE3 digest of its bytes: it counts against the
//! cache's limit and is evicted when nobody has needed it for long. An empty file `indexes/<diffID>.<BLAKE3>` says
//! which layer a copy belongs to. If the disk takes no copy, the index is kept in memory, at most [`KEPT`] bytes of
//! such indexes; an index that fits into neither is refused.
//!
//! A copy whose blocks cannot be read any more (evicted, removed, damaged, a bad disk) is **lost**. Its reader gets an
//! error and calls [`Indexes::load`], which fetches the copy from the store again. The reader then goes on with the
//! same [`LayerIndex`].
//!
//! ```text
//!   load -> opened -> lost -> load -> opened ...
//! ```
//!
//! Startup packs hold their layers' indexes, too. Whoever is about to read one takes over the fetches of those that are
//! not here ([`Indexes::expect`]).
//!
//! - `blocks`: the blocks of all indexes that are in memory.
//! - `copy`: one index on this host.
//! - `expected`: indexes that come with a startup pack.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::num::NonZeroUsize;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use coordinator_api::quantity::format_size;
use lru::LruCache;
use parking_lot::Mutex;
use store::layer::{LayerIndex, SealedIndex};
use store::{ContentDigest, Digest};

use crate::content::cache::Cache;
use crate::content::cache::eviction::Use;
use crate::os::pool::{Pools, Priority};
use crate::source::failure::{Failure, Result};
use crate::source::shared_store::SharedStore;
use crate::source::single_flight::{Done, Joined, SingleFlight};

mod blocks;
mod copy;
mod expected;

pub use expected::Expected;

use blocks::Blocks;
use copy::{IndexCopy, Sums};

/// The most that indexes take in memory where the local disk takes no copies, bytes.
pub const KEPT: usize = 64 << 20;
/// A layer that the store does not have is not looked for again for this long, unless an image has it.
const ABSENT: Duration = Duration::from_secs(1);
/// How many such layers are remembered.
const ABSENT_MAX: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");

/// An index that was opened in this daemon's life.
#[derive(Clone)]
struct Opened {
    index: Arc<LayerIndex>,
    copy: Arc<IndexCopy>,
}

/// Layers whose indexes a startup pack is to bring, and has not brought yet.
#[derive(Debug)]
struct Promised {
    /// Until when others wait for them.
    until: Instant,
    /// Guards the layers; held for short look-ups only.
    layers: Mutex<Vec<Digest>>,
}

/// Where layer indexes come from.
pub struct Indexes {
    dir: PathBuf,
    shared_store: Arc<SharedStore>,
    pools: Pools,
    cache: Arc<Cache>,
    blocks: Arc<Blocks>,
    /// Guards the digest of each layer's copy.
    known: Mutex<HashMap<Digest, ContentDigest>>,
    /// Guards the opened indexes; none is ever removed.
    opened: Mutex<HashMap<Digest, Opened>>,
    /// Guards the copies that are in memory, the oldest first.
    kept: Mutex<VecDeque<Arc<IndexCopy>>>,
    /// Guards which layers the store did not have, and when.
    absent: Mutex<LruCache<Digest, Instant>>,
    fetches: SingleFlight<Digest, Arc<LayerIndex>>,
    /// Guards what startup packs are to bring.
    promised: Mutex<Vec<Arc<Promised>>>,
}

/// Where the bytes of an index have been unpacked to.
enum Unpacked {
    Disk(ContentDigest, Sums),
    Memory(ContentDigest, Sums, Vec<u8>),
    Nowhere(u64),
}

impl Indexes {
    /// Indexes whose copies lie in `cache`, and the names of the copies in `dir`, which must exist.
    pub fn new(dir: PathBuf, shared_store: Arc<SharedStore>, pools: Pools, cache: Arc<Cache>) -> Indexes {
        let mut known = HashMap::new();
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some((layer, digest)) = name.to_str().and_then(parse_name) else {
                let _ = fs::remove_file(entry.path());
                continue;
            };
            // Earlier versions kept the copy itself under this name.
            if entry.metadata().is_ok_and(|meta| meta.len() > 0) {
                let adopted = cache.disk().adopt(&entry.path(), &digest).and_then(|()| name_copy(&entry.path()));
                if adopted.is_err() {
                    let _ = fs::remove_file(entry.path());
                    continue;
                }
            }
            known.insert(layer, digest);
        }
        Indexes {
            dir,
            shared_store,
            pools,
            cache,
            blocks: Arc::default(),
            known: Mutex::new(known),
            opened: Mutex::default(),
            kept: Mutex::default(),
            absent: Mutex::new(LruCache::new(ABSENT_MAX)),
            fetches: SingleFlight::default(),
            promised: Mutex::default(),
        }
    }

    /// Calls `done` with the layer's index, once its copy can be read on this host.
    pub fn load(self: &Arc<Self>, diff_id: Digest, deadline: Instant, done: Done<Arc<LayerIndex>>) {
        if self.fetches.join(diff_id, deadline, done) == Joined::First {
            let this = Arc::clone(self);
            self.pools.local.submit(Priority::Demand, move || {
                let _guard = this.fetches.guard(vec![diff_id]);
                if let Some(index) = this.open(&diff_id) {
                    return this.fetches.end(&diff_id, Ok(index));
                }
                this.fetch(diff_id);
            });
        }
    }

    /// Fetches an index from its own place, for those who wait for it.
    fn fetch(self: &Arc<Self>, diff_id: Digest) {
        let this = Arc::clone(self);
        self.pools.remote.submit(Priority::Demand, move || this.bring(diff_id));
    }

    /// Fetches an index, whose fetch was begun, on this thread.
    fn bring(&self, diff_id: Digest) {
        let _guard = self.fetches.guard(vec![diff_id]);
        self.fetches.end(&diff_id, self.obtain(diff_id));
    }

    /// Fails the waiters whose deadline has passed; returns their number.
    pub fn expire(self: &Arc<Self>, now: Instant) -> usize {
        self.give_up_promises(now);
        self.fetches.expire(now)
    }

    /// Removes the copies of layers that are not among `keep`, the layers of images, unless they were opened.
    pub fn sweep(&self, keep: &HashSet<Digest>) {
        let opened: HashSet<_> = self.opened.lock().keys().copied().collect();
        let is_gone = |layer: &Digest| !keep.contains(layer) && !opened.contains(layer);
        let gone: Vec<_> = self.known.lock().extract_if(|layer, _| is_gone(layer)).collect();
        for (layer, digest) in gone {
            let _ = fs::remove_file(self.path(&layer, &digest));
            self.cache.disk().remove(&digest);
        }
    }

    /// Whether the layer's index was opened, and its copy cannot be read now.
    pub fn is_lost(&self, diff_id: &Digest) -> bool {
        self.opened.lock().get(diff_id).is_some_and(|opened| opened.copy.is_lost())
    }

    /// How the copies of opened indexes are used, for the cache's eviction: those of the layers `in_use` are held.
    pub fn uses(&self, in_use: impl Fn(&Digest) -> bool) -> HashMap<ContentDigest, Use> {
        let opened = self.opened.lock();
        let used = opened.iter().filter_map(|(layer, opened)| {
            let was_read = opened.copy.was_read();
            match (in_use(layer), was_read) {
                (true, _) => Some((opened.copy.digest(), Use::Held)),
                (false, true) => Some((opened.copy.digest(), Use::Lately)),
                (false, false) => None,
            }
        });
        used.collect()
    }

    /// Notes that the store does not have a layer.
    pub fn note_absent(&self, diff_id: Digest, now: Instant) {
        self.absent.lock().put(diff_id, now);
    }

    /// Whether the store did not have a layer a moment ago.
    pub fn was_absent(&self, diff_id: &Digest, now: Instant) -> bool {
        self.absent.lock().peek(diff_id).is_some_and(|at| now.duration_since(*at) < ABSENT)
    }

    fn path(&self, diff_id: &Digest, digest: &ContentDigest) -> PathBuf {
        self.dir.join(format!("{}.{}", diff_id.hex(), digest.hex()))
    }

    /// The index, if its copy is on this host and whole.
    fn open(&self, diff_id: &Digest) -> Option<Arc<LayerIndex>> {
        let opened = self.opened.lock().get(diff_id).cloned();
        if let Some(opened) = opened.filter(|opened| !opened.copy.is_lost()) {
            return Some(opened.index);
        }
        let digest = self.known.lock().get(diff_id).copied()?;
        let found = self.cache.disk().open_object(&digest).and_then(|file| Sums::of_file(&file));
        match found {
            Ok((sums, found)) if found == digest => {
                self.cache.disk().touch(&digest);
                self.enter(*diff_id, digest, sums, None).ok()
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            _ => {
                self.shared_store.metrics().damaged_in_cache.one();
                tracing::warn!("the cached index of layer {diff_id} was damaged and is fetched again");
                self.cache.disk().remove(&digest);
                None
            }
        }
    }

    /// Fetches the index from the store, and makes a copy of it.
    fn obtain(&self, diff_id: Digest) -> Result<Arc<LayerIndex>> {
        let wanted = || self.fetches.is_wanted(&diff_id);
        let unpacked = self.shared_store.fetch(wanted, |store| self.unpack(&store.sealed_index(&diff_id)?))?;
        self.adopt(diff_id, unpacked)
    }

    /// Takes an index that has just been unpacked.
    fn adopt(&self, diff_id: Digest, unpacked: Unpacked) -> Result<Arc<LayerIndex>> {
        self.shared_store.metrics().indexes_fetched.one();
        match unpacked {
            Unpacked::Disk(digest, sums) => {
                self.name(&diff_id, &digest);
                self.enter(diff_id, digest, sums, None)
            }
            Unpacked::Memory(digest, sums, bytes) => {
                tracing::warn!("the index of layer {diff_id} stays in memory, for the local cache takes no copy");
                self.enter(diff_id, digest, sums, Some(bytes))
            }
            Unpacked::Nowhere(len) => {
                let (needed, room) = (format_size(len), format_size(self.cache.disk().limit()));
                tracing::error!(
                    "the index of layer {diff_id} takes {needed}, for which the local cache of {room} has no room: \
                     give it more with --cache-size"
                );
                Err(Failure::NoRoom)
            }
        }
    }

    fn unpack(&self, sealed: &SealedIndex) -> store::error::Result<Unpacked> {
        let (len, digest) = (sealed.raw_len(), sealed.digest());
        if self.cache.make_room_for(len) {
            let write = |file: &mut File| {
                let mut tee = Summing { sink: file, sums: Sums::default() };
                Ok(sealed.unpack_into(&mut tee)?.map(|()| tee.sums))
            };
            match self.cache.disk().write_in_steps(&digest, len, write)? {
                Ok(sums) => return Ok(Unpacked::Disk(digest, sums)),
                Err(error) => {
                    self.shared_store.metrics().cache_write_errors.one();
                    self.cache.disk().failed(&error);
                }
            }
        }
        if len > KEPT as u64 {
            return Ok(Unpacked::Nowhere(len));
        }
        let mut bytes = Vec::with_capacity(len as usize);
        let mut tee = Summing { sink: &mut bytes, sums: Sums::default() };
        let written = sealed.unpack_into(&mut tee)?;
        let sums = tee.sums;
        written.map_err(|error| store::Error::corrupt("a layer's index", error.to_string()))?;
        Ok(Unpacked::Memory(digest, sums, bytes))
    }

    /// Notes which layer a copy belongs to. If that fails, the index is fetched again after a restart.
    fn name(&self, diff_id: &Digest, digest: &ContentDigest) {
        let named = fs::DirBuilder::new().recursive(true).create(&self.dir);
        if let Err(error) = named.and_then(|()| name_copy(&self.path(diff_id, digest))) {
            self.shared_store.metrics().cache_write_errors.one();
            tracing::debug!("the copy of the index of layer {diff_id} has no name: {error}");
        }
        let previous = self.known.lock().insert(*diff_id, *digest).filter(|previous| previous != digest);
        if let Some(previous) = previous {
            let _ = fs::remove_file(self.path(diff_id, &previous));
        }
    }

    /// The index that belongs to a whole copy: a new one, or the opened one that had lost its copy.
    fn enter(
        &self,
        diff_id: Digest,
        digest: ContentDigest,
        sums: Sums,
        kept: Option<Vec<u8>>,
    ) -> Result<Arc<LayerIndex>> {
        let damaged = |error: store::Error| {
            tracing::error!("{error}");
            Failure::from(&error)
        };
        let is_kept = kept.is_some();
        let present = self.opened.lock().get(&diff_id).cloned();
        let opened = match present {
            Some(opened) if opened.copy.digest() == digest => {
                opened.copy.found(kept);
                opened
            }
            // The kernel knows inode numbers of the index that was opened before.
            Some(_) => {
                tracing::error!("the index of layer {diff_id} has changed in the store: mount again to read it");
                return Err(Failure::Damaged);
            }
            None => {
                let (blocks, disk) = (Arc::clone(&self.blocks), self.cache.shared_disk());
                let copy = Arc::new(IndexCopy::new(
                    diff_id,
                    digest,
                    sums,
                    kept,
                    blocks,
                    disk,
                    self.shared_store.shared_metrics(),
                ));
                let index = Arc::new(LayerIndex::paged(copy.clone()).map_err(damaged)?);
                if index.diff_id() != diff_id {
                    return Err(Failure::Damaged);
                }
                let opened = Opened { index, copy };
                self.opened.lock().entry(diff_id).or_insert(opened).clone()
            }
        };
        if is_kept {
            self.keep(&opened.copy);
        }
        Ok(opened.index)
    }

    /// Notes a copy that is in memory, and drops the oldest ones when they take more than [`KEPT`].
    fn keep(&self, copy: &Arc<IndexCopy>) {
        let mut kept = self.kept.lock();
        kept.retain(|other| !Arc::ptr_eq(other, copy) && other.kept_len() > 0);
        kept.push_back(Arc::clone(copy));
        let mut total: usize = kept.iter().map(|copy| copy.kept_len()).sum();
        while total > KEPT
            && let Some(oldest) = kept.pop_front()
        {
            total -= oldest.kept_len();
            oldest.let_go();
        }
    }
}

/// Passes bytes on, and notes the digests of their blocks.
struct Summing<'a, W> {
    sink: &'a mut W,
    sums: Sums,
}

impl<W: Write> Write for Summing<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.sink.write_all(bytes)?;
        self.sums.add(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

fn parse_name(name: &str) -> Option<(Digest, ContentDigest)> {
    let (layer, digest) = name.split_once('.')?;
    Some((Digest::from_hex(layer)?, ContentDigest::from_hex(digest)?))
}

/// Creates the empty file that says which layer a copy belongs to.
fn name_copy(path: &Path) -> io::Result<()> {
    File::options().write(true).create(true).truncate(true).mode(0o600).open(path).map(drop)
}

/// The BLAKE3 digest of a file's bytes.
pub fn hash_file(path: &Path) -> io::Result<ContentDigest> {
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

#[cfg(test)]
impl Indexes {
    /// Leaves nothing of indexes in memory.
    pub(crate) fn drop_blocks(&self) {
        self.blocks.clear();
    }
}

#[cfg(test)]
mod tests;
