//! Parts of a piece: a start reads some pages of a large library, not its whole pieces of 256 KiB.
//!
//! A piece has up to eight blocks. A **packed** piece lacks some of them. It consists of the BLAKE3 chaining value of each block that it
//! lacks, in order, and then of the bytes of the blocks that it has, back to back. So it can be compared with the digest of the whole
//! piece, which is the root of the BLAKE3 tree over its blocks: nobody need be trusted for a part of a piece either.

use blake3::Hasher;
use blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};

use crate::chunk::PIECE_SIZE;
use crate::digest::ContentDigest;

/// Length of every block but a file's last, bytes.
pub const BLOCK: u32 = 32 << 10;
/// The most blocks of a piece.
pub const BLOCKS: u32 = PIECE_SIZE / BLOCK;
/// Length of a chaining value, bytes.
pub const VALUE_LEN: usize = blake3::OUT_LEN;

const _: () = assert!(BLOCKS == u8::BITS);

/// Blocks of one piece, one bit each, the first block in the lowest bit. All eight bits mean the whole piece, however short or long it is. A
/// piece that is longer than `PIECE_SIZE`, which another version may have made, is never divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Blocks(u8);

impl Blocks {
    /// The whole piece.
    pub const ALL: Blocks = Blocks(u8::MAX);
    /// Nothing of it.
    pub const NONE: Blocks = Blocks(0);

    /// The blocks with these bits.
    pub fn from_bits(bits: u8) -> Blocks {
        Blocks(bits)
    }

    /// Its bits.
    pub fn bits(self) -> u8 {
        self.0
    }

    /// The blocks that hold the bytes from `start` to `end` of a piece of `len` bytes.
    pub fn of_range(start: u32, end: u32, len: u32) -> Blocks {
        if len > PIECE_SIZE {
            return Blocks::ALL;
        }
        let (first, last) = (start / BLOCK, end.min(len).div_ceil(BLOCK).min(BLOCKS));
        let bits = (first..last).fold(0, |bits, block| bits | 1u8 << block);
        Blocks(bits).whole_if_all(len)
    }

    /// The blocks of a piece of `len` bytes for whose ranges of bytes `holds` is true.
    pub fn such_that(len: u32, holds: impl Fn(u32, u32) -> bool) -> Blocks {
        let blocks = (0..BLOCKS).filter(|block| block * BLOCK < len && len <= PIECE_SIZE);
        let held = blocks.filter(|block| holds(block * BLOCK, ((block + 1) * BLOCK).min(len)));
        Blocks(held.fold(0, |bits, block| bits | 1 << block)).whole_if_all(len)
    }

    /// The same, as [`Blocks::ALL`] if a piece of `len` bytes has no others.
    pub fn whole_if_all(self, len: u32) -> Blocks {
        if len <= PIECE_SIZE && self.0 & every(len) == every(len) { Blocks::ALL } else { self }
    }

    /// Whether these are no blocks.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether this block is among them.
    pub fn has(self, block: u32) -> bool {
        block < BLOCKS && self.0 >> block & 1 == 1
    }

    /// Whether a piece of `len` bytes has this block, and it is not among them.
    pub fn lacks(self, block: u32, len: u32) -> bool {
        block < BLOCKS && block * BLOCK < len && !self.has(block)
    }

    /// Whether all of `others` are among them.
    pub fn contains(self, others: Blocks) -> bool {
        self.0 & others.0 == others.0
    }

    /// These and `others`.
    pub fn and(self, others: Blocks) -> Blocks {
        Blocks(self.0 | others.0)
    }

    /// Those that are among only one of both.
    pub fn differing(self, others: Blocks) -> Blocks {
        Blocks(self.0 ^ others.0)
    }

    /// Those that are not among `others`.
    pub fn without(self, others: Blocks) -> Blocks {
        Blocks(self.0 & !others.0)
    }

    /// Those that are among both.
    pub fn shared(self, others: Blocks) -> Blocks {
        Blocks(self.0 & others.0)
    }

    /// Bytes of file content that they hold of a piece of `len` bytes.
    pub fn content_len(self, len: u32) -> u32 {
        self.runs(len).map(|(start, end)| end - start).sum()
    }

    /// The ranges of bytes that they cover of a piece of `len` bytes, each as long as possible, in order.
    pub fn runs(self, len: u32) -> impl Iterator<Item = (u32, u32)> {
        let mut block = 0;
        let mut whole = (self == Blocks::ALL && len > 0).then_some((0, len));
        std::iter::from_fn(move || {
            if self == Blocks::ALL {
                return whole.take();
            }
            while block * BLOCK < len && !self.has(block) {
                block += 1;
            }
            let start = block * BLOCK;
            while block * BLOCK < len && self.has(block) {
                block += 1;
            }
            (start < len).then(|| (start, (block * BLOCK).min(len)))
        })
    }

    fn lacking(self, len: u32) -> u32 {
        (0..BLOCKS).filter(|block| self.lacks(*block, len)).count() as u32
    }

    /// Length of the packed piece, bytes, if the whole piece has `len`.
    pub fn packed_len(self, len: u32) -> u32 {
        self.lacking(len) * VALUE_LEN as u32 + self.content_len(len)
    }

    /// Packs a piece.
    pub fn pack(self, piece: &[u8]) -> Vec<u8> {
        let len = piece.len() as u32;
        let mut packed = Vec::with_capacity(self.packed_len(len) as usize);
        for (block, bytes) in (0..).zip(piece.chunks(BLOCK as usize)) {
            if self.lacks(block, len) {
                packed.extend_from_slice(&value_of(block, bytes));
            }
        }
        for (start, end) in self.runs(len) {
            packed.extend_from_slice(&piece[start as usize..end as usize]);
        }
        packed
    }

    /// The chaining values at the beginning of a packed piece of `len` bytes, each with the block that it stands for.
    pub fn values(self, packed: &[u8], len: u32) -> impl Iterator<Item = (u32, &[u8])> {
        let lacking = (0..BLOCKS).filter(move |block| self.lacks(*block, len));
        lacking.zip(packed.chunks_exact(VALUE_LEN))
    }

    /// Where a range of bytes of a piece of `len` bytes begins in the packed piece; nothing if it lacks a part of them.
    pub fn position(self, start: u32, end: u32, len: u32) -> Option<usize> {
        if end > len || !self.contains(Blocks(Blocks::of_range(start, end, len).0 & every(len))) {
            return None;
        }
        let before = self.runs(len).map(|(from, to)| to.min(start).saturating_sub(from)).sum::<u32>();
        Some((self.lacking(len) * VALUE_LEN as u32 + before) as usize)
    }

    /// Whether a packed piece belongs to the piece of `len` bytes with this digest.
    pub fn verify(self, packed: &[u8], len: u32, digest: &ContentDigest) -> bool {
        if packed.len() != self.packed_len(len) as usize {
            return false;
        }
        let (values, content) = packed.split_at((self.lacking(len) as usize) * VALUE_LEN);
        let mut values = values.chunks_exact(VALUE_LEN);
        let mut rest = content;
        self.matches(
            len,
            digest,
            |_, block_len| {
                let (bytes, others) = rest.split_at_checked(block_len)?;
                rest = others;
                Some(bytes)
            },
            |_| values.next(),
        )
    }

    /// Compares the blocks, as `bytes` gives them by number and length, and the chaining values of the others with the digest of the
    /// piece. Both are asked for in order.
    pub fn matches<'a>(
        self,
        len: u32,
        digest: &ContentDigest,
        mut bytes: impl FnMut(u32, usize) -> Option<&'a [u8]>,
        mut value: impl FnMut(u32) -> Option<&'a [u8]>,
    ) -> bool {
        let count = len.div_ceil(BLOCK);
        if count <= 1 || len > PIECE_SIZE {
            let whole = if self.whole_if_all(len) == Blocks::ALL { bytes(0, len as usize) } else { None };
            return whole.is_some_and(|whole| ContentDigest::of(whole) == *digest);
        }
        let mut leaves = Vec::with_capacity(count as usize);
        for block in 0..count {
            let block_len = (len - block * BLOCK).min(BLOCK) as usize;
            let leaf = if self.has(block) {
                bytes(block, block_len).map(|bytes| value_of(block, bytes))
            } else {
                value(block).and_then(|value| value.try_into().ok())
            };
            let Some(leaf) = leaf else { return false };
            leaves.push(leaf);
        }
        let (left, right) = halves(&leaves);
        let root = merge_subtrees_root(&merged(left), &merged(right), Mode::Hash);
        root == blake3::Hash::from_bytes(*digest.as_bytes())
    }
}

/// The bits of all blocks of a piece.
fn every(len: u32) -> u8 {
    (0..len.div_ceil(BLOCK).min(BLOCKS)).fold(0, |bits, block| bits | 1 << block)
}

fn value_of(block: u32, bytes: &[u8]) -> ChainingValue {
    Hasher::new().set_input_offset((block * BLOCK).into()).update(bytes).finalize_non_root()
}

/// The left half of a BLAKE3 tree is the largest power of two of leaves that leaves something for the right one.
fn halves(leaves: &[ChainingValue]) -> (&[ChainingValue], &[ChainingValue]) {
    leaves.split_at(leaves.len().next_power_of_two() / 2)
}

fn merged(leaves: &[ChainingValue]) -> ChainingValue {
    match leaves {
        [] => [0; VALUE_LEN],
        [leaf] => *leaf,
        several => {
            let (left, right) = halves(several);
            merge_subtrees_non_root(&merged(left), &merged(right), Mode::Hash)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn noise(len: u32) -> Vec<u8> {
        (0..len).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
    }

    #[test]
    fn ranges_and_whole_pieces() {
        assert_eq!(Blocks::of_range(0, 1, PIECE_SIZE), Blocks(1));
        assert_eq!(Blocks::of_range(BLOCK - 1, BLOCK + 1, PIECE_SIZE), Blocks(3));
        assert_eq!(Blocks::of_range(0, PIECE_SIZE, PIECE_SIZE), Blocks::ALL);
        assert_eq!(Blocks::of_range(0, 70_000, 70_000), Blocks::ALL);
        assert_eq!(Blocks::of_range(0, 60_000, 70_000), Blocks(3));
        assert_eq!(Blocks(0b101).runs(70_000).collect::<Vec<_>>(), [(0, BLOCK), (2 * BLOCK, 70_000)]);
        assert_eq!(Blocks::ALL.packed_len(100), 100);
        assert!(!Blocks::NONE.verify(&[], 0, &ContentDigest::of(b"x")));
        // A piece that is too long for blocks is whole or nothing.
        let long = noise(PIECE_SIZE + 1);
        assert_eq!(Blocks::of_range(0, 1, PIECE_SIZE + 1), Blocks::ALL);
        assert!(Blocks::ALL.verify(&Blocks::ALL.pack(&long), PIECE_SIZE + 1, &ContentDigest::of(&long)));
        assert_eq!(Blocks::ALL.position(PIECE_SIZE, PIECE_SIZE + 1, PIECE_SIZE + 1), Some(PIECE_SIZE as usize));
        let part = Blocks(1);
        assert!(!part.verify(&part.pack(&long), PIECE_SIZE + 1, &ContentDigest::of(&long)));
    }

    proptest! {
        #[test]
        fn any_part_of_a_piece_is_verified_against_the_whole(
            len in 1..=PIECE_SIZE, bits: u8, at in any::<prop::sample::Index>(), start in 0..PIECE_SIZE, many in 1..PIECE_SIZE
        ) {
            let piece = noise(len);
            let blocks = Blocks::from_bits(bits | u8::from(len <= BLOCK));
            let digest = ContentDigest::of(&piece);
            let packed = blocks.pack(&piece);
            prop_assert_eq!(packed.len(), blocks.packed_len(len) as usize);
            prop_assert!(blocks.verify(&packed, len, &digest));
            let mut wrong = packed.clone();
            let at = at.index(packed.len());
            wrong[at] ^= 1;
            prop_assert!(!blocks.verify(&wrong, len, &digest));
            prop_assert!(!blocks.verify(&packed[1..], len, &digest));
            let (start, end) = (start.min(len - 1), start.saturating_add(many).min(len));
            match blocks.position(start, end, len) {
                Some(at) => prop_assert_eq!(&packed[at..at + (end - start) as usize], &piece[start as usize..end as usize]),
                None => prop_assert!((start / BLOCK..end.div_ceil(BLOCK)).any(|block| !blocks.has(block))),
            }
            let covered: u32 = blocks.runs(len).map(|(from, to)| to - from).sum();
            prop_assert_eq!(covered, blocks.content_len(len));
        }
    }
}
