//! Encodes a finished tree as an index, written from front to back: the index is never whole in memory.

use std::collections::HashMap;
use std::io::{self, Write};

use super::{Content, DirEntry, GONE, Kind, LayerFacts, LayerTree, Node, PieceSource};
use crate::chunk::{ChunkRef, PIECE_SIZE};
use crate::digest::ContentDigest;
use crate::error::{Error, Result};
use crate::layer::{FLAG_IMPLICIT, HOLE, InodeIndex, LayerHeader, ROOT, S_IFDIR};
use crate::version::Features;
use crate::wire::Put;

/// Records are gathered up to this length before they are written.
const BLOCK: usize = 64 << 10;

/// An index that is ready to be written.
pub struct RawIndex<'a> {
    header: LayerHeader,
    nodes: Vec<Node>,
    /// The entries of reachable directories, by directory and in byte order of the names.
    entries: Vec<DirEntry>,
    /// The number of each node's names in reachable directories.
    links: Vec<u32>,
    xattrs: Vec<super::Xattr>,
    contents: Vec<Content>,
    pieces: Vec<PieceSource>,
    chunks: &'a [ChunkRef],
    packs: Vec<ContentDigest>,
    names: Vec<u8>,
}

/// The entries of one directory: the position of the first, and their number.
fn range_of(entries: &[DirEntry], dir: InodeIndex) -> (usize, usize) {
    let first = entries.partition_point(|entry| entry.dir < dir);
    let count = entries[first..].partition_point(|entry| entry.dir == dir);
    (first, count)
}

/// Which nodes can be reached from the root by names. The children of a replaced directory cannot.
fn reachable(nodes: &[Node], entries: &[DirEntry]) -> Vec<bool> {
    let mut reachable = vec![false; nodes.len()];
    let mut stack = vec![ROOT];
    while let Some(number) = stack.pop() {
        let seen = std::mem::replace(&mut reachable[number.0 as usize], true);
        if !seen && matches!(nodes[number.0 as usize].kind, Kind::Directory) {
            let (first, count) = range_of(entries, number);
            stack.extend(entries[first..first + count].iter().map(|entry| entry.inode));
        }
    }
    reachable
}

impl<'a> RawIndex<'a> {
    pub(super) fn new(tree: LayerTree, facts: &LayerFacts, chunks: &'a [ChunkRef]) -> Result<RawIndex<'a>> {
        let LayerTree { nodes, entries, names, xattrs, contents, pieces } = tree;
        if xattrs.overflow {
            return Err(too_large());
        }
        let (xattrs, mut entries) = (xattrs.records, entries.all);
        entries.retain(|entry| entry.inode != GONE);
        entries.sort_unstable_by(|a, b| a.dir.cmp(&b.dir).then_with(|| names.get(a.name).cmp(names.get(b.name))));
        let names = names.bytes;
        let reachable = reachable(&nodes, &entries);
        entries.retain(|entry| reachable[entry.dir.0 as usize]);
        let mut links = vec![0; nodes.len()];
        links[ROOT.0 as usize] = 1;
        entries.iter().for_each(|entry| links[entry.inode.0 as usize] += 1);
        let content_size = |(node, reachable): (&Node, &bool)| match node.kind {
            Kind::File(at) if *reachable => contents[at as usize].size,
            _ => 0,
        };
        let content_size = nodes.iter().zip(&reachable).map(content_size).sum();
        let packs = packs(chunks);
        let lens = [nodes.len(), entries.len(), xattrs.len(), pieces.len(), chunks.len(), packs.len(), names.len()];
        let mut counts = [0; 7];
        for (count, len) in counts.iter_mut().zip(lens) {
            *count = u32::try_from(len).map_err(|_| too_large())?;
        }
        let header = LayerHeader {
            features: Features::default(),
            diff_id: facts.diff_id,
            tar_size: facts.tar_size,
            content_size,
            piece_size: PIECE_SIZE,
            recipe_len: facts.recipe_len,
            recipe_digest: facts.recipe_digest,
            counts,
        };
        Ok(RawIndex { header, nodes, entries, links, xattrs, contents, pieces, chunks, packs, names })
    }

    /// Writes the whole index.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(&self.header.encode())?;
        records(out, self.nodes.iter().enumerate(), |out, (number, node)| self.inode(out, number, node))?;
        records(out, &self.entries, |out, entry| self.entry(out, entry))?;
        records(out, &self.xattrs, |out, xattr| {
            out.put_u32(xattr.name.at);
            out.put_u32(xattr.value.at);
            out.put_u32(xattr.value.len);
            out.put_u16(xattr.name.len as u16);
            out.put_u16(0);
        })?;
        self.extents(out)?;
        let packs: HashMap<&ContentDigest, u32> = self.packs.iter().zip(0..).collect();
        records(out, self.chunks, |out, chunk| {
            out.put_u32(packs.get(&chunk.pack).copied().unwrap_or(u32::MAX));
            out.put_u32(chunk.stored_len);
            out.put_u64(chunk.offset);
            out.put_u32(chunk.raw_len);
            out.put_u32(chunk.codec.number().into());
            out.put_bytes(chunk.digest.as_bytes());
        })?;
        records(out, &self.packs, |out, pack| out.put_bytes(pack.as_bytes()))?;
        out.write_all(&self.names)
    }

    pub(super) fn to_vec(&self) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        self.write(&mut out).map_err(|e| Error::corrupt("a layer's index", e.to_string()))?;
        Ok(out)
    }

    fn file_type(&self, number: InodeIndex) -> u32 {
        self.nodes[number.0 as usize].file_type()
    }

    /// Writes the pieces in the order of the contents. Those of replaced contents are written too, and belong to no
    /// file.
    fn extents(&self, out: &mut dyn Write) -> io::Result<()> {
        let pieces = self.contents.iter().flat_map(|content| {
            let pieces = &self.pieces[content.first as usize..(content.first + content.count) as usize];
            pieces.iter().scan(content.size, |rest, piece| {
                let len = (*rest).min(PIECE_SIZE.into()) as u32;
                *rest -= u64::from(len);
                Some((piece, len))
            })
        });
        records(out, pieces, |out, (piece, len)| {
            let (chunk, start) = match piece {
                PieceSource::Hole => (HOLE, 0),
                PieceSource::Chunk { chunk, start } => (*chunk, *start),
            };
            for field in [chunk, start, len, 0] {
                out.put_u32(field);
            }
        })
    }

    fn entry(&self, out: &mut Vec<u8>, entry: &DirEntry) {
        out.put_u32(entry.name.at);
        out.put_u32(entry.inode.0);
        out.put_u16(entry.name.len as u16);
        out.put_u8((self.file_type(entry.inode) >> 12) as u8);
        out.put_u8(0);
    }

    fn inode(&self, out: &mut Vec<u8>, number: usize, node: &Node) {
        let links = self.links[number];
        let (mut size, mut rdev, mut digest) = (0, (0, 0), ContentDigest::from_bytes([0; 32]));
        let (mut first, mut count, mut nlink) = (0, 0, links);
        match node.kind {
            Kind::Directory => {
                let (at, len) = range_of(&self.entries, InodeIndex(number as u32));
                let is_directory = |entry: &&DirEntry| self.file_type(entry.inode) == S_IFDIR;
                nlink = 2 + self.entries[at..at + len].iter().filter(is_directory).count() as u32;
                (first, count) = if len == 0 { (0, 0) } else { (at as u32, len as u32) };
            }
            Kind::File(at) => {
                let content = &self.contents[at as usize];
                (size, digest, first, count) = (content.size, content.digest, content.first, content.count);
            }
            Kind::Symlink(target) => (size, first) = (target.len.into(), target.at),
            Kind::Special(_, major, minor) => rdev = (major, minor),
        }
        out.put_u32(node.file_type() | u32::from(node.permissions));
        out.put_u32(node.uid);
        out.put_u32(node.gid);
        out.put_u32(if links > 0 { nlink } else { 0 });
        out.put_u64(size);
        out.put_u64(node.mtime as u64);
        out.put_u32(node.mtime_nsec);
        out.put_u32(rdev.0);
        out.put_u32(rdev.1);
        out.put_u32(node.xattrs.first);
        out.put_u16(node.xattrs.count);
        out.put_u16(if node.implicit { FLAG_IMPLICIT } else { 0 });
        out.put_u32(node.parent.0);
        out.put_u32(first);
        out.put_u32(count);
        out.put_bytes(digest.as_bytes());
    }
}

/// The packs that chunks lie in, in the order in which they first occur.
fn packs(chunks: &[ChunkRef]) -> Vec<ContentDigest> {
    let mut known = std::collections::HashSet::new();
    chunks.iter().map(|chunk| chunk.pack).filter(|pack| known.insert(*pack)).collect()
}

/// Writes a section record by record.
fn records<T>(
    out: &mut dyn Write,
    records: impl IntoIterator<Item = T>,
    put: impl Fn(&mut Vec<u8>, T),
) -> io::Result<()> {
    let mut block = Vec::with_capacity(BLOCK + 128);
    for record in records {
        put(&mut block, record);
        if block.len() >= BLOCK {
            out.write_all(&block)?;
            block.clear();
        }
    }
    out.write_all(&block)
}

fn too_large() -> Error {
    Error::Unsupported {
        what: "this layer".into(),
        why: "it has more records than an index of version 1 can hold".into(),
    }
}
