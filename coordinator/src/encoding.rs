//! How bytes are packed for travel: recognised by their first bytes, unpacked as a stream.
//!
//! gzip may have several members and zstd several frames, as `pigz`, `bgzip` and concatenation make them.

use std::fmt;
use std::io::{self, BufRead, Read};

use flate2::bufread::MultiGzDecoder;

/// How many first bytes [`Encoding::sniff`] looks at.
pub const MAGIC_LEN: usize = 6;

/// How a stream is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// As it is.
    Plain,
    /// gzip (RFC 1952).
    Gzip,
    /// zstd (RFC 8878).
    Zstd,
    /// bzip2, which no layer may use and we do not unpack.
    Bzip2,
    /// xz, likewise.
    Xz,
}

impl Encoding {
    /// What `head`, the first bytes of a stream, says.
    pub fn sniff(head: &[u8]) -> Encoding {
        // A zstd stream may begin with a skippable frame, 0x184D2A50 to 0x184D2A5F.
        let skippable = matches!(head, [low, 0x2a, 0x4d, 0x18, ..] if low & 0xf0 == 0x50);
        match head {
            [0x1f, 0x8b, ..] => Encoding::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Encoding::Zstd,
            _ if skippable => Encoding::Zstd,
            [b'B', b'Z', b'h', ..] => Encoding::Bzip2,
            [0xfd, b'7', b'z', b'X', b'Z', 0] => Encoding::Xz,
            _ => Encoding::Plain,
        }
    }

    /// A reader of the unpacked bytes of `packed`.
    pub fn unpack<'a>(self, packed: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
        match self {
            Encoding::Plain => Ok(Box::new(packed)),
            Encoding::Gzip => Ok(Box::new(MultiGzDecoder::new(packed))),
            Encoding::Zstd => Ok(Box::new(zstd::stream::read::Decoder::with_buffer(packed)?)),
            Encoding::Bzip2 | Encoding::Xz => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("it is compressed with {self}: unpack it or compress it with gzip or zstd"),
            )),
        }
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Encoding::Plain => "no compression",
            Encoding::Gzip => "gzip",
            Encoding::Zstd => "zstd",
            Encoding::Bzip2 => "bzip2",
            Encoding::Xz => "xz",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn unpack(packed: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Encoding::sniff(packed).unpack(packed)?.read_to_end(&mut out)?;
        Ok(out)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn members_and_frames_are_joined() {
        assert_eq!(unpack(b"plain").unwrap(), b"plain");
        assert_eq!(unpack(&[gzip(b"ab"), gzip(b"cd")].concat()).unwrap(), b"abcd");
        let frames = [zstd::encode_all(&b"ab"[..], 1).unwrap(), zstd::encode_all(&b"cd"[..], 1).unwrap()].concat();
        assert_eq!(unpack(&frames).unwrap(), b"abcd");
    }

    #[test]
    fn rubbish_after_the_last_member_is_an_error() {
        assert!(unpack(&[gzip(b"ab"), b"rubbish".to_vec()].concat()).is_err());
        assert!(unpack(&gzip(b"ab")[..15]).is_err());
        assert!(unpack(b"BZh91AY").is_err());
    }
}
