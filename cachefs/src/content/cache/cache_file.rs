//! One open cache file, and what is known of its pieces.
//!
//! This knowledge belongs to the open descriptor: whoever opens the path again must verify the pieces anew. A file that
//! was removed, or replaced under its name, keeps serving those that hold it open.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The time of last use is written to the disk only if it is newer than the one there by this much, nanoseconds.
const USE_GRANULARITY: u64 = 600 * 1_000_000_000;

/// Whether a cache file has all its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// All bytes are there.
    Whole,
    /// Some pieces are missing: they are holes.
    Partial,
}

/// What is known of one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PieceState {
    /// Its bytes are missing.
    Absent,
    /// Its bytes are here, but were not compared with the digest yet.
    Present,
    /// Its bytes are here, and match the digest.
    Verified,
}

/// One bit per piece. Whoever sees a bit set also sees what the thread that set it had done before.
struct Bits(Box<[AtomicU64]>);

impl Bits {
    fn new(len: u32) -> Bits {
        Bits((0..len.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn get(&self, bit: u32) -> bool {
        self.0.get(bit as usize / 64).is_some_and(|word| word.load(Ordering::Acquire) >> (bit % 64) & 1 == 1)
    }

    /// Sets a bit; returns whether it was clear.
    fn set(&self, bit: u32) -> bool {
        let mask = 1 << (bit % 64);
        self.0.get(bit as usize / 64).is_some_and(|word| word.fetch_or(mask, Ordering::AcqRel) & mask == 0)
    }

    /// Clears a bit; returns whether it was set.
    fn clear(&self, bit: u32) -> bool {
        let mask = 1 << (bit % 64);
        self.0.get(bit as usize / 64).is_some_and(|word| word.fetch_and(!mask, Ordering::AcqRel) & mask != 0)
    }
}

/// The present time, nanoseconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

/// An open cache file.
pub(super) struct CacheFile {
    file: File,
    partial: AtomicBool,
    verified: Bits,
    present: Bits,
    /// How many pieces, without holes, are still missing; only counted in a partial file.
    left: AtomicU32,
    used: AtomicU64,
}

impl CacheFile {
    /// A whole file of `pieces` pieces.
    pub(super) fn whole(file: File, pieces: u32) -> CacheFile {
        let (verified, present) = (Bits::new(pieces), Bits::new(0));
        CacheFile { file, partial: false.into(), verified, present, left: 0.into(), used: now().into() }
    }

    /// A partial file of `pieces` pieces. Those in `here` seem to be present; `left` others, without holes, are
    /// missing.
    pub(super) fn partial(file: File, pieces: u32, here: impl IntoIterator<Item = u32>, left: u32) -> CacheFile {
        let (verified, present) = (Bits::new(pieces), Bits::new(pieces));
        here.into_iter().for_each(|piece| _ = present.set(piece));
        CacheFile { file, partial: true.into(), verified, present, left: left.into(), used: now().into() }
    }

    pub(super) fn form(&self) -> Form {
        if self.partial.load(Ordering::Acquire) { Form::Partial } else { Form::Whole }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Fills all of `out`, or fails.
    pub(super) fn read(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(out, offset)
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

    /// Notes that a piece matches its digest.
    pub(super) fn verified(&self, piece: u32) {
        self.verified.set(piece);
    }

    /// Notes that the bytes of a piece turned out to be wrong.
    pub(super) fn absent(&self, piece: u32) {
        self.verified.clear(piece);
        if self.present.clear(piece) {
            self.left.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Notes that the verified bytes of a piece were written; returns whether that was the last missing piece.
    pub(super) fn filled(&self, piece: u32) -> bool {
        self.verified.set(piece);
        self.present.set(piece) && self.left.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// Notes that the file now has the name of a whole file.
    pub(super) fn completed(&self) {
        self.partial.store(false, Ordering::Release);
    }

    pub(super) fn touch(&self) {
        self.used.store(now(), Ordering::Relaxed);
    }

    /// Stores the time of last use in the file's mtime, so that eviction after a restart knows it.
    pub(super) fn remember_use(&self) {
        remember_use(&self.file, self.last_used());
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

/// Stores the time of last use (nanoseconds since 1970) in a cache file's mtime, unless the mtime is nearly as new.
pub(super) fn remember_use(file: &File, last_used: u64) {
    let time = UNIX_EPOCH + Duration::from_nanos(last_used);
    let known = file.metadata().and_then(|meta| meta.modified());
    let stale =
        known.is_ok_and(|known| time.duration_since(known).is_ok_and(|age| age.as_nanos() as u64 > USE_GRANULARITY));
    if stale {
        let _ = file.set_modified(time);
    }
}
