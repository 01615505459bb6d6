//! The text of PAX headers: records, numbers, times, and maps of sparse files.

/// What is said of a header that breaks the rules.
pub(super) const DAMAGED: &str = "a PAX header is damaged";

/// A record of a PAX header: key and value.
type PaxRecord<'a> = (&'a [u8], &'a [u8]);

/// The records of a PAX header: `LENGTH KEY=VALUE\n`; the value may hold any byte.
pub(crate) fn pax_records(mut rest: &[u8]) -> impl Iterator<Item = Result<PaxRecord<'_>, &'static str>> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let record = pax_record(&mut rest);
        if record.is_err() {
            rest = &[];
        }
        Some(record)
    })
}

/// Takes one record off the front.
fn pax_record<'a>(rest: &mut &'a [u8]) -> Result<PaxRecord<'a>, &'static str> {
    let space = rest.iter().take(20).position(|b| *b == b' ').ok_or(DAMAGED)?;
    let len = decimal(&rest[..space]).ok_or(DAMAGED)? as usize;
    if len <= space + 1 || len > rest.len() || rest[len - 1] != b'\n' {
        return Err(DAMAGED);
    }
    let record = &rest[space + 1..len - 1];
    let equals = record.iter().position(|b| *b == b'=').ok_or(DAMAGED)?;
    *rest = &rest[len..];
    Ok((&record[..equals], &record[equals + 1..]))
}

/// A decimal number, with the blanks and NULs that writers put around it.
pub(crate) fn decimal(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.trim_matches([' ', '\0']).parse().ok()
}

/// Seconds and nanoseconds of a PAX time: decimal, perhaps negative, perhaps with a fraction.
pub(super) fn pax_time(value: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanoseconds: u32 = digits.parse().ok()?;
    match text.starts_with('-') && nanoseconds > 0 {
        true => Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds)),
        false => Some((seconds, nanoseconds)),
    }
}

/// Offsets and lengths of a map's ranges; those of no length mean nothing.
pub(super) fn pairs(numbers: &[u64]) -> Vec<(u64, u64)> {
    numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).filter(|(_, len)| *len > 0).collect()
}

/// A map in the way of PAX 1.0, as its blocks come: how many ranges, then offset and length of each, a line for each number.
#[derive(Default)]
pub(super) struct MapText {
    pub(super) numbers: Vec<u64>,
    line: Vec<u8>,
    pub(super) len: u64,
}

impl MapText {
    /// Takes one more block; tells whether the map ends in it.
    pub(super) fn add(&mut self, block: &[u8]) -> Result<bool, &'static str> {
        self.len += block.len() as u64;
        for byte in block {
            if *byte != b'\n' {
                self.line.push(*byte);
                continue;
            }
            self.numbers.push(decimal(&self.line).ok_or("a sparse file's map is not a list of numbers")?);
            self.line.clear();
            if self.numbers.len() as u64 > self.numbers[0].saturating_mul(2) {
                return Ok(true);
            }
        }
        // No number has as many digits.
        if self.line.len() > 32 { Err("a sparse file's map is damaged") } else { Ok(false) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pax_times() {
        assert_eq!(pax_time(b"1.5"), Some((1, 500_000_000)));
        assert_eq!(pax_time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(pax_time(b"-0.5"), Some((-1, 500_000_000)));
        assert_eq!(pax_time(b"7.1234567891"), Some((7, 123_456_789)));
        assert_eq!(pax_time(b"x"), None);
        assert_eq!(pax_time(b"1.x"), None);
    }

    #[test]
    fn a_sparse_map_is_read_once_however_its_blocks_are_cut() {
        let text = b"3\n0\n5\n1000\n20\n4096\n0\n\0\0 padding\n";
        for cut in 1..=text.len() {
            let mut map = MapText::default();
            assert!(text.chunks(cut).any(|block| map.add(block).unwrap()), "blocks of {cut}");
            assert_eq!(pairs(&map.numbers[1..]), [(0, 5), (1000, 20)]);
        }
        assert!(MapText::default().add(b"x\n").is_err());
        assert!(MapText::default().add(&[b'1'; 512]).is_err());
        assert_eq!(MapText::default().add(b"0\n"), Ok(true));
    }
}
