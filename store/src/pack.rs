//! Packs: files of compressed chunks, appended one after the other, named by the BLAKE3 digest of all their bytes.
//!
//! ```text
//! header   16 bytes   magic "CFSPACK\0", version u32, reserved u32
//! chunks              back to back
//! table    56 bytes per chunk: offset u64, stored_len u32, raw_len u32, codec u32, reserved u32, BLAKE3 of the raw bytes
//! trailer  48 bytes   BLAKE3 of the table, number of chunks u64, magic "CFSPEND\0"
//! ```
//!
//! Indexes say where chunks lie, so readers never need the table; it makes a pack self-describing for repair.
//!
//! - `thinned`: packs of which only a part is still needed.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::chunk::{ChunkRef, Codec, StoredChunk};
use crate::digest::ContentDigest;
use crate::error::{Error, Result};
use crate::wire::{Fields, Put};

pub mod thinned;

/// First bytes of a pack.
pub const MAGIC: &[u8; 8] = b"CFSPACK\0";
/// Last bytes of a pack.
pub const END_MAGIC: &[u8; 8] = b"CFSPEND\0";
/// Version of the pack format.
pub const VERSION: u32 = 1;
/// Bytes before the first chunk.
pub const HEADER_LEN: u64 = 16;
const RECORD_LEN: usize = 56;
const TRAILER_LEN: usize = 48;

/// A chunk's place in a pack, without the pack's name: while a pack is being written, its name is not known yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placed {
    /// First byte within the pack.
    pub offset: u64,
    /// Bytes in the pack.
    pub stored_len: u32,
    /// Bytes after decompression.
    pub raw_len: u32,
    /// How the bytes are stored.
    pub codec: Codec,
    /// BLAKE3 of the raw bytes.
    pub digest: ContentDigest,
}

impl Placed {
    /// The complete reference, once the pack has its name.
    pub fn in_pack(&self, pack: ContentDigest) -> ChunkRef {
        let Placed { offset, stored_len, raw_len, codec, digest } = *self;
        ChunkRef { pack, offset, stored_len, raw_len, codec, digest }
    }
}

/// Writes one pack into a staging file.
#[derive(Debug)]
pub struct PackWriter {
    path: PathBuf,
    file: BufWriter<File>,
    hasher: blake3::Hasher,
    offset: u64,
    table: Vec<u8>,
}

impl PackWriter {
    /// Starts a pack in the new file `path`.
    pub fn create(path: &Path) -> Result<PackWriter> {
        let file = File::options().write(true).read(true).create_new(true).open(path);
        let file = file.map_err(|e| Error::io("create", path, e))?;
        let mut pack = PackWriter {
            path: path.to_owned(),
            file: BufWriter::with_capacity(1 << 20, file),
            hasher: blake3::Hasher::new(),
            offset: 0,
            table: Vec::new(),
        };
        let mut header = Vec::with_capacity(HEADER_LEN as usize);
        header.put_bytes(MAGIC);
        header.put_u32(VERSION);
        header.put_u32(0);
        pack.write(&header)?;
        Ok(pack)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.offset += bytes.len() as u64;
        self.file.write_all(bytes).map_err(|e| Error::io("write", &self.path, e))
    }

    /// Appends a chunk.
    pub fn append(&mut self, chunk: &StoredChunk) -> Result<Placed> {
        let placed = Placed {
            offset: self.offset,
            stored_len: chunk.bytes.len() as u32,
            raw_len: chunk.raw_len,
            codec: chunk.codec,
            digest: chunk.digest,
        };
        self.write(&chunk.bytes)?;
        self.table.put_u64(placed.offset);
        self.table.put_u32(placed.stored_len);
        self.table.put_u32(placed.raw_len);
        self.table.put_u32(u32::from(placed.codec.number()));
        self.table.put_u32(0);
        self.table.put_bytes(placed.digest.as_bytes());
        Ok(placed)
    }

    /// Whether no chunk has been appended.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// Writes the table and the trailer, syncs the file to disk, and returns the pack's name.
    pub fn finish(mut self) -> Result<ContentDigest> {
        let table = std::mem::take(&mut self.table);
        let mut trailer = Vec::with_capacity(TRAILER_LEN);
        trailer.put_bytes(ContentDigest::of(&table).as_bytes());
        trailer.put_u64((table.len() / RECORD_LEN) as u64);
        trailer.put_bytes(END_MAGIC);
        self.write(&table)?;
        self.write(&trailer)?;
        let name = ContentDigest::from_bytes(*self.hasher.finalize().as_bytes());
        let path = self.path;
        let file = self.file.into_inner().map_err(|e| Error::io("write", &path, e.into_error()))?;
        file.sync_all().map_err(|e| Error::io("sync", &path, e))?;
        Ok(name)
    }
}

/// BLAKE3 of a whole file.
pub fn digest_of(path: &Path) -> Result<ContentDigest> {
    digest_until(path, &|| false)
}

/// Like [`digest_of`], but fails once `stopped` says that nobody wants the result any more.
fn digest_until(path: &Path, stopped: &dyn Fn() -> bool) -> Result<ContentDigest> {
    let mut file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        if stopped() {
            return Err(Error::io("read back", path, std::io::ErrorKind::Interrupted.into()));
        }
        match file.read(&mut buffer).map_err(|e| Error::io("read", path, e))? {
            0 => break,
            n => _ = hasher.update(&buffer[..n]),
        }
    }
    Ok(ContentDigest::from_bytes(*hasher.finalize().as_bytes()))
}

/// Reads a whole pack and compares it with its name. A pack that was thinned does not match; see [`thinned::inspect`].
pub fn verify(path: &Path, name: &ContentDigest) -> Result<()> {
    verify_until(path, name, &|| false)
}

/// Like [`verify`], but fails once `stopped` says that nobody wants the result any more.
pub(crate) fn verify_until(path: &Path, name: &ContentDigest, stopped: &dyn Fn() -> bool) -> Result<()> {
    if digest_until(path, stopped)? == *name {
        Ok(())
    } else {
        Err(Error::corrupt(format!("pack {}", path.display()), "its bytes do not match its name"))
    }
}

/// Reads a pack's own table: the chunks that it holds, without any index.
pub fn chunks(path: &Path, name: ContentDigest) -> Result<Vec<ChunkRef>> {
    let what = || format!("pack {}", path.display());
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let len = file.metadata().map_err(|e| Error::io("read", path, e))?.len();
    let trailer_at = len.checked_sub(TRAILER_LEN as u64).ok_or_else(|| Error::corrupt(what(), "it is too short"))?;
    let mut trailer = [0; TRAILER_LEN];
    file.read_exact_at(&mut trailer, trailer_at).map_err(|e| Error::io("read", path, e))?;
    let mut fields = Fields::new("a pack's trailer", &trailer);
    let digest = ContentDigest::from_bytes(fields.array()?);
    let count = fields.u64()?;
    if fields.bytes(8)? != END_MAGIC {
        return Err(Error::corrupt(what(), "its end is missing"));
    }
    let table_len = count.checked_mul(RECORD_LEN as u64).filter(|n| n + HEADER_LEN <= trailer_at);
    let table_len = table_len.ok_or_else(|| Error::corrupt(what(), "its table is longer than the pack"))?;
    let mut table = vec![0; table_len as usize];
    file.read_exact_at(&mut table, trailer_at - table_len).map_err(|e| Error::io("read", path, e))?;
    if ContentDigest::of(&table) != digest {
        return Err(Error::corrupt(what(), "its table does not match its checksum"));
    }
    table.chunks_exact(RECORD_LEN).map(|record| read_record(record, name)).collect()
}

fn read_record(record: &[u8], pack: ContentDigest) -> Result<ChunkRef> {
    let mut fields = Fields::new("a pack's table", record);
    let (offset, stored_len, raw_len) = (fields.u64()?, fields.u32()?, fields.u32()?);
    let codec = Codec::from_number(fields.u32()?.try_into().unwrap_or(u8::MAX))?;
    fields.u32()?;
    Ok(ChunkRef { pack, offset, stored_len, raw_len, codec, digest: ContentDigest::from_bytes(fields.array()?) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::compress;

    #[test]
    fn a_pack_describes_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pack");
        let mut pack = PackWriter::create(&path).unwrap();
        assert!(pack.is_empty());
        let placed: Vec<_> =
            [&b"one"[..], &[7; 9000]].iter().map(|raw| pack.append(&compress(raw).unwrap()).unwrap()).collect();
        let name = pack.finish().unwrap();
        verify(&path, &name).unwrap();
        let expected: Vec<_> = placed.iter().map(|p| p.in_pack(name)).collect();
        assert_eq!(chunks(&path, name).unwrap(), expected);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(&bytes[..16], b"CFSPACK\0\x01\0\0\0\0\0\0\0");
        assert_eq!(name, ContentDigest::of(&bytes));
        for len in 0..bytes.len() {
            std::fs::write(&path, &bytes[..len]).unwrap();
            assert!(chunks(&path, name).is_err() && verify(&path, &name).is_err(), "truncated to {len}");
        }
    }
}
