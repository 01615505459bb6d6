//! The index of one layer: its file tree, and where each byte of it lies.
//!
//! The raw index is a header and seven sections of fixed-size records, mapped and read in place: opening a layer of 100,000
//! files costs a header check, a lookup is a binary search. In the store it lies compressed ([`seal`], [`unseal`]); a
//! host unpacks it once into its local cache and maps it there. The tree is in overlayfs form: a whiteout is a
//! character device 0:0, an opaque directory has the xattr `trusted.overlay.opaque`.
//!
//! - `tree`: the tree as it is being built, and its encoding. `sealed`: an index on its way to the disk and back, in little memory.
//!
//! Every access is bounds-checked: damaged bytes give [`Error::Corrupt`], never a panic.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::chunk::{ChunkRef, Codec};
use crate::digest::{ContentDigest, Digest};
use crate::error::{Error, Result};
use crate::version::{Access, Features};
use crate::wire::{Fields, Put};

mod map;
mod paths;
mod sealed;
mod tree;

pub(crate) use sealed::check_sealed;
pub use sealed::write_sealed;
pub use tree::{FileContent, LayerFacts, LayerTree, Metadata, NodeKind, NodeView, PieceSource, RawIndex};

/// First bytes of a raw index.
pub const MAGIC: &[u8; 8] = b"CFSLAYER";
/// Version of the index format.
pub const VERSION: u32 = 1;
/// Length of the raw index's header.
pub const HEADER_LEN: usize = 256;
/// First bytes of an index as it lies in the store.
pub const SEALED_MAGIC: &[u8; 8] = b"CFSINDEX";
/// Length of the header of an index as it lies in the store.
pub const SEALED_HEADER_LEN: usize = 64;
/// An index larger than this is refused by readers.
const RAW_MAX: u64 = 4 << 30;
/// No coordinator makes a raw index larger than this: every host that mounts the layer unpacks it.
pub const INDEX_MAX: u64 = 256 << 20;
/// Nor one that is larger than this,
pub const INDEX_BASE: u64 = 1 << 20;
/// and so many times the length of the tar stream: the index of a layer is in proportion to the layer.
pub const INDEX_FACTOR: u64 = 2;
/// No coordinator makes a layer of more inodes.
pub const INODES_MAX: u64 = 1_250_000;
/// The most bytes of names, link targets and extended attributes of one layer, each different one counted once.
pub const NAMES_MAX: u64 = 64 << 20;
/// Compression level of a sealed index.
const LEVEL: i32 = 6;

pub(crate) const INODE_LEN: usize = 96;
pub(crate) const ENTRY_LEN: usize = 12;
pub(crate) const XATTR_LEN: usize = 16;
pub(crate) const EXTENT_LEN: usize = 16;
pub(crate) const CHUNK_LEN: usize = 56;
pub(crate) const PACK_LEN: usize = 32;
/// The chunk number of an extent that reads as zeros and is stored nowhere.
pub(crate) const HOLE: u32 = u32::MAX;

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

    /// Whether the tar has no entry for this directory: its attributes are ours.
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The name: any bytes but `/` and NUL.
    pub name: &'a [u8],
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

/// Fixed facts about a layer, from the index's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerHeader {
    /// The index's features.
    pub features: Features,
    /// SHA-256 of the layer's tar stream.
    pub diff_id: Digest,
    /// Length of the tar stream.
    pub tar_size: u64,
    /// Sum of the regular files' sizes.
    pub content_size: u64,
    /// Length of every piece but a file's last.
    pub piece_size: u32,
    /// Length of the recipe file.
    pub recipe_len: u64,
    /// BLAKE3 of the recipe file.
    pub recipe_digest: ContentDigest,
    /// Records in each section: inodes, entries, xattrs, extents, chunks, packs; then bytes of names.
    pub(crate) counts: [u32; 7],
}

/// Byte ranges of the sections.
#[derive(Debug, Clone, Copy)]
struct Sections {
    starts: [usize; 7],
}

/// Sections in file order, with their record lengths; the last one holds names, targets and xattr values.
pub(crate) const RECORD_LENS: [usize; 7] = [INODE_LEN, ENTRY_LEN, XATTR_LEN, EXTENT_LEN, CHUNK_LEN, PACK_LEN, 1];
const INODES: usize = 0;
const ENTRIES: usize = 1;
const XATTRS: usize = 2;
const EXTENTS: usize = 3;
const CHUNKS: usize = 4;
const PACKS: usize = 5;
const NAMES: usize = 6;

impl LayerHeader {
    /// The header's bytes.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_LEN);
        out.put_bytes(MAGIC);
        out.put_u32(VERSION);
        out.put_u32(self.piece_size);
        self.features.encode(&mut out);
        out.put_bytes(self.diff_id.as_bytes());
        out.put_u64(self.tar_size);
        out.put_u64(self.content_size);
        out.put_u64(self.recipe_len);
        out.put_bytes(self.recipe_digest.as_bytes());
        for count in self.counts {
            out.put_u32(count);
        }
        out.resize(HEADER_LEN, 0);
        out
    }

    fn decode(bytes: &[u8]) -> Result<LayerHeader> {
        let mut fields = Fields::new("a layer's index", bytes);
        if fields.bytes(8)? != MAGIC {
            return Err(Error::corrupt("a layer's index", "its first bytes are wrong"));
        }
        let version = fields.u32()?;
        if version != VERSION {
            return Err(Error::Unsupported {
                what: "a layer's index".into(),
                why: format!("it has version {version}"),
            });
        }
        let piece_size = fields.u32()?;
        let features = Features::decode(&mut fields)?;
        features.check("a layer's index", Access::Read)?;
        let header = LayerHeader {
            features,
            diff_id: Digest::from_bytes(fields.array()?),
            tar_size: fields.u64()?,
            content_size: fields.u64()?,
            piece_size,
            recipe_len: fields.u64()?,
            recipe_digest: ContentDigest::from_bytes(fields.array()?),
            counts: [(); 7].map(|()| fields.u32().unwrap_or(u32::MAX)),
        };
        if piece_size == 0 || header.counts[INODES] == 0 {
            return Err(Error::corrupt("a layer's index", "it has no root directory or no piece size"));
        }
        Ok(header)
    }

    fn sections(&self, len: usize) -> Result<Sections> {
        let mut at = HEADER_LEN;
        let mut starts = [0; 7];
        for ((start, count), record) in starts.iter_mut().zip(self.counts).zip(RECORD_LENS) {
            *start = at;
            at = at.saturating_add((count as usize).saturating_mul(record));
        }
        match at == len {
            true => Ok(Sections { starts }),
            false => Err(Error::corrupt("a layer's index", "its length differs from its header")),
        }
    }
}

enum Bytes {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
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
    /// Maps the raw index in the file `path`. The caller has verified the file when it wrote it; every access is still
    /// bounds-checked.
    pub fn map(path: &Path) -> Result<LayerIndex> {
        let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        let map = map::map(&file).map_err(|e| Error::io("map", path, e))?;
        LayerIndex::new(Bytes::Mapped(map))
    }

    /// Reads a raw index that is in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<LayerIndex> {
        LayerIndex::new(Bytes::Owned(bytes))
    }

    fn new(bytes: Bytes) -> Result<LayerIndex> {
        let header = LayerHeader::decode(&bytes)?;
        let sections = header.sections(bytes.len())?;
        let index = LayerIndex { bytes, header, sections };
        match index.inode(ROOT)?.is_dir() {
            true => Ok(index),
            false => Err(Error::corrupt("a layer's index", "its root is not a directory")),
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

    /// Lets go of the mapped pages, which then do not count as this process's memory; they come back when used.
    pub fn let_go(&self) -> Result<()> {
        match &self.bytes {
            Bytes::Mapped(map) => map::let_go(map).map_err(|e| Error::io("unmap", Path::new("a layer's index"), e)),
            Bytes::Owned(_) => Ok(()),
        }
    }

    /// The raw bytes, as [`LayerIndex::map`] wants them in a file.
    pub fn raw(&self) -> &[u8] {
        &self.bytes
    }

    fn damaged(&self, why: &str) -> Error {
        Error::corrupt(format!("the index of layer {}", self.header.diff_id), why)
    }

    fn record(&self, section: usize, number: u32) -> Result<Fields<'_>> {
        if number >= self.header.counts[section] {
            return Err(self.damaged("a record refers to one that does not exist"));
        }
        let len = RECORD_LENS[section];
        let start = self.sections.starts[section] + number as usize * len;
        Ok(Fields::new("a layer's index", &self.bytes[start..start + len]))
    }

    fn name(&self, offset: u32, len: usize) -> Result<&[u8]> {
        let names = &self.bytes[self.sections.starts[NAMES]..];
        let start = offset as usize;
        names.get(start..start + len).ok_or_else(|| self.damaged("a name lies outside the index"))
    }

    /// The inode with that number.
    pub fn inode(&self, number: InodeIndex) -> Result<Inode> {
        let mut f = self.record(INODES, number.0)?;
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
    pub fn entry(&self, dir: &Inode, position: u32) -> Result<Option<Entry<'_>>> {
        if position >= dir.entry_count() {
            return Ok(None);
        }
        let number = dir.first.checked_add(position).ok_or_else(|| self.damaged("a directory is too long"))?;
        let mut f = self.record(ENTRIES, number)?;
        let (name, inode, len, file_type) = (f.u32()?, f.u32()?, f.u16()?, f.u8()?);
        let name = self.name(name, len.into())?;
        Ok(Some(Entry { name, inode: InodeIndex(inode), file_type: u32::from(file_type) << 12 }))
    }

    /// A directory's entries from `position` on.
    pub fn entries(&self, dir: &Inode, position: u32) -> impl Iterator<Item = Result<Entry<'_>>> {
        let dir = *dir;
        (position..dir.entry_count()).filter_map(move |i| self.entry(&dir, i).transpose())
    }

    /// Looks `name` up in a directory.
    pub fn lookup(&self, dir: &Inode, name: &[u8]) -> Result<Option<InodeIndex>> {
        let (mut low, mut high) = (0, dir.entry_count());
        while low < high {
            let middle = low + (high - low) / 2;
            let Some(entry) = self.entry(dir, middle)? else { return Ok(None) };
            match entry.name.cmp(name) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
                std::cmp::Ordering::Equal => return Ok(Some(entry.inode)),
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
    pub fn link_target(&self, inode: &Inode) -> Result<&[u8]> {
        self.name(inode.first, inode.size as usize)
    }

    /// An inode's extended attributes, in byte order of their names.
    pub fn xattrs(&self, inode: &Inode) -> impl Iterator<Item = Result<(&[u8], &[u8])>> {
        let first = inode.xattr_first;
        (0..u32::from(inode.xattr_count)).map(move |i| {
            let mut f = self.record(XATTRS, first.saturating_add(i))?;
            let (name, value, value_len, name_len) = (f.u32()?, f.u32()?, f.u32()?, f.u16()?);
            Ok((self.name(name, name_len.into())?, self.name(value, value_len as usize)?))
        })
    }

    /// Whether a directory hides its namesakes in lower layers.
    pub fn is_opaque(&self, inode: &Inode) -> Result<bool> {
        for xattr in self.xattrs(inode) {
            let (name, value) = xattr?;
            if name == OPAQUE_XATTR && value == b"y" {
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
        let mut f = self.record(EXTENTS, file.first.saturating_add(number))?;
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
        let mut f = self.record(CHUNKS, number)?;
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
        Ok(ContentDigest::from_bytes(self.record(PACKS, number)?.array()?))
    }
}

/// An index as it lies in the store: header (magic, version, reserved, raw length, BLAKE3 of the raw bytes), zstd frame.
pub fn seal(raw: &[u8]) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(SEALED_HEADER_LEN + raw.len() / 3);
    out.put_bytes(SEALED_MAGIC);
    out.put_u32(VERSION);
    out.put_u32(0);
    out.put_u64(raw.len() as u64);
    out.put_u64(0);
    out.put_bytes(ContentDigest::of(raw).as_bytes());
    zstd::stream::copy_encode(raw, &mut out, LEVEL).map_err(|e| Error::corrupt("a layer's index", e.to_string()))?;
    Ok(out)
}

/// Unpacks and verifies an index that lies in the store under `diff_id`.
pub fn unseal(sealed: &[u8], diff_id: &Digest) -> Result<Vec<u8>> {
    let damaged = |why: &str| Error::corrupt(format!("the index of layer {diff_id}"), why);
    let mut fields = Fields::new("a layer's index", sealed);
    if fields.bytes(8)? != SEALED_MAGIC {
        return Err(damaged("its first bytes are wrong"));
    }
    let version = fields.u32()?;
    if version != VERSION {
        return Err(Error::Unsupported {
            what: format!("layer {diff_id}"),
            why: format!("its index has version {version}"),
        });
    }
    fields.u32()?;
    let len = fields.u64()?;
    fields.u64()?;
    let digest = ContentDigest::from_bytes(fields.array()?);
    if len > RAW_MAX {
        return Err(damaged("it claims to be longer than an index may be"));
    }
    let mut raw = Vec::with_capacity(usize::try_from(len).unwrap_or(0).min(256 << 20));
    let decoder = zstd::Decoder::new(&sealed[SEALED_HEADER_LEN..]).map_err(|_| damaged("it is not a zstd frame"))?;
    std::io::copy(&mut std::io::Read::take(decoder, len), &mut raw)
        .map_err(|_| damaged("zstd cannot decompress it"))?;
    if ContentDigest::of(&raw) != digest {
        return Err(damaged("its bytes do not match their BLAKE3 digest"));
    }
    match LayerHeader::decode(&raw)?.diff_id == *diff_id {
        true => Ok(raw),
        false => Err(damaged("it is the index of another layer")),
    }
}

#[cfg(test)]
mod tests;
