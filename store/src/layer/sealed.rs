//! An index as it lies in the store: a header (magic, version, reserved, raw length, BLAKE3 of the raw bytes), then a zstd frame.
//!
//! The header gives the length of the raw index, so that a reader can refuse it before it has unpacked anything.

use std::io::{self, Read, Write};

use super::{HEADER_LEN, LayerHeader, VERSION};
use crate::digest::{ContentDigest, Digest};
use crate::error::{Error, Result};
use crate::wire::{Fields, Put};

/// First bytes of an index as it lies in the store.
pub const SEALED_MAGIC: &[u8; 8] = b"CFSINDEX";
/// Length of the header of an index as it lies in the store.
pub const SEALED_HEADER_LEN: usize = 64;
/// The longest raw index that is accepted, bytes: 4 GiB are room for some twenty million files.
const RAW_MAX: u64 = 4 << 30;
/// Compression level of a sealed index.
pub(super) const LEVEL: i32 = 6;
/// Bytes that are unpacked at a time.
const STEP: usize = 256 << 10;

/// Packs a raw index for the store.
pub fn seal(raw: &[u8]) -> Result<Vec<u8>> {
    let mut out = Header { raw_len: raw.len() as u64, digest: ContentDigest::of(raw) }.encode();
    zstd::stream::copy_encode(raw, &mut out, LEVEL).map_err(|e| Error::corrupt("a layer's index", e.to_string()))?;
    Ok(out)
}

/// Unpacks and verifies an index that lies in the store under `diff_id`.
pub fn unseal(sealed: &[u8], diff_id: &Digest) -> Result<Vec<u8>> {
    let header = Header::decode(sealed, diff_id)?;
    let mut raw = Vec::with_capacity(usize::try_from(header.raw_len).unwrap_or(0).min(256 << 20));
    unpack(&header, sealed, diff_id, &mut raw)?.map_err(|e| Error::corrupt("a layer's index", e.to_string()))?;
    Ok(raw)
}

/// What the header says of the raw index.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) raw_len: u64,
    pub(super) digest: ContentDigest,
}

impl Header {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(SEALED_HEADER_LEN);
        out.put_bytes(SEALED_MAGIC);
        out.put_u32(VERSION);
        out.put_u32(0);
        out.put_u64(self.raw_len);
        out.put_u64(0);
        out.put_bytes(self.digest.as_bytes());
        out
    }

    pub(super) fn decode(sealed: &[u8], diff_id: &Digest) -> Result<Header> {
        let damaged = |why: &str| Error::corrupt(format!("the index of layer {diff_id}"), why);
        let mut fields = Fields::new("a layer's index", sealed);
        if fields.bytes(8)? != SEALED_MAGIC {
            return Err(damaged("its first bytes are wrong"));
        }
        let version = fields.u32()?;
        if version != VERSION {
            return Err(Error::Unsupported {
                what: format!("layer {diff_id}"),
                why: format!("its index has version {version}"),
            });
        }
        fields.u32()?;
        let raw_len = fields.u64()?;
        fields.u64()?;
        let digest = ContentDigest::from_bytes(fields.array()?);
        if raw_len > RAW_MAX {
            Err(damaged("it claims to be longer than an index may be"))
        } else {
            Ok(Header { raw_len, digest })
        }
    }
}

/// Unpacks into `sink`. The outer result is about the index, the inner one about the sink.
fn unpack(header: &Header, sealed: &[u8], diff_id: &Digest, sink: &mut impl Write) -> Result<io::Result<()>> {
    let damaged = |why: &str| Error::corrupt(format!("the index of layer {diff_id}"), why);
    let frame = sealed.get(SEALED_HEADER_LEN..).unwrap_or_default();
    let decoder = zstd::Decoder::new(frame).map_err(|_| damaged("it is not a zstd frame"))?;
    let mut raw = decoder.take(header.raw_len);
    let (mut hasher, mut head, mut step) = (blake3::Hasher::new(), Vec::new(), vec![0; STEP]);
    loop {
        let len = raw.read(&mut step).map_err(|_| damaged("zstd cannot decompress it"))?;
        if len == 0 {
            break;
        }
        hasher.update(&step[..len]);
        head.extend(&step[..len.min(HEADER_LEN.saturating_sub(head.len()))]);
        if let Err(error) = sink.write_all(&step[..len]) {
            return Ok(Err(error));
        }
    }
    if ContentDigest::from_bytes(*hasher.finalize().as_bytes()) != header.digest {
        return Err(damaged("its bytes do not match their BLAKE3 digest"));
    }
    if LayerHeader::decode(&head)?.diff_id == *diff_id {
        Ok(Ok(()))
    } else {
        Err(damaged("it is the index of another layer"))
    }
}

/// An index as it came from the store, not unpacked yet.
#[derive(Debug)]
pub struct SealedIndex {
    bytes: Vec<u8>,
    diff_id: Digest,
    header: Header,
}

impl SealedIndex {
    /// Checks the header of an index that lies in the store under `diff_id`.
    pub fn new(bytes: Vec<u8>, diff_id: Digest) -> Result<SealedIndex> {
        let header = Header::decode(&bytes, &diff_id)?;
        Ok(SealedIndex { bytes, diff_id, header })
    }

    /// The length of the raw index, bytes; no more than that is unpacked.
    pub fn raw_len(&self) -> u64 {
        self.header.raw_len
    }

    /// BLAKE3 of the raw index, according to the header.
    pub fn digest(&self) -> ContentDigest {
        self.header.digest
    }

    /// Unpacks and verifies it, with little memory. The outer result is about the index, the inner one about the sink.
    /// After a failure, what was written to the sink is worthless.
    pub fn unpack_into(&self, sink: &mut impl Write) -> Result<io::Result<()>> {
        unpack(&self.header, &self.bytes, &self.diff_id, sink)
    }
}
