//! One open cache file, and what is known of its pieces and their blocks.
//!
//! This knowledge belongs to the open descriptor: whoever opens the path again must verify the pieces anew. A file that
//! was removed, or replaced under its name, keeps serving those that hold it open.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use store::blocks::Blocks;

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

/// What is known of blocks of one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PieceState {
    /// Some of their bytes are missing.
    Absent,
    /// Their bytes are here, but were not compared with the digest yet.
    Present,
    /// Their bytes are here, and match the digest.
    Verified,
}

/// Blocks of every piece. Whoever sees a block noted also sees what the thread that noted it had done before.
struct Noted(Box<[AtomicU8]>);

impl Noted {
    fn new(pieces: u32) -> Noted {
        Noted((0..pieces).map(|_| AtomicU8::new(0)).collect())
    }

    fn of(&self, piece: u32) -> Blocks {
        self.0.get(piece as usize).map_or(Blocks::NONE, |noted| Blocks::from_bits(noted.load(Ordering::Acquire)))
    }

    /// Notes blocks of a piece of `len` bytes; returns whether the piece is whole by that and was not before.
    fn add(&self, piece: u32, blocks: Blocks, len: u32) -> bool {
        let Some(noted) = self.0.get(piece as usize) else { return false };
        let with = |bits| Blocks::from_bits(bits).and(blocks).whole_if_all(len);
        let before = noted.fetch_update(Ordering::AcqRel, Ordering::Acquire, |bits| Some(with(bits).bits()));
        before.is_ok_and(|bits| bits != Blocks::ALL.bits() && with(bits) == Blocks::ALL)
    }

    /// Forgets a piece; returns whether it was whole.
    fn clear(&self, piece: u32) -> bool {
        let noted = self.0.get(piece as usize);
        noted.is_some_and(|noted| noted.swap(0, Ordering::AcqRel) == Blocks::ALL.bits())
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
    verified: Noted,
    present: Noted,
    /// How many pieces, without holes, are not whole yet; only counted in a partial file.
    left: AtomicU32,
    used: AtomicU64,
}

impl CacheFile {
    /// A whole file of `pieces` pieces.
    pub(super) fn whole(file: File, pieces: u32) -> CacheFile {
        let (verified, present) = (Noted::new(pieces), Noted::new(0));
        CacheFile { file, partial: false.into(), verified, present, left: 0.into(), used: now().into() }
    }

    /// A partial file of `pieces` pieces. The blocks `here`, each with the length of its piece, seem to be present;
    /// `left` pieces, without holes, are not whole.
    pub(super) fn partial(
        file: File,
        pieces: u32,
        here: impl IntoIterator<Item = (u32, Blocks, u32)>,
        left: u32,
    ) -> CacheFile {
        let (verified, present) = (Noted::new(pieces), Noted::new(pieces));
        here.into_iter().for_each(|(piece, blocks, len)| _ = present.add(piece, blocks, len));
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

    /// The blocks of a piece that are here.
    pub(super) fn here(&self, piece: u32) -> Blocks {
        if self.form() == Form::Whole { Blocks::ALL } else { self.present.of(piece) }
    }

    pub(super) fn state(&self, piece: u32, blocks: Blocks) -> PieceState {
        match self.verified.of(piece).contains(blocks) {
            true => PieceState::Verified,
            false if self.here(piece).contains(blocks) => PieceState::Present,
            false => PieceState::Absent,
        }
    }

    /// Notes that blocks of a piece of `len` bytes match its digest.
    pub(super) fn verified(&self, piece: u32, blocks: Blocks, len: u32) {
        self.verified.add(piece, blocks, len);
    }

    /// Notes that the bytes of a piece turned out to be wrong.
    pub(super) fn absent(&self, piece: u32) {
        self.verified.clear(piece);
        if self.present.clear(piece) {
            self.left.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Notes that verified blocks of a piece of `len` bytes were written; returns whether that was the last that the
    /// file lacked.
    pub(super) fn filled(&self, piece: u32, blocks: Blocks, len: u32) -> bool {
        self.verified.add(piece, blocks, len);
        self.present.add(piece, blocks, len) && self.left.fetch_sub(1, Ordering::AcqRel) == 1
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
