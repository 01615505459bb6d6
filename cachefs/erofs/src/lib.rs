//! Writes the metadata of EROFS file systems whose file content lies on other devices.
//!
//! The kernel reads everything but file content from the image that [`write`](fn@write) makes: names, attributes, extended attributes,
//! link targets. A regular file is a run of blocks in one address space in which the **devices** follow the image:
//!
//! ```text
//!  block 0 ......... blocks │ first device ........ │ second device ............
//!  metadata (this image)    │ content of its files  │ content of its files
//! ```
//!
//! A device has no metadata of its own. It is whatever the mount names: a file on a disk, or one that a FUSE daemon serves.
//!
//! The image, in its order (little-endian; the format is the kernel's, `Documentation/filesystems/erofs.rst` and `fs/erofs/erofs_fs.h`):
//!
//! | bytes | what |
//! | --- | --- |
//! | 1024 to 1152 | superblock |
//! | from 1152 | a record of 128 bytes for each device |
//! | from the next block | inodes, each with its extended attributes and, if it is short, its content: a directory's entries, a link's target |
//! | between them | blocks of longer directories and links, before their inodes |
//!
//! Inodes lie in the order of a walk, a directory's children beside each other, so that listing a directory with all attributes
//! reads neighbouring blocks. The same tree gives the same bytes.
//!
//! Module order (imports point up this list only):
//!
//! - `tree`: what is written.
//! - `format`: records of the format.
//! - `listing`: a directory's entries.
//! - `area`: the image as it grows.
//! - `chunks`: files of several blocks.
//! - `write`: the walk that places and writes everything.

mod area;
mod chunks;
mod format;
mod listing;
mod tree;
mod write;

pub use format::{BLOCK, BLOCK_BITS};
pub use tree::{Inode, Node, Tree, Xattr};
pub use write::{Device, Summary, WriteError, write};
