//! File content, read through the local disk.
//!
//! A read whose bytes are in the local cache is answered at once, on the caller's thread. Holes need no bytes at all.
//! Otherwise the pool fetches the chunk of each missing piece, once for all readers that want it, and the thread that
//! brings the last piece answers the read. The answer never waits for a write to the local disk: the chunk is written
//! into the cache afterwards.
//!
//! No byte leaves here unverified. A chunk from the store is checked by [`store::chunk`]. A piece from the local cache
//! is compared with its BLAKE3 digest before its first use through an open descriptor, and counts as verified for the
//! life of that descriptor. So torn writes, crashes and bad disks need no further care: a piece that does not match is
//! fetched again.
//!
//! A file of several pieces has a cache file of its own. From a startup pack it may get some blocks of a piece; what the
//! others contribute to the piece's digest lies beside them, so that these too are compared with it. A file of one piece
//! shares its chunk with its neighbours in the layer, and the cache file holds that chunk: one cache file for some
//! dozens of small files, which are mostly wanted together. Startup packs are cut differently, and passthrough needs each small file by itself. Such small
//! files have cache files of their own too, which are used when the cache does not have the chunk.
//!
//! - `content`: a file whose content is read.
//! - `cache_file`: one open cache file and what is known of its pieces.
//! - `disk`: the files themselves.
//! - `eviction`: which cache files are evicted first; pure.
//! - `extents`: which chunks are fetched with one request; pure.
//! - `ahead`: how much to read ahead of the demand; pure.
//! - `startup`: startup packs in use.
//! - `pending_read`: a read that waits for pieces.
//! - `request`: chunks to fetch, and streams of them.
//! - `walk`: a layer's chunks in order.
//! - `completions`: files that are completed in the background.
//! - `state`: the cache's parts and locks.
//! - `small`: files of one piece.
//! - `fill`: writes fetched chunks into cache files.
//! - `fetch`: fetches from the shared store, on demand and ahead of it.
//! - `room`: makes room by eviction.
//! - `whole`: complete files, which the kernel reads by itself.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Instant;

use store::ContentDigest;
use store::blocks::{BLOCK, Blocks, VALUE_LEN};
use store::layer::{Piece, Source};

use crate::source::failure::Result;

mod ahead;
pub mod cache_file;
mod completions;
mod content;
pub mod disk;
pub mod eviction;
pub mod extents;
mod fetch;
mod fill;
mod pending_read;
mod request;
mod room;
mod small;
pub mod startup;
mod state;
mod walk;
pub mod whole;

use cache_file::{CacheFile, PieceState};
use pending_read::{Missing, PendingRead};

pub use content::Content;
use state::PIECE;
pub use state::{Cache, DESCRIPTORS, Prefetch};

thread_local! {
    /// The buffer that hits are read into; reads of a FUSE thread are at most 1 MiB.
    static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

impl Cache {
    /// Calls `done` with up to `len` bytes of a file from `offset` on: at once if they are at hand, else from the
    /// thread that brings the last missing piece.
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
                let pending = PendingRead::new(buffer[..len].to_vec(), offset, missing.len(), done);
                self.fetch_all(&content, &missing, &pending);
            }
            Err(failure) => done(Err(failure)),
        }
        BUFFER.set(buffer);
    }

    /// Notes what a read touches, if a start is being recorded.
    fn record(&self, content: &Content, offset: u64, len: u64, missing: &[Missing]) {
        if len > 0 && self.recorder.is_recording() {
            let missed = |piece| missing.iter().any(|missing| missing.number == piece);
            let pieces = content.blocks_of(offset, len);
            self.recorder.touched(
                content.reader.as_ref(),
                &content.index,
                content.number,
                &content.inode,
                pieces,
                missed,
            );
        }
    }

    /// Wraps `done`: if a start is being recorded, the recorder first learns how long the read has waited.
    fn timed<F>(&self, content: &Content, done: F) -> impl FnOnce(Result<&[u8]>) + Send + 'static
    where
        F: FnOnce(Result<&[u8]>) + Send + 'static,
    {
        let recorder = self.recorder.is_recording().then(|| Arc::clone(&self.recorder));
        recorder.iter().for_each(|recorder| recorder.waits());
        let reader = content.reader;
        let (layer, number, asked) = (content.index.diff_id(), content.number, Instant::now());
        move |result: Result<&[u8]>| {
            if let Some(recorder) = recorder {
                recorder.waited(reader.as_ref(), &layer, number, asked.elapsed());
            }
            done(result);
        }
    }

    /// Fills `out` from the local cache, and returns the pieces that the cache lacks.
    fn read_local(&self, content: &Content, offset: u64, out: &mut [u8]) -> Result<Vec<Missing>> {
        if out.is_empty() {
            return Ok(Vec::new());
        }
        if content.inode.piece_count() == 1 {
            return self.read_small(content, offset, out);
        }
        let len = out.len() as u64;
        let cache_file = self.cache_file(content);
        let is_verified = |cache_file: &CacheFile| {
            let mut pieces = content.blocks_of(offset, len);
            pieces.all(|(number, needed)| cache_file.state(number, needed) == PieceState::Verified)
        };
        if cache_file.as_ref().is_some_and(|cache_file| is_verified(cache_file) && cache_file.read(out, offset).is_ok())
        {
            self.metrics().bytes_from_cache.add(len);
            return Ok(Vec::new());
        }
        let mut missing = Vec::new();
        for (number, needed) in content.blocks_of(offset, len) {
            let piece = content.piece(number)?;
            let Source::Chunk { chunk, start, .. } = piece.source else {
                pending_read::part(&piece, offset, out).1.fill(0);
                continue;
            };
            let here = cache_file
                .as_ref()
                .is_some_and(|cache_file| self.read_piece(content, cache_file, number, &piece, offset, out));
            if !here {
                missing.push(Missing::in_layer(number, piece, needed, chunk, start));
            }
        }
        Ok(missing)
    }

    /// Copies one piece's part of a read from the local cache; returns whether that could be done.
    fn read_piece(
        &self,
        content: &Content,
        cache_file: &Arc<CacheFile>,
        number: u32,
        piece: &Piece,
        offset: u64,
        out: &mut [u8],
    ) -> bool {
        let (skip, target) = pending_read::part(piece, offset, out);
        let needed = match target.len() {
            0 => Blocks::ALL,
            len => Blocks::of_range(skip as u32, (skip + len) as u32, piece.len),
        };
        let read = match cache_file.state(number, needed) {
            PieceState::Absent => return false,
            PieceState::Verified => cache_file.read(target, piece.offset + skip as u64).is_ok(),
            PieceState::Present => {
                let mut whole = PIECE.take();
                whole.resize(piece.len as usize, 0);
                let here = cache_file.here(number);
                let good = cache_file.read(&mut whole, piece.offset).is_ok()
                    && match here {
                        Blocks::ALL => ContentDigest::of(&whole) == piece.digest,
                        _ => is_part(content, cache_file, number, piece, here, &whole),
                    };
                if good {
                    target.copy_from_slice(&whole[skip..skip + target.len()]);
                    cache_file.verified(number, here, piece.len);
                }
                PIECE.set(whole);
                good
            }
        };
        if read {
            self.metrics().bytes_from_cache.add(target.len() as u64);
        } else {
            self.drop_damaged(content, cache_file, number);
        }
        read
    }
}

/// Whether the blocks `here` of a piece belong to it; `bytes` are the piece's, without the other blocks.
fn is_part(content: &Content, cache_file: &CacheFile, number: u32, piece: &Piece, here: Blocks, bytes: &[u8]) -> bool {
    let Ok(values) = disk::read_values(cache_file.file(), content.inode.size, number) else { return false };
    let block_of = |block: u32, len: usize| {
        let at = (block * BLOCK) as usize;
        bytes.get(at..at + len)
    };
    let value_of = |block: u32| values.chunks_exact(VALUE_LEN).nth(block as usize);
    here.matches(piece.len, &piece.digest, block_of, value_of)
}

#[cfg(test)]
mod tests;
