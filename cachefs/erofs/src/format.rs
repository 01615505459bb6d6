//! Records of the format, as bytes.

use crate::tree::Inode;

/// The size of a block in bytes, as a power of two.
pub const BLOCK_BITS: u8 = 12;
/// The size of a block in bytes.
pub const BLOCK: u64 = 1 << BLOCK_BITS;

/// Where the superblock lies.
pub(crate) const SUPERBLOCK_AT: u64 = 1024;
/// The superblock's length.
pub(crate) const SUPERBLOCK_LEN: u64 = 128;
/// The length of a device's record.
pub(crate) const DEVICE_LEN: u64 = 128;
/// The unit in which inodes are placed and numbered.
pub(crate) const SLOT: u64 = 32;
/// The length of an inode without extended attributes.
pub(crate) const INODE_LEN: u64 = 64;
/// The length of a chunk in a list.
const CHUNK_LEN: usize = 8;
/// The length of a directory entry without its name.
pub(crate) const ENTRY_LEN: usize = 12;
/// The longest name.
pub(crate) const NAME_MAX: usize = 255;
/// The longest list of extended attributes: its length is counted in words by 16 bits.
const XATTRS_MAX: usize = (u16::MAX as usize - 1) * 4;

const MAGIC: u32 = 0xE0F5_E1E2;
/// The superblock's block has a checksum; times are those of modification.
const COMPATIBLE_FEATURES: u32 = 0x1 | 0x2;
/// Some files are in chunks.
const CHUNKED: u32 = 0x4;
/// There are other devices.
const OTHER_DEVICES: u32 = 0x8;
/// Chunks are found by a list of them.
const CHUNK_LIST: u32 = 0x20;
/// The place of a chunk that is a hole.
const NOWHERE: u32 = u32::MAX;

const S_IFMT: u32 = 0o170_000;

/// How an inode's content is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// In blocks.
    Plain = 0,
    /// In blocks, and what is left over after the inode.
    Inline = 2,
    /// In chunks, a list of which lies after the inode.
    Chunked = 4,
}

/// What an inode's record holds besides its attributes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Placed {
    pub(crate) layout: Layout,
    /// The length of the extended attributes, 0 without any.
    pub(crate) xattrs_len: usize,
    pub(crate) size: u64,
    /// The first block of the content, a device's number, or the form of chunks.
    pub(crate) content: u32,
    /// A number for programs that know 32 bits only.
    pub(crate) number: u32,
}

/// The bytes of an inode's record.
pub(crate) fn inode(inode: &Inode, placed: Placed) -> [u8; INODE_LEN as usize] {
    let xattrs = placed.xattrs_len.checked_sub(12).map_or(0, |entries| entries / 4 + 1);
    let mut record = Record::default();
    record.u16(1 | (placed.layout as u16) << 1).u16(xattrs as u16).u16(inode.mode as u16).u16(0);
    record.u64(placed.size).u32(placed.content).u32(placed.number);
    record.u32(inode.uid).u32(inode.gid).u64(inode.mtime as u64).u32(inode.mtime_nsec).u32(inode.nlink);
    record.padded()
}

/// The form of a list of chunks of this many bits more than a block's.
pub(crate) fn chunk_form(bits: u8) -> u32 {
    CHUNK_LIST | u32::from(bits)
}

/// The bytes of a list of chunks on a device, whose number is counted from 0.
pub(crate) fn chunk_list(device: u16, firsts: &[Option<u32>]) -> Vec<u8> {
    let chunk = |first: &Option<u32>| -> [u8; CHUNK_LEN] {
        // Device 0 is the image itself.
        Record::default().u16(0).u16(device + 1).u32(first.unwrap_or(NOWHERE)).padded()
    };
    firsts.iter().flat_map(chunk).collect()
}

/// The type of an inode in directory entries; nothing for an unknown one.
pub(crate) fn file_type(mode: u32) -> Option<u8> {
    match mode & S_IFMT {
        0o100_000 => Some(1),
        0o040_000 => Some(2),
        0o020_000 => Some(3),
        0o060_000 => Some(4),
        0o010_000 => Some(5),
        0o140_000 => Some(6),
        0o120_000 => Some(7),
        _ => None,
    }
}

/// A device's number in the form in which the kernel keeps it.
pub(crate) fn device_number((major, minor): (u32, u32)) -> u32 {
    (minor & 0xff) | major << 8 | (minor & !0xff) << 12
}

/// The bytes of a directory entry.
pub(crate) fn entry(nid: u64, name_at: usize, file_type: u8) -> [u8; ENTRY_LEN] {
    let mut record = Record::default();
    record.u64(nid).u16(name_at as u16).bytes(&[file_type, 0]);
    record.padded()
}

/// The number of a prefix of names of extended attributes, and the rest of the name; nothing if the format cannot express it.
fn prefix(name: &[u8]) -> Option<(u8, &[u8])> {
    match name {
        b"system.posix_acl_access" => return Some((2, b"")),
        b"system.posix_acl_default" => return Some((3, b"")),
        _ => {}
    }
    let prefixes: [(u8, &[u8]); 3] = [(1, b"user."), (4, b"trusted."), (6, b"security.")];
    prefixes.iter().find_map(|(number, prefix)| Some((*number, name.strip_prefix(*prefix)?)))
}

/// Adds an extended attribute to an inode's list; whether the format can express it.
pub(crate) fn add_xattr(list: &mut Vec<u8>, name: &[u8], value: &[u8]) -> bool {
    let Some((prefix, rest)) = prefix(name) else { return false };
    let (Ok(name_len), Ok(value_len)) = (u8::try_from(rest.len()), u16::try_from(value.len())) else { return false };
    if list.is_empty() {
        list.resize(12, 0);
    }
    list.extend_from_slice(&[name_len, prefix]);
    list.extend_from_slice(&value_len.to_le_bytes());
    list.extend_from_slice(rest);
    list.extend_from_slice(value);
    list.resize(list.len().next_multiple_of(4), 0);
    list.len() <= XATTRS_MAX
}

/// Facts of the whole image.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Superblock {
    pub(crate) uuid: [u8; 16],
    /// The block from which inodes are numbered.
    pub(crate) inodes_from: u32,
    pub(crate) root: u16,
    pub(crate) blocks: u32,
    pub(crate) devices: u16,
    /// Whether any file is in chunks.
    pub(crate) chunked: bool,
}

impl Superblock {
    /// What lies in the first block from the superblock to the block's end, given what follows the superblock.
    pub(crate) fn encode(&self, after: &[u8]) -> Vec<u8> {
        let mut block = self.record(0).to_vec();
        block.extend_from_slice(after);
        block.resize((BLOCK - SUPERBLOCK_AT) as usize, 0);
        // The kernel's CRC has no final inversion.
        let checksum = !(crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &block) as u32);
        block[..SUPERBLOCK_LEN as usize].copy_from_slice(&self.record(checksum));
        block
    }

    fn record(&self, checksum: u32) -> [u8; SUPERBLOCK_LEN as usize] {
        let mut record = Record::default();
        record.u32(MAGIC).u32(checksum).u32(COMPATIBLE_FEATURES).bytes(&[BLOCK_BITS, 0]).u16(self.root);
        // The number of inodes is left out: the kernel would only tell `statfs(2)`, and 32-bit programs without large-file support cannot
        // take what it makes of it.
        record.u64(0).u64(0).u32(0).u32(self.blocks).u32(self.inodes_from).u32(0).bytes(&self.uuid).bytes(&[0; 16]);
        let devices_at = (SUPERBLOCK_AT + SUPERBLOCK_LEN) / DEVICE_LEN;
        let features = if self.devices == 0 { 0 } else { OTHER_DEVICES } | if self.chunked { CHUNKED } else { 0 };
        record.u32(features).u16(0).u16(self.devices);
        record.u16(if self.devices == 0 { 0 } else { devices_at as u16 });
        record.padded()
    }
}

/// The bytes of a device's record.
pub(crate) fn device(blocks: u32, first: u32) -> [u8; DEVICE_LEN as usize] {
    let mut record = Record::default();
    record.bytes(&[0; 64]).u32(blocks).u32(first);
    record.padded()
}

/// The longest record.
const RECORD_MAX: usize = SUPERBLOCK_LEN as usize;

/// A record that is put together.
struct Record {
    bytes: [u8; RECORD_MAX],
    len: usize,
}

impl Default for Record {
    fn default() -> Record {
        Record { bytes: [0; RECORD_MAX], len: 0 }
    }
}

impl Record {
    fn bytes(&mut self, bytes: &[u8]) -> &mut Record {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
        self
    }

    fn u16(&mut self, value: u16) -> &mut Record {
        self.bytes(&value.to_le_bytes())
    }

    fn u32(&mut self, value: u32) -> &mut Record {
        self.bytes(&value.to_le_bytes())
    }

    fn u64(&mut self, value: u64) -> &mut Record {
        self.bytes(&value.to_le_bytes())
    }

    /// The record with zeros up to its whole length.
    fn padded<const N: usize>(&self) -> [u8; N] {
        let mut padded = [0; N];
        padded[..self.len].copy_from_slice(&self.bytes[..self.len]);
        padded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_the_kernels() {
        // Linux' own macros: major 8, minor 1 is 0x801; larger minors go beside the major.
        assert_eq!(device_number((8, 1)), 0x801);
        assert_eq!(device_number((1, 0x12345)), 0x1230_0145);
    }

    #[test]
    fn attributes_that_cannot_be_expressed_are_told() {
        let mut list = Vec::new();
        assert!(add_xattr(&mut list, b"user.a", b"value"));
        assert_eq!(list[12..], [1, 1, 5, 0, b'a', b'v', b'a', b'l', b'u', b'e', 0, 0]);
        assert!(!add_xattr(&mut Vec::new(), b"btrfs.compression", b"zstd"));
        assert!(!add_xattr(&mut Vec::new(), b"user.a", &[0; 65_536]));
        assert!(!add_xattr(&mut vec![0; XATTRS_MAX], b"user.a", b""));
    }
}
