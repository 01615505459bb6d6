//! The merged tree of several layers, as the kernel's overlayfs shows it.
//!
//! A directory's **members** are the directories of one path in the layers that contribute to it, topmost first. A
//! whiteout, an opaque directory or anything that is no directory ends the search downwards. Nothing is kept: what a
//! name means is found in the layers' indexes each time.

use std::sync::Arc;

use super::{Inode, InodeIndex, LayerIndex, ROOT};
use crate::error::{Error, Result};

/// Symbolic links that are followed on the way to one file, as in Linux.
const LINKS_MAX: usize = 40;
/// The longest target that is followed, bytes, as in Linux.
const TARGET_MAX: u64 = 4096;

/// One layer's share of a directory, or the one inode behind another name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Member {
    /// The layer's place in the chain, 0 is the topmost.
    pub layer: u16,
    /// The inode in that layer.
    pub inode: InodeIndex,
}

/// What a name in a merged directory means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Child {
    /// A directory, with its members.
    Directory(Vec<Member>),
    /// Anything else, which one layer alone has.
    Other(Member),
}

/// What a path leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The path from the root, without symbolic links and without a leading slash.
    pub path: Vec<u8>,
    /// What is there.
    pub child: Child,
}

/// The merged tree of a chain's layers.
#[derive(Debug, Clone)]
pub struct MergedTree {
    layers: Vec<Arc<LayerIndex>>,
}

impl MergedTree {
    /// The tree of these layers, topmost first.
    pub fn new(layers: Vec<Arc<LayerIndex>>) -> MergedTree {
        MergedTree { layers }
    }

    /// The indexes of its layers, topmost first.
    pub fn layers(&self) -> &[Arc<LayerIndex>] {
        &self.layers
    }

    /// The index of the layer that `member` is in.
    pub fn index(&self, member: Member) -> Result<&Arc<LayerIndex>> {
        let missing = || Error::Missing { what: format!("layer {} of a chain of {}", member.layer, self.layers.len()) };
        self.layers.get(usize::from(member.layer)).ok_or_else(missing)
    }

    /// The inode of `member`.
    pub fn inode(&self, member: Member) -> Result<Inode> {
        self.index(member)?.inode(member.inode)
    }

    /// The members of the root. overlayfs merges all roots: it looks for the mark of an opaque directory only on what it
    /// looks up, and roots are not looked up.
    pub fn roots(&self) -> Vec<Member> {
        (0..self.layers.len()).map(|layer| Member { layer: layer as u16, inode: ROOT }).collect()
    }

    /// What the entries of one name, topmost first, mean together.
    pub fn child(&self, namesakes: &[Member]) -> Result<Option<Child>> {
        let mut directories = Vec::new();
        for member in namesakes {
            let inode = self.inode(*member)?;
            if !inode.is_dir() {
                return Ok(match directories.is_empty() {
                    true if inode.is_whiteout() => None,
                    true => Some(Child::Other(*member)),
                    false => Some(Child::Directory(directories)),
                });
            }
            directories.push(*member);
            if self.index(*member)?.is_opaque(&inode)? {
                break;
            }
        }
        Ok(if directories.is_empty() { None } else { Some(Child::Directory(directories)) })
    }

    /// Looks a name up in the directory with these members.
    pub fn lookup(&self, directory: &[Member], name: &[u8]) -> Result<Option<Child>> {
        let mut namesakes = Vec::new();
        for member in directory {
            let index = self.index(*member)?;
            if let Some(inode) = index.lookup(&index.inode(member.inode)?, name)? {
                namesakes.push(Member { layer: member.layer, inode });
            }
        }
        self.child(&namesakes)
    }

    /// Looks a path up from the root and follows symbolic links, as a program in the container would.
    pub fn resolve(&self, path: &[u8]) -> Result<Option<Found>> {
        let mut pending: Vec<Vec<u8>> = names(path);
        let (mut directories, mut passed) = (vec![self.roots()], Vec::<Vec<u8>>::new());
        let mut links = 0;
        while let Some(name) = pending.pop() {
            if name == b".." {
                if passed.pop().is_some() {
                    directories.pop();
                }
                continue;
            }
            let here = directories.last().map_or(&[][..], |members| members);
            let member = match self.lookup(here, &name)? {
                None => return Ok(None),
                Some(Child::Directory(members)) => {
                    directories.push(members);
                    passed.push(name);
                    continue;
                }
                Some(Child::Other(member)) => member,
            };
            let inode = self.inode(member)?;
            if !inode.is_symlink() {
                passed.push(name);
                let found = Found { path: passed.join(&b'/'), child: Child::Other(member) };
                return Ok(pending.is_empty().then_some(found));
            }
            links += 1;
            if links > LINKS_MAX || inode.size > TARGET_MAX {
                return Ok(None);
            }
            let target = self.index(member)?.link_target(&inode)?;
            if target.starts_with(b"/") {
                directories.truncate(1);
                passed.clear();
            }
            pending.extend(names(&target));
        }
        Ok(directories.pop().map(|members| Found { path: passed.join(&b'/'), child: Child::Directory(members) }))
    }
}

/// The names in a path, the last one first.
fn names(path: &[u8]) -> Vec<Vec<u8>> {
    let names = path.rsplit(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".");
    names.map(<[u8]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::{ContentDigest, Digest};
    use crate::layer::{FileContent, LayerFacts, LayerTree, Metadata, NodeKind, S_IFCHR};

    /// One layer: a path ends with `/` for a directory, holds ` -> ` for a symbolic link; `.wh.NAME` hides a name.
    fn layer(paths: &[&str]) -> Arc<LayerIndex> {
        let mut tree = LayerTree::new();
        for path in paths {
            let (path, target) = path.split_once(" -> ").map_or((*path, None), |(path, target)| (path, Some(target)));
            let mut parts: Vec<&str> = path.trim_end_matches('/').split('/').collect();
            let last = parts.pop().unwrap();
            let mut dir = ROOT;
            for part in parts {
                dir = tree.child(dir, part.as_bytes()).unwrap_or_else(|| tree.make_implicit(dir, part.as_bytes()));
            }
            let kind = match (target, last.strip_prefix(".wh.")) {
                (Some(target), _) => NodeKind::Symlink(target.into()),
                (None, Some(_)) => NodeKind::Special(S_IFCHR, 0, 0),
                (None, None) if path.ends_with('/') => NodeKind::Directory,
                (None, None) => NodeKind::File(FileContent::empty()),
            };
            let name = last.strip_prefix(".wh.").unwrap_or(last);
            tree.insert(dir, name.as_bytes(), Metadata { permissions: 0o755, ..Metadata::default() }, kind);
        }
        let recipe_digest = ContentDigest::of(b"recipe");
        let diff_id = Digest::of(paths.concat().as_bytes());
        let facts = LayerFacts { diff_id, tar_size: 0, recipe_len: 0, recipe_digest };
        Arc::new(LayerIndex::from_bytes(tree.encode(&facts, &[]).unwrap()).unwrap())
    }

    fn place(tree: &MergedTree, path: &str) -> Option<(String, Option<u16>)> {
        let found = tree.resolve(path.as_bytes()).unwrap()?;
        let layer = match found.child {
            Child::Other(member) => Some(member.layer),
            Child::Directory(_) => None,
        };
        Some((String::from_utf8(found.path).unwrap(), layer))
    }

    #[test]
    fn paths_lead_where_the_kernel_would_go() {
        let base =
            layer(&["usr/bin/python3.12", "usr/bin/python3 -> python3.12", "bin -> usr/bin", "old/file", "etc/a"]);
        let top =
            layer(&["usr/bin/sh -> /bin/dash", "usr/bin/dash", ".wh.old", "etc/b", "loop -> loop", "up -> ../../bin"]);
        let tree = MergedTree::new(vec![top, base]);
        let found = |path: &str, layer| Some((path.to_owned(), layer));
        assert_eq!(place(&tree, "/bin/python3"), found("usr/bin/python3.12", Some(1)));
        assert_eq!(place(&tree, "/bin/sh"), found("usr/bin/dash", Some(0)));
        assert_eq!(place(&tree, "up/./sh"), found("usr/bin/dash", Some(0)), "the root's parent is the root");
        assert_eq!(place(&tree, "etc/../etc/a"), found("etc/a", Some(1)));
        assert_eq!(place(&tree, "etc"), found("etc", None));
        assert_eq!(place(&tree, ""), found("", None));
        assert_eq!(place(&tree, "old/file"), None, "a whiteout hides it");
        assert_eq!(place(&tree, "loop"), None);
        assert_eq!(place(&tree, "etc/a/b"), None, "a file is no directory");
        let Some(Found { child: Child::Directory(members), .. }) = tree.resolve(b"etc").unwrap() else { panic!() };
        assert_eq!(members.len(), 2);
        assert!(tree.inode(members[0]).unwrap().is_dir());
        assert!(tree.inode(Member { layer: 2, inode: ROOT }).is_err());
    }
}
