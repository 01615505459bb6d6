//! The tree that the mount shows, as plain Rust: it knows requests, not FUSE, and is tested without a mount.
//!
//! ```text
//! /
//!   layers/<diffID hex>/        one layer in overlayfs form
//!   chains/<chainID hex>/       the merged tree of a chain of layers
//!   trees/<chainID hex>         a link to that, whose look-up has it mounted as a native tree
//!   images/<repository>/<tag>   a link to a chain in `trees`
//! ```
//!
//! Nothing here waits for the shared disk. A request that needs only what is loaded is answered at once, from memory or
//! by a read of the local disk. A look-up that needs a layer's index, and a read that needs a chunk, take a callback
//! that a pool thread calls later. If the local copy of an index turns out to be gone, [`Filesystem::recover`] fetches
//! it again, and the request is tried once more. SEMANTICS.md says what each request promises.
//!
//! - `node`: node numbers and the types of answers. `numbers`: the node numbers that the kernel sees.
//! - `catalogue_node`, `catalogue_tree`: the part that comes from the catalogue: `/`, `layers`, `chains`, `trees` and all below `images`.
//! - `listing`: several sorted directories as one.
//! - `slots`, `layer`, `chain`: layers and chains by number. `place`: what one of them answers.
//! - `opening`: look-ups that need more than what is loaded.
//! - `recovery`: requests that find an index's local copy gone.
//! - `attributes`: extended attributes.
//! - `tree_mounter`: who mounts native trees.
//! - `flat`: where files lie in a layer's data file. `native_tree`: a chain as an EROFS file system on top of a data file.
//! - `kernel_state`: what the kernel has been told, for the next worker that serves the mount.
//! - `io_mode`: how opens are answered, and which I/O mode each open file is in.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant, UNIX_EPOCH};

use store::layer::{ROOT, S_IFDIR, Source};
use store::{ContentDigest, Digest};

use crate::content::cache::whole::WholeFile;
use crate::content::cache::{Cache, Content};
use crate::content::indexes::Indexes;
use crate::content::prefetch::Prefetcher;
use crate::source::catalogue::{CatalogueSnapshot, CatalogueWatcher, ImageEntry};
use crate::source::failure::{Failure, Result, stored};
use crate::source::layer_name::LayerName;
use crate::source::metrics::Metrics;
use crate::uplink::image_misses::ImageMisses;
use crate::uplink::lease::roots::LinkedChains;

mod attributes;
pub mod catalogue_node;
pub mod catalogue_tree;
pub mod chain;
pub mod flat;
pub mod io_mode;
pub mod kernel_state;
pub mod layer;
mod listing;
pub mod native_tree;
pub mod node;
pub mod numbers;
mod opening;
mod place;
mod recovery;
pub mod slots;
pub mod tree_mounter;

use catalogue_node::CatalogueNode;
use catalogue_tree::CatalogueNodes;
use kernel_state::KernelState;
use layer::stored_inode;
use node::{Attributes, Detail, FIRST_OFFSET, Found, Lifetime, Listed, Node, ReplyRoom, Slot, inode_of};
use numbers::Numbers;
use slots::{SlotContent, Slots};
use tree_mounter::TreeMounter;

/// The tree that the mount shows.
pub struct Filesystem {
    slots: Slots,
    catalogue_nodes: CatalogueNodes,
    watcher: Arc<CatalogueWatcher>,
    indexes: Arc<Indexes>,
    cache: Arc<Cache>,
    prefetcher: Arc<Prefetcher>,
    linked: Arc<LinkedChains>,
    timeout: Duration,
    cache_dir: Vec<u8>,
    misses: ImageMisses,
    numbers: Numbers,
    native: OnceLock<Weak<dyn TreeMounter>>,
}

/// What a seek looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seek {
    /// The next byte that is not in a hole.
    Data,
    /// The next hole, or the end.
    Hole,
}

/// What the root directory holds, in the order in which it is listed.
fn top_level() -> [(&'static str, CatalogueNode); 4] {
    [
        ("chains", CatalogueNode::Chains),
        ("images", CatalogueNode::Images("".into())),
        ("layers", CatalogueNode::Layers),
        ("trees", CatalogueNode::Trees),
    ]
}

impl Filesystem {
    /// The tree of what `watcher` knows. The root names `cache_dir` in the extended attribute `user.cachefs.cache`.
    pub fn new(
        watcher: Arc<CatalogueWatcher>,
        indexes: Arc<Indexes>,
        cache: Arc<Cache>,
        prefetcher: Arc<Prefetcher>,
        linked: Arc<LinkedChains>,
        timeout: Duration,
        cache_dir: &std::path::Path,
    ) -> Filesystem {
        let cache_dir = std::os::unix::ffi::OsStrExt::as_bytes(cache_dir.as_os_str()).to_vec();
        Filesystem {
            slots: Slots::default(),
            catalogue_nodes: CatalogueNodes::default(),
            watcher,
            indexes,
            cache,
            prefetcher,
            linked,
            timeout,
            cache_dir,
            misses: ImageMisses::default(),
            numbers: Numbers::default(),
            native: OnceLock::new(),
        }
    }

    /// Goes on from what an earlier worker has told the kernel, and leaves to the next one what this one tells it.
    pub fn resume(self, state: &Arc<KernelState>) -> Filesystem {
        let slots = Slots::resume(Arc::clone(state));
        let catalogue_nodes = CatalogueNodes::resume(Arc::clone(state));
        let numbers = Numbers::resume(Arc::clone(state));
        Filesystem { slots, catalogue_nodes, numbers, ..self }
    }

    /// Has chains mounted as native trees from now on. What was said before holds.
    pub fn mount_natively(&self, native: Weak<dyn TreeMounter>) {
        let _ = self.native.set(native);
    }

    fn native(&self) -> Option<Arc<dyn TreeMounter>> {
        self.native.get()?.upgrade()
    }

    /// Images that were looked for in vain.
    pub fn misses(&self) -> &ImageMisses {
        &self.misses
    }

    /// The node numbers that the kernel sees.
    pub fn numbers(&self) -> &Numbers {
        &self.numbers
    }

    /// How many layers and chains have been opened.
    pub fn opened(&self) -> (usize, usize) {
        self.slots.opened()
    }

    /// Notes that the kernel is about to learn of `count` inodes of a slot. It remembers them until it forgets them,
    /// see [`Filesystem::forgets`].
    pub fn learns(&self, slot: Slot, count: u32) {
        self.slots.known(slot, i64::from(count));
    }

    /// Notes that the kernel forgets a node that it was told of `count` times.
    pub fn forgets(&self, node: Node, count: u64) {
        self.slots.known(node.slot(), i64::try_from(count).unwrap_or(i64::MAX).wrapping_neg());
    }

    /// The layers of native trees that are in use, and those of which the kernel knows inodes: whatever is open, mounted or was looked
    /// at and not forgotten since.
    pub fn in_use(&self) -> BTreeSet<Digest> {
        let mut in_use = self.slots.in_use();
        in_use.extend(self.native().map(|native| native.in_use()).unwrap_or_default());
        in_use
    }

    /// The layers of a chain that was opened in this mount.
    pub fn layers_of(&self, chain: &Digest) -> Vec<Digest> {
        self.slots.layers_of(chain)
    }

    /// The present state of the catalogue.
    pub fn snapshot(&self) -> Arc<CatalogueSnapshot> {
        self.watcher.snapshot()
    }

    /// Counters, shared with everything that reads.
    pub fn metrics(&self) -> &Metrics {
        self.cache.metrics()
    }

    /// The most that the local cache may take, bytes.
    pub fn cache_limit(&self) -> u64 {
        self.cache.disk().limit()
    }

    /// Whether a chain can be looked up: the catalogue has it, or an engine here has a link to it. Reads the local disk.
    pub fn knows_chain(&self, chain: &Digest) -> bool {
        self.watcher.snapshot().chain(chain).is_some() || self.linked.layers(chain).is_some()
    }

    /// The directory `/chains`.
    pub fn chains(&self) -> Node {
        self.catalogue_nodes.node(CatalogueNode::Chains)
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.timeout
    }

    /// When the catalogue tree last changed, for its directories' mtime: the kernel reads a listing again when that differs.
    fn catalogue_mtime(&self) -> (i64, u32) {
        let since = self.watcher.snapshot().changed_at().duration_since(UNIX_EPOCH).unwrap_or_default();
        (since.as_secs() as i64, since.subsec_nanos())
    }

    /// Looks `name` up in the directory `parent`; `done` is called now or, if that needs the shared store, later.
    pub fn lookup<F>(self: &Arc<Self>, parent: Node, name: &[u8], done: F)
    where
        F: FnOnce(Result<Found>) + Send + 'static,
    {
        match self.slots.get(parent.slot()) {
            Ok(SlotContent::Catalogue) => self.lookup_control(parent, name, Box::new(done)),
            Ok(place) => match place.lookup(parent, name) {
                Ok(found) => done(Ok(found)),
                Err(failure) => {
                    let name = name.to_vec();
                    self.recover(parent, failure, move |recovered| {
                        done(recovered.and_then(|()| place.lookup(parent, &name)));
                    });
                }
            },
            Err(failure) => done(Err(failure)),
        }
    }

    /// What `stat` shows of a node.
    pub fn attributes(&self, node: Node) -> Result<Attributes> {
        match self.slots.get(node.slot())? {
            SlotContent::Catalogue => self.control_attributes(node),
            place => place.attributes(node),
        }
    }

    fn control_attributes(&self, node: Node) -> Result<Attributes> {
        Ok(self.catalogue_attributes(node, &self.catalogue_nodes.get(node)?))
    }

    fn catalogue_attributes(&self, node: Node, meaning: &CatalogueNode) -> Attributes {
        match meaning.link_target() {
            Some(target) => Attributes::symlink(node, self.catalogue_mtime(), target.len()),
            None => Attributes::directory(node, self.catalogue_mtime()),
        }
    }

    /// A symbolic link's target.
    pub fn link_target(&self, node: Node) -> Result<Vec<u8>> {
        match self.slots.get(node.slot())? {
            SlotContent::Catalogue => {
                let target = self.catalogue_nodes.get(node)?.link_target();
                target.map(String::into_bytes).ok_or(Failure::WrongKind)
            }
            place => place.link_target(node),
        }
    }

    /// Lists a directory from `offset` on: calls `give` with entries until there is no room for more.
    pub fn list(
        &self,
        node: Node,
        offset: u64,
        detail: Detail,
        give: &mut dyn FnMut(Listed<'_>) -> ReplyRoom,
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
            // The kernel uses nothing of these two entries but the number.
            let attributes =
                (detail == Detail::Attributes).then(|| (Attributes::directory(target, (0, 0)), Lifetime::None));
            if give(Listed { name, node: target, file_type: S_IFDIR, offset: offset_after, attributes })
                == ReplyRoom::Full
            {
                return Ok(());
            }
        }
        match place {
            SlotContent::Catalogue => self.list_catalogue(node, offset, give, detail),
            place => place.list(node, offset, detail, give),
        }
    }

    /// A directory's parent, and whether the node is a directory at all.
    fn parent(&self, node: Node, place: &SlotContent) -> Result<(Node, bool)> {
        Ok(match place {
            SlotContent::Catalogue => match self.catalogue_nodes.get(node)? {
                CatalogueNode::Root | CatalogueNode::Layers | CatalogueNode::Chains | CatalogueNode::Trees => {
                    (Node::ROOT, true)
                }
                CatalogueNode::Images(path) => match crate::source::catalogue::split(&path) {
                    Some((parent, _)) => (self.catalogue_nodes.node(CatalogueNode::Images(parent.into())), true),
                    None => (Node::ROOT, true),
                },
                CatalogueNode::Tag(..) | CatalogueNode::Tree(_) => (Node::ROOT, false),
            },
            SlotContent::Layer(layer) => {
                let inode = stored_inode(layer.index()?, inode_of(node))?;
                if inode_of(node) == ROOT {
                    (self.catalogue_nodes.node(CatalogueNode::Layers), true)
                } else {
                    (Node::new(layer.slot, inode.parent.0), inode.is_dir())
                }
            }
            SlotContent::Chain(chain) => {
                let parent = chain.parent(node)?;
                (parent.unwrap_or_else(|| self.chains()), true)
            }
        })
    }

    fn list_catalogue(
        &self,
        node: Node,
        offset: u64,
        give: &mut dyn FnMut(Listed<'_>) -> ReplyRoom,
        detail: Detail,
    ) -> Result<()> {
        let snapshot = self.watcher.snapshot();
        let give = &mut |name: &[u8], target: Node, file_type: u32, offset: u64, attributes: Attributes| {
            let attributes = (detail == Detail::Attributes).then_some((attributes, Lifetime::None));
            give(Listed { name, node: target, file_type, offset, attributes })
        };
        let mtime = self.catalogue_mtime();
        match self.catalogue_nodes.get(node)? {
            CatalogueNode::Root => {
                for (position, (name, child)) in (FIRST_OFFSET..).zip(top_level()).skip(skipped(offset)) {
                    let target = self.catalogue_nodes.node(child);
                    if give(name.as_bytes(), target, S_IFDIR, position, Attributes::directory(target, mtime))
                        == ReplyRoom::Full
                    {
                        break;
                    }
                }
            }
            CatalogueNode::Layers => {
                for layer in snapshot.layers().iter().filter(|layer| digest_offset(layer) > offset) {
                    let target = Node::new(self.slots.reserve_layer(LayerName::first(*layer)).slot, ROOT.0);
                    let attributes = Attributes::directory(target, mtime);
                    if give(layer.hex().as_bytes(), target, S_IFDIR, digest_offset(layer), attributes)
                        == ReplyRoom::Full
                    {
                        break;
                    }
                }
            }
            CatalogueNode::Chains => {
                for chain in snapshot.chains().filter(|chain| digest_offset(chain) > offset) {
                    let depth = snapshot.chain(chain).map_or(0, |layers| layers.len());
                    let target = self.slots.reserve_chain(*chain, depth).root_or_likely();
                    let attributes = Attributes::directory(target, mtime);
                    if give(chain.hex().as_bytes(), target, S_IFDIR, digest_offset(chain), attributes)
                        == ReplyRoom::Full
                    {
                        break;
                    }
                }
            }
            CatalogueNode::Images(path) => {
                let entries = snapshot.directory(&path).into_iter().flatten();
                let mut entries: Vec<_> = entries.map(|(name, entry)| (name_offset(name), name, entry)).collect();
                entries.retain(|(after, ..)| *after > offset);
                entries.sort_unstable_by_key(|(after, ..)| *after);
                for (after, name, entry) in entries {
                    let attributes = self.image_attributes(&path, name, entry);
                    let file_type = attributes.mode & store::layer::S_IFMT;
                    if give(name.as_bytes(), attributes.node, file_type, after, attributes) == ReplyRoom::Full {
                        break;
                    }
                }
            }
            CatalogueNode::Trees => {}
            CatalogueNode::Tag(..) | CatalogueNode::Tree(_) => return Err(Failure::NotDirectory),
        }
        Ok(())
    }

    fn image_attributes(&self, path: &Arc<str>, name: &str, entry: &ImageEntry) -> Attributes {
        self.attributes_of(match entry {
            ImageEntry::Directory => {
                let below = if path.is_empty() { name.to_owned() } else { format!("{path}/{name}") };
                CatalogueNode::Images(below.into())
            }
            ImageEntry::Tag(chain) => CatalogueNode::Tag(Arc::clone(path), *chain),
        })
    }

    fn attributes_of(&self, meaning: CatalogueNode) -> Attributes {
        self.catalogue_attributes(self.catalogue_nodes.node(meaning.clone()), &meaning)
    }

    /// The regular file `node`.
    fn content(&self, node: Node) -> Result<Content> {
        self.slots.get(node.slot())?.content(node)
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
        self.read_for(None, node, offset, len, done);
    }

    /// The same for a reader of a chain's native tree.
    fn read_for<F>(self: &Arc<Self>, reader: Option<Digest>, node: Node, offset: u64, len: usize, done: F)
    where
        F: FnOnce(Result<&[u8]>) + Send + 'static,
    {
        let this = Arc::clone(self);
        self.read_once(reader, node, offset, len, move |result| match result {
            Ok(bytes) => done(Ok(bytes)),
            Err(failure) => {
                let again = Arc::clone(&this);
                this.recover(node, failure, move |recovered| match recovered {
                    Ok(()) => again.read_once(reader, node, offset, len, done),
                    Err(failure) => done(Err(failure)),
                });
            }
        });
    }

    fn read_once<F>(&self, reader: Option<Digest>, node: Node, offset: u64, len: usize, done: F)
    where
        F: FnOnce(Result<&[u8]>) + Send + 'static,
    {
        match self.content(node) {
            Ok(content) => self.cache.read(Content { reader, ..content }, offset, len, done),
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

/// The offset after a digest in a listing of digests: 62 bits of the digest. So a listing continues after the same
/// digest, even if others come and go.
fn digest_offset(digest: &Digest) -> u64 {
    let mut head = [0; 8];
    head.copy_from_slice(&digest.as_bytes()[..8]);
    (u64::from_be_bytes(head) >> 2).max(FIRST_OFFSET)
}

/// The offset after a name in a listing of names, likewise from a digest of the name: such listings are in the order of
/// these numbers.
fn name_offset(name: &str) -> u64 {
    digest_offset(&Digest::from_bytes(*ContentDigest::of(name.as_bytes()).as_bytes()))
}

#[cfg(test)]
pub(crate) mod tests;
