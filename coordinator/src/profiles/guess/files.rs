//! The files of an image, read in the store as a program in a container would find them, within a budget.

use std::cell::Cell;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use store::layer::{Child, Inode, Member, MergedTree, Source};

use crate::profiles::build::Chunks;

/// The most content that is read for one guess, bytes.
const READ_MAX: u64 = 256 << 20;
/// The longest text that is read, bytes.
const TEXT_MAX: u64 = 1 << 20;
/// The most names of one directory that are looked at.
const NAMES_MAX: u32 = 20_000;
/// How many names are looked up or listed for one guess: a second's work.
const LOOKUPS_MAX: u64 = 300_000;
/// How many directories' names are kept.
const LISTINGS_MAX: usize = 256;

/// A regular file.
#[derive(Debug, Clone)]
pub(super) struct File {
    /// Its path from the root, without symbolic links and without a leading slash.
    pub(super) path: Vec<u8>,
    pub(super) member: Member,
    pub(super) inode: Inode,
}

impl File {
    /// The last part of its path.
    pub(super) fn name(&self) -> &[u8] {
        base_name(&self.path)
    }

    pub(super) fn is_executable(&self) -> bool {
        self.inode.mode & 0o111 != 0
    }
}

/// The last part of a path.
pub(super) fn base_name(path: &[u8]) -> &[u8] {
    path.rsplit(|byte| *byte == b'/').next().unwrap_or_default()
}

/// The path without its last part.
pub(super) fn parent(path: &[u8]) -> &[u8] {
    path.iter().rposition(|byte| *byte == b'/').map_or(b"", |at| &path[..at])
}

/// `directory/name`; `name` itself if it is an absolute path.
pub(super) fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if name.starts_with(b"/") { name.to_vec() } else { [directory, b"/", name].concat() }
}

/// An image's files.
pub(super) struct Files<'a> {
    tree: MergedTree,
    chunks: Chunks<'a>,
    /// Names in directories that were listed.
    listings: HashMap<Vec<u8>, Arc<BTreeSet<Vec<u8>>>>,
    /// Bytes that may still be read, and names that may still be looked up.
    bytes_left: u64,
    lookups_left: Cell<u64>,
}

impl<'a> Files<'a> {
    /// The files of `tree`, whose content `chunks` reads.
    pub(super) fn new(tree: MergedTree, chunks: Chunks<'a>) -> Files<'a> {
        let (listings, lookups_left) = (HashMap::new(), Cell::new(LOOKUPS_MAX));
        Files { tree, chunks, listings, bytes_left: READ_MAX, lookups_left }
    }

    /// The tree that they are in.
    pub(super) fn tree(&self) -> &MergedTree {
        &self.tree
    }

    /// Whether so many names may still be looked up.
    fn may_look_up(&self, names: u64) -> bool {
        let left = self.lookups_left.get().checked_sub(names);
        self.lookups_left.set(left.unwrap_or(0));
        left.is_some()
    }

    /// The regular file at `path`, if there is one; nothing once too much has been looked up.
    pub(super) fn file(&self, path: &[u8]) -> Result<Option<File>, store::Error> {
        if !self.may_look_up(1) {
            return Ok(None);
        }
        let Some(found) = self.tree.resolve(path)? else { return Ok(None) };
        let Child::Other(member) = found.child else { return Ok(None) };
        let inode = self.tree.inode(member)?;
        Ok(inode.is_file().then_some(File { path: found.path, member, inode }))
    }

    /// The names that the layers have in the directory at `path`, in order; hidden ones, too.
    pub(super) fn names(&mut self, path: &[u8]) -> Result<Arc<BTreeSet<Vec<u8>>>, store::Error> {
        if let Some(listed) = self.listings.get(path) {
            return Ok(Arc::clone(listed));
        }
        let names = Arc::new(self.list(path)?);
        if self.listings.len() < LISTINGS_MAX {
            self.listings.insert(path.to_vec(), Arc::clone(&names));
        }
        Ok(names)
    }

    fn list(&self, path: &[u8]) -> Result<BTreeSet<Vec<u8>>, store::Error> {
        if !self.may_look_up(1) {
            return Ok(BTreeSet::new());
        }
        let Some(Child::Directory(members)) = self.tree.resolve(path)?.map(|found| found.child) else {
            return Ok(BTreeSet::new());
        };
        let mut names = BTreeSet::new();
        for member in members {
            let index = self.tree.index(member)?;
            let directory = index.inode(member.inode)?;
            for position in 0..directory.entry_count().min(NAMES_MAX) {
                if !self.may_look_up(1) {
                    return Ok(names);
                }
                names.extend(index.entry(&directory, position)?.map(|entry| entry.name.into_owned()));
            }
        }
        Ok(names)
    }

    /// The `len` bytes from `offset` on, or fewer at the file's end; nothing once too much has been read.
    pub(super) fn read(&mut self, file: &File, offset: u64, len: u64) -> Result<Option<Vec<u8>>, store::Error> {
        let len = len.min(file.inode.size.saturating_sub(offset));
        let Some(left) = self.bytes_left.checked_sub(len) else { return Ok(None) };
        self.bytes_left = left;
        let index = self.tree.index(file.member)?;
        let piece_size = u64::from(index.header().piece_size).max(1);
        let mut bytes = Vec::with_capacity(len as usize);
        while (bytes.len() as u64) < len {
            let at = offset + bytes.len() as u64;
            let piece = index.piece(&file.inode, u32::try_from(at / piece_size).unwrap_or(u32::MAX))?;
            let from = (at - piece.offset) as usize;
            let count = (u64::from(piece.len) - from as u64).min(len - bytes.len() as u64) as usize;
            match &piece.source {
                Source::Hole => bytes.resize(bytes.len() + count, 0),
                Source::Chunk { chunk, start, .. } => {
                    let outside = || store::Error::corrupt("a layer's index", "it points outside of a chunk");
                    let content = self.chunks.get(chunk)?.piece(*start, piece.len).ok_or_else(outside)?;
                    bytes.extend_from_slice(content.get(from..from + count).ok_or_else(outside)?);
                }
            }
        }
        Ok(Some(bytes))
    }

    /// The text of a file; empty if it is too long.
    pub(super) fn text(&mut self, file: &File) -> Result<String, store::Error> {
        if file.inode.size > TEXT_MAX {
            return Ok(String::new());
        }
        let bytes = self.read(file, 0, file.inode.size)?.unwrap_or_default();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}
