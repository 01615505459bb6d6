//! How much one layer may ask for: layers come from strangers.
//!
//! Each bound is far above what real images need. Together they keep memory, time and disk space within these limits:
//!
//! - Memory: 32 MiB a layer, because [`SMALL_INDEX`] bounds what is kept of its entries. Beyond that, one layer at a time continues
//!   ([`wait_for_place`]). It needs some 200 bytes for each entry, its names and attributes, and 300 bytes for each 256 KiB of content.
//!   Bytes of content, and bytes that nobody needs, are never kept.
//! - Time: in proportion to the stream, and to [`HOLES_MAX`] and [`STEPS_EACH`], which bound what a few bytes can ask for.
//! - Disk space: what the stream holds, and an index in proportion to it ([`store::layer::INDEX_MAX`]).

use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use store::layer::{INDEX_BASE, INDEX_FACTOR, INDEX_MAX, INODES_MAX, LayerTree, NAMES_MAX};
use tokio_util::sync::CancellationToken;

/// The most bytes of one entry's PAX and GNU headers together. Go's reader has this limit for each header.
pub(super) const SPECIAL_MAX: u64 = 1 << 20;
/// The most bytes in one layer that mean nothing and are kept only to reproduce the tar: the content of whiteouts, and what follows the
/// archive's end.
pub(super) const UNUSED_MAX: u64 = 64 << 20;
/// The most bytes of holes in a layer's sparse files together. Holes are hashed, at four gigabytes a second.
pub(super) const HOLES_MAX: u64 = 16 << 30;
/// The most ranges of a layer's sparse files together.
pub(super) const RANGES_MAX: u64 = 1 << 20;
/// The most extended attributes of one inode, and the most bytes of their names and values. The kernel lists at most 64 KiB of names, and a
/// value has at most 64 KiB.
pub(super) const XATTRS_MAX: usize = 512;
pub(super) const XATTR_BYTES_MAX: usize = 128 << 10;
/// The kernel's limits for an attribute's name and value, in bytes.
pub(super) const XATTR_NAME_MAX: usize = 255;
pub(super) const XATTR_VALUE_MAX: usize = 64 << 10;
/// Name lookups that a layer's paths may take together: `STEPS_EACH` for each entry, and `STEPS_BASE` besides. A chain of symbolic links
/// can make a path of two names as long as eighty thousand.
pub(super) const STEPS_EACH: u64 = 256;
pub(super) const STEPS_BASE: u64 = 1 << 20;
/// The most entries of a layer. Each file has one; the rest are entries that make no file, such as marks of opaque directories.
pub(super) const ENTRIES_MAX: usize = 2 * INODES_MAX as usize;
/// The most pieces of content in a layer: 512 GiB.
pub(super) const PIECES_MAX: u64 = 2 << 20;
/// A layer with a larger index, in bytes, waits until no other layer is as large.
pub(super) const SMALL_INDEX: u64 = 16 << 20;
/// How often a waiting thread checks whether it should stop.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Checks that a layer's index is within bounds after `read` bytes of its tar. The error completes the sentence "its entry ...".
pub(super) fn check_index(tree: &LayerTree, len: u64, read: u64) -> Result<(), String> {
    if tree.len() as u64 > INODES_MAX {
        return Err(format!("is one too many: a layer can have {INODES_MAX} files and directories"));
    }
    if tree.names_len() > NAMES_MAX {
        let limit = NAMES_MAX >> 20;
        return Err(format!("gives the layer more than {limit} MiB of different names and extended attributes"));
    }
    if len > INDEX_MAX {
        return Err(format!("makes the layer's index larger than {} MiB", INDEX_MAX >> 20));
    }
    if len > INDEX_BASE + INDEX_FACTOR * read {
        Err(format!("makes the layer's index more than {INDEX_FACTOR} times as large as its tar"))
    } else {
        Ok(())
    }
}

/// Whether a large layer is being unpacked. Global to the process, as the memory is.
static LARGE: Mutex<bool> = Mutex::new(false);
static LARGE_ENDED: Condvar = Condvar::new();

/// The permit of the one large layer.
#[derive(Debug)]
pub(super) struct LargeLayerPermit(());

impl Drop for LargeLayerPermit {
    fn drop(&mut self) {
        *LARGE.lock() = false;
        LARGE_ENDED.notify_one();
    }
}

/// Waits for the permit of the one large layer. `None` if `stop` was cancelled.
pub(super) fn wait_for_place(stop: &CancellationToken) -> Option<LargeLayerPermit> {
    let mut taken = LARGE.lock();
    while *taken {
        if stop.is_cancelled() {
            return None;
        }
        LARGE_ENDED.wait_for(&mut taken, LOOK_AGAIN);
    }
    *taken = true;
    Some(LargeLayerPermit(()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_large_layer_at_a_time_and_nobody_waits_who_shall_stop() {
        let stop = CancellationToken::new();
        let place = wait_for_place(&stop).unwrap();
        let waiting = std::thread::spawn({
            let stop = stop.clone();
            move || wait_for_place(&stop).is_some()
        });
        let stopped = CancellationToken::new();
        stopped.cancel();
        assert!(wait_for_place(&stopped).is_none());
        drop(place);
        assert!(waiting.join().unwrap());
    }
}
