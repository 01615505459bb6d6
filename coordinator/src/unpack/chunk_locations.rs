//! Where the store already has pieces of content.

use store::ContentDigest;
use store::chunk::PieceLocation;

/// Locations, by digest, of the pieces that the store already has. A cache: losing it costs space, never correctness.
pub trait ChunkLocations: Send + Sync {
    /// The location of the piece with this digest.
    fn get(&self, piece: &ContentDigest) -> Option<PieceLocation>;
    /// Remembers where pieces of a published layer lie.
    fn put(&self, pieces: &[(ContentDigest, PieceLocation)]);
}

/// Remembers nothing: every layer stores all of its own content.
#[derive(Debug, Default)]
pub struct NoLocations;

impl ChunkLocations for NoLocations {
    fn get(&self, _: &ContentDigest) -> Option<PieceLocation> {
        None
    }
    fn put(&self, _: &[(ContentDigest, PieceLocation)]) {}
}
