//! The tar stream as entries. Every byte that is not a file's content goes into the recipe.
//!
//! Header fields are decoded by the `tar` crate; the walk over the stream is ours, because the recipe needs each raw byte, values in
//! PAX records may be binary, and a hostile stream must not choose how much memory is used. Known: v7, ustar, GNU (long names,
//! base-256 numbers, old sparse files) and PAX (paths, times, ids, sizes, xattrs, sparse files 0.0, 0.1 and 1.0).

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::PathBuf;

use store::layer::InodeIndex;
use store::publisher::DigestedFile;
use store::recipe::RecipeWriter;

use super::UnpackError;
use super::bounds::{SPECIAL_MAX, UNUSED_MAX};
use super::pax::{DAMAGED, MapText, decimal, pairs, pax_records, pax_time};

const BLOCK: usize = 512;
/// Names in messages are cut after so many bytes.
const SHOWN: usize = 200;
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// What an entry makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
}

/// One entry of the tar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// The name, as the tar has it.
    pub(super) name: Vec<u8>,
    /// A link's target.
    pub(super) link: Vec<u8>,
    pub(super) kind: Kind,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: i64,
    pub(super) mtime_nsec: u32,
    pub(super) device: (u32, u32),
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The file's length, holes included.
    pub(super) size: u64,
    /// The ranges of the file whose bytes follow in the stream.
    pub(super) data: Vec<(u64, u64)>,
}

/// What PAX and GNU headers said about the entry that follows them.
#[derive(Default)]
struct Extensions {
    pax: BTreeMap<Vec<u8>, Vec<u8>>,
    /// `GNU.sparse.offset` and `numbytes` come in pairs, again and again.
    sparse_pairs: Vec<u64>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

/// A sparse file's length, and the ranges that have data: offset and length.
type SparseMap = (u64, Vec<(u64, u64)>);

/// Walks over a tar stream.
pub(super) struct TarReader<R> {
    input: R,
    at: u64,
    recipe: RecipeWriter<DigestedFile>,
    recipe_path: PathBuf,
    /// Bytes of the present entry that have not been read: content, then padding.
    content: u64,
    padding: u64,
    /// Bytes of the present entry's extended headers.
    special: u64,
    /// Bytes so far that mean nothing.
    unused: u64,
}

impl<R: Read> TarReader<R> {
    /// Reads `input`, writing the recipe into `recipe`.
    pub(super) fn new(input: R, recipe: DigestedFile) -> Result<TarReader<R>, UnpackError> {
        let recipe_path = recipe.path().to_owned();
        let recipe = RecipeWriter::new(recipe).map_err(|e| store::Error::io("write", &recipe_path, e))?;
        Ok(TarReader { input, at: 0, recipe, recipe_path, content: 0, padding: 0, special: 0, unused: 0 })
    }

    /// Bytes of the stream that have been read.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    fn recorded(&self, result: io::Result<()>) -> Result<(), UnpackError> {
        result.map_err(|e| store::Error::io("write", &self.recipe_path, e).into())
    }

    fn invalid(&self, why: impl Into<String>) -> UnpackError {
        UnpackError::Tar { at: self.at, why: why.into() }
    }

    /// Fills `out` as far as the stream goes.
    fn fill(&mut self, out: &mut [u8]) -> Result<usize, UnpackError> {
        let mut filled = 0;
        while filled < out.len() {
            match self.input.read(&mut out[filled..]).map_err(UnpackError::Read)? {
                0 => break,
                n => filled += n,
            }
        }
        self.at += filled as u64;
        Ok(filled)
    }

    fn exact(&mut self, out: &mut [u8]) -> Result<(), UnpackError> {
        match self.fill(out)? == out.len() {
            true => Ok(()),
            false => Err(self.invalid("it ends in the middle of an entry")),
        }
    }

    fn literal(&mut self, bytes: &[u8]) -> Result<(), UnpackError> {
        let result = self.recipe.literal(bytes);
        self.recorded(result)
    }

    /// Moves `len` bytes of the stream into the recipe.
    fn pass(&mut self, mut len: u64) -> Result<(), UnpackError> {
        let mut buffer = [0; 8192];
        while len > 0 {
            let n = len.min(buffer.len() as u64) as usize;
            self.exact(&mut buffer[..n])?;
            self.literal(&buffer[..n])?;
            len -= n as u64;
        }
        Ok(())
    }

    /// Moves the padding after a file into the recipe. The last one may be missing, and all that should follow it: umoci
    /// ends a layer so, and Docker takes it.
    fn pass_padding(&mut self, len: u64) -> Result<(), UnpackError> {
        let mut buffer = [0; BLOCK];
        let filled = self.fill(&mut buffer[..len as usize])?;
        self.literal(&buffer[..filled])
    }

    /// Leaves the present entry's content out: it only goes into the recipe.
    pub(super) fn ignore_content(&mut self, entry: &Entry) -> Result<(), UnpackError> {
        self.unused = self.unused.saturating_add(self.content);
        if self.unused > UNUSED_MAX {
            Err(refused(&entry.name, "has content that means nothing, more than 64 MiB of it with that before"))
        } else {
            Ok(())
        }
    }

    /// Moves the content of a special entry into the recipe and returns it.
    fn special(&mut self, size: u64) -> Result<Vec<u8>, UnpackError> {
        self.special = self.special.saturating_add(size);
        if self.special > SPECIAL_MAX {
            return Err(self.invalid("an entry has extended headers longer than 1 MiB"));
        }
        let mut bytes = vec![0; size as usize];
        self.exact(&mut bytes)?;
        self.literal(&bytes)?;
        self.pass(padding(size))?;
        Ok(bytes)
    }

    /// The next header block; nothing at the end, when what follows it has gone into the recipe.
    fn header(&mut self) -> Result<Option<tar::Header>, UnpackError> {
        let mut header = tar::Header::new_old();
        let block = header.as_mut_bytes();
        match self.fill(block)? {
            0 => return Ok(None),
            BLOCK => {}
            _ => return Err(self.invalid("it ends in the middle of a header")),
        }
        let block = *block;
        self.literal(&block)?;
        if block.iter().all(|byte| *byte == 0) {
            self.trailer()?;
            return Ok(None);
        }
        let sum: u32 = block[..148].iter().chain(&[b' '; 8]).chain(&block[156..]).map(|b| u32::from(*b)).sum();
        let signed = |b: &u8| i32::from(*b as i8);
        let signed: i32 = block[..148].iter().chain(&[b' '; 8]).chain(&block[156..]).map(signed).sum();
        match header.cksum() {
            Ok(expected) if expected == sum || i64::from(expected) == i64::from(signed) => Ok(Some(header)),
            _ => Err(self.invalid("a header does not match its checksum")),
        }
    }

    /// After the first zero block: another one, or the end of the stream; then whatever else there is.
    fn trailer(&mut self) -> Result<(), UnpackError> {
        let mut buffer = [0; 16 * BLOCK];
        let second = self.fill(&mut buffer[..BLOCK])?;
        if buffer[..second].iter().any(|byte| *byte != 0) {
            return Err(self.invalid("a header is missing"));
        }
        let mut filled = second;
        while filled > 0 {
            self.literal(&buffer[..filled])?;
            self.unused += filled as u64;
            if self.unused > UNUSED_MAX {
                return Err(self.invalid("more than 64 MiB that mean nothing follow the archive's end"));
            }
            filled = self.fill(&mut buffer)?;
        }
        Ok(())
    }

    /// The next entry; whatever was left unread of the one before goes into the recipe as it is.
    pub(super) fn next_entry(&mut self) -> Result<Option<Entry>, UnpackError> {
        let (content, behind) = (self.content, self.padding);
        (self.content, self.padding) = (0, 0);
        self.pass(content)?;
        self.pass_padding(behind)?;
        self.special = 0;
        let mut extensions = Extensions::default();
        loop {
            let Some(header) = self.header()? else { return Ok(None) };
            let size = header.entry_size().map_err(|e| self.invalid(e.to_string()))?;
            match header.as_bytes()[156] {
                b'x' => {
                    let bytes = self.special(size)?;
                    extensions.parse(&bytes).map_err(|why| self.invalid(why))?;
                }
                // Global headers describe the archive (git writes its commit there); Docker ignores them too.
                b'g' => self.pass(size.saturating_add(padding(size)))?,
                b'L' => extensions.long_name = Some(until_nul(self.special(size)?)),
                b'K' => extensions.long_link = Some(until_nul(self.special(size)?)),
                _ => return self.entry(&header, &extensions).map(Some),
            }
        }
    }

    fn entry(&mut self, header: &tar::Header, extensions: &Extensions) -> Result<Entry, UnpackError> {
        let at = self.at;
        let mut entry = decode(header, extensions).map_err(|why| UnpackError::Tar { at, why })?;
        let stored = extensions.number("size").map_err(|why| self.invalid(why))?;
        let stored = stored.map_or_else(|| header.entry_size(), Ok).map_err(|e| self.invalid(e.to_string()))?;
        if entry.kind != Kind::File {
            return Ok(entry);
        }
        (self.content, self.padding) = (stored, padding(stored));
        (entry.size, entry.data) = match self.sparse_map(header, extensions)? {
            None => (stored, vec![(0, stored)]),
            Some((size, data)) => {
                check_sparse(size, &data, self.content).map_err(|why| refused(&entry.name, why))?;
                (size, data)
            }
        };
        Ok(entry)
    }

    /// The map of a sparse file, in whichever of the four ways it is written.
    fn sparse_map(&mut self, header: &tar::Header, extensions: &Extensions) -> Result<Option<SparseMap>, UnpackError> {
        if let (b'S', Some(gnu)) = (header.as_bytes()[156], header.as_gnu()) {
            return self.old_sparse_map(gnu).map(Some);
        }
        let number = |name: &str| extensions.number(name);
        let at = self.at;
        let invalid = move |why: String| UnpackError::Tar { at, why };
        if number("GNU.sparse.major").map_err(invalid)? == Some(1) {
            let size = number("GNU.sparse.realsize")
                .map_err(invalid)?
                .ok_or_else(|| self.invalid("a sparse file has no size"))?;
            return Ok(Some((size, self.pax_sparse_map()?)));
        }
        let Some(size) = number("GNU.sparse.size").map_err(invalid)? else { return Ok(None) };
        let numbers = match extensions.pax.get(&b"GNU.sparse.map"[..]) {
            Some(map) => map.split(|b| *b == b',').filter(|n| !n.is_empty()).map(decimal).collect::<Option<Vec<_>>>(),
            None => Some(extensions.sparse_pairs.clone()),
        };
        let numbers = numbers.ok_or_else(|| self.invalid("a sparse file's map is not a list of numbers"))?;
        Ok(Some((size, pairs(&numbers))))
    }

    fn old_sparse_map(&mut self, gnu: &tar::GnuHeader) -> Result<SparseMap, UnpackError> {
        let at = self.at;
        let bad = |e: std::io::Error| UnpackError::Tar { at, why: e.to_string() };
        let mut data = Vec::new();
        let mut take = |part: &[tar::GnuSparseHeader]| -> Result<(), UnpackError> {
            for range in part.iter().filter(|range| !range.is_empty()) {
                data.push((range.offset().map_err(bad)?, range.length().map_err(bad)?));
            }
            Ok(())
        };
        take(&gnu.sparse)?;
        let mut more = gnu.is_extended();
        let mut blocks = 0;
        while more {
            let mut block = tar::GnuExtSparseHeader::new();
            self.exact(block.as_mut_bytes())?;
            self.literal(block.as_bytes())?;
            take(block.sparse())?;
            more = block.is_extended();
            blocks += 1;
            if blocks > SPECIAL_MAX / BLOCK as u64 {
                return Err(self.invalid("a sparse file's map is longer than 1 MiB"));
            }
        }
        Ok((gnu.real_size().map_err(bad)?, data))
    }

    /// PAX 1.0: the map stands before the data, as decimal lines, in whole blocks.
    fn pax_sparse_map(&mut self) -> Result<Vec<(u64, u64)>, UnpackError> {
        let mut map = MapText::default();
        loop {
            let mut block = [0; BLOCK];
            if self.content < BLOCK as u64 || map.len > SPECIAL_MAX {
                return Err(self.invalid("a sparse file's map is damaged"));
            }
            self.exact(&mut block)?;
            self.literal(&block)?;
            self.content -= BLOCK as u64;
            if map.add(&block).map_err(|why| self.invalid(why))? {
                return Ok(pairs(map.numbers.get(1..).unwrap_or_default()));
            }
        }
    }

    /// Reads the present entry's content into `out`, in order; the caller notes it with [`TarReader::content`].
    pub(super) fn read(&mut self, out: &mut [u8]) -> Result<(), UnpackError> {
        if out.len() as u64 > self.content {
            return Err(self.invalid("a sparse file's map is longer than its data"));
        }
        self.exact(out)?;
        self.content -= out.len() as u64;
        Ok(())
    }

    /// Notes in the recipe that the bytes just read are a range of an inode's content.
    pub(super) fn content(
        &mut self,
        inode: InodeIndex,
        range: (u64, u64),
        crc: u64,
        name: &[u8],
    ) -> Result<(), UnpackError> {
        let result = self.recipe.content(inode, range, crc, name);
        self.recorded(result)
    }

    /// The finished recipe, not yet synced to disk.
    pub(super) fn finish(self) -> Result<DigestedFile, UnpackError> {
        Ok(self.recipe.finish().map_err(|e| store::Error::io("write", &self.recipe_path, e))?)
    }
}

/// The error for an entry that breaks a rule.
pub(super) fn refused(name: &[u8], why: impl Into<String>) -> UnpackError {
    UnpackError::Entry { name: shown(name), why: why.into() }
}

/// A name for a message: a stranger's may have a megabyte.
fn shown(name: &[u8]) -> String {
    if name.len() > SHOWN {
        format!("{}...", String::from_utf8_lossy(&name[..SHOWN]))
    } else {
        String::from_utf8_lossy(name).into_owned()
    }
}

fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}

fn check_sparse(size: u64, data: &[(u64, u64)], stored: u64) -> Result<(), &'static str> {
    let mut end = 0;
    let mut sum: u64 = 0;
    for (offset, len) in data {
        if *offset < end {
            return Err("is sparse with overlapping ranges");
        }
        end = offset.checked_add(*len).ok_or("is sparse with impossible ranges")?;
        sum = sum.saturating_add(*len);
    }
    match end <= size && sum <= stored {
        true => Ok(()),
        false => Err("is sparse with ranges outside the file"),
    }
}

impl Extensions {
    fn parse(&mut self, bytes: &[u8]) -> Result<(), &'static str> {
        for record in pax_records(bytes) {
            let (key, value) = record?;
            if matches!(key, b"GNU.sparse.offset" | b"GNU.sparse.numbytes") {
                self.sparse_pairs.push(decimal(value).ok_or(DAMAGED)?);
            }
            // An empty value takes the key back (POSIX).
            match value.is_empty() && !key.starts_with(XATTR_PREFIX) {
                true => _ = self.pax.remove(key),
                false => _ = self.pax.insert(key.to_vec(), value.to_vec()),
            }
        }
        Ok(())
    }

    fn text(&self, key: &str) -> Option<&Vec<u8>> {
        self.pax.get(key.as_bytes())
    }

    fn number(&self, key: &str) -> Result<Option<u64>, String> {
        let Some(value) = self.text(key) else { return Ok(None) };
        decimal(value).map(Some).ok_or_else(|| format!("PAX {key} is not a number"))
    }

    fn xattrs(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let name = |key: &Vec<u8>| key.strip_prefix(XATTR_PREFIX).map(<[u8]>::to_vec);
        self.pax.iter().filter_map(|(key, value)| Some((name(key)?, value.clone()))).collect()
    }
}

fn kind(header: &tar::Header, name: &[u8]) -> Result<Kind, String> {
    Ok(match header.as_bytes()[156] {
        // Before POSIX a directory was a file whose name ends in a slash.
        0 | b'0' if name.ends_with(b"/") => Kind::Directory,
        0 | b'0' | b'7' | b'S' => Kind::File,
        b'1' => Kind::HardLink,
        b'2' => Kind::Symlink,
        b'3' => Kind::CharDevice,
        b'4' => Kind::BlockDevice,
        b'5' => Kind::Directory,
        b'6' => Kind::Fifo,
        other => {
            return Err(format!("entry {:?} has unknown type {:?}", shown(name), char::from(other)));
        }
    })
}

fn decode(header: &tar::Header, extensions: &Extensions) -> Result<Entry, String> {
    let text = |e: std::io::Error| e.to_string();
    let name =
        ["GNU.sparse.name", "path"].iter().find_map(|key| extensions.text(key)).or(extensions.long_name.as_ref());
    let name = name.cloned().unwrap_or_else(|| header.path_bytes().into_owned());
    let kind = kind(header, &name)?;
    let link = extensions.text("linkpath").or(extensions.long_link.as_ref()).cloned();
    let link = link.or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned)).unwrap_or_default();
    let id = |key: &str, field: std::io::Result<u64>| -> Result<u32, String> {
        let id = extensions.number(key)?.map_or(field, Ok).map_err(text)?;
        u32::try_from(id).map_err(|_| format!("entry {:?} has {key} {id}, which does not exist", shown(&name)))
    };
    let (mtime, mtime_nsec) = match extensions.text("mtime") {
        Some(value) => pax_time(value).ok_or("PAX mtime is not a time")?,
        // A base-256 field may be negative.
        None => (header.mtime().map_err(text)? as i64, 0),
    };
    let device = match kind {
        Kind::CharDevice | Kind::BlockDevice => {
            (header.device_major().map_err(text)?.unwrap_or(0), header.device_minor().map_err(text)?.unwrap_or(0))
        }
        _ => (0, 0),
    };
    Ok(Entry {
        link,
        kind,
        mode: header.mode().map_err(text)? & 0o7777,
        uid: id("uid", header.uid())?,
        gid: id("gid", header.gid())?,
        mtime,
        mtime_nsec,
        device,
        xattrs: extensions.xattrs(),
        size: 0,
        data: Vec::new(),
        name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_messages_are_cut() {
        let error = refused(&[b'x'; 1 << 20], "is long").to_string();
        assert!(error.len() < 300 && error.contains("xxx...") && error.ends_with("is long"), "{error}");
    }

    #[test]
    fn pax_values_may_hold_any_byte() {
        let mut extensions = Extensions::default();
        extensions.parse(b"26 SCHILY.xattr.user.a=\n\0\n6 a=b\n").unwrap();
        assert_eq!(extensions.xattrs()[&b"user.a"[..]], b"\n\0");
        for bad in [&b"5 a=b\n"[..], b"7 a=b\n", b"a=b\n", b"6 a=bc", b"4 ab\n", b"99999999999999999999 a=b\n"] {
            assert!(Extensions::default().parse(bad).is_err(), "{bad:?}");
        }
    }
}
