//! A layer by its slot, and how much of it the kernel knows.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, OnceLock};

use store::layer::{Inode, InodeIndex, LayerIndex};

use super::flat::FlatLayout;
use super::node::Slot;
use crate::source::failure::{Failure, Result, stored};
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
    /// Whether an earlier worker had opened it.
    is_resumed: bool,
}

/// Counts how often the kernel was told of inodes of one layer or chain that it has not forgotten since. The kernel may
/// be told of an inode on one thread and forget it on another: then the number is off for a moment.
#[derive(Debug)]
pub(super) enum KernelReferences {
    /// They are left to the next worker.
    Kept(&'static AtomicI64),
    /// They are this worker's alone.
    Own(AtomicI64),
}

impl KernelReferences {
    /// Those that are kept at `place`; without a place those of a slot that nobody has counted if an earlier worker has opened it, which
    /// are taken to be some.
    pub(super) fn at(place: Option<&'static AtomicI64>, is_resumed: bool) -> KernelReferences {
        place.map_or_else(|| KernelReferences::Own(AtomicI64::new(i64::from(is_resumed))), KernelReferences::Kept)
    }

    fn count(&self) -> &AtomicI64 {
        match self {
            KernelReferences::Kept(count) => count,
            KernelReferences::Own(count) => count,
        }
    }

    pub(super) fn add(&self, count: i64) {
        self.count().fetch_add(count, Ordering::Relaxed);
    }

    /// Whether the kernel knows any inode.
    pub(super) fn is_any(&self) -> bool {
        self.count().load(Ordering::Relaxed) > 0
    }
}

impl Layer {
    /// The directory `name` in `slot`, without an index yet. What the kernel knows of it is counted at `references`; `is_resumed` says
    /// whether an earlier worker had opened it.
    pub(super) fn new(name: LayerName, slot: Slot, references: Option<&'static AtomicI64>, is_resumed: bool) -> Layer {
        let known = KernelReferences::at(references, is_resumed);
        Layer { name, slot, index: OnceLock::new(), flat: OnceLock::new(), known, is_resumed }
    }

    /// Whether an earlier worker had opened it, and this one has not.
    pub(super) fn is_unopened(&self) -> bool {
        self.is_resumed && self.index.get().is_none()
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

/// The inode of a number that came from the kernel.
pub(super) fn stored_inode(index: &LayerIndex, number: InodeIndex) -> Result<Inode> {
    if number.0 < index.inode_count() { stored(index.inode(number)) } else { Err(Failure::UnknownNode) }
}
