//! The reader, the only way to read the store: open, look up, read. Needs no write access and no coordinator.
//!
//! Reads go through the small trait [`Disk`]. [`PosixDisk`] implements it for a directory on a shared file system, with
//! `pread` on a bounded number of cached descriptors. Bytes that a [`Store`] returns have been checked against a
//! digest, or are a [`RawChunk`] that has yet to be verified.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};
use nix::sys::stat::Mode;

use crate::catalogue::{Catalogue, Generation};
use crate::chunk::{ChunkRef, RawChunk, VerifiedChunk};
use crate::digest::{ContentDigest, Digest};
use crate::error::{Error, Result};
use crate::layer::{self, LayerHeader, LayerIndex, SealedIndex};
use crate::layout::{Layout, number};
use crate::version::{Access, Superblock};

mod expected;
pub mod handover_log;
pub mod recipes;
mod salvage;
mod startup;
mod survey;

pub use salvage::Salvaged;
pub use startup::StartupFront;
pub use survey::Survey;

/// Access to the store's files. Errors are the system's; the store names the object.
pub trait Disk: Send + Sync {
    /// Reads a whole file.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;
    /// Reads exactly `len` bytes from `offset` on; fewer are an error of kind `UnexpectedEof`.
    fn read_at(&self, path: &Path, offset: u64, len: usize) -> io::Result<Vec<u8>>;
    /// Lists the names in a directory, in no order.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
    /// Whether there is such a file or directory.
    fn exists(&self, path: &Path) -> io::Result<bool>;
    /// Forgets what is cached of a file, because it was replaced.
    fn forget(&self, _path: &Path) {}
    /// Gets ready to open files in a directory of the store with as few requests as possible.
    fn prepare(&self, _dir: &Path) {}
    /// Gets ready to read parts of a file.
    fn open(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }
}

/// The most descriptors kept open. Packs are few and large, and the process's limit may be low.
const DESCRIPTORS: usize = 256;

/// The most bytes that one request for several chunks may span.
pub const EXTENT_MAX: u64 = 16 << 20;

/// How many generations are read beside each other.
const GENERATION_READERS: usize = 16;

/// A directory on a POSIX file system.
///
/// The store's own directories (`layers`, `packs` and those in it) stay open, and files are opened relative to them. A
/// network file system asks its server about each part of a path, so every part saved is a round trip saved.
#[derive(Debug, Default)]
pub struct PosixDisk {
    root: Option<PathBuf>,
    /// Open directories by name. The lock guards this table only and is never held during I/O.
    directories: Mutex<HashMap<PathBuf, Arc<OwnedFd>>>,
    /// Open files, with the time when each was last used. The lock guards this table only and is never held during I/O.
    open: Mutex<Descriptors>,
}

#[derive(Debug, Default)]
struct Descriptors {
    files: HashMap<PathBuf, (Arc<File>, u64)>,
    clock: u64,
}

impl Descriptors {
    fn get(&mut self, path: &Path) -> Option<Arc<File>> {
        self.clock += 1;
        let (file, used) = self.files.get_mut(path)?;
        *used = self.clock;
        Some(Arc::clone(file))
    }

    fn put(&mut self, path: &Path, file: Arc<File>) {
        if self.files.len() >= DESCRIPTORS {
            let oldest = self.files.iter().min_by_key(|(_, (_, used))| *used).map(|(path, _)| path.clone());
            oldest.and_then(|path| self.files.remove(&path));
        }
        self.clock += 1;
        self.files.insert(path.to_owned(), (file, self.clock));
    }
}

impl PosixDisk {
    /// The disk of the store at `root`.
    pub fn new(root: &Path) -> PosixDisk {
        PosixDisk { root: Some(root.to_owned()), ..PosixDisk::default() }
    }

    /// Opens a file for reading.
    fn open_file(&self, path: &Path) -> io::Result<File> {
        match self.open_below(path) {
            Some(Ok(file)) => return Ok(file),
            // The open directory is the current one, so the file is missing: no second look by its full path.
            Some(Err(error)) if error.kind() == io::ErrorKind::NotFound && self.is_current(path) => return Err(error),
            _ => {}
        }
        // The disk may have been mounted anew, and the open directory belong to the previous mount.
        let file = File::open(path)?;
        self.directories.lock().unwrap_or_else(PoisonError::into_inner).clear();
        Ok(file)
    }

    /// Opens the directories that readers will need, so that the first reader need not.
    fn open_directories(&self) {
        if let Some(root) = &self.root {
            ["packs", "layers"].iter().for_each(|name| _ = self.directory(root, Path::new(name)));
        }
    }

    fn directory(&self, root: &Path, name: &Path) -> Option<Arc<OwnedFd>> {
        let lock = || self.directories.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(directory) = lock().get(name) {
            return Some(Arc::clone(directory));
        }
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let opened = match name.parent().zip(name.file_name()).filter(|(parent, _)| !parent.as_os_str().is_empty()) {
            Some((parent, last)) => {
                nix::fcntl::openat(&*self.directory(root, parent)?, Path::new(last), flags, Mode::empty())
            }
            None => nix::fcntl::open(&root.join(name), flags, Mode::empty()),
        };
        let directory = Arc::new(opened.ok()?);
        lock().insert(name.to_owned(), Arc::clone(&directory));
        Some(directory)
    }

    /// Opens a file relative to the store's directory that it lies in, if there is one.
    fn open_below(&self, path: &Path) -> Option<io::Result<File>> {
        let (root, name, rest) = self.split(path)?;
        let directory = self.directory(root, &name)?;
        let opened = nix::fcntl::openat(&*directory, rest, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
        Some(opened.map(File::from).map_err(io::Error::from))
    }

    /// Splits a path into the store's root, the directory below it, and the rest.
    fn split<'a>(&'a self, path: &'a Path) -> Option<(&'a Path, PathBuf, &'a Path)> {
        let root = self.root.as_deref()?;
        let mut parts = path.strip_prefix(root).ok()?.components();
        let mut name: PathBuf = parts.next().into_iter().collect();
        if name == Path::new("packs") && parts.clone().count() == 2 {
            name.extend(parts.next());
        }
        let rest = parts.as_path();
        if rest.as_os_str().is_empty() { None } else { Some((root, name, rest)) }
    }

    /// Whether the open directory that `path` would lie in still is the one with that name.
    fn is_current(&self, path: &Path) -> bool {
        let Some((root, name, _)) = self.split(path) else { return false };
        let open = self.directory(root, &name).and_then(|directory| nix::sys::stat::fstat(&*directory).ok());
        let named = nix::sys::stat::stat(&root.join(name)).ok();
        open.zip(named).is_some_and(|(open, named)| (open.st_dev, open.st_ino) == (named.st_dev, named.st_ino))
    }

    fn file(&self, path: &Path) -> io::Result<Arc<File>> {
        if let Some(file) = self.open.lock().unwrap_or_else(PoisonError::into_inner).get(path) {
            return Ok(file);
        }
        let file = Arc::new(self.open_file(path)?);
        // No readahead: whoever reads parts of files knows better than the system what comes next, and asks for it.
        let _ = posix_fadvise(&*file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM);
        self.open.lock().unwrap_or_else(PoisonError::into_inner).put(path, Arc::clone(&file));
        Ok(file)
    }
}

impl Disk for PosixDisk {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let mut file = self.open_file(path)?;
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut file, &mut bytes)?;
        Ok(bytes)
    }

    fn read_at(&self, path: &Path, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        match self.file(path)?.read_exact_at(&mut bytes, offset) {
            Ok(()) => Ok(bytes),
            // A cached NFS handle may have gone stale (server restart, failover): open the name once more.
            Err(e) if e.kind() == io::ErrorKind::StaleNetworkFileHandle => {
                self.forget(path);
                self.file(path)?.read_exact_at(&mut bytes, offset)?;
                Ok(bytes)
            }
            Err(e) => {
                self.forget(path);
                Err(e)
            }
        }
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        std::fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        path.try_exists()
    }

    fn forget(&self, path: &Path) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).files.remove(path);
    }

    fn open(&self, path: &Path) -> io::Result<()> {
        self.file(path).map(drop)
    }

    fn prepare(&self, dir: &Path) {
        if let Some((root, name)) = self.root.as_deref().and_then(|root| Some((root, dir.strip_prefix(root).ok()?))) {
            let _ = self.directory(root, name);
        }
    }
}

fn unread_index(error: io::Error, diff_id: &Digest, path: &Path) -> Error {
    match error.kind() {
        io::ErrorKind::NotFound => Error::Missing { what: format!("layer {diff_id}") },
        _ => Error::io("read", path, error),
    }
}

/// A store, opened for reading.
#[derive(Clone)]
pub struct Store {
    layout: Layout,
    superblock: Superblock,
    disk: Arc<dyn Disk>,
    /// The newest catalogue that was read through this store. The lock guards it alone and is not held during I/O.
    known: Arc<Mutex<Option<Catalogue>>>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({})", self.layout.root().display())
    }
}

impl Store {
    /// Opens the store in the directory `root`.
    pub fn open(root: &Path) -> Result<Store> {
        let disk = PosixDisk::new(root);
        disk.open_directories();
        Store::open_on(root, Arc::new(disk))
    }

    /// Opens the store at `root`, whose files `disk` reads.
    pub fn open_on(root: &Path, disk: Arc<dyn Disk>) -> Result<Store> {
        let layout = Layout::new(root);
        let superblock = Superblock::read(&layout, Access::Read)?;
        Ok(Store { layout, superblock, disk, known: Arc::default() })
    }

    /// The store's paths.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The superblock, as it was when the store was opened.
    pub(crate) fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// The store's random identity.
    pub fn identity(&self) -> [u8; 16] {
        self.superblock.identity
    }

    fn generations(&self) -> Result<Vec<u64>> {
        let dir = self.layout.catalogue();
        let names = self.disk.list(&dir).map_err(|e| Error::io("list", &dir, e))?;
        Ok(names.iter().filter_map(|name| number(name)).collect())
    }

    /// The newest generation's number; 0 for a new store. Costs one directory listing.
    pub fn generation(&self) -> Result<u64> {
        Ok(self.generations()?.into_iter().max().unwrap_or(0))
    }

    /// BLAKE3 of a generation's file, by which two histories can be told apart; `None` if there is no such file.
    pub fn generation_digest(&self, number: u64) -> Result<Option<ContentDigest>> {
        let path = self.layout.generation(number);
        match self.disk.read(&path) {
            Ok(bytes) => Ok(Some(ContentDigest::of(&bytes))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io("read", &path, e)),
        }
    }

    fn read_generation(&self, number: u64) -> Result<Generation> {
        let path = self.layout.catalogue().join(format!("{number:016x}"));
        let bytes = self.disk.read(&path).map_err(|e| Error::io("read", &path, e))?;
        match Generation::decode(&bytes)? {
            generation if generation.generation == number => Ok(generation),
            _ => Err(Error::corrupt("the catalogue", format!("generation {number} holds another one"))),
        }
    }

    /// Reads generations beside each other: one after the other, each would cost some round trips to the disk.
    fn read_generations(&self, numbers: Range<u64>) -> Result<Vec<Generation>> {
        let count = usize::try_from(numbers.end.saturating_sub(numbers.start)).unwrap_or(usize::MAX);
        let readers = count.min(GENERATION_READERS);
        if readers <= 1 {
            return numbers.map(|number| self.read_generation(number)).collect();
        }
        let read = |first: u64| -> Result<Vec<Generation>> {
            numbers.clone().skip(first as usize).step_by(readers).map(|number| self.read_generation(number)).collect()
        };
        let read = &read;
        let shares = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..readers as u64).map(|first| scope.spawn(move || read(first))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect::<Vec<_>>()
        });
        let mut generations = shares.into_iter().collect::<Result<Vec<_>>>()?.concat();
        generations.sort_unstable_by_key(|generation| generation.generation);
        Ok(generations)
    }

    /// Reads the newest consistent state.
    pub fn catalogue(&self) -> Result<Catalogue> {
        let mut catalogue = Catalogue::default();
        self.refresh(&mut catalogue)?;
        Ok(catalogue)
    }

    /// Brings a catalogue up to the newest generation, reading only what is new. Returns whether anything was.
    pub fn refresh(&self, catalogue: &mut Catalogue) -> Result<bool> {
        self.refresh_to(self.generation()?, catalogue)
    }

    /// The same, when [`Store::generation`] has just said that `newest` is the newest generation.
    pub fn refresh_to(&self, newest: u64, catalogue: &mut Catalogue) -> Result<bool> {
        if newest <= catalogue.generation() {
            return Ok(false);
        }
        let last = self.read_generation(newest)?;
        let mut next = catalogue.generation() + 1;
        if last.snapshot > catalogue.generation() {
            next = last.snapshot;
        }
        let mut state = catalogue.clone();
        for generation in self.read_generations(next..newest)? {
            state.apply(generation)?;
        }
        state.apply(last)?;
        *catalogue = state;
        self.remember(catalogue);
        Ok(true)
    }

    /// A manifest's or config's bytes, verified.
    pub fn blob(&self, digest: &Digest) -> Result<Vec<u8>> {
        let path = self.layout.blob(digest);
        let bytes = self.disk.read(&path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::Missing { what: format!("blob {digest}") },
            _ => Error::io("read", &path, e),
        })?;
        if Digest::of(&bytes) == *digest {
            Ok(bytes)
        } else {
            Err(Error::corrupt(format!("blob {digest}"), "its bytes do not match its digest"))
        }
    }

    /// Whether the store holds this layer. A layer is visible whole or not at all.
    pub fn has_layer(&self, diff_id: &Digest) -> Result<bool> {
        let path = self.layout.index(diff_id);
        self.disk.exists(&path).map_err(|e| Error::io("look up", &path, e))
    }

    /// A layer's raw index, verified against its own digest and against the one that the catalogue names.
    pub fn raw_index(&self, diff_id: &Digest) -> Result<Vec<u8>> {
        layer::unseal(&self.read_index(diff_id)?, diff_id)
    }

    /// A layer's index as it lies in the store, so that the caller can unpack it where there is room for it.
    pub fn sealed_index(&self, diff_id: &Digest) -> Result<SealedIndex> {
        SealedIndex::new(self.read_index(diff_id)?, *diff_id)
    }

    /// The length of a layer's raw index according to its header, bytes, so that room can be made before the index is
    /// read.
    pub fn index_len(&self, diff_id: &Digest) -> Result<u64> {
        let path = self.layout.index(diff_id);
        let head = self.disk.read_at(&path, 0, layer::SEALED_HEADER_LEN);
        self.disk.forget(&path);
        let head = head.map_err(|e| unread_index(e, diff_id, &path))?;
        SealedIndex::new(head, *diff_id).map(|sealed| sealed.raw_len())
    }

    /// A layer's sealed index, compared with the digest that the catalogue names.
    pub(crate) fn read_index(&self, diff_id: &Digest) -> Result<Vec<u8>> {
        let path = self.layout.index(diff_id);
        let sealed = self.disk.read(&path).map_err(|e| unread_index(e, diff_id, &path))?;
        self.check_index(diff_id, &ContentDigest::of(&sealed)).map(|()| sealed)
    }

    /// The fixed facts of a layer. Its index is verified, but never unpacked as a whole.
    pub fn layer_header(&self, diff_id: &Digest) -> Result<LayerHeader> {
        layer::check_sealed(&self.read_index(diff_id)?[..], diff_id).map(|(header, _)| header)
    }

    /// A layer's index, in memory.
    pub fn index(&self, diff_id: &Digest) -> Result<LayerIndex> {
        LayerIndex::from_bytes(self.raw_index(diff_id)?)
    }

    /// A chunk's stored bytes: one `pread`.
    pub fn read_raw(&self, chunk: &ChunkRef) -> Result<RawChunk> {
        let mut extent = self.read_extent(std::slice::from_ref(chunk))?;
        extent.pop().ok_or_else(|| Error::corrupt(format!("pack {}", chunk.pack), "it gave no chunk"))
    }

    /// The stored bytes of chunks that follow each other in one pack, in order, read with one `pread`. Gaps between
    /// them are read and dropped.
    pub fn read_extent(&self, chunks: &[ChunkRef]) -> Result<Vec<RawChunk>> {
        let (Some(first), Some(last)) = (chunks.first(), chunks.last()) else { return Ok(Vec::new()) };
        let end = last.offset.checked_add(last.stored_len.into()).filter(|end| *end >= first.offset);
        let len = end.map_or(u64::MAX, |end| end - first.offset);
        if len > EXTENT_MAX || chunks.iter().any(|chunk| chunk.stored_len > crate::chunk::CHUNK_MAX) {
            return Err(Error::corrupt(
                format!("a chunk of pack {}", first.pack),
                "it claims to be longer than a chunk may be",
            ));
        }
        let bytes = self.read_pack(&first.pack, first.offset, len as usize)?;
        let cut = |chunk: &ChunkRef| {
            let start = chunk.offset.checked_sub(first.offset)? as usize;
            let own = bytes.get(start..start + chunk.stored_len as usize)?;
            (chunk.pack == first.pack).then(|| RawChunk::new(*chunk, own.to_vec()))
        };
        let disordered = || Error::corrupt(format!("pack {}", first.pack), "its chunks do not follow each other");
        chunks.iter().map(|chunk| cut(chunk).ok_or_else(disordered)).collect()
    }

    fn read_pack(&self, pack: &ContentDigest, offset: u64, len: usize) -> Result<Vec<u8>> {
        let path = self.layout.pack(pack);
        self.disk.read_at(&path, offset, len).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => {
                Error::corrupt(format!("pack {}", path.display()), "it is shorter than its index says")
            }
            _ => Error::io("read", &path, e),
        })
    }

    /// A chunk's bytes, verified.
    pub fn read_chunk(&self, chunk: &ChunkRef) -> Result<VerifiedChunk> {
        self.read_anew(&chunk.pack, || self.read_raw(chunk)?.verify())
    }

    /// Reads something of a pack. Wrong bytes are read once more through the pack's name: the open descriptor may be that
    /// of a thinned or damaged pack which a whole one has replaced since.
    fn read_anew<T>(&self, pack: &ContentDigest, read: impl Fn() -> Result<T>) -> Result<T> {
        match read() {
            Err(Error::Corrupt { .. }) => {
                self.disk.forget(&self.layout.pack(pack));
                read()
            }
            result => result,
        }
    }
}
