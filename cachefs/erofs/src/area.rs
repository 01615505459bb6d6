//! The image as it grows: it is appended to, and what was kept free is filled in later.
//!
//! Only its end is in memory. Directories are mostly written soon after their room was kept, so most of what is filled in is still
//! there.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::format::{BLOCK, SLOT};

/// How much of the end is in memory, bytes.
const WINDOW: usize = 1 << 20;

/// The image as it grows.
pub(crate) struct Area<'a> {
    file: &'a File,
    /// What is not written to the file yet, and where it begins.
    window: Vec<u8>,
    start: u64,
}

impl<'a> Area<'a> {
    pub(crate) fn new(file: &'a File) -> Area<'a> {
        Area { file, window: Vec::with_capacity(WINDOW), start: 0 }
    }

    pub(crate) fn len(&self) -> u64 {
        self.start + self.window.len() as u64
    }

    pub(crate) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.window.extend_from_slice(bytes);
        self.shrink()
    }

    /// Appends zeros.
    pub(crate) fn reserve(&mut self, len: u64) -> io::Result<()> {
        self.window.resize(self.window.len() + len as usize, 0);
        self.shrink()
    }

    /// Keeps whole blocks free, and returns where they begin.
    pub(crate) fn reserve_blocks(&mut self, len: u64) -> io::Result<u64> {
        let at = self.len().next_multiple_of(BLOCK);
        self.reserve(at - self.len() + len)?;
        Ok(at)
    }

    /// Moves on to where an inode can begin: `head` and `tail` each have to lie within one block, `between` need not.
    pub(crate) fn place(&mut self, head: u64, between: u64, tail: u64) -> io::Result<u64> {
        let crosses = |at: u64, len: u64| at % BLOCK + len > BLOCK;
        let mut at = self.len().next_multiple_of(SLOT);
        while crosses(at, head) || crosses(at + head + between, tail) {
            at += SLOT;
        }
        self.reserve(at - self.len())?;
        Ok(at)
    }

    /// Fills in what was kept free.
    pub(crate) fn patch(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let (before, inside) = bytes.split_at(self.start.saturating_sub(at).min(bytes.len() as u64) as usize);
        self.file.write_all_at(before, at)?;
        if !inside.is_empty() {
            let from = (at + before.len() as u64 - self.start) as usize;
            self.window[from..from + inside.len()].copy_from_slice(inside);
        }
        Ok(())
    }

    /// Writes the first half of a window that is full.
    fn shrink(&mut self) -> io::Result<()> {
        if self.window.len() >= WINDOW {
            let written = self.window.len() - WINDOW / 2;
            self.file.write_all_at(&self.window[..written], self.start)?;
            self.window.drain(..written);
            self.start += written as u64;
        }
        Ok(())
    }

    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.window, self.start)
    }
}
