//! A staged file whose length and digest are found while it is written: its content is never whole in memory.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::digest::ContentDigest;
use crate::error::{Error, Result};

/// A file that is being written.
#[derive(Debug)]
pub struct DigestedFile {
    path: PathBuf,
    file: BufWriter<File>,
    hasher: blake3::Hasher,
    len: u64,
}

impl DigestedFile {
    /// Starts the new file `path`.
    pub fn create(path: &Path) -> Result<DigestedFile> {
        let file = File::options().write(true).create_new(true).open(path).map_err(|e| Error::io("create", path, e))?;
        let file = BufWriter::with_capacity(256 << 10, file);
        Ok(DigestedFile { path: path.to_owned(), file, hasher: blake3::Hasher::new(), len: 0 })
    }

    /// Its path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Syncs it to disk; returns its length and the BLAKE3 digest of all its bytes.
    pub fn finish(self) -> Result<(u64, ContentDigest)> {
        let DigestedFile { path, file, hasher, len } = self;
        let file = file.into_inner().map_err(|e| Error::io("write", &path, e.into_error()))?;
        file.sync_all().map_err(|e| Error::io("sync", &path, e))?;
        Ok((len, ContentDigest::from_bytes(*hasher.finalize().as_bytes())))
    }
}

impl Write for DigestedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        self.len += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn length_and_digest_are_those_of_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let mut file = DigestedFile::create(&path).unwrap();
        for part in 0..1000u32 {
            file.write_all(&part.to_le_bytes().repeat(100)).unwrap();
        }
        let (len, digest) = file.finish().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!((len, digest), (bytes.len() as u64, ContentDigest::of(&bytes)));
        assert!(DigestedFile::create(&path).is_err(), "what is there is not overwritten");
    }
}
