//! Compression of layers and archives: recognised by its first bytes, and decompressed as a stream.
//!
//! A gzip stream may have several members, a zstd stream several frames, and xz and bzip2 files several streams: `pigz`, `pbzip2` and
//! concatenation make them. Whatever a stream says of itself, decompressing it takes no more memory than [`WINDOW_MAX`] and a few MiB: gzip
//! and bzip2 have no larger windows, and zstd and xz streams that need more are refused.

use std::fmt;
use std::io::{self, BufRead, Read};

use bzip2::bufread::MultiBzDecoder;
use flate2::bufread::MultiGzDecoder;
use liblzma::bufread::XzDecoder;
use liblzma::stream::{CONCATENATED, Stream};

/// The number of first bytes that [`Compression::sniff`] looks at.
pub const MAGIC_LEN: usize = 6;

/// The logarithm of [`WINDOW_MAX`].
const WINDOW_LOG_MAX: u32 = 27;
/// The largest zstd window and xz dictionary: what `zstd --ultra -22` uses, the most that `zstd -d` accepts by default, and twice as much
/// as `xz -9` uses.
const WINDOW_MAX: u64 = 1 << WINDOW_LOG_MAX;
/// Memory that xz may need in addition to its dictionary.
const XZ_MARGIN: u64 = 1 << 20;
/// The zstd library's message about a frame with a larger window, which is the only way to recognise that error.
const ZSTD_TOO_LARGE: &str = "Frame requires too much memory for decoding";

/// How a stream is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not compressed.
    Plain,
    /// gzip (RFC 1952).
    Gzip,
    /// zstd (RFC 8878).
    Zstd,
    /// bzip2.
    Bzip2,
    /// xz.
    Xz,
}

/// A stream that needs more memory to be decompressed than is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("its {0} stream needs a window of more than {limit} MiB: pack it with a smaller one", limit = WINDOW_MAX >> 20)]
pub struct WindowTooLarge(pub Compression);

impl Compression {
    /// Recognises the encoding by `head`, the first bytes of a stream.
    pub fn sniff(head: &[u8]) -> Compression {
        // A zstd stream may begin with a skippable frame, 0x184D2A50 to 0x184D2A5F.
        let skippable = matches!(head, [low, 0x2a, 0x4d, 0x18, ..] if low & 0xf0 == 0x50);
        match head {
            [0x1f, 0x8b, ..] => Compression::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
            _ if skippable => Compression::Zstd,
            [b'B', b'Z', b'h', ..] => Compression::Bzip2,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Compression::Xz,
            _ => Compression::Plain,
        }
    }

    /// Returns a reader of the decompressed bytes of `packed`.
    pub fn unpack<'a>(self, packed: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Compression::Plain => Box::new(packed),
            Compression::Gzip => Box::new(MultiGzDecoder::new(packed)),
            Compression::Bzip2 => Box::new(MultiBzDecoder::new(packed)),
            Compression::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(packed)?;
                decoder.window_log_max(WINDOW_LOG_MAX)?;
                Box::new(Windowed { inner: decoder, encoding: self })
            }
            Compression::Xz => {
                let stream = Stream::new_stream_decoder(WINDOW_MAX + XZ_MARGIN, CONCATENATED)?;
                Box::new(Windowed { inner: XzDecoder::new_stream(packed, stream), encoding: self })
            }
        })
    }
}

/// A decoder that reports a window that is too large as [`WindowTooLarge`].
struct Windowed<R> {
    inner: R,
    encoding: Compression,
}

impl<R: Read> Read for Windowed<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.inner
            .read(out)
            .map_err(|error| if is_too_large(&error) { io::Error::other(WindowTooLarge(self.encoding)) } else { error })
    }
}

fn is_too_large(error: &io::Error) -> bool {
    let by_xz = error.get_ref().and_then(|inner| inner.downcast_ref::<liblzma::stream::Error>());
    by_xz == Some(&liblzma::stream::Error::MemLimit) || error.to_string() == ZSTD_TOO_LARGE
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compression::Plain => "no compression",
            Compression::Gzip => "gzip",
            Compression::Zstd => "zstd",
            Compression::Bzip2 => "bzip2",
            Compression::Xz => "xz",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use liblzma::stream::{Check, Filters, LzmaOptions};

    use super::*;

    fn unpack(packed: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Compression::sniff(packed).unpack(packed)?.read_to_end(&mut out)?;
        Ok(out)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        zstd::encode_all(bytes, 1).unwrap()
    }

    fn bzip2(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn xz(bytes: &[u8]) -> Vec<u8> {
        xz_with(bytes, 1 << 20, Check::Crc64)
    }

    fn xz_with(bytes: &[u8], dictionary: u32, check: Check) -> Vec<u8> {
        let mut options = LzmaOptions::new_preset(1).unwrap();
        let mut filters = Filters::new();
        filters.lzma2(options.dict_size(dictionary));
        let stream = Stream::new_stream_encoder(&filters, check).unwrap();
        let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    type Packer = fn(&[u8]) -> Vec<u8>;

    const PACKERS: [Packer; 4] = [gzip, zstd, bzip2, xz];

    #[test]
    fn members_frames_and_streams_are_joined() {
        assert_eq!(unpack(b"plain").unwrap(), b"plain");
        for pack in PACKERS {
            assert_eq!(unpack(&[pack(b"ab"), pack(b""), pack(b"cd")].concat()).unwrap(), b"abcd");
            assert_eq!(unpack(&[pack(b""), pack(b"ab")].concat()).unwrap(), b"ab");
        }
    }

    #[test]
    fn rubbish_after_the_last_member_is_an_error() {
        for pack in PACKERS {
            let packed = pack(b"some text");
            for rubbish in [&b"rubbish"[..], &[0; 3], &[0; 511], b"BZh", &[0xfd]] {
                assert!(unpack(&[&packed, rubbish].concat()).is_err());
            }
            for cut in 1..packed.len() {
                let head = &packed[..cut];
                assert!(unpack(head).map_or(true, |out| out == head), "whoever is not recognised is handed on");
                let sniffed = Compression::sniff(&packed);
                let unpacked = sniffed.unpack(head).unwrap().read_to_end(&mut Vec::new());
                assert_eq!(unpacked.unwrap_err().kind(), io::ErrorKind::UnexpectedEof, "{sniffed} cut at {cut}");
            }
        }
        assert!(unpack(b"BZh91AY").is_err());
    }

    #[test]
    fn xz_is_read_as_its_own_program_reads_it() {
        let padded = [xz(b"ab"), vec![0; 8], xz(b"cd"), vec![0; 4]].concat();
        assert_eq!(unpack(&padded).unwrap(), b"abcd");
        for check in [Check::None, Check::Crc32, Check::Crc64, Check::Sha256] {
            assert_eq!(unpack(&xz_with(b"abcd", 1 << 20, check)).unwrap(), b"abcd");
        }
        let mut damaged = xz(&[7; 1000]);
        damaged[40] ^= 1;
        assert!(unpack(&damaged).is_err());
    }

    #[test]
    fn windows_are_bounded_and_their_refusal_is_a_sentence() {
        let with_window = |log: u32| {
            let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
            encoder.window_log(log).unwrap();
            encoder.write_all(b"abcd").unwrap();
            encoder.finish().unwrap()
        };
        let with_dictionary = |log: u32| xz_with(b"abcd", 1 << log, Check::None);
        for packed in [with_window(27), with_dictionary(27)] {
            assert_eq!(unpack(&packed).unwrap(), b"abcd");
        }
        // Also in the second frame or stream.
        let second = [[with_window(27), with_window(28)].concat(), [with_dictionary(27), with_dictionary(28)].concat()];
        for packed in [with_window(28), with_window(31), with_dictionary(28)].into_iter().chain(second) {
            let error = unpack(&packed).unwrap_err();
            let told = error.get_ref().and_then(|inner| inner.downcast_ref::<WindowTooLarge>());
            assert_eq!(told, Some(&WindowTooLarge(Compression::sniff(&packed))));
            assert!(error.to_string().contains("a window of more than 128 MiB"), "{error}");
        }
    }
}
