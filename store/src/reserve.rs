//! Disk space set aside for small writes when the shared disk is full.
//!
//! Freeing space needs space: `remove` and `gc` each write a generation of the catalogue, a move into the trash may
//! take a directory's block, and a coordinator that takes over needs a lease. So a store has a file `reserve` of
//! [`RESERVE_BYTES`], really written, with bytes that no file system compresses away. A small write that meets a full
//! disk removes the file and is tried once more. The leader writes it again when several times its size is free.
//!
//! Large writes (layers, packs) never use it: they are what fills the disk.

use std::fs;
use std::path::Path;

use nix::sys::statvfs::statvfs;

use crate::durable::replace_synced;
use crate::error::{Error, Result};
use crate::layout::Layout;

/// Size of the reserve, bytes: enough for many small generations, or for one whole state of some thousand images.
pub const RESERVE_BYTES: u64 = 2 << 20;
/// The reserve is made only if this many times its size is free.
const ROOM: u64 = 4;

/// Does a small write that must succeed. If the disk is full, removes the reserve and does the write once more.
pub(crate) fn with_reserve<T>(layout: &Layout, work: impl Fn() -> Result<T>) -> Result<T> {
    match work() {
        Err(Error::Full { .. }) => {
            // Another write may have freed the reserve just now: then there is room all the same.
            let _ = fs::remove_file(layout.reserve());
            work()
        }
        result => result,
    }
}

/// Makes the reserve if it is missing or incomplete and there is room. Returns whether it is there now.
pub(crate) fn keep(layout: &Layout) -> Result<bool> {
    let path = layout.reserve();
    if fs::metadata(&path).is_ok_and(|status| status.len() == RESERVE_BYTES) {
        return Ok(true);
    }
    if free(layout.root())? < RESERVE_BYTES * ROOM {
        return Ok(false);
    }
    forget_attempts(layout);
    let mut bytes = vec![0; RESERVE_BYTES as usize];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    match replace_synced(&path, &bytes) {
        Ok(()) => Ok(true),
        Err(Error::Full { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes temporary files of attempts that a crash interrupted.
fn forget_attempts(layout: &Layout) {
    let entries = fs::read_dir(layout.root()).into_iter().flatten().flatten();
    let left = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("reserve."));
    left.for_each(|entry| _ = fs::remove_file(entry.path()));
}

/// Free bytes that unprivileged users can use.
fn free(path: &Path) -> Result<u64> {
    let status = statvfs(path).map_err(|e| Error::io("look up the free space of", path, e.into()))?;
    Ok(status.blocks_available().saturating_mul(status.fragment_size()))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn what_is_kept_is_given_free_once_for_a_write_that_finds_the_disk_full() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        assert!(keep(&layout).unwrap());
        assert_eq!(fs::metadata(layout.reserve()).unwrap().len(), RESERVE_BYTES);
        let tries = Cell::new(0);
        let full = || Err(Error::Full { path: layout.root().to_owned() });
        let written = with_reserve(&layout, || {
            tries.set(tries.get() + 1);
            if layout.reserve().exists() { full() } else { Ok(7) }
        });
        assert_eq!((written.unwrap(), tries.get()), (7, 2));
        assert!(matches!(with_reserve(&layout, full), Err(Error::Full { .. })), "not for ever");
        fs::write(dir.path().join("reserve.0123.tmp"), b"a crash left it").unwrap();
        assert!(keep(&layout).unwrap(), "and kept again");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(with_reserve(&layout, || Err::<(), _>(Error::corrupt("x", "y"))).is_err());
        assert!(layout.reserve().exists(), "only a full disk costs it");
    }
}
