//! Walks through a layer's chunks in the order of its tar.
//!
//! An index says in which chunk a file lies, not which files lie in a chunk. But inodes are numbered in the order of
//! the tar, so a walk over them meets the chunks in order, each with a file that it fills.

use std::ops::Range;
use std::sync::Arc;

use store::blocks::Blocks;
use store::layer::{InodeIndex, LayerIndex, Source};

use super::content::Content;
use super::extents::extents;
use super::pending_read::Missing;
use super::request::ChunkRequest;

/// The most inodes that one read-ahead looks at: directories full of links hold nothing to read.
const STEPS: u32 = 4096;
/// How many chunks one step of a stream looks at: about what one request takes.
const BATCH: usize = 8;

pub(super) struct Walk {
    index: Arc<LayerIndex>,
    inode: u32,
    piece: u32,
    /// One bit per chunk, set when the chunk was met.
    met: Vec<u64>,
    /// Chunks that were met but not returned yet.
    pending: Vec<ChunkRequest>,
}

impl Walk {
    /// Starts at a piece of the inode with that number.
    pub(super) fn new(index: Arc<LayerIndex>, inode: u32, piece: u32) -> Walk {
        let met = vec![0; index.chunk_count().div_ceil(64) as usize];
        Walk { index, inode, piece, met, pending: Vec::new() }
    }

    /// Notes a chunk; returns whether it is new.
    fn meet(&mut self, chunk: u32) -> bool {
        let Some(word) = self.met.get_mut(chunk as usize / 64) else { return false };
        let mask = 1 << (chunk % 64);
        let is_new = *word & mask == 0;
        *word |= mask;
        is_new
    }

    /// The next chunk that was not met before, with its number. Inodes from `end` on are not looked at.
    fn next(&mut self, end: u32) -> Option<(u32, ChunkRequest)> {
        while self.inode < end {
            // Damage ends the walk; whoever reads the file gets the error.
            let inode = self.index.inode(InodeIndex(self.inode)).ok()?;
            while self.piece < inode.piece_count() {
                let number = self.piece;
                self.piece += 1;
                let piece = self.index.piece(&inode, number).ok()?;
                let Source::Chunk { number: in_layer, chunk, start } = piece.source else { continue };
                if self.meet(in_layer) {
                    let content =
                        Content { index: Arc::clone(&self.index), number: InodeIndex(self.inode), inode, reader: None };
                    return Some((
                        in_layer,
                        ChunkRequest::of_layer(content, Missing::in_layer(number, piece, Blocks::ALL, chunk, start)),
                    ));
                }
            }
            self.inode += 1;
            self.piece = 0;
        }
        None
    }

    /// The chunks whose numbers lie in `range`.
    pub(super) fn within(mut self, range: Range<u32>) -> Vec<ChunkRequest> {
        let end = self.inode.saturating_add(STEPS).min(self.index.inode_count());
        let mut found = Vec::new();
        while found.len() < range.len()
            && let Some((number, request)) = self.next(end)
        {
            if range.contains(&number) {
                found.push(request);
            }
        }
        found
    }

    /// The remaining chunks of the file that the walk started in.
    pub(super) fn rest_of_file(mut self) -> Vec<ChunkRequest> {
        let end = self.inode + 1;
        std::iter::from_fn(|| self.next(end)).map(|(_, request)| request).collect()
    }

    /// The next chunks that can be fetched with one request.
    pub(super) fn next_extent(&mut self) -> Option<Vec<ChunkRequest>> {
        let end = self.index.inode_count();
        while self.pending.len() < BATCH
            && let Some((_, request)) = self.next(end)
        {
            self.pending.push(request);
        }
        let mut cut = extents(std::mem::take(&mut self.pending), |request| &request.chunk).into_iter();
        let next = cut.next();
        self.pending = cut.flatten().collect();
        next
    }
}
