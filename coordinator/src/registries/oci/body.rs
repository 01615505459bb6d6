//! Reads the small documents in answers: bounded in length and time, and decompressed.

use std::io::Read as _;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use flate2::read::MultiGzDecoder;
use reqwest::Response;

use crate::registries::error::RegistryError;
use crate::registries::oci::attempt_error::{AttemptError, trouble};

/// A manifest, config, token or page of tags must arrive within this time, however slowly.
pub(super) const DOCUMENT_TIMEOUT: Duration = Duration::from_secs(60);
/// Maximum number of times that a body may have been compressed for transfer.
const MOST_CODINGS: usize = 2;
/// How a gzip stream begins.
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// Reads the whole body, up to `limit` bytes, within [`DOCUMENT_TIMEOUT`]: a trickle would block its job for ever.
pub(super) async fn read_limited(
    registry: &str,
    what: &str,
    response: Response,
    limit: u64,
) -> Result<Bytes, AttemptError> {
    match tokio::time::timeout(DOCUMENT_TIMEOUT, read_all(registry, what, response, limit)).await {
        Ok(read) => read,
        Err(_) => {
            let why = format!("it did not come within {} seconds", DOCUMENT_TIMEOUT.as_secs());
            let (registry, what) = (registry.to_owned(), what.to_owned());
            let error = RegistryError::Failing { registry, what, attempts: 1, why };
            Err(AttemptError::Passing { error, retry_after: None })
        }
    }
}

/// Whether a content coding is gzip, by any of its names.
pub(super) fn is_gzip(coding: &str) -> bool {
    ["gzip", "x-gzip"].iter().any(|name| coding.trim().eq_ignore_ascii_case(name))
}

/// Undoes the gzip compression that some registries add for transfer without being asked. The result has at most `limit` bytes. A body that
/// is declared as gzip but does not begin like it is returned as it is, and so is one with any other coding: servers put all sorts of words
/// there (`aws-chunked`, `UTF-8`), and the digest decides.
pub(super) async fn decoded(coding: &str, mut bytes: Bytes, limit: u64) -> Result<Bytes, String> {
    let codings = coding.split(',').map(str::trim);
    let codings: Vec<&str> = codings.filter(|coding| is_gzip(coding)).collect();
    if codings.len() > MOST_CODINGS {
        return Err(format!("it is packed {} times", codings.len()));
    }
    for _ in codings {
        if bytes.starts_with(&GZIP) {
            bytes = unzipped(bytes, limit).await?;
        }
    }
    Ok(bytes)
}

/// Decompresses a gzip stream to at most `limit` bytes.
async fn unzipped(bytes: Bytes, limit: u64) -> Result<Bytes, String> {
    let unpack = move || {
        let mut plain = Vec::new();
        MultiGzDecoder::new(&bytes[..]).take(limit + 1).read_to_end(&mut plain).map(|_| plain)
    };
    let unpacked = tokio::task::spawn_blocking(unpack).await.map_err(|_| "unpacking was interrupted".to_owned())?;
    let plain = unpacked.map_err(|error| format!("it is not the gzip that it claims to be ({error})"))?;
    if plain.len() as u64 > limit {
        Err(format!("unpacked, it is longer than {limit} bytes"))
    } else {
        Ok(Bytes::from(plain))
    }
}

async fn read_all(registry: &str, what: &str, mut response: Response, limit: u64) -> Result<Bytes, AttemptError> {
    let mut bytes = BytesMut::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| trouble(registry, error))? {
        if (bytes.len() + chunk.len()) as u64 > limit {
            let why = format!("it is longer than {limit} bytes");
            let error = RegistryError::BadAnswer { registry: registry.to_owned(), what: what.to_owned(), why };
            return Err(AttemptError::Fatal(error));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes.freeze())
}
