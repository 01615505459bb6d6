//! Node numbers: how this daemon names inodes. (The numbers that the kernel sees are in `numbers`.)
//!
//! A number has a slot in the high half, and a position plus one in the low half. A slot is given once in a mount's
//! life: to the catalogue tree, to a layer, or to a directory tree of a chain. Within a layer's slot the position is
//! the inode's number in the layer's index. So a number says by itself where its inode lies, and nothing is kept per
//! inode, whether a layer has ten files or a million: what the kernel knows and forgets is counted per slot.

use store::layer::{Inode, InodeIndex, S_IFDIR, S_IFLNK};

/// A slot's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot(pub u32);

/// The slot of the catalogue tree.
pub const CATALOGUE: Slot = Slot(0);

/// A node number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Node(u64);

impl Node {
    /// The mount's root, which is 1 in FUSE.
    pub const ROOT: Node = Node(1);

    /// The node at `position` of a slot.
    pub fn new(slot: Slot, position: u32) -> Node {
        Node(u64::from(slot.0) << 32 | (u64::from(position) + 1))
    }

    /// The node with this number, which is not the one that the kernel sees.
    pub fn from_number(number: u64) -> Node {
        Node(number)
    }

    /// The number; the kernel sees another one, see `numbers`.
    pub fn number(self) -> u64 {
        self.0
    }

    /// The slot.
    pub fn slot(self) -> Slot {
        Slot((self.0 >> 32) as u32)
    }

    /// The position within the slot. Number 0 of a slot is never given out and has the largest position of all.
    pub fn position(self) -> u32 {
        (self.0 as u32).wrapping_sub(1)
    }
}

/// How long the kernel may keep an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// It never changes.
    Forever,
    /// For one second: it changes when a tag moves.
    Second,
    /// Not at all: the kernel must ask each time.
    None,
}

/// What `stat` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// The node.
    pub node: Node,
    /// Type and permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of names (hard links).
    pub nlink: u32,
    /// Length, bytes.
    pub size: u64,
    /// Length in blocks of 512 bytes.
    pub blocks: u64,
    /// Modification time: seconds since 1970, and nanoseconds.
    pub mtime: (i64, u32),
    /// A device's major and minor number.
    pub rdev: (u32, u32),
}

/// The size that directories show.
const DIRECTORY_SIZE: u64 = 4096;

impl Attributes {
    /// An inode of a layer, shown as `node`.
    pub fn of(node: Node, inode: &Inode) -> Attributes {
        let size = if inode.is_dir() { DIRECTORY_SIZE } else { inode.size };
        Attributes {
            node,
            mode: inode.mode,
            uid: inode.uid,
            gid: inode.gid,
            nlink: inode.nlink,
            size,
            blocks: size.div_ceil(512),
            mtime: (inode.mtime, inode.mtime_nsec),
            rdev: (inode.rdev_major, inode.rdev_minor),
        }
    }

    /// How long the kernel may keep these. Those of the catalogue tree it may not keep: its directories show by their
    /// mtime that a listing has changed.
    pub fn lifetime(&self) -> Lifetime {
        match self.node.slot() {
            CATALOGUE => Lifetime::None,
            _ => Lifetime::Forever,
        }
    }

    /// A directory of the catalogue tree. Root alone enters it: below it are images as they are, for engines to mount
    /// overlays on.
    pub fn directory(node: Node, mtime: (i64, u32)) -> Attributes {
        let mode = S_IFDIR | 0o700;
        let (size, blocks) = (DIRECTORY_SIZE, DIRECTORY_SIZE / 512);
        Attributes { node, mode, uid: 0, gid: 0, nlink: 2, size, blocks, mtime, rdev: (0, 0) }
    }

    /// A symbolic link of the catalogue tree.
    pub fn symlink(node: Node, mtime: (i64, u32), target_len: usize) -> Attributes {
        let size = target_len as u64;
        Attributes { mode: S_IFLNK | 0o777, nlink: 1, size, blocks: 1, ..Attributes::directory(node, mtime) }
    }
}

/// The answer to a look-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The name is there, and the kernel may keep it for this long; [`Attributes::lifetime`] says how long it may keep
    /// the attributes.
    Entry(Attributes, Lifetime),
    /// The name is not there, and the kernel may keep that for this long.
    Absent(Lifetime),
}

/// One entry of a listing.
#[derive(Debug, Clone, Copy)]
pub struct Listed<'a> {
    /// Its name.
    pub name: &'a [u8],
    /// Its node.
    pub node: Node,
    /// Its type bits.
    pub file_type: u32,
    /// The offset at which the listing continues after it.
    pub offset: u64,
    /// What `stat` shows, and how long the entry may be kept; only if asked for.
    pub attributes: Option<(Attributes, Lifetime)>,
}

/// How much of each entry a listing gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// Name, number and type.
    Names,
    /// Attributes too.
    Attributes,
}

/// Whether the receiver of a listing takes more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyRoom {
    /// It takes more.
    Left,
    /// The last entry did not fit.
    Full,
}

/// Listings start with `.` and `..`, whose offsets are 1 and 2; then come positions.
pub const FIRST_OFFSET: u64 = 3;

/// The inode number in a node of a layer's slot.
pub fn inode_of(node: Node) -> InodeIndex {
    InodeIndex(node.position())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_tell_slot_and_position() {
        assert_eq!((Node::ROOT.slot(), Node::ROOT.position()), (CATALOGUE, 0));
        let node = Node::new(Slot(7), 1_000_000);
        assert_eq!((node.slot(), node.position()), (Slot(7), 1_000_000));
        assert_eq!(Node::from_number(node.number()), node);
        assert_eq!(Node::from_number(7 << 32).position(), u32::MAX);
    }
}
