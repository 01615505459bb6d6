//! A layer's bytes from a registry: one stream, however often the connection breaks.
//!
//! After a break the rest is asked for by `Range`. A 206 is believed only if its `Content-Range` starts where we are
//! (or before: the surplus is skipped); a 200 means that the registry ignores ranges, and what we have is skipped. Where a range is
//! answered with something else, the whole is asked for, and what we have is skipped again.
//!
//! A blob that was packed once more for the way ([`super::coding`]) is unpacked; ranges count packed bytes, so it is asked for whole.
//! How long the blob is, its manifest claims and its sender states. Only the caller, who hashes the whole, knows, so neither is
//! insisted on: a blob that ends early is asked for once more, and one that ends there again has ended; one that is longer than
//! claimed goes on for [`MOST_UNCLAIMED`] bytes at most.
//!
//! Silence, and a trickle (less than [`LEAST`] over a [`STRETCH`]), count as breaks and against the registry.

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
use crate::registries::oci::client::{Ask, OciClient, Verb};
use crate::registries::oci::coding::{Coding, unpacked};
use crate::registries::oci::persist::pause;
use crate::registries::oci::retry::Attempts;
use crate::registries::oci::trouble::{Trouble, trouble};
use crate::registries::{BlobStream, RemoteLayer};

/// Silence for so long is a break. Longer than the transport's own limit, which knows the reason better.
const SILENCE: Duration = Duration::from_secs(75);
/// Over each stretch of this length ...
const STRETCH: Duration = Duration::from_secs(60);
/// ... at least so much must come, unless our own limits hold it up.
const LEAST: u64 = 64 << 10;
/// So much more than the manifest claims is read: docker and skopeo read all that comes, so images whose manifests claim nothing, or too
/// little, do exist. A storage that never ends wastes so much of the disk, for as long as it takes to find out.
const MOST_UNCLAIMED: u64 = 16 << 30;
/// So many stretches that bring less end the download.
const MOST_STALLS: u32 = 4;

/// One download in progress.
pub struct BlobDownload {
    client: Arc<OciClient>,
    image: ImageRef,
    what: String,
    blob: Digest,
    /// What the manifest says of its length; 0 is nothing.
    claimed: u64,
    /// What the last answer said of its length.
    stated: Option<u64>,
    /// At most so many bytes are read.
    limit: u64,
    /// Where an answer ended before it should have.
    ended: Option<u64>,
    /// Bytes handed on so far.
    offset: u64,
    /// Of these, those that were there when patience was last renewed.
    achieved: u64,
    /// Bytes of the present answer that we already have.
    surplus: u64,
    ranges: Ranges,
    body: Option<BoxStream<'static, Result<Bytes, Trouble>>>,
    attempts: Attempts,
    stretch: Stretch,
    stalls: u32,
}

/// Whether the rest of a blob is asked for by `Range`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ranges {
    /// It is.
    Asked,
    /// The registry does not give what ranges ask for.
    Useless,
}

/// What came since when.
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

    /// The next bytes; nothing once all have come.
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

    /// Lets bytes through unless they have become a trickle.
    fn judge(&mut self, bytes: Bytes) -> Result<Option<Bytes>, Trouble> {
        self.stretch.bytes += bytes.len() as u64;
        if self.stretch.since.elapsed() < STRETCH {
            return Ok(Some(bytes));
        }
        let came = std::mem::replace(&mut self.stretch, Stretch::new()).bytes;
        let is_last = self.expected().is_some_and(|end| self.offset + bytes.len() as u64 >= end);
        match came >= LEAST || is_last {
            true => {
                self.client.transport().limits().flowed(self.image.registry());
                Ok(Some(bytes))
            }
            false => Err(self.stalled(&format!("only {came} bytes came in {} seconds", STRETCH.as_secs()))),
        }
    }

    /// A break that the registry would not call one.
    fn stalled(&mut self, why: &str) -> Trouble {
        self.stalls += 1;
        let (registry, what) = (self.image.registry().to_owned(), self.what.clone());
        self.client.transport().limits().stalled(&registry, format!("{what}: {why}"));
        let error = RegistryError::Failing { registry, what, attempts: self.stalls, why: why.to_owned() };
        match self.stalls < MOST_STALLS {
            true => Trouble::Passing { error, retry_after: None },
            false => Trouble::Fatal(error),
        }
    }

    /// Waits until the limits allow for what came; that time is not the registry's.
    async fn pay(&mut self, count: u64) {
        let before = Instant::now();
        self.client.transport().limits().spend(self.image.registry(), count).await;
        self.stretch.since += before.elapsed();
    }

    /// Counts bytes, leaving out what we already have.
    fn take(&mut self, mut bytes: Bytes) -> Result<Option<Bytes>, RegistryError> {
        let skipped = self.surplus.min(bytes.len() as u64);
        self.surplus -= skipped;
        let bytes = bytes.split_off(skipped as usize);
        if bytes.is_empty() {
            return Ok(None);
        }
        self.offset += bytes.len() as u64;
        // A byte for each connection is no progress.
        if self.offset - self.achieved >= self.expected().map_or(LEAST, |end| LEAST.min(end / 16 + 1)) {
            self.achieved = self.offset;
            self.attempts.progress();
        }
        match self.offset > self.limit {
            true => Err(RegistryError::TooLong { what: self.what.clone(), claimed: self.claimed, limit: self.limit }),
            false => Ok(Some(bytes)),
        }
    }

    /// Where the blob may well end: where its sender says, or else its manifest.
    fn expected(&self) -> Option<u64> {
        self.stated.or(Some(self.claimed).filter(|claimed| *claimed > 0))
    }

    /// Whether an answer that ended without an error has brought the whole, as far as can be known without its digest.
    fn is_whole(&mut self) -> bool {
        self.offset >= self.claimed || self.ended.replace(self.offset) == Some(self.offset)
    }

    /// An answer that ended without an error but too early.
    fn ended_early(&self) -> Trouble {
        let error = RegistryError::TooShort { what: self.what.clone(), claimed: self.claimed, received: self.offset };
        Trouble::Passing { error, retry_after: None }
    }

    /// Asks for the rest.
    async fn open(&mut self) -> Result<(), Trouble> {
        let registry = self.image.registry().to_owned();
        let absent = RegistryError::MissingBlob { registry: registry.clone(), what: self.what.clone() };
        let asked = if self.ranges == Ranges::Asked { self.offset } else { 0 };
        let path = format!("blobs/{}", self.blob);
        let what = &self.what;
        let ask = Ask { image: &self.image, path, accept: None, offset: asked, what, absent, verb: Verb::Get };
        let response = match self.client.once(&ask).await {
            Err(Trouble::Fatal(RegistryError::BadAnswer { why, .. })) if self.offset > 0 && why.starts_with("416") => {
                self.ranges = Ranges::Useless;
                return Err(self.ended_early());
            }
            Err(Trouble::Fatal(error @ RegistryError::BadAnswer { .. })) if asked > 0 => {
                self.ranges = Ranges::Useless;
                return Err(Trouble::Passing { error, retry_after: None });
            }
            other => other?,
        };
        let coding = Coding::of(&response, self.claimed);
        self.surplus = match (response.status(), coding) {
            (StatusCode::PARTIAL_CONTENT, Coding::None) => self.offset - self.range_start(&response, asked)?,
            (StatusCode::PARTIAL_CONTENT, Coding::Gzip) => return Err(self.useless(asked, "it is packed for the way")),
            _ => self.offset,
        };
        match coding {
            Coding::Gzip => self.ranges = Ranges::Useless,
            Coding::None => self.stated = response.content_length().map(|rest| self.offset - self.surplus + rest),
        }
        self.stretch = Stretch::new();
        let body = response.bytes_stream().map(move |piece| piece.map_err(|error| trouble(&registry, error))).boxed();
        self.body = Some(match coding {
            Coding::None => body,
            Coding::Gzip => unpacked(body, self.image.registry(), &self.what),
        });
        Ok(())
    }

    /// Where a partial answer starts: at our offset or before it.
    fn range_start(&mut self, response: &Response, asked: u64) -> Result<u64, Trouble> {
        let value = response.headers().get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
        match value.and_then(parse_content_range) {
            Some((start, total)) if start <= self.offset && self.fits(total) => Ok(start),
            // A part that nobody asked for and that says nothing of itself is the whole: the digest decides.
            None if asked == 0 && value.is_none() => Ok(0),
            _ => {
                let offers = format!("it offers {:?}", value.unwrap_or(""));
                Err(self.useless(asked, &offers))
            }
        }
    }

    /// Whether a part is one of this blob, as far as its whole length tells.
    fn fits(&self, total: Option<u64>) -> bool {
        let known = [self.stated, Some(self.claimed).filter(|claimed| *claimed > 0)];
        total.is_none_or(|total| known == [None, None] || known.contains(&Some(total)))
    }

    /// A partial answer that is not the part that was asked for: the next time the whole is asked for, unless it was.
    fn useless(&mut self, asked: u64, why: &str) -> Trouble {
        self.ranges = Ranges::Useless;
        let error = RegistryError::BadAnswer {
            registry: self.image.registry().to_owned(),
            what: self.what.clone(),
            why: format!("it was asked to go on at byte {asked}: {why}"),
        };
        if asked > 0 { Trouble::Passing { error, retry_after: None } } else { Trouble::Fatal(error) }
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
