//! Which packs each layer uses, and how much of them: from the database if known there, else from the layer's index.

use std::collections::HashMap;
use std::sync::Arc;

use store::chunk::ChunkRef;
use store::error::Result;
use store::layer::LayerIndex;
use store::reader::Store;
use store::wire::{Fields, Put};
use store::{ContentDigest, Digest};

/// Stored bytes that one layer uses, by pack.
pub(super) type LayerUse = Vec<(ContentDigest, u64)>;

/// What layers use. A layer that is missing here has an index that could not be read.
#[derive(Debug, Clone, Default)]
pub(super) struct Usage(Arc<HashMap<Digest, LayerUse>>);

impl Usage {
    pub(super) fn new(layers: HashMap<Digest, LayerUse>) -> Usage {
        Usage(Arc::new(layers))
    }

    /// What one layer uses; empty if unknown.
    pub(super) fn packs(&self, layer: &Digest) -> &[(ContentDigest, u64)] {
        self.0.get(layer).map_or(&[], Vec::as_slice)
    }
}

/// All chunks of a layer.
pub(super) fn chunks(index: &LayerIndex) -> impl Iterator<Item = Result<ChunkRef>> + '_ {
    (0..index.chunk_count()).map(|number| index.chunk(number))
}

/// Reads from a layer's index what it uses.
pub(super) fn read(store: &Store, layer: &Digest) -> Result<LayerUse> {
    let index = store.index(layer)?;
    let mut packs: HashMap<ContentDigest, u64> = HashMap::new();
    for number in 0..index.pack_count() {
        packs.insert(index.pack(number)?, 0);
    }
    for chunk in chunks(&index) {
        let chunk = chunk?;
        *packs.entry(chunk.pack).or_default() += u64::from(chunk.stored_len);
    }
    let mut packs: LayerUse = packs.into_iter().collect();
    packs.sort_unstable();
    Ok(packs)
}

/// Encodes for the database: for each pack its digest and a number of bytes.
pub(super) fn encode(packs: &[(ContentDigest, u64)]) -> Vec<u8> {
    let mut out = Vec::with_capacity(40 * packs.len());
    for (pack, bytes) in packs {
        out.put_bytes(pack.as_bytes());
        out.put_u64(*bytes);
    }
    out
}

/// Decodes the database's form; `None` if it is damaged.
pub(super) fn decode(bytes: &[u8]) -> Option<LayerUse> {
    let record = |bytes: &[u8]| {
        let mut fields = Fields::new("what a layer uses", bytes);
        Some((ContentDigest::from_bytes(fields.array().ok()?), fields.u64().ok()?))
    };
    bytes.len().is_multiple_of(40).then(|| bytes.chunks_exact(40).map(record).collect())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_is_read_back() {
        let packs = vec![(ContentDigest::of(b"a"), 7), (ContentDigest::of(b"b"), u64::MAX)];
        assert_eq!(decode(&encode(&packs)), Some(packs));
        assert_eq!(decode(&[]), Some(Vec::new()));
        assert_eq!(decode(&[0; 41]), None);
    }
}
