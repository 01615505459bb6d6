//! A layer's bytes from a registry: one stream, however often the connection breaks.
//!
//! After a break the rest is requested with `Range`. A 206 is accepted only if its `Content-Range` starts at the present offset or before
//! it (the surplus is skipped). A 200 means that the registry ignores ranges, and the bytes received before are skipped. If a range gets
//! any other answer, the whole blob is requested, and the bytes received before are skipped again.
//!
//! A blob that was compressed again for transfer ([`super::content_encoding`]) is decompressed; ranges would count compressed bytes, so it is
//! requested whole. The manifest claims a length and the sender states one, but only the caller, who hashes the whole, knows. So neither is
//! enforced: a blob that ends early is requested once more, and if it ends there again, it is complete. One that is longer than claimed may
//! go on for [`MOST_UNCLAIMED`] bytes.
//!
//! Silence, and a trickle (less than [`LEAST`] over a [`STRETCH`]), count as breaks and are held against the registry.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use http::header;
use reqwest::{Response, StatusCode};
use store::Digest;
use store::image::ImageRef;
use tokio::time::Instant;

use crate::registries::error::RegistryError;
use crate::registries::oci::attempt_error::{AttemptError, trouble};
use crate::registries::oci::client::{Ask, OciClient, Verb};
use crate::registries::oci::content_encoding::{ContentEncoding, unpacked};
use crate::registries::oci::retry::Attempts;
use crate::registries::oci::retry::pause;
use crate::registries::{BlobStream, RemoteLayer};

/// Silence of this length is a break. It is longer than the transport's own limit, whose error is more precise.
const SILENCE: Duration = Duration::from_secs(75);
/// Over each stretch of this length, at least [`LEAST`] bytes must arrive.
const STRETCH: Duration = Duration::from_secs(60);
/// Bytes that must arrive in each [`STRETCH`], unless the coordinator's own limits hold them up.
const LEAST: u64 = 64 << 10;
/// Maximum number of bytes that are read beyond what the manifest claims. Docker and skopeo read everything that is sent, so images whose
/// manifests claim nothing, or too little, do exist. A storage that never stops sending wastes this much of the disk until it is found out.
const MOST_UNCLAIMED: u64 = 16 << 30;
/// This many stretches that are silent or bring less end the download.
const MOST_STALLS: u32 = 4;

/// One download in progress.
pub struct BlobDownload {
    client: Arc<OciClient>,
    image: ImageRef,
    what: String,
    blob: Digest,
    /// The length according to the manifest; 0 if it does not say.
    claimed: u64,
    /// The length according to the last answer.
    stated: Option<u64>,
    /// Maximum number of bytes that are read.
    limit: u64,
    /// The offset at which an answer ended too early.
    ended: Option<u64>,
    /// Bytes handed on so far.
    offset: u64,
    /// The offset at which the count of attempts last restarted.
    achieved: u64,
    /// Bytes of the present answer that are still to be skipped, because they were received before.
    surplus: u64,
    ranges: Ranges,
    body: Option<BoxStream<'static, Result<Bytes, AttemptError>>>,
    attempts: Attempts,
    stretch: Stretch,
    stalls: u32,
}

/// Whether the rest of a blob is requested with `Range`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ranges {
    /// It is.
    Asked,
    /// It is not: the registry does not give what ranges ask for.
    Useless,
}

/// The bytes that were received since a time.
struct Stretch {
    since: Instant,
    bytes: u64,
}

impl Stretch {
    fn new() -> Stretch {
        Stretch { since: Instant::now(), bytes: 0 }
    }
}

impl BlobDownload {
    /// A download that has not begun.
    pub fn new(client: Arc<OciClient>, image: ImageRef, layer: &RemoteLayer) -> BlobDownload {
        let attempts = client.transport().attempts();
        BlobDownload {
            what: format!("layer {} of {image}", layer.blob),
            client,
            image,
            blob: layer.blob,
            claimed: layer.claimed,
            stated: None,
            limit: layer.claimed.saturating_add(MOST_UNCLAIMED),
            ended: None,
            offset: 0,
            achieved: 0,
            surplus: 0,
            ranges: Ranges::Asked,
            body: None,
            attempts,
            stretch: Stretch::new(),
            stalls: 0,
        }
    }

    /// The download as a stream.
    pub fn into_stream(self) -> BlobStream {
        stream::try_unfold(
            self,
            |mut download| async move { Ok(download.next().await?.map(|bytes| (bytes, download))) },
        )
        .boxed()
    }

    /// The next bytes; `None` once all have arrived.
    async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        loop {
            let step = match &mut self.body {
                None => self.open().await.map(|()| None),
                Some(body) => match tokio::time::timeout(SILENCE, body.next()).await {
                    Ok(Some(Ok(bytes))) => self.judge(bytes),
                    Ok(Some(Err(trouble))) => Err(trouble),
                    Ok(None) if self.is_whole() => {
                        self.client.transport().limits().flowed(self.image.registry());
                        return Ok(None);
                    }
                    Ok(None) => Err(self.ended_early()),
                    Err(_) => Err(self.stalled("it went silent")),
                },
            };
            match step {
                Ok(None) => {}
                Ok(Some(bytes)) => {
                    let count = bytes.len() as u64;
                    let taken = self.take(bytes)?;
                    self.pay(count).await;
                    if taken.is_some() {
                        return Ok(taken);
                    }
                }
                Err(trouble) => {
                    self.body = None;
                    pause(&mut self.attempts, trouble).await?;
                }
            }
        }
    }

    /// Passes bytes on, unless the download has become a trickle.
    fn judge(&mut self, bytes: Bytes) -> Result<Option<Bytes>, AttemptError> {
        self.stretch.bytes += bytes.len() as u64;
        if self.stretch.since.elapsed() < STRETCH {
            return Ok(Some(bytes));
        }
        let came = std::mem::replace(&mut self.stretch, Stretch::new()).bytes;
        let is_last = self.expected().is_some_and(|end| self.offset + bytes.len() as u64 >= end);
        if came >= LEAST || is_last {
            self.client.transport().limits().flowed(self.image.registry());
            Ok(Some(bytes))
        } else {
            Err(self.stalled(&format!("only {came} bytes came in {} seconds", STRETCH.as_secs())))
        }
    }

    /// Counts a stall, which is held against the registry. The error may pass until there are [`MOST_STALLS`].
    fn stalled(&mut self, why: &str) -> AttemptError {
        self.stalls += 1;
        let (registry, what) = (self.image.registry().to_owned(), self.what.clone());
        self.client.transport().limits().stalled(&registry, format!("{what}: {why}"));
        let error = RegistryError::Failing { registry, what, attempts: self.stalls, why: why.to_owned() };
        if self.stalls < MOST_STALLS {
            AttemptError::Passing { error, retry_after: None }
        } else {
            AttemptError::Fatal(error)
        }
    }

    /// Waits until the limits allow the received bytes. That time does not count against the registry.
    async fn pay(&mut self, count: u64) {
        let before = Instant::now();
        self.client.transport().limits().spend(self.image.registry(), count).await;
        self.stretch.since += before.elapsed();
    }

    /// Counts bytes, without those that were received before.
    fn take(&mut self, mut bytes: Bytes) -> Result<Option<Bytes>, RegistryError> {
        let skipped = self.surplus.min(bytes.len() as u64);
        self.surplus -= skipped;
        let bytes = bytes.split_off(skipped as usize);
        if bytes.is_empty() {
            return Ok(None);
        }
        self.offset += bytes.len() as u64;
        // One byte per connection is no progress.
        if self.offset - self.achieved >= self.expected().map_or(LEAST, |end| LEAST.min(end / 16 + 1)) {
            self.achieved = self.offset;
            self.attempts.progress();
        }
        if self.offset > self.limit {
            Err(RegistryError::TooLong { what: self.what.clone(), claimed: self.claimed, limit: self.limit })
        } else {
            Ok(Some(bytes))
        }
    }

    /// The length that the sender states, or else the manifest.
    fn expected(&self) -> Option<u64> {
        self.stated.or(Some(self.claimed).filter(|claimed| *claimed > 0))
    }

    /// Whether an answer that ended without an error completed the blob, as far as can be known without its digest.
    fn is_whole(&mut self) -> bool {
        self.offset >= self.claimed || self.ended.replace(self.offset) == Some(self.offset)
    }

    /// The error for an answer that ended without an error but too early.
    fn ended_early(&self) -> AttemptError {
        let error = RegistryError::TooShort { what: self.what.clone(), claimed: self.claimed, received: self.offset };
        AttemptError::Passing { error, retry_after: None }
    }

    /// Requests the rest of the blob.
    async fn open(&mut self) -> Result<(), AttemptError> {
        let registry = self.image.registry().to_owned();
        let absent = RegistryError::MissingBlob { registry: registry.clone(), what: self.what.clone() };
        let asked = if self.ranges == Ranges::Asked { self.offset } else { 0 };
        let path = format!("blobs/{}", self.blob);
        let what = &self.what;
        let ask = Ask { image: &self.image, path, accept: None, offset: asked, what, absent, verb: Verb::Get };
        let response = match self.client.once(&ask).await {
            Err(AttemptError::Fatal(RegistryError::BadAnswer { why, .. }))
                if self.offset > 0 && why.starts_with("416") =>
            {
                self.ranges = Ranges::Useless;
                return Err(self.ended_early());
            }
            Err(AttemptError::Fatal(error @ RegistryError::BadAnswer { .. })) if asked > 0 => {
                self.ranges = Ranges::Useless;
                return Err(AttemptError::Passing { error, retry_after: None });
            }
            other => other?,
        };
        let coding = ContentEncoding::of(&response, self.claimed);
        self.surplus = match (response.status(), coding) {
            (StatusCode::PARTIAL_CONTENT, ContentEncoding::None) => self.offset - self.range_start(&response, asked)?,
            (StatusCode::PARTIAL_CONTENT, ContentEncoding::Gzip) => {
                return Err(self.useless(asked, "it is packed for the way"));
            }
            _ => self.offset,
        };
        match coding {
            ContentEncoding::Gzip => self.ranges = Ranges::Useless,
            ContentEncoding::None => {
                self.stated = response.content_length().map(|rest| self.offset - self.surplus + rest)
            }
        }
        self.stretch = Stretch::new();
        let body = response.bytes_stream().map(move |piece| piece.map_err(|error| trouble(&registry, error))).boxed();
        self.body = Some(match coding {
            ContentEncoding::None => body,
            ContentEncoding::Gzip => unpacked(body, self.image.registry(), &self.what),
        });
        Ok(())
    }

    /// Where a partial answer starts: at our offset or before it.
    fn range_start(&mut self, response: &Response, asked: u64) -> Result<u64, AttemptError> {
        let value = response.headers().get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
        match value.and_then(parse_content_range) {
            Some((start, total)) if start <= self.offset && self.fits(total) => Ok(start),
            // A 206 that was not requested and has no `Content-Range` is taken for the whole: the digest decides.
            None if asked == 0 && value.is_none() => Ok(0),
            _ => {
                let offers = format!("it offers {:?}", value.unwrap_or(""));
                Err(self.useless(asked, &offers))
            }
        }
    }

    /// Whether a partial answer can belong to this blob, judging by the total length that it states.
    fn fits(&self, total: Option<u64>) -> bool {
        let known = [self.stated, Some(self.claimed).filter(|claimed| *claimed > 0)];
        total.is_none_or(|total| known == [None, None] || known.contains(&Some(total)))
    }

    /// The error for a partial answer other than the requested one. The next attempt requests the whole blob; if this one did, the error is
    /// final.
    fn useless(&mut self, asked: u64, why: &str) -> AttemptError {
        self.ranges = Ranges::Useless;
        let error = RegistryError::BadAnswer {
            registry: self.image.registry().to_owned(),
            what: self.what.clone(),
            why: format!("it was asked to go on at byte {asked}: {why}"),
        };
        if asked > 0 { AttemptError::Passing { error, retry_after: None } } else { AttemptError::Fatal(error) }
    }
}

/// `bytes START-END/TOTAL` -> start and total (`*` is none).
fn parse_content_range(value: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = value.trim().strip_prefix("bytes")?.trim_start().split_once('/')?;
    let (start, end) = range.split_once('-')?;
    let (start, end): (u64, u64) = (start.trim().parse().ok()?, end.trim().parse().ok()?);
    let total = match total.trim() {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    (start <= end).then_some((start, total))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::registries::oci::tests::{Client, layer_of};

    #[test]
    fn content_ranges() {
        assert_eq!(parse_content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(parse_content_range("bytes 5-9/*"), Some((5, None)));
        for bad in ["", "bytes */10", "bytes 9-5/10", "items 5-9/10", "bytes 5-9"] {
            assert_eq!(parse_content_range(bad), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn a_blob_that_never_ends_is_given_up() {
        let client = Client::new();
        let image = "127.0.0.1:9/app:1".parse().unwrap();
        let mut download = BlobDownload::new(Arc::clone(&client.registry.client), image, &layer_of(b"x"));
        assert_eq!(download.limit, 1 + MOST_UNCLAIMED);
        download.limit = 10;
        assert!(download.take(Bytes::from_static(&[0; 10])).unwrap().is_some());
        let error = download.take(Bytes::from_static(&[0])).unwrap_err().to_string();
        assert!(error.contains("claims 1 bytes but sends more than 10"), "{error}");
    }

    proptest! {
        #[test]
        fn any_content_range_is_survived(text in ".*") {
            let _ = parse_content_range(&text);
        }
    }
}
