//! The cache files: named by the BLAKE3 digest of their whole content, below `objects/`.
//!
//! A small file appears whole, by rename. A file of several pieces grows as `<hex>.part`, a sparse file in which a
//! missing piece is a hole. The file system tells which ranges hold data, and a piece is trusted only when it matches
//! its digest. Nothing is synced: what a crash leaves behind is checked like everything else.
//!
//! The directory may be removed at any moment, even while the daemon runs: missing directories are created again.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, UNIX_EPOCH};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use parking_lot::Mutex;
use store::ContentDigest;
use store::blocks::{self, Blocks};
use store::layer::{Piece, Source};

use super::cache_file::{self, CacheFile, Form};
use super::content::Content;
use super::eviction::Candidate;

/// The block size in which the use of the disk is counted, bytes.
const BLOCK: u64 = 4096;
/// What a partial file has behind its content for each piece, bytes: room for the chaining values of the blocks that it
/// lacks. With them, the other blocks of the piece can be compared with its digest.
const VALUES: u64 = blocks::VALUE_LEN as u64 * blocks::BLOCKS as u64;
/// After a failed write, nothing is written into the cache for this long.
const REST: Duration = Duration::from_secs(10);

/// How large the cache may become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// A fixed number of bytes.
    Bytes(u64),
    /// 80 % of the disk's free space, where the cache's own files count as free; 20 GB at most.
    Automatic,
}

/// The limit of [`Limit::Automatic`] on a large disk, bytes.
const AUTOMATIC_MAX: u64 = 20_000_000_000;

/// The cache's files, and how much space they take.
pub struct Disk {
    objects: PathBuf,
    rule: Limit,
    limit: AtomicU64,
    used: AtomicU64,
    serial: AtomicU64,
    /// Guards the time until which nothing is written, after a failed write.
    resting: Mutex<Option<Instant>>,
}

impl Disk {
    /// The files below `objects`, which is created if it does not exist.
    pub fn new(objects: PathBuf, rule: Limit) -> io::Result<Disk> {
        fs::create_dir_all(&objects)?;
        let limit = match rule {
            Limit::Bytes(bytes) => bytes,
            Limit::Automatic => AUTOMATIC_MAX,
        };
        let (limit, used, serial) = (AtomicU64::new(limit), AtomicU64::new(0), AtomicU64::new(0));
        Ok(Disk { objects, rule, limit, used, serial, resting: Mutex::new(None) })
    }

    /// The most that the files may take, bytes.
    pub fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    /// What the files take now, bytes; exact after a [`Disk::survey`].
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether it is time to evict: the files take more than 95 % of the limit.
    pub fn is_crowded(&self) -> bool {
        self.used() > self.limit() / 20 * 19
    }

    /// Whether writes are suspended because one has failed a moment ago.
    pub fn is_resting(&self) -> bool {
        self.resting.lock().is_some_and(|until| Instant::now() < until)
    }

    /// How much to remove so that there is room for a while (down to 85 % of the limit), bytes.
    pub fn excess(&self) -> u64 {
        self.used().saturating_sub(self.limit() / 20 * 17)
    }

    /// Whether new content is written into the cache now: there is room, and writes are not suspended.
    pub fn accepts(&self) -> bool {
        self.used() < self.limit() && !self.is_resting()
    }

    /// Notes that a write has failed. Writes are suspended for a while, and reads go on without the cache. Only the
    /// first failure is logged.
    pub fn failed(&self, error: &io::Error) {
        let was_working = self.resting.lock().replace(Instant::now() + REST).is_none();
        if was_working {
            let objects = self.objects.display();
            tracing::error!(
                "the local cache {objects} cannot be written ({error}): reads are served from the shared store without caching"
            );
        }
        if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            // Others have filled the disk: the limit becomes what the cache takes already.
            self.limit.fetch_min(self.used().max(BLOCK), Ordering::Relaxed);
        }
    }

    /// Notes that a write has worked.
    pub(super) fn works(&self) {
        if self.resting.lock().take().is_some() {
            tracing::info!("the local cache {} can be written again", self.objects.display());
        }
    }

    /// Opens a whole cache file. The caller checks its length and content.
    pub fn open_object(&self, digest: &ContentDigest) -> io::Result<File> {
        File::open(self.path(digest, Form::Whole))
    }

    /// Moves a file into the cache, as the whole cache file of this content.
    pub fn adopt(&self, file: &Path, digest: &ContentDigest) -> io::Result<()> {
        let path = self.path(digest, Form::Whole);
        self.with_parent(&path, || fs::rename(file, &path))
    }

    /// Notes that a whole cache file is in use now, so that it is among the last to be evicted.
    pub fn touch(&self, digest: &ContentDigest) {
        if let Ok(file) = self.open_object(digest) {
            cache_file::remember_use(&file, cache_file::now());
        }
    }

    /// Writes a whole cache file of `len` bytes in steps. The outer error is that of the caller's `write`, the inner
    /// one is this disk's. After either, nothing is left.
    pub fn write_in_steps<T, E>(
        &self,
        digest: &ContentDigest,
        len: u64,
        write: impl FnOnce(&mut File) -> Result<io::Result<T>, E>,
    ) -> Result<io::Result<T>, E> {
        let path = self.path(digest, Form::Whole);
        let temporary = path.with_extension(format!("{}.tmp", self.serial.fetch_add(1, Ordering::Relaxed)));
        let create = || File::options().write(true).create(true).truncate(true).mode(0o600).open(&temporary);
        let mut file = match self.with_parent(&path, create) {
            Ok(file) => file,
            Err(error) => return Ok(Err(error)),
        };
        // Counted before it is written, because others write at the same time.
        let taken = len.next_multiple_of(BLOCK);
        self.used.fetch_add(taken, Ordering::Relaxed);
        let written =
            write(&mut file).map(|written| written.and_then(|value| fs::rename(&temporary, &path).map(|()| value)));
        if !matches!(written, Ok(Ok(_))) {
            let _ = fs::remove_file(&temporary);
            self.uncount(taken);
        }
        written
    }

    fn uncount(&self, bytes: u64) {
        let _ = self.used.try_update(Ordering::Relaxed, Ordering::Relaxed, |used| Some(used.saturating_sub(bytes)));
    }

    fn path(&self, digest: &ContentDigest, form: Form) -> PathBuf {
        let hex = digest.hex();
        let mut path = self.objects.join(&hex[..2]);
        path.push(hex);
        match form {
            Form::Whole => path,
            Form::Partial => path.with_extension("part"),
        }
    }

    /// Whether there is a whole file of this content.
    pub(super) fn has(&self, digest: &ContentDigest) -> bool {
        self.path(digest, Form::Whole).exists()
    }

    /// Opens a whole cache file of `len` bytes in `pieces` pieces. One of another length is removed.
    pub(super) fn open_whole(&self, digest: &ContentDigest, len: u64, pieces: u32) -> Option<CacheFile> {
        let path = self.path(digest, Form::Whole);
        let file = File::open(&path).ok()?;
        if file.metadata().is_ok_and(|meta| meta.is_file() && meta.len() == len) {
            return Some(CacheFile::whole(file, pieces));
        }
        discard(&path);
        None
    }

    /// Opens the cache file of a file's content.
    pub(super) fn open(&self, content: &Content) -> Option<CacheFile> {
        let digest = content.inode.content_digest();
        let whole = self.open_whole(&digest, content.inode.size, content.inode.piece_count());
        if whole.is_some() {
            return whole;
        }
        if content.inode.piece_count() < 2 {
            return None;
        }
        let file = File::options().read(true).write(true).open(self.path(&digest, Form::Partial)).ok()?;
        partial(file, content).ok()
    }

    /// Opens the partial file of a file's content; creates it if it does not exist.
    pub(super) fn create_partial(&self, content: &Content) -> io::Result<CacheFile> {
        let path = self.path(&content.inode.content_digest(), Form::Partial);
        let create = || File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let file = self.with_parent(&path, create)?;
        partial(file, content)
    }

    /// Writes the `blocks` of a packed piece into the partial file of a content of `size` bytes.
    pub(super) fn write_piece(
        &self,
        cache_file: &CacheFile,
        packed: &[u8],
        piece: &Piece,
        number: u32,
        blocks: Blocks,
        size: u64,
    ) -> io::Result<()> {
        let mut taken = 0;
        // Blocks without the values of the others would be of no use after a restart.
        for (block, value) in blocks.values(packed, piece.len) {
            let at = values_offset(size, number) + u64::from(block) * blocks::VALUE_LEN as u64;
            cache_file.file().write_all_at(value, at)?;
            taken = BLOCK;
        }
        for (start, end) in blocks.runs(piece.len) {
            let place = blocks.position(start, end, piece.len);
            let bytes = place.and_then(|at| packed.get(at..at + (end - start) as usize));
            cache_file
                .file()
                .write_all_at(bytes.ok_or(io::ErrorKind::InvalidInput)?, piece.offset + u64::from(start))?;
            taken += u64::from(end - start).next_multiple_of(BLOCK);
        }
        self.used.fetch_add(taken, Ordering::Relaxed);
        Ok(())
    }

    /// Turns a partial file, which now has all of its `size` bytes, into a whole one, and renames it.
    pub(super) fn complete(&self, digest: &ContentDigest, cache_file: &CacheFile, size: u64) -> io::Result<()> {
        cache_file.file().set_len(size)?;
        fs::rename(self.path(digest, Form::Partial), self.path(digest, Form::Whole))
    }

    /// Writes a whole cache file at once, and returns it open.
    pub(super) fn write_whole(&self, digest: &ContentDigest, bytes: &[u8]) -> io::Result<File> {
        let path = self.path(digest, Form::Whole);
        let temporary = path.with_extension(format!("{}.tmp", self.serial.fetch_add(1, Ordering::Relaxed)));
        let write = || {
            let file = File::options().read(true).write(true).create(true).truncate(true).open(&temporary)?;
            file.write_all_at(bytes, 0)?;
            fs::rename(&temporary, &path).map(|()| file)
        };
        let written = self.with_parent(&path, write);
        match &written {
            Ok(_) => _ = self.used.fetch_add((bytes.len() as u64).next_multiple_of(BLOCK), Ordering::Relaxed),
            Err(_) => _ = fs::remove_file(&temporary),
        }
        written
    }

    /// Runs an action that creates a file. If the file's directory does not exist, creates it and tries again.
    fn with_parent<T>(&self, path: &Path, action: impl Fn() -> io::Result<T>) -> io::Result<T> {
        match action() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(path.parent().unwrap_or(&self.objects))?;
                action()
            }
            result => result,
        }
    }

    /// Removes the entry of this content, in whatever form it has.
    pub fn remove(&self, digest: &ContentDigest) {
        for form in [Form::Whole, Form::Partial] {
            let path = self.path(digest, form);
            let bytes = fs::metadata(&path).map_or(0, |meta| meta.blocks() * 512);
            if fs::remove_file(&path).is_ok() {
                self.uncount(bytes);
            }
        }
    }

    /// Looks at all files: counts what they take, removes what crashes left behind, and brings the limit up to date.
    pub fn survey(&self) -> Vec<Candidate> {
        let mut candidates = Vec::new();
        let before = self.used();
        each_file(&self.objects, |path, meta| match parse_name(path) {
            Some((digest, _)) => candidates.push(Candidate {
                digest,
                bytes: meta.blocks() * 512,
                last_used: meta
                    .modified()
                    .ok()
                    .and_then(|t| t.duration_since(UNIX_EPOCH).ok())
                    .map_or(0, |d| d.as_nanos() as u64),
                in_use: false,
            }),
            None if is_old(meta) => _ = fs::remove_file(path),
            None => {}
        });
        // What was written meanwhile was counted by its writers.
        let written = self.used().saturating_sub(before);
        let total = candidates.iter().map(|candidate| candidate.bytes).sum::<u64>() + written;
        self.used.store(total, Ordering::Relaxed);
        if self.rule == Limit::Automatic {
            let free =
                nix::sys::statvfs::statvfs(&self.objects).map_or(0, |s| s.blocks_available() * s.fragment_size());
            self.limit.store(((free + total) / 5 * 4).min(AUTOMATIC_MAX), Ordering::Relaxed);
        } else if let Limit::Bytes(bytes) = self.rule {
            self.limit.store(bytes, Ordering::Relaxed);
        }
        candidates
    }
}

/// Removes whatever lies at the path of a cache file but is not one.
fn discard(path: &Path) {
    if fs::remove_file(path).is_err() {
        let _ = fs::remove_dir_all(path);
    }
}

/// Whether a temporary file was abandoned: it has not changed for a minute.
fn is_old(meta: &fs::Metadata) -> bool {
    meta.modified().ok().and_then(|time| time.elapsed().ok()).is_some_and(|age| age > Duration::from_secs(60))
}

/// Calls `each` for every file two levels below `objects`.
pub fn each_file(objects: &Path, mut each: impl FnMut(&Path, &fs::Metadata)) {
    for directory in fs::read_dir(objects).into_iter().flatten().flatten() {
        for entry in fs::read_dir(directory.path()).into_iter().flatten().flatten() {
            if let Ok(meta) = entry.metadata() {
                each(&entry.path(), &meta);
            }
        }
    }
}

/// The content and form that the name of a cache file stands for.
pub fn parse_name(path: &Path) -> Option<(ContentDigest, Form)> {
    let name = path.file_name()?.to_str()?;
    match name.strip_suffix(".part") {
        Some(hex) => Some((ContentDigest::from_hex(hex)?, Form::Partial)),
        None => Some((ContentDigest::from_hex(name)?, Form::Whole)),
    }
}

/// A partial file, with the pieces that seem to be there.
fn partial(file: File, content: &Content) -> io::Result<CacheFile> {
    let inode = &content.inode;
    let len = values_offset(inode.size, inode.piece_count());
    if file.metadata()?.len() != len {
        file.set_len(len)?;
    }
    let runs = data_runs(&file, inode.size)?;
    let has = |offset: u64, len: u32| {
        let after = runs.partition_point(|(start, _)| *start <= offset);
        after.checked_sub(1).is_some_and(|at| runs[at].1 >= offset + u64::from(len))
    };
    let (mut present, mut left) = (Vec::new(), 0);
    for number in 0..inode.piece_count() {
        let piece = content.index.piece(inode, number).map_err(io::Error::other)?;
        match piece.source {
            Source::Hole => {}
            Source::Chunk { .. } if has(piece.offset, piece.len) => present.push((number, Blocks::ALL, piece.len)),
            Source::Chunk { .. } => {
                left += 1;
                let blocks =
                    Blocks::such_that(piece.len, |start, end| has(piece.offset + u64::from(start), end - start));
                if !blocks.is_empty() && has_values(&file, inode.size, number, blocks, piece.len) {
                    present.push((number, blocks, piece.len));
                }
            }
        }
    }
    // A file that got its last piece but was not renamed would never be completed: one piece is fetched again.
    if left == 0 {
        left = u32::from(present.pop().is_some());
    }
    Ok(CacheFile::partial(file, inode.piece_count(), present, left))
}

/// Where the values of a piece lie in the partial file of a content of `size` bytes.
fn values_offset(size: u64, number: u32) -> u64 {
    size.next_multiple_of(BLOCK).saturating_add(u64::from(number) * VALUES)
}

/// The chaining values of the blocks of a piece: zeros where there are none.
pub(super) fn read_values(file: &File, size: u64, number: u32) -> io::Result<[u8; VALUES as usize]> {
    let mut values = [0; VALUES as usize];
    file.read_exact_at(&mut values, values_offset(size, number))?;
    Ok(values)
}

/// Whether the values of all blocks are there that are not among `blocks`.
fn has_values(file: &File, size: u64, number: u32, blocks: Blocks, len: u32) -> bool {
    let Ok(values) = read_values(file, size, number) else { return false };
    let is_there = |(_, value): (u32, &[u8])| value.iter().any(|byte| *byte != 0);
    (0..).zip(values.chunks(blocks::VALUE_LEN)).filter(|(block, _)| blocks.lacks(*block, len)).all(is_there)
}

/// The ranges of a file that are not holes, in order.
fn data_runs(file: &File, size: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut runs = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match lseek(file, at as i64, Whence::SeekData) {
            Ok(start) => start as u64,
            Err(Errno::ENXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = lseek(file, start as i64, Whence::SeekHole)? as u64;
        runs.push((start, end));
        at = end.max(start + 1);
    }
    Ok(runs)
}
