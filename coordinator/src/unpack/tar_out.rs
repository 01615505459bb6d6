//! The tar stream from the store: the recipe's literal bytes, and the files' content between them.

use std::io::Write;

use store::chunk::VerifiedChunk;
use store::digest::Sha256;
use store::layer::{Inode, LayerIndex, Source};
use store::reader::Store;
use store::recipe::Segment;
use store::{Digest, Error};

use super::UnpackError;

/// Reads ranges of files, keeping the last chunk: neighbours in the tar are neighbours in it.
struct Contents<'a> {
    store: &'a Store,
    index: &'a LayerIndex,
    last: Option<(u32, VerifiedChunk)>,
}

impl Contents<'_> {
    fn chunk(&mut self, number: u32) -> Result<&VerifiedChunk, Error> {
        if self.last.as_ref().is_none_or(|(last, _)| *last != number) {
            let chunk = self.store.read_chunk(&self.index.chunk(number)?)?;
            self.last = Some((number, chunk));
        }
        let missing = || Error::corrupt("a chunk", "it was dropped while in use");
        self.last.as_ref().map(|(_, chunk)| chunk).ok_or_else(missing)
    }

    /// Gives the bytes `offset..offset + len` of a file to `out`, part by part.
    fn range(
        &mut self,
        file: &Inode,
        offset: u64,
        len: u64,
        mut out: impl FnMut(&[u8]) -> Result<(), UnpackError>,
    ) -> Result<(), UnpackError> {
        let piece_size = u64::from(self.index.header().piece_size);
        let (mut at, end) = (offset, offset.saturating_add(len));
        while at < end {
            let piece = self.index.piece(file, u32::try_from(at / piece_size).unwrap_or(u32::MAX))?;
            let skip = (at - piece.offset) as usize;
            let n = (u64::from(piece.len) - skip as u64).min(end - at) as usize;
            match piece.source {
                Source::Hole => out(&vec![0; n])?,
                Source::Chunk { number, start, .. } => {
                    let chunk = self.chunk(number)?;
                    let bytes = chunk.piece(start, piece.len).and_then(|piece| piece.get(skip..skip + n));
                    out(bytes.ok_or_else(|| Error::corrupt("a layer's index", "a piece lies outside its chunk"))?)?;
                }
            }
            at += n as u64;
        }
        Ok(())
    }
}

/// Writes a layer's tar stream, byte for byte as it was pulled; fails if it does not match its diffID. Bytes may have been
/// written by then.
pub fn write_layer_tar(store: &Store, diff_id: &Digest, out: &mut impl Write) -> Result<(), UnpackError> {
    let index = store.index(diff_id)?;
    let mut contents = Contents { store, index: &index, last: None };
    let mut hasher = Sha256::new();
    let mut put = |bytes: &[u8]| {
        hasher.update(bytes);
        out.write_all(bytes).map_err(UnpackError::Read)
    };
    for segment in store.recipe(&index)? {
        match segment? {
            Segment::Literal(bytes) => put(&bytes)?,
            Segment::Content { inode, offset, len, .. } => {
                let file = index.inode(inode)?;
                contents.range(&file, offset, len, &mut put)?;
            }
        }
    }
    let found = hasher.finish();
    match found == *diff_id {
        true => Ok(()),
        false => Err(UnpackError::DiffId { expected: *diff_id, found }),
    }
}
