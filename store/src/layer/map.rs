//! The one memory map of the crate.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use memmap2::{Mmap, UncheckedAdvice};

/// Maps a whole file for reading.
pub(super) fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: the file is an index in a host's own cache directory, written once under a temporary name, renamed into
    // place and never changed or truncated afterwards (only unlinked, which keeps the mapping valid). Bytes read
    // through the map are bounds-checked as untrusted input.
    unsafe { Mmap::map(file) }
}

/// Lets go of a map's pages: they count as this process's memory no more, and come back from the page cache when used.
pub(super) fn let_go(map: &Mmap) -> io::Result<()> {
    // SAFETY: the map is shared, read-only and backed by a file that does not change (see above), so a page that is read
    // again has the same bytes; nothing was ever written through it that could be lost.
    unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) }
}
