//! A chain's merged tree as an EROFS file system, which the kernel reads by itself.
//!
//! ```text
//! metadata   an image on the local disk, written from the layers' indexes, which this host has verified
//! content    a data file for each layer of the chain (`flat`), whose reads come to [`Filesystem::read_data`]
//! ```
//!
//! The kernel then asks nobody for names, attributes, links and listings, and for content only at the first read. What the tree
//! shows is what the mount's own tree of the chain shows, because it is written by asking that.

use std::collections::HashMap;
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

/// What the kernel needs besides the metadata.
#[derive(Debug)]
pub struct NativeTree {
    /// The layers with content, in the order of the image's devices.
    pub devices: Vec<Arc<Layer>>,
    /// The metadata's length in bytes.
    pub len: u64,
}

/// The tree of a chain as the writer asks for it.
struct Chain<'a> {
    slots: &'a Slots,
    root: Node,
    /// The layers with content: the device's number, and where each inode's content begins there.
    devices: HashMap<Slot, (u16, Vec<u64>)>,
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
        let content = match self.devices.get(&node.slot()) {
            Some((device, firsts)) if shown.mode & S_IFMT == S_IFREG => {
                (*device, *firsts.get(node.position() as usize).ok_or(Failure::UnknownNode)?)
            }
            _ => (0, 0),
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
            content,
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
    /// Writes the metadata of a chain's native tree, of at most `len_max` bytes, into an empty file. The chain must have been opened.
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
        let (mut contents, mut devices, mut shown) = (HashMap::new(), Vec::new(), Vec::new());
        for layer in layers {
            if contents.contains_key(&layer.slot) {
                continue;
            }
            let (blocks, firsts) = layer.lay_out().map_err(WriteError::Tree)?;
            if blocks > 0 {
                contents.insert(layer.slot, (devices.len() as u16, firsts));
                devices.push(Device { blocks });
                shown.push(layer);
            }
        }
        let root = opened.root().map_err(WriteError::Tree)?;
        let tree = Chain { slots: &self.slots, root, devices: contents };
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&chain.as_bytes()[..16]);
        let written = erofs::write(&tree, &devices, uuid, file, len_max)?;
        Ok(NativeTree { devices: shown, len: written.len })
    }

    /// Reads up to `len` bytes of a layer's data file; `done` is called now or, if that needs the shared store, later. Behind a file's
    /// end are zeros up to the next block.
    pub fn read_data<F>(self: &Arc<Self>, layer: &Arc<Layer>, offset: u64, len: usize, done: F)
    where
        F: FnOnce(Result<&[u8]>) + Send + 'static,
    {
        self.read_on(layer, offset, len, Vec::new(), Box::new(done));
    }

    /// Reads one file's share of a range, and then the rest. `before` is what lies before `offset` in the range.
    fn read_on(self: &Arc<Self>, layer: &Arc<Layer>, offset: u64, len: usize, before: Vec<u8>, done: Done) {
        let (this, read) = (Arc::clone(self), Arc::clone(layer));
        let found = move |_: &Filesystem| read.flat()?.file_at(read.index()?, offset / BLOCK);
        let layer = Arc::clone(layer);
        self.answer(Node::new(layer.slot, ROOT.0), found, move |file| match file {
            Ok(Some(file)) if len > 0 => this.read_in(&layer, &file, offset, len, before, done),
            Ok(_) => done(Ok(&before)),
            Err(failure) => done(Err(failure)),
        });
    }

    fn read_in(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        file: &FlatFile,
        offset: u64,
        len: usize,
        before: Vec<u8>,
        done: Done,
    ) {
        let within = offset - file.first * BLOCK;
        let share = (file.end() * BLOCK - offset).min(len as u64) as usize;
        let content = file.inode.size.saturating_sub(within).min(share as u64) as usize;
        let (this, layer) = (Arc::clone(self), Arc::clone(layer));
        self.read(Node::new(layer.slot, file.number.0), within, content, move |read| match read {
            // Most requests are for a part of one file.
            Ok(bytes) if bytes.len() == len && before.is_empty() => done(Ok(bytes)),
            Ok(bytes) if bytes.len() == content => {
                let mut whole = before;
                whole.extend_from_slice(bytes);
                whole.resize(whole.len() + share - content, 0);
                this.read_on(&layer, offset + share as u64, len - share, whole, done);
            }
            Ok(_) => done(Err(Failure::Damaged)),
            Err(failure) => done(Err(failure)),
        });
    }
}

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

type Done = Box<dyn FnOnce(Result<&[u8]>) + Send>;

#[cfg(test)]
pub(crate) mod tests;
