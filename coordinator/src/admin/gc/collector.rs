//! The state and dependencies of garbage collection.
//!
//! Locks: `state` guards the progress and the last report and is never held during I/O. The same holds for `sizes` (in `survey`).

use std::sync::Arc;

use coordinator_api::retention::{CollectionPhase, CollectionProgress, CollectionReport};
use parking_lot::Mutex;
use store::publisher::Publisher;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::age::Ages;
use super::leases::Holds;
use super::marks::Marks;
use super::survey::Sizes;
use crate::state::events::Events;
use crate::state::state_db::{StateDb, StateError};

/// Progress and last report, for the API.
#[derive(Default)]
pub(super) struct State {
    pub(super) number: u64,
    pub(super) running: Option<CollectionProgress>,
    pub(super) last: Option<CollectionReport>,
}

/// Keeps the retention policy and pins, and removes what nothing needs.
pub struct GarbageCollector {
    pub(super) publisher: Arc<Publisher>,
    pub(super) state_db: Arc<dyn StateDb>,
    pub(super) holds: Arc<dyn Holds>,
    pub(super) events: Arc<Events>,
    pub(super) sizes: Sizes,
    pub(super) ages: Ages,
    pub(super) state: Mutex<State>,
    /// Notified when the settings change or a collection ends.
    pub(super) changed: Notify,
    pub(super) stop: CancellationToken,
}

impl GarbageCollector {
    /// Resumes with what the database remembers. Forgets pieces and marks that may be wrong because another coordinator has led.
    /// Must run before anything is pulled.
    pub fn open(
        publisher: Arc<Publisher>,
        state_db: Arc<dyn StateDb>,
        holds: Arc<dyn Holds>,
        events: Arc<Events>,
    ) -> Result<GarbageCollector, StateError> {
        let marks = Marks::of(&*state_db);
        marks.resume(publisher.store().identity(), publisher.epoch(), publisher.catalogue().collected())?;
        let ages = Ages::from(marks.counted()?);
        Ok(GarbageCollector {
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

    /// Publishes the progress of the running collection.
    pub(super) fn progress(&self, phase: CollectionPhase, done: u64, total: u64) {
        self.state.lock().running = Some(CollectionProgress { phase, done, total });
    }
}
