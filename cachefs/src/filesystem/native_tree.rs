//! A chain's merged tree as an EROFS file system, which the kernel reads by itself.
//!
//! ```text
//! metadata   an image on the local disk, written from the layers' indexes, which this host has verified
//! content    one data file: those of the chain's layers (`flat`) one behind the other; its reads come to [`Filesystem::read_data`]
//! ```
//!
//! The kernel then asks nobody for names, attributes, links and listings, and for content only at the first read. What the tree
//! shows is what the mount's own tree of the chain shows, because it is written by asking that.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use erofs::{BLOCK, Device, WriteError};
use store::Digest;
use store::layer::{ROOT, S_IFMT, S_IFREG, Source};

use super::Filesystem;
use super::flat::FlatFile;
use super::layer::Layer;
use super::node::{Detail, FIRST_OFFSET, Node, ReplyRoom, Slot};
use super::slots::{SlotContent, Slots};
use crate::source::failure::{Failure, Result, stored};

/// What an inode takes of the metadata at least, bytes.
const INODE_MIN: u64 = 64;
/// No holes are looked for in files that are smaller than this, bytes: most files are, and nobody gains by it.
const SPARSE_MIN: u64 = 64 << 10;

/// The content of a native tree: the data files of the chain's layers, one behind the other.
#[derive(Debug)]
pub struct ChainContent {
    chain: Digest,
    /// The layers that have content, each with the first of its blocks.
    layers: Vec<(u64, Arc<Layer>)>,
    blocks: u64,
}

impl ChainContent {
    /// Content that nobody reads.
    pub fn unread() -> ChainContent {
        ChainContent { chain: Digest::from_bytes([0; 32]), layers: Vec::new(), blocks: 1 }
    }

    /// The chain.
    pub fn chain(&self) -> &Digest {
        &self.chain
    }

    /// The length in blocks.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The layers that have content.
    pub fn layers(&self) -> impl Iterator<Item = &Arc<Layer>> {
        self.layers.iter().map(|(_, layer)| layer)
    }

    /// Adds a layer with content of so many blocks; returns the first of them, if there is any.
    fn add(&mut self, layer: Arc<Layer>, blocks: u64) -> Option<u64> {
        let first = self.blocks;
        if blocks == 0 {
            return None;
        }
        self.layers.push((first, layer));
        self.blocks = self.blocks.saturating_add(blocks);
        Some(first)
    }

    /// The content of an open chain. Reads all inodes of its layers, if nobody has done that.
    fn of(chain: &Digest, layers: Vec<Arc<Layer>>) -> Result<ChainContent> {
        let mut content = ChainContent { chain: *chain, layers: Vec::new(), blocks: 0 };
        let mut seen = HashSet::new();
        for layer in layers {
            if seen.insert(layer.slot) {
                let blocks = layer.flat()?.blocks();
                content.add(layer, blocks);
            }
        }
        Ok(content)
    }

    /// The layer that has a block, and the first of its blocks; nothing behind the last.
    fn layer_at(&self, block: u64) -> Option<(u64, &Arc<Layer>)> {
        let begun = self.layers.partition_point(|(first, _)| *first <= block);
        let (first, layer) = self.layers[..begun].last().filter(|_| block < self.blocks)?;
        Some((*first, layer))
    }
}

/// What the kernel needs besides the metadata.
#[derive(Debug)]
pub struct NativeTree {
    /// The content of its files.
    pub content: Arc<ChainContent>,
    /// The metadata's length in bytes.
    pub len: u64,
}

/// The tree of a chain as the writer asks for it.
struct Chain<'a> {
    slots: &'a Slots,
    root: Node,
    /// For each layer with content: the first of its blocks, and the first block of each inode's content, counted from there.
    contents: HashMap<Slot, (u64, Vec<u64>)>,
}

impl Chain<'_> {
    fn place(&self, node: erofs::Node) -> Result<(SlotContent, Node)> {
        let node = Node::from_number(node);
        Ok((self.slots.get(node.slot())?, node))
    }
}

impl erofs::Tree for Chain<'_> {
    type Error = Failure;

    fn root(&self) -> erofs::Node {
        self.root.number()
    }

    fn inode(&self, node: erofs::Node) -> Result<erofs::Inode> {
        let (place, node) = self.place(node)?;
        let shown = place.attributes(node)?;
        let content = match self.contents.get(&node.slot()) {
            Some((layer, firsts)) if shown.mode & S_IFMT == S_IFREG => {
                layer + firsts.get(node.position() as usize).ok_or(Failure::UnknownNode)?
            }
            _ => 0,
        };
        Ok(erofs::Inode {
            mode: shown.mode,
            uid: shown.uid,
            gid: shown.gid,
            nlink: shown.nlink,
            size: shown.size,
            mtime: shown.mtime.0,
            mtime_nsec: shown.mtime.1,
            rdev: shown.rdev,
            content: (0, content),
        })
    }

    fn entries(&self, directory: erofs::Node, give: &mut dyn FnMut(&[u8], erofs::Node)) -> Result<()> {
        let (place, directory) = self.place(directory)?;
        // Behind `.` and `..`.
        place.list(directory, FIRST_OFFSET - 1, Detail::Names, &mut |entry| {
            give(entry.name, entry.node.number());
            ReplyRoom::Left
        })
    }

    fn xattrs(&self, node: erofs::Node, give: &mut dyn FnMut(erofs::Xattr<'_>)) -> Result<()> {
        let (place, node) = self.place(node)?;
        place.each_xattr(node, |name, value| give((name, value)))
    }

    fn holes(&self, file: erofs::Node, inode: &erofs::Inode, give: &mut dyn FnMut(Range<u64>)) -> Result<()> {
        if inode.size < SPARSE_MIN {
            return Ok(());
        }
        let (place, file) = self.place(file)?;
        let content = place.content(file)?;
        for number in 0..content.inode.piece_count() {
            let piece = stored(content.index.piece(&content.inode, number))?;
            let is_aligned = piece.offset % BLOCK == 0;
            if piece.source == Source::Hole && is_aligned {
                let first = piece.offset / BLOCK;
                give(first..first + u64::from(piece.len).div_ceil(BLOCK));
            }
        }
        Ok(())
    }

    fn target(&self, link: erofs::Node) -> Result<Vec<u8>> {
        let (place, link) = self.place(link)?;
        place.link_target(link)
    }
}

impl Filesystem {
    /// Writes the metadata of a chain's native tree, of at most `len_max` bytes, into an empty file, which must be open for reading too. The chain must
    /// have been opened.
    /// Reads everything of its layers' indexes.
    pub fn write_native_tree(
        &self,
        chain: &Digest,
        file: &File,
        len_max: u64,
    ) -> std::result::Result<NativeTree, WriteError<Failure>> {
        let opened = self.slots.chain(chain).ok_or(WriteError::Tree(Failure::UnknownNode))?;
        let layers = opened.opened_layers().map_err(WriteError::Tree)?;
        // Merging takes memory and time for each layer's inodes, also where few of them are left to be shown.
        let inodes = layers.iter().map(|layer| Ok(u64::from(layer.index()?.inode_count()))).sum::<Result<u64>>();
        if inodes.map_err(WriteError::Tree)?.saturating_mul(INODE_MIN) > len_max {
            return Err(WriteError::TooLong(len_max));
        }
        let mut content = ChainContent { chain: *chain, layers: Vec::new(), blocks: 0 };
        let mut contents = HashMap::new();
        for layer in layers {
            if contents.contains_key(&layer.slot) {
                continue;
            }
            let (blocks, firsts) = layer.lay_out().map_err(WriteError::Tree)?;
            if let Some(first) = content.add(Arc::clone(&layer), blocks) {
                contents.insert(layer.slot, (first, firsts));
            }
        }
        let root = opened.root().map_err(WriteError::Tree)?;
        let tree = Chain { slots: &self.slots, root, contents };
        let device = Some(Device { blocks: content.blocks }).filter(|device| device.blocks > 0);
        let written = erofs::write(&tree, device.as_slice(), chain.as_bytes(), file, len_max)?;
        Ok(NativeTree { content: Arc::new(content), len: written.len })
    }

    /// Finds the content of a chain's native tree that an earlier worker has mounted; `done` is called now or, if that needs layers' indexes, later.
    pub fn content_of_chain<F>(self: &Arc<Self>, chain: Digest, done: F)
    where
        F: FnOnce(Result<Arc<ChainContent>>) + Send + 'static,
    {
        let Some(known) = self.slots.known_chain(&chain) else { return done(Err(Failure::UnknownNode)) };
        let root = known.root_or_likely();
        let content = move |_: &Filesystem| ChainContent::of(&chain, known.opened_layers()?).map(Arc::new);
        self.answer(root, content, done);
    }

    /// Reads up to `len` bytes of a chain's data file; `done` is called now or, if that needs the shared store, later. Behind a file's
    /// end are zeros up to the next block.
    pub fn read_data<F>(self: &Arc<Self>, content: &Arc<ChainContent>, offset: u64, len: usize, done: F)
    where
        F: FnOnce(Result<&[u8]>) + Send + 'static,
    {
        let read = DataRead { content: Arc::clone(content), offset, len, before: Vec::new(), done: Box::new(done) };
        self.read_on(read);
    }

    /// Reads one file's share of a range, and then the rest.
    fn read_on(self: &Arc<Self>, read: DataRead) {
        let block = read.offset / BLOCK;
        let Some((first, layer)) = read.content.layer_at(block).filter(|_| read.len > 0) else {
            return (read.done)(Ok(&read.before));
        };
        let (slot, layer, this) = (layer.slot, Arc::clone(layer), Arc::clone(self));
        let found = move |_: &Filesystem| layer.flat()?.file_at(layer.index()?, block - first);
        self.answer(Node::new(slot, ROOT.0), found, move |file| match file {
            Ok(Some(file)) => this.read_in(slot, &FlatFile { first: first + file.first, ..file }, read),
            Ok(None) => (read.done)(Err(Failure::Damaged)),
            Err(failure) => (read.done)(Err(failure)),
        });
    }

    /// The same where the file is known, which lies in a layer's slot, and where in the data file.
    fn read_in(self: &Arc<Self>, slot: Slot, file: &FlatFile, mut read: DataRead) {
        let within = read.offset - file.first * BLOCK;
        let share = (file.end() * BLOCK - read.offset).min(read.len as u64) as usize;
        let content = file.inode.size.saturating_sub(within).min(share as u64) as usize;
        let this = Arc::clone(self);
        let (node, reader) = (Node::new(slot, file.number.0), Some(read.content.chain));
        self.read_for(reader, node, within, content, move |bytes| match bytes {
            // Most requests are for a part of one file.
            Ok(bytes) if bytes.len() == read.len && read.before.is_empty() => (read.done)(Ok(bytes)),
            Ok(bytes) if bytes.len() == content => {
                read.before.extend_from_slice(bytes);
                read.before.resize(read.before.len() + share - content, 0);
                read.offset += share as u64;
                read.len -= share;
                this.read_on(read);
            }
            Ok(_) => (read.done)(Err(Failure::Damaged)),
            Err(failure) => (read.done)(Err(failure)),
        });
    }
}

/// A read of a data file, as far as it has come.
struct DataRead {
    content: Arc<ChainContent>,
    /// What is still to be read.
    offset: u64,
    len: usize,
    /// What was read.
    before: Vec<u8>,
    done: Done,
}

type Done = Box<dyn FnOnce(Result<&[u8]>) + Send>;

#[cfg(test)]
impl Filesystem {
    /// The layer in whose slot a node is.
    pub(super) fn layer_of(&self, node: Node) -> Result<Arc<Layer>> {
        match self.slots.get(node.slot())? {
            super::SlotContent::Layer(layer) => Ok(layer),
            _ => Err(Failure::UnknownNode),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
