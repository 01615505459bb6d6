//! One index on this host: a cache file whose blocks are read and compared with their digests when they are needed.
//!
//! The blocks are read, not mapped: a block that the disk cannot give is an error, where touching a mapped page would
//! kill the daemon.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::RwLock;
use store::layer::Pages;
use store::{ContentDigest, Digest};

use super::blocks::{BLOCK, Block, Blocks};
use crate::content::cache::disk::Disk;
use crate::source::metrics::Metrics;

/// The next copy's serial number, which tells the blocks of different copies apart.
static SERIAL: AtomicU64 = AtomicU64::new(0);

/// Computes the digests of an index's blocks while its bytes pass by.
#[derive(Debug, Default)]
pub(super) struct Sums {
    done: Vec<ContentDigest>,
    hasher: blake3::Hasher,
    filled: usize,
    len: usize,
}

impl Sums {
    /// The block digests of a file, and the digest of the whole file.
    pub(super) fn of_file(file: &File) -> io::Result<(Sums, ContentDigest)> {
        let (mut sums, mut whole) = (Sums::default(), blake3::Hasher::new());
        let mut buffer = vec![0; 4 * BLOCK];
        loop {
            match file.read_at(&mut buffer, sums.len as u64)? {
                0 => return Ok((sums, ContentDigest::from_bytes(*whole.finalize().as_bytes()))),
                n => {
                    whole.update(&buffer[..n]);
                    sums.add(&buffer[..n]);
                }
            }
        }
    }

    /// Takes the next bytes.
    pub(super) fn add(&mut self, mut bytes: &[u8]) {
        self.len += bytes.len();
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(BLOCK - self.filled));
            self.hasher.update(now);
            self.filled += now.len();
            bytes = later;
            if self.filled == BLOCK {
                self.end_block();
            }
        }
    }

    fn end_block(&mut self) {
        self.done.push(ContentDigest::from_bytes(*self.hasher.finalize().as_bytes()));
        self.hasher.reset();
        self.filled = 0;
    }

    fn finish(mut self) -> (Vec<ContentDigest>, usize) {
        if self.filled > 0 {
            self.end_block();
        }
        (self.done, self.len)
    }
}

/// An index on this host.
pub(super) struct IndexCopy {
    serial: u64,
    diff_id: Digest,
    digest: ContentDigest,
    len: usize,
    sums: Vec<ContentDigest>,
    /// Guards the bytes in memory, if the disk has no copy.
    kept: RwLock<Option<Vec<u8>>>,
    lost: AtomicBool,
    read: AtomicBool,
    blocks: Arc<Blocks>,
    disk: Arc<Disk>,
    metrics: Arc<Metrics>,
}

impl IndexCopy {
    /// A whole copy: in memory if `kept` has its bytes, else on the disk.
    pub(super) fn new(
        diff_id: Digest,
        digest: ContentDigest,
        sums: Sums,
        kept: Option<Vec<u8>>,
        blocks: Arc<Blocks>,
        disk: Arc<Disk>,
        metrics: Arc<Metrics>,
    ) -> IndexCopy {
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let (sums, len) = sums.finish();
        let (lost, read) = (AtomicBool::new(false), AtomicBool::new(true));
        IndexCopy { serial, diff_id, digest, len, sums, kept: RwLock::new(kept), lost, read, blocks, disk, metrics }
    }

    /// BLAKE3 of all its bytes: the name of its cache file.
    pub(super) fn digest(&self) -> ContentDigest {
        self.digest
    }

    /// Whether blocks that are not in memory cannot be read.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Notes that the copy can be read again: in memory if `kept` has its bytes, else on the disk.
    pub(super) fn found(&self, kept: Option<Vec<u8>>) {
        *self.kept.write() = kept.filter(|bytes| bytes.len() == self.len);
        self.lost.store(false, Ordering::Release);
    }

    /// Whether anything of it was read since the last call.
    pub(super) fn was_read(&self) -> bool {
        self.read.swap(false, Ordering::Relaxed)
    }

    /// How much memory it takes besides blocks, bytes.
    pub(super) fn kept_len(&self) -> usize {
        self.kept.read().as_ref().map_or(0, Vec::len)
    }

    /// Drops the bytes in memory, if there are any: then the copy is lost.
    pub(super) fn let_go(&self) {
        if self.kept.write().take().is_some() {
            self.lost.store(true, Ordering::Release);
        }
    }

    fn block(&self, number: usize) -> io::Result<Block> {
        let key = (self.serial, number as u32);
        if let Some(block) = self.blocks.get(&key) {
            return Ok(block);
        }
        let start = number * BLOCK;
        let mut bytes = vec![0; BLOCK.min(self.len.saturating_sub(start))];
        let read = self.disk.open_object(&self.digest).and_then(|file| file.read_exact_at(&mut bytes, start as u64));
        let is_right = read.is_ok() && self.sums.get(number) == Some(&ContentDigest::of(&bytes));
        if is_right {
            let block = Arc::new(bytes);
            self.blocks.put(key, Arc::clone(&block));
            return Ok(block);
        }
        self.lost.store(true, Ordering::Release);
        let is_gone = read.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
        if !is_gone {
            self.metrics.damaged_in_cache.one();
            tracing::warn!("the cached index of layer {} was damaged and is fetched again", self.diff_id);
            self.disk.remove(&self.digest);
        }
        Err(read.err().unwrap_or_else(|| io::Error::from(io::ErrorKind::InvalidData)))
    }
}

impl Pages for IndexCopy {
    fn len(&self) -> usize {
        self.len
    }

    fn read(&self, offset: usize, len: usize, take: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        if !self.read.load(Ordering::Relaxed) {
            self.read.store(true, Ordering::Relaxed);
        }
        if let Some(kept) = &*self.kept.read() {
            let bytes = kept.get(offset..offset + len).ok_or(io::ErrorKind::UnexpectedEof)?;
            take(bytes);
            return Ok(());
        }
        let (number, start) = (offset / BLOCK, offset % BLOCK);
        if start + len <= BLOCK {
            let block = self.block(number)?;
            take(block.get(start..start + len).ok_or(io::ErrorKind::UnexpectedEof)?);
            return Ok(());
        }
        let mut joined = Vec::with_capacity(len);
        while joined.len() < len {
            let at = offset + joined.len();
            let block = self.block(at / BLOCK)?;
            let rest = block.get(at % BLOCK..).filter(|rest| !rest.is_empty()).ok_or(io::ErrorKind::UnexpectedEof)?;
            joined.extend(&rest[..rest.len().min(len - joined.len())]);
        }
        take(&joined);
        Ok(())
    }
}
