//! Writes fetched chunks into the cache's files.

use std::io;
use std::sync::Arc;

use store::ContentDigest;
use store::blocks::Blocks;
use store::chunk::VerifiedChunk;
use store::layer::{Inode, Piece};

use super::cache_file::Form;
use super::content::Content;
use super::pending_read::Missing;
use super::request::{ChunkRequest, Filling};
use super::startup::{PackedPiece, Startup};
use super::state::Cache;

impl Cache {
    /// Writes what a chunk fills; returns whether it was written.
    pub(super) fn fill(&self, request: &ChunkRequest, chunk: &VerifiedChunk) -> bool {
        let accepts = self.disk.accepts() || request.is_of_startup() && self.make_room_at_start();
        let filled = match &request.filling {
            _ if !accepts => Ok(()),
            Filling::Layer(wanted) => self.fill_from_layer(&wanted.0, &wanted.1, chunk),
            Filling::Startup(startup, position) => self.fill_from_startup(startup, *position, chunk),
        };
        match &filled {
            Ok(()) if accepts => self.disk.works(),
            Ok(()) => {}
            Err(error) => {
                self.metrics().cache_write_errors.one();
                self.disk.failed(error);
            }
        }
        if self.disk.is_crowded() {
            self.make_room();
        }
        accepts && filled.is_ok()
    }

    fn fill_from_startup(&self, startup: &Arc<Startup>, position: u32, chunk: &VerifiedChunk) -> io::Result<()> {
        for PackedPiece { needed, start } in startup.held_in(position) {
            let digest = needed.content.inode.content_digest();
            let Some(packed) = chunk.piece(*start, needed.blocks.packed_len(needed.piece.len)) else { continue };
            match needed.content.inode.piece_count() {
                1 if self.disk.has(&digest) => {}
                1 => drop(self.disk.write_whole(&digest, packed)?),
                _ => self.fill_piece(&needed.content, needed.number, &needed.piece, needed.blocks, packed)?,
            }
        }
        startup.finish(position);
        Ok(())
    }

    fn fill_from_layer(&self, content: &Content, missing: &Missing, chunk: &VerifiedChunk) -> io::Result<()> {
        match (content.inode.piece_count(), chunk.piece(missing.start, missing.piece.len)) {
            (1, _) => self.keep_chunk(&missing.chunk, chunk),
            (_, Some(bytes)) => self.fill_piece(content, missing.number, &missing.piece, Blocks::ALL, bytes),
            (_, None) => Ok(()),
        }
    }

    fn fill_piece(
        &self,
        content: &Content,
        number: u32,
        piece: &Piece,
        blocks: Blocks,
        packed: &[u8],
    ) -> io::Result<()> {
        let digest = content.inode.content_digest();
        let present = self.shard(&digest).lock().cache_files.get(&digest).cloned();
        let cache_file = match present {
            Some(cache_file) if cache_file.form() == Form::Whole => return Ok(()),
            Some(cache_file) => cache_file,
            None => match self.cache_file(content) {
                Some(cache_file) if cache_file.form() == Form::Whole => return Ok(()),
                Some(cache_file) => cache_file,
                None => self.insert(digest, self.disk.create_partial(content)?),
            },
        };
        if cache_file.here(number).contains(blocks) {
            return Ok(());
        }
        self.disk.write_piece(&cache_file, packed, piece, number, blocks, content.inode.size)?;
        if !cache_file.filled(number, blocks, piece.len) {
            return Ok(());
        }
        match self.disk.complete(&digest, &cache_file, content.inode.size) {
            Ok(()) => cache_file.completed(),
            // Somebody removed the file under its name: the next reader starts a new one.
            Err(error) if error.kind() == io::ErrorKind::NotFound => _ = self.forget(&digest, &cache_file),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    pub(super) fn write_small(&self, inode: &Inode, start: u32, chunk: &VerifiedChunk) -> io::Result<()> {
        let bytes = u32::try_from(inode.size).ok().and_then(|len| chunk.piece(start, len));
        match bytes {
            // An index whose digests disagree must not fill the cache with files that never verify.
            Some(bytes) if ContentDigest::of(bytes) == inode.content_digest() => {
                self.disk.write_whole(&inode.content_digest(), bytes).map(drop)
            }
            _ => Ok(()),
        }
    }
}
