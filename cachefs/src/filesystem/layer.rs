//! A layer by its slot, and how much of it the kernel knows.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, OnceLock};

use store::layer::LayerIndex;

use super::flat::FlatLayout;
use super::node::Slot;
use crate::source::failure::{Failure, Result};
use crate::source::layer_name::LayerName;

/// One directory of a layer: its slot, and the layer's index once that was loaded.
#[derive(Debug)]
pub struct Layer {
    /// Its name below `layers/`.
    pub name: LayerName,
    /// Its slot.
    pub slot: Slot,
    pub(super) index: OnceLock<Arc<LayerIndex>>,
    flat: OnceLock<FlatLayout>,
    pub(super) known: KernelReferences,
}

/// Counts how often the kernel was told of inodes of one layer or chain that it has not forgotten since. The kernel may
/// be told of an inode on one thread and forget it on another: then the number is off for a moment.
#[derive(Debug, Default)]
pub(super) struct KernelReferences(AtomicI64);

impl KernelReferences {
    pub(super) fn add(&self, count: i64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// Whether the kernel knows any inode.
    pub(super) fn is_any(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

impl Layer {
    /// The directory `name` in `slot`, without an index yet.
    pub(super) fn new(name: LayerName, slot: Slot) -> Layer {
        Layer { name, slot, index: OnceLock::new(), flat: OnceLock::new(), known: KernelReferences::default() }
    }

    /// The index. A listing shows node numbers in layers that nobody has looked up. A request for such a number fails
    /// with [`Failure::UnknownNode`], upon which the kernel looks up the name.
    pub fn index(&self) -> Result<&Arc<LayerIndex>> {
        self.index.get().ok_or(Failure::UnknownNode)
    }

    /// The layout of its data file. The first call reads all inodes.
    pub fn flat(&self) -> Result<&FlatLayout> {
        if let Some(flat) = self.flat.get() {
            return Ok(flat);
        }
        let flat = FlatLayout::of(self.index()?)?;
        Ok(self.flat.get_or_init(|| flat))
    }

    /// The same for somebody who needs to know where each inode's content begins: the data file's length in blocks, and the first block
    /// of each inode's content by the inode's number. Reads all inodes.
    pub(super) fn lay_out(&self) -> Result<(u64, Vec<u64>)> {
        let (flat, firsts) = FlatLayout::with_firsts(self.index()?)?;
        Ok((self.flat.get_or_init(|| flat).blocks(), firsts))
    }
}
