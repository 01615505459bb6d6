//! A layer's file tree while it is being built from a tar stream.
//!
//! The tree knows overlayfs' form and POSIX' rules (what may replace what), and nothing of tar. Nodes are numbered in
//! order of creation and keep their numbers. A node that a later entry of the same name replaces loses its name but
//! keeps its number and its content, because the recipe of the tar stream still needs its bytes.
//!
//! A layer may have a million files. So nothing is kept twice, and hardly anything has an allocation of its own: nodes
//! and directory entries are records in two tables; names and values lie in one buffer, each distinct one once, which
//! becomes the index's section as it is. A node and its entry take some 100 bytes. [`LayerTree::encoded_len`] gives the
//! length that the index would have, so that a layer that grows out of proportion can be refused.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};

use hashbrown::HashTable;

use super::{
    CHUNK_LEN, ENTRY_LEN, EXTENT_LEN, HEADER_LEN, INODE_LEN, InodeIndex, OPAQUE_XATTR, ROOT, S_IFDIR, S_IFMT, XATTR_LEN,
};
use crate::chunk::ChunkRef;
use crate::digest::{ContentDigest, Digest};
use crate::error::Result;

mod encoding;

pub use encoding::RawIndex;

/// Attributes that every kind of inode has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Metadata {
    /// Permission bits with setuid, setgid and sticky; type bits are ignored.
    pub permissions: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, seconds since 1970.
    pub mtime: i64,
    /// Nanoseconds of the modification time.
    pub mtime_nsec: u32,
    /// Extended attributes by name.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// A regular file's content: digest, size and pieces in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileContent {
    /// BLAKE3 of all bytes.
    pub digest: ContentDigest,
    /// Number of bytes.
    pub size: u64,
    /// Each piece; every one but the last is [`PIECE_SIZE`](crate::chunk::PIECE_SIZE) long.
    pub pieces: Vec<PieceSource>,
}

impl FileContent {
    /// The content of an empty file.
    pub fn empty() -> FileContent {
        FileContent { digest: ContentDigest::of(b""), size: 0, pieces: Vec::new() }
    }
}

/// Where a piece of a file under construction lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PieceSource {
    /// All zeros.
    Hole,
    /// In chunk `chunk` of the caller's numbering, from `start` on.
    Chunk {
        /// Number of the chunk; [`LayerTree::encode`] is given the references in this order.
        chunk: u32,
        /// First byte within the chunk.
        start: u32,
    },
}

/// The kind of a new node, with its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeKind {
    /// A directory.
    Directory,
    /// A regular file.
    File(FileContent),
    /// A symbolic link with its target.
    Symlink(Vec<u8>),
    /// A device or a fifo: type bits, major, minor.
    Special(u32, u32, u32),
}

/// The kind of a node in the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeView<'a> {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link with its target.
    Symlink(&'a [u8]),
    /// A device or a fifo: type bits, major, minor.
    Special(u32, u32, u32),
}

/// A range of the bytes of [`Names`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Name {
    at: u32,
    len: u32,
}

/// Names, link targets and xattr values, each stored once.
#[derive(Default)]
struct Names {
    bytes: Vec<u8>,
    known: HashTable<Name>,
    hasher: RandomState,
}

impl Names {
    fn get(&self, name: Name) -> &[u8] {
        self.bytes.get(name.at as usize..name.at as usize + name.len as usize).unwrap_or_default()
    }

    fn find(&self, name: &[u8]) -> Option<Name> {
        self.known.find(self.hasher.hash_one(name), |known| self.get(*known) == name).copied()
    }

    /// Stores `name`, unless it is known, and returns where it lies. More than 4 GiB cannot be addressed; such an index
    /// is refused when it is encoded.
    fn intern(&mut self, name: &[u8]) -> Name {
        if let Some(known) = self.find(name) {
            return known;
        }
        let new = Name { at: self.bytes.len() as u32, len: name.len() as u32 };
        self.bytes.extend_from_slice(name);
        let Names { bytes, known, hasher } = self;
        let of = |name: &Name| bytes.get(name.at as usize..name.at as usize + name.len as usize).unwrap_or_default();
        known.insert_unique(hasher.hash_one(name), new, |name| hasher.hash_one(of(name)));
        new
    }
}

/// One extended attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Xattr {
    name: Name,
    value: Name,
}

/// A set of extended attributes: a range of the records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct XattrSet {
    first: u32,
    count: u16,
}

const NO_XATTRS: XattrSet = XattrSet { first: 0, count: 0 };

/// All extended attributes; inodes that have the same ones share the records.
#[derive(Default)]
struct Xattrs {
    records: Vec<Xattr>,
    known: HashMap<Vec<Xattr>, XattrSet>,
    /// For a set of attributes, the one that also marks an opaque directory.
    opaque: HashMap<XattrSet, XattrSet>,
    /// Whether an inode has more attributes than an index can hold.
    overflow: bool,
}

impl Xattrs {
    fn get(&self, set: XattrSet) -> &[Xattr] {
        let first = set.first as usize;
        self.records.get(first..first + usize::from(set.count)).unwrap_or_default()
    }

    /// The set with these records, which must be in byte order of their names; stored unless it is known.
    fn intern(&mut self, set: Vec<Xattr>) -> XattrSet {
        if set.is_empty() {
            return NO_XATTRS;
        }
        if let Some(known) = self.known.get(&set) {
            return *known;
        }
        self.overflow |= set.len() > usize::from(u16::MAX);
        let new = XattrSet { first: self.records.len() as u32, count: set.len() as u16 };
        self.records.extend_from_slice(&set);
        self.known.insert(set, new);
        new
    }
}

/// The kind of a node, in compact form.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Directory,
    /// Position in the tree's contents.
    File(u32),
    Symlink(Name),
    Special(u32, u32, u32),
}

/// A regular file's content, in compact form: its pieces are a range of the tree's.
#[derive(Debug, Clone, Copy)]
struct Content {
    digest: ContentDigest,
    size: u64,
    first: u32,
    count: u32,
}

#[derive(Debug, Clone, Copy)]
struct Node {
    mtime: i64,
    uid: u32,
    gid: u32,
    mtime_nsec: u32,
    parent: InodeIndex,
    xattrs: XattrSet,
    permissions: u16,
    implicit: bool,
    opaque: bool,
    kind: Kind,
}

impl Node {
    fn file_type(&self) -> u32 {
        match self.kind {
            Kind::Directory => S_IFDIR,
            Kind::File(_) => super::S_IFREG,
            Kind::Symlink(_) => super::S_IFLNK,
            Kind::Special(bits, ..) => bits & S_IFMT,
        }
    }
}

/// The inode of a name that was removed.
const GONE: InodeIndex = InodeIndex(u32::MAX);

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
struct DirEntry {
    dir: InodeIndex,
    name: Name,
    inode: InodeIndex,
}

/// Directory entries, found by directory and name.
#[derive(Default)]
struct Entries {
    all: Vec<DirEntry>,
    known: HashTable<u32>,
    hasher: RandomState,
}

impl Entries {
    fn find(&self, dir: InodeIndex, name: Name) -> Option<usize> {
        let same = |at: &u32| self.all.get(*at as usize).is_some_and(|entry| (entry.dir, entry.name) == (dir, name));
        self.known.find(self.hasher.hash_one((dir, name)), same).map(|at| *at as usize)
    }

    /// Makes `name` refer to `inode`.
    fn set(&mut self, dir: InodeIndex, name: Name, inode: InodeIndex) {
        if let Some(at) = self.find(dir, name) {
            self.all[at].inode = inode;
            return;
        }
        let Entries { all, known, hasher } = self;
        all.push(DirEntry { dir, name, inode });
        let hash_of = |at: &u32| all.get(*at as usize).map_or(0, |entry| hasher.hash_one((entry.dir, entry.name)));
        known.insert_unique(hasher.hash_one((dir, name)), all.len() as u32 - 1, hash_of);
    }
}

/// The tree under construction.
pub struct LayerTree {
    nodes: Vec<Node>,
    entries: Entries,
    names: Names,
    xattrs: Xattrs,
    contents: Vec<Content>,
    pieces: Vec<PieceSource>,
}

impl Default for LayerTree {
    fn default() -> LayerTree {
        LayerTree::new()
    }
}

impl LayerTree {
    /// A tree that has a root directory only: an implicit one of mode 0755, owned by root.
    pub fn new() -> LayerTree {
        let empty = Content { digest: ContentDigest::of(b""), size: 0, first: 0, count: 0 };
        let mut tree = LayerTree {
            nodes: Vec::new(),
            entries: Entries::default(),
            names: Names::default(),
            xattrs: Xattrs::default(),
            contents: vec![empty],
            pieces: Vec::new(),
        };
        tree.push(&Metadata { permissions: 0o755, ..Metadata::default() }, NodeKind::Directory, ROOT);
        tree.nodes[0].implicit = true;
        tree
    }

    fn push(&mut self, metadata: &Metadata, kind: NodeKind, parent: InodeIndex) -> InodeIndex {
        let number = InodeIndex(self.nodes.len() as u32);
        let kind = match kind {
            NodeKind::Directory => Kind::Directory,
            NodeKind::File(content) => Kind::File(self.keep_content(content)),
            NodeKind::Symlink(target) => Kind::Symlink(self.names.intern(&target)),
            NodeKind::Special(bits, major, minor) => Kind::Special(bits, major, minor),
        };
        let xattrs = self.keep_xattrs(&metadata.xattrs);
        self.nodes.push(Node {
            mtime: metadata.mtime,
            uid: metadata.uid,
            gid: metadata.gid,
            mtime_nsec: metadata.mtime_nsec,
            parent,
            xattrs,
            permissions: (metadata.permissions & 0o7777) as u16,
            implicit: false,
            opaque: false,
            kind,
        });
        number
    }

    fn keep_content(&mut self, content: FileContent) -> u32 {
        let FileContent { digest, size, pieces } = content;
        if size == 0 && digest == self.contents[0].digest {
            return 0;
        }
        let (first, count) = (self.pieces.len() as u32, pieces.len() as u32);
        self.pieces.extend(pieces);
        self.contents.push(Content { digest, size, first, count });
        self.contents.len() as u32 - 1
    }

    fn keep_xattrs(&mut self, xattrs: &BTreeMap<Vec<u8>, Vec<u8>>) -> XattrSet {
        let names = &mut self.names;
        let records = xattrs.iter().map(|(name, value)| Xattr { name: names.intern(name), value: names.intern(value) });
        self.xattrs.intern(records.collect())
    }

    fn node(&self, number: InodeIndex) -> &Node {
        &self.nodes[number.0 as usize]
    }

    fn node_mut(&mut self, number: InodeIndex) -> &mut Node {
        &mut self.nodes[number.0 as usize]
    }

    /// Number of nodes so far.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there are no nodes; there always is a root.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The length that the raw index would have now with `chunks` chunks, without the names of their packs, bytes.
    pub fn encoded_len(&self, chunks: usize) -> u64 {
        let records = [
            (self.nodes.len(), INODE_LEN),
            (self.entries.all.len(), ENTRY_LEN),
            (self.xattrs.records.len(), XATTR_LEN),
            (self.pieces.len(), EXTENT_LEN),
            (chunks, CHUNK_LEN),
            (self.names.bytes.len(), 1),
        ];
        HEADER_LEN as u64 + records.iter().map(|(count, len)| *count as u64 * *len as u64).sum::<u64>()
    }

    /// Bytes of names, link targets and extended attributes so far.
    pub fn names_len(&self) -> u64 {
        self.names.bytes.len() as u64
    }

    /// The kind of a node.
    pub fn kind(&self, number: InodeIndex) -> NodeView<'_> {
        match self.node(number).kind {
            Kind::Directory => NodeView::Directory,
            Kind::File(_) => NodeView::File,
            Kind::Symlink(target) => NodeView::Symlink(self.names.get(target)),
            Kind::Special(bits, major, minor) => NodeView::Special(bits, major, minor),
        }
    }

    /// A node's attributes.
    pub fn metadata(&self, number: InodeIndex) -> Metadata {
        let own = |xattr: &Xattr| (self.names.get(xattr.name).to_vec(), self.names.get(xattr.value).to_vec());
        let xattrs = self.xattrs.get(self.node(number).xattrs).iter().map(own).collect();
        Metadata { xattrs, ..self.own_metadata(number) }
    }

    /// A node's attributes without the extended ones.
    pub fn own_metadata(&self, number: InodeIndex) -> Metadata {
        let node = self.node(number);
        Metadata {
            permissions: node.permissions.into(),
            uid: node.uid,
            gid: node.gid,
            mtime: node.mtime,
            mtime_nsec: node.mtime_nsec,
            xattrs: BTreeMap::new(),
        }
    }

    /// Whether a node has an extended attribute of that name.
    pub fn has_xattr(&self, number: InodeIndex, name: &[u8]) -> bool {
        let set = self.xattrs.get(self.node(number).xattrs);
        set.binary_search_by(|xattr| self.names.get(xattr.name).cmp(name)).is_ok()
    }

    /// Gives a regular file its content.
    pub fn set_content(&mut self, number: InodeIndex, content: FileContent) {
        let content = self.keep_content(content);
        self.node_mut(number).kind = Kind::File(content);
    }

    /// A directory's parent; the root's is itself.
    pub fn parent(&self, number: InodeIndex) -> InodeIndex {
        self.node(number).parent
    }

    /// Looks a name up in a directory.
    pub fn child(&self, dir: InodeIndex, name: &[u8]) -> Option<InodeIndex> {
        let at = self.entries.find(dir, self.names.find(name)?)?;
        Some(self.entries.all[at].inode).filter(|inode| *inode != GONE)
    }

    /// Makes a directory that a path needs and the tar has not named. Like mkdir, it takes the setgid bit over from the
    /// directory above.
    pub fn make_implicit(&mut self, dir: InodeIndex, name: &[u8]) -> InodeIndex {
        let setgid = u32::from(self.node(dir).permissions & 0o2000);
        let metadata = Metadata { permissions: 0o755 | setgid, ..Metadata::default() };
        let number = self.insert(dir, name, metadata, NodeKind::Directory);
        self.node_mut(number).implicit = true;
        number
    }

    /// Puts an entry into a directory, replacing whatever has the name. A directory over a directory keeps the entries.
    pub fn insert(&mut self, dir: InodeIndex, name: &[u8], metadata: Metadata, kind: NodeKind) -> InodeIndex {
        let old = self.child(dir, name);
        let is_directory = kind == NodeKind::Directory;
        if let Some(old) = old
            && is_directory
            && self.kind(old) == NodeView::Directory
        {
            self.set_metadata(old, metadata);
            return old;
        }
        let number = self.push(&metadata, kind, dir);
        self.link(dir, name, number);
        number
    }

    /// Gives a node (another) name, taking the name from whatever has it.
    pub fn link(&mut self, dir: InodeIndex, name: &[u8], number: InodeIndex) {
        let name = self.names.intern(name);
        self.entries.set(dir, name, number);
    }

    /// Removes a name, and with a directory everything in it.
    pub fn remove(&mut self, dir: InodeIndex, name: &[u8]) {
        if self.child(dir, name).is_some() {
            self.link(dir, name, GONE);
        }
    }

    /// Replaces a node's attributes; an opaque directory stays opaque.
    pub fn set_metadata(&mut self, number: InodeIndex, metadata: Metadata) {
        let xattrs = self.keep_xattrs(&metadata.xattrs);
        let node = self.node_mut(number);
        node.xattrs = xattrs;
        let was_opaque = std::mem::replace(&mut node.opaque, false);
        self.set_own_metadata(number, &metadata);
        if was_opaque {
            self.set_opaque(number);
        }
    }

    /// Replaces a node's attributes except the extended ones.
    pub fn set_own_metadata(&mut self, number: InodeIndex, metadata: &Metadata) {
        let node = self.node_mut(number);
        (node.uid, node.gid) = (metadata.uid, metadata.gid);
        (node.mtime, node.mtime_nsec) = (metadata.mtime, metadata.mtime_nsec);
        node.permissions = (metadata.permissions & 0o7777) as u16;
        node.implicit = false;
    }

    /// Marks a directory as hiding its namesakes in lower layers.
    pub fn set_opaque(&mut self, number: InodeIndex) {
        if self.node(number).opaque {
            return;
        }
        let set = self.node(number).xattrs;
        let opaque = match self.xattrs.opaque.get(&set) {
            Some(known) => *known,
            None => {
                let own = Xattr { name: self.names.intern(OPAQUE_XATTR), value: self.names.intern(b"y") };
                let mut records: Vec<Xattr> =
                    self.xattrs.get(set).iter().filter(|xattr| xattr.name != own.name).copied().collect();
                records.push(own);
                records.sort_unstable_by(|a, b| self.names.get(a.name).cmp(self.names.get(b.name)));
                let opaque = self.xattrs.intern(records);
                self.xattrs.opaque.insert(set, opaque);
                opaque
            }
        };
        let node = self.node_mut(number);
        (node.xattrs, node.opaque) = (opaque, true);
    }

    /// The finished index. `chunks` are the references in the numbering that [`PieceSource::Chunk`] uses.
    pub fn finish<'a>(self, facts: &LayerFacts, chunks: &'a [ChunkRef]) -> Result<RawIndex<'a>> {
        RawIndex::new(self, facts, chunks)
    }

    /// Encodes the raw index in memory.
    pub fn encode(self, facts: &LayerFacts, chunks: &[ChunkRef]) -> Result<Vec<u8>> {
        self.finish(facts, chunks)?.to_vec()
    }
}

/// What the index's header holds besides facts of the tree.
#[derive(Debug, Clone, Copy)]
pub struct LayerFacts {
    /// SHA-256 of the tar stream.
    pub diff_id: Digest,
    /// Length of the tar stream.
    pub tar_size: u64,
    /// Length of the recipe file.
    pub recipe_len: u64,
    /// BLAKE3 of the recipe file.
    pub recipe_digest: ContentDigest,
}
