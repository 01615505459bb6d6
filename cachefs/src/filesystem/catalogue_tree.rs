//! The part of the tree that comes from the catalogue: `/`, `layers`, `chains`, `trees` and everything below `images`.
//!
//! It changes with the catalogue. A node is made for each directory and tag that somebody has seen. A tag that moves
//! gets a new node, so that a link target that the kernel has cached is never wrong.
//!
//! `trees` is for whoever will use a whole tree: looking a chain up there has its native tree mounted, if the host mounts such. It lists
//! nothing, so that nobody mounts every chain by looking around.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::RwLock;

use super::catalogue_node::CatalogueNode;
use super::kernel_state::{KernelState, Record};
use super::node::{CATALOGUE, Node};
use crate::source::failure::{Failure, Result};

/// The node numbers of the catalogue tree.
pub struct CatalogueNodes {
    /// Guards the table; written when a node is first seen. Taken before the records' lock.
    table: RwLock<NodeTable>,
    state: Arc<KernelState>,
}

struct NodeTable {
    nodes: Vec<CatalogueNode>,
    numbers: HashMap<CatalogueNode, u32>,
}

impl NodeTable {
    /// Gives an entry the next number.
    fn push(&mut self, entry: CatalogueNode) -> u32 {
        let number = self.nodes.len() as u32;
        self.nodes.push(entry.clone());
        self.numbers.insert(entry, number);
        number
    }
}

impl Default for CatalogueNodes {
    fn default() -> CatalogueNodes {
        CatalogueNodes::resume(Arc::default())
    }
}

impl CatalogueNodes {
    /// The nodes that were numbered in this state, and those that follow.
    pub(super) fn resume(state: Arc<KernelState>) -> CatalogueNodes {
        let mut table = NodeTable { nodes: Vec::new(), numbers: HashMap::new() };
        // The root comes first: its number is fixed.
        table.push(CatalogueNode::Root);
        for record in &state.earlier {
            if let Record::CatalogueNode(entry) = record {
                table.push(entry.clone());
            }
        }
        CatalogueNodes { table: RwLock::new(table), state }
    }

    /// The node of `entry`, which gets a number when it is first asked for.
    pub fn node(&self, entry: CatalogueNode) -> Node {
        if let Some(number) = self.table.read().numbers.get(&entry) {
            return Node::new(CATALOGUE, *number);
        }
        let mut table = self.table.write();
        let known = table.numbers.get(&entry).copied();
        let number = known.unwrap_or_else(|| {
            self.state.record(&Record::CatalogueNode(entry.clone()));
            table.push(entry)
        });
        Node::new(CATALOGUE, number)
    }

    /// What `node` stands for.
    pub fn get(&self, node: Node) -> Result<CatalogueNode> {
        self.table.read().nodes.get(node.position() as usize).cloned().ok_or(Failure::UnknownNode)
    }
}

#[cfg(test)]
mod tests {
    use store::Digest;

    use super::*;

    #[test]
    fn nodes_stay_and_the_root_is_the_first() {
        let catalogue_nodes = CatalogueNodes::default();
        assert_eq!(catalogue_nodes.node(CatalogueNode::Root), Node::ROOT);
        let tag = CatalogueNode::Tag("a".into(), Digest::of(b"1"));
        let node = catalogue_nodes.node(tag.clone());
        assert_eq!(catalogue_nodes.node(tag.clone()), node);
        assert_eq!(catalogue_nodes.get(node), Ok(tag));
        assert_ne!(catalogue_nodes.node(CatalogueNode::Tag("a".into(), Digest::of(b"2"))), node);
    }
}
