//! Tar streams written by hand: every header exactly as wanted, the same bytes every time.
//!
//! The usual libraries smooth out what tests are after (absolute names, raw bytes in names, missing parents,
//! GNU and PAX side by side), so the 512-byte blocks are made here.

use std::io::{self, Read, Write};

use super::blobs::copy;

/// The block of a tar stream.
const BLOCK: usize = 512;

/// What an entry is; the byte of the header's type field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A regular file.
    File = b'0',
    /// Another name of an earlier file.
    HardLink = b'1',
    /// A symbolic link.
    Symlink = b'2',
    /// A character device.
    CharDevice = b'3',
    /// A block device.
    BlockDevice = b'4',
    /// A directory.
    Directory = b'5',
    /// A named pipe.
    Fifo = b'6',
    /// PAX records for all entries that follow; the path is the header's own name.
    Global = b'g',
    /// A type that no reader knows.
    Unknown = b'?',
}

/// How a name that does not fit its 100 bytes is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LongNames {
    /// PAX records `path` and `linkpath`.
    Pax,
    /// GNU's `././@LongLink` entries.
    Gnu,
}

/// The header of one entry.
#[derive(Debug, Clone)]
pub struct Header {
    /// The name as written; directories get no slash added.
    pub path: Vec<u8>,
    /// The type.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u64, u64),
    /// Modification time: seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Target of a link.
    pub link: Vec<u8>,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Further PAX records, such as `SCHILY.xattr.user.x`.
    pub records: Vec<(Vec<u8>, Vec<u8>)>,
    /// How long names are written.
    pub long_names: LongNames,
    /// The size field, when it shall differ from the content's length (for hostile archives).
    pub claimed_size: Option<u64>,
}

impl Header {
    /// A header of that kind, mode 0644 (directories 0755), owned by root, from the year 2020.
    pub fn new(kind: Kind, path: impl AsRef<[u8]>) -> Self {
        Self {
            path: path.as_ref().to_vec(),
            kind,
            mode: if kind == Kind::Directory { 0o755 } else { 0o644 },
            owner: (0, 0),
            mtime: (1_577_836_800, 0),
            link: Vec::new(),
            device: (0, 0),
            records: Vec::new(),
            long_names: LongNames::Pax,
            claimed_size: None,
        }
    }

    /// With these permission bits.
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    /// With this owner and group.
    pub fn owner(mut self, uid: u64, gid: u64) -> Self {
        self.owner = (uid, gid);
        self
    }

    /// With this modification time.
    pub fn mtime(mut self, seconds: i64, nanoseconds: u32) -> Self {
        self.mtime = (seconds, nanoseconds);
        self
    }

    /// With this link target.
    pub fn link(mut self, target: impl AsRef<[u8]>) -> Self {
        self.link = target.as_ref().to_vec();
        self
    }

    /// With this device number.
    pub fn device(mut self, major: u32, minor: u32) -> Self {
        self.device = (major, minor);
        self
    }

    /// With one more extended attribute.
    pub fn xattr(self, name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Self {
        self.record([b"SCHILY.xattr.", name.as_ref()].concat(), value)
    }

    /// With one more PAX record.
    pub fn record(mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Self {
        self.records.push((key.as_ref().to_vec(), value.as_ref().to_vec()));
        self
    }

    /// With long names in GNU's way.
    pub fn gnu_names(mut self) -> Self {
        self.long_names = LongNames::Gnu;
        self
    }

    /// All PAX records that the entry needs.
    fn pax(&self, size: u64) -> Vec<u8> {
        let mut out = Vec::new();
        if self.mtime.1 != 0 {
            append_record(&mut out, b"mtime", format!("{}.{:09}", self.mtime.0, self.mtime.1).as_bytes());
        }
        for (key, id) in [(&b"uid"[..], self.owner.0), (b"gid", self.owner.1)] {
            if id > 0o777_7777 {
                append_record(&mut out, key, id.to_string().as_bytes());
            }
        }
        if size > 0o777_7777_7777 {
            append_record(&mut out, b"size", size.to_string().as_bytes());
        }
        if self.long_names == LongNames::Pax {
            for (key, name) in [(&b"path"[..], &self.path), (b"linkpath", &self.link)] {
                if name.len() > 100 {
                    append_record(&mut out, key, name);
                }
            }
        }
        for (key, value) in &self.records {
            append_record(&mut out, key, value);
        }
        out
    }

    fn block(&self, size: u64) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        put(&mut block[0..100], &self.path);
        number(&mut block[100..108], u64::from(self.mode));
        number(&mut block[108..116], self.owner.0.min(0o777_7777));
        number(&mut block[116..124], self.owner.1.min(0o777_7777));
        number(&mut block[124..136], size.min(0o777_7777_7777));
        number(&mut block[136..148], u64::try_from(self.mtime.0).unwrap_or(0).min(0o777_7777_7777));
        block[156] = self.kind as u8;
        put(&mut block[157..257], &self.link);
        match self.long_names {
            LongNames::Pax => put(&mut block[257..265], b"ustar\x0000"),
            LongNames::Gnu => put(&mut block[257..265], b"ustar  \0"),
        }
        number(&mut block[329..337], u64::from(self.device.0));
        number(&mut block[337..345], u64::from(self.device.1));
        block[148..156].fill(b' ');
        let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
        put(&mut block[148..156], format!("{sum:06o}\0 ").as_bytes());
        block
    }
}

/// One PAX record: its own length in decimal, a space, `key=value`, a line feed.
fn append_record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    out.extend_from_slice(length.to_string().as_bytes());
    out.push(b' ');
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}

fn put(field: &mut [u8], bytes: &[u8]) {
    let length = bytes.len().min(field.len());
    field[..length].copy_from_slice(&bytes[..length]);
}

fn number(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    put(field, format!("{value:0digits$o}").as_bytes());
}

/// Writes a tar stream.
#[derive(Debug)]
pub struct Archive<W: Write> {
    out: W,
}

impl<W: Write> Archive<W> {
    /// A stream into `out`.
    pub fn new(out: W) -> Self {
        Self { out }
    }

    /// Adds one entry with `content`, which must be `size` bytes long.
    pub fn stream(&mut self, header: &Header, size: u64, content: impl Read) -> io::Result<()> {
        let claimed = header.claimed_size.unwrap_or(size);
        let records = header.pax(claimed);
        if header.kind == Kind::Global {
            return self.plain(header, &records);
        }
        if !records.is_empty() {
            let name = [b"PaxHeaders/", &header.path[..header.path.len().min(80)]].concat();
            let kind = Header { kind: Kind::File, ..Header::new(Kind::File, name) }.mtime(0, 0);
            self.typed(&kind, b'x', &records)?;
        }
        if header.long_names == LongNames::Gnu {
            for (kind, name) in [(b'K', &header.link), (b'L', &header.path)] {
                if name.len() > 100 {
                    let marker = Header::new(Kind::File, "././@LongLink").mode(0).mtime(0, 0).gnu_names();
                    self.typed(&marker, kind, &[name, &[0][..]].concat())?;
                }
            }
        }
        self.out.write_all(&header.block(claimed))?;
        let copied = copy(content.take(size), &mut self.out)?;
        if copied != size {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the entry's content is too short"));
        }
        self.pad(size)
    }

    /// Adds one entry whose content is in memory.
    pub fn add(&mut self, header: &Header, content: impl AsRef<[u8]>) -> io::Result<()> {
        let content = content.as_ref();
        self.stream(header, content.len() as u64, content)
    }

    /// The two zero blocks at the end; gives back what was written to.
    pub fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&[0; 2 * BLOCK])?;
        self.out.flush()?;
        Ok(self.out)
    }

    /// What was written to, without an end mark (for truncated archives).
    pub fn into_unfinished(self) -> W {
        self.out
    }

    fn plain(&mut self, header: &Header, content: &[u8]) -> io::Result<()> {
        self.out.write_all(&header.block(content.len() as u64))?;
        self.out.write_all(content)?;
        self.pad(content.len() as u64)
    }

    /// An entry of a type that describes the next entry.
    fn typed(&mut self, header: &Header, kind: u8, content: &[u8]) -> io::Result<()> {
        let mut block = header.block(content.len() as u64);
        block[156] = kind;
        block[148..156].fill(b' ');
        let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
        put(&mut block[148..156], format!("{sum:06o}\0 ").as_bytes());
        self.out.write_all(&block)?;
        self.out.write_all(content)?;
        self.pad(content.len() as u64)
    }

    fn pad(&mut self, size: u64) -> io::Result<()> {
        let over = usize::try_from(size % BLOCK as u64).unwrap_or(0);
        if over > 0 {
            self.out.write_all(&[0; BLOCK][over..])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::run;
    use std::process::Command;

    #[test]
    fn a_record_counts_its_own_length() {
        let mut out = Vec::new();
        append_record(&mut out, b"path", &[b'x'; 92]);
        append_record(&mut out, b"a", b"b");
        assert!(out.starts_with(b"102 path=xxx"), "{}", out.escape_ascii());
        assert_eq!(out.len(), 102 + 6);
        assert!(out.ends_with(b"6 a=b\n"));
    }

    #[test]
    fn gnu_tar_reads_what_is_written() {
        let mut archive = Archive::new(Vec::new());
        let long = "d/".repeat(80) + "end";
        archive.add(&Header::new(Kind::File, &long).mtime(1, 5).owner(3_000_000, 1), "abc").unwrap();
        archive.add(&Header::new(Kind::HardLink, "e".repeat(120)).link(&long).gnu_names(), "").unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.tar");
        std::fs::write(&path, archive.finish().unwrap()).unwrap();
        let list =
            run(Command::new("tar").args(["--numeric-owner", "--full-time", "-tvf"]).arg(&path)).unwrap().ok().unwrap();
        assert!(list.contains("3000000/1"), "{list}");
        assert!(list.contains("00:00:01.000000005"), "{list}");
        assert!(list.contains(&format!("{} link to {long}", "e".repeat(120))), "{list}");
    }
}
