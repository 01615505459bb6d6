//! Finds the members of a tar file without reading their content, and in little memory, whatever the headers claim.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::registries::error::RegistryError;
use crate::unpack::{integer, pax_records};

const BLOCK: u64 = 512;
/// Maximum number of headers in an archive: more than any image archive has.
const HEADERS_MAX: usize = 300_000;
/// The longest extended header that is read.
const EXTENDED_MAX: u64 = 1 << 20;
/// The longest name that is accepted, in bytes: the kernel's limit for a path.
const NAME_MAX: usize = 4095;
/// Maximum number of bytes of all names together.
const NAMES_MAX: usize = 32 << 20;

/// One member.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Member {
    /// Its name, as the archive has it.
    pub(crate) name: Vec<u8>,
    /// The byte of the header's type field.
    pub(crate) kind: u8,
    /// A link's target.
    pub(crate) link: Vec<u8>,
    /// First byte of its content.
    pub(crate) offset: u64,
    /// Length of its content.
    pub(crate) size: u64,
}

/// What extended headers say about the member that follows them.
#[derive(Default)]
struct Extended {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
}

/// A walk over an archive.
struct Scan<'a> {
    file: &'a File,
    length: u64,
    at: u64,
    headers: usize,
    names: usize,
}

fn unreadable(why: impl Into<String>) -> RegistryError {
    RegistryError::Archive { why: why.into() }
}

fn not_a_tar(why: &str) -> RegistryError {
    unreadable(format!("it is not a tar archive ({why})"))
}

/// Calls `each` for every member of the tar in `file`, which is `length` bytes long.
pub(crate) fn each_member(
    file: &File,
    length: u64,
    mut each: impl FnMut(Member) -> Result<(), RegistryError>,
) -> Result<(), RegistryError> {
    let mut scan = Scan { file, length, at: 0, headers: 0, names: 0 };
    let mut extended = Extended::default();
    while let Some(header) = scan.header()? {
        let size = header.entry_size().map_err(|e| not_a_tar(&e.to_string()))?;
        match header.as_bytes()[156] {
            b'x' => scan.pax(size, &mut extended)?,
            b'L' => extended.name = Some(scan.long_name(size)?),
            b'K' => extended.link = Some(scan.long_name(size)?),
            b'g' => scan.skip(size)?,
            kind => {
                let Extended { name, link, size: stated } = std::mem::take(&mut extended);
                let name = name.unwrap_or_else(|| header.path_bytes().into_owned());
                let link = link.or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned));
                let link = link.unwrap_or_default();
                scan.count_names(name.len() + link.len())?;
                // Only files have content, whatever other headers claim.
                let is_file = matches!(kind, 0 | b'0' | b'7' | b'S');
                let size = if is_file { stated.unwrap_or(size) } else { 0 };
                each(Member { name, kind, link, offset: scan.at, size })?;
                scan.skip(size)?;
            }
        }
    }
    Ok(())
}

impl Scan<'_> {
    /// The next header; `None` at the end.
    fn header(&mut self) -> Result<Option<tar::Header>, RegistryError> {
        if self.at >= self.length {
            return Ok(None);
        }
        self.headers += 1;
        if self.headers > HEADERS_MAX {
            return Err(unreadable(format!("it has more than {HEADERS_MAX} members")));
        }
        let mut header = tar::Header::new_old();
        let read = self.file.read_exact_at(header.as_mut_bytes(), self.at);
        read.map_err(|_| not_a_tar("it ends in the middle of a header"))?;
        self.at += BLOCK;
        let block = header.as_bytes();
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let sum: u32 = block[..148].iter().chain(&[b' '; 8]).chain(&block[156..]).map(|b| u32::from(*b)).sum();
        match header.cksum() {
            Ok(expected) if expected == sum => Ok(Some(header)),
            _ => Err(not_a_tar("a header does not match its checksum")),
        }
    }

    /// Skips content of `size` bytes and its padding.
    fn skip(&mut self, size: u64) -> Result<(), RegistryError> {
        let padded = size.checked_next_multiple_of(BLOCK).and_then(|size| self.at.checked_add(size));
        self.at = padded.ok_or_else(|| not_a_tar("a member is longer than any file"))?;
        Ok(())
    }

    fn extended(&mut self, size: u64) -> Result<Vec<u8>, RegistryError> {
        if size > EXTENDED_MAX {
            return Err(unreadable("it has an extended header longer than 1 MiB"));
        }
        let mut bytes = vec![0; size as usize];
        let read = self.file.read_exact_at(&mut bytes, self.at);
        read.map_err(|_| not_a_tar("it ends in the middle of a header"))?;
        self.skip(size)?;
        Ok(bytes)
    }

    fn long_name(&mut self, size: u64) -> Result<Vec<u8>, RegistryError> {
        let mut name = self.extended(size)?;
        name.truncate(name.iter().position(|byte| *byte == 0).unwrap_or(name.len()));
        check_name(name)
    }

    fn pax(&mut self, size: u64, extended: &mut Extended) -> Result<(), RegistryError> {
        let bytes = self.extended(size)?;
        for record in pax_records(&bytes) {
            let (key, value) = record.map_err(not_a_tar)?;
            match key {
                b"path" => extended.name = Some(check_name(value.to_vec())?),
                b"linkpath" => extended.link = Some(check_name(value.to_vec())?),
                b"size" => extended.size = Some(number(value).ok_or_else(|| not_a_tar("a size is not a number"))?),
                _ => {}
            }
        }
        Ok(())
    }

    fn count_names(&mut self, bytes: usize) -> Result<(), RegistryError> {
        self.names += bytes;
        if self.names > NAMES_MAX { Err(unreadable("its members' names have more than 32 MiB")) } else { Ok(()) }
    }
}

/// Parses a non-negative number.
fn number(text: &[u8]) -> Option<u64> {
    integer(text).and_then(|number| u64::try_from(number).ok())
}

fn check_name(name: Vec<u8>) -> Result<Vec<u8>, RegistryError> {
    if name.len() > NAME_MAX {
        Err(unreadable(format!("it has a member with a name longer than {NAME_MAX} bytes")))
    } else {
        Ok(name)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn members(tar: &[u8]) -> Result<Vec<(String, u64, u64)>, RegistryError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(tar).unwrap();
        let mut found = Vec::new();
        each_member(&file, tar.len() as u64, |member| {
            found.push((String::from_utf8_lossy(&member.name).into_owned(), member.offset, member.size));
            Ok(())
        })?;
        Ok(found)
    }

    fn header(kind: u8, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_mode(0o644);
        header.set_size(size);
        header.set_cksum();
        header
    }

    #[test]
    fn members_are_found_as_the_tar_crate_finds_them() {
        let mut builder = tar::Builder::new(Vec::new());
        let long = "d/".repeat(90) + "long";
        for (name, len) in [("a", 5), (long.as_str(), 600), ("empty", 0)] {
            let mut header = header(b'0', len);
            builder.append_data(&mut header, name, &vec![7; len as usize][..]).unwrap();
        }
        let pax = "p/".repeat(90) + "pax";
        builder.append_pax_extensions([("path", pax.as_bytes()), ("size", &b"3"[..])]).unwrap();
        builder.append(&header(b'0', 3), &b"abc"[..]).unwrap();
        let tar = builder.into_inner().unwrap();
        let found = members(&tar).unwrap();
        let mut archive = tar::Archive::new(&tar[..]);
        let expected = archive.entries().unwrap().map(|entry| {
            let entry = entry.unwrap();
            (entry.path().unwrap().display().to_string(), entry.raw_file_position(), entry.size())
        });
        assert_eq!(found, expected.collect::<Vec<_>>());
    }

    #[test]
    fn claims_cost_no_memory() {
        let claims = |kind: u8, size: u64| members(header(kind, size).as_bytes()).unwrap_err().to_string();
        for kind in [b'L', b'K', b'x'] {
            assert!(claims(kind, 8 << 30).contains("longer than 1 MiB"));
            assert!(claims(kind, 1 << 20).contains("in the middle of a header"));
        }
        let long = [header(b'L', 5000).as_bytes(), &[b'n'; 5120][..]].concat();
        assert!(members(&long).unwrap_err().to_string().contains("longer than 4095 bytes"));
        assert!(
            members(&header(b'0', u64::MAX >> 2).as_bytes()[..]).is_ok(),
            "what a member claims is its reader's matter"
        );
        assert!(members(b"hello").unwrap_err().to_string().contains("not a tar archive"));
        assert!(members(&[b'x'; 512]).unwrap_err().to_string().contains("checksum"));
        let many = header(b'g', 0).as_bytes().repeat(HEADERS_MAX + 1);
        assert!(members(&many).unwrap_err().to_string().contains("more than 300000 members"));
    }
}
