//! Compressed blob bytes in, verified tar bytes out: work for the thread between the network and the unpacker.
//!
//! The tar's end is passed on only after the whole blob has arrived and matched its digest. The unpacker publishes nothing before that end,
//! so it never publishes from an unverified blob.

use std::io::{self, BufRead, Read};

use store::Digest;
use store::crash::{CrashPoint, crash_point};
use store::digest::Sha256;

use crate::jobs::pull::error::PullError;
use crate::jobs::pull::pipe::{PipeReader, PipeWriter};
use crate::registries::blob_cache::Filling;
use crate::registries::compression::{Compression, MAGIC_LEN, WindowTooLarge};
use crate::registries::{RegistryError, RemoteLayer};

/// Tar bytes are passed on in blocks of this size.
const BLOCK: usize = 256 << 10;

/// Why decoding stopped before the end.
#[derive(Debug)]
pub enum Stopped {
    /// The blob is at fault.
    Blob(PullError),
    /// The download broke off; its own error says why.
    Download,
    /// The unpacker has ended; its own error says why.
    Unpacker,
}

/// Hashes, counts and keeps the bytes that pass.
struct Hashing<R> {
    inner: R,
    hasher: Sha256,
    count: u64,
    keep: Option<Filling>,
}

impl<R> Hashing<R> {
    fn passed(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.count += bytes.len() as u64;
        if let Some(keep) = &mut self.keep {
            keep.write(bytes);
        }
    }
}

impl<R: BufRead> Read for Hashing<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(out)?;
        self.passed(&out[..count]);
        Ok(count)
    }
}

impl<R: BufRead> BufRead for Hashing<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.inner.fill_buf()
    }

    fn consume(&mut self, count: usize) {
        // The buffer holds what the consumer saw: asking again returns the same bytes without reading.
        if let Ok(buffer) = self.inner.fill_buf() {
            let bytes = &buffer[..count];
            self.hasher.update(bytes);
            if let Some(keep) = &mut self.keep {
                keep.write(bytes);
            }
        }
        self.count += count as u64;
        self.inner.consume(count);
    }
}

/// What was found at the blob's end.
struct Whole {
    digest: Digest,
    count: u64,
    surplus: u64,
    keep: Option<Filling>,
}

impl<R: BufRead> Hashing<R> {
    /// Reads the rest of the blob.
    fn drain(mut self) -> io::Result<Whole> {
        let before = self.count;
        io::copy(&mut self, &mut io::sink())?;
        Ok(Whole { digest: self.hasher.finish(), count: self.count, surplus: self.count - before, keep: self.keep })
    }
}

/// Decodes one blob. `what` names the layer in errors. `keep` receives the bytes as they come, and is completed if they turn out right.
/// Blocks.
pub fn decode(
    layer: &RemoteLayer,
    what: &str,
    input: PipeReader,
    mut output: PipeWriter,
    keep: Option<Filling>,
) -> Result<(), Stopped> {
    let mut blob = Hashing { inner: input, hasher: Sha256::new(), count: 0, keep };
    let encoding = check_encoding(layer, what, &mut blob)?;
    let decoded = match encoding.unpack(&mut blob) {
        Ok(mut tar) => copy(&mut tar, &mut output),
        Err(error) => Err(Copy::Decoder(error)),
    };
    if let Err(Copy::Output) = decoded {
        return Err(Stopped::Unpacker);
    }
    // A wrong digest explains the failure better than the decoder's error does, so the rest is read either way.
    let mut whole = blob.drain().map_err(|_| Stopped::Download)?;
    check_digest(layer, what, &whole).map_err(Stopped::Blob)?;
    if let (Some(keep), Ok(())) = (whole.keep.take(), &decoded) {
        keep.finish();
    }
    match decoded {
        Err(Copy::Decoder(error)) => Err(Stopped::Blob(explain(what, encoding, &error))),
        _ if whole.surplus > 0 => Err(Stopped::Blob(trailing(what, encoding))),
        _ => {
            crash_point(CrashPoint::BlobVerified);
            output.finish_blocking().map_err(|_| Stopped::Unpacker)
        }
    }
}

/// Compares the first bytes with the media type. They are hashed when they are consumed.
fn check_encoding(layer: &RemoteLayer, what: &str, blob: &mut Hashing<PipeReader>) -> Result<Compression, Stopped> {
    let head = blob.fill_buf().map_err(|_| Stopped::Download)?;
    let found = Compression::sniff(&head[..head.len().min(MAGIC_LEN)]);
    // An empty blob is an empty tar, whatever its media type.
    if head.is_empty() {
        return Ok(Compression::Plain);
    }
    // Docker itself goes by the first bytes, so the known compressions are accepted in place of each other.
    if found == layer.encoding || found != Compression::Plain || looks_like_tar(head) {
        return Ok(found);
    }
    let media_type = layer.media_type.clone();
    Err(Stopped::Blob(PullError::WrongEncoding { what: what.to_owned(), media_type }))
}

/// Whether an uncompressed tar begins here. It has `ustar` in its place, or the checksum that older tars have as well, or the zeros of an
/// empty tar.
fn looks_like_tar(head: &[u8]) -> bool {
    let Some(header) = head.get(..512) else { return false };
    let sum = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    // The checksum field counts as blanks.
    let expected = sum(&header[..148]) + 8 * u32::from(b' ') + sum(&header[156..]);
    let stated = std::str::from_utf8(&header[148..156]).unwrap_or_default();
    let stated = u32::from_str_radix(stated.trim_matches(|c: char| c == '\0' || c == ' '), 8);
    header[257..262] == *b"ustar" || stated == Ok(expected) || header.iter().all(|byte| *byte == 0)
}

enum Copy {
    Decoder(io::Error),
    Output,
}

fn copy(tar: &mut dyn Read, output: &mut PipeWriter) -> Result<(), Copy> {
    let mut block = vec![0; BLOCK];
    loop {
        let mut filled = 0;
        while filled < BLOCK {
            match tar.read(&mut block[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Copy::Decoder(error)),
            }
        }
        if filled == 0 {
            return Ok(());
        }
        output.write_blocking(&block[..filled]).map_err(|_| Copy::Output)?;
    }
}

/// The digest alone decides, as with Docker. A size that does not fit explains a wrong digest.
fn check_digest(layer: &RemoteLayer, what: &str, whole: &Whole) -> Result<(), PullError> {
    let what = what.to_owned();
    let (claimed, received) = (layer.claimed, whole.count);
    match whole.digest == layer.blob {
        true => Ok(()),
        false if received < claimed => Err(RegistryError::TooShort { what, claimed, received }.into()),
        false => Err(RegistryError::DigestMismatch { what, expected: layer.blob, actual: whole.digest }.into()),
    }
}

/// The error for a blob that cannot be decoded although its bytes are exactly those that were pushed.
fn explain(what: &str, encoding: Compression, error: &io::Error) -> PullError {
    if let Some(why) = error.get_ref().and_then(|inner| inner.downcast_ref::<WindowTooLarge>()) {
        return PullError::WindowTooLarge { what: what.to_owned(), why: *why };
    }
    match error.to_string() {
        // The message of flate2 when something other than a gzip member follows the last one.
        why if why.contains("invalid gzip header") => trailing(what, encoding),
        why if error.kind() == io::ErrorKind::UnexpectedEof => {
            PullError::CorruptLayer { what: what.to_owned(), why: format!("its {encoding} stream is truncated: {why}") }
        }
        why => PullError::CorruptLayer { what: what.to_owned(), why: format!("{encoding}: {why}") },
    }
}

fn trailing(what: &str, encoding: Compression) -> PullError {
    PullError::TrailingBytes { what: what.to_owned(), encoding: encoding.to_string() }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::jobs::pull::pipe::pipe;

    fn layer(blob: &[u8], encoding: Compression) -> RemoteLayer {
        RemoteLayer {
            diff_id: Digest::of(b"tar"),
            blob: Digest::of(blob),
            claimed: blob.len() as u64,
            media_type: "t".to_owned(),
            encoding,
        }
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    /// Decodes `sent` as `layer`. Returns what came out, and how it ended.
    async fn run(layer: RemoteLayer, sent: Vec<u8>) -> (io::Result<Vec<u8>>, Result<(), Stopped>) {
        let (mut network, input) = pipe();
        let (output, mut tar) = pipe();
        let decoding = tokio::task::spawn_blocking(move || decode(&layer, "layer L", input, output, None));
        let reading = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            tar.read_to_end(&mut all).map(|_| all)
        });
        let _ = network.write(&sent).await;
        let _ = network.finish().await;
        (reading.await.unwrap(), decoding.await.unwrap())
    }

    fn message(result: Result<(), Stopped>) -> String {
        match result {
            Err(Stopped::Blob(error)) => error.to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn good_blobs_come_out_whole() {
        let tar = vec![7u8; 1_000_000];
        for (blob, encoding) in [
            (tar.clone(), Compression::Plain),
            (gzip(&tar), Compression::Gzip),
            ([gzip(&tar[..10]), gzip(&tar[10..])].concat(), Compression::Gzip),
            (zstd::encode_all(&tar[..], 1).unwrap(), Compression::Zstd),
            (zstd::encode_all(&tar[..], 1).unwrap(), Compression::Gzip),
        ] {
            let (out, end) = run(layer(&blob, encoding), blob).await;
            end.unwrap();
            assert!(out.unwrap() == tar);
        }
    }

    #[tokio::test]
    async fn no_bytes_and_old_tars_are_tars_whatever_they_are_called() {
        let (out, end) = run(layer(b"", Compression::Gzip), Vec::new()).await;
        end.unwrap();
        assert!(out.unwrap().is_empty());
        // As tar wrote them before POSIX: no `ustar`, but a checksum.
        let mut v7 = vec![0; 1024];
        v7[..4].copy_from_slice(b"file");
        v7[148..156].fill(b' ');
        let sum: u32 = v7.iter().map(|byte| u32::from(*byte)).sum();
        v7[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        let (out, end) = run(layer(&v7, Compression::Gzip), v7.clone()).await;
        end.unwrap();
        assert!(out.unwrap() == v7);
        v7[0] = b'g';
        let (_, end) = run(layer(&v7, Compression::Gzip), v7).await;
        assert!(message(end).contains("says otherwise"));
    }

    #[tokio::test]
    async fn bad_blobs_never_reach_the_end() {
        // Squares, because a damaged copy of equal bytes may well be the same.
        let tar: Vec<u8> = (0..100_000u64).map(|n| (n * n / 7) as u8).collect();
        let good = gzip(&tar);
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 1;
        let (out, end) = run(layer(&good, Compression::Gzip), flipped.clone()).await;
        assert!(out.is_err());
        assert!(message(end).contains("instead of"), "a wrong digest goes before the decoder's complaint");

        let (out, end) = run(layer(&flipped, Compression::Gzip), flipped.clone()).await;
        assert!(out.is_err());
        assert!(message(end).contains("is corrupt"));

        let trailing = [good.clone(), b"rubbish after".to_vec()].concat();
        let (out, end) = run(layer(&trailing, Compression::Gzip), trailing).await;
        assert!(out.is_err());
        assert!(message(end).contains("sends more"));

        let cut = good[..good.len() - 4].to_vec();
        let (out, end) = run(layer(&cut, Compression::Gzip), cut.clone()).await;
        assert!(out.is_err());
        assert!(message(end).contains("truncated"));

        let (out, end) = run(layer(&good, Compression::Gzip), good[..50].to_vec()).await;
        assert!(out.is_err());
        assert!(message(end).contains("ends after 50"));

        let text = b"<html>not a layer</html>".to_vec();
        let (out, end) = run(layer(&text, Compression::Gzip), text.clone()).await;
        assert!(out.is_err());
        assert!(message(end).contains("says otherwise"));
    }
}
