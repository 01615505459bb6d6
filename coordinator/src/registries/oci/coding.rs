//! Blobs that were packed once more for the way (`Content-Encoding`), although nobody asked for that.
//!
//! Some servers call every `.tar.gz` gzip without packing it: where the length is the blob's, nothing was packed. The caller hashes
//! what comes out, so a wrong guess is found out.

use std::io::Write as _;

use bytes::{Buf as _, Bytes};
use flate2::write::MultiGzDecoder;
use futures::stream::{self, BoxStream, StreamExt};
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH};
use reqwest::Response;

use crate::registries::error::RegistryError;
use crate::registries::oci::body::is_gzip;
use crate::registries::oci::trouble::Trouble;

/// So many packed bytes are unpacked at a time: a thousand times as many come out at most.
const PIECE: usize = 1 << 10;

/// How an answer is packed for the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Coding {
    /// Not at all.
    None,
    /// As gzip.
    Gzip,
}

impl Coding {
    /// What the headers of an answer say of a blob of `size` bytes.
    pub(super) fn of(response: &Response, size: u64) -> Coding {
        let text = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        let length: Option<u64> = text(CONTENT_LENGTH).and_then(|length| length.trim().parse().ok());
        match text(CONTENT_ENCODING) {
            Some(coding) if is_gzip(coding) && length != Some(size) => Coding::Gzip,
            _ => Coding::None,
        }
    }
}

struct Unpacking {
    body: BoxStream<'static, Result<Bytes, Trouble>>,
    decoder: MultiGzDecoder<Vec<u8>>,
    packed: Bytes,
    registry: String,
    what: String,
}

impl Unpacking {
    /// The next bytes; nothing at the end.
    async fn next(&mut self) -> Result<Option<Bytes>, Trouble> {
        loop {
            if self.packed.is_empty() {
                match self.body.next().await {
                    Some(piece) => self.packed = piece?,
                    // What is missing at the end is noticed by whoever counts.
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

    fn is_no_gzip(&self, error: &std::io::Error) -> Trouble {
        Trouble::Fatal(RegistryError::BadAnswer {
            registry: self.registry.clone(),
            what: self.what.clone(),
            why: format!("it is not the gzip that its Content-Encoding says ({error})"),
        })
    }
}

/// What a body holds that is packed as gzip.
pub(super) fn unpacked(
    body: BoxStream<'static, Result<Bytes, Trouble>>,
    registry: &str,
    what: &str,
) -> BoxStream<'static, Result<Bytes, Trouble>> {
    let decoder = MultiGzDecoder::new(Vec::new());
    let (registry, what) = (registry.to_owned(), what.to_owned());
    let unpacking = Unpacking { body, decoder, packed: Bytes::new(), registry, what };
    let step = |mut unpacking: Unpacking| async move { Ok(unpacking.next().await?.map(|bytes| (bytes, unpacking))) };
    stream::try_unfold(unpacking, step).boxed()
}
