//! Extended attributes.
//!
//! The attributes in a layer's tar are shown, except overlayfs' private names. Of those, a layer shows only
//! `trusted.overlay.opaque`, because a foreign redirect would send the kernel elsewhere, and a chain shows none,
//! because it has been merged already.

use store::layer::{Inode, LayerIndex, OPAQUE_XATTR};

use super::Filesystem;
use super::layer::stored_inode;
use super::node::{Node, inode_of};
use super::slots::SlotContent;
use crate::source::failure::{Failure, Result, stored};

/// Names that overlayfs keeps for itself.
const OVERLAY: &[u8] = b"trusted.overlay.";
/// The attribute of the mount's root that names the daemon's cache directory.
pub(super) const CACHE_DIR: &[u8] = b"user.cachefs.cache";

/// Which of overlayfs' own names are shown.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Private {
    OpaqueOnly,
    Hidden,
}

impl Private {
    fn shows(self, name: &[u8]) -> bool {
        !name.starts_with(OVERLAY) || (self == Private::OpaqueOnly && name == OPAQUE_XATTR)
    }
}

impl Filesystem {
    /// The value of an extended attribute.
    pub fn xattr(&self, node: Node, name: &[u8]) -> Result<Vec<u8>> {
        if node == Node::ROOT && name == CACHE_DIR {
            return Ok(self.cache_dir.clone());
        }
        let mut value = Err(Failure::NoAttribute);
        self.slots.get(node.slot())?.each_xattr(node, |each, bytes| {
            if each == name {
                value = Ok(bytes.to_vec());
            }
        })?;
        value
    }

    /// All names, each followed by a NUL.
    pub fn xattr_names(&self, node: Node) -> Result<Vec<u8>> {
        let mut names = Vec::new();
        self.slots.get(node.slot())?.each_xattr(node, |name, _| {
            names.extend_from_slice(name);
            names.push(0);
        })?;
        Ok(names)
    }
}

impl SlotContent {
    /// Gives every extended attribute of a node that is shown.
    pub(super) fn each_xattr(&self, node: Node, each: impl FnMut(&[u8], &[u8])) -> Result<()> {
        match self {
            SlotContent::Catalogue => Ok(()),
            SlotContent::Layer(layer) => {
                let index = layer.index()?;
                let inode = stored_inode(index, inode_of(node))?;
                // Only a directory can be opaque: on anything else overlayfs would misread the name.
                let private = if inode.is_dir() { Private::OpaqueOnly } else { Private::Hidden };
                give(index, &inode, private, each)
            }
            SlotContent::Chain(chain) => {
                let members = chain.members(node)?;
                let (index, inode) = chain.topmost(&members)?;
                give(index, &inode, Private::Hidden, each)
            }
        }
    }
}

fn give(index: &LayerIndex, inode: &Inode, private: Private, mut each: impl FnMut(&[u8], &[u8])) -> Result<()> {
    for xattr in index.xattrs(inode) {
        let (name, value) = stored(xattr)?;
        if private.shows(&name) {
            each(&name, &value);
        }
    }
    Ok(())
}
