//! Files of one piece, which lie in a cache file that is their whole chunk, or in one of their own.
//!
//! A chunk is compared with its digest as a whole before the first use of any of its files.

use std::sync::Arc;

use store::ContentDigest;
use store::chunk::{ChunkRef, Codec, RawChunk, VerifiedChunk};
use store::layer::Source;

use super::body::{CacheFile, PieceState};
use super::gather::Missing;
use super::{Cache, Content, PIECE};
use crate::failure::Result;

impl Cache {
    /// Fills `out` from the local cache, or says what is missing.
    pub(super) fn read_small(&self, content: &Content, offset: u64, out: &mut [u8]) -> Result<Vec<Missing>> {
        let piece = content.piece(0)?;
        let Source::Chunk { chunk, start, .. } = piece.source else {
            out.fill(0);
            return Ok(Vec::new());
        };
        let own = content.inode.content_digest();
        // What is open already is tried first: looking for a file that is not there costs a system call.
        let read = match (self.open_body(&chunk.digest), self.open_body(&own)) {
            (Some(body), _) => self.read_chunk(&chunk, &body, start, offset, out),
            (None, Some(body)) => self.read_piece(content, &body, 0, &piece, offset, out),
            (None, None) => false,
        };
        let read = read
            || self.chunk_body(&chunk).is_some_and(|body| self.read_chunk(&chunk, &body, start, offset, out))
            || self.body(content).is_some_and(|body| self.read_piece(content, &body, 0, &piece, offset, out));
        match read {
            true => Ok(Vec::new()),
            false => Ok(vec![Missing { number: 0, piece, chunk, start }]),
        }
    }

    /// A body that is in the table.
    fn open_body(&self, digest: &ContentDigest) -> Option<Arc<CacheFile>> {
        let body = self.shard(digest).lock().bodies.get(digest).cloned()?;
        body.touch();
        Some(body)
    }

    /// The cache file of a chunk, if there is one.
    pub(super) fn chunk_body(&self, chunk: &ChunkRef) -> Option<Arc<CacheFile>> {
        if let Some(body) = self.open_body(&chunk.digest) {
            return Some(body);
        }
        let body = self.disk.open_whole(&chunk.digest, chunk.raw_len.into(), 1)?;
        Some(self.insert(chunk.digest, body))
    }

    /// Copies a part of a file from its chunk's cache file; tells whether that could be done.
    fn read_chunk(&self, chunk: &ChunkRef, body: &Arc<CacheFile>, start: u32, offset: u64, out: &mut [u8]) -> bool {
        let at = u64::from(start) + offset;
        let read = match body.state(0) {
            PieceState::Absent => false,
            PieceState::Verified => body.read(out, at).is_ok(),
            PieceState::Present => {
                let mut whole = PIECE.take();
                whole.resize(chunk.raw_len as usize, 0);
                let good = body.read(&mut whole, 0).is_ok() && ContentDigest::of(&whole) == chunk.digest;
                let part = whole.get(at as usize..at as usize + out.len()).filter(|_| good);
                if let Some(part) = part {
                    out.copy_from_slice(part);
                    body.verified(0);
                }
                let copied = part.is_some();
                PIECE.set(whole);
                copied
            }
        };
        match read {
            true => self.metrics().bytes_from_cache.add(out.len() as u64),
            false => self.drop_damaged_file(&chunk.digest, body),
        }
        read
    }

    /// A chunk of small files, from its cache file.
    pub(super) fn cached_chunk(&self, chunk: &ChunkRef) -> Option<VerifiedChunk> {
        let body = self.chunk_body(chunk)?;
        let mut bytes = vec![0; chunk.raw_len as usize];
        body.read(&mut bytes, 0).ok()?;
        RawChunk::new(ChunkRef { codec: Codec::Plain, ..*chunk }, bytes).verify().ok()
    }

    /// Keeps a chunk of small files.
    pub(super) fn keep_chunk(&self, chunk: &ChunkRef, bytes: &VerifiedChunk) -> std::io::Result<()> {
        if self.disk.has(&chunk.digest) {
            return Ok(());
        }
        let body = CacheFile::whole(self.disk.write_whole(&chunk.digest, bytes.bytes())?, 1);
        body.verified(0);
        self.insert(chunk.digest, body);
        Ok(())
    }

    /// Whether a small file's bytes seem to be here.
    pub(super) fn has_small(&self, content: &Content, chunk: &ChunkRef) -> bool {
        self.disk.has(&chunk.digest) || self.disk.has(&content.inode.content_digest())
    }
}
