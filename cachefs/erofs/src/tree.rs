//! The tree that is written, as the caller has it.

use std::ops::Range;

/// The caller's name for an inode. Equal nodes are one inode with several names.
pub type Node = u64;

/// The attributes of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inode {
    /// Type and permission bits, as in `st_mode`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Link count.
    pub nlink: u32,
    /// A regular file's length in bytes; ignored for other types.
    pub size: u64,
    /// Modification time, seconds since 1970.
    pub mtime: i64,
    /// Nanoseconds of the modification time.
    pub mtime_nsec: u32,
    /// A device's major and minor number.
    pub rdev: (u32, u32),
    /// A regular file's content: the number of the device, counted from 0, and the first block there. Ignored for empty files and other types.
    pub content: (u16, u64),
}

/// An extended attribute: its whole name, and its value.
pub type Xattr<'a> = (&'a [u8], &'a [u8]);

/// A tree of files. It must answer the same whenever it is asked the same.
pub trait Tree {
    /// Why it cannot be read.
    type Error;

    /// The root directory.
    fn root(&self) -> Node;

    /// The attributes of an inode.
    fn inode(&self, node: Node) -> Result<Inode, Self::Error>;

    /// Gives the names in a directory, without `.` and `..`, each once and in byte order, and what they name.
    fn entries(&self, directory: Node, give: &mut dyn FnMut(&[u8], Node)) -> Result<(), Self::Error>;

    /// Gives the extended attributes of an inode, in an order that is always the same.
    fn xattrs(&self, node: Node, give: &mut dyn FnMut(Xattr<'_>)) -> Result<(), Self::Error>;

    /// Gives the holes of a file that is not empty: blocks of its content that hold zeros only, in order. Their content is not read.
    fn holes(&self, file: Node, inode: &Inode, give: &mut dyn FnMut(Range<u64>)) -> Result<(), Self::Error>;

    /// The target of a symbolic link.
    fn target(&self, link: Node) -> Result<Vec<u8>, Self::Error>;
}
