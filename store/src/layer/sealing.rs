//! Writes a sealed index to the disk, and reads it back to check it: the index is never whole in memory.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::sealed::{Header, LEVEL, SEALED_HEADER_LEN};
use super::{HEADER_LEN, INODE_LEN, INODES, LayerHeader, PACK_LEN, PACKS, S_IFDIR, S_IFMT};
use crate::digest::{ContentDigest, Digest};
use crate::error::{Error, Result};
use crate::wire::Fields;

/// A reader or writer, with the digest and the number of the bytes that went through it.
struct Hashed<T> {
    inner: T,
    hasher: blake3::Hasher,
    len: u64,
}

impl<T> Hashed<T> {
    fn new(inner: T) -> Hashed<T> {
        Hashed { inner, hasher: blake3::Hasher::new(), len: 0 }
    }

    fn passed(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
    }

    fn digest(&self) -> ContentDigest {
        ContentDigest::from_bytes(*self.hasher.finalize().as_bytes())
    }
}

impl<T: Write> Write for Hashed<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.passed(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<T: Read> Read for Hashed<T> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(out)?;
        self.passed(&out[..count]);
        Ok(count)
    }
}

/// Writes the new file `path`, synced to disk: the sealed form of the raw index that `write` writes.
pub fn write_sealed(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let file = File::options().write(true).create_new(true).open(path).map_err(|e| Error::io("create", path, e))?;
    seal_into(&file, write).and_then(|()| file.sync_all()).map_err(|e| Error::io("write", path, e))
}

fn seal_into(mut file: &File, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    // Room for the header, which holds length and digest of what follows it.
    file.write_all(&[0; SEALED_HEADER_LEN])?;
    let mut raw = Hashed::new(zstd::Encoder::new(BufWriter::new(file), LEVEL)?);
    write(&mut raw)?;
    let header = Header { raw_len: raw.len, digest: raw.digest() }.encode();
    raw.inner.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.write_all_at(&header, 0)
}

/// Checks the sealed index of layer `diff_id` while reading it. Returns its header and the packs that it refers to.
pub(crate) fn check_sealed(mut sealed: impl Read, diff_id: &Digest) -> Result<(LayerHeader, Vec<ContentDigest>)> {
    let damaged = |why: &str| Error::corrupt(format!("the index of layer {diff_id}"), why);
    let mut head = [0; SEALED_HEADER_LEN];
    sealed.read_exact(&mut head).map_err(|_| damaged("it is too short"))?;
    let Header { raw_len: len, digest } = Header::decode(&head, diff_id)?;
    let broken = |_| damaged("zstd cannot decompress it");
    let decoder = zstd::Decoder::new(sealed).map_err(broken)?;
    let mut raw = Hashed::new(decoder.take(len));
    let mut header = [0; HEADER_LEN];
    raw.read_exact(&mut header).map_err(broken)?;
    let header = LayerHeader::decode(&header)?;
    let sections = header.sections(usize::try_from(len).unwrap_or(usize::MAX))?;
    let mut root = [0; INODE_LEN];
    raw.read_exact(&mut root).map_err(broken)?;
    if Fields::new("a layer's index", &root).u32()? & S_IFMT != S_IFDIR || header.counts[INODES] == 0 {
        return Err(damaged("its root is not a directory"));
    }
    let before = (sections.starts[PACKS] as u64).saturating_sub(raw.len);
    io::copy(&mut (&mut raw).take(before), &mut io::sink()).map_err(broken)?;
    let mut packs = Vec::new();
    for _ in 0..header.counts[PACKS] {
        let mut pack = [0; PACK_LEN];
        raw.read_exact(&mut pack).map_err(broken)?;
        packs.push(ContentDigest::from_bytes(pack));
    }
    io::copy(&mut raw, &mut io::sink()).map_err(broken)?;
    if raw.len != len || raw.digest() != digest {
        return Err(damaged("its bytes do not match their BLAKE3 digest"));
    }
    if header.diff_id == *diff_id { Ok((header, packs)) } else { Err(damaged("it is the index of another layer")) }
}
