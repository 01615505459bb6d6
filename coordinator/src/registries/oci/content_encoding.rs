//! Blobs that were compressed again for transfer (`Content-Encoding`), although nobody asked for that.
//!
//! Some servers declare every `.tar.gz` as gzip without compressing it: if the length is the blob's, nothing was compressed. The caller
//! hashes the result, so a wrong guess is found out.

use std::io::Write as _;

use bytes::{Buf as _, Bytes};
use flate2::write::MultiGzDecoder;
use futures::stream::{self, BoxStream, StreamExt};
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH};
use reqwest::Response;

use crate::registries::error::RegistryError;
use crate::registries::oci::attempt_error::AttemptError;
use crate::registries::oci::body::is_gzip;

/// Compressed bytes that are decompressed at a time. At most a thousand times as many come out.
const PIECE: usize = 1 << 10;

/// How an answer is compressed for transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ContentEncoding {
    /// Not at all.
    None,
    /// As gzip.
    Gzip,
}

impl ContentEncoding {
    /// What the headers of an answer say about a blob of `size` bytes.
    pub(super) fn of(response: &Response, size: u64) -> ContentEncoding {
        let text = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        let length: Option<u64> = text(CONTENT_LENGTH).and_then(|length| length.trim().parse().ok());
        match text(CONTENT_ENCODING) {
            Some(coding) if is_gzip(coding) && length != Some(size) => ContentEncoding::Gzip,
            _ => ContentEncoding::None,
        }
    }
}

struct Unpacking {
    body: BoxStream<'static, Result<Bytes, AttemptError>>,
    decoder: MultiGzDecoder<Vec<u8>>,
    packed: Bytes,
    registry: String,
    what: String,
}

impl Unpacking {
    /// The next bytes; `None` at the end.
    async fn next(&mut self) -> Result<Option<Bytes>, AttemptError> {
        loop {
            if self.packed.is_empty() {
                match self.body.next().await {
                    Some(piece) => self.packed = piece?,
                    // Missing bytes at the end are noticed by the caller, who counts them.
                    None => return Ok(None),
                }
            }
            let piece = self.packed.len().min(PIECE);
            let fed = self.decoder.write_all(&self.packed[..piece]).and_then(|()| self.decoder.flush());
            fed.map_err(|error| self.is_no_gzip(&error))?;
            self.packed.advance(piece);
            let plain = std::mem::take(self.decoder.get_mut());
            if !plain.is_empty() {
                return Ok(Some(Bytes::from(plain)));
            }
        }
    }

    fn is_no_gzip(&self, error: &std::io::Error) -> AttemptError {
        AttemptError::Fatal(RegistryError::BadAnswer {
            registry: self.registry.clone(),
            what: self.what.clone(),
            why: format!("it is not the gzip that its Content-Encoding says ({error})"),
        })
    }
}

/// Decompresses a body that is compressed as gzip.
pub(super) fn unpacked(
    body: BoxStream<'static, Result<Bytes, AttemptError>>,
    registry: &str,
    what: &str,
) -> BoxStream<'static, Result<Bytes, AttemptError>> {
    let decoder = MultiGzDecoder::new(Vec::new());
    let (registry, what) = (registry.to_owned(), what.to_owned());
    let unpacking = Unpacking { body, decoder, packed: Bytes::new(), registry, what };
    let step = |mut unpacking: Unpacking| async move { Ok(unpacking.next().await?.map(|bytes| (bytes, unpacking))) };
    stream::try_unfold(unpacking, step).boxed()
}
