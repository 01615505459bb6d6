//! The control tree: `/`, `layers`, `chains` and everything below `images`.
//!
//! It changes with the catalogue. A node is made for each directory and tag that somebody has seen; a tag that moves gets
//! a new node, so that what the kernel has cached of a link is never wrong.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::RwLock;
use store::Digest;

use super::node::{CONTROL, Node};
use crate::failure::{Failure, Result};

/// One node of the control tree.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Control {
    /// `/`
    Root,
    /// `/layers`
    Layers,
    /// `/chains`
    Chains,
    /// `/images/<path>`; `/images` itself has the empty path.
    Images(Arc<str>),
    /// A tag in `/images/<path>`: a link to a chain.
    Tag(Arc<str>, Digest),
}

/// Where nodes of the control tree are numbered.
pub struct Controls {
    /// Guards the table; written when a node is first seen.
    table: RwLock<Table>,
}

struct Table {
    nodes: Vec<Control>,
    numbers: HashMap<Control, u32>,
}

impl Default for Controls {
    fn default() -> Controls {
        let controls = Controls { table: RwLock::new(Table { nodes: Vec::new(), numbers: HashMap::new() }) };
        // The root comes first: its number is fixed.
        controls.node(Control::Root);
        controls
    }
}

impl Controls {
    /// The node of `control`.
    pub fn node(&self, control: Control) -> Node {
        if let Some(number) = self.table.read().numbers.get(&control) {
            return Node::new(CONTROL, *number);
        }
        let mut guard = self.table.write();
        let table = &mut *guard;
        let number = *table.numbers.entry(control.clone()).or_insert_with(|| {
            table.nodes.push(control);
            table.nodes.len() as u32 - 1
        });
        Node::new(CONTROL, number)
    }

    /// What `node` is.
    pub fn get(&self, node: Node) -> Result<Control> {
        self.table.read().nodes.get(node.position() as usize).cloned().ok_or(Failure::UnknownNode)
    }
}

/// The target of a tag in `images/<path>`.
pub fn link_target(path: &str, chain: &Digest) -> String {
    let up = "../".repeat(path.split('/').count() + 1);
    format!("{up}chains/{}", chain.hex())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_lead_to_chains_from_any_depth() {
        let chain = Digest::of(b"c");
        let hex = chain.hex();
        assert_eq!(link_target("alpine", &chain), format!("../../chains/{hex}"));
        assert_eq!(link_target("127.0.0.1:5000/a/b", &chain), format!("../../../../chains/{hex}"));
    }

    #[test]
    fn nodes_stay_and_the_root_is_the_first() {
        let controls = Controls::default();
        assert_eq!(controls.node(Control::Root), Node::ROOT);
        let tag = Control::Tag("a".into(), Digest::of(b"1"));
        let node = controls.node(tag.clone());
        assert_eq!(controls.node(tag.clone()), node);
        assert_eq!(controls.get(node), Ok(tag));
        assert_ne!(controls.node(Control::Tag("a".into(), Digest::of(b"2"))), node);
    }
}
