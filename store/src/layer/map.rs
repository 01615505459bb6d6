//! The one memory map of the crate.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use memmap2::Mmap;

/// Maps a whole file for reading.
pub(super) fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: the file is an index in a host's own cache directory, written once under a temporary name, renamed into
    // place and never changed or truncated afterwards (only unlinked, which keeps the mapping valid). Bytes read
    // through the map are bounds-checked as untrusted input.
    unsafe { Mmap::map(file) }
}
