//! One layer, from the registry's stream to the published layer.
//!
//! Three parties work at once: this task feeds the network's bytes into a pipe, one thread decodes and checks them, and one unpacks and
//! publishes. When one fails, its pipes close and the others stop. The first cause is reported.

use std::io::{self, Read};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::StreamExt;
use futures::stream::Peekable;
use store::crash::{CrashPoint, crash_point};
use store::image::ImageRef;
use store::publisher::Publisher;
use tokio_util::sync::CancellationToken;

use crate::jobs::pull::decode::{Stopped, decode};
use crate::jobs::pull::error::PullError;
use crate::jobs::pull::pipe::{PipeReader, PipeWriter, pipe_until};
use crate::jobs::pull::present::{blocking, verified_size};
use crate::jobs::pull::progress::{LayerMeter, Stage};
use crate::jobs::pull::single_flight::FetchResult;
use crate::jobs::pull::verified::VerifiedBlobs;
use crate::registries::blob_cache::BlobCache;
use crate::registries::limits::Limits;
use crate::registries::limits::priority::Waiters;
use crate::registries::{BlobStream, Registry, RemoteLayer};
use crate::state::state_db::StateDb;
use crate::unpack::previous_layout::PreviousLayout;
use crate::unpack::{Expect, UnpackError, unpack_verified, verify_layer};

/// Everything that one layer's fetch needs.
pub struct LayerFetch {
    /// Where the layer comes from.
    pub registry: Arc<dyn Registry>,
    /// The image that it belongs to.
    pub image: ImageRef,
    /// The layer.
    pub layer: RemoteLayer,
    /// Publishes the layer.
    pub publisher: Arc<Publisher>,
    /// The database, which knows where pieces lie.
    pub state_db: Arc<dyn StateDb>,
    /// Which blobs were found to be which layers.
    pub verified: Arc<VerifiedBlobs>,
    /// The slots for parallel fetches.
    pub limits: Arc<Limits>,
    /// The jobs that wait for the layer.
    pub waiters: Arc<Waiters>,
    /// Keeps the blob as it arrives.
    pub originals: Arc<BlobCache>,
    /// Counts compressed bytes of all layers.
    pub fetched: Arc<AtomicU64>,
    /// Cancelled when a layer of the job that started this fetch has failed.
    pub failed: CancellationToken,
}

/// How feeding the pipe ended.
enum Fed {
    /// All bytes are in the pipe.
    Whole,
    /// The decoder has ended; its own error says why.
    DecoderGone,
    /// The registry failed, or the fetch was stopped.
    Failed(PullError),
}

impl LayerFetch {
    /// Waits for a permit, then fetches.
    pub async fn run(self, stop: CancellationToken, meter: Arc<LayerMeter>) -> FetchResult {
        let _permit = tokio::select! {
            () = stop.cancelled() => return Err(PullError::Cancelled),
            permit = self.limits.permit(self.registry.host(&self.image), &self.waiters) => permit,
        };
        // Other jobs that want the layer begin a new fetch.
        if self.failed.is_cancelled() {
            return Err(PullError::Cancelled);
        }
        // Between the job's look and the permit, another fetch may have brought the layer.
        let host = self.registry.host(&self.image);
        if let Some(size) = verified_size(&self.publisher, &self.verified, host, &self.layer).await? {
            self.registry.confirm_blob(&self.image, &self.layer).await?;
            meter.measured(size);
            meter.enter(Stage::Present);
            return Ok(());
        }
        meter.enter(Stage::Fetching);
        let landing = self.fetch(&stop, &meter).await;
        if landing.is_err() {
            // Before the slot is free for another layer of the same job.
            self.failed.cancel();
        }
        meter.enter(if landing.is_ok() { Stage::Done } else { Stage::Failed });
        landing
    }

    fn what(&self) -> String {
        format!("layer {} of {}", self.layer.blob, self.image)
    }

    async fn fetch(&self, stop: &CancellationToken, meter: &Arc<LayerMeter>) -> FetchResult {
        let mut stream = self.registry.layer(&self.image, &self.layer).peekable();
        // A registry that is slow to answer must hold no thread.
        let first = Pin::new(&mut stream).peek();
        tokio::select! {
            () = stop.cancelled() => return Err(PullError::Cancelled),
            _ = first => {}
        }
        let (network, packed) = pipe_until(stop);
        let (unpacked, tar) = pipe_until(stop);
        let (layer, what) = (self.layer.clone(), self.what());
        let keep = self.originals.fill(layer.blob, layer.claimed);
        let decoding = blocking(move || decode(&layer, &what, packed, unpacked, keep));
        let unpacking = blocking(self.unpacking(tar, meter, stop));
        // Both threads must run before the first byte is awaited.
        let (decoding, unpacking) = (tokio::spawn(decoding), tokio::spawn(unpacking));
        let fed = self.feed(stream, network, stop, meter).await;
        let (decoded, published) = (decoding.await, unpacking.await);
        let crashed =
            |_| PullError::Unpack(format!("{} could not be unpacked: the coordinator's log says why", self.what()));
        let (decoded, published) = (decoded.map_err(crashed)??, published.map_err(crashed)??);
        match (fed, decoded) {
            (Fed::Failed(error), _) | (_, Err(Stopped::Blob(error))) => return Err(error),
            _ => published?,
        }
        Ok(())
    }

    /// The unpacker's work, to be run on a thread. A layer that is already in the store, but did not come from this blob, is only verified.
    fn unpacking(
        &self,
        tar: PipeReader,
        meter: &Arc<LayerMeter>,
        stop: &CancellationToken,
    ) -> impl FnOnce() -> FetchResult + Send + 'static {
        let stop = stop.clone();
        let (publisher, state_db) = (Arc::clone(&self.publisher), Arc::clone(&self.state_db));
        let (verified, layer, what) = (Arc::clone(&self.verified), self.layer.clone(), self.what());
        let host = self.registry.host(&self.image).to_owned();
        let (tar, meter) = (Counted { inner: tar, meter: Arc::clone(meter) }, Arc::clone(meter));
        move || {
            let expect = Expect { diff_id: layer.diff_id };
            // Recorded before the layer gets its name: whoever finds the layer then need not fetch it again, even after a crash.
            let remember = || {
                if let Err(error) = verified.record(&host, &layer, meter.fetched()) {
                    tracing::warn!("the digest of {what} is not remembered: {error}");
                }
                crash_point(CrashPoint::BlobRemembered);
            };
            let failed = |error| unpack_failed(error, &what);
            if publisher.store().has_layer(&layer.diff_id)? {
                verify_layer(tar, &expect).map_err(failed)?;
                remember();
                return Ok(());
            }
            // A layer that fsck moved away must come back as it was, because others may refer to it.
            let previous = publisher.previous_index(&layer.diff_id);
            let locations = PreviousLayout::new(previous.as_ref(), state_db.locations());
            unpack_verified(&publisher, &locations, tar, &expect, &stop, &remember).map(drop).map_err(failed)
        }
    }

    /// Feeds the registry's bytes into the pipe.
    async fn feed(
        &self,
        mut stream: Peekable<BlobStream>,
        mut pipe: PipeWriter,
        stop: &CancellationToken,
        meter: &LayerMeter,
    ) -> Fed {
        loop {
            let next = tokio::select! {
                () = stop.cancelled() => return Fed::Failed(PullError::Cancelled),
                next = stream.next() => next,
            };
            let bytes = match next {
                Some(Ok(bytes)) => bytes,
                Some(Err(error)) => return Fed::Failed(error.into()),
                None => break,
            };
            crash_point(CrashPoint::LayerArriving);
            meter.add_received(bytes.len() as u64);
            self.fetched.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            if pipe.write(&bytes).await.is_err() {
                return Fed::DecoderGone;
            }
        }
        meter.measured(meter.fetched());
        meter.enter(Stage::Unpacking);
        match pipe.finish().await {
            Ok(()) => Fed::Whole,
            Err(_) => Fed::DecoderGone,
        }
    }
}

/// Counts the tar bytes that the unpacker takes.
struct Counted {
    inner: PipeReader,
    meter: Arc<LayerMeter>,
}

impl Read for Counted {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(out)?;
        self.meter.add_unpacked(count as u64);
        Ok(count)
    }
}

/// Converts the unpacker's error into the job's.
fn unpack_failed(error: UnpackError, what: &str) -> PullError {
    match error {
        UnpackError::Store(error) => error.into(),
        UnpackError::Stopped => PullError::Cancelled,
        error => PullError::Unpack(format!("{what}: {error}")),
    }
}
