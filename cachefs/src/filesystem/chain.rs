//! The merged tree of a chain's layers, as the kernel's overlayfs would show it.
//!
//! What a name means is [`MergedTree`]'s business; here directories get nodes. Below a directory with one member
//! everything comes from that member's layer, so its node is the inode's number in a slot of (chain, layer) and nothing
//! is kept. Directories with several members get a place in the chain's table when they are first seen, found again by
//! any of their members; there are a few hundred of them in an image.
//!
//! Directories need nodes of the chain's own, because one directory inode cannot have two parents; everything else is
//! the layer's own node, so that all chains share its pages.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use parking_lot::RwLock;
use store::Digest;
use store::layer::{Child, Inode, LayerIndex, Member, MergedTree, ROOT, S_IFCHR, S_IFDIR};

use super::layer::{KernelReferences, Layer};
use super::listing::{self, Heads};
use super::node::{Attributes, Detail, Lifetime, Listed, Node, ReplyRoom, Slot};
use crate::source::failure::{Failure, Result, stored};

/// A directory's members, topmost first; at least one.
#[derive(Debug, Clone)]
pub enum Members {
    /// One layer has it.
    One([Member; 1]),
    /// Several layers have it.
    Many(Arc<[Member]>),
}

impl Deref for Members {
    type Target = [Member];

    fn deref(&self) -> &[Member] {
        match self {
            Members::One(member) => member,
            Members::Many(members) => members,
        }
    }
}

#[derive(Debug)]
struct MergedDirectory {
    members: Arc<[Member]>,
    parent: Node,
}

#[derive(Debug, Default)]
struct DirectoryTable {
    directories: Vec<MergedDirectory>,
    by_member: HashMap<Member, u32>,
}

#[derive(Debug)]
struct Open {
    layers: Vec<Arc<Layer>>,
    tree: MergedTree,
    root: Node,
}

/// One chain.
#[derive(Debug)]
pub struct Chain {
    first_slot: Slot,
    depth: usize,
    open: OnceLock<Open>,
    pub(super) known: KernelReferences,
    /// Guards the merged directories; written when one is first seen.
    table: RwLock<DirectoryTable>,
}

impl Chain {
    /// A chain of `depth` layers whose slots start at `first_slot`, not open yet.
    pub(super) fn new(first_slot: Slot, depth: usize) -> Chain {
        Chain { first_slot, depth, open: OnceLock::new(), known: KernelReferences::default(), table: RwLock::default() }
    }

    /// Opens it with its layers, topmost first, whose indexes were loaded.
    pub(super) fn open(&self, layers: Vec<Arc<Layer>>) -> Result<()> {
        let indexes = layers.iter().map(|layer| layer.index().cloned());
        let tree = MergedTree::new(indexes.collect::<Result<Vec<_>>>()?);
        let root = self.directory(&tree.roots(), None);
        let _ = self.open.set(Open { layers, tree, root });
        Ok(())
    }

    /// Whether it has been opened.
    pub fn is_open(&self) -> bool {
        self.open.get().is_some()
    }

    fn opened(&self) -> Result<&Open> {
        self.open.get().ok_or(Failure::UnknownNode)
    }

    fn index(&self, member: Member) -> Result<&Arc<LayerIndex>> {
        stored(self.opened()?.tree.index(member))
    }

    fn inode(&self, member: Member) -> Result<Inode> {
        stored(self.opened()?.tree.inode(member))
    }

    /// Its layers, if it is open.
    pub(super) fn diff_ids(&self) -> impl Iterator<Item = Digest> {
        self.open.get().into_iter().flat_map(|open| &open.layers).map(|layer| layer.name.diff_id)
    }

    /// Its layers, topmost first.
    pub(super) fn opened_layers(&self) -> Result<Vec<Arc<Layer>>> {
        Ok(self.opened()?.layers.clone())
    }

    /// The chain's root directory.
    pub fn root(&self) -> Result<Node> {
        self.open.get().map(|open| open.root).ok_or(Failure::UnknownNode)
    }

    /// The root's node; for a chain that is not open, the node that it will most likely have.
    pub fn root_or_likely(&self) -> Node {
        let likely = match self.depth {
            1 => self.single(Member { layer: 0, inode: ROOT }),
            _ => Node::new(self.first_slot, 0),
        };
        self.open.get().map_or(likely, |open| open.root)
    }

    fn single(&self, member: Member) -> Node {
        Node::new(Slot(self.first_slot.0 + 1 + u32::from(member.layer)), member.inode.0)
    }

    /// The node of the directory with these members.
    fn directory(&self, members: &[Member], parent: Option<Node>) -> Node {
        if let [member] = members {
            return self.single(*member);
        }
        if let Some(known) = self.table.read().by_member.get(&members[0]) {
            return Node::new(self.first_slot, *known);
        }
        let mut guard = self.table.write();
        let table = &mut *guard;
        if let Some(known) = table.by_member.get(&members[0]) {
            return Node::new(self.first_slot, *known);
        }
        let position = table.directories.len() as u32;
        let node = Node::new(self.first_slot, position);
        table.directories.push(MergedDirectory { members: members.into(), parent: parent.unwrap_or(node) });
        table.by_member.extend(members.iter().map(|member| (*member, position)));
        node
    }

    /// The layer that alone contributes to the directory `node`; nothing for a merged one.
    fn layer_of(&self, node: Node) -> Option<u16> {
        (node.slot().0 - self.first_slot.0).checked_sub(1).map(|layer| layer as u16)
    }

    /// The members of the directory `node`.
    pub fn members(&self, node: Node) -> Result<Members> {
        match self.layer_of(node) {
            Some(layer) => Ok(Members::One([Member { layer, inode: super::node::inode_of(node) }])),
            None => {
                let table = self.table.read();
                let directory = table.directories.get(node.position() as usize).ok_or(Failure::UnknownNode)?;
                Ok(Members::Many(Arc::clone(&directory.members)))
            }
        }
    }

    /// The parent's node; nothing for the chain's root.
    pub fn parent(&self, node: Node) -> Result<Option<Node>> {
        if self.root()? == node {
            return Ok(None);
        }
        let Some(layer) = self.layer_of(node) else {
            let table = self.table.read();
            let directory = table.directories.get(node.position() as usize).ok_or(Failure::UnknownNode)?;
            return Ok(Some(directory.parent));
        };
        let parent = self.inode(Member { layer, inode: super::node::inode_of(node) })?.parent;
        let parent = Member { layer, inode: parent };
        let merged = self.table.read().by_member.get(&parent).copied();
        Ok(Some(merged.map_or(self.single(parent), |position| Node::new(self.first_slot, position))))
    }

    /// A directory's attributes, which are those of the topmost member. A merged directory has a link count of 1, as in
    /// overlayfs.
    pub fn attributes(&self, node: Node, members: &[Member]) -> Result<Attributes> {
        let mut attributes = Attributes::of(node, &self.inode(members[0])?);
        if members.len() > 1 {
            attributes.nlink = 1;
        }
        Ok(attributes)
    }

    /// The inode behind a directory's attributes, with its index.
    pub fn topmost(&self, members: &[Member]) -> Result<(&Arc<LayerIndex>, Inode)> {
        Ok((self.index(members[0])?, self.inode(members[0])?))
    }

    /// Looks up a name in a directory.
    pub fn lookup(&self, node: Node, members: &[Member], name: &[u8]) -> Result<Option<Attributes>> {
        match stored(self.opened()?.tree.lookup(members, name))? {
            Some(child) => self.child_attributes(node, &child).map(Some),
            None => Ok(None),
        }
    }

    fn child_node(&self, parent: Node, child: &Child) -> Result<Node> {
        match child {
            Child::Directory(members) => Ok(self.directory(members, Some(parent))),
            Child::Other(member) => {
                let layer = self.opened()?.layers.get(usize::from(member.layer)).ok_or(Failure::UnknownNode)?;
                Ok(Node::new(layer.slot, member.inode.0))
            }
        }
    }

    fn child_attributes(&self, parent: Node, child: &Child) -> Result<Attributes> {
        let node = self.child_node(parent, child)?;
        match child {
            Child::Directory(members) => self.attributes(node, members),
            Child::Other(member) => Ok(Attributes::of(node, &self.inode(*member)?)),
        }
    }

    /// Lists a directory from `offset` on, without `.` and `..`.
    pub fn list(
        &self,
        node: Node,
        members: &[Member],
        offset: u64,
        detail: Detail,
        give: &mut dyn FnMut(Listed<'_>) -> ReplyRoom,
    ) -> Result<()> {
        let directories = members.iter().map(|member| Ok((&**self.index(*member)?, self.inode(*member)?)));
        let mut heads = Heads::new(directories.collect::<Result<_>>()?, offset)?;
        let mut namesakes = Vec::new();
        while let Some(group) = heads.next()? {
            namesakes.clear();
            namesakes
                .extend(group.entries.iter().map(|(n, entry)| Member { layer: members[*n].layer, inode: entry.inode }));
            let (at, first) = &group.entries[0];
            let child = match (&namesakes[..], first.file_type) {
                // What an only entry means is seen without its inode, unless it may be a whiteout.
                (only, S_IFDIR) if only.len() == 1 => Some(Child::Directory(only.to_vec())),
                ([only], file_type) if file_type != S_IFCHR => Some(Child::Other(*only)),
                _ => stored(self.opened()?.tree.child(&namesakes))?,
            };
            let Some(child) = child else { continue };
            let (target, attributes) = match detail {
                Detail::Names => (self.child_node(node, &child)?, None),
                Detail::Attributes => {
                    let attributes = self.child_attributes(node, &child)?;
                    (attributes.node, Some((attributes, Lifetime::Forever)))
                }
            };
            let room = give(Listed {
                name: &first.name,
                node: target,
                file_type: first.file_type,
                offset: listing::offset_after(*at, group.position, members.len()),
                attributes,
            });
            if room == ReplyRoom::Full {
                break;
            }
        }
        Ok(())
    }
}
