//! File content, read through the local disk.
//!
//! A read is answered at once, on the caller's thread, when the local cache has its bytes; holes need no bytes at all.
//! Else each missing piece's chunk is fetched by the pool, once for all who want it, and the read is answered by whoever
//! brings the last piece. The answer never waits for the local disk: the chunk is written into the cache afterwards.
//!
//! No byte leaves here unverified. A chunk from the store is checked by [`store::chunk`]; a piece from the local cache is
//! compared with its BLAKE3 digest before its first use through one open descriptor, and remembered as verified as long
//! as that descriptor lives. So torn writes, crashes and bad disks need no further care: a piece that does not match
//! is fetched again.
//!
//! A file of several pieces is a cache file of its own. A file of one piece shares its chunk with its neighbours in the layer,
//! and that chunk is the cache file: one file for some dozens of small ones, which are mostly wanted together. Startup
//! packs are cut differently, and a mount that passes reads through needs small files by themselves: those are cache files
//! of their own too, and found when the chunk is not there.
//!
//! - `body`: one open cache file and what is known of its pieces.
//! - `disk`: the files themselves.
//! - `gather`: a read that waits for pieces.
//! - `small`: files of one piece.
//! - `extents`: which chunks come with one request; pure.
//! - `ahead`: how much to read ahead of the demand; pure.
//! - `startup`: startup packs in use.
//! - `walk`: a layer's chunks in order.
//! - `fetch`: from the shared store, on demand and ahead of it.
//! - `fill`: fetched chunks into the files.
//! - `eviction`: what goes first; pure.
//! - `room`: when that happens.
//! - `whole`: files that are here as a whole, for the kernel to read by itself.

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
use store::layer::{Inode, InodeIndex, LayerIndex, Piece, Source};

use crate::failure::{Failure, Result};
use crate::metrics::Metrics;
use crate::origin::Origin;
use crate::pool::Pools;
use crate::recorder::Recorder;
use crate::single_flight::Flights;

mod ahead;
mod body;
pub mod disk;
pub mod eviction;
pub mod extents;
mod fetch;
mod fill;
mod gather;
pub mod room;
mod small;
pub mod startup;
mod walk;
pub mod whole;

use ahead::Ahead;
use body::{CacheFile, PieceState};
use disk::{Disk, Form};
use gather::{Missing, PendingRead};
use room::Users;
use startup::Startups;
use whole::Completions;

/// Open descriptors of cache files, at most. The process's limit may be 20,000, and others need some.
pub const DESCRIPTORS: usize = 4096;
/// Locks that share the tables: enough that FUSE workers hardly meet.
const SHARDS: usize = 32;
/// Fetched chunks that wait in memory to be written into the cache; beyond it their fetchers write them at once.
const BACKLOG: usize = 32;
/// Chunks that stay in memory while the local disk takes nothing.
const UNWRITTEN: NonZeroUsize = NonZeroUsize::new(16).expect("not zero");

/// A regular file of a layer.
#[derive(Clone)]
pub struct Content {
    /// The layer's index.
    pub index: Arc<LayerIndex>,
    /// The file's number in it.
    pub number: InodeIndex,
    /// The file's inode.
    pub inode: Inode,
}

impl Content {
    fn piece(&self, number: u32) -> Result<Piece> {
        self.index.piece(&self.inode, number).map_err(|error| {
            tracing::error!("{error}");
            Failure::from(&error)
        })
    }

    fn piece_size(&self) -> u64 {
        self.index.header().piece_size.into()
    }
}

/// Whether more than what was asked for is brought into the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Prefetch {
    /// What lies behind a miss, what earlier starts of an image needed, and whole layers when much of them is read.
    On,
    /// Nothing.
    Off,
}

impl Prefetch {
    /// As flags and files spell it.
    pub fn name(self) -> &'static str {
        match self {
            Prefetch::On => "on",
            Prefetch::Off => "off",
        }
    }
}

struct Shard {
    opens: HashMap<ContentDigest, u32>,
    bodies: LruCache<ContentDigest, Arc<CacheFile>>,
}

/// The local read-through cache.
pub struct Cache {
    origin: Arc<Origin>,
    pools: Pools,
    disk: Arc<Disk>,
    prefetch: Prefetch,
    recorder: Arc<Recorder>,
    /// Each guards a part of the tables; never held during I/O.
    shards: [Mutex<Shard>; SHARDS],
    flights: Flights<ContentDigest, Arc<VerifiedChunk>>,
    /// Guards the last chunks that the disk did not take: many small files lie in one.
    unwritten: Mutex<LruCache<ContentDigest, Arc<VerifiedChunk>>>,
    startups: Startups,
    /// Guards what was missed lately.
    ahead: Mutex<Ahead>,
    /// Guards whether the evictor has work.
    crowded: Mutex<bool>,
    wake_evictor: Condvar,
    /// Held while files are evicted: of two at once, both would remove what one needs.
    evicting: Mutex<()>,
    users: OnceLock<Users>,
    completions: Completions,
}

thread_local! {
    /// Where hits are read into: a FUSE worker's reads are at most 1 MiB.
    static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    /// Where a piece is read into to be verified.
    static PIECE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

impl Cache {
    /// A cache on `disk` in front of `origin`, which keeps at most `descriptors` files open.
    pub fn new(
        origin: Arc<Origin>,
        pools: Pools,
        disk: Disk,
        descriptors: usize,
        prefetch: Prefetch,
        recorder: Arc<Recorder>,
    ) -> Cache {
        let per_shard = NonZeroUsize::new(descriptors.min(DESCRIPTORS) / SHARDS).unwrap_or(NonZeroUsize::MIN);
        let shard = |_| Mutex::new(Shard { opens: HashMap::new(), bodies: LruCache::new(per_shard) });
        Cache {
            origin,
            pools,
            disk: Arc::new(disk),
            prefetch,
            recorder,
            shards: std::array::from_fn(shard),
            flights: Flights::default(),
            unwritten: Mutex::new(LruCache::new(UNWRITTEN)),
            startups: Startups::default(),
            ahead: Mutex::default(),
            crowded: Mutex::new(false),
            wake_evictor: Condvar::new(),
            evicting: Mutex::default(),
            users: OnceLock::new(),
            completions: Completions::default(),
        }
    }

    /// The files.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// The same, to be held by what outlives a call.
    pub fn shared_disk(&self) -> Arc<Disk> {
        Arc::clone(&self.disk)
    }

    /// Asks `users` before each eviction; once in a cache's life.
    pub fn ask_before_evicting(&self, users: Users) {
        let _ = self.users.set(users);
    }

    /// Counters, shared with everything that reads.
    pub fn metrics(&self) -> &Metrics {
        self.origin.metrics()
    }

    fn shard(&self, digest: &ContentDigest) -> &Mutex<Shard> {
        &self.shards[usize::from(digest.as_bytes()[0]) % SHARDS]
    }

    /// Whether more than what was asked for is brought.
    pub fn prefetching(&self) -> Prefetch {
        self.prefetch
    }

    /// Counts one more open file description: its content is not evicted.
    pub fn opened(&self, content: &Content) {
        for digest in self.names(content) {
            *self.shard(&digest).lock().opens.entry(digest).or_default() += 1;
        }
    }

    /// Counts one less.
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
    fn names(&self, content: &Content) -> impl Iterator<Item = ContentDigest> + use<> {
        let own = content.inode.content_digest();
        let chunk = match content.inode.piece_count() {
            1 => content.piece(0).ok().and_then(|piece| piece.source.chunk()).map(|chunk| chunk.digest),
            _ => None,
        };
        std::iter::once(own).chain(chunk.filter(|chunk| *chunk != own))
    }

    /// Tells those who waited too long.
    pub fn expire(&self, now: Instant) -> usize {
        self.flights.expire(now)
    }

    /// Whether nothing is being fetched or written.
    pub fn is_settled(&self) -> bool {
        self.flights.is_empty() && self.completions.is_empty()
    }

    /// Calls `done` with up to `len` bytes of a file from `offset` on: here and now if they are at hand.
    pub fn read<F>(self: &Arc<Self>, content: Content, offset: u64, len: usize, done: F)
    where
        F: FnOnce(Result<&[u8]>) + Send + 'static,
    {
        let len = content.inode.size.saturating_sub(offset).min(len as u64) as usize;
        let mut buffer = BUFFER.take();
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        match self.read_local(&content, offset, &mut buffer[..len]) {
            Ok(missing) if missing.is_empty() => {
                self.metrics().reads_hit.one();
                self.record(&content, offset, len as u64, &missing);
                done(Ok(&buffer[..len]));
            }
            Ok(missing) => {
                self.metrics().reads_missed.one();
                self.record(&content, offset, len as u64, &missing);
                let done = self.timed(&content, done);
                let gather = PendingRead::new(buffer[..len].to_vec(), offset, missing.len(), done);
                self.fetch_all(&content, &missing, &gather);
            }
            Err(failure) => done(Err(failure)),
        }
        BUFFER.set(buffer);
    }

    /// Notes what a read touches, if a start is being recorded.
    fn record(&self, content: &Content, offset: u64, len: u64, missing: &[Missing]) {
        if len > 0 && self.recorder.is_recording() {
            let (first, last) = (offset / content.piece_size(), (offset + len - 1) / content.piece_size());
            let missed = |piece| missing.iter().any(|missing| missing.number == piece);
            let pieces = first as u32..=last as u32;
            self.recorder.touched(&content.index, content.number, &content.inode, pieces, missed);
        }
    }

    /// `done`, and before it the recorder is told how long that took.
    fn timed<F>(&self, content: &Content, done: F) -> impl FnOnce(Result<&[u8]>) + Send + 'static
    where
        F: FnOnce(Result<&[u8]>) + Send + 'static,
    {
        let recorder = self.recorder.is_recording().then(|| Arc::clone(&self.recorder));
        let (layer, number, asked) = (content.index.diff_id(), content.number, Instant::now());
        move |result: Result<&[u8]>| {
            if let Some(recorder) = recorder {
                recorder.waited(&layer, number, asked.elapsed());
            }
            done(result);
        }
    }

    /// Fills `out` with what is at hand; gives what is not.
    fn read_local(&self, content: &Content, offset: u64, out: &mut [u8]) -> Result<Vec<Missing>> {
        if out.is_empty() {
            return Ok(Vec::new());
        }
        if content.inode.piece_count() == 1 {
            return self.read_small(content, offset, out);
        }
        let first = (offset / content.piece_size()) as u32;
        let last = ((offset + out.len() as u64 - 1) / content.piece_size()) as u32;
        let body = self.body(content);
        if body.as_ref().is_some_and(|body| body.all_verified(first, last) && body.read(out, offset).is_ok()) {
            self.metrics().bytes_from_cache.add(out.len() as u64);
            return Ok(Vec::new());
        }
        let mut missing = Vec::new();
        for number in first..=last {
            let piece = content.piece(number)?;
            let Source::Chunk { chunk, start, .. } = piece.source else {
                gather::part(&piece, offset, out).1.fill(0);
                continue;
            };
            let here = body.as_ref().is_some_and(|body| self.read_piece(content, body, number, &piece, offset, out));
            if !here {
                missing.push(Missing { number, piece, chunk, start });
            }
        }
        Ok(missing)
    }

    /// Copies one piece's part of a read from the local cache; tells whether that could be done.
    fn read_piece(
        &self,
        content: &Content,
        body: &Arc<CacheFile>,
        number: u32,
        piece: &Piece,
        offset: u64,
        out: &mut [u8],
    ) -> bool {
        let (skip, target) = gather::part(piece, offset, out);
        let read = match body.state(number) {
            PieceState::Absent => return false,
            PieceState::Verified => body.read(target, piece.offset + skip as u64).is_ok(),
            PieceState::Present => {
                let mut whole = PIECE.take();
                whole.resize(piece.len as usize, 0);
                let good = body.read(&mut whole, piece.offset).is_ok() && ContentDigest::of(&whole) == piece.digest;
                if good {
                    target.copy_from_slice(&whole[skip..skip + target.len()]);
                    body.verified(number);
                }
                PIECE.set(whole);
                good
            }
        };
        if read {
            self.metrics().bytes_from_cache.add(target.len() as u64);
        } else {
            self.drop_damaged(content, body, number);
        }
        read
    }

    /// A cached piece does not match: a whole file goes, in a partial one only the piece.
    fn drop_damaged(&self, content: &Content, body: &Arc<CacheFile>, number: u32) {
        match body.form() {
            Form::Partial => {
                self.complain(&content.inode.content_digest());
                body.absent(number);
            }
            Form::Whole => self.drop_damaged_file(&content.inode.content_digest(), body),
        }
    }

    /// A whole cache file does not match.
    fn drop_damaged_file(&self, digest: &ContentDigest, body: &Arc<CacheFile>) {
        self.complain(digest);
        if self.forget(digest, body) {
            self.disk.remove(digest);
        }
    }

    fn complain(&self, digest: &ContentDigest) {
        self.metrics().damaged_in_cache.one();
        tracing::warn!("the local cache's copy of {} was damaged and is fetched again", digest.hex());
    }

    /// The cache file of a file's content, if there is one.
    fn body(&self, content: &Content) -> Option<Arc<CacheFile>> {
        let digest = content.inode.content_digest();
        if let Some(body) = self.shard(&digest).lock().bodies.get(&digest) {
            body.touch();
            return Some(Arc::clone(body));
        }
        let body = self.disk.open(content)?;
        Some(self.insert(digest, body))
    }

    /// Puts a freshly opened body into the table, unless another thread was faster; gives the one in the table.
    fn insert(&self, digest: ContentDigest, body: CacheFile) -> Arc<CacheFile> {
        let body = Arc::new(body);
        let mut shard = self.shard(&digest).lock();
        if let Some(present) = shard.bodies.get(&digest) {
            return Arc::clone(present);
        }
        let pushed_out = shard.bodies.push(digest, Arc::clone(&body));
        drop(shard);
        drop(pushed_out);
        body
    }

    /// Takes a body out of the table, unless another one has its place by now; tells whether it was there.
    fn forget(&self, digest: &ContentDigest, body: &Arc<CacheFile>) -> bool {
        let mut shard = self.shard(digest).lock();
        let present = shard.bodies.peek(digest).is_some_and(|present| Arc::ptr_eq(present, body));
        let taken = if present { shard.bodies.pop(digest) } else { None };
        drop(shard);
        taken.is_some()
    }
}

#[cfg(test)]
mod tests;
