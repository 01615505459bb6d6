//! Startup packs in use: which pieces of files lie in one, and where.
//!
//! While an image's startup pack is being read, prefetching and demand alike take the pieces that it holds from there,
//! so that each is fetched once. Its bytes are not trusted more than any others: they are compared with the digest in
//! the layer's index. Pieces that it only names are prefetched from their layers afterwards.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use store::blocks::Blocks;
use store::chunk::ChunkRef;
use store::layer::Piece;
use store::profile::PieceKey;
use store::{ContentDigest, Digest};

use super::content::Content;

/// How many pieces that are only named are asked for at a time.
const STEP: usize = 64;

/// One piece that a start needs.
#[derive(Clone)]
pub struct NeededPiece {
    /// Position of its layer in the chain, base first.
    pub layer: u16,
    /// The file.
    pub content: Content,
    /// The piece's number in it.
    pub number: u32,
    /// The piece.
    pub piece: Piece,
    /// What is needed of it.
    pub blocks: Blocks,
}

/// One piece in a startup pack, which holds what is needed of it.
#[derive(Clone)]
pub struct PackedPiece {
    /// The piece.
    pub needed: NeededPiece,
    /// First byte of the packed piece within the decompressed chunk.
    pub start: u32,
}

/// The startup pack of one image.
pub struct Startup {
    /// The image's top chainID.
    pub chain: Digest,
    chunks: Vec<ChunkRef>,
    held: Vec<PackedPiece>,
    /// For each chunk, its part of `held`.
    ranges: Vec<Range<usize>>,
    /// Chunks that need no fetch any more: their pieces are in the local cache, or the fetch has failed.
    done: Vec<AtomicBool>,
    /// Chunks that were fetched.
    fetched: Vec<AtomicBool>,
    /// Chunks whose fetches are reserved for the early read.
    reserved: Vec<AtomicBool>,
    /// The pieces that it only names, in order, and how many of them have been asked for.
    named: Vec<NeededPiece>,
    asked: AtomicUsize,
    /// Guards when a chunk came last.
    came: Mutex<Instant>,
}

impl Startup {
    /// A startup pack of these chunks in order, each with the pieces that it holds, and the pieces that it only names.
    pub fn new(chain: Digest, chunks: Vec<(ChunkRef, Vec<PackedPiece>)>, named: Vec<NeededPiece>) -> Startup {
        let mut startup = Startup {
            chain,
            chunks: Vec::with_capacity(chunks.len()),
            held: Vec::new(),
            came: Mutex::new(Instant::now()),
            ranges: Vec::with_capacity(chunks.len()),
            done: chunks.iter().map(|_| AtomicBool::new(false)).collect(),
            reserved: chunks.iter().map(|_| AtomicBool::new(false)).collect(),
            fetched: chunks.iter().map(|_| AtomicBool::new(false)).collect(),
            named,
            asked: AtomicUsize::new(0),
        };
        for (chunk, held) in chunks {
            let first = startup.held.len();
            startup.chunks.push(chunk);
            startup.held.extend(held);
            startup.ranges.push(first..startup.held.len());
        }
        startup
    }

    /// The pieces that were fetched because of it so far, with their blocks and the lengths of the whole pieces in bytes.
    pub fn brought(&self) -> HashMap<PieceKey, (Blocks, u32)> {
        let chunks = self.ranges.iter().zip(&self.fetched).filter(|(_, fetched)| fetched.load(Ordering::Acquire));
        let held = chunks.flat_map(|(range, _)| &self.held[range.clone()]).map(|held| &held.needed);
        let named = self.named.iter().take(self.asked.load(Ordering::Acquire));
        let entry = |needed: &NeededPiece| {
            let key = PieceKey { layer: needed.layer, inode: needed.content.number, piece: needed.number };
            (key, (needed.blocks, needed.piece.len))
        };
        held.chain(named).map(entry).collect()
    }

    /// The next pieces that are only named, at most [`STEP`]; none after the last one.
    pub(super) fn next_named(&self) -> &[NeededPiece] {
        let from = self.asked.fetch_add(STEP, Ordering::AcqRel).min(self.named.len());
        &self.named[from..(from + STEP).min(self.named.len())]
    }

    pub(super) fn chunks(&self) -> &[ChunkRef] {
        &self.chunks
    }

    pub(super) fn held_in(&self, position: u32) -> &[PackedPiece] {
        self.ranges.get(position as usize).and_then(|range| self.held.get(range.clone())).unwrap_or_default()
    }

    pub(super) fn is_done(&self, position: u32) -> bool {
        self.done.get(position as usize).is_none_or(|done| done.load(Ordering::Acquire))
    }

    pub(super) fn finish(&self, position: u32) {
        if let Some(done) = self.done.get(position as usize) {
            done.store(true, Ordering::Release);
        }
    }

    pub(super) fn reserve(&self, position: u32) {
        if let Some(reserved) = self.reserved.get(position as usize) {
            reserved.store(true, Ordering::Release);
        }
    }

    /// Takes back the reservation of a chunk for the early read; returns whether there was one.
    pub(super) fn take_reservation(&self, position: u32) -> bool {
        self.reserved.get(position as usize).is_some_and(|reserved| reserved.swap(false, Ordering::AcqRel))
    }

    /// Whether nothing has come for this long.
    pub(super) fn is_silent(&self, long: Duration) -> bool {
        self.came.lock().elapsed() >= long
    }

    pub(super) fn fetched(&self, position: u32) {
        *self.came.lock() = Instant::now();
        if let Some(fetched) = self.fetched.get(position as usize) {
            fetched.store(true, Ordering::Release);
        }
    }
}

/// A piece's place in a startup pack.
#[derive(Clone)]
pub(super) struct PackPosition {
    pub(super) startup: Arc<Startup>,
    pub(super) position: u32,
    pub(super) start: u32,
    pub(super) blocks: Blocks,
}

impl PackPosition {
    pub(super) fn chunk(&self) -> Option<&ChunkRef> {
        self.startup.chunks.get(self.position as usize)
    }
}

/// The startup packs in use.
#[derive(Default)]
pub(super) struct Startups {
    /// Guards the table: looked at on misses only. Packs of several images may hold a piece, with other blocks each.
    places: RwLock<HashMap<(ContentDigest, u32), Vec<PackPosition>>>,
}

impl Startups {
    pub(super) fn add(&self, startup: &Arc<Startup>) {
        let mut places = self.places.write();
        for (position, range) in (0..).zip(&startup.ranges) {
            for held in &startup.held[range.clone()] {
                let (startup, start, needed) = (Arc::clone(startup), held.start, &held.needed);
                let blocks = needed.blocks;
                let places = places.entry((needed.content.inode.content_digest(), needed.number)).or_default();
                if !places.iter().any(|place| place.blocks.contains(blocks)) {
                    places.push(PackPosition { startup, position, start, blocks });
                }
            }
        }
    }

    pub(super) fn remove(&self, startup: &Arc<Startup>) {
        self.places.write().retain(|_, places| {
            places.retain(|place| !Arc::ptr_eq(&place.startup, startup));
            !places.is_empty()
        });
    }

    /// A place that holds these blocks of a piece.
    pub(super) fn find(&self, digest: &ContentDigest, number: u32, needed: Blocks) -> Option<PackPosition> {
        let places = self.places.read();
        if places.is_empty() {
            return None;
        }
        places.get(&(*digest, number))?.iter().find(|place| place.blocks.contains(needed)).cloned()
    }
}
