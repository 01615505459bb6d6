//! The tree that the mount shows, as plain Rust: it knows requests, not FUSE, and is tested without a mount.
//!
//! ```text
//! /
//!   layers/<diffID hex>/        one layer in overlayfs form
//!   chains/<chainID hex>/       the merged tree of a chain of layers
//!   images/<repository>/<tag>   a link to a chain
//! ```
//!
//! Nothing here waits for the shared disk. What is loaded is answered at once, from memory or a read of the local disk; a look-up
//! that needs a layer's index, and a read that needs a chunk, take a callback that a pool thread calls later. Where an index's
//! local copy turns out to be gone, [`Filesystem::recover`] brings it back, and the request is tried once more. What each request promises is in SEMANTICS.md.
//!
//! - `node`: node numbers and the answers' types. `numbers`: what the kernel calls nodes by.
//! - `control`: nodes of the control tree.
//! - `listing`: several sorted directories as one.
//! - `slots`, `chain`: layers and chains by number.
//! - `opening`: look-ups that need more than what is loaded.
//! - `recovery`: requests that find an index's local copy gone.
//! - `attributes`: extended attributes.
//! - `io_mode`: how opens are answered, and which I/O mode each open file is in.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use store::layer::{Inode, InodeIndex, LayerIndex, ROOT, S_IFDIR, Source};
use store::{ContentDigest, Digest};

use crate::cache::whole::WholeFile;
use crate::cache::{Cache, Content};
use crate::catalogue::{CatalogueSnapshot, CatalogueWatcher, ImageEntry};
use crate::failure::{Failure, Result};
use crate::indexes::Indexes;
use crate::layer_name::LayerName;
use crate::metrics::Metrics;
use crate::prefetch::Prefetcher;
use crate::wants::ImageMisses;

mod attributes;
pub mod chain;
pub mod control;
pub mod io_mode;
mod listing;
pub mod node;
pub mod numbers;
mod opening;
mod recovery;
pub mod slots;

use chain::Chain;
use control::{Control, Controls};
use node::{Attributes, Detail, FIRST_OFFSET, Found, Lifetime, Listed, Node, Room, Slot, inode_of};
use numbers::Numbers;
use slots::{Layer, Place, Slots};

/// Takes a result of the store, logging what is wrong with it.
fn stored<T>(result: store::error::Result<T>) -> Result<T> {
    result.map_err(|error| {
        match &error {
            // What the local disk does not give comes from the store: whoever tries that says how it went.
            store::Error::Io { .. } => tracing::debug!("{error}"),
            error => tracing::error!("{error}"),
        }
        Failure::from(&error)
    })
}

/// The tree.
pub struct Filesystem {
    slots: Slots,
    controls: Controls,
    follower: Arc<CatalogueWatcher>,
    indexes: Arc<Indexes>,
    cache: Arc<Cache>,
    prefetcher: Arc<Prefetcher>,
    timeout: Duration,
    cache_dir: Vec<u8>,
    wants: ImageMisses,
    numbers: Numbers,
}

/// A seek's aim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seek {
    /// The next byte that is not in a hole.
    Data,
    /// The next hole, or the end.
    Hole,
}

impl Filesystem {
    /// The tree of what `follower` knows. The root tells `cache_dir` in the extended attribute `user.cachefs.cache`.
    pub fn new(
        follower: Arc<CatalogueWatcher>,
        indexes: Arc<Indexes>,
        cache: Arc<Cache>,
        prefetcher: Arc<Prefetcher>,
        timeout: Duration,
        cache_dir: &std::path::Path,
    ) -> Filesystem {
        let cache_dir = std::os::unix::ffi::OsStrExt::as_bytes(cache_dir.as_os_str()).to_vec();
        Filesystem {
            slots: Slots::default(),
            controls: Controls::default(),
            follower,
            indexes,
            cache,
            prefetcher,
            timeout,
            cache_dir,
            wants: ImageMisses::default(),
            numbers: Numbers::default(),
        }
    }

    /// Images that were looked for in vain.
    pub fn wants(&self) -> &ImageMisses {
        &self.wants
    }

    /// What the kernel calls nodes by.
    pub fn numbers(&self) -> &Numbers {
        &self.numbers
    }

    /// Layers and chains that have been opened.
    pub fn opened(&self) -> (usize, usize) {
        self.slots.opened()
    }

    /// The kernel is about to learn of `count` inodes of a slot; it keeps what it was told until it says otherwise.
    pub fn learns(&self, slot: Slot, count: u32) {
        self.slots.known(slot, i64::from(count));
    }

    /// The kernel forgets a node that it was told of so many times.
    pub fn forgets(&self, node: Node, count: u64) {
        self.slots.known(node.slot(), i64::try_from(count).unwrap_or(i64::MAX).wrapping_neg());
    }

    /// The layers of which the kernel knows inodes: whatever is open, mounted or was looked at and not forgotten since.
    pub fn in_use(&self) -> BTreeSet<Digest> {
        self.slots.in_use()
    }

    /// The images.
    pub fn view(&self) -> Arc<CatalogueSnapshot> {
        self.follower.view()
    }

    /// Counters, shared with everything that reads.
    pub fn metrics(&self) -> &Metrics {
        self.cache.metrics()
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.timeout
    }

    /// When the control tree last changed, for its directories' mtime: the kernel reads a listing again when that differs.
    fn control_mtime(&self) -> (i64, u32) {
        let since = self.follower.view().changed_at().duration_since(UNIX_EPOCH).unwrap_or_default();
        (since.as_secs() as i64, since.subsec_nanos())
    }

    /// Looks `name` up in the directory `parent`; `done` is called now or, if that needs the shared store, later.
    pub fn lookup<F>(self: &Arc<Self>, parent: Node, name: &[u8], done: F)
    where
        F: FnOnce(Result<Found>) + Send + 'static,
    {
        match self.slots.get(parent.slot()) {
            Ok(Place::Control) => self.lookup_control(parent, name, Box::new(done)),
            Ok(place) => match lookup_in(&place, parent, name) {
                Ok(found) => done(Ok(found)),
                Err(failure) => {
                    let name = name.to_vec();
                    self.recover(parent, failure, move |recovered| {
                        done(recovered.and_then(|()| lookup_in(&place, parent, &name)));
                    });
                }
            },
            Err(failure) => done(Err(failure)),
        }
    }

    /// What `stat` shows of a node.
    pub fn attributes(&self, node: Node) -> Result<Attributes> {
        match self.slots.get(node.slot())? {
            Place::Control => self.control_attributes(node),
            Place::Layer(layer) => Ok(Attributes::of(node, &stored_inode(layer.index()?, inode_of(node))?)),
            Place::Chain(chain) => chain.attributes(node, &chain.members(node)?),
        }
    }

    fn control_attributes(&self, node: Node) -> Result<Attributes> {
        Ok(match self.controls.get(node)? {
            Control::Tag(path, chain) => {
                Attributes::symlink(node, self.control_mtime(), control::link_target(&path, &chain).len())
            }
            _ => Attributes::directory(node, self.control_mtime()),
        })
    }

    /// A symbolic link's target.
    pub fn link_target(&self, node: Node) -> Result<Vec<u8>> {
        match self.slots.get(node.slot())? {
            Place::Control => match self.controls.get(node)? {
                Control::Tag(path, chain) => Ok(control::link_target(&path, &chain).into_bytes()),
                _ => Err(Failure::WrongKind),
            },
            Place::Layer(layer) => {
                let index = layer.index()?;
                let inode = stored_inode(index, inode_of(node))?;
                match inode.is_symlink() {
                    true => Ok(stored(index.link_target(&inode))?.into_owned()),
                    false => Err(Failure::WrongKind),
                }
            }
            Place::Chain(_) => Err(Failure::WrongKind),
        }
    }

    /// Lists a directory from `offset` on: gives entries until there is no room for more.
    pub fn list(
        &self,
        node: Node,
        offset: u64,
        detail: Detail,
        give: &mut dyn FnMut(Listed<'_>) -> Room,
    ) -> Result<()> {
        let place = self.slots.get(node.slot())?;
        let (parent, is_dir) = self.parent(node, &place)?;
        if !is_dir {
            return Err(Failure::NotDirectory);
        }
        for (name, offset_after, target) in [(&b"."[..], 1, node), (b"..", 2, parent)] {
            if offset >= offset_after {
                continue;
            }
            // The kernel takes nothing of these two but the number.
            let attributes =
                (detail == Detail::Attributes).then(|| (Attributes::directory(target, (0, 0)), Lifetime::None));
            if give(Listed { name, node: target, file_type: S_IFDIR, offset: offset_after, attributes }) == Room::Full {
                return Ok(());
            }
        }
        match place {
            Place::Control => self.list_control(node, offset, give, detail),
            Place::Layer(layer) => list_layer(&layer, node, offset, detail, give),
            Place::Chain(chain) => chain.list(node, &chain.members(node)?, offset, detail, give),
        }
    }

    /// A directory's parent, and whether the node is a directory at all.
    fn parent(&self, node: Node, place: &Place) -> Result<(Node, bool)> {
        Ok(match place {
            Place::Control => match self.controls.get(node)? {
                Control::Root | Control::Layers | Control::Chains => (Node::ROOT, true),
                Control::Images(path) => match crate::catalogue::split(&path) {
                    Some((parent, _)) => (self.controls.node(Control::Images(parent.into())), true),
                    None => (Node::ROOT, true),
                },
                Control::Tag(..) => (Node::ROOT, false),
            },
            Place::Layer(layer) => {
                let inode = stored_inode(layer.index()?, inode_of(node))?;
                match inode_of(node) == ROOT {
                    true => (self.controls.node(Control::Layers), true),
                    false => (Node::new(layer.slot, inode.parent.0), inode.is_dir()),
                }
            }
            Place::Chain(chain) => {
                let parent = chain.parent(node)?;
                (parent.unwrap_or_else(|| self.controls.node(Control::Chains)), true)
            }
        })
    }

    fn list_control(
        &self,
        node: Node,
        offset: u64,
        give: &mut dyn FnMut(Listed<'_>) -> Room,
        detail: Detail,
    ) -> Result<()> {
        let view = self.follower.view();
        let give = &mut |name: &[u8], target: Node, file_type: u32, offset: u64, attributes: Attributes| {
            let attributes = (detail == Detail::Attributes).then_some((attributes, Lifetime::None));
            give(Listed { name, node: target, file_type, offset, attributes })
        };
        let mtime = self.control_mtime();
        match self.controls.get(node)? {
            Control::Root => {
                let children =
                    [("chains", Control::Chains), ("images", Control::Images("".into())), ("layers", Control::Layers)];
                for (position, (name, control)) in (FIRST_OFFSET..).zip(children).skip(skipped(offset)) {
                    let target = self.controls.node(control);
                    if give(name.as_bytes(), target, S_IFDIR, position, Attributes::directory(target, mtime))
                        == Room::Full
                    {
                        break;
                    }
                }
            }
            Control::Layers => {
                for layer in view.layers().iter().filter(|layer| digest_offset(layer) > offset) {
                    let target = Node::new(self.slots.reserve_layer(LayerName::first(*layer)).slot, ROOT.0);
                    let attributes = Attributes::directory(target, mtime);
                    if give(layer.hex().as_bytes(), target, S_IFDIR, digest_offset(layer), attributes) == Room::Full {
                        break;
                    }
                }
            }
            Control::Chains => {
                for chain in view.chains().filter(|chain| digest_offset(chain) > offset) {
                    let depth = view.chain(chain).map_or(0, |layers| layers.len());
                    let target = self.slots.reserve_chain(*chain, depth).root_or_likely();
                    let attributes = Attributes::directory(target, mtime);
                    if give(chain.hex().as_bytes(), target, S_IFDIR, digest_offset(chain), attributes) == Room::Full {
                        break;
                    }
                }
            }
            Control::Images(path) => {
                let entries = view.directory(&path).into_iter().flatten();
                let mut entries: Vec<_> = entries.map(|(name, entry)| (name_offset(name), name, entry)).collect();
                entries.retain(|(after, ..)| *after > offset);
                entries.sort_unstable_by_key(|(after, ..)| *after);
                for (after, name, entry) in entries {
                    let attributes = self.image_attributes(&path, name, entry);
                    let file_type = attributes.mode & store::layer::S_IFMT;
                    if give(name.as_bytes(), attributes.node, file_type, after, attributes) == Room::Full {
                        break;
                    }
                }
            }
            Control::Tag(..) => return Err(Failure::NotDirectory),
        }
        Ok(())
    }

    fn image_attributes(&self, path: &Arc<str>, name: &str, entry: &ImageEntry) -> Attributes {
        let mtime = self.control_mtime();
        match entry {
            ImageEntry::Directory => {
                let below = if path.is_empty() { name.to_owned() } else { format!("{path}/{name}") };
                Attributes::directory(self.controls.node(Control::Images(below.into())), mtime)
            }
            ImageEntry::Tag(chain) => {
                let node = self.controls.node(Control::Tag(Arc::clone(path), *chain));
                Attributes::symlink(node, mtime, control::link_target(path, chain).len())
            }
        }
    }

    /// The regular file `node`.
    fn content(&self, node: Node) -> Result<Content> {
        match self.slots.get(node.slot())? {
            Place::Layer(layer) => {
                let index = layer.index()?;
                let inode = stored_inode(index, inode_of(node))?;
                match inode.is_file() {
                    true => Ok(Content { index: Arc::clone(index), number: inode_of(node), inode }),
                    false if inode.is_dir() => Err(Failure::IsDirectory),
                    false => Err(Failure::WrongKind),
                }
            }
            Place::Control | Place::Chain(_) => Err(Failure::IsDirectory),
        }
    }

    /// Notes that a file was opened: its content stays in the local cache until it is closed.
    pub fn open(&self, node: Node) -> Result<()> {
        self.cache.opened(&self.content(node)?);
        Ok(())
    }

    /// Notes that a file was closed.
    pub fn release(self: &Arc<Self>, node: Node) {
        self.answer(node, move |this| this.content(node).map(|content| this.cache.closed(&content)), drop);
    }

    /// Calls `done` with the cache file of a regular file, if all of it is there and verified; see [`Cache::whole_file`].
    pub fn whole_file<F>(self: &Arc<Self>, node: Node, done: F)
    where
        F: FnOnce(Result<Option<WholeFile>>) + Send + 'static,
    {
        let this = Arc::clone(self);
        self.answer(
            node,
            move |this| this.content(node),
            move |content| match content {
                Ok(content) => this.cache.whole_file(content, done),
                Err(failure) => done(Err(failure)),
            },
        );
    }

    /// Reads up to `len` bytes from `offset` on; `done` is called now or, if that needs the shared store, later.
    pub fn read<F>(self: &Arc<Self>, node: Node, offset: u64, len: usize, done: F)
    where
        F: FnOnce(Result<&[u8]>) + Send + 'static,
    {
        let this = Arc::clone(self);
        self.read_once(node, offset, len, move |result| match result {
            Ok(bytes) => done(Ok(bytes)),
            Err(failure) => {
                let again = Arc::clone(&this);
                this.recover(node, failure, move |recovered| match recovered {
                    Ok(()) => again.read_once(node, offset, len, done),
                    Err(failure) => done(Err(failure)),
                });
            }
        });
    }

    fn read_once<F>(&self, node: Node, offset: u64, len: usize, done: F)
    where
        F: FnOnce(Result<&[u8]>) + Send + 'static,
    {
        match self.content(node) {
            Ok(content) => self.cache.read(content, offset, len, done),
            Err(failure) => done(Err(failure)),
        }
    }

    /// The next data or hole at or after `offset`.
    pub fn seek(&self, node: Node, offset: u64, aim: Seek) -> Result<u64> {
        let Content { index, inode, .. } = self.content(node)?;
        if offset >= inode.size {
            return Err(Failure::NoData);
        }
        let piece_size = u64::from(index.header().piece_size);
        for number in (offset / piece_size) as u32..inode.piece_count() {
            let piece = stored(index.piece(&inode, number))?;
            let is_hole = piece.source == Source::Hole;
            if is_hole == (aim == Seek::Hole) {
                return Ok(piece.offset.max(offset));
            }
        }
        match aim {
            Seek::Hole => Ok(inode.size),
            Seek::Data => Err(Failure::NoData),
        }
    }
}

/// How many entries of a numbered listing lie before `offset`.
fn skipped(offset: u64) -> usize {
    (offset + 1).saturating_sub(FIRST_OFFSET) as usize
}

/// Listings of digests go on after a digest, wherever others come and go: 62 bits of it are the offset.
fn digest_offset(digest: &Digest) -> u64 {
    let mut head = [0; 8];
    head.copy_from_slice(&digest.as_bytes()[..8]);
    (u64::from_be_bytes(head) >> 2).max(FIRST_OFFSET)
}

/// Listings of names go on after a name, likewise: they are in the order of these numbers.
fn name_offset(name: &str) -> u64 {
    digest_offset(&Digest::from_bytes(*ContentDigest::of(name.as_bytes()).as_bytes()))
}

/// An inode by a number that came from the kernel.
fn stored_inode(index: &LayerIndex, number: InodeIndex) -> Result<Inode> {
    match number.0 < index.inode_count() {
        true => stored(index.inode(number)),
        false => Err(Failure::UnknownNode),
    }
}

/// Looks a name up in a layer or chain.
fn lookup_in(place: &Place, parent: Node, name: &[u8]) -> Result<Found> {
    match place {
        Place::Control => Err(Failure::UnknownNode),
        Place::Layer(layer) => lookup_layer(layer, parent, name),
        Place::Chain(chain) => lookup_chain(chain, parent, name),
    }
}

fn lookup_layer(layer: &Layer, parent: Node, name: &[u8]) -> Result<Found> {
    let index = layer.index()?;
    let directory = stored_inode(index, inode_of(parent))?;
    if !directory.is_dir() {
        return Err(Failure::NotDirectory);
    }
    let Some(number) = stored(index.lookup(&directory, name))? else { return Ok(Found::Absent(Lifetime::Forever)) };
    let inode = stored(index.inode(number))?;
    Ok(Found::Entry(Attributes::of(Node::new(layer.slot, number.0), &inode), Lifetime::Forever))
}

fn lookup_chain(chain: &Chain, parent: Node, name: &[u8]) -> Result<Found> {
    let members = chain.members(parent)?;
    Ok(match chain.lookup(parent, &members, name)? {
        Some(attributes) => Found::Entry(attributes, Lifetime::Forever),
        None => Found::Absent(Lifetime::Forever),
    })
}

fn list_layer(
    layer: &Layer,
    node: Node,
    offset: u64,
    detail: Detail,
    give: &mut dyn FnMut(Listed<'_>) -> Room,
) -> Result<()> {
    let index = layer.index()?;
    let directory = stored_inode(index, inode_of(node))?;
    let first = offset.saturating_sub(FIRST_OFFSET - 1);
    let first = u32::try_from(first).unwrap_or(u32::MAX);
    for (position, entry) in (u64::from(first)..).zip(index.entries(&directory, first)) {
        let entry = stored(entry)?;
        let target = Node::new(layer.slot, entry.inode.0);
        let attributes = match detail {
            Detail::Names => None,
            Detail::Attributes => Some((Attributes::of(target, &stored(index.inode(entry.inode))?), Lifetime::Forever)),
        };
        let offset = FIRST_OFFSET + position;
        if give(Listed { name: &entry.name, node: target, file_type: entry.file_type, offset, attributes })
            == Room::Full
        {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
