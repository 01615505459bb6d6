//! Tar recipes, from which a layer's tar stream is written again byte for byte.
//!
//! A layer's diffID is the digest of its tar stream, headers and padding included, so `docker save`, `docker push` and a
//! deep check need that exact stream. A recipe is the stream with every file's content taken out (as tar-split does for
//! Docker): literal bytes, and references to a range of a file in the layer's index. The file is
//!
//! ```text
//! header   16 bytes   magic "CFSTAR\0\0", version u32, reserved u32
//! frame               one zstd frame of records:
//!   0x00              end
//!   0x01 len u32, bytes                                         literal bytes of the stream
//!   0x02 inode u32, offset u64, len u64, crc u64, name_len u16, name    bytes of a file of the layer
//! ```
//!
//! `crc` is CRC-64 (ISO) of the range, which Docker's own `tar-split.json.gz` wants; `name` is the entry's name exactly as
//! the tar has it. The index holds the recipe file's length and BLAKE3 digest.

use std::io::{self, Read, Write};

use crate::error::{Error, Result};
use crate::layer::InodeIndex;
use crate::wire::{Fields, Put};

/// First bytes of a recipe.
pub const MAGIC: &[u8; 8] = b"CFSTAR\0\0";
/// Version of the recipe format.
pub const VERSION: u32 = 1;
/// Literal runs longer than this are cut into several records, so that readers need only a small buffer.
const LITERAL_MAX: usize = 1 << 20;
const LEVEL: i32 = 6;

/// One part of a tar stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// Bytes as they are: headers, padding, trailing zeros.
    Literal(Vec<u8>),
    /// A range of a file's content.
    Content {
        /// The file, in the layer's index.
        inode: InodeIndex,
        /// First byte of the range in the file.
        offset: u64,
        /// Length of the range.
        len: u64,
        /// CRC-64 (ISO) of the range's bytes.
        crc: u64,
        /// The entry's name as the tar has it.
        name: Vec<u8>,
    },
}

/// Writes a recipe into `W`.
pub struct RecipeWriter<W: Write> {
    encoder: zstd::Encoder<'static, W>,
    literal: Vec<u8>,
}

impl<W: Write> RecipeWriter<W> {
    /// Writes the header and starts the frame.
    pub fn new(mut out: W) -> io::Result<RecipeWriter<W>> {
        let mut header = Vec::new();
        header.put_bytes(MAGIC);
        header.put_u32(VERSION);
        header.put_u32(0);
        out.write_all(&header)?;
        Ok(RecipeWriter { encoder: zstd::Encoder::new(out, LEVEL)?, literal: Vec::new() })
    }

    /// Adds literal bytes; neighbouring ones become one record.
    pub fn literal(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.literal.extend_from_slice(bytes);
        if self.literal.len() >= LITERAL_MAX { self.flush_literal() } else { Ok(()) }
    }

    /// Adds a range of a file's content.
    pub fn content(&mut self, inode: InodeIndex, range: (u64, u64), crc: u64, name: &[u8]) -> io::Result<()> {
        self.flush_literal()?;
        let mut record = Vec::with_capacity(31 + name.len());
        record.put_u8(2);
        record.put_u32(inode.0);
        record.put_u64(range.0);
        record.put_u64(range.1);
        record.put_u64(crc);
        record.put_u16(name.len().try_into().map_err(|_| io::Error::other("a name is longer than 65535 bytes"))?);
        record.put_bytes(name);
        self.encoder.write_all(&record)
    }

    fn flush_literal(&mut self) -> io::Result<()> {
        for part in std::mem::take(&mut self.literal).chunks(LITERAL_MAX) {
            let mut head = Vec::with_capacity(5);
            head.put_u8(1);
            head.put_u32(part.len() as u32);
            self.encoder.write_all(&head)?;
            self.encoder.write_all(part)?;
        }
        Ok(())
    }

    /// Ends the frame and gives the writer back.
    pub fn finish(mut self) -> io::Result<W> {
        self.flush_literal()?;
        self.encoder.write_all(&[0])?;
        self.encoder.finish()
    }
}

/// Iterates over the segments of a recipe's bytes.
pub struct RecipeReader<R: Read> {
    decoder: zstd::Decoder<'static, io::BufReader<R>>,
    ended: bool,
}

impl<R: Read> RecipeReader<R> {
    /// Checks the header and starts reading.
    pub fn new(mut input: R) -> Result<RecipeReader<R>> {
        let mut header = [0; 16];
        input.read_exact(&mut header).map_err(|_| Error::corrupt("a tar recipe", "it is too short"))?;
        let mut fields = Fields::new("a tar recipe", &header);
        if fields.bytes(8)? != MAGIC {
            return Err(Error::corrupt("a tar recipe", "its first bytes are wrong"));
        }
        let version = fields.u32()?;
        if version != VERSION {
            return Err(Error::Unsupported { what: "a tar recipe".into(), why: format!("it has version {version}") });
        }
        let decoder = zstd::Decoder::new(input).map_err(|e| Error::corrupt("a tar recipe", e.to_string()))?;
        Ok(RecipeReader { decoder, ended: false })
    }

    fn take(&mut self, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.decoder.read_exact(&mut bytes).map_err(|e| Error::corrupt("a tar recipe", e.to_string()))?;
        Ok(bytes)
    }

    fn segment(&mut self) -> Result<Option<Segment>> {
        match self.take(1)?[0] {
            0 => Ok(None),
            1 => {
                let len = Fields::new("a tar recipe", &self.take(4)?).u32()? as usize;
                if len > LITERAL_MAX {
                    return Err(Error::corrupt("a tar recipe", "a literal is longer than allowed"));
                }
                Ok(Some(Segment::Literal(self.take(len)?)))
            }
            2 => {
                let record = self.take(30)?;
                let mut fields = Fields::new("a tar recipe", &record);
                let inode = InodeIndex(fields.u32()?);
                let (offset, len, crc) = (fields.u64()?, fields.u64()?, fields.u64()?);
                let name = self.take(fields.u16()?.into())?;
                Ok(Some(Segment::Content { inode, offset, len, crc, name }))
            }
            tag => Err(Error::corrupt("a tar recipe", format!("it has a record of type {tag}"))),
        }
    }
}

impl<R: Read> Iterator for RecipeReader<R> {
    type Item = Result<Segment>;

    fn next(&mut self) -> Option<Result<Segment>> {
        if self.ended {
            return None;
        }
        let segment = self.segment();
        self.ended = !matches!(segment, Ok(Some(_)));
        segment.transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn segments() -> impl Strategy<Value = Vec<Segment>> {
        let literal = proptest::collection::vec(any::<u8>(), 1..40).prop_map(Segment::Literal);
        let content = (any::<u32>(), any::<(u64, u64, u64)>(), proptest::collection::vec(any::<u8>(), 0..300))
            .prop_map(|(inode, (offset, len, crc), name)| Segment::Content {
                inode: InodeIndex(inode),
                offset,
                len,
                crc,
                name,
            });
        proptest::collection::vec(prop_oneof![literal, content], 0..20)
    }

    fn write(segments: &[Segment]) -> Vec<u8> {
        let mut writer = RecipeWriter::new(Vec::new()).unwrap();
        for segment in segments {
            match segment {
                Segment::Literal(bytes) => writer.literal(bytes).unwrap(),
                Segment::Content { inode, offset, len, crc, name } => {
                    writer.content(*inode, (*offset, *len), *crc, name).unwrap();
                }
            }
        }
        writer.finish().unwrap()
    }

    /// Joins neighbouring literals.
    fn joined(segments: Vec<Segment>) -> Vec<Segment> {
        let mut out: Vec<Segment> = Vec::new();
        for segment in segments {
            match (out.last_mut(), segment) {
                (Some(Segment::Literal(last)), Segment::Literal(next)) => last.extend(next),
                (_, segment) => out.push(segment),
            }
        }
        out
    }

    proptest! {
        #[test]
        fn segments_come_back(segments in segments()) {
            let bytes = write(&segments);
            let back: Result<Vec<_>> = RecipeReader::new(&bytes[..]).unwrap().collect();
            prop_assert_eq!(back.unwrap(), joined(segments));
        }

        #[test]
        fn damage_is_an_error_and_never_a_panic(segments in segments(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut bytes = write(&segments);
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(reader) = RecipeReader::new(&bytes[..at]) {
                let _ = reader.collect::<Result<Vec<_>>>();
            }
            if let Ok(reader) = RecipeReader::new(&bytes[..]) {
                let _ = reader.collect::<Result<Vec<_>>>();
            }
        }
    }
}
