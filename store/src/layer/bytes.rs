//! A raw index's bytes, in memory or read block by block.

use std::io;
use std::sync::Arc;

use super::format::INODE_LEN;
use crate::wire::Fields;

/// A raw index that is not in memory as a whole. Its bytes have been verified; every access is still bounds-checked.
pub trait Pages: Send + Sync {
    /// Its length, bytes.
    fn len(&self) -> usize;

    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Calls `take` once with exactly these bytes, which lie within its length.
    fn read(&self, offset: usize, len: usize, take: &mut dyn FnMut(&[u8])) -> io::Result<()>;
}

pub(super) enum Bytes {
    Paged(Arc<dyn Pages>),
    Owned(Vec<u8>),
}

impl Bytes {
    pub(super) fn len(&self) -> usize {
        match self {
            Bytes::Paged(pages) => pages.len(),
            Bytes::Owned(bytes) => bytes.len(),
        }
    }

    /// Calls `take` with the bytes of a range; `None` if it lies outside.
    pub(super) fn with<T>(&self, start: usize, len: usize, take: impl FnOnce(&[u8]) -> T) -> Option<io::Result<T>> {
        let end = start.checked_add(len).filter(|end| *end <= self.len())?;
        match self {
            Bytes::Owned(bytes) => bytes.get(start..end).map(|bytes| Ok(take(bytes))),
            Bytes::Paged(pages) => {
                let (mut take, mut taken) = (Some(take), None);
                let read = pages.read(start, len, &mut |bytes| {
                    if let Some(take) = take.take() {
                        taken = Some(take(bytes));
                    }
                });
                let given = taken.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof));
                Some(read.and(given))
            }
        }
    }
}

/// The bytes of one record.
pub(super) struct RawRecord {
    pub(super) bytes: [u8; INODE_LEN],
    pub(super) len: usize,
}

impl RawRecord {
    pub(super) fn fields(&self) -> Fields<'_> {
        Fields::new("a layer's index", &self.bytes[..self.len])
    }
}
