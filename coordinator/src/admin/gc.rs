//! Keeping the store: which images leave the catalogue, and when the bytes behind them go.
//!
//! ```text
//! survey ─> plan ─> images leave ─> mark ─ grace ─> layers and blobs go ─> packs go or are thinned ─> trash is emptied
//! ```
//!
//! **What is kept.** A layer, manifest or config that an image of the catalogue refers to, that a live host leases ([`Holds`])
//! or that a running pull holds. A pack that any layer in the store refers to, wanted or not, or that is the startup pack of a
//! chain. A pinned name, and an image all of whose layers a live host leases, leave the catalogue only when a person removes
//! them. Everything else, orphans of crashes included, goes by the same rule.
//!
//! **Two phases.** What nothing refers to is marked with the time, in the database; if it is still unreferenced when its grace is
//! over, it goes. An object that was held meanwhile starts anew. Losing the database restarts the grace, and so does another
//! coordinator having led: its marks are not ours.
//!
//! **Packs and deduplication.** An unpacker may have been told that a piece lies in a pack which is about to go. Therefore: (1)
//! the collection is begun, from when on it is noted which packs are claimed by layers that are about to get their names; (2)
//! all layers that lie in the store are found, unneeded ones removed, and the packs of the others are known from their
//! indexes; (3) the database forgets the pieces in what is to go; (4) the catalogue's number of collections is raised, by which the databases of other
//! coordinators will know that they must forget all pieces before they lead; (5) work that began before is waited for; (6)
//! packs that were not noted are removed or thinned. Nothing that begins meanwhile waits for anything. If the wait is too
//! long, the packs stay for the next collection. If a layer's index cannot be read, or is missing although an image needs it, all
//! packs stay: the repair may want them.
//!
//! Nobody waits for a collection: readers take no lock, and a pull waits for one rename at most (see `store::publisher`).
//!
//! - `rules`: who is kept how. `images`: which of them leave, by rules and quota; `objects`: what becomes of the bytes. Both
//!   are pure. `survey`: what the store holds. `usage`: which packs a layer uses. `age`: how old things are.
//!   `marks`: what is remembered in the journal. `run`: one collection, from plan to trash.
//!
//! Locks: `state` guards the progress and the last report and is never held during I/O; `sizes` likewise (in `survey`).

mod age;
mod images;
mod marks;
mod objects;
mod rules;
mod run;
mod survey;
#[cfg(test)]
mod tests;
mod usage;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coordinator_api::client::Forced;
use coordinator_api::retention::{
    CollectionPhase, CollectionPlan, CollectionProgress, CollectionReport, CollectionStatus, RetentionPolicy,
};
use jiff::Timestamp;
use parking_lot::Mutex;
use store::Digest;
use store::catalogue::{Change, Pin};
use store::image::{ImageRecord, ImageRef};
use store::publisher::Publisher;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::identity::hosts;
use crate::state::clock;
use crate::state::events::Events;
use crate::state::state_db::{StateDb, StateError};

use age::Ages;
use marks::Marks;
use survey::Sizes;

/// How long a stop waits for the step that a running collection is in.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// What live hosts need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Held {
    /// We lead for less than a host's lease lives: hosts may hold what we have not heard of. Nothing is collected.
    NotYetKnown {
        /// When every host has had the time to say so.
        until: Timestamp,
    },
    /// The layers of all images that a live host leases.
    Layers(HashSet<Digest>),
}

/// The leases of live hosts.
pub trait Holds: Send + Sync {
    /// What hosts need now.
    fn held(&self) -> Held;

    /// Whether a host needs the layer now. Asked under the lock that removals take: must neither block nor do I/O.
    fn holds(&self, layer: &Digest) -> bool {
        match self.held() {
            Held::NotYetKnown { .. } => true,
            Held::Layers(layers) => layers.contains(layer),
        }
    }
}

impl Holds for hosts::Hosts {
    fn held(&self) -> Held {
        match self.held(clock::steady()) {
            hosts::Held::NotYetKnown { until } => Held::NotYetKnown { until },
            hosts::Held::Layers(layers) => Held::Layers(layers.into_iter().collect()),
        }
    }

    fn holds(&self, layer: &Digest) -> bool {
        self.holds(layer, clock::steady())
    }
}

/// Why a request about what is kept is refused.
#[derive(Debug, thiserror::Error)]
pub enum GarbageError {
    /// A collection runs.
    #[error("a collection is running already: cachefsctl gc shows the next one when this has ended")]
    Running,
    /// The coordinator stops.
    #[error("the coordinator stops: collect when it is back")]
    Stopping,
    /// A policy that makes no sense.
    #[error("{0}")]
    Policy(String),
    /// A pinned name.
    #[error("{0} is pinned: unpin it first, or remove it with --force")]
    Pinned(String),
    /// A name that is not pinned.
    #[error("{0} is not pinned: cachefsctl images shows which names are")]
    NotPinned(String),
    /// The shared store.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The journal.
    #[error(transparent)]
    StateDb(#[from] StateError),
}

/// Progress, for those who ask.
#[derive(Default)]
struct State {
    number: u64,
    running: Option<CollectionProgress>,
    last: Option<CollectionReport>,
}

/// What is kept, and the collecting of the rest.
pub struct Garbage {
    publisher: Arc<Publisher>,
    state_db: Arc<dyn StateDb>,
    holds: Arc<dyn Holds>,
    events: Arc<Events>,
    sizes: Sizes,
    ages: Ages,
    state: Mutex<State>,
    /// Rung when the settings change or a collection ends.
    changed: Notify,
    stop: CancellationToken,
}

/// Refuses a policy that makes no sense.
pub fn check_policy(policy: &RetentionPolicy) -> Result<(), GarbageError> {
    if let Some(fault) = policy.fault() {
        return Err(GarbageError::Policy(fault));
    }
    rules::Rules::compile(&policy.rules).map_err(|error| GarbageError::Policy(error.to_string())).map(drop)
}

impl Garbage {
    /// Takes up what the database remembers; pieces and marks that another coordinator's lead has made doubtful are forgotten.
    /// To be done before anything is pulled.
    pub fn open(
        publisher: Arc<Publisher>,
        state_db: Arc<dyn StateDb>,
        holds: Arc<dyn Holds>,
        events: Arc<Events>,
    ) -> Result<Garbage, StateError> {
        let marks = Marks::of(&*state_db);
        marks.resume(publisher.store().identity(), publisher.epoch(), publisher.catalogue().collected())?;
        let ages = Ages::from(marks.counted()?);
        Ok(Garbage {
            publisher,
            state_db,
            holds,
            events,
            sizes: Sizes::default(),
            ages,
            state: Mutex::default(),
            changed: Notify::new(),
            stop: CancellationToken::new(),
        })
    }

    /// What is kept and for how long.
    pub fn policy(&self) -> Result<RetentionPolicy, StateError> {
        Marks::of(&*self.state_db).policy()
    }

    /// Changes what is kept and for how long; when this returns it survives a power failure.
    pub fn set_policy(&self, policy: &RetentionPolicy) -> Result<(), GarbageError> {
        check_policy(policy)?;
        Marks::of(&*self.state_db).set_policy(policy)?;
        self.changed.notify_one();
        Ok(())
    }

    /// Pins a name, whether or not the store has it.
    pub fn pin(&self, reference: &ImageRef) -> Result<Pin, GarbageError> {
        let pin = Pin::of(reference, age::wall())?;
        self.publisher.commit(vec![Change::Pin(pin.clone())])?;
        Ok(pin)
    }

    /// Unpins a name.
    pub fn unpin(&self, reference: &ImageRef) -> Result<Pin, GarbageError> {
        let name = Pin::of(reference, 0)?.familiar_name();
        let known = self.publisher.catalogue().pins().find(|pin| pin.familiar_name() == name).cloned();
        let pin = known.ok_or(GarbageError::NotPinned(name))?;
        self.publisher.commit(vec![Change::Unpin(pin.clone())])?;
        Ok(pin)
    }

    /// Makes these names all that are pinned, at once.
    pub fn set_pins<'a>(&self, names: impl Iterator<Item = &'a ImageRef>) -> Result<(), GarbageError> {
        let since = age::wall();
        let wished = names.map(|name| Pin::of(name, since)).collect::<Result<Vec<_>, _>>()?;
        self.publisher.commit_with(|catalogue| {
            let is_same = |one: &Pin, other: &Pin| one.familiar_name() == other.familiar_name();
            let gone = catalogue.pins().filter(|pin| !wished.iter().any(|other| is_same(pin, other)));
            let new = wished.iter().filter(|pin| !catalogue.pins().any(|other| is_same(pin, other)));
            Ok(gone.cloned().map(Change::Unpin).chain(new.cloned().map(Change::Pin)).collect())
        })?;
        Ok(())
    }

    /// Takes an image's name out of the catalogue, which was asked for by `reference`; a pinned one, and its pin, only if that is
    /// forced. Of a pinned digest the last tag may go: the image stays under the digest.
    pub fn remove(&self, reference: &ImageRef, image: &ImageRecord, forced: Forced) -> Result<(), GarbageError> {
        let mut refused = false;
        self.publisher.commit_with(|catalogue| {
            let pin = catalogue.pin_of(image).or_else(|| catalogue.pin_of_digest(reference)).cloned();
            refused = pin.is_some() && forced == Forced::No;
            let (repository, tag, target) = (image.repository.clone(), image.tag.clone(), image.target);
            let gone = Change::Remove { repository, tag, target };
            Ok(if refused { Vec::new() } else { std::iter::once(gone).chain(pin.map(Change::Unpin)).collect() })
        })?;
        match refused {
            true => Err(GarbageError::Pinned(reference.to_string())),
            false => Ok(()),
        }
    }

    /// What a collection would do now, with the settings' grace or another. Blocks on the shared disk.
    pub fn plan(&self, grace: Option<u64>) -> Result<CollectionPlan, GarbageError> {
        run::plan(self, grace)
    }

    /// The present and the last collection.
    pub fn status(&self) -> CollectionStatus {
        let state = self.state.lock();
        CollectionStatus { number: state.number, running: state.running, last: state.last.clone() }
    }

    /// Begins a collection on a thread of its own; `by` is who asked for it, if it is not its hour.
    pub fn begin(self: &Arc<Self>, grace: Option<u64>, by: Option<String>) -> Result<CollectionStatus, GarbageError> {
        if self.stop.is_cancelled() {
            return Err(GarbageError::Stopping);
        }
        {
            let mut state = self.state.lock();
            if state.running.is_some() {
                return Err(GarbageError::Running);
            }
            state.number += 1;
            state.running = Some(CollectionProgress { phase: CollectionPhase::Surveying, done: 0, total: 0 });
        }
        let (garbage, status) = (Arc::clone(self), self.status());
        tokio::spawn(async move {
            let collecting = Arc::clone(&garbage);
            if tokio::task::spawn_blocking(move || collecting.collect(grace, by)).await.is_err() {
                tracing::error!("a collection broke off: the lines above say why");
                garbage.state.lock().running = None;
                garbage.changed.notify_waiters();
            }
        });
        Ok(status)
    }

    /// One collection from beginning to end. Blocks.
    fn collect(&self, grace: Option<u64>, by: Option<String>) {
        let (started_at, begun) = (Timestamp::now(), Instant::now());
        let mut report = run::collect(self, grace);
        (report.started_at, report.seconds) = (started_at, begun.elapsed().as_secs_f64());
        run::announce(&self.events, &report, by);
        let mut state = self.state.lock();
        (state.running, state.last) = (None, Some(report));
        drop(state);
        self.changed.notify_waiters();
    }

    fn progress(&self, phase: CollectionPhase, done: u64, total: u64) {
        self.state.lock().running = Some(CollectionProgress { phase, done, total });
    }

    /// Collects as often as the settings say, until `stop`.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        loop {
            let every = match self.policy() {
                Ok(policy) => policy.collect.every_seconds,
                Err(error) => {
                    tracing::warn!("how often to collect garbage is not known: {error}");
                    0
                }
            };
            let pause = if every == 0 { Duration::MAX } else { Duration::from_secs(every) };
            tokio::select! {
                () = stop.cancelled() => break,
                // New settings, whose time begins now.
                () = self.changed.notified() => {}
                // A pause beyond what the clock can say is one for the bell alone.
                () = tokio::time::sleep(pause) => {
                    if let Err(error) = self.begin(None, None) {
                        tracing::info!("no collection now: {error}");
                    }
                }
            }
        }
        self.stop.cancel();
        let ended = async {
            loop {
                let changed = self.changed.notified();
                if self.state.lock().running.is_none() {
                    return;
                }
                changed.await;
            }
        };
        let _ = tokio::time::timeout(STOP_PATIENCE, ended).await;
    }
}
