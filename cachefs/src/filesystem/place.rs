//! What one layer or chain answers. It asks nothing but indexes, so it is also what native trees are written from.
//!
//! The catalogue's part of the tree answers elsewhere; here its nodes are unknown.

use std::sync::Arc;

use super::layer::{Layer, stored_inode};
use super::node::{Attributes, Detail, FIRST_OFFSET, Found, Lifetime, Listed, Node, ReplyRoom, inode_of};
use super::slots::SlotContent;
use crate::content::cache::Content;
use crate::source::failure::{Failure, Result, stored};

impl SlotContent {
    /// Looks `name` up in the directory `parent`.
    pub(super) fn lookup(&self, parent: Node, name: &[u8]) -> Result<Found> {
        match self {
            SlotContent::Catalogue => Err(Failure::UnknownNode),
            SlotContent::Layer(layer) => lookup_in_layer(layer, parent, name),
            SlotContent::Chain(chain) => {
                let members = chain.members(parent)?;
                Ok(match chain.lookup(parent, &members, name)? {
                    Some(attributes) => Found::Entry(attributes, Lifetime::Forever),
                    None => Found::Absent(Lifetime::Forever),
                })
            }
        }
    }

    /// What `stat` shows of a node.
    pub(super) fn attributes(&self, node: Node) -> Result<Attributes> {
        match self {
            SlotContent::Catalogue => Err(Failure::UnknownNode),
            SlotContent::Layer(layer) => Ok(Attributes::of(node, &stored_inode(layer.index()?, inode_of(node))?)),
            SlotContent::Chain(chain) => chain.attributes(node, &chain.members(node)?),
        }
    }

    /// A symbolic link's target.
    pub(super) fn link_target(&self, node: Node) -> Result<Vec<u8>> {
        let SlotContent::Layer(layer) = self else { return Err(Failure::WrongKind) };
        let index = layer.index()?;
        let inode = stored_inode(index, inode_of(node))?;
        if inode.is_symlink() { Ok(stored(index.link_target(&inode))?.into_owned()) } else { Err(Failure::WrongKind) }
    }

    /// The content of the regular file `node`.
    pub(super) fn content(&self, node: Node) -> Result<Content> {
        let SlotContent::Layer(layer) = self else { return Err(Failure::IsDirectory) };
        let index = layer.index()?;
        let inode = stored_inode(index, inode_of(node))?;
        if inode.is_file() {
            Ok(Content { index: Arc::clone(index), number: inode_of(node), inode, reader: None })
        } else if inode.is_dir() {
            Err(Failure::IsDirectory)
        } else {
            Err(Failure::WrongKind)
        }
    }

    /// Lists a directory from `offset` on, without `.` and `..`: calls `give` with entries until there is no room for more.
    pub(super) fn list(
        &self,
        node: Node,
        offset: u64,
        detail: Detail,
        give: &mut dyn FnMut(Listed<'_>) -> ReplyRoom,
    ) -> Result<()> {
        match self {
            SlotContent::Catalogue => Err(Failure::UnknownNode),
            SlotContent::Layer(layer) => list_layer(layer, node, offset, detail, give),
            SlotContent::Chain(chain) => chain.list(node, &chain.members(node)?, offset, detail, give),
        }
    }
}

fn lookup_in_layer(layer: &Layer, parent: Node, name: &[u8]) -> Result<Found> {
    let index = layer.index()?;
    let directory = stored_inode(index, inode_of(parent))?;
    if !directory.is_dir() {
        return Err(Failure::NotDirectory);
    }
    let Some(number) = stored(index.lookup(&directory, name))? else { return Ok(Found::Absent(Lifetime::Forever)) };
    let inode = stored(index.inode(number))?;
    Ok(Found::Entry(Attributes::of(Node::new(layer.slot, number.0), &inode), Lifetime::Forever))
}

fn list_layer(
    layer: &Layer,
    node: Node,
    offset: u64,
    detail: Detail,
    give: &mut dyn FnMut(Listed<'_>) -> ReplyRoom,
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
            == ReplyRoom::Full
        {
            break;
        }
    }
    Ok(())
}
