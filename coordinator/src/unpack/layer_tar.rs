//! A layer's tar in blocks, produced on request, so that a slow reader holds no thread meanwhile.

use std::io::Write;
use std::sync::Arc;

use store::chunk::VerifiedChunk;
use store::digest::Sha256;
use store::layer::{Inode, LayerIndex, Source};
use store::reader::Store;
use store::reader::recipes::RecipeBytes;
use store::recipe::{RecipeReader, Segment};
use store::{Digest, Error};

use super::error::UnpackError;

/// What comes next in the stream.
enum Next {
    /// The next segment of the recipe.
    Segment,
    /// The rest of literal bytes, from this position on.
    Literal(Vec<u8>, usize),
    /// A range of a file's content.
    Content { file: Inode, at: u64, end: u64 },
    /// Nothing: the stream has ended.
    End,
}

/// A layer's tar stream on its way out, byte for byte as it was pulled.
pub struct LayerTar {
    store: Store,
    index: Arc<LayerIndex>,
    recipe: RecipeReader<RecipeBytes>,
    next: Next,
    /// The last chunk that was read: content that is adjacent in the tar is adjacent in it.
    last: Option<(u32, VerifiedChunk)>,
    hasher: Option<Sha256>,
}

impl LayerTar {
    /// Opens the tar of the layer that `index` describes. Blocks.
    pub fn open(store: &Store, index: Arc<LayerIndex>) -> Result<LayerTar, UnpackError> {
        let recipe = store.recipe(&index)?;
        let (store, hasher) = (store.clone(), Some(Sha256::new()));
        Ok(LayerTar { store, index, recipe, next: Next::Segment, last: None, hasher })
    }

    /// Appends the next bytes to `out` until it has `most` bytes or the stream ends, and returns whether there are more. Fails at the end
    /// if the whole stream does not match its diffID. Blocks.
    pub fn fill(&mut self, out: &mut Vec<u8>, most: usize) -> Result<bool, UnpackError> {
        let from = out.len();
        let filled = self.fill_parts(out, most);
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&out[from..]);
        }
        filled?;
        if matches!(self.next, Next::End)
            && let Some(hasher) = self.hasher.take()
        {
            let (found, expected) = (hasher.finish(), self.index.diff_id());
            if found != expected {
                return Err(UnpackError::DiffId { expected, found });
            }
        }
        Ok(!matches!(self.next, Next::End))
    }

    fn fill_parts(&mut self, out: &mut Vec<u8>, most: usize) -> Result<(), UnpackError> {
        while out.len() < most {
            match std::mem::replace(&mut self.next, Next::End) {
                Next::End => return Ok(()),
                Next::Segment => {
                    self.next = match self.recipe.next().transpose()? {
                        None => Next::End,
                        Some(Segment::Literal(bytes)) => Next::Literal(bytes, 0),
                        Some(Segment::Content { inode, offset, len, .. }) => {
                            let file = self.index.inode(inode)?;
                            Next::Content { file, at: offset, end: offset.saturating_add(len) }
                        }
                    }
                }
                Next::Literal(bytes, at) => {
                    let end = bytes.len().min(at + (most - out.len()));
                    out.extend_from_slice(&bytes[at..end]);
                    self.next = if end < bytes.len() { Next::Literal(bytes, end) } else { Next::Segment };
                }
                Next::Content { file, at, end } if at < end => {
                    let count = self.piece(&file, at, end, out, most)?;
                    self.next = Next::Content { file, at: at + count, end };
                }
                Next::Content { .. } => self.next = Next::Segment,
            }
        }
        Ok(())
    }

    /// Appends bytes of one piece of a file, starting at `at`, and returns how many.
    fn piece(&mut self, file: &Inode, at: u64, end: u64, out: &mut Vec<u8>, most: usize) -> Result<u64, UnpackError> {
        let piece_size = u64::from(self.index.header().piece_size);
        let piece = self.index.piece(file, u32::try_from(at / piece_size).unwrap_or(u32::MAX))?;
        let outside = || Error::corrupt("a layer's index", "a piece lies outside its file");
        let skip = at.checked_sub(piece.offset).ok_or_else(outside)?;
        let left = u64::from(piece.len).checked_sub(skip).filter(|left| *left > 0).ok_or_else(outside)?;
        let count = left.min(end - at).min((most - out.len()) as u64) as usize;
        match piece.source {
            Source::Hole => out.resize(out.len() + count, 0),
            Source::Chunk { number, start, .. } => {
                let skip = skip as usize;
                let chunk = self.chunk(number)?;
                let bytes = chunk.piece(start, piece.len).and_then(|piece| piece.get(skip..skip + count));
                let outside = || Error::corrupt("a layer's index", "a piece lies outside its chunk");
                out.extend_from_slice(bytes.ok_or_else(outside)?);
            }
        }
        Ok(count as u64)
    }

    fn chunk(&mut self, number: u32) -> Result<&VerifiedChunk, Error> {
        if self.last.as_ref().is_none_or(|(last, _)| *last != number) {
            let chunk = self.store.read_chunk(&self.index.chunk(number)?)?;
            self.last = Some((number, chunk));
        }
        let missing = || Error::corrupt("a chunk", "it was dropped while in use");
        self.last.as_ref().map(|(_, chunk)| chunk).ok_or_else(missing)
    }
}

/// Shows the diffID of the layer, for messages.
impl std::fmt::Debug for LayerTar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let diff_id: Digest = self.index.diff_id();
        f.debug_tuple("LayerTar").field(&diff_id).finish()
    }
}

/// Bytes written at a time.
const WRITE_BLOCK: usize = 256 << 10;

/// Writes a layer's tar stream, byte for byte as it was pulled. Fails if the stream does not match its diffID; by then bytes may have been
/// written.
pub fn write_layer_tar(store: &Store, diff_id: &Digest, out: &mut impl Write) -> Result<(), UnpackError> {
    let mut tar = LayerTar::open(store, Arc::new(store.index(diff_id)?))?;
    let mut block = Vec::with_capacity(WRITE_BLOCK);
    loop {
        block.clear();
        let more = tar.fill(&mut block, WRITE_BLOCK);
        out.write_all(&block).map_err(UnpackError::Read)?;
        if !more? {
            return Ok(());
        }
    }
}
