//! Chunks, the unit of a read from a pack, and the types that keep unverified bytes from being used.
//!
//! A file's content is cut into **pieces** of [`PIECE_SIZE`] (the last one shorter). A **chunk** is what is compressed and
//! read as one: either one whole piece of a large file, or the pieces of several small files that lie next to each
//! other in the layer, gathered until they reach [`CHUNK_TARGET`]. FORMAT.md gives the measurements behind both numbers.

use std::cell::RefCell;

use serde::{Deserialize, Serialize};

use crate::digest::ContentDigest;
use crate::error::{Error, Result};
use crate::wire::{Fields, Put};

/// Length of every piece of a file but its last one, bytes.
pub const PIECE_SIZE: u32 = 256 * 1024;
/// A chunk is closed when it holds at least this much, bytes before compression.
pub const CHUNK_TARGET: usize = 256 * 1024;
/// No chunk is longer than this before compression: a chunk below its target plus one whole piece.
pub const CHUNK_MAX: u32 = 512 * 1024;
/// zstd level of chunks.
pub const CHUNK_LEVEL: i32 = 3;

/// How a chunk's bytes are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Codec {
    /// As they are: compression did not make them smaller.
    Plain,
    /// One zstd frame.
    Zstd,
}

impl Codec {
    /// The codec's number in the format.
    pub fn number(self) -> u8 {
        match self {
            Codec::Plain => 0,
            Codec::Zstd => 1,
        }
    }

    /// The codec with that number.
    pub fn from_number(number: u8) -> Result<Codec> {
        match number {
            0 => Ok(Codec::Plain),
            1 => Ok(Codec::Zstd),
            other => Err(Error::Unsupported { what: "a chunk".into(), why: format!("it has codec {other}") }),
        }
    }
}

/// Where one chunk lies, and what it must hash to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChunkRef {
    /// The pack that holds it.
    pub pack: ContentDigest,
    /// First byte within the pack.
    pub offset: u64,
    /// Bytes in the pack.
    pub stored_len: u32,
    /// Bytes after decompression; at most [`CHUNK_MAX`].
    pub raw_len: u32,
    /// How the bytes are stored.
    pub codec: Codec,
    /// BLAKE3 of the decompressed bytes.
    pub digest: ContentDigest,
}

/// Where one piece of a file lies: a range of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PieceLocation {
    /// The chunk.
    pub chunk: ChunkRef,
    /// First byte within the decompressed chunk.
    pub start: u32,
    /// Length of the piece.
    pub len: u32,
}

impl PieceLocation {
    /// Length of the encoded form.
    pub const LEN: usize = 89;

    /// Fixed little-endian form, for databases.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut out = Vec::with_capacity(Self::LEN);
        out.put_bytes(self.chunk.pack.as_bytes());
        out.put_u64(self.chunk.offset);
        out.put_u32(self.chunk.stored_len);
        out.put_u32(self.chunk.raw_len);
        out.put_u8(self.chunk.codec.number());
        out.put_bytes(self.chunk.digest.as_bytes());
        out.put_u32(self.start);
        out.put_u32(self.len);
        let mut array = [0; Self::LEN];
        array.copy_from_slice(&out);
        array
    }

    /// Reads the encoded form back.
    pub fn decode(bytes: &[u8]) -> Result<PieceLocation> {
        let mut fields = Fields::new("a piece's location", bytes);
        let chunk = ChunkRef {
            pack: ContentDigest::from_bytes(fields.array()?),
            offset: fields.u64()?,
            stored_len: fields.u32()?,
            raw_len: fields.u32()?,
            codec: Codec::from_number(fields.u8()?)?,
            digest: ContentDigest::from_bytes(fields.array()?),
        };
        Ok(PieceLocation { chunk, start: fields.u32()?, len: fields.u32()? })
    }
}

/// A compressed chunk, ready to be appended to a pack.
#[derive(Debug)]
pub struct StoredChunk {
    /// The bytes to append.
    pub bytes: Vec<u8>,
    /// Length before compression.
    pub raw_len: u32,
    /// How `bytes` are stored.
    pub codec: Codec,
    /// BLAKE3 of the raw bytes.
    pub digest: ContentDigest,
}

thread_local! {
    /// One context per thread: creating one costs more than compressing a small chunk.
    static COMPRESSOR: RefCell<Option<zstd::bulk::Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Compresses a chunk's raw bytes, or keeps them plain where compression does not help.
pub fn compress(raw: &[u8]) -> Result<StoredChunk> {
    let compressed = COMPRESSOR.with_borrow_mut(|slot| {
        let compressor = match slot {
            Some(compressor) => compressor,
            None => slot.insert(zstd::bulk::Compressor::new(CHUNK_LEVEL).map_err(incompressible)?),
        };
        compressor.compress(raw).map_err(incompressible)
    })?;
    Ok(stored(raw, compressed))
}

/// Like [`compress`] at another zstd level, for chunks that are written once and read by every host. It makes a context
/// for each call: one for a high level is large, and few threads need it.
pub fn compress_at(raw: &[u8], level: i32) -> Result<StoredChunk> {
    Ok(stored(raw, zstd::bulk::compress(raw, level).map_err(incompressible)?))
}

fn incompressible(why: std::io::Error) -> Error {
    Error::corrupt("a chunk", format!("zstd cannot compress it: {why}"))
}

/// The smaller of the two forms.
fn stored(raw: &[u8], compressed: Vec<u8>) -> StoredChunk {
    let digest = ContentDigest::of(raw);
    let raw_len = raw.len() as u32;
    if compressed.len() < raw.len() {
        StoredChunk { bytes: compressed, raw_len, codec: Codec::Zstd, digest }
    } else {
        StoredChunk { bytes: raw.to_vec(), raw_len, codec: Codec::Plain, digest }
    }
}

/// A chunk's stored bytes as they came from a disk or a network. They cannot be used until they are verified.
#[derive(Debug)]
pub struct RawChunk {
    reference: ChunkRef,
    stored: Vec<u8>,
}

impl RawChunk {
    /// Wraps what was read for `reference`.
    pub fn new(reference: ChunkRef, stored: Vec<u8>) -> RawChunk {
        RawChunk { reference, stored }
    }

    /// Decompresses and checks length and digest: the only way to the bytes.
    pub fn verify(self) -> Result<VerifiedChunk> {
        let reference = self.reference;
        let damaged =
            |why: &str| Error::corrupt(format!("chunk at {} of pack {}", reference.offset, reference.pack.hex()), why);
        if reference.raw_len > CHUNK_MAX {
            return Err(damaged("it claims to be longer than a chunk may be"));
        }
        let bytes = match reference.codec {
            Codec::Plain => self.stored,
            Codec::Zstd => DECOMPRESSOR
                .with_borrow_mut(|slot| {
                    let decompressor = match slot {
                        Some(decompressor) => decompressor,
                        None => slot.insert(zstd::bulk::Decompressor::new()?),
                    };
                    decompressor.decompress(&self.stored, reference.raw_len as usize)
                })
                .map_err(|_| damaged("zstd cannot decompress it"))?,
        };
        if bytes.len() != reference.raw_len as usize {
            return Err(damaged("its length differs from the index"));
        }
        if ContentDigest::of(&bytes) != reference.digest {
            return Err(damaged("its bytes do not match their BLAKE3 digest"));
        }
        Ok(VerifiedChunk { bytes })
    }
}

/// A chunk's bytes, known to match their digest.
#[derive(Debug)]
pub struct VerifiedChunk {
    bytes: Vec<u8>,
}

impl VerifiedChunk {
    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes of one piece, if it lies within the chunk.
    pub fn piece(&self, start: u32, len: u32) -> Option<&[u8]> {
        self.bytes.get(start as usize..(start as usize).checked_add(len as usize)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reference(chunk: &StoredChunk) -> ChunkRef {
        ChunkRef {
            pack: ContentDigest::of(b"pack"),
            offset: 64,
            stored_len: chunk.bytes.len() as u32,
            raw_len: chunk.raw_len,
            codec: chunk.codec,
            digest: chunk.digest,
        }
    }

    proptest! {
        #[test]
        fn compressed_chunks_come_back(raw in proptest::collection::vec(0u8..4, 0..5000)) {
            let stored = compress(&raw).unwrap();
            let reference = reference(&stored);
            let verified = RawChunk::new(reference, stored.bytes).verify().unwrap();
            prop_assert_eq!(verified.bytes(), &raw[..]);
            let location = PieceLocation { chunk: reference, start: 3, len: 9 };
            prop_assert_eq!(PieceLocation::decode(&location.encode()).unwrap(), location);
        }

        #[test]
        fn a_flipped_bit_never_passes(raw in proptest::collection::vec(any::<u8>(), 1..500), bit in any::<prop::sample::Index>()) {
            let stored = compress(&raw).unwrap();
            let reference = reference(&stored);
            let mut bytes = stored.bytes;
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            if let Ok(verified) = RawChunk::new(reference, bytes).verify() {
                // A bit that zstd ignores may flip; the bytes that come out must still be the right ones.
                prop_assert_eq!(verified.bytes(), &raw[..]);
            }
        }
    }
}
