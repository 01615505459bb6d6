//! A file whose content is read.

use std::sync::Arc;

use store::Digest;
use store::blocks::Blocks;
use store::layer::{Inode, InodeIndex, LayerIndex, Piece};

use crate::source::failure::{Failure, Result};

/// A regular file of a layer.
#[derive(Clone)]
pub struct Content {
    /// The layer's index.
    pub index: Arc<LayerIndex>,
    /// The file's number in it.
    pub number: InodeIndex,
    /// The file's inode.
    pub inode: Inode,
    /// The chain whose native tree it is read through, if it is.
    pub reader: Option<Digest>,
}

impl Content {
    pub(super) fn piece(&self, number: u32) -> Result<Piece> {
        self.index.piece(&self.inode, number).map_err(|error| {
            tracing::error!("{error}");
            Failure::from(&error)
        })
    }

    /// The pieces that hold `len` bytes of the file from `offset` on, each with the blocks that do.
    pub(super) fn blocks_of(&self, offset: u64, len: u64) -> impl Iterator<Item = (u32, Blocks)> + Clone + use<> {
        let (size, piece_size) = (self.inode.size, u64::from(self.index.header().piece_size));
        let end = offset.saturating_add(len).min(size);
        let pieces = offset / piece_size..end.div_ceil(piece_size);
        pieces.map(move |number| {
            let begin = number * piece_size;
            let piece_len = (size - begin).min(piece_size) as u32;
            let (from, to) = (offset.saturating_sub(begin), (end - begin).min(piece_size));
            (number as u32, Blocks::of_range(from as u32, to as u32, piece_len))
        })
    }
}
