//! Thinned packs: only the chunks that are still in use, each where it always was, and holes elsewhere.
//!
//! ```text
//! header     16 bytes   magic "CFSTHIN\0", version u32, reserved u32
//! digests    64 bytes   BLAKE3 of the thinned pack, BLAKE3 of the file that it replaced
//! count       8 bytes   number of live chunks u64
//! offsets     8 bytes a live chunk, ascending
//! checksum   32 bytes   BLAKE3 of all of the above
//! ```
//!
//! No index changes and no reader notices, because nobody reads the holes. But the file's bytes no longer match its
//! name; the record beside it, `<pack>.thinned`, tells a thinned pack from a damaged one. The record is put in place
//! first and knows the digests of the file before and after, so it describes the pack even if a crash comes between the
//! two. A pack that matches its name is whole, whatever lies beside it.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::chunk::{ChunkRef, RawChunk};
use crate::digest::ContentDigest;
use crate::durable::drop_cached;
use crate::error::{Error, Result};
use crate::pack::{self, HEADER_LEN};
use crate::wire::{Fields, Put};

/// First bytes of the record of a thinned pack.
pub const MAGIC: &[u8; 8] = b"CFSTHIN\0";
/// Version of the record's format.
pub const VERSION: u32 = 1;
/// What is appended to a pack's name to get that of its record.
pub const SUFFIX: &str = ".thinned";
/// Length of the record without the offsets.
const FIXED_LEN: usize = 120;

/// The record of a thinned pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thinned {
    /// BLAKE3 of the thinned pack's bytes.
    pub digest: ContentDigest,
    /// BLAKE3 of the file that it replaces: the pack's name, unless that one was thinned already.
    pub replaced: ContentDigest,
    /// Where the chunks that it still has begin, ascending.
    pub live: Vec<u64>,
}

/// The state of a pack's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PackState {
    /// Its bytes match its name: it has all of its chunks.
    Whole,
    /// Only these chunks are there.
    Thinned(Thinned),
}

/// The path of the record beside a pack.
pub fn record_path(pack: &Path) -> PathBuf {
    let mut name = pack.as_os_str().to_owned();
    name.push(SUFFIX);
    name.into()
}

impl Thinned {
    /// The record's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(FIXED_LEN + 8 * self.live.len());
        out.put_bytes(MAGIC);
        out.put_u32(VERSION);
        out.put_u32(0);
        out.put_bytes(self.digest.as_bytes());
        out.put_bytes(self.replaced.as_bytes());
        out.put_u64(self.live.len() as u64);
        self.live.iter().for_each(|offset| out.put_u64(*offset));
        let checksum = ContentDigest::of(&out);
        out.put_bytes(checksum.as_bytes());
        out
    }

    /// Reads a record's bytes.
    pub fn decode(bytes: &[u8]) -> Result<Thinned> {
        let damaged = |why: &str| Error::corrupt("the record of a thinned pack", why);
        let mut fields = Fields::new("the record of a thinned pack", bytes);
        if fields.bytes(8)? != MAGIC {
            return Err(damaged("its first bytes are wrong"));
        }
        let version = fields.u32()?;
        if version != VERSION {
            let why = format!("it has version {version}");
            return Err(Error::Unsupported { what: "the record of a thinned pack".into(), why });
        }
        fields.u32()?;
        let digest = ContentDigest::from_bytes(fields.array()?);
        let replaced = ContentDigest::from_bytes(fields.array()?);
        let count = fields.u64()?;
        if bytes.len().checked_sub(FIXED_LEN).map(|rest| rest as u64) != count.checked_mul(8) {
            return Err(damaged("its length differs from the number of its chunks"));
        }
        let live = (0..count).map(|_| fields.u64()).collect::<Result<Vec<_>>>()?;
        if ContentDigest::of(&bytes[..bytes.len() - 32]) == ContentDigest::from_bytes(fields.array()?) {
            Ok(Thinned { digest, replaced, live })
        } else {
            Err(damaged("its bytes do not match their checksum"))
        }
    }

    /// The record beside the pack at `path`; `None` if there is none.
    pub fn beside(path: &Path) -> Result<Option<Thinned>> {
        let record = record_path(path);
        match std::fs::read(&record) {
            Ok(bytes) => Thinned::decode(&bytes).map(Some),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io("read", &record, e)),
        }
    }
}

/// Reads a whole pack and tells whether it is whole, thinned, or damaged ([`Error::Corrupt`]).
pub fn inspect(path: &Path, name: &ContentDigest) -> Result<PackState> {
    let digest = pack::digest_of(path)?;
    if digest == *name {
        return Ok(PackState::Whole);
    }
    match Thinned::beside(path)? {
        Some(thinned) if [thinned.digest, thinned.replaced].contains(&digest) => Ok(PackState::Thinned(thinned)),
        Some(_) => {
            Err(Error::corrupt(format!("pack {}", path.display()), "its bytes match neither its name nor its record"))
        }
        None => Err(Error::corrupt(format!("pack {}", path.display()), "its bytes do not match its name")),
    }
}

/// Writes the thinned form of the pack `from` into the new file `to`, synced and read back: header, table, and the chunks
/// `live`, each verified. Refused as [`Error::Corrupt`] if `live` are not chunks of the pack or are damaged.
pub(crate) fn write(from: &Path, name: ContentDigest, live: &[ChunkRef], to: &Path) -> Result<Thinned> {
    let known: HashMap<u64, ChunkRef> =
        pack::chunks(from, name)?.into_iter().map(|chunk| (chunk.offset, chunk)).collect();
    if let Some(unknown) = live.iter().find(|chunk| known.get(&chunk.offset) != Some(chunk)) {
        let why = format!("an index names a chunk at {} that it does not list", unknown.offset);
        return Err(Error::corrupt(format!("pack {name}"), why));
    }
    let replaced = match Thinned::beside(from)? {
        Some(_) => pack::digest_of(from)?,
        None => name,
    };
    let source = File::open(from).map_err(|e| Error::io("open", from, e))?;
    let len = source.metadata().map_err(|e| Error::io("read", from, e))?.len();
    let file = File::options().write(true).create_new(true).open(to).map_err(|e| Error::io("create", to, e))?;
    file.set_len(len).map_err(|e| Error::io("write", to, e))?;
    let copy = |offset: u64, bytes: &[u8]| file.write_all_at(bytes, offset).map_err(|e| Error::io("write", to, e));
    let tail_at = known.values().map(|chunk| chunk.offset + u64::from(chunk.stored_len)).max().unwrap_or(HEADER_LEN);
    copy(0, &read(&source, from, 0, HEADER_LEN)?)?;
    copy(tail_at, &read(&source, from, tail_at, len.saturating_sub(tail_at))?)?;
    for chunk in live {
        let stored = read(&source, from, chunk.offset, chunk.stored_len.into())?;
        copy(chunk.offset, &stored)?;
        RawChunk::new(*chunk, stored).verify()?;
    }
    file.sync_all().map_err(|e| Error::io("sync", to, e))?;
    drop_cached(to);
    let back = File::open(to).map_err(|e| Error::io("read back", to, e))?;
    for chunk in live {
        RawChunk::new(*chunk, read(&back, to, chunk.offset, chunk.stored_len.into())?).verify()?;
    }
    if pack::chunks(to, name)?.len() != known.len() {
        return Err(Error::corrupt(format!("pack {}", to.display()), "its table reads back differently"));
    }
    let mut offsets: Vec<u64> = live.iter().map(|chunk| chunk.offset).collect();
    offsets.sort_unstable();
    offsets.dedup();
    Ok(Thinned { digest: pack::digest_of(to)?, replaced, live: offsets })
}

fn read(file: &File, path: &Path, offset: u64, len: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, offset).map_err(|e| Error::io("read", path, e))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::compress;
    use crate::pack::PackWriter;

    fn noise(seed: u64, len: usize) -> Vec<u8> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        (0..len).map(|_| next()).collect()
    }

    /// A pack of chunks that do not compress.
    fn pack_of(path: &Path, chunks: u64) -> (ContentDigest, Vec<ChunkRef>) {
        let mut writer = PackWriter::create(path).unwrap();
        let placed: Vec<_> =
            (0..chunks).map(|n| writer.append(&compress(&noise(n, 200_000)).unwrap()).unwrap()).collect();
        let name = writer.finish().unwrap();
        (name, placed.iter().map(|placed| placed.in_pack(name)).collect())
    }

    #[test]
    fn a_thinned_pack_has_its_live_chunks_where_they_were_and_takes_less_room() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("p"), dir.path().join("q"));
        let (name, chunks) = pack_of(&from, 10);
        let live = [chunks[3], chunks[7]];
        let thinned = write(&from, name, &live, &to).unwrap();
        assert_eq!((thinned.replaced, &thinned.live), (name, &vec![chunks[3].offset, chunks[7].offset]));
        let (before, after) = (std::fs::metadata(&from).unwrap(), std::fs::metadata(&to).unwrap());
        assert_eq!(before.len(), after.len());
        assert!(after.blocks() * 512 < 440_000 && before.blocks() * 512 > 1_900_000, "{}", after.blocks());
        assert_eq!(pack::chunks(&to, name).unwrap(), chunks, "the table is whole");
        let bytes = std::fs::read(&to).unwrap();
        for (number, chunk) in (0..).zip(&chunks) {
            let start = chunk.offset as usize;
            let raw = RawChunk::new(*chunk, bytes[start..start + chunk.stored_len as usize].to_vec()).verify();
            assert_eq!(raw.is_ok(), [3, 7].contains(&number), "chunk {number}");
        }
    }

    #[test]
    fn a_record_tells_thinned_from_damaged_at_every_step() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p");
        let (name, chunks) = pack_of(&path, 4);
        assert_eq!(inspect(&path, &name).unwrap(), PackState::Whole);
        let mut live = chunks.clone();
        while live.pop().is_some() {
            let next = dir.path().join(format!("next{}", live.len()));
            let thinned = write(&path, name, &live, &next).unwrap();
            std::fs::write(record_path(&path), thinned.encode()).unwrap();
            // The record is in place, the thinned pack not yet.
            let between = inspect(&path, &name).unwrap();
            assert!(matches!(between, PackState::Whole) == (live.len() == 3), "{between:?}");
            std::fs::rename(&next, &path).unwrap();
            assert_eq!(inspect(&path, &name).unwrap(), PackState::Thinned(thinned));
        }
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[20] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert!(inspect(&path, &name).is_err());
    }

    #[test]
    fn damaged_records_and_chunks_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p");
        let (name, chunks) = pack_of(&path, 3);
        let record = Thinned { digest: name, replaced: ContentDigest::of(b"x"), live: vec![16, 99] }.encode();
        assert_eq!(Thinned::decode(&record).unwrap().live, [16, 99]);
        for at in 0..record.len() {
            let mut bad = record.clone();
            bad[at] ^= 4;
            let refused = Thinned::decode(&bad).is_err();
            assert!(refused && Thinned::decode(&record[..at]).is_err(), "byte {at}");
        }
        let unknown = ChunkRef { offset: 17, ..chunks[0] };
        assert!(write(&path, name, &[unknown], &dir.path().join("a")).is_err());
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[chunks[1].offset as usize + 5] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert!(write(&path, name, &chunks[1..2], &dir.path().join("b")).is_err(), "a damaged chunk is not carried on");
        write(&path, name, &chunks[2..], &dir.path().join("c")).unwrap();
    }
}
