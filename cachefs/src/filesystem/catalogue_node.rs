//! What the nodes of the catalogue tree stand for.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use store::Digest;

/// One node of the catalogue tree.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
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
}
