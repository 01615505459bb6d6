//! Files of one piece. Each lies in a cache file that holds its whole chunk, or in one of its own.
//!
//! A chunk is compared with its digest as a whole before the first use of any of its files.

use std::sync::Arc;

use store::ContentDigest;
use store::blocks::Blocks;
use store::chunk::{ChunkRef, Codec, RawChunk, VerifiedChunk};
use store::layer::Source;

use super::cache_file::{CacheFile, PieceState};
use super::content::Content;
use super::pending_read::Missing;
use super::state::{Cache, PIECE};
use crate::source::failure::Result;

impl Cache {
    /// Fills `out` from the local cache, or returns what is missing.
    pub(super) fn read_small(&self, content: &Content, offset: u64, out: &mut [u8]) -> Result<Vec<Missing>> {
        let piece = content.piece(0)?;
        let Source::Chunk { chunk, start, .. } = piece.source else {
            out.fill(0);
            return Ok(Vec::new());
        };
        let own = content.inode.content_digest();
        // Open cache files are tried first: looking for a file that is not there costs a system call.
        let read = match (self.open_cache_file(&chunk.digest), self.open_cache_file(&own)) {
            (Some(cache_file), _) => self.read_chunk(&chunk, &cache_file, start, offset, out),
            (None, Some(cache_file)) => self.read_piece(content, &cache_file, 0, &piece, offset, out),
            (None, None) => false,
        };
        let read = read
            || self
                .chunk_file(&chunk)
                .is_some_and(|cache_file| self.read_chunk(&chunk, &cache_file, start, offset, out))
            || self
                .cache_file(content)
                .is_some_and(|cache_file| self.read_piece(content, &cache_file, 0, &piece, offset, out));
        if read { Ok(Vec::new()) } else { Ok(vec![Missing::in_layer(0, piece, Blocks::ALL, chunk, start)]) }
    }

    /// The cache file of this digest, if it is open already.
    fn open_cache_file(&self, digest: &ContentDigest) -> Option<Arc<CacheFile>> {
        let cache_file = self.shard(digest).lock().cache_files.get(digest).cloned()?;
        cache_file.touch();
        Some(cache_file)
    }

    /// The cache file of a chunk, if there is one.
    pub(super) fn chunk_file(&self, chunk: &ChunkRef) -> Option<Arc<CacheFile>> {
        if let Some(cache_file) = self.open_cache_file(&chunk.digest) {
            return Some(cache_file);
        }
        let cache_file = self.disk.open_whole(&chunk.digest, chunk.raw_len.into(), 1)?;
        Some(self.insert(chunk.digest, cache_file))
    }

    /// Copies a part of a file from its chunk's cache file; returns whether that could be done.
    fn read_chunk(
        &self,
        chunk: &ChunkRef,
        cache_file: &Arc<CacheFile>,
        start: u32,
        offset: u64,
        out: &mut [u8],
    ) -> bool {
        let at = u64::from(start) + offset;
        let read = match cache_file.state(0, Blocks::ALL) {
            PieceState::Absent => false,
            PieceState::Verified => cache_file.read(out, at).is_ok(),
            PieceState::Present => {
                let mut whole = PIECE.take();
                whole.resize(chunk.raw_len as usize, 0);
                let good = cache_file.read(&mut whole, 0).is_ok() && ContentDigest::of(&whole) == chunk.digest;
                let part = whole.get(at as usize..at as usize + out.len()).filter(|_| good);
                if let Some(part) = part {
                    out.copy_from_slice(part);
                    cache_file.verified(0, Blocks::ALL, chunk.raw_len);
                }
                let copied = part.is_some();
                PIECE.set(whole);
                copied
            }
        };
        if read {
            self.metrics().bytes_from_cache.add(out.len() as u64)
        } else {
            self.drop_damaged_file(&chunk.digest, cache_file)
        }
        read
    }

    /// Reads a chunk of small files from its cache file, verified.
    pub(super) fn cached_chunk(&self, chunk: &ChunkRef) -> Option<VerifiedChunk> {
        let cache_file = self.chunk_file(chunk)?;
        let mut bytes = vec![0; chunk.raw_len as usize];
        cache_file.read(&mut bytes, 0).ok()?;
        RawChunk::new(ChunkRef { codec: Codec::Plain, ..*chunk }, bytes).verify().ok()
    }

    /// Writes a chunk of small files into the cache, unless it is there.
    pub(super) fn keep_chunk(&self, chunk: &ChunkRef, bytes: &VerifiedChunk) -> std::io::Result<()> {
        if self.disk.has(&chunk.digest) {
            return Ok(());
        }
        let cache_file = CacheFile::whole(self.disk.write_whole(&chunk.digest, bytes.bytes())?, 1);
        cache_file.verified(0, Blocks::ALL, chunk.raw_len);
        self.insert(chunk.digest, cache_file);
        Ok(())
    }

    /// Whether a small file's bytes seem to be here.
    pub(super) fn has_small(&self, content: &Content, chunk: &ChunkRef) -> bool {
        self.disk.has(&chunk.digest) || self.disk.has(&content.inode.content_digest())
    }
}
