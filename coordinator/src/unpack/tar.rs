//! The tar stream as entries. Every byte that is not a file's content goes into the recipe.
//!
//! The stream is parsed here, not by a library: the recipe needs each raw byte, a hostile stream must not choose how much memory is used,
//! and the entries must be those that Docker finds. Docker's readers are Go's `archive/tar` and tar-split, which parses the stream beside
//! it and refuses a path that comes twice. `header`: the fields; `pax` and `sparse`: what extended headers say.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::PathBuf;

use store::layer::InodeIndex;
use store::publisher::DigestedFile;
use store::recipe::RecipeWriter;

use super::bounds::{SPECIAL_MAX, UNUSED_MAX};
use super::error::UnpackError;
use super::header::{BLOCK, Header, until_nul};
use super::paths::{Cleaned, Named};
use super::pax::{Extended, Numbers};
use super::sparse::{self, MapText, Place};

/// Names in messages are cut after this many bytes.
const SHOWN: usize = 200;

/// What an entry creates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
    /// Types that no engine extracts: contiguous files; GNU's volume labels, continuations and snapshots; undefined ones.
    Other(u8),
}

impl Kind {
    /// The kind for a type byte. `name` is the entry's, as the tar has it: before POSIX, a directory was a file whose name ends in a slash.
    fn of(byte: u8, name: &[u8]) -> Kind {
        match byte {
            0 if name.ends_with(b"/") => Kind::Directory,
            0 | b'0' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => Kind::Other(other),
        }
    }

    fn has_content(self) -> bool {
        matches!(self, Kind::File | Kind::Other(_))
    }
}

/// One entry of the tar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TarEntry {
    /// The name, as the tar has it.
    pub(super) name: Vec<u8>,
    /// A link's target.
    pub(super) link: Vec<u8>,
    pub(super) kind: Kind,
    pub(super) mode: u32,
    /// The largest number keeps the present owner, as with chown.
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

/// PAX and GNU headers that apply to the next entry. Of each kind, the last one counts.
#[derive(Default)]
struct Extensions {
    pax: Extended,
    long_name: Vec<u8>,
    long_link: Vec<u8>,
}

/// Walks over a tar stream.
pub(super) struct TarReader<R> {
    input: R,
    at: u64,
    recipe: RecipeWriter<DigestedFile>,
    recipe_path: PathBuf,
    /// Bytes of the current entry that have not been read: content, then padding.
    content: u64,
    padding: u64,
    /// Bytes of the current entry's extended headers.
    special: u64,
    /// Bytes so far that mean nothing.
    unused: u64,
    named: Named,
}

impl<R: Read> TarReader<R> {
    /// Reads `input` and writes the recipe into `recipe`.
    pub(super) fn new(input: R, recipe: DigestedFile) -> Result<TarReader<R>, UnpackError> {
        let recipe_path = recipe.path().to_owned();
        let recipe = RecipeWriter::new(recipe).map_err(|e| store::Error::io("write", &recipe_path, e))?;
        let (content, padding, special, unused) = (0, 0, 0, 0);
        Ok(TarReader { input, at: 0, recipe, recipe_path, content, padding, special, unused, named: Named::default() })
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

    /// Fills `out` until it is full or the stream ends.
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
        if self.fill(out)? == out.len() { Ok(()) } else { Err(self.invalid("it ends in the middle of an entry")) }
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

    /// Moves the padding after an entry into the recipe. The stream may end without it, and without all that should follow: umoci ends a
    /// layer like that, and Docker accepts it.
    fn pass_padding(&mut self, len: u64) -> Result<(), UnpackError> {
        let mut buffer = [0; BLOCK];
        let filled = self.fill(&mut buffer[..len as usize])?;
        self.literal(&buffer[..filled])
    }

    /// Skips the current entry's content: it only goes into the recipe.
    pub(super) fn ignore_content(&mut self, entry: &TarEntry) -> Result<(), UnpackError> {
        self.unused = self.unused.saturating_add(self.content);
        if self.unused > UNUSED_MAX {
            Err(refused(&entry.name, "has content that means nothing, more than 64 MiB of it with that before"))
        } else {
            Ok(())
        }
    }

    /// Moves the content of a special entry into the recipe and returns it.
    fn special(&mut self, header: &Header) -> Result<Vec<u8>, UnpackError> {
        let size = self.length(header.size)?;
        self.special = self.special.saturating_add(size);
        if self.special > SPECIAL_MAX {
            return Err(self.invalid("an entry has extended headers longer than 1 MiB"));
        }
        let mut bytes = vec![0; size as usize];
        self.exact(&mut bytes)?;
        self.literal(&bytes)?;
        self.pass_padding(padding(size))?;
        Ok(bytes)
    }

    fn length(&self, size: i64) -> Result<u64, UnpackError> {
        u64::try_from(size).map_err(|_| self.invalid("an entry has a size below zero"))
    }

    /// The next header block. `None` at the archive's end, once everything after it is in the recipe.
    fn header(&mut self) -> Result<Option<Header>, UnpackError> {
        let mut block = [0; BLOCK];
        match self.fill(&mut block)? {
            0 => return Ok(None),
            BLOCK => {}
            _ => return Err(self.invalid("it ends in the middle of a header")),
        }
        self.literal(&block)?;
        if block.iter().all(|byte| *byte == 0) {
            self.trailer()?;
            return Ok(None);
        }
        Header::decode(&block).map(Some).map_err(|why| self.invalid(why))
    }

    /// Reads what follows the first zero block: another one, or the end of the stream; then whatever else there is.
    fn trailer(&mut self) -> Result<(), UnpackError> {
        let mut buffer = [0; 16 * BLOCK];
        let mut filled = self.fill(&mut buffer[..BLOCK])?;
        if !matches!(filled, 0 | BLOCK) || buffer[..filled].iter().any(|byte| *byte != 0) {
            return Err(self.invalid("a header is missing"));
        }
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

    /// The next entry. Unread content of the one before goes into the recipe as it is.
    pub(super) fn next_entry(&mut self) -> Result<Option<TarEntry>, UnpackError> {
        let (content, behind) = (self.content, self.padding);
        (self.content, self.padding) = (0, 0);
        self.pass(content)?;
        self.pass_padding(behind)?;
        self.special = 0;
        let mut extensions = Extensions::default();
        loop {
            let Some(header) = self.header()? else { return Ok(None) };
            match header.kind {
                b'x' => {
                    let bytes = self.special(&header)?;
                    extensions.pax = Extended::parse(&bytes).map_err(|why| self.invalid(why))?;
                }
                b'g' => {
                    self.global(&header)?;
                    extensions = Extensions::default();
                }
                b'L' => extensions.long_name = until_nul(&self.special(&header)?).to_vec(),
                b'K' => extensions.long_link = until_nul(&self.special(&header)?).to_vec(),
                _ => return self.entry(&header, extensions).map(Some),
            }
        }
    }

    /// Reads a global header. It describes the archive (git writes its commit there), and Docker uses nothing of it, but it counts as an
    /// entry with a name.
    fn global(&mut self, header: &Header) -> Result<(), UnpackError> {
        self.special = 0;
        let bytes = self.special(header)?;
        self.special = 0;
        let said = Extended::parse(&bytes).map_err(|why| self.invalid(why))?;
        self.name(said.text("path").unwrap_or(&header.name))
    }

    /// Records a path that the archive names; an error if it has named the path before.
    fn name(&mut self, name: &[u8]) -> Result<(), UnpackError> {
        self.named.add(&Cleaned::new(name)).map_err(|why| refused(name, why))
    }

    fn entry(&mut self, header: &Header, extensions: Extensions) -> Result<TarEntry, UnpackError> {
        if !header.has_no_content() {
            self.length(header.size)?;
        }
        let numbers = extensions.pax.numbers().map_err(|why| self.invalid(why))?;
        let mut entry = decode(header, &extensions, &numbers);
        if header.kind == b'S' {
            return Err(refused(&entry.name, "is sparse in the old way of GNU tar, which Docker refuses"));
        }
        let place = sparse::place(&extensions.pax);
        if !entry.kind.has_content() {
            self.name(&entry.name)?;
            // Only a file can have a map.
            return place.map_or(Ok(()), |_| Err(refused(&entry.name, "is sparse and no file"))).map(|()| entry);
        }
        let stored = self.length(numbers.size.unwrap_or(header.size))?;
        (self.content, self.padding) = (stored, padding(stored));
        (entry.size, entry.data) = (stored, vec![(0, stored)]);
        if let Some(place) = place {
            self.sparse(&mut entry, &extensions.pax, place)?;
        }
        self.name(&entry.name)?;
        Ok(entry)
    }

    /// Gives a sparse file its name, its length and its ranges.
    fn sparse(&mut self, entry: &mut TarEntry, pax: &Extended, place: Place) -> Result<(), UnpackError> {
        if let Some(name) = pax.text("GNU.sparse.name") {
            entry.name = name.to_vec();
        }
        let refuse = |why| refused(&entry.name, why);
        if let Some(size) = sparse::real_size(pax).map_err(refuse)? {
            entry.size = self.length(size)?;
        }
        let numbers = match place {
            Place::Records => sparse::numbers(pax).map_err(refuse)?,
            Place::Content => self.map_before_data()?,
        };
        entry.data = sparse::ranges(&numbers, entry.size, self.content).map_err(refuse)?;
        Ok(())
    }

    /// PAX 1.0: the map precedes the data, as decimal lines, in whole blocks.
    fn map_before_data(&mut self) -> Result<Vec<i64>, UnpackError> {
        let mut map = MapText::default();
        loop {
            let mut block = [0; BLOCK];
            if self.content < BLOCK as u64 || map.len > SPECIAL_MAX {
                return Err(self.invalid("a sparse file's map is damaged"));
            }
            self.exact(&mut block)?;
            self.literal(&block)?;
            self.content -= BLOCK as u64;
            if let Some(numbers) = map.add(&block).map_err(|why| self.invalid(why))? {
                return Ok(numbers);
            }
        }
    }

    /// Reads the current entry's content into `out`, in order. The caller records it with [`TarReader::content`].
    pub(super) fn read(&mut self, out: &mut [u8]) -> Result<(), UnpackError> {
        if out.len() as u64 > self.content {
            return Err(self.invalid("a sparse file's map is longer than its data"));
        }
        self.exact(out)?;
        self.content -= out.len() as u64;
        Ok(())
    }

    /// Records in the recipe that the bytes just read are a range of an inode's content.
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

/// A name for a message, shortened: a stranger's name may have a megabyte.
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

/// The entry without its content. GNU's long names take precedence over PAX's, and these over the header's.
fn decode(header: &Header, extensions: &Extensions, said: &Numbers) -> TarEntry {
    let pax = &extensions.pax;
    let text = |long: &Vec<u8>, key: &str, short: &Vec<u8>| {
        if long.is_empty() { pax.text(key).unwrap_or(short).to_vec() } else { long.clone() }
    };
    let name = text(&extensions.long_name, "path", &header.name);
    let kind = Kind::of(header.kind, &name);
    let (mtime, mtime_nsec) = said.mtime.unwrap_or((header.mtime, 0));
    // The kernel takes 32 bits of an owner. Docker takes 12 bits of a device's major number and 20 of its minor number.
    let (uid, gid) = (said.uid.unwrap_or(header.uid) as u32, said.gid.unwrap_or(header.gid) as u32);
    let device = match kind {
        Kind::CharDevice | Kind::BlockDevice => (header.device.0 as u32 & 0xfff, header.device.1 as u32 & 0xf_ffff),
        _ => (0, 0),
    };
    TarEntry {
        link: text(&extensions.long_link, "linkpath", &header.link),
        kind,
        mode: header.mode as u32 & 0o7777,
        uid,
        gid,
        mtime,
        mtime_nsec,
        device,
        xattrs: pax.xattrs(),
        size: 0,
        data: Vec::new(),
        name,
    }
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
    fn only_the_oldest_files_with_a_slash_are_directories() {
        assert_eq!(
            [Kind::of(0, b"d/"), Kind::of(b'0', b"d/"), Kind::of(0, b"d")],
            [Kind::Directory, Kind::File, Kind::File]
        );
        assert_eq!([Kind::of(b'7', b"f"), Kind::of(b'V', b"f")], [Kind::Other(b'7'), Kind::Other(b'V')]);
    }
}
