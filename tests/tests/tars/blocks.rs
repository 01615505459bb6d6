//! Headers made byte by byte, with everything that a field can hold, including values that no writer would use.

/// Length of a block.
pub(crate) const BLOCK: usize = 512;

/// The offset and length of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Field(pub(crate) usize, pub(crate) usize);

pub(crate) const NAME: Field = Field(0, 100);
pub(crate) const MODE: Field = Field(100, 8);
pub(crate) const UID: Field = Field(108, 8);
pub(crate) const GID: Field = Field(116, 8);
pub(crate) const SIZE: Field = Field(124, 12);
pub(crate) const MTIME: Field = Field(136, 12);
pub(crate) const SUM: Field = Field(148, 8);
pub(crate) const KIND: Field = Field(156, 1);
pub(crate) const LINK: Field = Field(157, 100);
pub(crate) const MAGIC: Field = Field(257, 8);
pub(crate) const MAJOR: Field = Field(329, 8);
pub(crate) const MINOR: Field = Field(337, 8);
pub(crate) const PREFIX: Field = Field(345, 155);
/// The last four bytes of star's header.
pub(crate) const TRAILER: Field = Field(508, 4);

/// The magics of known and unknown dialects.
pub(crate) const MAGICS: [&[u8]; 7] =
    [b"ustar\x0000", b"ustar  \0", b"\0\0\0\0\0\0\0\0", b"ustar\0\0\0", b"ustar\x0099", b"ustar 00", b"USTAR\x0000"];

/// A header under construction: ustar, mode 0644 (directories 0755), owned by root, from 2001.
#[derive(Debug, Clone)]
pub(crate) struct Block([u8; BLOCK]);

impl Block {
    pub(crate) fn new(kind: u8, name: impl AsRef<[u8]>) -> Self {
        let block = Self([0; BLOCK]).put(NAME, name).put(KIND, [kind]).put(MAGIC, MAGICS[0]);
        let mode = if kind == b'5' { 0o755 } else { 0o644 };
        let block = block.number(MODE, mode).number(UID, 0).number(GID, 0).number(SIZE, 0);
        block.number(MTIME, 1_000_000_000).number(MAJOR, 0).number(MINOR, 0)
    }

    /// Fills a field with these bytes, followed by NULs.
    pub(crate) fn put(mut self, Field(at, len): Field, bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref();
        let bytes = &bytes[..bytes.len().min(len)];
        self.0[at..at + len].fill(0);
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// Fills a field with an octal number in the usual form.
    pub(crate) fn number(self, field: Field, value: u64) -> Self {
        let digits = field.1 - 1;
        self.put(field, format!("{value:0digits$o}"))
    }

    pub(crate) fn link(self, target: impl AsRef<[u8]>) -> Self {
        self.put(LINK, target)
    }

    /// The checksum over unsigned bytes, and the one over signed bytes.
    pub(crate) fn sums(&self) -> (u64, i64) {
        let bytes = || self.0.iter().enumerate().map(|(at, byte)| if (148..156).contains(&at) { b' ' } else { *byte });
        (bytes().map(u64::from).sum(), bytes().map(|byte| i64::from(byte.cast_signed())).sum())
    }

    /// The block with its checksum in the usual form.
    pub(crate) fn sealed(self) -> Vec<u8> {
        let (sum, _) = self.sums();
        self.sealed_as(format!("{sum:06o}\0 "))
    }

    /// The block with these bytes as checksum.
    pub(crate) fn sealed_as(self, sum: impl AsRef<[u8]>) -> Vec<u8> {
        self.put(SUM, sum).0.to_vec()
    }

    /// The entry with this content. Its size field is the content's length.
    pub(crate) fn with(self, content: impl AsRef<[u8]>) -> Vec<u8> {
        let content = content.as_ref();
        [self.number(SIZE, content.len() as u64).sealed(), padded(content)].concat()
    }
}

/// The content, padded with zeros to a whole number of blocks.
pub(crate) fn padded(content: &[u8]) -> Vec<u8> {
    let mut content = content.to_vec();
    content.resize(content.len().next_multiple_of(BLOCK), 0);
    content
}

/// An extended header (`x`, or `g` for the archive) with these records.
pub(crate) fn pax(kind: u8, records: &[(&[u8], &[u8])]) -> Vec<u8> {
    let records: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value)).collect();
    Block::new(kind, "PaxHeaders/0").with(records)
}

/// A PAX record: its own length, a space, key, `=`, value, line feed.
pub(crate) fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let digits = (1..).find(|digits| (rest + digits).to_string().len() == *digits).unwrap_or(1);
    [format!("{} ", rest + digits).as_bytes(), key, b"=", value, b"\n"].concat()
}

/// GNU's entry for a long name (`L`) or a long link target (`K`).
pub(crate) fn long(kind: u8, name: &[u8]) -> Vec<u8> {
    Block::new(kind, "././@LongLink").put(MAGIC, MAGICS[1]).with([name, b"\0"].concat())
}

/// The end of an archive.
pub(crate) fn end() -> Vec<u8> {
    vec![0; 2 * BLOCK]
}
