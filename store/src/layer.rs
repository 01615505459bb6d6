//! The index of one layer: its file tree, and where each byte of it lies.
//!
//! The raw index is a header and seven sections of fixed-size records, read in place: opening a layer of 100,000 files
//! costs a header check, a lookup is a binary search. In the store it is compressed ([`seal`], [`unseal`]); a host
//! unpacks it once into its local cache and reads the blocks that it needs there ([`Pages`]). It is never
//! memory-mapped: a block that the local disk cannot read is an error, and does not end the process. The tree is in
//! overlayfs form: a whiteout is a character device 0:0, an opaque directory has the xattr `trusted.overlay.opaque`.
//!
//! - `header`: fixed facts, and where the sections lie. `bytes`: the raw index, in memory or block by block.
//! - `tree`: the tree while it is built, and its encoding. `sealed`: the index as it lies in the store. `sealing`:
//!   writes it there and checks it, in little memory.
//! - `merged`: the tree of several layers together.
//!
//! Every access is bounds-checked: damaged bytes give [`Error::Corrupt`], never a panic.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::path::Path;
use std::sync::Arc;

use crate::chunk::{ChunkRef, Codec};
use crate::digest::{ContentDigest, Digest};
use crate::error::{Error, Result};

mod bytes;
mod format;
mod header;
mod merged;
mod paths;
mod sealed;
mod sealing;
mod tree;

pub use bytes::Pages;
use bytes::{Bytes, RawRecord};
pub(crate) use format::{CHUNK_LEN, ENTRY_LEN, EXTENT_LEN, HOLE, INODE_LEN, PACK_LEN, XATTR_LEN};
pub use format::{HEADER_LEN, INDEX_BASE, INDEX_FACTOR, INDEX_MAX, INODES_MAX, MAGIC, NAMES_MAX, VERSION};
pub use header::LayerHeader;
pub(crate) use header::RECORD_LENS;
use header::{CHUNKS, ENTRIES, EXTENTS, INODES, NAMES, PACKS, Sections, XATTRS};
pub use merged::{Child, Found, Member, MergedTree};
pub use sealed::{SEALED_HEADER_LEN, SEALED_MAGIC, SealedIndex, seal, unseal};
pub(crate) use sealing::check_sealed;
pub use sealing::write_sealed;
pub use tree::{FileContent, LayerFacts, LayerTree, Metadata, NodeKind, NodeView, PieceSource, RawIndex};

/// The type bits of a mode (`S_IFMT`).
pub const S_IFMT: u32 = 0o170000;
/// A directory's type bits.
pub const S_IFDIR: u32 = 0o040000;
/// A regular file's type bits.
pub const S_IFREG: u32 = 0o100000;
/// A symbolic link's type bits.
pub const S_IFLNK: u32 = 0o120000;
/// A character device's type bits.
pub const S_IFCHR: u32 = 0o020000;
/// A block device's type bits.
pub const S_IFBLK: u32 = 0o060000;
/// A fifo's type bits.
pub const S_IFIFO: u32 = 0o010000;

/// The xattr by which overlayfs knows an opaque directory.
pub const OPAQUE_XATTR: &[u8] = b"trusted.overlay.opaque";

/// An inode's number within one layer. The root directory is 0; numbers follow the tar's order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InodeIndex(pub u32);

/// The root directory of every layer.
pub const ROOT: InodeIndex = InodeIndex(0);

/// One inode, as it stands in the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inode {
    /// Type and permission bits, as in `st_mode`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Names that this inode has in the layer; a directory's is 2 plus its subdirectories.
    pub nlink: u32,
    /// A file's length, or a symbolic link's target's length.
    pub size: u64,
    /// Modification time, seconds since 1970.
    pub mtime: i64,
    /// Nanoseconds of the modification time.
    pub mtime_nsec: u32,
    /// A device's major number.
    pub rdev_major: u32,
    /// A device's minor number.
    pub rdev_minor: u32,
    /// A directory's parent.
    pub parent: InodeIndex,
    xattr_first: u32,
    xattr_count: u16,
    flags: u16,
    first: u32,
    count: u32,
    digest: ContentDigest,
}

/// Set in an inode's flags: the tar has no entry for this directory, it was made because a path needs it.
pub(crate) const FLAG_IMPLICIT: u16 = 1;

impl Inode {
    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.mode & S_IFMT == S_IFDIR
    }

    /// Whether it is a regular file.
    pub fn is_file(&self) -> bool {
        self.mode & S_IFMT == S_IFREG
    }

    /// Whether it is a symbolic link.
    pub fn is_symlink(&self) -> bool {
        self.mode & S_IFMT == S_IFLNK
    }

    /// Whether it hides the name in lower layers: a character device 0:0.
    pub fn is_whiteout(&self) -> bool {
        self.mode & S_IFMT == S_IFCHR && self.rdev_major == 0 && self.rdev_minor == 0
    }

    /// Whether the tar has no entry for this directory: its attributes are defaults.
    pub fn is_implicit(&self) -> bool {
        self.flags & FLAG_IMPLICIT != 0
    }

    /// BLAKE3 of a regular file's whole content.
    pub fn content_digest(&self) -> ContentDigest {
        self.digest
    }

    /// Number of entries of a directory.
    pub fn entry_count(&self) -> u32 {
        if self.is_dir() { self.count } else { 0 }
    }

    /// Number of pieces of a regular file.
    pub fn piece_count(&self) -> u32 {
        if self.is_file() { self.count } else { 0 }
    }
}

/// One name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectoryEntry<'a> {
    /// The name: any bytes but `/` and NUL.
    pub name: Cow<'a, [u8]>,
    /// The inode.
    pub inode: InodeIndex,
    /// The inode's type bits (`S_IFMT` part of its mode).
    pub file_type: u32,
}

/// One piece of a file: a range of its content with a digest of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// First byte within the file.
    pub offset: u64,
    /// Length; every piece but a file's last has the layer's piece size.
    pub len: u32,
    /// Where its bytes are.
    pub source: Source,
    /// BLAKE3 of the piece's bytes; meaningless for a hole.
    pub digest: ContentDigest,
}

/// Where a piece's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Nowhere: it reads as zeros.
    Hole,
    /// From `start` on in a chunk.
    Chunk {
        /// The chunk's number in this layer's table.
        number: u32,
        /// The chunk.
        chunk: ChunkRef,
        /// First byte within the decompressed chunk.
        start: u32,
    },
}

impl Source {
    /// The chunk, unless it is a hole.
    pub fn chunk(&self) -> Option<ChunkRef> {
        match self {
            Source::Hole => None,
            Source::Chunk { chunk, .. } => Some(*chunk),
        }
    }
}

/// An extended attribute: its name and its value.
pub type Xattr<'a> = (Cow<'a, [u8]>, Cow<'a, [u8]>);

/// One entry of a directory; its name lies in the section of names.
struct EntryRecord {
    name: u32,
    name_len: usize,
    inode: InodeIndex,
    file_type: u32,
}

/// The index of one layer, read in place.
pub struct LayerIndex {
    bytes: Bytes,
    header: LayerHeader,
    sections: Sections,
}

impl std::fmt::Debug for LayerIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LayerIndex({})", self.header.diff_id)
    }
}

impl LayerIndex {
    /// Reads a raw index block by block.
    pub fn paged(pages: Arc<dyn Pages>) -> Result<LayerIndex> {
        LayerIndex::new(Bytes::Paged(pages))
    }

    /// Reads a raw index that is in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<LayerIndex> {
        LayerIndex::new(Bytes::Owned(bytes))
    }

    fn new(bytes: Bytes) -> Result<LayerIndex> {
        let header = bytes.with(0, HEADER_LEN.min(bytes.len()), LayerHeader::decode);
        let unreadable = |e| Error::io("read", Path::new("a layer's index"), e);
        let header = header.unwrap_or_else(|| Ok(LayerHeader::decode(&[]))).map_err(unreadable)??;
        let sections = header.sections(bytes.len())?;
        let index = LayerIndex { bytes, header, sections };
        if index.inode(ROOT)?.is_dir() {
            Ok(index)
        } else {
            Err(Error::corrupt("a layer's index", "its root is not a directory"))
        }
    }

    /// Fixed facts about the layer.
    pub fn header(&self) -> &LayerHeader {
        &self.header
    }

    /// The layer's diffID.
    pub fn diff_id(&self) -> Digest {
        self.header.diff_id
    }

    /// Number of inodes; valid numbers are below it.
    pub fn inode_count(&self) -> u32 {
        self.header.counts[INODES]
    }

    /// The length of the raw index, bytes.
    pub fn raw_len(&self) -> usize {
        self.bytes.len()
    }

    fn damaged(&self, why: &str) -> Error {
        Error::corrupt(format!("the index of layer {}", self.header.diff_id), why)
    }

    fn with<T>(&self, start: usize, len: usize, why: &str, take: impl FnOnce(&[u8]) -> T) -> Result<T> {
        let taken = self.bytes.with(start, len, take).ok_or_else(|| self.damaged(why))?;
        taken.map_err(|source| {
            // Whatever the disk says, even if the file is missing: the index itself is not at fault.
            let path = format!("the index of layer {}", self.header.diff_id).into();
            Error::Io { action: "read", path, source }
        })
    }

    fn record(&self, section: usize, number: u32) -> Result<RawRecord> {
        if number >= self.header.counts[section] {
            return Err(self.damaged("a record refers to one that does not exist"));
        }
        let len = RECORD_LENS[section].min(INODE_LEN);
        let start = self.sections.starts[section] + number as usize * len;
        let mut record = RawRecord { bytes: [0; INODE_LEN], len };
        self.with(start, len, "a record lies outside the index", |bytes| record.bytes[..len].copy_from_slice(bytes))?;
        Ok(record)
    }

    /// Calls `take` with bytes of the section of names: a name, a link target or an xattr value.
    fn with_name<T>(&self, offset: u32, len: usize, take: impl FnOnce(&[u8]) -> T) -> Result<T> {
        let start = self.sections.starts[NAMES].saturating_add(offset as usize);
        self.with(start, len, "a name lies outside the index", take)
    }

    fn name(&self, offset: u32, len: usize) -> Result<Cow<'_, [u8]>> {
        let start = self.sections.starts[NAMES].saturating_add(offset as usize);
        if let Bytes::Owned(bytes) = &self.bytes {
            let name = bytes.get(start..start.saturating_add(len));
            return name.map(Cow::Borrowed).ok_or_else(|| self.damaged("a name lies outside the index"));
        }
        self.with_name(offset, len, |bytes| Cow::Owned(bytes.to_vec()))
    }

    /// The inode with that number.
    pub fn inode(&self, number: InodeIndex) -> Result<Inode> {
        let record = self.record(INODES, number.0)?;
        let mut f = record.fields();
        Ok(Inode {
            mode: f.u32()?,
            uid: f.u32()?,
            gid: f.u32()?,
            nlink: f.u32()?,
            size: f.u64()?,
            mtime: f.u64()? as i64,
            mtime_nsec: f.u32()?,
            rdev_major: f.u32()?,
            rdev_minor: f.u32()?,
            xattr_first: f.u32()?,
            xattr_count: f.u16()?,
            flags: f.u16()?,
            parent: InodeIndex(f.u32()?),
            first: f.u32()?,
            count: f.u32()?,
            digest: ContentDigest::from_bytes(f.array()?),
        })
    }

    /// Entry `position` of a directory, in byte order of the names; nothing past the last.
    pub fn entry(&self, dir: &Inode, position: u32) -> Result<Option<DirectoryEntry<'_>>> {
        let Some(found) = self.entry_record(dir, position)? else { return Ok(None) };
        let name = self.name(found.name, found.name_len)?;
        Ok(Some(DirectoryEntry { name, inode: found.inode, file_type: found.file_type }))
    }

    fn entry_record(&self, dir: &Inode, position: u32) -> Result<Option<EntryRecord>> {
        if position >= dir.entry_count() {
            return Ok(None);
        }
        let number = dir.first.checked_add(position).ok_or_else(|| self.damaged("a directory is too long"))?;
        let record = self.record(ENTRIES, number)?;
        let mut f = record.fields();
        let (name, inode, len, file_type) = (f.u32()?, f.u32()?, f.u16()?, f.u8()?);
        let (inode, file_type) = (InodeIndex(inode), u32::from(file_type) << 12);
        Ok(Some(EntryRecord { name, name_len: len.into(), inode, file_type }))
    }

    /// A directory's entries from `position` on.
    pub fn entries(&self, dir: &Inode, position: u32) -> impl Iterator<Item = Result<DirectoryEntry<'_>>> {
        let dir = *dir;
        (position..dir.entry_count()).filter_map(move |i| self.entry(&dir, i).transpose())
    }

    /// Looks `name` up in a directory.
    pub fn lookup(&self, dir: &Inode, name: &[u8]) -> Result<Option<InodeIndex>> {
        let (mut low, mut high) = (0, dir.entry_count());
        while low < high {
            let middle = low + (high - low) / 2;
            let Some(entry) = self.entry_record(dir, middle)? else { return Ok(None) };
            match self.with_name(entry.name, entry.name_len, |found| found.cmp(name))? {
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
                Ordering::Equal => return Ok(Some(entry.inode)),
            }
        }
        Ok(None)
    }

    /// Looks a path up from the root, name by name, without following symbolic links.
    pub fn resolve(&self, path: &[u8]) -> Result<Option<InodeIndex>> {
        let mut at = ROOT;
        for name in path.split(|b| *b == b'/').filter(|name| !name.is_empty() && *name != b".") {
            let inode = self.inode(at)?;
            match self.lookup(&inode, name)? {
                Some(next) => at = next,
                None => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    /// A symbolic link's target.
    pub fn link_target(&self, inode: &Inode) -> Result<Cow<'_, [u8]>> {
        self.name(inode.first, inode.size as usize)
    }

    /// An inode's extended attributes, in byte order of their names.
    pub fn xattrs(&self, inode: &Inode) -> impl Iterator<Item = Result<Xattr<'_>>> {
        let first = inode.xattr_first;
        (0..u32::from(inode.xattr_count)).map(move |i| {
            let record = self.record(XATTRS, first.saturating_add(i))?;
            let mut f = record.fields();
            let (name, value, value_len, name_len) = (f.u32()?, f.u32()?, f.u32()?, f.u16()?);
            Ok((self.name(name, name_len.into())?, self.name(value, value_len as usize)?))
        })
    }

    /// Whether a directory hides its namesakes in lower layers.
    pub fn is_opaque(&self, inode: &Inode) -> Result<bool> {
        for xattr in self.xattrs(inode) {
            let (name, value) = xattr?;
            if *name == *OPAQUE_XATTR && *value == *b"y" {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Piece `number` of a regular file.
    pub fn piece(&self, file: &Inode, number: u32) -> Result<Piece> {
        if number >= file.piece_count() {
            return Err(self.damaged("a file has fewer pieces than its size needs"));
        }
        let record = self.record(EXTENTS, file.first.saturating_add(number))?;
        let mut f = record.fields();
        let (chunk, start, len) = (f.u32()?, f.u32()?, f.u32()?);
        let offset = u64::from(number) * u64::from(self.header.piece_size);
        if u64::from(len) != file.size.saturating_sub(offset).min(self.header.piece_size.into()) {
            return Err(self.damaged("a piece's length does not fit its file"));
        }
        if chunk == HOLE {
            return Ok(Piece { offset, len, source: Source::Hole, digest: ContentDigest::from_bytes([0; 32]) });
        }
        let reference = self.chunk(chunk)?;
        // A file of one piece shares its chunk with its neighbours, and its own digest covers it; a piece of a
        // larger file is a whole chunk.
        let digest = if file.piece_count() == 1 { file.digest } else { reference.digest };
        if file.piece_count() > 1 && (start != 0 || len != reference.raw_len) {
            return Err(self.damaged("a piece of a large file is not a whole chunk"));
        }
        Ok(Piece { offset, len, source: Source::Chunk { number: chunk, chunk: reference, start }, digest })
    }

    /// Number of chunks in this layer's table.
    pub fn chunk_count(&self) -> u32 {
        self.header.counts[CHUNKS]
    }

    /// Chunk `number` of this layer's table.
    pub fn chunk(&self, number: u32) -> Result<ChunkRef> {
        let record = self.record(CHUNKS, number)?;
        let mut f = record.fields();
        let (pack, stored_len, offset) = (f.u32()?, f.u32()?, f.u64()?);
        let (raw_len, codec, digest) = (f.u32()?, f.u32()?, f.array()?);
        let codec = Codec::from_number(codec.try_into().unwrap_or(u8::MAX))?;
        Ok(ChunkRef {
            pack: self.pack(pack)?,
            offset,
            stored_len,
            raw_len,
            codec,
            digest: ContentDigest::from_bytes(digest),
        })
    }

    /// Number of packs that this layer's content lies in.
    pub fn pack_count(&self) -> u32 {
        self.header.counts[PACKS]
    }

    /// Pack `number` that this layer's content lies in.
    pub fn pack(&self, number: u32) -> Result<ContentDigest> {
        Ok(ContentDigest::from_bytes(self.record(PACKS, number)?.fields().array()?))
    }
}

#[cfg(test)]
mod tests;
