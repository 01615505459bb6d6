//! Through a layer's chunks in the order of its tar.
//!
//! An index says in which chunk a file lies, not which files lie in a chunk; but inodes are numbered in the order of the
//! tar, so walking them meets the chunks in order, each with a file that it fills.

use std::ops::Range;
use std::sync::Arc;

use store::layer::{InodeIndex, LayerIndex, Source};

use super::Content;
use super::extents::extents;
use super::fetch::Order;
use super::gather::Missing;

/// Inodes that are looked at for one read-ahead, at most: directories full of links hold nothing to read.
const STEPS: u32 = 4096;
/// Chunks of one step of a stream: about what one request takes.
const BATCH: usize = 8;

pub(super) struct Walk {
    index: Arc<LayerIndex>,
    inode: u32,
    piece: u32,
    /// One bit a chunk that was met.
    met: Vec<u64>,
    /// Met, but not given out yet.
    pending: Vec<Order>,
}

impl Walk {
    /// Starts at a piece of the inode with that number.
    pub(super) fn new(index: Arc<LayerIndex>, inode: u32, piece: u32) -> Walk {
        let met = vec![0; index.chunk_count().div_ceil(64) as usize];
        Walk { index, inode, piece, met, pending: Vec::new() }
    }

    /// Notes a chunk; tells whether it is new.
    fn meet(&mut self, chunk: u32) -> bool {
        let Some(word) = self.met.get_mut(chunk as usize / 64) else { return false };
        let mask = 1 << (chunk % 64);
        let is_new = *word & mask == 0;
        *word |= mask;
        is_new
    }

    /// The next chunk that was not met before, with its number, looking at no inode from `end` on.
    fn next(&mut self, end: u32) -> Option<(u32, Order)> {
        while self.inode < end {
            // Damage shows itself to whoever reads the file.
            let inode = self.index.inode(InodeIndex(self.inode)).ok()?;
            while self.piece < inode.piece_count() {
                let number = self.piece;
                self.piece += 1;
                let piece = self.index.piece(&inode, number).ok()?;
                let Source::Chunk { number: in_layer, chunk, start } = piece.source else { continue };
                if self.meet(in_layer) {
                    let content = Content { index: Arc::clone(&self.index), number: InodeIndex(self.inode), inode };
                    return Some((in_layer, Order::of_layer(content, Missing { number, piece, chunk, start })));
                }
            }
            self.inode += 1;
            self.piece = 0;
        }
        None
    }

    /// The chunks whose numbers lie in `range`.
    pub(super) fn within(mut self, range: Range<u32>) -> Vec<Order> {
        let end = self.inode.saturating_add(STEPS).min(self.index.inode_count());
        let mut found = Vec::new();
        while found.len() < range.len()
            && let Some((number, order)) = self.next(end)
        {
            if range.contains(&number) {
                found.push(order);
            }
        }
        found
    }

    /// What is left of the file that the walk started in.
    pub(super) fn rest_of_file(mut self) -> Vec<Order> {
        let end = self.inode + 1;
        std::iter::from_fn(|| self.next(end)).map(|(_, order)| order).collect()
    }

    /// The next chunks that come with one request.
    pub(super) fn next_extent(&mut self) -> Option<Vec<Order>> {
        let end = self.index.inode_count();
        while self.pending.len() < BATCH
            && let Some((_, order)) = self.next(end)
        {
            self.pending.push(order);
        }
        let mut cut = extents(std::mem::take(&mut self.pending), |order| &order.chunk).into_iter();
        let next = cut.next();
        self.pending = cut.flatten().collect();
        next
    }
}
