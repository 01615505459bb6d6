//! Garbage collection: which images leave the catalogue, and when the bytes behind them are removed.
//!
//! ```text
//! survey ─> plan ─> images leave ─> mark ─ grace ─> layers and blobs go ─> packs go or are thinned ─> trash is emptied
//! ```
//!
//! **What is kept.** A layer, manifest or config stays if an image of the catalogue refers to it, a live host leases it
//! ([`Holds`]) or a running pull holds it. A pack stays if any layer in the store refers to it, needed or not, or if it is the
//! startup pack of a chain. A pinned name, and an image all of whose layers a live host leases, leave the catalogue only when a
//! person removes them. Everything else, including orphans of crashes, follows the same rule.
//!
//! **Two phases.** An unreferenced object is marked in the database with the time; if it is still unreferenced when its grace
//! period is over, it is removed. An object that was held in the meantime starts anew. Losing the database restarts all grace
//! periods. So does another coordinator having led, because its marks are unknown here.
//!
//! **Packs and deduplication.** An unpacker may have been told that a piece lies in a pack that is about to be removed.
//! Therefore:
//!
//! 1. The collection begins. From then on, packs that are claimed by layers about to be published are noted.
//! 2. All layers in the store are found and unneeded ones removed. The packs of the others are known from their indexes.
//! 3. The database forgets the pieces that are about to go.
//! 4. The catalogue's number of collections is raised. It tells the databases of other coordinators to forget all pieces before
//!    they lead.
//! 5. The collection waits for work that began before.
//! 6. Packs that were not noted are removed or thinned.
//!
//! Work that begins later does not wait. If step 5 takes too long, the packs stay until the next collection. If a layer's index
//! cannot be read, or is missing although an image needs it, all packs stay: the repair may want them.
//!
//! Nothing waits for a collection: readers take no lock, and a pull waits for one rename at most (see `store::publisher`).
//!
//! - `rules`: how long images are kept. `images`: which of them leave, by rules and quota; `objects`: which objects go. Both of
//!   these are pure. `survey`: what the store holds. `usage`: which packs a layer uses. `age`: how old things are. `marks`: the
//!   records in the database. `leases`: what hosts need. `collector`: what a collection works with. `findings`: what it finds and
//!   decides; `step`: how one object is removed. `run`: one collection, from plan to trash; `remove_images`, `remove_packs`: its
//!   long parts.

mod age;
mod collector;
mod error;
mod findings;
mod images;
mod leases;
mod marks;
mod objects;
mod remove_images;
mod remove_packs;
mod rules;
mod run;
mod step;
mod survey;
#[cfg(test)]
mod tests;
mod usage;

use std::sync::Arc;
use std::time::{Duration, Instant};

use coordinator_api::client::Forced;
use coordinator_api::retention::{
    CollectionPhase, CollectionPlan, CollectionProgress, CollectionStatus, RetentionPolicy,
};
use jiff::Timestamp;
use store::catalogue::{Change, Pin};
use store::image::{ImageRecord, ImageRef};
use tokio_util::sync::CancellationToken;

use crate::state::state_db::StateError;

use marks::Marks;

pub use collector::GarbageCollector;
pub use error::GarbageError;
pub use leases::Holds;

/// How long a shutdown waits for a running collection to finish its current step.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Refuses an invalid policy.
pub fn check_policy(policy: &RetentionPolicy) -> Result<(), GarbageError> {
    if let Some(fault) = policy.fault() {
        return Err(GarbageError::Policy(fault));
    }
    rules::Rules::compile(&policy.rules).map_err(|error| GarbageError::Policy(error.to_string())).map(drop)
}

impl GarbageCollector {
    /// The retention policy: what is kept, and for how long.
    pub fn policy(&self) -> Result<RetentionPolicy, StateError> {
        Marks::of(&*self.state_db).policy()
    }

    /// Changes the retention policy. The change survives a power failure once this returns.
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

    /// Replaces all pins by these names, in one commit.
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

    /// Removes an image's name, requested as `reference`, from the catalogue. A pinned name, together with its pin, is removed
    /// only if that is forced. The last tag of an image that is pinned by digest may go: the image stays under the digest.
    pub fn remove(&self, reference: &ImageRef, image: &ImageRecord, forced: Forced) -> Result<(), GarbageError> {
        let mut refused = false;
        self.publisher.commit_with(|catalogue| {
            let pin = catalogue.pin_of(image).or_else(|| catalogue.pin_of_digest(reference)).cloned();
            refused = pin.is_some() && forced == Forced::No;
            let (repository, tag, target) = (image.repository.clone(), image.tag.clone(), image.target);
            let gone = Change::Remove { repository, tag, target };
            Ok(if refused { Vec::new() } else { std::iter::once(gone).chain(pin.map(Change::Unpin)).collect() })
        })?;
        if refused { Err(GarbageError::Pinned(reference.to_string())) } else { Ok(()) }
    }

    /// What a collection would do now, with the configured grace or with `grace` seconds. Blocks on the shared disk.
    pub fn plan(&self, grace: Option<u64>) -> Result<CollectionPlan, GarbageError> {
        run::plan(self, grace)
    }

    /// The running and the last collection.
    pub fn status(&self) -> CollectionStatus {
        let state = self.state.lock();
        CollectionStatus { number: state.number, running: state.running, last: state.last.clone() }
    }

    /// Begins a collection on a thread of its own. `by` is who requested it; `None` if it is a scheduled one.
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

    /// Runs one collection and records its report. Blocks.
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
                // The settings changed: the interval starts again.
                () = self.changed.notified() => {}
                // A pause that the clock cannot represent never ends by itself, only by a change of the settings.
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
        let _ = tokio::time::timeout(STOP_TIMEOUT, ended).await;
    }
}
