//! Where the content of a layer's files lies in the layer's data file.
//!
//! A native tree (`native_tree`) has names and attributes; the content of its files is in one **data file** for each layer, which is
//! written nowhere: the daemon answers reads of it from the local cache and the store. Regular files lie in it in the order of their
//! inodes, each from the beginning of a block on, filled up with zeros to the end of its last block. So a file's place is the sum of
//! the blocks of those before it. The sums at every [`STRIDE`]th inode are kept: 128 KiB for a million inodes.

use erofs::BLOCK;
use store::layer::{Inode, InodeIndex, LayerIndex};

use crate::source::failure::{Failure, Result, stored};

/// How many inodes lie between two sums that are kept.
const STRIDE: u32 = 64;

/// The layout of one layer's data file.
#[derive(Debug)]
pub struct FlatLayout {
    /// The first block of inode 0, [`STRIDE`], 2 x [`STRIDE`] and so on.
    sums: Box<[u64]>,
    blocks: u64,
}

/// A regular file in a data file.
#[derive(Debug, Clone, Copy)]
pub struct FlatFile {
    /// Its inode's number.
    pub number: InodeIndex,
    /// Its inode.
    pub inode: Inode,
    /// The first of its blocks.
    pub first: u64,
}

impl FlatFile {
    /// The block after its last.
    pub fn end(&self) -> u64 {
        self.first + blocks_of(&self.inode)
    }
}

/// How many blocks an inode's content takes.
fn blocks_of(inode: &Inode) -> u64 {
    if inode.is_file() { inode.size.div_ceil(BLOCK) } else { 0 }
}

/// Adds the sizes of a layer's files up: gives each inode's number and the first block of its content in the data file. Returns the
/// number of all blocks. Reads all inodes.
fn sum_up(index: &LayerIndex, mut each: impl FnMut(u32, u64)) -> Result<u64> {
    let mut blocks = 0u64;
    for number in 0..index.inode_count() {
        each(number, blocks);
        let inode = stored(index.inode(InodeIndex(number)))?;
        blocks = blocks.checked_add(blocks_of(&inode)).ok_or(Failure::Damaged)?;
    }
    Ok(blocks)
}

impl FlatLayout {
    /// The layout of a layer's data file. Reads all inodes.
    pub fn of(index: &LayerIndex) -> Result<FlatLayout> {
        let mut sums = Vec::with_capacity(index.inode_count().div_ceil(STRIDE) as usize);
        let blocks = sum_up(index, |number, first| {
            if number % STRIDE == 0 {
                sums.push(first);
            }
        })?;
        Ok(FlatLayout { sums: sums.into(), blocks })
    }

    /// The same, and the first block of each inode's content, by the inode's number.
    pub fn with_firsts(index: &LayerIndex) -> Result<(FlatLayout, Vec<u64>)> {
        let mut firsts = Vec::with_capacity(index.inode_count() as usize);
        let blocks = sum_up(index, |_, first| firsts.push(first))?;
        let sums = firsts.iter().step_by(STRIDE as usize).copied().collect();
        Ok((FlatLayout { sums, blocks }, firsts))
    }

    /// The data file's length in blocks.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The file that has a block; nothing behind the last.
    pub fn file_at(&self, index: &LayerIndex, block: u64) -> Result<Option<FlatFile>> {
        if block >= self.blocks {
            return Ok(None);
        }
        // The last stride that begins at the block or before. Several may begin at one block, if all inodes of some have no content.
        let stride = self.sums.partition_point(|sum| *sum <= block).saturating_sub(1);
        let mut first = self.sums[stride];
        for number in stride as u32 * STRIDE..index.inode_count() {
            let inode = stored(index.inode(InodeIndex(number)))?;
            let file = FlatFile { number: InodeIndex(number), inode, first };
            if block < file.end() {
                return Ok(Some(file));
            }
            first = file.end();
        }
        Err(Failure::Damaged)
    }
}
