//! The walk that gives every inode its place, and writes it there.
//!
//! An inode's number is its place, and a directory's entries hold the numbers of its children. So the walk places all children of a
//! directory, writes those that are no directories, keeps room for those that are, and then writes the directory's entries into the
//! room that it has. Memory holds the entries of some directories, the number of each directory and of each inode with several
//! names, and the end of the image (`area`).

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::area::Area;
use crate::chunks::Chunks;
use crate::format::{self, BLOCK, INODE_LEN, Layout, NAME_MAX, Placed, SLOT, SUPERBLOCK_AT, SUPERBLOCK_LEN};
use crate::listing::{Listing, Named};
use crate::tree::{Inode, Node, Tree};

/// The block at which the first device begins: above what any image needs for itself.
const DEVICES_FROM: u64 = 1 << 22;
/// What of a directory's entries is left over after whole blocks lies after the inode if it is no longer than this. Longer rests
/// would leave larger gaps before the next inode than a block of their own does.
const INLINE_MAX: u64 = 2048;

/// The most that the entries of directories take in memory that wait for their turn, bytes. Those of others are asked for twice.
const WAITING_MAX: usize = 4 << 20;

/// How much of the image is read at a time for its digest, bytes.
const STEP: usize = 256 << 10;

const S_IFMT: u32 = 0o170_000;
const S_IFREG: u32 = 0o100_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFLNK: u32 = 0o120_000;

/// A device that holds content of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// Its length in blocks.
    pub blocks: u64,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// The number of inodes.
    pub inodes: u64,
    /// The image's length in bytes.
    pub len: u64,
}

/// Why a tree is not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError<E> {
    /// The tree cannot be read.
    #[error("the tree cannot be read")]
    Tree(E),
    /// The image cannot be written.
    #[error("the image cannot be written")]
    Io(#[from] io::Error),
    /// The image would become longer than it may be, bytes.
    #[error("it needs more than {0} bytes")]
    TooLong(u64),
    /// The format cannot express what the tree has.
    #[error("EROFS has no place for {0}")]
    Inexpressible(String),
    /// The tree contradicts itself.
    #[error("the tree is malformed: {0}")]
    Malformed(&'static str),
}

/// Writes the image of a tree, of at most `len_max` bytes, into an empty file, which must be open for reading too and is not synced.
///
/// The image's UUID, by which the kernel tells one file system from another, is a digest of `name` and of the image. So images with other
/// inode numbers never have one UUID, whatever wrote them: an overlay's upper directory refers to files below it by both.
pub fn write<T: Tree>(
    tree: &T,
    devices: &[Device],
    name: &[u8],
    file: &File,
    len_max: u64,
) -> Result<Summary, WriteError<T::Error>> {
    let starts = starts(devices).ok_or_else(|| inexpressible("so much content"))?;
    let table: Vec<u8> =
        devices.iter().zip(&starts).flat_map(|(device, start)| format::device(device.blocks as u32, *start)).collect();
    let head = (SUPERBLOCK_AT + SUPERBLOCK_LEN + table.len() as u64).next_multiple_of(BLOCK);
    let mut writer = Writer {
        tree,
        devices,
        starts: &starts,
        area: Area::new(file),
        numbered_from: None,
        placed: HashMap::new(),
        inodes: 0,
        chunked: false,
        len_max,
        waiting: 0,
    };
    writer.area.reserve(head)?;
    let root = tree.root();
    let inode = writer.inode(root)?;
    if inode.mode & S_IFMT != S_IFDIR {
        return Err(WriteError::Malformed("its root is no directory"));
    }
    let root = writer.place_directory(root, &inode, None)?;
    let root_nid = root.nid;
    let mut pending = vec![root];
    while let Some(directory) = pending.pop() {
        let below = pending.len();
        writer.fill(directory, &mut pending)?;
        // The first is next.
        pending[below..].reverse();
    }
    // fsck.erofs 1.5 looks for extended attributes behind every inode, also behind the last.
    let len = (writer.area.len() + SLOT).next_multiple_of(BLOCK);
    let mut superblock = format::Superblock {
        uuid: [0; 16],
        root: root_nid as u16,
        inodes_from: writer.numbered_from.unwrap_or_default() as u32,
        blocks: u32::try_from(len / BLOCK)
            .ok()
            .filter(|blocks| u64::from(*blocks) < DEVICES_FROM)
            .ok_or_else(|| inexpressible("so many files"))?,
        devices: devices.len() as u16,
        chunked: writer.chunked,
    };
    let inodes = writer.inodes;
    writer.area.reserve(len - writer.area.len())?;
    let in_first = table.len().min((BLOCK - SUPERBLOCK_AT - SUPERBLOCK_LEN) as usize);
    writer.area.patch(SUPERBLOCK_AT, &superblock.encode(&table[..in_first]))?;
    writer.area.patch(BLOCK, &table[in_first..])?;
    writer.area.flush()?;
    superblock.uuid.copy_from_slice(&digest(name, file)?.as_bytes()[..16]);
    file.write_all_at(&superblock.encode(&table[..in_first]), SUPERBLOCK_AT)?;
    Ok(Summary { inodes, len })
}

/// The digest of a name and all bytes of a file.
fn digest(name: &[u8], file: &File) -> io::Result<blake3::Hash> {
    let (mut hasher, mut step, mut at) = (blake3::Hasher::new(), vec![0; STEP], 0);
    hasher.update(name);
    loop {
        match file.read_at(&mut step, at)? {
            0 => return Ok(hasher.finalize()),
            len => {
                hasher.update(&step[..len]);
                at += len as u64;
            }
        }
    }
}

/// The first block of each device.
fn starts(devices: &[Device]) -> Option<Vec<u32>> {
    let mut next = DEVICES_FROM;
    let mut start = |device: &Device| {
        let start = u32::try_from(next).ok()?;
        next = next.checked_add(device.blocks)?;
        (next <= u64::from(u32::MAX)).then_some(start)
    };
    u16::try_from(devices.len()).ok()?;
    devices.iter().map(&mut start).collect()
}

fn inexpressible<E>(what: &str) -> WriteError<E> {
    WriteError::Inexpressible(what.to_owned())
}

/// A directory whose place is known and whose entries are not written yet.
#[derive(Debug)]
struct Directory {
    node: Node,
    nid: u64,
    parent: u64,
    /// Where whole blocks of entries lie, and how many bytes these are.
    blocks: (u64, u64),
    /// Where the rest lies.
    rest_at: u64,
    /// The length of all entries.
    len: u64,
    /// The entries, if there was room for them.
    listing: Option<Listing>,
}

struct Writer<'a, T> {
    tree: &'a T,
    devices: &'a [Device],
    starts: &'a [u32],
    area: Area<'a>,
    /// The block from which inodes are numbered: that of the root, whose number has 16 bits only.
    numbered_from: Option<u64>,
    /// The numbers of directories, and of inodes with several names.
    placed: HashMap<Node, u64>,
    inodes: u64,
    /// Whether any file is in chunks.
    chunked: bool,
    len_max: u64,
    /// What the entries of waiting directories take, bytes.
    waiting: usize,
}

impl<T: Tree> Writer<'_, T> {
    fn inode(&self, node: Node) -> Result<Inode, WriteError<T::Error>> {
        self.tree.inode(node).map_err(WriteError::Tree)
    }

    /// Lists a directory.
    fn list(&self, directory: Node) -> Result<Listing, WriteError<T::Error>> {
        let mut listing = Listing::default();
        let mut dots: &[(&[u8], Named)] = &[(b".", Named::This), (b"..", Named::Parent)];
        let mut wrong = None;
        let mut give = |name: &[u8], node: Node| {
            while let Some(((dot, named), rest)) = dots.split_first().filter(|((dot, _), _)| *dot < name) {
                listing.push(dot, *named);
                dots = rest;
            }
            if name.is_empty()
                || name.len() > NAME_MAX
                || name == b"."
                || name == b".."
                || name.iter().any(|byte| matches!(byte, 0 | b'/'))
            {
                wrong = Some("a name that no file can have");
            } else if listing.entries.len().checked_sub(1).is_some_and(|last| listing.name(last) >= name) {
                wrong = Some("a directory is not in order");
            }
            listing.push(name, Named::Child(node));
        };
        self.tree.entries(directory, &mut give).map_err(WriteError::Tree)?;
        if let Some(wrong) = wrong {
            return Err(WriteError::Malformed(wrong));
        }
        for (dot, named) in dots {
            listing.push(dot, *named);
        }
        Ok(listing)
    }

    /// Extended attributes in the form of the image.
    fn xattrs(&self, node: Node) -> Result<Vec<u8>, WriteError<T::Error>> {
        let (mut list, mut refused) = (Vec::new(), None);
        let mut give = |(name, value): (&[u8], &[u8])| {
            if !format::add_xattr(&mut list, name, value) && refused.is_none() {
                refused =
                    Some(format!("the extended attribute {} of {} bytes", String::from_utf8_lossy(name), value.len()));
            }
        };
        self.tree.xattrs(node, &mut give).map_err(WriteError::Tree)?;
        refused.map_or(Ok(list), |what| Err(WriteError::Inexpressible(what)))
    }

    /// Writes an inode and keeps room for content of `len` bytes. Returns its number, where whole blocks lie, and where the rest does.
    fn place(&mut self, node: Node, inode: &Inode, len: u64) -> Result<(u64, u64, u64), WriteError<T::Error>> {
        let rest = len % BLOCK;
        let inline = rest > 0 && rest <= INLINE_MAX;
        let in_blocks = if inline { len - rest } else { len.next_multiple_of(BLOCK) };
        self.limit(len)?;
        let mut blocks_at = 0;
        if in_blocks > 0 {
            blocks_at = self.area.reserve_blocks(in_blocks)?;
        }
        let after = if inline { rest } else { 0 };
        let layout = if inline { Layout::Inline } else { Layout::Plain };
        let nid = self.place_inode(node, inode, after, (layout, len, (blocks_at / BLOCK) as u32))?;
        let rest_at = if inline { self.area.len() } else { blocks_at + len - rest };
        self.area.reserve(after)?;
        Ok((nid, blocks_at, rest_at))
    }

    /// Writes the inode of a file that is in chunks, and returns its number.
    fn place_chunked(&mut self, node: Node, inode: &Inode, chunks: &Chunks) -> Result<u64, WriteError<T::Error>> {
        let list = format::chunk_list(chunks.device, &chunks.firsts);
        self.limit(list.len() as u64)?;
        let nid = self.place_inode(node, inode, 0, (Layout::Chunked, inode.size, format::chunk_form(chunks.bits)))?;
        self.area.reserve(self.area.len().next_multiple_of(8) - self.area.len())?;
        self.area.append(&list)?;
        self.chunked = true;
        Ok(nid)
    }

    /// Writes an inode's record and extended attributes, after which `after` bytes lie in one block; returns its number.
    fn place_inode(
        &mut self,
        node: Node,
        inode: &Inode,
        after: u64,
        (layout, size, content): (Layout, u64, u32),
    ) -> Result<u64, WriteError<T::Error>> {
        self.limit(0)?;
        let xattrs = self.xattrs(node)?;
        let at = self.area.place(INODE_LEN, xattrs.len() as u64, after)?;
        let numbered_from = *self.numbered_from.get_or_insert(at / BLOCK);
        let nid = (at - numbered_from * BLOCK) / SLOT;
        let placed = Placed { layout, xattrs_len: xattrs.len(), size, content, number: nid as u32 };
        self.area.append(&format::inode(inode, placed))?;
        self.area.append(&xattrs)?;
        self.inodes += 1;
        Ok(nid)
    }

    /// Refuses to go on if the image with `more` bytes is too long.
    fn limit(&self, more: u64) -> Result<(), WriteError<T::Error>> {
        match self.area.len().checked_add(more) {
            Some(len) if len <= self.len_max => Ok(()),
            _ => Err(WriteError::TooLong(self.len_max)),
        }
    }

    fn place_directory(
        &mut self,
        node: Node,
        inode: &Inode,
        parent: Option<u64>,
    ) -> Result<Directory, WriteError<T::Error>> {
        let listing = self.list(node)?;
        let len = listing.blocks().1;
        let (nid, blocks_at, rest_at) = self.place(node, inode, len)?;
        if self.placed.insert(node, nid).is_some() {
            return Err(WriteError::Malformed("a directory has two names"));
        }
        let (parent, blocks) = (parent.unwrap_or(nid), (blocks_at, len - len % BLOCK));
        let listing = Some(listing).filter(|listing| self.waiting + listing.size() <= WAITING_MAX);
        self.waiting += listing.as_ref().map_or(0, Listing::size);
        Ok(Directory { node, nid, parent, blocks, rest_at, len, listing })
    }

    /// Writes an inode that is no directory, and returns its number.
    fn place_other(&mut self, node: Node, inode: &Inode) -> Result<u64, WriteError<T::Error>> {
        match inode.mode & S_IFMT {
            S_IFREG => {
                let (first, start) = self.content(inode)?;
                let holes = self.holes(node, inode)?;
                let blocks = inode.size.div_ceil(BLOCK);
                if blocks > 1 || !holes.is_empty() {
                    let chunks = Chunks::of(&holes, (inode.content.0, first), blocks);
                    return self.place_chunked(node, inode, &chunks);
                }
                self.place_inode(node, inode, 0, (Layout::Plain, inode.size, start + first))
            }
            S_IFLNK => {
                let target = self.tree.target(node).map_err(WriteError::Tree)?;
                if target.is_empty() || target.len() >= BLOCK as usize || target.contains(&0) {
                    return Err(WriteError::Malformed("a link's target that no link can have"));
                }
                let (nid, _, at) = self.place(node, inode, target.len() as u64)?;
                self.area.patch(at, &target)?;
                Ok(nid)
            }
            _ => self.place_inode(node, inode, 0, (Layout::Plain, 0, format::device_number(inode.rdev))),
        }
    }

    /// A file's holes, none next to another.
    fn holes(&self, node: Node, inode: &Inode) -> Result<Vec<Range<u64>>, WriteError<T::Error>> {
        if inode.size == 0 {
            return Ok(Vec::new());
        }
        let blocks = inode.size.div_ceil(BLOCK);
        let (mut holes, mut wrong) = (Vec::<Range<u64>>::new(), false);
        let mut give = |hole: Range<u64>| {
            let after = holes.last().map_or(0, |last| last.end);
            wrong |= hole.start < after || hole.is_empty() || hole.end > blocks;
            match holes.last_mut() {
                Some(last) if last.end == hole.start => last.end = hole.end,
                _ => holes.push(hole),
            }
        };
        self.tree.holes(node, inode, &mut give).map_err(WriteError::Tree)?;
        if wrong {
            return Err(WriteError::Malformed("a file's holes are not in order"));
        }
        Ok(holes)
    }

    /// The block on its device at which a file's content begins, and the block in the address space of all at which the device begins.
    fn content(&self, inode: &Inode) -> Result<(u32, u32), WriteError<T::Error>> {
        if inode.size == 0 {
            return Ok((0, 0));
        }
        let (device, first) = inode.content;
        let (blocks, start) = self
            .devices
            .get(usize::from(device))
            .zip(self.starts.get(usize::from(device)))
            .map(|(device, start)| (device.blocks, *start))
            .ok_or(WriteError::Malformed("a file lies on a device that does not exist"))?;
        let end = first.checked_add(inode.size.div_ceil(BLOCK)).filter(|end| *end <= blocks);
        end.ok_or(WriteError::Malformed("a file lies past the end of its device"))?;
        Ok((first as u32, start))
    }

    /// Places a directory's children and writes its entries. Directories among the children are added to `pending`.
    fn fill(&mut self, mut directory: Directory, pending: &mut Vec<Directory>) -> Result<(), WriteError<T::Error>> {
        let listing = match directory.listing.take() {
            Some(listing) => {
                self.waiting -= listing.size();
                listing
            }
            None => self.list(directory.node)?,
        };
        let (blocks, len) = listing.blocks();
        if len != directory.len {
            return Err(WriteError::Malformed("a directory has changed"));
        }
        let mut targets = Vec::with_capacity(listing.entries.len());
        for (_, named) in &listing.entries {
            targets.push(match named {
                Named::This => (directory.nid, 2),
                Named::Parent => (directory.parent, 2),
                Named::Child(node) => self.child(*node, directory.nid, pending)?,
            });
        }
        let mut first = 0;
        for (number, count) in blocks.iter().enumerate() {
            let bytes = listing.encode(&targets, first, *count);
            let start = number as u64 * BLOCK;
            let at = if start < directory.blocks.1 { directory.blocks.0 + start } else { directory.rest_at };
            self.area.patch(at, &bytes)?;
            first += count;
        }
        Ok(())
    }

    /// The number and type of a child, which is placed unless it is known by another name.
    fn child(
        &mut self,
        node: Node,
        parent: u64,
        pending: &mut Vec<Directory>,
    ) -> Result<(u64, u8), WriteError<T::Error>> {
        let inode = self.inode(node)?;
        let file_type = format::file_type(inode.mode).ok_or(WriteError::Malformed("a file of an unknown type"))?;
        if inode.mode & S_IFMT == S_IFDIR {
            let directory = self.place_directory(node, &inode, Some(parent))?;
            let nid = directory.nid;
            pending.push(directory);
            return Ok((nid, file_type));
        }
        if let Some(known) = self.placed.get(&node) {
            return Ok((*known, file_type));
        }
        let nid = self.place_other(node, &inode)?;
        if inode.nlink > 1 {
            self.placed.insert(node, nid);
        }
        Ok((nid, file_type))
    }
}
