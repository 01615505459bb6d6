//! Files of several blocks: their content is in chunks, each of which lies on a device or is a hole. A file without holes is one chunk.
//!
//! A file could also say its place in the address space of all devices. But the kernel (6.18) reads such a file page by page: it takes
//! each page for one that does not follow the page before, because it compares an address of that space with one on the device.

use std::ops::Range;

/// A file's chunks.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Chunks {
    /// The size of a chunk in blocks, as a power of two.
    pub(crate) bits: u8,
    /// The device's number, counted from 0.
    pub(crate) device: u16,
    /// The first block of each chunk on the device; nothing for a hole.
    pub(crate) firsts: Vec<Option<u32>>,
}

impl Chunks {
    /// The chunks of a file of `blocks` blocks that begin at block `first` of a device. They are as large as the borders of its holes let
    /// them be.
    pub(crate) fn of(holes: &[Range<u64>], (device, first): (u16, u32), blocks: u64) -> Chunks {
        let inner = holes.iter().flat_map(|hole| [hole.start, hole.end]).filter(|border| (1..blocks).contains(border));
        let whole = u64::BITS - blocks.saturating_sub(1).leading_zeros();
        let bits = inner.map(u64::trailing_zeros).fold(whole, u32::min);
        let mut left = holes;
        let chunk = |number: u64| {
            let block = number << bits;
            while let Some((_, rest)) = left.split_first().filter(|(hole, _)| hole.end <= block) {
                left = rest;
            }
            let is_hole = left.first().is_some_and(|hole| hole.start <= block);
            (!is_hole).then(|| first + block as u32)
        };
        Chunks { bits: bits as u8, device, firsts: (0..blocks.div_ceil(1 << bits)).map(chunk).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_as_large_as_holes_let_them_be() {
        let of = |holes: &[(u64, u64)], blocks: u64| {
            let holes: Vec<_> = holes.iter().map(|(start, end)| *start..*end).collect();
            let Chunks { bits, firsts, .. } = Chunks::of(&holes, (0, 100), blocks);
            (bits, firsts.into_iter().map(|first| first.map_or(0, |first| first - 99)).collect::<Vec<u32>>())
        };
        assert_eq!(of(&[], 5), (3, vec![1]), "no holes");
        assert_eq!(of(&[(0, 5)], 5), (3, vec![0]), "all of it");
        assert_eq!(of(&[(0, 1)], 1), (0, vec![0]));
        assert_eq!(of(&[(4, 8)], 12), (2, vec![1, 0, 9]));
        assert_eq!(of(&[(4, 7)], 7), (2, vec![1, 0]), "to the end");
        assert_eq!(of(&[(0, 2), (2, 4), (6, 7)], 9), (0, vec![0, 0, 0, 0, 5, 6, 0, 8, 9]));
        assert_eq!(of(&[(64, 128)], 1000).1.len(), 1000usize.div_ceil(64));
    }
}
