//! Startup packs in use: which pieces of files lie in one, and where.
//!
//! While an image's startup pack is being read, a piece that it holds is taken from there, by prefetching and by demand
//! alike, so that it is fetched once. Its bytes are trusted as little as any others: they are compared with the digest that the
//! layer's index has.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLock;
use store::chunk::ChunkRef;
use store::layer::Piece;
use store::profile::PieceKey;
use store::{ContentDigest, Digest};

use super::Content;

/// One piece in a startup pack.
#[derive(Clone)]
pub struct Held {
    /// Position of its layer in the chain, base first.
    pub layer: u16,
    /// The file.
    pub content: Content,
    /// The piece's number in it.
    pub number: u32,
    /// The piece.
    pub piece: Piece,
    /// First byte within the decompressed chunk.
    pub start: u32,
}

/// The startup pack of one image.
pub struct Startup {
    /// The image's top chainID.
    pub chain: Digest,
    chunks: Vec<ChunkRef>,
    held: Vec<Held>,
    /// The part of `held` in each chunk.
    ranges: Vec<Range<usize>>,
    /// Chunks whose pieces are in the local cache, or were there before.
    done: Vec<AtomicBool>,
    /// Chunks that were fetched.
    fetched: Vec<AtomicBool>,
    /// Chunks whose flights were reserved for what is read early.
    reserved: Vec<AtomicBool>,
}

impl Startup {
    /// The pack's chunks in order, and for each what it holds.
    pub fn new(chain: Digest, chunks: Vec<(ChunkRef, Vec<Held>)>) -> Startup {
        let mut startup = Startup {
            chain,
            chunks: Vec::with_capacity(chunks.len()),
            held: Vec::new(),
            ranges: Vec::with_capacity(chunks.len()),
            done: chunks.iter().map(|_| AtomicBool::new(false)).collect(),
            reserved: chunks.iter().map(|_| AtomicBool::new(false)).collect(),
            fetched: chunks.iter().map(|_| AtomicBool::new(false)).collect(),
        };
        for (chunk, held) in chunks {
            let first = startup.held.len();
            startup.chunks.push(chunk);
            startup.held.extend(held);
            startup.ranges.push(first..startup.held.len());
        }
        startup
    }

    /// The pieces that it has brought so far, with their lengths.
    pub fn brought(&self) -> HashMap<PieceKey, u32> {
        let chunks = self.ranges.iter().zip(&self.fetched).filter(|(_, fetched)| fetched.load(Ordering::Acquire));
        let held = chunks.flat_map(|(range, _)| &self.held[range.clone()]);
        let key = |held: &Held| PieceKey { layer: held.layer, inode: held.content.number, piece: held.number };
        held.map(|held| (key(held), held.piece.len)).collect()
    }

    pub(super) fn chunks(&self) -> &[ChunkRef] {
        &self.chunks
    }

    pub(super) fn held_in(&self, position: u32) -> &[Held] {
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

    /// Whether a chunk's flight waits for what is read early; tells so once.
    pub(super) fn is_reserved(&self, position: u32) -> bool {
        self.reserved.get(position as usize).is_some_and(|reserved| reserved.swap(false, Ordering::AcqRel))
    }

    pub(super) fn fetched(&self, position: u32) {
        if let Some(fetched) = self.fetched.get(position as usize) {
            fetched.store(true, Ordering::Release);
        }
    }
}

/// A piece's place in a startup pack.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) startup: Arc<Startup>,
    pub(super) position: u32,
    pub(super) start: u32,
}

impl Place {
    pub(super) fn chunk(&self) -> Option<&ChunkRef> {
        self.startup.chunks.get(self.position as usize)
    }
}

/// The startup packs in use.
#[derive(Default)]
pub(super) struct Startups {
    /// Guards the table: looked at on misses only.
    places: RwLock<HashMap<(ContentDigest, u32), Place>>,
}

impl Startups {
    pub(super) fn add(&self, startup: &Arc<Startup>) {
        let mut places = self.places.write();
        for (position, range) in (0..).zip(&startup.ranges) {
            for held in &startup.held[range.clone()] {
                let place = Place { startup: Arc::clone(startup), position, start: held.start };
                places.entry((held.content.inode.content_digest(), held.number)).or_insert(place);
            }
        }
    }

    pub(super) fn remove(&self, startup: &Arc<Startup>) {
        self.places.write().retain(|_, place| !Arc::ptr_eq(&place.startup, startup));
    }

    pub(super) fn find(&self, digest: &ContentDigest, number: u32) -> Option<Place> {
        let places = self.places.read();
        if places.is_empty() { None } else { places.get(&(*digest, number)).cloned() }
    }
}
