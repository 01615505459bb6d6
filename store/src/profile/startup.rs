//! The startup pack: what starts of an image need, in one object to be read from front to back.
//!
//! It is an ordinary pack. Its first chunk is the startup table. The layers' indexes follow, so that a host that lacks
//! some need not look for each in its own place, then chunks of pieces of files in the order in which starts need them.
//! A start that needs very much is a bulk copy: what is beyond [`CONTENT_MAX`] is named in the table, and hosts read it
//! from the layers. FORMAT.md describes the table's bytes.

use serde::{Deserialize, Serialize};

use super::{Origin, PieceKey};
use crate::blocks::Blocks;
use crate::chunk::{CHUNK_MAX, CHUNK_TARGET, ChunkRef, Codec};
use crate::digest::{ContentDigest, Digest};
use crate::error::{Error, Result};
use crate::layer::InodeIndex;
use crate::pack::Placed;
use crate::wire::{Fields, Put};

/// First bytes of a startup table.
pub const MAGIC: &[u8; 8] = b"CFSSTART";
/// Version of a startup table that names pieces which the pack does not hold.
pub const VERSION: u32 = 3;
/// Version of any other startup table.
const VERSION_COMPLETE: u32 = 2;
/// Bytes before the indexes' records.
pub const HEADER_LEN: usize = 24;
/// Length of an index's record.
pub const INDEX_RECORD_LEN: usize = 8;
/// Length of a chunk's record.
pub const CHUNK_RECORD_LEN: usize = 52;
/// Length of a piece's record.
pub const PIECE_RECORD_LEN: usize = 16;
/// zstd level of a startup pack's chunks. They are written rarely and read by every cold host, and reading is as fast
/// as with any level. FORMAT.md gives the measurement.
pub const STARTUP_LEVEL: i32 = 9;
/// The most file content in a startup pack, bytes.
pub const CONTENT_MAX: u64 = 512 << 20;
/// The most indexes in a startup pack.
pub const INDEXES_MAX: usize = 512;
/// The most bytes of indexes in a startup pack. One that does not fit is read in its own place.
pub const INDEXES_LEN_MAX: u64 = 8 << 20;
/// How much of the content is read together with the table, before anything is known of it, bytes: what the disk sends
/// while the table is on its way.
pub const HEAD_MAX: u64 = 1 << 20;
/// The most pieces in a startup table.
pub const PIECES_MAX: usize = 24_576;
/// The most chunks in a startup table: all but the last are full.
pub const CHUNKS_MAX: usize = CONTENT_MAX as usize / CHUNK_TARGET + 1;

// The largest table still fits into one chunk.
const _: () = assert!(
    HEADER_LEN + INDEXES_MAX * INDEX_RECORD_LEN + CHUNKS_MAX * CHUNK_RECORD_LEN + PIECES_MAX * PIECE_RECORD_LEN
        <= CHUNK_MAX as usize
);

/// What the catalogue knows of a chain's startup pack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartupRecord {
    /// The top chainID of the images that it serves.
    pub chain: Digest,
    /// The pack.
    pub pack: ContentDigest,
    /// Length of the pack, bytes.
    pub pack_len: u64,
    /// Where the pack's first chunk, the startup table, lies.
    pub table: Placed,
    /// Bytes of indexes behind the table.
    #[serde(default)]
    pub indexes_len: u64,
    /// Bytes of the first whole chunks behind the indexes that are worth reading at once: at most [`HEAD_MAX`].
    #[serde(default)]
    pub head_len: u64,
    /// How many starts had been traced when it was made; none for one that was made before the first start.
    pub starts: u32,
    /// Where what it holds was learned.
    #[serde(default, skip_serializing_if = "Origin::is_traced")]
    pub origin: Origin,
    /// Bytes of file content that the pieces which it holds or names cover.
    pub content_bytes: u64,
    /// When it was published, seconds since 1970.
    pub published_at: u64,
}

impl StartupRecord {
    /// The chunk that holds the startup table.
    pub fn table_chunk(&self) -> ChunkRef {
        self.table.in_pack(self.pack)
    }

    /// Where the first chunk of content begins in the pack.
    pub fn content_offset(&self) -> u64 {
        self.table.offset.saturating_add(self.table.stored_len.into()).saturating_add(self.indexes_len)
    }
}

/// A layer's index in a startup pack: the sealed index, as it lies in the layer's own place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StartupIndex {
    /// Position of the layer in the chain, base first.
    pub layer: u16,
    /// Length of the sealed index, bytes.
    pub len: u32,
}

/// One piece of a file that starts need. Its length and digest are those in the layer's index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StartupPiece {
    /// The piece.
    pub key: PieceKey,
    /// What starts need of it: that is what the pack holds, packed.
    pub blocks: Blocks,
    /// The share of starts that read it, in 255ths.
    pub weight: u8,
    /// Where the pack has it. If it does not, the piece is read from its layer's packs.
    pub place: Option<PlaceInPack>,
}

/// Where a startup pack has a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PlaceInPack {
    /// Position in [`StartupTable::chunks`].
    pub chunk: u32,
    /// First byte within the decompressed chunk.
    pub start: u32,
}

impl StartupPiece {
    /// The order in a table.
    pub(crate) fn order(&self) -> (bool, Option<PlaceInPack>) {
        (self.place.is_none(), self.place)
    }
}

/// What a startup pack holds and names. Pieces that it holds are ordered by chunk and start, and two may share their
/// bytes; those that it only names follow, in the order in which starts need them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StartupTable {
    /// The indexes, back to back behind the table.
    pub indexes: Vec<StartupIndex>,
    /// The chunks, in the pack's order, without the table and the indexes.
    pub chunks: Vec<ChunkRef>,
    /// The pieces.
    pub pieces: Vec<StartupPiece>,
}

impl StartupTable {
    /// The table's bytes. They hold neither the pack's name nor offsets: chunks lie back to back behind the table.
    ///
    /// An error if the table breaks a rule that [`StartupTable::decode`] checks.
    pub fn encode(&self) -> Result<Vec<u8>> {
        if self.chunks.len() > CHUNKS_MAX || self.pieces.len() > PIECES_MAX || self.indexes.len() > INDEXES_MAX {
            return Err(damaged("it is larger than a startup table may be"));
        }
        let mut counts = vec![0u32; self.chunks.len()];
        for place in self.pieces.iter().filter_map(|piece| piece.place) {
            let chunk = self.chunks.get(place.chunk as usize).filter(|chunk| place.start < chunk.raw_len);
            chunk.ok_or_else(|| damaged("a piece lies outside its chunk"))?;
            counts[place.chunk as usize] += 1;
        }
        if !self.pieces.is_sorted_by_key(StartupPiece::order) {
            return Err(damaged("its pieces are out of order"));
        }
        let is_complete = self.pieces.last().is_none_or(|last| last.place.is_some());
        let mut out = Vec::with_capacity(CHUNK_MAX as usize);
        out.put_bytes(MAGIC);
        out.put_u32(if is_complete { VERSION_COMPLETE } else { VERSION });
        out.put_u32(self.chunks.len() as u32);
        out.put_u32(self.pieces.len() as u32);
        out.put_u32(self.indexes.len() as u32);
        for index in &self.indexes {
            out.put_u16(index.layer);
            out.put_u16(0);
            out.put_u32(index.len);
        }
        for (chunk, pieces) in self.chunks.iter().zip(counts) {
            out.put_u32(chunk.stored_len);
            out.put_u32(chunk.raw_len);
            out.put_u32(chunk.codec.number().into());
            out.put_u32(pieces);
            out.put_u32(0);
            out.put_bytes(chunk.digest.as_bytes());
        }
        for StartupPiece { key, blocks, weight, place } in &self.pieces {
            out.put_u16(key.layer);
            out.put_u8(*weight);
            out.put_u8(blocks.bits());
            out.put_u32(key.inode.0);
            out.put_u32(key.piece);
            out.put_u32(place.map_or(0, |place| place.start));
        }
        Ok(out)
    }

    /// Decodes a table from the bytes of the chunk `table`, whose reference tells the pack and where the first chunk
    /// begins.
    pub fn decode(bytes: &[u8], table: &ChunkRef) -> Result<StartupTable> {
        let mut fields = Fields::new("a startup table", bytes);
        if fields.bytes(8)? != MAGIC {
            return Err(damaged("its first bytes are wrong"));
        }
        let version = fields.u32()?;
        if ![VERSION_COMPLETE, VERSION].contains(&version) {
            return Err(Error::Unsupported {
                what: "a startup table".into(),
                why: format!("it has version {version}"),
            });
        }
        let (chunks, pieces) = (fields.u32()? as usize, fields.u32()? as usize);
        let indexes = fields.u32()? as usize;
        if chunks > CHUNKS_MAX || pieces > PIECES_MAX || indexes > INDEXES_MAX {
            return Err(damaged("it is larger than a startup table may be"));
        }
        let mut decoded = StartupTable {
            indexes: Vec::with_capacity(indexes),
            chunks: Vec::with_capacity(chunks),
            pieces: Vec::with_capacity(pieces),
        };
        let mut counts = Vec::with_capacity(chunks);
        let mut offset = table.offset.saturating_add(table.stored_len.into());
        for _ in 0..indexes {
            let layer = fields.u16()?;
            fields.u16()?;
            let index = StartupIndex { layer, len: fields.u32()? };
            offset = offset.saturating_add(index.len.into());
            decoded.indexes.push(index);
        }
        for _ in 0..chunks {
            let (chunk, count) = read_chunk(&mut fields, table.pack, offset)?;
            offset = offset.saturating_add(chunk.stored_len.into());
            decoded.chunks.push(chunk);
            counts.push(count);
        }
        let held = counts.iter().map(|count| u64::from(*count)).sum::<u64>();
        let named = (pieces as u64).checked_sub(held).filter(|named| (*named > 0) == (version == VERSION));
        let named = named.ok_or_else(|| damaged("its chunks do not add up to its pieces"))?;
        for (number, (chunk, count)) in (0..).zip(decoded.chunks.iter().zip(counts)) {
            let mut last = 0;
            for _ in 0..count {
                let (piece, start) = read_piece(&mut fields)?;
                if start < last || start >= chunk.raw_len {
                    return Err(damaged("a piece lies outside its chunk or out of order"));
                }
                last = start;
                decoded.pieces.push(StartupPiece { place: Some(PlaceInPack { chunk: number, start }), ..piece });
            }
        }
        for _ in 0..named {
            decoded.pieces.push(read_piece(&mut fields)?.0);
        }
        if fields.is_empty() { Ok(decoded) } else { Err(damaged("it is longer than its header says")) }
    }
}

fn damaged(why: &str) -> Error {
    Error::corrupt("a startup table", why)
}

/// One chunk's record, and how many pieces the chunk holds.
fn read_chunk(fields: &mut Fields<'_>, pack: ContentDigest, offset: u64) -> Result<(ChunkRef, u32)> {
    let (stored_len, raw_len) = (fields.u32()?, fields.u32()?);
    let codec = Codec::from_number(fields.u32()?.try_into().unwrap_or(u8::MAX))?;
    let count = fields.u32()?;
    fields.u32()?;
    if stored_len > CHUNK_MAX || raw_len > CHUNK_MAX {
        return Err(damaged("a chunk claims to be longer than a chunk may be"));
    }
    let digest = ContentDigest::from_bytes(fields.array()?);
    Ok((ChunkRef { pack, offset, stored_len, raw_len, codec, digest }, count))
}

/// One piece's record, without its chunk, and its start in the chunk.
fn read_piece(fields: &mut Fields<'_>) -> Result<(StartupPiece, u32)> {
    let (layer, weight, blocks) = (fields.u16()?, fields.u8()?, Blocks::from_bits(fields.u8()?));
    let key = PieceKey { layer, inode: InodeIndex(fields.u32()?), piece: fields.u32()? };
    Ok((StartupPiece { key, blocks, weight, place: None }, fields.u32()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn table_chunk() -> ChunkRef {
        let digest = ContentDigest::from_bytes([7; 32]);
        let pack = ContentDigest::from_bytes([9; 32]);
        ChunkRef { pack, offset: 16, stored_len: 100, raw_len: 200, codec: Codec::Zstd, digest }
    }

    fn example() -> StartupTable {
        let first = ChunkRef {
            offset: 216,
            stored_len: 1000,
            raw_len: 3000,
            digest: ContentDigest::from_bytes([1; 32]),
            ..table_chunk()
        };
        let second = ChunkRef {
            offset: 1216,
            stored_len: 50,
            raw_len: 50,
            codec: Codec::Plain,
            digest: ContentDigest::from_bytes([2; 32]),
            ..first
        };
        let piece = |chunk, start, inode| StartupPiece { place: Some(PlaceInPack { chunk, start }), ..named(inode) };
        let indexes = vec![StartupIndex { layer: 1, len: 70 }, StartupIndex { layer: 0, len: 30 }];
        let (chunks, pieces) = (vec![first, second], vec![piece(0, 0, 5), piece(0, 0, 6), piece(1, 7, 8)]);
        StartupTable { indexes, chunks, pieces }
    }

    /// A piece that no chunk holds.
    fn named(inode: u32) -> StartupPiece {
        let key = PieceKey { layer: 1, inode: InodeIndex(inode), piece: 3 };
        StartupPiece { key, blocks: Blocks::from_bits(5), weight: 255, place: None }
    }

    #[test]
    fn pieces_that_are_only_named_follow_the_others() {
        let mut table = example();
        table.pieces.extend([named(9), named(4)]);
        let bytes = table.encode().unwrap();
        assert_eq!(&bytes[..HEADER_LEN], b"CFSSTART\x03\0\0\0\x02\0\0\0\x05\0\0\0\x02\0\0\0");
        assert_eq!(&bytes[bytes.len() - PIECE_RECORD_LEN..], b"\x01\0\xff\x05\x04\0\0\0\x03\0\0\0\0\0\0\0");
        assert_eq!(StartupTable::decode(&bytes, &table_chunk()).unwrap(), table);
        let wrong = |version: u8| {
            let bytes = if version == 2 { bytes.clone() } else { example().encode().unwrap() };
            let bytes = [&bytes[..8], &[version], &bytes[9..]].concat();
            StartupTable::decode(&bytes, &table_chunk()).unwrap_err().to_string()
        };
        assert_eq!(wrong(2), wrong(3), "each version says whether there are such pieces");
        table.pieces.swap(2, 3);
        assert!(table.encode().is_err(), "out of order");
    }

    #[test]
    fn golden_bytes() {
        let bytes = example().encode().unwrap();
        assert_eq!(&bytes[..HEADER_LEN], b"CFSSTART\x02\0\0\0\x02\0\0\0\x03\0\0\0\x02\0\0\0");
        let chunks_at = HEADER_LEN + 2 * INDEX_RECORD_LEN;
        assert_eq!(&bytes[HEADER_LEN..chunks_at], b"\x01\0\0\0\x46\0\0\0\0\0\0\0\x1e\0\0\0");
        let chunk = &bytes[chunks_at..chunks_at + CHUNK_RECORD_LEN];
        assert_eq!(&chunk[..20], b"\xe8\x03\0\0\xb8\x0b\0\0\x01\0\0\0\x02\0\0\0\0\0\0\0");
        assert_eq!(chunk[20..], [1; 32]);
        let piece = &bytes[bytes.len() - PIECE_RECORD_LEN..];
        assert_eq!(piece, b"\x01\0\xff\x05\x08\0\0\0\x03\0\0\0\x07\0\0\0");
        assert_eq!(bytes.len(), chunks_at + 2 * CHUNK_RECORD_LEN + 3 * PIECE_RECORD_LEN);
        assert_eq!(StartupTable::decode(&bytes, &table_chunk()).unwrap(), example());
    }

    #[test]
    fn what_could_not_be_read_is_not_written() {
        let mut table = example();
        table.pieces.swap(0, 2);
        assert!(table.encode().is_err());
        let mut table = example();
        table.pieces[2].place = Some(PlaceInPack { chunk: 2, start: 0 });
        assert!(table.encode().is_err());
        let mut table = example();
        table.pieces = vec![table.pieces[0]; PIECES_MAX + 1];
        assert!(table.encode().is_err());
    }

    proptest! {
        #[test]
        fn damaged_bytes_never_panic(at in any::<prop::sample::Index>(), to in any::<u8>(), cut in any::<bool>()) {
            let mut bytes = example().encode().unwrap();
            let at = at.index(bytes.len());
            if cut { bytes.truncate(at) } else { bytes[at] = to }
            if let Ok(table) = StartupTable::decode(&bytes, &table_chunk()) {
                let places = table.pieces.iter().filter_map(|piece| piece.place);
                prop_assert!(places.into_iter().all(|place| place.start < table.chunks[place.chunk as usize].raw_len));
                prop_assert_eq!(StartupTable::decode(&table.encode().unwrap(), &table_chunk()).unwrap(), table);
            }
            if cut {
                prop_assert!(StartupTable::decode(&bytes, &table_chunk()).is_err());
            }
        }

        #[test]
        fn random_bytes_never_panic(tail in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut bytes = MAGIC.to_vec();
            bytes.put_u32(VERSION);
            bytes.extend(tail);
            let _ = StartupTable::decode(&bytes, &table_chunk());
        }
    }
}
