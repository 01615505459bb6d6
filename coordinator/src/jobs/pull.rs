//! One pull: resolve, fetch the layers in parallel, publish the image.
//!
//! ```text
//!  registry ──BlobStream──▶ pipe ──▶ decode (thread) ──▶ pipe ──▶ unpack (thread) ──▶ store::publisher
//!            async task     4 MiB    blob digest         4 MiB    diffID, chunks       stage, verify, rename
//! ```
//!
//! Invariants: memory is bounded by the pipes, whatever the layer's size, and nothing is staged on local disk. A layer is published only
//! after its blob digest and its diffID were right, and the image only after all its layers. A layer that several jobs want from one
//! registry is fetched once ([`single_flight`]). A layer that is already in the store counts only if the image's repository shows that it
//! has the layer, too ([`verified`]).
//!
//! **A layer that fails** fails the job. Layers whose bytes are arriving by then are completed and kept, so that the next attempt need not
//! fetch them. Layers that still wait are not begun.

pub mod decode;
pub mod error;
pub mod layer;
pub mod pipe;
mod present;
pub mod progress;
pub mod single_flight;
pub mod verified;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::stream::{FuturesUnordered, StreamExt};
use jiff::Timestamp;
use store::Digest;
use store::catalogue::{Catalogue, Change};
use store::crash::{CrashPoint, crash_point};
use store::image::{ImageRecord, ImageRef, LayerRecord, Platform, RequestedBy};
use store::publisher::{Hold, Publisher};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::jobs::pull::error::PullError;
use crate::jobs::pull::layer::LayerFetch;
use crate::jobs::pull::present::{blocking, verified_size};
use crate::jobs::pull::progress::{LayerCell, Stage, Whose};
use crate::jobs::pull::single_flight::{FetchKey, Joined, SingleFlight};
use crate::jobs::pull::verified::VerifiedBlobs;
use crate::registries::blob_cache::BlobCache;
use crate::registries::limits::Limits;
use crate::registries::limits::priority::LivePriority;
use crate::registries::{Document, Registry, RemoteLayer, ResolvedImage};
use crate::state::state_db::StateDb;

/// Pulls images into the store; shared by all jobs.
pub struct Puller {
    publisher: Arc<Publisher>,
    state_db: Arc<dyn StateDb>,
    verified: Arc<VerifiedBlobs>,
    fetches: Arc<SingleFlight>,
    limits: Arc<Limits>,
    originals: Arc<BlobCache>,
    fetched: Arc<AtomicU64>,
}

/// How many layers of one image are checked against their repository at a time.
const LOOKS: usize = 8;

/// How far a pull goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// The image is put into the catalogue.
    Image,
    /// Its layers and documents are put into the store; the catalogue is left alone.
    Content,
}

/// One pull, as ordered from a [`Puller`].
pub struct PullTask<'a> {
    /// Where the image comes from.
    pub registry: Arc<dyn Registry>,
    /// The image.
    pub image: &'a ImageRef,
    /// The platform; `None` means this machine's.
    pub platform: Option<&'a Platform>,
    /// How far to go.
    pub goal: Goal,
    /// How urgent the pull is, compared with others.
    pub priority: &'a LivePriority,
    /// Cancels the pull.
    pub stop: &'a CancellationToken,
}

/// Follows the progress of a pull.
pub trait Observer: Send + Sync {
    /// The name is resolved, the layers are being fetched.
    fn fetching(&self, manifest: Digest, layers: Arc<[LayerCell]>);
    /// All layers are there and the image is being published. Returns whose order the image counts as.
    fn publishing(&self) -> RequestedBy;
}

impl Puller {
    /// A puller that fetches as many layers at a time as `limits` have slots.
    pub fn new(publisher: Arc<Publisher>, state_db: Arc<dyn StateDb>, limits: Arc<Limits>) -> Puller {
        let originals = Arc::new(BlobCache::none());
        let verified = Arc::new(VerifiedBlobs::new(Arc::clone(&state_db), Arc::clone(&publisher)));
        Puller { publisher, state_db, verified, fetches: Arc::default(), limits, originals, fetched: Arc::default() }
    }

    /// Keeps the blobs of layers in `originals` as they arrive.
    pub fn keeping(self, originals: Arc<BlobCache>) -> Puller {
        Puller { originals, ..self }
    }

    /// Compressed layer bytes fetched by all jobs so far.
    pub fn bytes_fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    /// Forgets what coordinators share about layers and nobody needs any more. To be called when a leader begins. Blocks.
    pub fn forget_unneeded(&self) {
        if let Err(error) = self.verified.prune() {
            tracing::warn!("what coordinators share of layers is not tidied up: {error}");
        }
    }

    /// Brings one image into the store.
    pub async fn pull(&self, order: PullTask<'_>, observer: &dyn Observer) -> Result<ImageRecord, PullError> {
        let resolved = tokio::select! {
            () = order.stop.cancelled() => return Err(PullError::Cancelled),
            resolved = order.registry.resolve(order.image, order.platform) => resolved?,
        };
        crash_point(CrashPoint::Resolved);
        // Held from before the first look at what is there until the image is committed, so that nothing of it is collected meanwhile.
        let _hold = self.hold(&resolved).await?;
        self.check_claims(order.registry.host(order.image), order.image, &resolved).await?;
        let cells: Arc<[LayerCell]> = resolved.layers.iter().map(LayerCell::new).collect();
        observer.fetching(resolved.manifest.digest, Arc::clone(&cells));
        tokio::select! {
            () = order.stop.cancelled() => return Err(PullError::Cancelled),
            result = self.layers(&order, &resolved, &cells) => result?,
        }
        let ordered_by = observer.publishing();
        self.publish(&order, resolved, cells, ordered_by).await
    }

    /// Brings all layers into the store. Returns the first failure, once the layers under way have ended, too.
    async fn layers(
        &self,
        order: &PullTask<'_>,
        resolved: &ResolvedImage,
        cells: &[LayerCell],
    ) -> Result<(), PullError> {
        let (failed, looks) = (CancellationToken::new(), Semaphore::new(LOOKS));
        let layers = resolved.layers.iter().zip(cells);
        let mut fetches: FuturesUnordered<_> =
            layers.map(|(layer, cell)| self.layer(order, layer, cell, &looks, &failed)).collect();
        let mut first = None;
        while let Some(result) = fetches.next().await {
            if let Err(error) = result {
                failed.cancel();
                // A layer that gave up because another one failed says nothing about the cause.
                if matches!(first, None | Some(PullError::Cancelled)) {
                    first = Some(error);
                }
            }
        }
        first.map_or(Ok(()), Err)
    }

    /// Protects everything that the image refers to from garbage collection.
    async fn hold(&self, resolved: &ResolvedImage) -> Result<Hold, PullError> {
        let documents = [Some(&resolved.config), Some(&resolved.manifest), resolved.index.as_ref()];
        let documents = documents.into_iter().flatten().map(|document| document.digest);
        let digests: Vec<Digest> = resolved.layers.iter().map(|layer| layer.diff_id).chain(documents).collect();
        let publisher = Arc::clone(&self.publisher);
        blocking(move || publisher.hold(digests)).await
    }

    /// Makes sure that one layer is in the store and that the image's repository has it. Once `failed` is cancelled it gives up, unless the
    /// layer's bytes are arriving.
    async fn layer(
        &self,
        order: &PullTask<'_>,
        layer: &RemoteLayer,
        cell: &LayerCell,
        looks: &Semaphore,
        failed: &CancellationToken,
    ) -> Result<(), PullError> {
        let PullTask { registry, image, .. } = order;
        loop {
            // A layer that is present and shown needs no fetch. The semaphore is never closed.
            let look = looks.acquire().await;
            if failed.is_cancelled() {
                return Err(PullError::Cancelled);
            }
            if let Some(size) = verified_size(&self.publisher, &self.verified, registry.host(image), layer).await? {
                registry.confirm_blob(image, layer).await?;
                cell.meter().measured(size);
                cell.meter().enter(Stage::Present);
                return Ok(());
            }
            drop(look);
            let key = FetchKey::new(registry.host(image), layer);
            let mut fetch = self.fetches.join(key, cell.meter(), order.priority.clone(), |stop, meter, waiters| {
                let fetch = LayerFetch {
                    registry: Arc::clone(registry),
                    image: (*image).clone(),
                    layer: layer.clone(),
                    publisher: Arc::clone(&self.publisher),
                    state_db: Arc::clone(&self.state_db),
                    verified: Arc::clone(&self.verified),
                    limits: Arc::clone(&self.limits),
                    waiters,
                    originals: Arc::clone(&self.originals),
                    fetched: Arc::clone(&self.fetched),
                    failed: failed.clone(),
                };
                fetch.run(stop, meter)
            });
            let whose = if fetch.joined == Joined::First { Whose::Own } else { Whose::Anothers };
            cell.show(Arc::clone(&fetch.meter), whose);
            let meter = Arc::clone(&fetch.meter);
            let done = tokio::select! {
                biased;
                done = fetch.done() => done,
                () = given_up(failed, &meter) => return Err(PullError::Cancelled),
            };
            match (done, fetch.joined) {
                (Ok(()), Joined::First) => return Ok(()),
                // The fetch used another job's repository. Check that this job's repository has the layer.
                (Ok(()), Joined::Later) => return Ok(registry.confirm_blob(image, layer).await?),
                (Err(error), Joined::First) => return Err(error),
                // Another job's repository or credentials failed; this job's may do better.
                (Err(_), Joined::Later) => {
                    cell.show(Arc::new(crate::jobs::pull::progress::LayerMeter::new(layer)), Whose::Own)
                }
            }
        }
    }

    /// Refuses a config that contradicts what was verified before, without fetching anything.
    async fn check_claims(&self, host: &str, image: &ImageRef, resolved: &ResolvedImage) -> Result<(), PullError> {
        let (verified, layers) = (Arc::clone(&self.verified), resolved.layers.clone());
        let (host, image) = (host.to_owned(), image.to_string());
        blocking(move || verified.check(&host, &image, &layers)).await?
    }

    /// Writes the documents and a new catalogue generation.
    async fn publish(
        &self,
        order: &PullTask<'_>,
        resolved: ResolvedImage,
        cells: Arc<[LayerCell]>,
        ordered_by: RequestedBy,
    ) -> Result<ImageRecord, PullError> {
        let (publisher, verified) = (Arc::clone(&self.publisher), Arc::clone(&self.verified));
        let (image, goal, host) = (order.image.clone(), order.goal, order.registry.host(order.image).to_owned());
        let published = blocking(move || {
            let documents = [Some(&resolved.config), Some(&resolved.manifest), resolved.index.as_ref()];
            for Document { digest, bytes, .. } in documents.into_iter().flatten() {
                publisher.put_blob(digest, bytes)?;
            }
            let record = ImageRecord { ordered_by, ..record(&publisher, &image, &resolved, &cells)? };
            if goal == Goal::Image {
                publisher.commit_with(|present| {
                    Ok(vec![Change::Set(Arc::new(keep_attribution(present, &image.published_as(), record.clone())))])
                })?;
                if let Err(error) = verified.published(&host, &resolved.layers) {
                    tracing::debug!("what coordinators share of the layers of {image} stays for now: {error}");
                }
            }
            Ok::<_, store::Error>(record)
        });
        Ok(published.await??)
    }
}

/// What a host's order makes of an image. An image that somebody else ordered stays theirs, and an image that is already there does not
/// become newer, so that hosts do not decide which images count as the newest.
fn keep_attribution(present: &Catalogue, name: &ImageRef, image: ImageRecord) -> ImageRecord {
    let before = present.find(name).map(|state| &state.image);
    let same_name = |before: &&Arc<ImageRecord>| (&before.repository, &before.tag) == (&image.repository, &image.tag);
    match before.filter(same_name) {
        Some(before) if image.ordered_by == RequestedBy::Host => {
            let is_same = (before.target, before.manifest) == (image.target, image.manifest);
            let published_at = if is_same { before.published_at } else { image.published_at };
            ImageRecord { ordered_by: before.ordered_by, published_at, ..image }
        }
        _ => image,
    }
}

/// The catalogue's record of the image.
fn record(
    publisher: &Publisher,
    image: &ImageRef,
    resolved: &ResolvedImage,
    cells: &[LayerCell],
) -> Result<ImageRecord, store::Error> {
    let mut known: HashMap<Digest, u64> = HashMap::new();
    let mut layers = Vec::with_capacity(resolved.layers.len());
    for (layer, cell) in resolved.layers.iter().zip(cells) {
        let size = match known.get(&layer.diff_id).copied().or(cell.meter().unpacked_whole()) {
            Some(size) => size,
            None => publisher.store().layer_header(&layer.diff_id)?.tar_size,
        };
        known.insert(layer.diff_id, size);
        layers.push(LayerRecord {
            diff_id: layer.diff_id,
            size,
            blob: layer.blob,
            blob_size: cell.meter().size(),
            media_type: layer.media_type.clone(),
        });
    }
    Ok(ImageRecord {
        repository: image.canonical_repository(),
        tag: image.published_as().tag().map(str::to_owned),
        target: resolved.index.as_ref().unwrap_or(&resolved.manifest).digest,
        manifest: resolved.manifest.digest,
        media_type: resolved.manifest.media_type.clone(),
        config: resolved.config.digest,
        platform: resolved.platform.clone(),
        layers,
        published_at: u64::try_from(Timestamp::now().as_second()).unwrap_or(0),
        ordered_by: RequestedBy::Operator,
    })
}

/// Completes when the job has failed and the layer's bytes are not arriving. A layer whose bytes are arriving comes to its own end.
async fn given_up(failed: &CancellationToken, meter: &crate::jobs::pull::progress::LayerMeter) {
    failed.cancelled().await;
    if meter.is_begun() {
        std::future::pending::<()>().await;
    }
}
