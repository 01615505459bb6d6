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
use store::Digest;

use super::node::{CATALOGUE, Node};
use crate::source::failure::{Failure, Result};

/// One node of the catalogue tree.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum CatalogueNode {
    /// `/`
    Root,
    /// `/layers`
    Layers,
    /// `/chains`
    Chains,
    /// `/trees`
    Trees,
    /// A chain in `/trees`: a link to it in `/chains`.
    Tree(Digest),
    /// `/images/<path>`; `/images` itself has the empty path.
    Images(Arc<str>),
    /// A tag in `/images/<path>`: a link to a chain in `/trees`.
    Tag(Arc<str>, Digest),
}

/// The node numbers of the catalogue tree.
pub struct CatalogueNodes {
    /// Guards the table; written when a node is first seen.
    table: RwLock<NodeTable>,
}

struct NodeTable {
    nodes: Vec<CatalogueNode>,
    numbers: HashMap<CatalogueNode, u32>,
}

impl Default for CatalogueNodes {
    fn default() -> CatalogueNodes {
        let catalogue_nodes =
            CatalogueNodes { table: RwLock::new(NodeTable { nodes: Vec::new(), numbers: HashMap::new() }) };
        // The root comes first: its number is fixed.
        catalogue_nodes.node(CatalogueNode::Root);
        catalogue_nodes
    }
}

impl CatalogueNodes {
    /// The node of `entry`, which gets a number when it is first asked for.
    pub fn node(&self, entry: CatalogueNode) -> Node {
        if let Some(number) = self.table.read().numbers.get(&entry) {
            return Node::new(CATALOGUE, *number);
        }
        let mut guard = self.table.write();
        let table = &mut *guard;
        let number = *table.numbers.entry(entry.clone()).or_insert_with(|| {
            table.nodes.push(entry);
            table.nodes.len() as u32 - 1
        });
        Node::new(CATALOGUE, number)
    }

    /// What `node` stands for.
    pub fn get(&self, node: Node) -> Result<CatalogueNode> {
        self.table.read().nodes.get(node.position() as usize).cloned().ok_or(Failure::UnknownNode)
    }
}

impl CatalogueNode {
    /// Where a link leads; nothing for a directory.
    pub fn link_target(&self) -> Option<String> {
        match self {
            CatalogueNode::Tag(path, chain) => {
                let up = "../".repeat(path.split('/').count() + 1);
                Some(format!("{up}trees/{}", chain.hex()))
            }
            CatalogueNode::Tree(chain) => Some(format!("../chains/{}", chain.hex())),
            CatalogueNode::Root
            | CatalogueNode::Layers
            | CatalogueNode::Chains
            | CatalogueNode::Trees
            | CatalogueNode::Images(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_lead_to_chains_from_any_depth() {
        let chain = Digest::of(b"c");
        let hex = chain.hex();
        let target = |path: &str| CatalogueNode::Tag(path.into(), chain).link_target();
        assert_eq!(target("alpine"), Some(format!("../../trees/{hex}")));
        assert_eq!(target("127.0.0.1:5000/a/b"), Some(format!("../../../../trees/{hex}")));
        assert_eq!(CatalogueNode::Tree(chain).link_target(), Some(format!("../chains/{hex}")));
        assert_eq!(CatalogueNode::Trees.link_target(), None);
    }

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
