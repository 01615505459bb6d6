//! Trees in memory, with their files' content in two files.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use erofs::{BLOCK, Device, Inode, Node, Tree, Xattr};

/// What one inode is, besides its attributes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Kind {
    Directory(BTreeMap<Vec<u8>, Node>),
    File(Vec<u8>),
    Link(Vec<u8>),
    Special(u32, (u32, u32)),
}

/// Extended attributes by name.
pub(crate) type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// A tree in memory. Node 0 is the root.
#[derive(Debug, Clone, Default)]
pub(crate) struct Memory {
    pub(crate) nodes: Vec<(Inode, Kind, Xattrs)>,
}

pub(crate) const PLAIN: Inode =
    Inode { mode: 0, uid: 0, gid: 0, nlink: 1, size: 0, mtime: 0, mtime_nsec: 0, rdev: (0, 0), content: (0, 0) };

impl Memory {
    pub(crate) fn add(&mut self, inode: Inode, kind: Kind, xattrs: Xattrs) -> Node {
        let bits = match &kind {
            Kind::Directory(_) => 0o040_000,
            Kind::File(_) => 0o100_000,
            Kind::Link(_) => 0o120_000,
            Kind::Special(bits, _) => *bits,
        };
        let mut inode = Inode { mode: bits | inode.mode & 0o7777, ..inode };
        if let Kind::Special(_, rdev) = &kind {
            inode.rdev = *rdev;
        }
        self.nodes.push((inode, kind, xattrs));
        self.nodes.len() as Node - 1
    }

    pub(crate) fn name(&mut self, directory: Node, name: &[u8], node: Node) {
        if let Kind::Directory(entries) = &mut self.nodes[directory as usize].1 {
            entries.insert(name.to_vec(), node);
        }
    }

    /// Gives every file its place on one of two devices, and link counts.
    pub(crate) fn finish(&mut self, directory: &Path) -> (Vec<Device>, Vec<PathBuf>) {
        let paths = vec![directory.join("first"), directory.join("second")];
        let files: Vec<File> = paths.iter().map(|path| File::create(path).unwrap()).collect();
        let mut next = [0, 0];
        let mut links = vec![0; self.nodes.len()];
        for (_, kind, _) in &self.nodes {
            if let Kind::Directory(entries) = kind {
                entries.values().for_each(|node| links[*node as usize] += 1);
            }
        }
        for (number, (inode, kind, _)) in self.nodes.iter_mut().enumerate() {
            inode.nlink = links[number].max(1);
            if let Kind::File(content) = kind {
                let device = number % 2;
                inode.size = content.len() as u64;
                inode.content = (device as u16, next[device]);
                files[device].write_all_at(content, next[device] * BLOCK).unwrap();
                next[device] += inode.size.div_ceil(BLOCK);
            }
        }
        for (file, blocks) in files.iter().zip(next) {
            file.set_len(blocks.max(1) * BLOCK).unwrap();
        }
        (next.iter().map(|blocks| Device { blocks: (*blocks).max(1) }).collect(), paths)
    }
}

/// The blocks of a file that are zeros.
pub(crate) fn holes(content: &[u8]) -> Vec<Range<u64>> {
    let mut holes: Vec<Range<u64>> = Vec::new();
    for (number, block) in (0..).zip(content.chunks(BLOCK as usize)) {
        match holes.last_mut() {
            _ if block.iter().any(|byte| *byte != 0) => {}
            Some(last) if last.end == number => last.end += 1,
            _ => holes.push(number..number + 1),
        }
    }
    holes
}

impl Tree for Memory {
    type Error = Infallible;

    fn root(&self) -> Node {
        0
    }

    fn inode(&self, node: Node) -> Result<Inode, Infallible> {
        Ok(self.nodes[node as usize].0)
    }

    fn entries(&self, directory: Node, give: &mut dyn FnMut(&[u8], Node)) -> Result<(), Infallible> {
        if let Kind::Directory(entries) = &self.nodes[directory as usize].1 {
            entries.iter().for_each(|(name, node)| give(name, *node));
        }
        Ok(())
    }

    fn xattrs(&self, node: Node, give: &mut dyn FnMut(Xattr<'_>)) -> Result<(), Infallible> {
        self.nodes[node as usize].2.iter().for_each(|(name, value)| give((name, value)));
        Ok(())
    }

    fn holes(&self, file: Node, _: &Inode, give: &mut dyn FnMut(Range<u64>)) -> Result<(), Infallible> {
        if let Kind::File(content) = &self.nodes[file as usize].1 {
            holes(content).into_iter().for_each(give);
        }
        Ok(())
    }

    fn target(&self, link: Node) -> Result<Vec<u8>, Infallible> {
        match &self.nodes[link as usize].1 {
            Kind::Link(target) => Ok(target.clone()),
            _ => Ok(Vec::new()),
        }
    }
}
