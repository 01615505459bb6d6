//! A layer's file tree while it is being built from a tar stream, and its encoding as an index.
//!
//! The tree knows overlayfs' form and POSIX' rules (what may replace what), nothing of tar. Numbers are given in order
//! of creation and stay: a node that is replaced by a later entry of the same name keeps its number and its
//! content, with no name, because the recipe of the tar stream still needs its bytes.

use std::collections::{BTreeMap, HashMap};

use super::{FLAG_IMPLICIT, HOLE, INODE_LEN, InodeIndex, LayerHeader, OPAQUE_XATTR, ROOT, S_IFDIR, S_IFMT};
use crate::chunk::{ChunkRef, PIECE_SIZE};
use crate::digest::{ContentDigest, Digest};
use crate::error::{Error, Result};
use crate::version::Features;
use crate::wire::Put;

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
    /// Each piece; every one but the last is [`PIECE_SIZE`] long.
    pub pieces: Vec<PieceSource>,
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

/// What a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeKind {
    /// A directory: names in byte order.
    Directory(BTreeMap<Vec<u8>, InodeIndex>),
    /// A regular file.
    File(FileContent),
    /// A symbolic link with its target.
    Symlink(Vec<u8>),
    /// A device or a fifo: type bits, major, minor.
    Special(u32, u32, u32),
}

struct Node {
    metadata: Metadata,
    kind: NodeKind,
    parent: InodeIndex,
    names: u32,
    implicit: bool,
}

impl Node {
    fn file_type(&self) -> u32 {
        match &self.kind {
            NodeKind::Directory(_) => S_IFDIR,
            NodeKind::File(_) => super::S_IFREG,
            NodeKind::Symlink(_) => super::S_IFLNK,
            NodeKind::Special(bits, ..) => bits & S_IFMT,
        }
    }
}

/// The tree under construction.
pub struct LayerTree {
    nodes: Vec<Node>,
}

impl Default for LayerTree {
    fn default() -> LayerTree {
        LayerTree::new()
    }
}

impl LayerTree {
    /// A tree that has a root directory only: 0755, root's, made because it is needed.
    pub fn new() -> LayerTree {
        let mut tree = LayerTree { nodes: Vec::new() };
        tree.push(Metadata { permissions: 0o755, ..Metadata::default() }, NodeKind::Directory(BTreeMap::new()), ROOT);
        tree.nodes[0].implicit = true;
        tree.nodes[0].names = 1;
        tree
    }

    fn push(&mut self, metadata: Metadata, kind: NodeKind, parent: InodeIndex) -> InodeIndex {
        let number = InodeIndex(self.nodes.len() as u32);
        self.nodes.push(Node { metadata, kind, parent, names: 0, implicit: false });
        number
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

    /// Never: there is always a root.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// What a node is.
    pub fn kind(&self, number: InodeIndex) -> &NodeKind {
        &self.node(number).kind
    }

    /// A node's attributes.
    pub fn metadata(&self, number: InodeIndex) -> &Metadata {
        &self.node(number).metadata
    }

    /// Gives a regular file its content.
    pub fn set_content(&mut self, number: InodeIndex, content: FileContent) {
        self.node_mut(number).kind = NodeKind::File(content);
    }

    /// A directory's parent; the root's is itself.
    pub fn parent(&self, number: InodeIndex) -> InodeIndex {
        self.node(number).parent
    }

    /// Looks a name up in a directory.
    pub fn child(&self, dir: InodeIndex, name: &[u8]) -> Option<InodeIndex> {
        match &self.node(dir).kind {
            NodeKind::Directory(entries) => entries.get(name).copied(),
            _ => None,
        }
    }

    /// Whether a node is a whiteout.
    pub fn is_whiteout(&self, number: InodeIndex) -> bool {
        self.node(number).kind == NodeKind::Special(super::S_IFCHR, 0, 0)
    }

    /// Makes a directory that a path needs and the tar has not named: as mkdir does, which takes the setgid bit over from
    /// the directory above.
    pub fn make_implicit(&mut self, dir: InodeIndex, name: &[u8]) -> InodeIndex {
        let setgid = self.metadata(dir).permissions & 0o2000;
        let metadata = Metadata { permissions: 0o755 | setgid, ..Metadata::default() };
        let number = self.insert(dir, name, metadata, NodeKind::Directory(BTreeMap::new()));
        self.node_mut(number).implicit = true;
        number
    }

    /// Puts an entry into a directory, replacing what has the name; a directory over a directory keeps the entries.
    pub fn insert(&mut self, dir: InodeIndex, name: &[u8], metadata: Metadata, kind: NodeKind) -> InodeIndex {
        let old = self.child(dir, name);
        let is_directory = matches!(kind, NodeKind::Directory(_));
        if let Some(old) = old
            && is_directory
            && matches!(self.node(old).kind, NodeKind::Directory(_))
        {
            self.set_metadata(old, metadata);
            return old;
        }
        let hides_lower = old.is_some_and(|old| self.is_whiteout(old)) && is_directory;
        let number = self.push(metadata, kind, dir);
        self.link(dir, name, number);
        if hides_lower {
            self.set_opaque(number);
        }
        number
    }

    /// Gives a node (another) name, taking the name from whatever has it.
    pub fn link(&mut self, dir: InodeIndex, name: &[u8], number: InodeIndex) {
        self.node_mut(number).names += 1;
        if let NodeKind::Directory(entries) = &mut self.node_mut(dir).kind
            && let Some(old) = entries.insert(name.to_vec(), number)
        {
            self.node_mut(old).names -= 1;
        }
    }

    /// Replaces a node's attributes; an opaque directory stays opaque.
    pub fn set_metadata(&mut self, number: InodeIndex, mut metadata: Metadata) {
        let node = self.node_mut(number);
        if let Some(value) = node.metadata.xattrs.remove(OPAQUE_XATTR) {
            metadata.xattrs.insert(OPAQUE_XATTR.to_vec(), value);
        }
        node.metadata = metadata;
        node.implicit = false;
    }

    /// Marks a directory as hiding its namesakes in lower layers.
    pub fn set_opaque(&mut self, number: InodeIndex) {
        self.node_mut(number).metadata.xattrs.insert(OPAQUE_XATTR.to_vec(), b"y".to_vec());
    }

    /// Encodes the raw index. `chunks` are the references in the numbering that [`PieceSource::Chunk`] uses; `header`'s
    /// counts and content size are filled in here.
    pub fn encode(&self, facts: &LayerFacts, chunks: &[ChunkRef]) -> Result<Vec<u8>> {
        let mut encoder = Encoder::default();
        let reachable = self.reachable();
        for (node, reachable) in self.nodes.iter().zip(reachable) {
            self.encode_node(&mut encoder, node, reachable)?;
        }
        encoder.chunks(chunks);
        encoder.finish(facts)
    }

    /// Which nodes can be reached from the root by names: the directory of a replaced node's children cannot.
    fn reachable(&self) -> Vec<bool> {
        let mut reachable = vec![false; self.nodes.len()];
        let mut stack = vec![ROOT];
        while let Some(number) = stack.pop() {
            reachable[number.0 as usize] = true;
            if let NodeKind::Directory(entries) = &self.node(number).kind {
                stack.extend(entries.values());
            }
        }
        reachable
    }

    fn nlink(&self, node: &Node) -> u32 {
        match &node.kind {
            NodeKind::Directory(entries) => {
                let is_directory = |n: &&InodeIndex| self.node(**n).file_type() == S_IFDIR;
                2 + entries.values().filter(is_directory).count() as u32
            }
            _ => node.names,
        }
    }

    fn encode_node(&self, encoder: &mut Encoder, node: &Node, reachable: bool) -> Result<()> {
        let metadata = &node.metadata;
        let (mut size, mut rdev, mut digest) = (0, (0, 0), ContentDigest::from_bytes([0; 32]));
        let (first, count) = match &node.kind {
            NodeKind::Directory(entries) if reachable => {
                encoder.entries(entries.iter().map(|(name, n)| (&name[..], *n, self.node(*n).file_type())))?
            }
            NodeKind::Directory(_) => (0, 0),
            NodeKind::File(content) => {
                (size, digest) = (content.size, content.digest);
                encoder.content_size += if reachable { size } else { 0 };
                encoder.extents(content)?
            }
            NodeKind::Symlink(target) => {
                size = target.len() as u64;
                (encoder.name(target)?, 0)
            }
            NodeKind::Special(_, major, minor) => {
                rdev = (*major, *minor);
                (0, 0)
            }
        };
        let (xattr_first, xattr_count) = encoder.xattrs(&metadata.xattrs)?;
        let out = &mut encoder.inodes;
        out.put_u32(node.file_type() | metadata.permissions & 0o7777);
        out.put_u32(metadata.uid);
        out.put_u32(metadata.gid);
        out.put_u32(if reachable { self.nlink(node) } else { 0 });
        out.put_u64(size);
        out.put_u64(metadata.mtime as u64);
        out.put_u32(metadata.mtime_nsec);
        out.put_u32(rdev.0);
        out.put_u32(rdev.1);
        out.put_u32(xattr_first);
        out.put_u16(xattr_count);
        out.put_u16(if node.implicit { FLAG_IMPLICIT } else { 0 });
        out.put_u32(node.parent.0);
        out.put_u32(first);
        out.put_u32(count);
        out.put_bytes(digest.as_bytes());
        Ok(())
    }
}

/// What the index's header says beyond the tree.
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

/// The sections while they grow.
#[derive(Default)]
struct Encoder {
    inodes: Vec<u8>,
    entries: Vec<u8>,
    xattrs: Vec<u8>,
    extents: Vec<u8>,
    chunks: Vec<u8>,
    packs: Vec<u8>,
    names: Vec<u8>,
    known_names: HashMap<Vec<u8>, u32>,
    content_size: u64,
}

impl Encoder {
    /// Where `name` lies among the names; each is stored once.
    fn name(&mut self, name: &[u8]) -> Result<u32> {
        if let Some(offset) = self.known_names.get(name) {
            return Ok(*offset);
        }
        let offset = u32::try_from(self.names.len()).map_err(|_| too_large("names"))?;
        self.names.extend_from_slice(name);
        self.known_names.insert(name.to_vec(), offset);
        Ok(offset)
    }

    fn entries<'a>(&mut self, entries: impl Iterator<Item = (&'a [u8], InodeIndex, u32)>) -> Result<(u32, u32)> {
        let first = self.entries.len() / super::ENTRY_LEN;
        for (name, inode, file_type) in entries {
            let offset = self.name(name)?;
            self.entries.put_u32(offset);
            self.entries.put_u32(inode.0);
            self.entries.put_u16(name.len() as u16);
            self.entries.put_u8((file_type >> 12) as u8);
            self.entries.put_u8(0);
        }
        range(first, self.entries.len() / super::ENTRY_LEN, "directory entries")
    }

    fn extents(&mut self, content: &FileContent) -> Result<(u32, u32)> {
        let first = self.extents.len() / super::EXTENT_LEN;
        let mut rest = content.size;
        for piece in &content.pieces {
            let len = rest.min(PIECE_SIZE.into()) as u32;
            rest -= u64::from(len);
            let (chunk, start) = match piece {
                PieceSource::Hole => (HOLE, 0),
                PieceSource::Chunk { chunk, start } => (*chunk, *start),
            };
            for field in [chunk, start, len, 0] {
                self.extents.put_u32(field);
            }
        }
        range(first, self.extents.len() / super::EXTENT_LEN, "extents")
    }

    fn xattrs(&mut self, xattrs: &BTreeMap<Vec<u8>, Vec<u8>>) -> Result<(u32, u16)> {
        let first = self.xattrs.len() / super::XATTR_LEN;
        for (name, value) in xattrs {
            let (name_at, value_at) = (self.name(name)?, self.name(value)?);
            self.xattrs.put_u32(name_at);
            self.xattrs.put_u32(value_at);
            self.xattrs.put_u32(value.len() as u32);
            self.xattrs.put_u16(name.len() as u16);
            self.xattrs.put_u16(0);
        }
        let (first, count) = range(first, self.xattrs.len() / super::XATTR_LEN, "extended attributes")?;
        Ok((first, u16::try_from(count).map_err(|_| too_large("extended attributes"))?))
    }

    fn chunks(&mut self, chunks: &[ChunkRef]) {
        let mut packs: HashMap<ContentDigest, u32> = HashMap::new();
        for chunk in chunks {
            let next = packs.len() as u32;
            let pack = *packs.entry(chunk.pack).or_insert_with(|| {
                self.packs.put_bytes(chunk.pack.as_bytes());
                next
            });
            self.chunks.put_u32(pack);
            self.chunks.put_u32(chunk.stored_len);
            self.chunks.put_u64(chunk.offset);
            self.chunks.put_u32(chunk.raw_len);
            self.chunks.put_u32(chunk.codec.number().into());
            self.chunks.put_bytes(chunk.digest.as_bytes());
        }
    }

    fn finish(self, facts: &LayerFacts) -> Result<Vec<u8>> {
        let sections = [self.inodes, self.entries, self.xattrs, self.extents, self.chunks, self.packs, self.names];
        let mut counts = [0; 7];
        for ((count, section), len) in counts.iter_mut().zip(&sections).zip(super::RECORD_LENS) {
            *count = u32::try_from(section.len() / len).map_err(|_| too_large("records"))?;
        }
        let header = LayerHeader {
            features: Features::default(),
            diff_id: facts.diff_id,
            tar_size: facts.tar_size,
            content_size: self.content_size,
            piece_size: PIECE_SIZE,
            recipe_len: facts.recipe_len,
            recipe_digest: facts.recipe_digest,
            counts,
        };
        debug_assert_eq!(sections[0].len() % INODE_LEN, 0);
        let mut out = header.encode();
        out.reserve(sections.iter().map(Vec::len).sum());
        for section in sections {
            out.extend_from_slice(&section);
        }
        Ok(out)
    }
}

fn range(first: usize, end: usize, what: &str) -> Result<(u32, u32)> {
    let end = u32::try_from(end).map_err(|_| too_large(what))?;
    Ok((first as u32, end - first as u32))
}

fn too_large(what: &str) -> Error {
    Error::Unsupported {
        what: "this layer".into(),
        why: format!("it has more {what} than an index of version 1 can hold"),
    }
}
