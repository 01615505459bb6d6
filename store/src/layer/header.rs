//! The header of a raw index: fixed facts about the layer, and where the sections lie.

use super::format::{CHUNK_LEN, ENTRY_LEN, EXTENT_LEN, HEADER_LEN, INODE_LEN, MAGIC, PACK_LEN, VERSION, XATTR_LEN};
use crate::digest::{ContentDigest, Digest};
use crate::error::{Error, Result};
use crate::version::{Access, Features};
use crate::wire::{Fields, Put};

/// Fixed facts about a layer, from the index's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerHeader {
    /// The index's features.
    pub features: Features,
    /// SHA-256 of the layer's tar stream.
    pub diff_id: Digest,
    /// Length of the tar stream.
    pub tar_size: u64,
    /// Sum of the regular files' sizes.
    pub content_size: u64,
    /// Length of every piece but a file's last.
    pub piece_size: u32,
    /// Length of the recipe file.
    pub recipe_len: u64,
    /// BLAKE3 of the recipe file.
    pub recipe_digest: ContentDigest,
    /// Records in each section: inodes, entries, xattrs, extents, chunks, packs; then bytes of names.
    pub(crate) counts: [u32; 7],
}

/// Where the sections begin.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sections {
    pub(super) starts: [usize; 7],
}

/// Sections in file order, with their record lengths; the last one holds names, targets and xattr values.
pub(crate) const RECORD_LENS: [usize; 7] = [INODE_LEN, ENTRY_LEN, XATTR_LEN, EXTENT_LEN, CHUNK_LEN, PACK_LEN, 1];
pub(super) const INODES: usize = 0;
pub(super) const ENTRIES: usize = 1;
pub(super) const XATTRS: usize = 2;
pub(super) const EXTENTS: usize = 3;
pub(super) const CHUNKS: usize = 4;
pub(super) const PACKS: usize = 5;
pub(super) const NAMES: usize = 6;

impl LayerHeader {
    /// The header's bytes.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_LEN);
        out.put_bytes(MAGIC);
        out.put_u32(VERSION);
        out.put_u32(self.piece_size);
        self.features.encode(&mut out);
        out.put_bytes(self.diff_id.as_bytes());
        out.put_u64(self.tar_size);
        out.put_u64(self.content_size);
        out.put_u64(self.recipe_len);
        out.put_bytes(self.recipe_digest.as_bytes());
        for count in self.counts {
            out.put_u32(count);
        }
        out.resize(HEADER_LEN, 0);
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<LayerHeader> {
        let mut fields = Fields::new("a layer's index", bytes);
        if fields.bytes(8)? != MAGIC {
            return Err(Error::corrupt("a layer's index", "its first bytes are wrong"));
        }
        let version = fields.u32()?;
        if version != VERSION {
            return Err(Error::Unsupported {
                what: "a layer's index".into(),
                why: format!("it has version {version}"),
            });
        }
        let piece_size = fields.u32()?;
        let features = Features::decode(&mut fields)?;
        features.check("a layer's index", Access::Read)?;
        let header = LayerHeader {
            features,
            diff_id: Digest::from_bytes(fields.array()?),
            tar_size: fields.u64()?,
            content_size: fields.u64()?,
            piece_size,
            recipe_len: fields.u64()?,
            recipe_digest: ContentDigest::from_bytes(fields.array()?),
            counts: [(); 7].map(|()| fields.u32().unwrap_or(u32::MAX)),
        };
        if piece_size == 0 || header.counts[INODES] == 0 {
            return Err(Error::corrupt("a layer's index", "it has no root directory or no piece size"));
        }
        Ok(header)
    }

    pub(super) fn sections(&self, len: usize) -> Result<Sections> {
        let mut at = HEADER_LEN;
        let mut starts = [0; 7];
        for ((start, count), record) in starts.iter_mut().zip(self.counts).zip(RECORD_LENS) {
            *start = at;
            at = at.saturating_add((count as usize).saturating_mul(record));
        }
        if at == len {
            Ok(Sections { starts })
        } else {
            Err(Error::corrupt("a layer's index", "its length differs from its header"))
        }
    }
}
