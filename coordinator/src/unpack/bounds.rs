//! How much one layer may ask for: a layer comes from a stranger.
//!
//! Each bound is far above what images have, and is the reason why memory, time and room stay within what is said here:
//!
//! - Memory: 32 MiB a layer, for [`SMALL_INDEX`] bounds what is kept of its entries. Beyond, one layer at a time goes on
//!   ([`wait_for_place`]), and needs some 200 bytes for each entry, its names and attributes, and 300 bytes for each
//!   256 KiB of content. Bytes of content, and those that nobody needs, are never kept.
//! - Time: in proportion to the stream, and to [`HOLES_MAX`] and [`STEPS_EACH`], which are what a few bytes can ask for.
//! - Room: what the stream holds, and an index in proportion to it ([`store::layer::INDEX_MAX`]).

use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use store::layer::{INDEX_BASE, INDEX_FACTOR, INDEX_MAX, INODES_MAX, LayerTree, NAMES_MAX};
use tokio_util::sync::CancellationToken;

/// PAX and GNU headers of one entry are refused beyond this many bytes in all, as by Go's reader each.
pub(super) const SPECIAL_MAX: u64 = 1 << 20;
/// Bytes that mean nothing and are only kept for the tar's sake, in all of a layer: the content of whiteouts, and what follows
/// the archive's end.
pub(super) const UNUSED_MAX: u64 = 64 << 20;
/// Bytes of holes in all of a layer's sparse files: they are hashed, four gigabytes a second.
pub(super) const HOLES_MAX: u64 = 16 << 30;
/// Ranges of all of a layer's sparse files.
pub(super) const RANGES_MAX: u64 = 1 << 20;
/// Extended attributes of one inode, and their bytes: names and values. The kernel lists at most 64 KiB of names, and a value has
/// at most 64 KiB.
pub(super) const XATTRS_MAX: usize = 512;
pub(super) const XATTR_BYTES_MAX: usize = 128 << 10;
/// A name of an attribute, and a value: the kernel's limits.
pub(super) const XATTR_NAME_MAX: usize = 255;
pub(super) const XATTR_VALUE_MAX: usize = 64 << 10;
/// Names that may be looked up for all paths of a layer, on the average of its entries and besides: a chain of symbolic links can make
/// a path of two names as long as eighty thousand.
pub(super) const STEPS_EACH: u64 = 256;
pub(super) const STEPS_BASE: u64 = 1 << 20;
/// Entries of a layer. Each file has one; the rest are what makes no file, such as marks of opaque directories.
pub(super) const ENTRIES_MAX: usize = 2 * INODES_MAX as usize;
/// No layer has more pieces of content: 512 GiB.
pub(super) const PIECES_MAX: u64 = 2 << 20;
/// A layer whose index is longer waits until no other one is as large.
pub(super) const SMALL_INDEX: u64 = 16 << 20;
/// How often whoever waits looks whether it shall stop.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Whether a layer's index is within bounds after `read` bytes of its tar. The error completes the sentence "its entry ...".
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

/// Guards whether a large layer is being unpacked. It is of the whole process, as its memory is.
static LARGE: Mutex<bool> = Mutex::new(false);
static LARGE_ENDED: Condvar = Condvar::new();

/// The place of the one large layer.
#[derive(Debug)]
pub(super) struct LargePlace(());

impl Drop for LargePlace {
    fn drop(&mut self) {
        *LARGE.lock() = false;
        LARGE_ENDED.notify_one();
    }
}

/// Waits for the place of the one large layer. None: it shall stop.
pub(super) fn wait_for_place(stop: &CancellationToken) -> Option<LargePlace> {
    let mut taken = LARGE.lock();
    while *taken {
        if stop.is_cancelled() {
            return None;
        }
        LARGE_ENDED.wait_for(&mut taken, LOOK_AGAIN);
    }
    *taken = true;
    Some(LargePlace(()))
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
