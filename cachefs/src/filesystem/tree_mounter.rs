//! What the tree knows of native trees: that somebody mounts them.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use store::Digest;

/// Whoever mounts native trees, on top of the roots of chains in the mount.
pub trait TreeMounter: Send + Sync {
    /// Mounts the tree of an open chain, unless it is mounted. `done` is called then, or when it is clear that this tree cannot be
    /// mounted; the caller's thread does not wait.
    fn mount(self: Arc<Self>, chain: Digest, done: Box<dyn FnOnce() + Send>);

    /// The layers that native trees use, mounted ones and those of which containers have the last hold.
    fn in_use(&self) -> BTreeSet<Digest>;
}

/// How the kernel gets at the two files of a native tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// It opens them.
    Files,
    /// They are loop devices.
    Loops,
}
