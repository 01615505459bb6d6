//! Learned prefetching, the coordinator's half: hosts' access traces become a profile per image, and its startup pack.
//!
//! ```text
//! POST /v1/traces ─▶ inbox (INBOX places) ─▶ worker: check, merge, database ─▶ answer
//!                                              │ the chain is due
//! a pull published an image ───────────────────┤
//!                                              ▼
//!                                  builder: build queue ─▶ changed enough? ─▶ startup pack ─▶ catalogue
//! ```
//!
//! There are one worker and one builder, each with one blocking thread at a time: neither pulls nor other requests wait for them. A trace
//! that finds the inbox full is refused as busy, and is to be sent again. The database holds the merged profiles and is the only state; the
//! startup packs are in the store and its catalogue. A lost database is learned again from new traces; what is published stays meanwhile. A
//! standby takes no traces.
//!
//! An image that was just published and has no profile inherits that of the image that it follows; without one, what its first start will
//! need is guessed. So no image starts blind.
//!
//! - `build_queue`: which chain is built when; pure. `indexes`: the layers' indexes, kept while they are in use.
//! - `inherit`: what a new build's starts will need, by its predecessor's. `guess`: the same, by the look of the image. `build`: from a
//!   profile to a startup pack. `paths`: the names of files.
//!
//! Locks: `build_queue` guards the chains that are due, `indexes` (inside [`Indexes`]) its table; neither is held during I/O or across an
//! await.

mod build;
mod build_queue;
mod built;
mod guess;
mod indexes;
mod inherit;
mod paths;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use jiff::Timestamp;
use parking_lot::Mutex;
use store::Digest;
use store::catalogue::Catalogue;
use store::crash::{CrashPoint, crash_point};
use store::image::ImageRecord;
use store::profile::{CONTENT_MAX, Merged, PrefetchProfile, Sent};
use store::publisher::Publisher;
use store::trace::AccessTrace;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::state::state_db::{StateDb, StateError};

use crate::profiles::build_queue::{BuildQueue, Next};
use built::{BuildError, Built};
use indexes::Indexes;

pub use paths::{NamedFile, files};

/// The most traces that are being received or wait for the worker. This bounds their memory.
const INBOX: usize = 16;

/// An image that was published at most this many seconds ago may have been missed by a coordinator that stopped since, and what its tag
/// pointed to before is still remembered.
const LATELY: u64 = 3600;
/// How often profiles of images that are gone are looked for.
const SWEEP: Duration = Duration::from_secs(24 * 3600);

/// Why a trace is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The trace is malformed.
    #[error("{0}: the host that sent it should drop it")]
    Malformed(store::Error),
    /// No image here has the trace's chain.
    #[error("no image of the store has the chain {0}: a trace of it is of no use here")]
    UnknownChain(Digest),
    /// The trace names other layers than the image has.
    #[error("the trace names other layers than the images of chain {0} have: the host that sent it should drop it")]
    OtherLayers(Digest),
    /// The trace names a piece that the layer does not have.
    #[error(
        "the trace names piece {piece} of inode {inode} of layer {layer}, which the layer does not have: the host that sent it should drop it"
    )]
    NoSuchPiece {
        /// The layer's diffID.
        layer: Digest,
        /// The inode.
        inode: u32,
        /// The piece.
        piece: u32,
    },
    /// The inbox is full.
    #[error("the coordinator has more traces than it can merge now: send this one again in a few seconds")]
    Busy,
    /// The coordinator is stopping.
    #[error("the coordinator stops: send the trace again when it is back")]
    Stopping,
    /// The shared store failed.
    #[error(transparent)]
    Store(store::Error),
    /// The database failed.
    #[error(transparent)]
    StateDb(#[from] StateError),
}

/// One trace on its way to the worker.
struct Delivery {
    bytes: Bytes,
    /// Who sent it.
    sender: String,
    answer: oneshot::Sender<Result<u64, TraceError>>,
}

/// A place in the inbox. Its holder may receive a trace and hand it in.
pub struct TracePermit {
    permit: mpsc::OwnedPermit<Delivery>,
    inbox: mpsc::Sender<Delivery>,
}

impl TracePermit {
    /// Hands in an encoded trace from `sender`. Returns how many starts of its image are known now.
    pub async fn submit(self, bytes: Bytes, sender: String) -> Result<u64, TraceError> {
        let (answer, answered) = oneshot::channel();
        self.permit.send(Delivery { bytes, sender, answer });
        tokio::select! {
            biased;
            taken = answered => taken.unwrap_or(Err(TraceError::Stopping)),
            // Nobody reads the inbox once the worker has ended.
            () = self.inbox.closed() => Err(TraceError::Stopping),
        }
    }
}

/// Whether to guess what starts of an image need that nothing is known of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guesses {
    /// Guesses are made.
    Made,
    /// Such an image starts without a startup pack.
    None,
}

/// The profiles of all images.
pub struct Profiles {
    state_db: Arc<dyn StateDb>,
    publisher: Arc<Publisher>,
    guesses: Guesses,
    indexes: Indexes,
    /// The most content that a startup pack gets, bytes; what is beyond is named.
    pack_content: u64,
    inbox: mpsc::Sender<Delivery>,
    build_queue: Mutex<BuildQueue>,
    /// Notified when the build queue has a new entry.
    due: Notify,
}

/// The worker's end of the inbox, for [`Profiles::run`].
pub struct Inbox(mpsc::Receiver<Delivery>);

impl Profiles {
    /// The profiles in `state_db`, for images that `publisher` publishes.
    pub fn new(state_db: Arc<dyn StateDb>, publisher: Arc<Publisher>, guesses: Guesses) -> (Arc<Profiles>, Inbox) {
        let (inbox, traces) = mpsc::channel(INBOX);
        let indexes = Indexes::new(publisher.store().clone());
        let (build_queue, due, pack_content) = (Mutex::new(BuildQueue::default()), Notify::new(), CONTENT_MAX);
        let profiles = Profiles { state_db, publisher, guesses, indexes, pack_content, inbox, build_queue, due };
        (Arc::new(profiles), Inbox(traces))
    }

    /// Reserves a place in the inbox, if there is one.
    pub fn permit(&self) -> Result<TracePermit, TraceError> {
        match self.inbox.clone().try_reserve_owned() {
            Ok(permit) => Ok(TracePermit { permit, inbox: self.inbox.clone() }),
            Err(mpsc::error::TrySendError::Full(_)) => Err(TraceError::Busy),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(TraceError::Stopping),
        }
    }

    /// The profile of a chain: what is known of its starts. Blocks on the database.
    pub fn profile(&self, chain: &Digest) -> Result<Option<PrefetchProfile>, StateError> {
        self.state_db.profile(chain)
    }

    /// Has a chain's startup pack checked again, without waiting for a trace.
    pub fn look_again(&self, chain: Digest) {
        self.build_queue.lock().add(chain, Instant::now());
        self.due.notify_one();
    }

    /// Notes that an image was published: if nothing is known of its starts, it may inherit a profile.
    pub fn published(&self, image: &ImageRecord) {
        if let Some(chain) = image.top_chain()
            && self.publisher.catalogue().startup(&chain).is_none()
        {
            self.look_again(chain);
        }
    }

    /// Takes traces and publishes startup packs until `stop` is cancelled.
    pub async fn run(self: Arc<Self>, inbox: Inbox, stop: CancellationToken) {
        let (taking, building) = (Arc::clone(&self), Arc::clone(&self));
        tokio::join!(taking.take_traces(inbox, &stop), building.build_packs(&stop), self.sweep_daily(&stop));
    }

    async fn sweep_daily(self: &Arc<Self>, stop: &CancellationToken) {
        loop {
            let profiles = Arc::clone(self);
            if let Ok(Err(error)) = tokio::task::spawn_blocking(move || profiles.sweep()).await {
                tracing::warn!("profiles from before the start are published with their next trace: {error}");
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(SWEEP) => {}
            }
        }
    }

    /// Forgets profiles of images that are gone, and queues chains that have no startup pack yet, or one in an older form: those with a
    /// profile, and those of images that were published so lately that a coordinator may have stopped before it looked at them.
    fn sweep(&self) -> Result<(), StateError> {
        let catalogue = self.publisher.catalogue();
        let mut known: HashSet<Digest> = catalogue.images().filter_map(|image| image.top_chain()).collect();
        let lately = u64::try_from(Timestamp::now().as_second()).unwrap_or(0).saturating_sub(LATELY);
        for state in catalogue.tags().filter(|state| state.image.published_at >= lately) {
            known.extend(self.chains_before(state));
            self.published(&state.image);
        }
        for chain in self.state_db.profiled_chains()? {
            match known.contains(&chain) {
                false => self.state_db.remove_profile(&chain)?,
                // Older software has put no indexes into startup packs.
                true if catalogue.startup(&chain).is_none_or(|record| record.indexes_len == 0) => {
                    self.build_queue.lock().add(chain, Instant::now());
                }
                true => {}
            }
        }
        Ok(())
    }

    /// The worker: takes one trace after the other from the inbox.
    async fn take_traces(self: Arc<Self>, mut inbox: Inbox, stop: &CancellationToken) {
        loop {
            let delivery = tokio::select! {
                () = stop.cancelled() => return,
                delivery = inbox.0.recv() => delivery,
            };
            let Some(Delivery { bytes, sender, answer }) = delivery else { return };
            let profiles = Arc::clone(&self);
            let taken = tokio::task::spawn_blocking(move || profiles.take(&bytes, &sender)).await;
            // The sender may have gone; the trace counts all the same.
            let _ = answer.send(taken.unwrap_or(Err(TraceError::Stopping)));
        }
    }

    /// Checks a trace and merges it into its profile.
    fn take(&self, bytes: &[u8], sender: &str) -> Result<u64, TraceError> {
        let trace = AccessTrace::decode(bytes).map_err(TraceError::Malformed)?;
        self.check(&trace, &self.publisher.catalogue())?;
        let mut profile = self.state_db.profile(&trace.chain)?.unwrap_or_else(|| PrefetchProfile::new(trace.chain));
        let at = u64::try_from(Timestamp::now().as_second()).unwrap_or(0);
        if profile.merge_sent(&trace, Sent { by: sender, at }).map_err(TraceError::Malformed)? == Merged::Outweighs {
            tracing::debug!("a trace of chain {} is left out: {sender} would outweigh all others", trace.chain);
            return Ok(profile.starts());
        }
        self.state_db.put_profile(&profile)?;
        crash_point(CrashPoint::TraceMerged);
        tracing::debug!("start {} of chain {} was traced on {}", profile.starts(), trace.chain, trace.host);
        self.build_queue.lock().add(trace.chain, Instant::now());
        self.due.notify_one();
        Ok(profile.starts())
    }

    /// Checks that a trace is of an image that is here, and of pieces that its layers have.
    fn check(&self, trace: &AccessTrace, catalogue: &Catalogue) -> Result<(), TraceError> {
        let image = catalogue.image_of_chain(&trace.chain).ok_or(TraceError::UnknownChain(trace.chain))?;
        if !image.layers.iter().map(|layer| &layer.diff_id).eq(&trace.layers) {
            return Err(TraceError::OtherLayers(trace.chain));
        }
        for (position, layer) in (0..).zip(&trace.layers) {
            let mut touches = trace.touches.iter().filter(|touch| touch.layer == position).peekable();
            if touches.peek().is_none() {
                continue;
            }
            let index = self.indexes.get(layer).map_err(TraceError::Store)?;
            for touch in touches {
                let inode = (touch.inode.0 < index.inode_count()).then(|| index.inode(touch.inode));
                let pieces = inode.transpose().map_err(TraceError::Store)?.map_or(0, |inode| inode.piece_count());
                if touch.piece >= pieces {
                    let (layer, inode, piece) = (*layer, touch.inode.0, touch.piece);
                    return Err(TraceError::NoSuchPiece { layer, inode, piece });
                }
            }
        }
        Ok(())
    }

    /// The builder: brings one startup pack after the other up to date.
    async fn build_packs(self: Arc<Self>, stop: &CancellationToken) {
        loop {
            let next = self.build_queue.lock().next(Instant::now());
            let wait = match next {
                Next::Build(chain) => {
                    self.build(chain, stop).await;
                    continue;
                }
                Next::Wait(wait) => wait,
                Next::Nothing => Duration::MAX,
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.due.notified() => {}
                // A wait beyond what the clock can express ends only with a notification.
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Brings one chain's startup pack up to date. After a failure, the next trace tries again.
    async fn build(self: &Arc<Self>, chain: Digest, stop: &CancellationToken) {
        let (profiles, stopped) = (Arc::clone(self), stop.clone());
        let built = tokio::task::spawn_blocking(move || profiles.build_now(&chain, &stopped)).await;
        match built {
            Ok(Ok(Built::Published { record, pieces })) => {
                tracing::info!(
                    "chain {chain} has a new startup pack of {} bytes: {pieces} pieces, {} starts",
                    record.pack_len,
                    record.starts
                );
                // The first trace of a chain is not kept waiting by what was made before it.
                if record.starts == 0 {
                    return;
                }
            }
            Ok(Ok(Built::Unknown)) => return,
            Ok(Ok(Built::Unchanged)) => {}
            Ok(Err(BuildError::Stopped)) => {}
            Err(crash) => tracing::error!("making the startup pack of chain {chain} broke off: {crash}"),
            Ok(Err(error)) => tracing::warn!("no new startup pack for chain {chain}: {error}"),
        }
        self.build_queue.lock().built(chain, Instant::now());
    }
}

#[cfg(test)]
mod tests;
