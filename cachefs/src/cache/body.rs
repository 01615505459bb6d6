//! One open cache file, and what is known of its pieces.
//!
//! What is known belongs to the open descriptor: whoever opens the path again starts without trust. A file that was removed
//! or replaced under its name goes on serving those who hold it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::disk::Form;

/// What is known of one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PieceState {
    /// Its bytes are not here.
    Absent,
    /// Bytes are here, and were not compared with the digest yet.
    Present,
    /// The right bytes are here.
    Verified,
}

/// One bit a piece. Relaxed is enough: a verified bit is set after a read that has ended, and stays true.
struct Bits(Box<[AtomicU64]>);

impl Bits {
    fn new(len: u32) -> Bits {
        Bits((0..len.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn get(&self, bit: u32) -> bool {
        self.0.get(bit as usize / 64).is_some_and(|word| word.load(Ordering::Acquire) >> (bit % 64) & 1 == 1)
    }

    /// Sets a bit; tells whether it was clear.
    fn set(&self, bit: u32) -> bool {
        let mask = 1 << (bit % 64);
        self.0.get(bit as usize / 64).is_some_and(|word| word.fetch_or(mask, Ordering::AcqRel) & mask == 0)
    }

    /// Clears a bit; tells whether it was set.
    fn clear(&self, bit: u32) -> bool {
        let mask = 1 << (bit % 64);
        self.0.get(bit as usize / 64).is_some_and(|word| word.fetch_and(!mask, Ordering::AcqRel) & mask != 0)
    }
}

/// Nanoseconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

pub(super) struct CacheFile {
    file: File,
    partial: AtomicBool,
    verified: Bits,
    present: Bits,
    /// Pieces with bytes that are not here yet; only counted in a partial file.
    left: AtomicU32,
    used: AtomicU64,
}

impl CacheFile {
    /// A whole file of `pieces` pieces.
    pub(super) fn whole(file: File, pieces: u32) -> CacheFile {
        let (verified, present) = (Bits::new(pieces), Bits::new(0));
        CacheFile { file, partial: false.into(), verified, present, left: 0.into(), used: now().into() }
    }

    /// A partial file of `pieces` pieces: `here` of them seem to be here, `left` are not.
    pub(super) fn partial(file: File, pieces: u32, here: impl IntoIterator<Item = u32>, left: u32) -> CacheFile {
        let (verified, present) = (Bits::new(pieces), Bits::new(pieces));
        here.into_iter().for_each(|piece| _ = present.set(piece));
        CacheFile { file, partial: true.into(), verified, present, left: left.into(), used: now().into() }
    }

    pub(super) fn form(&self) -> Form {
        match self.partial.load(Ordering::Acquire) {
            true => Form::Partial,
            false => Form::Whole,
        }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Reads exactly `out`.
    pub(super) fn read(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(out, offset)
    }

    /// Has the system read a range into memory.
    pub(super) fn will_need(&self, offset: u64, len: u64) {
        let _ = posix_fadvise(&self.file, offset as i64, len as i64, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
    }

    pub(super) fn all_verified(&self, first: u32, last: u32) -> bool {
        (first..=last).all(|piece| self.verified.get(piece))
    }

    pub(super) fn state(&self, piece: u32) -> PieceState {
        match self.verified.get(piece) {
            true => PieceState::Verified,
            false if self.form() == Form::Whole || self.present.get(piece) => PieceState::Present,
            false => PieceState::Absent,
        }
    }

    /// Its bytes have been compared with the digest.
    pub(super) fn verified(&self, piece: u32) {
        self.verified.set(piece);
    }

    /// Its bytes turned out to be wrong.
    pub(super) fn absent(&self, piece: u32) {
        self.verified.clear(piece);
        if self.present.clear(piece) {
            self.left.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Verified bytes have been written; tells whether these were the last that lacked.
    pub(super) fn filled(&self, piece: u32) -> bool {
        self.verified.set(piece);
        self.present.set(piece) && self.left.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// The file has its whole form's name now.
    pub(super) fn completed(&self) {
        self.partial.store(false, Ordering::Release);
    }

    pub(super) fn touch(&self) {
        self.used.store(now(), Ordering::Relaxed);
    }

    /// Leaves the time of last use in the file's mtime, so that eviction after a restart knows it.
    pub(super) fn remember_use(&self) {
        super::disk::remember_use(&self.file, self.last_used());
    }

    pub(super) fn last_used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }
}

impl Drop for CacheFile {
    fn drop(&mut self) {
        self.remember_use();
    }
}
