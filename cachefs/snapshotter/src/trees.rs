//! Where the merged tree of a chain of layers is on this host.
//!
//! One question, whatever kind of tree the host has: who answers it is the host's business.

use std::io;
use std::path::PathBuf;

use store::Digest;

/// The merged tree of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// Its root directory.
    pub path: PathBuf,
    /// The diffIDs of its layers, the base first.
    pub layers: Vec<Digest>,
}

/// The trees of this host.
pub trait Trees: Send + Sync + 'static {
    /// The tree of the chain; `None` if the store does not hold all of its layers. Answers within seconds, whatever hangs.
    fn tree(&self, chain: &Digest) -> io::Result<Option<Tree>>;
}
