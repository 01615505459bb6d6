//! The 512 bytes of a header: which dialect they are, and what their fields say.
//!
//! Docker reads tars with Go's `archive/tar`, and this reader follows it: two readers that take different names from one header show
//! different files. So fields of blanks or NULs are 0, octal numbers may lack their terminator, numbers in base 256 may be negative, a
//! checksum may be the sum of signed bytes, and a field that is not a number refuses the archive, even if nobody needs that field.

/// Length of a header. Everything else in a tar comes in blocks of this length, too.
pub(super) const BLOCK: usize = 512;
/// The error for a header with a field that is not a number.
const NO_NUMBER: &str = "a header has a field that is not a number";

/// A decoded header. Numbers are as large, or as negative, as they are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    /// The entry's type, one byte.
    pub(super) kind: u8,
    pub(super) name: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) size: i64,
    pub(super) mode: i64,
    pub(super) uid: i64,
    pub(super) gid: i64,
    pub(super) mtime: i64,
    /// Major and minor device number; only some dialects have them.
    pub(super) device: (i64, i64),
}

/// The dialect of a header: who defined the fields after the link's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialect {
    /// The oldest one, which has no such fields.
    V7,
    /// POSIX, for both ustar and PAX.
    Ustar,
    /// Schilling's star.
    Star,
    Gnu,
}

impl Dialect {
    fn of(block: &[u8; BLOCK]) -> Dialect {
        match (&block[257..263], &block[263..265]) {
            (b"ustar\0", _) if block[508..] == *b"tar\0" => Dialect::Star,
            (b"ustar\0", _) => Dialect::Ustar,
            (b"ustar ", b" \0") => Dialect::Gnu,
            _ => Dialect::V7,
        }
    }
}

impl Header {
    /// Decodes a block that is not all zeros.
    pub(super) fn decode(block: &[u8; BLOCK]) -> Result<Header, &'static str> {
        let dialect = Dialect::of(block);
        check_sum(block)?;
        let mut header = Header {
            kind: block[156],
            name: until_nul(&block[..100]).to_vec(),
            link: until_nul(&block[157..257]).to_vec(),
            size: number(&block[124..136])?,
            mode: number(&block[100..108])?,
            uid: number(&block[108..116])?,
            gid: number(&block[116..124])?,
            mtime: number(&block[136..148])?,
            device: (0, 0),
        };
        if dialect == Dialect::V7 {
            return Ok(header);
        }
        header.device = (number(&block[329..337])?, number(&block[337..345])?);
        let prefix = prefix(dialect, block)?;
        if !prefix.is_empty() {
            header.name = [prefix, b"/", &header.name].concat();
        }
        Ok(header)
    }

    /// Whether an entry of this type has no content, whatever its size field says.
    pub(super) fn has_no_content(&self) -> bool {
        (b'1'..=b'6').contains(&self.kind)
    }
}

/// The first part of a name that is too long for the name field.
fn prefix(dialect: Dialect, block: &[u8; BLOCK]) -> Result<&[u8], &'static str> {
    let long = until_nul(&block[345..500]);
    match dialect {
        Dialect::V7 => Ok(&[]),
        Dialect::Ustar => Ok(long),
        Dialect::Star => {
            number(&block[476..488])?;
            number(&block[488..500])?;
            Ok(until_nul(&block[345..476]))
        }
        // GNU tar has two times there. Go before 1.8 wrote a prefix all the same, so text that cannot be times is taken as one.
        Dialect::Gnu => {
            let is_time = |field: &[u8]| field[0] == 0 || number(field).is_ok();
            let are_times = is_time(&block[345..357]) && is_time(&block[357..369]);
            Ok(if are_times || !long.is_ascii() { &[] } else { long })
        }
    }
}

/// Verifies the checksum: the sum of all bytes, with its own field counted as blanks. Some old tars added signed bytes.
fn check_sum(block: &[u8; BLOCK]) -> Result<(), &'static str> {
    let wrong = "a header does not match its checksum";
    let expected = octal(&block[148..156]).map_err(|_| wrong)?;
    let counted = || block[..148].iter().chain(&[b' '; 8]).chain(&block[156..]);
    let unsigned: i64 = counted().map(|byte| i64::from(*byte)).sum();
    let signed: i64 = counted().map(|byte| i64::from(byte.cast_signed())).sum();
    if expected == unsigned || expected == signed { Ok(()) } else { Err(wrong) }
}

/// A text field, up to its NUL or its end.
pub(super) fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// A number in octal digits, or in base 256.
fn number(field: &[u8]) -> Result<i64, &'static str> {
    if field[0] & 0x80 == 0 { octal(field) } else { base_256(field) }
}

fn octal(field: &[u8]) -> Result<i64, &'static str> {
    let is_filling = |byte: &u8| matches!(byte, b' ' | 0);
    let Some(first) = field.iter().position(|byte| !is_filling(byte)) else { return Ok(0) };
    let last = field.iter().rposition(|byte| !is_filling(byte)).unwrap_or(first);
    let digits = until_nul(&field[first..=last]);
    if !digits.iter().all(|digit| (b'0'..=b'7').contains(digit)) {
        return Err(NO_NUMBER);
    }
    let text = std::str::from_utf8(digits).map_err(|_| NO_NUMBER)?;
    u64::from_str_radix(text, 8).map(u64::cast_signed).map_err(|_| NO_NUMBER)
}

/// Two's complement with the first bit set as a mark.
fn base_256(field: &[u8]) -> Result<i64, &'static str> {
    let inverted = if field[0] & 0x40 == 0 { 0 } else { 0xff };
    let mut value: u64 = 0;
    for (at, byte) in field.iter().enumerate() {
        let byte = (byte ^ inverted) & if at == 0 { 0x7f } else { 0xff };
        if value >> 56 > 0 {
            return Err(NO_NUMBER);
        }
        value = value << 8 | u64::from(byte);
    }
    let value = i64::try_from(value).map_err(|_| NO_NUMBER)?;
    Ok(if inverted == 0 { value } else { !value })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sealed(mut block: [u8; BLOCK]) -> [u8; BLOCK] {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }

    #[test]
    fn numbers_are_read_in_every_form_that_writers_use() {
        let ok = |field: &[u8], value: i64| assert_eq!(number(field), Ok(value), "{}", field.escape_ascii());
        ok(&[0; 8], 0);
        ok(b"        ", 0);
        ok(b"0000644\0", 0o644);
        ok(b"00000644", 0o644);
        ok(b"   644 \0", 0o644);
        ok(b"\0 000644", 0o644);
        ok(b"644\0 999", 0o644);
        ok(b"77777777", 0o77_777_777);
        ok(&[0x80, 0, 0, 0, 0, 0x20, 0, 1], 0x20_0001);
        ok(&[0xff; 8], -1);
        ok(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe], -2);
        for bad in [&b"0000648\0"[..], b"644 \x00 644x"[..8].as_ref(), b"-0000001", b"0x000001", b"6 44\0\0\0\0"] {
            assert!(number(bad).is_err(), "{}", bad.escape_ascii());
        }
        assert!(number(&[0x80, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0]).is_err(), "beyond 63 bits");
    }

    #[test]
    fn the_dialect_says_where_a_names_first_part_is() {
        let mut block = [0; BLOCK];
        block[..4].copy_from_slice(b"name");
        block[345..349].copy_from_slice(b"some");
        let name = |block: [u8; BLOCK]| String::from_utf8(Header::decode(&sealed(block)).unwrap().name).unwrap();
        assert_eq!(name(block), "name");
        block[257..265].copy_from_slice(b"ustar\x0000");
        assert_eq!(name(block), "some/name");
        block[257..265].copy_from_slice(b"ustar  \0");
        assert_eq!(name(block), "some/name", "it is no time");
        block[345..349].copy_from_slice(b"1234");
        assert_eq!(name(block), "name");
        block[257..265].copy_from_slice(b"ustar\x0000");
        block[508..].copy_from_slice(b"tar\0");
        assert_eq!(name(block), "1234/name");
        block[476] = b'x';
        assert!(Header::decode(&sealed(block)).is_err(), "star has times there");
    }

    proptest! {
        #[test]
        fn no_header_is_a_panic(bytes in proptest::collection::vec(any::<u8>(), BLOCK), dialect in 0..4usize) {
            let mut block: [u8; BLOCK] = bytes.try_into().unwrap();
            block[257..265].copy_from_slice([&b"ustar\x0000"[..], b"ustar  \0", b"ustar\0\0\0", &[0; 8]][dialect]);
            let _ = Header::decode(&sealed(block));
        }
    }
}
