//! PAX headers: records, what they say of the entry that follows, numbers and times.
//!
//! Follows Docker: an extended header replaces the one before it, a record with an empty value counts as absent, and a malformed record
//! refuses the archive, even if nobody needs it.

use std::collections::BTreeMap;

/// The error for a header that breaks the rules.
const DAMAGED: &str = "a PAX header is damaged";
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";
const SPARSE_MAP: &[u8] = b"GNU.sparse.map";

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
    let space = rest.iter().position(|b| *b == b' ').ok_or(DAMAGED)?;
    let len = integer(&rest[..space]).and_then(|len| usize::try_from(len).ok()).ok_or(DAMAGED)?;
    if len < 5 || len <= space + 1 || len > rest.len() || rest[len - 1] != b'\n' {
        return Err(DAMAGED);
    }
    let record = &rest[space + 1..len - 1];
    let equals = record.iter().position(|b| *b == b'=').ok_or(DAMAGED)?;
    *rest = &rest[len..];
    let (key, value) = (&record[..equals], &record[equals + 1..]);
    let text = if matches!(key, b"path" | b"linkpath" | b"uname" | b"gname") { value } else { key };
    if key.is_empty() || text.contains(&0) { Err(DAMAGED) } else { Ok((key, value)) }
}

/// A decimal number with an optional sign, and nothing else.
pub(crate) fn integer(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds and nanoseconds of a PAX time: a decimal number, possibly negative, possibly with a fraction.
fn pax_time(value: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanoseconds: u32 = digits.parse().ok()?;
    if text.starts_with('-') && nanoseconds > 0 {
        Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds))
    } else {
        Some((seconds, nanoseconds))
    }
}

/// The records of one extended header. Its numbers are parsed when an entry needs them: a header that another one replaces may hold
/// anything.
#[derive(Debug, Default)]
pub(super) struct Extended {
    records: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// The numbers that an extended header gives the entry after it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Numbers {
    pub(super) uid: Option<i64>,
    pub(super) gid: Option<i64>,
    pub(super) size: Option<i64>,
    pub(super) mtime: Option<(i64, u32)>,
}

impl Extended {
    /// Parses the records by key. A sparse map in the form of PAX 0.0, a record for each number, becomes one in the form of PAX 0.1.
    pub(super) fn parse(bytes: &[u8]) -> Result<Extended, &'static str> {
        let mut records = BTreeMap::new();
        let mut map: Vec<u8> = Vec::new();
        let mut numbers = 0;
        for record in pax_records(bytes) {
            let (key, value) = record?;
            let expected: &[u8] = if numbers % 2 == 0 { b"GNU.sparse.offset" } else { b"GNU.sparse.numbytes" };
            if !matches!(key, b"GNU.sparse.offset" | b"GNU.sparse.numbytes") {
                records.insert(key.to_vec(), value.to_vec());
            } else if key == expected && !value.contains(&b',') {
                if numbers > 0 {
                    map.push(b',');
                }
                map.extend_from_slice(value);
                numbers += 1;
            } else {
                return Err("a sparse file's offsets and lengths do not alternate");
            }
        }
        if numbers > 0 {
            records.insert(SPARSE_MAP.to_vec(), map);
        }
        Ok(Extended { records })
    }

    /// Owner, size and modification time. Access and change time must be valid, too, although nobody keeps them.
    pub(super) fn numbers(&self) -> Result<Numbers, String> {
        let number = |key: &str| match self.text(key) {
            None => Ok(None),
            Some(value) => integer(value).map(Some).ok_or_else(|| format!("PAX {key} is not a number")),
        };
        let time = |key: &str| match self.text(key) {
            None => Ok(None),
            Some(value) => pax_time(value).map(Some).ok_or_else(|| format!("PAX {key} is not a time")),
        };
        time("atime")?;
        time("ctime")?;
        Ok(Numbers { uid: number("uid")?, gid: number("gid")?, size: number("size")?, mtime: time("mtime")? })
    }

    /// A record's value. An empty value counts as no record.
    pub(super) fn text(&self, key: &str) -> Option<&[u8]> {
        self.records.get(key.as_bytes()).map(Vec::as_slice).filter(|value| !value.is_empty())
    }

    /// The extended attributes.
    pub(super) fn xattrs(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let said = self.records.iter().filter(|(_, value)| !value.is_empty());
        said.filter_map(|(key, value)| Some((key.strip_prefix(XATTR_PREFIX)?.to_vec(), value.clone()))).collect()
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
    fn values_may_hold_any_byte_and_records_are_whole() {
        let extended = Extended::parse(b"26 SCHILY.xattr.user.a=\n\0\n6 a=b\n").unwrap();
        assert_eq!(extended.xattrs()[&b"user.a"[..]], b"\n\0");
        let bad = [
            &b"5 a=b\n"[..],
            b"7 a=b\n",
            b"a=b\n",
            b"6 a=bc",
            b"4 ab\n",
            b"99999999999999999999 a=b\n",
            b"11 path=a\0\n",
            b"22 SCHILY.xattr.a\0b=v\n",
            b"5 =b\n",
        ];
        for bad in bad {
            assert!(Extended::parse(bad).is_err(), "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn numbers_are_whole_when_they_are_needed() {
        for bad in [&b"8 uid=x\n"[..], b"11 size= 1\n", b"11 atime=x\n", b"13 mtime=1e9\n"] {
            assert!(Extended::parse(bad).unwrap().numbers().is_err(), "{}", bad.escape_ascii());
        }
        let said = Extended::parse(b"9 uid=-1\n9 gid=+7\n13 mtime=1.5\n").unwrap().numbers().unwrap();
        assert_eq!(said, Numbers { uid: Some(-1), gid: Some(7), size: None, mtime: Some((1, 500_000_000)) });
    }

    #[test]
    fn a_record_of_no_value_says_nothing() {
        let extended = Extended::parse(b"7 uid=\n8 path=\n19 SCHILY.xattr.a=\n").unwrap();
        assert_eq!(extended.numbers().unwrap(), Numbers::default());
        assert_eq!((extended.text("path"), extended.xattrs().len()), (None, 0));
    }

    #[test]
    fn a_map_of_single_numbers_becomes_a_list() {
        let (offset, length) = ("GNU.sparse.offset", "GNU.sparse.numbytes");
        let map = |records: &[(&str, &str)]| {
            let record = |(key, value): &(&str, &str)| format!("{} {key}={value}\n", key.len() + value.len() + 5);
            let text: String = records.iter().map(record).collect();
            Extended::parse(text.as_bytes()).map(|extended| extended.text("GNU.sparse.map").map(<[u8]>::to_vec))
        };
        assert_eq!(map(&[(offset, "0"), (length, "5")]).unwrap().unwrap(), b"0,5");
        assert_eq!(map(&[(offset, "0"), (length, "5"), (offset, "512"), (length, "")]).unwrap().unwrap(), b"0,5,512,");
        assert!(map(&[(length, "5")]).is_err() && map(&[(offset, "0"), (offset, "1")]).is_err());
        assert!(map(&[(offset, "0,1")]).is_err());
    }
}
