//! Unpacks a layer again exactly as before.
//!
//! Which pieces a layer shares with others depends on what the store had when it was unpacked, and so do its pack's bytes and name. When a
//! layer is fetched again because its pack was damaged, other layers still refer to that pack by its name. The layer's previous index says
//! which pieces lay elsewhere. Taking those from the same places, and storing the others anew, makes the same pack again.

use std::collections::HashMap;

use store::chunk::PieceLocation;
use store::error::Result;
use store::layer::{InodeIndex, LayerIndex, Source};
use store::{ContentDigest, Digest};

use crate::unpack::ChunkLocations;

/// Calls `each` for every piece of a layer that is stored in a chunk.
pub fn pieces_of(index: &LayerIndex, mut each: impl FnMut(ContentDigest, PieceLocation)) -> Result<()> {
    for number in 0..index.inode_count() {
        let file = index.inode(InodeIndex(number))?;
        for number in 0..file.piece_count() {
            let piece = index.piece(&file, number)?;
            if let Source::Chunk { chunk, start, .. } = piece.source {
                each(piece.digest, PieceLocation { chunk, start, len: piece.len });
            }
        }
    }
    Ok(())
}

/// Locations that give the pieces of one layer the places where they lay before.
pub struct PreviousLayout<'a> {
    lay: HashMap<ContentDigest, PieceLocation>,
    others: &'a dyn ChunkLocations,
}

impl<'a> PreviousLayout<'a> {
    /// Uses the pieces of a layer's previous index, if there is one, and `others` for all other pieces.
    pub fn new(index: Option<&LayerIndex>, others: &'a dyn ChunkLocations) -> PreviousLayout<'a> {
        let mut lay: HashMap<ContentDigest, PieceLocation> = HashMap::new();
        if let Some(index) = index {
            let walked = pieces_of(index, |digest, location| {
                let whole = location.start == 0 && location.len == location.chunk.raw_len;
                let known = lay.entry(digest).or_insert(location);
                // As when the layer was unpacked: a whole chunk serves small and large files alike.
                if whole {
                    *known = location;
                }
            });
            if let Err(error) = walked {
                let diff_id: Digest = index.diff_id();
                tracing::warn!("layer {diff_id} may be stored differently than before: {error}");
            }
        }
        PreviousLayout { lay, others }
    }
}

impl ChunkLocations for PreviousLayout<'_> {
    fn get(&self, piece: &ContentDigest) -> Option<PieceLocation> {
        self.lay.get(piece).copied().or_else(|| self.others.get(piece))
    }

    fn put(&self, pieces: &[(ContentDigest, PieceLocation)]) {
        self.others.put(pieces);
    }
}
