//! What the cache is made of: its parts, their locks, and the table of open cache files.

use std::cell::Cell;
use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use clap::ValueEnum;
use lru::LruCache;
use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};
use store::ContentDigest;
use store::chunk::VerifiedChunk;

use super::ahead::Ahead;
use super::cache_file::{CacheFile, Form};
use super::completions::Completions;
use super::content::Content;
use super::disk::Disk;
use super::eviction::Users;
use super::request::Fetch;
use super::startup::Startups;
use crate::os::pool::Pools;
use crate::source::metrics::Metrics;
use crate::source::shared_store::SharedStore;
use crate::source::single_flight::SingleFlight;
use crate::uplink::recorder::Recorder;

/// The most cache files that are kept open. The process's limit may be 20,000 descriptors, and others need some.
pub const DESCRIPTORS: usize = 4096;
/// Locks among which the tables are divided: enough that FUSE threads rarely contend.
const SHARDS: usize = 32;
/// How many fetched chunks may wait in memory to be written into the cache. Beyond that, the thread that has a chunk
/// writes it at once.
pub(super) const BACKLOG: usize = 32;
/// How many chunks stay in memory while the local disk takes nothing.
const UNWRITTEN: NonZeroUsize = NonZeroUsize::new(16).expect("not zero");

/// Whether more than what was asked for is fetched into the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Prefetch {
    /// What lies behind a miss, what earlier starts of an image needed, and whole layers when much of them is read.
    On,
    /// Nothing.
    Off,
}

impl Prefetch {
    /// The name in flags and configuration files.
    pub fn name(self) -> &'static str {
        match self {
            Prefetch::On => "on",
            Prefetch::Off => "off",
        }
    }
}

pub(super) struct Shard {
    pub(super) opens: HashMap<ContentDigest, u32>,
    pub(super) cache_files: LruCache<ContentDigest, Arc<CacheFile>>,
}

/// The local read-through cache.
pub struct Cache {
    pub(super) shared_store: Arc<SharedStore>,
    pub(super) pools: Pools,
    pub(super) disk: Arc<Disk>,
    pub(super) prefetch: Prefetch,
    pub(super) recorder: Arc<Recorder>,
    /// Each guards a part of the tables; never held during I/O.
    pub(super) shards: [Mutex<Shard>; SHARDS],
    pub(super) fetches: SingleFlight<Fetch, Arc<VerifiedChunk>>,
    /// Guards the last chunks that the disk did not take: many small files lie in one.
    pub(super) unwritten: Mutex<LruCache<ContentDigest, Arc<VerifiedChunk>>>,
    pub(super) startups: Startups,
    /// Guards the recent misses.
    pub(super) ahead: Mutex<Ahead>,
    /// Guards whether the evictor has work.
    pub(super) crowded: Mutex<bool>,
    /// Guards when a start has evicted in vain.
    pub(super) evicted_nothing: Mutex<Option<Instant>>,
    pub(super) wake_evictor: Condvar,
    /// Held during an eviction: two at once would each remove what a single one needs to.
    pub(super) evicting: Mutex<()>,
    pub(super) users: OnceLock<Users>,
    pub(super) completions: Completions,
}

thread_local! {
    /// The buffer that a piece is read into to be verified.
    pub(super) static PIECE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

impl Cache {
    /// A cache on `disk` in front of `shared_store`, which keeps at most `descriptors` files open.
    pub fn new(
        shared_store: Arc<SharedStore>,
        pools: Pools,
        disk: Disk,
        descriptors: usize,
        prefetch: Prefetch,
        recorder: Arc<Recorder>,
    ) -> Cache {
        let per_shard = NonZeroUsize::new(descriptors.min(DESCRIPTORS) / SHARDS).unwrap_or(NonZeroUsize::MIN);
        let shard = |_| Mutex::new(Shard { opens: HashMap::new(), cache_files: LruCache::new(per_shard) });
        Cache {
            shared_store,
            pools,
            disk: Arc::new(disk),
            prefetch,
            recorder,
            shards: std::array::from_fn(shard),
            fetches: SingleFlight::default(),
            unwritten: Mutex::new(LruCache::new(UNWRITTEN)),
            startups: Startups::default(),
            ahead: Mutex::default(),
            crowded: Mutex::new(false),
            evicted_nothing: Mutex::default(),
            wake_evictor: Condvar::new(),
            evicting: Mutex::default(),
            users: OnceLock::new(),
            completions: Completions::default(),
        }
    }

    /// The cache files on the disk.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// The cache files on the disk, for holders that outlive a call.
    pub fn shared_disk(&self) -> Arc<Disk> {
        Arc::clone(&self.disk)
    }

    /// Sets whom to ask before each eviction. Only the first call in a cache's life counts.
    pub fn ask_before_evicting(&self, users: Users) {
        let _ = self.users.set(users);
    }

    /// Counters, shared with everything that reads.
    pub fn metrics(&self) -> &Metrics {
        self.shared_store.metrics()
    }

    pub(super) fn shard(&self, digest: &ContentDigest) -> &Mutex<Shard> {
        &self.shards[usize::from(digest.as_bytes()[0]) % SHARDS]
    }

    /// Whether more than what was asked for is fetched.
    pub fn prefetching(&self) -> Prefetch {
        self.prefetch
    }

    /// Counts one more open file description: its content is not evicted.
    pub fn opened(&self, content: &Content) {
        for digest in self.names(content) {
            *self.shard(&digest).lock().opens.entry(digest).or_default() += 1;
        }
    }

    /// Counts one open file description less.
    pub fn closed(&self, content: &Content) {
        for digest in self.names(content) {
            let mut shard = self.shard(&digest).lock();
            if let Some(count) = shard.opens.get_mut(&digest) {
                *count -= 1;
                if *count == 0 {
                    shard.opens.remove(&digest);
                }
            }
        }
    }

    /// The cache files that may hold a file's content.
    pub(super) fn names(&self, content: &Content) -> impl Iterator<Item = ContentDigest> + use<> {
        let own = content.inode.content_digest();
        let chunk = match content.inode.piece_count() {
            1 => content.piece(0).ok().and_then(|piece| piece.source.chunk()).map(|chunk| chunk.digest),
            _ => None,
        };
        std::iter::once(own).chain(chunk.filter(|chunk| *chunk != own))
    }

    /// Fails the waiters whose deadline has passed; returns their number.
    pub fn expire(&self, now: Instant) -> usize {
        self.fetches.expire(now)
    }

    /// Whether nothing is being fetched or written.
    pub fn is_settled(&self) -> bool {
        self.fetches.is_empty() && self.completions.is_empty()
    }

    /// Drops a cached piece that does not match its digest: a whole file is removed, in a partial one only the piece
    /// counts as missing.
    pub(super) fn drop_damaged(&self, content: &Content, cache_file: &Arc<CacheFile>, number: u32) {
        match cache_file.form() {
            Form::Partial => {
                self.complain(&content.inode.content_digest());
                cache_file.absent(number);
            }
            Form::Whole => self.drop_damaged_file(&content.inode.content_digest(), cache_file),
        }
    }

    /// Removes a whole cache file that does not match its digest.
    pub(super) fn drop_damaged_file(&self, digest: &ContentDigest, cache_file: &Arc<CacheFile>) {
        self.complain(digest);
        if self.forget(digest, cache_file) {
            self.disk.remove(digest);
        }
    }

    pub(super) fn complain(&self, digest: &ContentDigest) {
        self.metrics().damaged_in_cache.one();
        tracing::warn!("the local cache's copy of {} was damaged and is fetched again", digest.hex());
    }

    /// The cache file of a file's content, if there is one.
    pub(super) fn cache_file(&self, content: &Content) -> Option<Arc<CacheFile>> {
        let digest = content.inode.content_digest();
        if let Some(cache_file) = self.shard(&digest).lock().cache_files.get(&digest) {
            cache_file.touch();
            return Some(Arc::clone(cache_file));
        }
        let cache_file = self.disk.open(content)?;
        Some(self.insert(digest, cache_file))
    }

    /// Puts a freshly opened cache file into the table, unless another thread was faster; returns the one in the table.
    pub(super) fn insert(&self, digest: ContentDigest, cache_file: CacheFile) -> Arc<CacheFile> {
        let cache_file = Arc::new(cache_file);
        let mut shard = self.shard(&digest).lock();
        if let Some(present) = shard.cache_files.get(&digest) {
            return Arc::clone(present);
        }
        let pushed_out = shard.cache_files.push(digest, Arc::clone(&cache_file));
        drop(shard);
        drop(pushed_out);
        cache_file
    }

    /// Takes a cache file out of the table, unless another one has taken its place; returns whether it was there.
    pub(super) fn forget(&self, digest: &ContentDigest, cache_file: &Arc<CacheFile>) -> bool {
        let mut shard = self.shard(digest).lock();
        let present = shard.cache_files.peek(digest).is_some_and(|present| Arc::ptr_eq(present, cache_file));
        let taken = if present { shard.cache_files.pop(digest) } else { None };
        drop(shard);
        taken.is_some()
    }
}
