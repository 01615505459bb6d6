//! The merged tree of a chain's layers, as the kernel's overlayfs would show it.
//!
//! What a name means is [`MergedTree`]'s business; here directories get nodes. A chain has two slots for each of its
//! layers: one for directories that the layer alone has, one for directories that layers below it have too. In both the
//! node is the number of the topmost member's inode, so it says the same in every worker that serves the chain. Below a
//! directory with one member everything comes from that member's layer, and nothing is kept. What other directories
//! consist of is kept when they are first seen, found again by any of their members; there are a few hundred of them in
//! an image. A worker that took the mount over finds out when it is first asked ([`Chain::find`]).
//!
//! Directories need nodes of the chain's own, because one directory inode cannot have two parents; everything else is
//! the layer's own node, so that all chains share its pages.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::atomic::AtomicI64;
use std::sync::{Arc, OnceLock};

use parking_lot::RwLock;
use store::Digest;
use store::layer::{Child, Inode, InodeIndex, LayerIndex, Member, MergedTree, ROOT, S_IFCHR, S_IFDIR};

use super::layer::{KernelReferences, Layer, stored_inode};
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
    /// By the topmost member.
    directories: HashMap<Member, MergedDirectory>,
    /// The nodes of directories by any member: of all merged ones that were seen, and of others that were looked for.
    by_member: HashMap<Member, Node>,
}

/// The slots that a chain has for each layer.
pub(super) const SLOTS_OF_LAYER: usize = 2;

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
    /// The slots of its layers, topmost first, if an earlier worker had opened it: that may have shown directories that are not in the table.
    resumed: Option<Vec<u32>>,
    /// Guards the merged directories; written when one is first seen.
    table: RwLock<DirectoryTable>,
}

impl Chain {
    /// A chain of `depth` layers whose slots start at `first_slot`, not open yet. What the kernel knows of it is counted at `references`;
    /// `resumed` are the slots of its layers, topmost first, if an earlier worker had opened it.
    pub(super) fn new(
        first_slot: Slot,
        depth: usize,
        references: Option<&'static AtomicI64>,
        resumed: Option<Vec<u32>>,
    ) -> Chain {
        let known = KernelReferences::at(references, resumed.is_some());
        Chain { first_slot, depth, open: OnceLock::new(), known, resumed, table: RwLock::default() }
    }

    /// The first of its slots.
    pub(super) fn first_slot(&self) -> Slot {
        self.first_slot
    }

    /// How many layers it has.
    pub(super) fn depth(&self) -> usize {
        self.depth
    }

    /// The slots of its layers, topmost first, if an earlier worker had opened it and this one has not.
    pub(super) fn unopened(&self) -> Option<&[u32]> {
        self.resumed.as_deref().filter(|_| !self.is_open())
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

    /// The root's node; for a chain that is not open, the node that it will have.
    pub fn root_or_likely(&self) -> Node {
        let topmost = Member { layer: 0, inode: ROOT };
        let likely = if self.depth == 1 { self.single(topmost) } else { self.merged(topmost) };
        self.open.get().map_or(likely, |open| open.root)
    }

    /// The node of a directory that one layer alone has.
    fn single(&self, member: Member) -> Node {
        Node::new(Slot(self.first_slot.0 + SLOTS_OF_LAYER as u32 * u32::from(member.layer)), member.inode.0)
    }

    /// The node of a merged directory with this topmost member.
    fn merged(&self, topmost: Member) -> Node {
        Node::new(Slot(self.single(topmost).slot().0 + 1), topmost.inode.0)
    }

    /// What a directory's node says: its topmost member, and whether it has others.
    fn meaning(&self, node: Node) -> (Member, bool) {
        let slot = node.slot().0 - self.first_slot.0;
        let layer = (slot / SLOTS_OF_LAYER as u32) as u16;
        (Member { layer, inode: super::node::inode_of(node) }, slot % SLOTS_OF_LAYER as u32 == 1)
    }

    /// The node of the directory with these members.
    fn directory(&self, members: &[Member], parent: Option<Node>) -> Node {
        if let [member] = members {
            return self.single(*member);
        }
        let node = self.merged(members[0]);
        if self.table.read().directories.contains_key(&members[0]) {
            return node;
        }
        let mut table = self.table.write();
        let directory = || MergedDirectory { members: members.into(), parent: parent.unwrap_or(node) };
        table.directories.entry(members[0]).or_insert_with(directory);
        table.by_member.extend(members.iter().map(|member| (*member, node)));
        node
    }

    /// The members of the directory `node`.
    pub fn members(&self, node: Node) -> Result<Members> {
        match self.meaning(node) {
            (member, false) => Ok(Members::One([member])),
            (topmost, true) => {
                let members = || Some(Arc::clone(&self.table.read().directories.get(&topmost)?.members));
                let known = members().map_or_else(|| self.find(topmost).map(|_| members()), |known| Ok(Some(known)))?;
                known.map(Members::Many).ok_or(Failure::UnknownNode)
            }
        }
    }

    /// The parent's node; nothing for the chain's root.
    pub fn parent(&self, node: Node) -> Result<Option<Node>> {
        if self.root()? == node {
            return Ok(None);
        }
        let (topmost, is_merged) = self.meaning(node);
        if is_merged {
            self.members(node)?;
            return Ok(self.table.read().directories.get(&topmost).map(|directory| directory.parent));
        }
        let parent = Member { inode: self.inode(topmost)?.parent, ..topmost };
        let known = self.table.read().by_member.get(&parent).copied();
        match known {
            Some(node) => Ok(Some(node)),
            None if self.resumed.is_some() => self.find(parent).map(Some),
            None => Ok(Some(self.single(parent))),
        }
    }

    /// Finds the directory that `member` belongs to, by its path: for nodes that an earlier worker has shown.
    fn find(&self, member: Member) -> Result<Node> {
        let (tree, index) = (&self.opened()?.tree, self.index(member)?);
        // The way down from the root, and the directories above: of no more than there are inodes.
        let (mut names, mut inode) = (Vec::new(), member.inode);
        while inode != ROOT {
            if names.len() > index.inode_count() as usize {
                return Err(Failure::Damaged);
            }
            let parent = stored_inode(index, inode)?.parent;
            names.push(name_of(index, parent, inode)?);
            inode = parent;
        }
        let (mut members, mut node) = (tree.roots(), self.root()?);
        while let Some(name) = names.pop() {
            let Some(Child::Directory(below)) = stored(tree.lookup(&members, &name))? else {
                return Err(Failure::UnknownNode);
            };
            (node, members) = (self.directory(&below, Some(node)), below);
        }
        if !members.contains(&member) {
            return Err(Failure::UnknownNode);
        }
        self.table.write().by_member.insert(member, node);
        Ok(node)
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

/// The name under which a layer's directory has an inode.
fn name_of(index: &LayerIndex, directory: InodeIndex, inode: InodeIndex) -> Result<Vec<u8>> {
    for entry in index.entries(&stored_inode(index, directory)?, 0) {
        let entry = stored(entry)?;
        if entry.inode == inode {
            return Ok(entry.name.into());
        }
    }
    Err(Failure::UnknownNode)
}
