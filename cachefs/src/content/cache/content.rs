//! A file whose content is read.

use std::sync::Arc;

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
}

impl Content {
    pub(super) fn piece(&self, number: u32) -> Result<Piece> {
        self.index.piece(&self.inode, number).map_err(|error| {
            tracing::error!("{error}");
            Failure::from(&error)
        })
    }

    pub(super) fn piece_size(&self) -> u64 {
        self.index.header().piece_size.into()
    }
}
