//! A layer's tar recipe, read block by block: it holds the headers and extended attributes of the layer's files, and
//! may be as large as the layer.
//!
//! It is read twice: first to the end, to compare its digest with the index's, and then again as it is needed. The
//! second time, each block is compared with what was read the first time, so that no byte is used that was not checked.

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;

use super::{Disk, Store};
use crate::digest::ContentDigest;
use crate::error::{Error, Result};
use crate::layer::LayerIndex;
use crate::recipe::RecipeReader;

/// Bytes of a recipe that are in memory at a time. Most recipes have one block, which is read once.
const BLOCK: u64 = 256 << 10;

/// The bytes of a recipe whose digest was checked.
pub struct RecipeBytes {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    len: u64,
    sums: Vec<ContentDigest>,
    /// The block in memory, and how many of its bytes were returned.
    block: Vec<u8>,
    given: usize,
    /// The number of the next block.
    next: usize,
}

impl std::fmt::Debug for RecipeBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RecipeBytes({})", self.path.display())
    }
}

impl RecipeBytes {
    fn read_block(&self, number: usize) -> io::Result<Vec<u8>> {
        let start = number as u64 * BLOCK;
        let len = self.len.saturating_sub(start).min(BLOCK);
        self.disk.read_at(&self.path, start, len as usize)
    }

    /// Reads the whole recipe, keeps the digest of each block, and returns that of the whole.
    fn check(&mut self) -> io::Result<ContentDigest> {
        let mut hasher = blake3::Hasher::new();
        for number in 0..self.len.div_ceil(BLOCK) as usize {
            let block = self.read_block(number)?;
            hasher.update(&block);
            self.sums.push(ContentDigest::of(&block));
            if number == 0 {
                (self.block, self.next) = (block, 1);
            }
        }
        Ok(ContentDigest::from_bytes(*hasher.finalize().as_bytes()))
    }
}

impl Drop for RecipeBytes {
    /// Closes the file. Recipes are read rarely, and an open descriptor keeps the space of a recipe that was removed
    /// meanwhile.
    fn drop(&mut self) {
        self.disk.forget(&self.path);
    }
}

impl Read for RecipeBytes {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.given == self.block.len() && self.next < self.sums.len() {
            let block = self.read_block(self.next)?;
            if self.sums[self.next] != ContentDigest::of(&block) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "its bytes have changed while it was read"));
            }
            (self.block, self.given) = (block, 0);
            self.next += 1;
        }
        let len = out.len().min(self.block.len() - self.given);
        out[..len].copy_from_slice(&self.block[self.given..self.given + len]);
        self.given += len;
        Ok(len)
    }
}

impl Store {
    /// A layer's tar recipe, verified against its index.
    pub fn recipe(&self, index: &LayerIndex) -> Result<RecipeReader<RecipeBytes>> {
        let (path, header) = (self.layout.recipe(&index.diff_id()), index.header());
        // A repair may have put another file in its place.
        self.disk.forget(&path);
        let mut bytes = RecipeBytes {
            disk: Arc::clone(&self.disk),
            path,
            len: header.recipe_len,
            sums: Vec::new(),
            block: Vec::new(),
            given: 0,
            next: 0,
        };
        let damaged = || {
            let what = format!("the tar recipe of layer {}", index.diff_id());
            Error::corrupt(what, "its bytes do not match their digest")
        };
        let found = bytes.check().map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => damaged(),
            _ => Error::io("read", &bytes.path, error),
        })?;
        if found == header.recipe_digest { RecipeReader::new(bytes) } else { Err(damaged()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reader::PosixDisk;

    #[test]
    fn blocks_are_what_was_checked_or_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("recipe");
        let content: Vec<u8> = (0..3 * BLOCK + 77).map(|n| (n / 7 % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let open = || {
            let (disk, len) = (Arc::new(PosixDisk::default()) as Arc<dyn Disk>, content.len() as u64);
            let (path, sums, block) = (path.clone(), Vec::new(), Vec::new());
            RecipeBytes { disk, path, len, sums, block, given: 0, next: 0 }
        };
        let mut bytes = open();
        assert_eq!(bytes.check().unwrap(), ContentDigest::of(&content));
        let mut read = Vec::new();
        bytes.read_to_end(&mut read).unwrap();
        assert!(read == content, "{} bytes", read.len());
        // A change between the check and the reading is noticed.
        let mut bytes = open();
        bytes.check().unwrap();
        let mut other = content.clone();
        other[2 * BLOCK as usize + 1] ^= 1;
        std::fs::write(&path, &other).unwrap();
        let error = bytes.read_to_end(&mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        std::fs::write(&path, &content[..5]).unwrap();
        assert_eq!(open().check().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
