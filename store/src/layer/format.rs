//! The constants of the index format, as FORMAT.md gives them.

/// First bytes of a raw index.
pub const MAGIC: &[u8; 8] = b"CFSLAYER";
/// Version of the index format.
pub const VERSION: u32 = 1;
/// Length of the raw index's header.
pub const HEADER_LEN: usize = 256;
/// The longest raw index that a coordinator makes, bytes: every host that mounts the layer unpacks it.
pub const INDEX_MAX: u64 = 256 << 20;
/// A raw index is also no longer than this plus [`INDEX_FACTOR`] times the tar stream, bytes: it stays in proportion to
/// the layer.
pub const INDEX_BASE: u64 = 1 << 20;
/// How many times the length of the tar stream a raw index may have, on top of [`INDEX_BASE`].
pub const INDEX_FACTOR: u64 = 2;
/// The most inodes of a layer that a coordinator makes.
pub const INODES_MAX: u64 = 1_250_000;
/// The most bytes of names, link targets and extended attributes of one layer, each distinct one counted once.
pub const NAMES_MAX: u64 = 64 << 20;
pub(crate) const INODE_LEN: usize = 96;
pub(crate) const ENTRY_LEN: usize = 12;
pub(crate) const XATTR_LEN: usize = 16;
pub(crate) const EXTENT_LEN: usize = 16;
pub(crate) const CHUNK_LEN: usize = 56;
pub(crate) const PACK_LEN: usize = 32;
/// The chunk number of an extent that reads as zeros and is stored nowhere.
pub(crate) const HOLE: u32 = u32::MAX;
