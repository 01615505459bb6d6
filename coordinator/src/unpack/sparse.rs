//! Sparse files in the three forms of PAX: 0.0 (a record for each number), 0.1 (one record with all numbers), 1.0 (text before the data).
//!
//! Follows Docker: the version records select the form; without them, a map in the records does. Ranges lie within the file, in order and
//! without overlap, and the data is as long as all of them. Docker refuses GNU tar's older form, an entry type of its own.

use super::header::BLOCK;
use super::pax::{Extended, integer};

/// The error for a map that holds anything but numbers.
const NO_NUMBERS: &str = "a sparse file's map is not a list of numbers";

/// Where a sparse file's map is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// In the extended header.
    Records,
    /// Before the data.
    Content,
}

/// Where to find the map of the file that an extended header describes. `None` if the file is not sparse, or is in an unknown form.
pub(super) fn place(extended: &Extended) -> Option<Place> {
    let version = |part: &str| extended.text(part).unwrap_or_default();
    match (version("GNU.sparse.major"), version("GNU.sparse.minor")) {
        (b"0", b"0" | b"1") => Some(Place::Records),
        (b"1", b"0") => Some(Place::Content),
        (b"", b"") => extended.text("GNU.sparse.map").map(|_| Place::Records),
        _ => None,
    }
}

/// The file's length; `None` if the header gives the stored length only.
pub(super) fn real_size(extended: &Extended) -> Result<Option<i64>, &'static str> {
    let told = extended.text("GNU.sparse.size").or_else(|| extended.text("GNU.sparse.realsize"));
    told.map(|size| integer(size).ok_or("a sparse file's size is not a number")).transpose()
}

/// The numbers of a map in the records.
pub(super) fn numbers(extended: &Extended) -> Result<Vec<i64>, &'static str> {
    let count = extended.text("GNU.sparse.numblocks").and_then(integer).ok_or(NO_NUMBERS)?;
    let map = extended.text("GNU.sparse.map").unwrap_or_default();
    let numbers: Option<Vec<i64>> =
        if map.is_empty() { Some(Vec::new()) } else { map.split(|byte| *byte == b',').map(integer).collect() };
    let numbers = numbers.ok_or(NO_NUMBERS)?;
    let whole = usize::try_from(count).ok().and_then(|count| count.checked_mul(2)) == Some(numbers.len());
    if whole { Ok(numbers) } else { Err("a sparse file's map has another length than it says") }
}

/// Offsets and lengths of a file's ranges, checked: together they hold `stored` bytes of data. Empty ranges are dropped.
pub(super) fn ranges(numbers: &[i64], size: u64, stored: u64) -> Result<Vec<(u64, u64)>, &'static str> {
    let (mut end, mut sum) = (0, 0);
    let mut ranges = Vec::new();
    for pair in numbers.chunks_exact(2) {
        let negative = "is sparse with impossible ranges";
        let offset = u64::try_from(pair[0]).map_err(|_| negative)?;
        let len = u64::try_from(pair[1]).map_err(|_| negative)?;
        if offset < end {
            return Err("is sparse with overlapping ranges");
        }
        // Both have at most 63 bits, so this cannot overflow.
        end = offset + len;
        sum += u128::from(len);
        if end > size {
            return Err("is sparse with ranges outside the file");
        }
        if len > 0 {
            ranges.push((offset, len));
        }
    }
    if sum == u128::from(stored) { Ok(ranges) } else { Err("is sparse with another length of data than its map says") }
}

/// Reads a map in the form of PAX 1.0, block by block: the number of ranges, then offset and length of each, one number a line.
#[derive(Default)]
pub(super) struct MapText {
    numbers: Vec<i64>,
    line: Vec<u8>,
    /// Bytes so far.
    pub(super) len: u64,
}

impl MapText {
    /// Adds a block; returns the numbers if the map ends in it.
    pub(super) fn add(&mut self, block: &[u8; BLOCK]) -> Result<Option<Vec<i64>>, &'static str> {
        self.len += block.len() as u64;
        for byte in block {
            if *byte != b'\n' {
                self.line.push(*byte);
                continue;
            }
            self.numbers.push(integer(&self.line).ok_or(NO_NUMBERS)?);
            self.line.clear();
            let count = usize::try_from(self.numbers[0]).map_err(|_| NO_NUMBERS)?;
            if self.numbers.len() > count.saturating_mul(2) {
                return Ok(Some(self.numbers.split_off(1)));
            }
        }
        // No number has that many digits.
        if self.line.len() > BLOCK { Err("a sparse file's map is damaged") } else { Ok(None) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(text: &[u8]) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        block[..text.len()].copy_from_slice(text);
        block
    }

    #[test]
    fn a_map_before_the_data_is_read_block_by_block() {
        let mut map = MapText::default();
        assert_eq!(map.add(&block(b"2\n0\n5\n1000\n20\nrest")).unwrap().unwrap(), [0, 5, 1000, 20]);
        let mut long = MapText::default();
        let text = format!("150\n{}", "10000\n".repeat(300));
        let text: Vec<[u8; BLOCK]> = text.as_bytes().chunks(BLOCK).map(block).collect();
        let (last, before) = text.split_last().unwrap();
        assert!(before.iter().all(|block| long.add(block).unwrap().is_none()));
        assert_eq!(long.add(last).unwrap().unwrap(), [10000; 300]);
        assert_eq!(MapText::default().add(&block(b"0\n")).unwrap().unwrap(), [0; 0]);
        for bad in [&b"x\n"[..], b"-1\n", b"1\n 1\n1\n", b"\n"] {
            assert!(MapText::default().add(&block(bad)).is_err(), "{}", bad.escape_ascii());
        }
        let mut endless = MapText::default();
        assert!(endless.add(&[b'1'; BLOCK]).is_ok() && endless.add(&[b'1'; BLOCK]).is_err());
    }

    #[test]
    fn ranges_lie_in_the_file_and_have_all_the_data() {
        assert_eq!(ranges(&[0, 5, 5, 0, 10, 3], 20, 8).unwrap(), [(0, 5), (10, 3)]);
        assert_eq!(ranges(&[], 20, 0).unwrap(), []);
        let max = i64::MAX;
        let bad: [(&[i64], u64, u64); 7] = [
            (&[0, 5, 4, 1], 20, 6),
            (&[0, 5, 3, 0], 20, 5),
            (&[0, 5], 4, 5),
            (&[0, 5], 20, 6),
            (&[0, 5], 20, 4),
            (&[-1, 5], 20, 5),
            (&[max, max], u64::MAX, 1),
        ];
        for (numbers, size, stored) in bad {
            assert!(ranges(numbers, size, stored).is_err(), "{numbers:?}");
        }
    }
}
