//! The schedules in memory, and what the scheduler works with.
//!
//! `book` guards the schedules; it is never held across an await or a write to the database. `edits` guards the order of changes and is
//! held while one is written, so that the database ends with the book's last version, and no change overwrites another. Readers do not take
//! it. Lock order: `edits`, then `book`.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use coordinator_api::event::Severity;
use jiff::Timestamp;
use parking_lot::Mutex;
use store::publisher::Publisher;
use tokio::sync::Notify;

use crate::jobs::queue::JobQueue;
use crate::plan::scheduler::forecast::{Forecast, SizeKey, Sized};
use crate::plan::scheduler::record::{ScheduleEntry, ScheduleRecord};
use crate::registries::limits::Limits;
use crate::registries::{Registry, TagLister};
use crate::state::clock::Clock;
use crate::state::events::{Events, NewEvent};
use crate::state::state_db::{StateDb, StateError, Table};

/// What the scheduler works with.
pub struct Components {
    /// The clock.
    pub clock: Arc<dyn Clock>,
    /// The database.
    pub state_db: Arc<dyn StateDb>,
    /// Where jobs are queued.
    pub queue: Arc<JobQueue>,
    /// The limits and the state of registries.
    pub limits: Arc<Limits>,
    /// Lists tags.
    pub tag_lister: Arc<dyn TagLister>,
    /// Resolves images, which tells their sizes.
    pub registry: Arc<dyn Registry>,
    /// Knows what is in the store.
    pub publisher: Arc<Publisher>,
    /// Where the store lies, for its free space.
    pub store_path: PathBuf,
    /// Where events are recorded.
    pub events: Arc<Events>,
}

/// All schedules of one coordinator.
pub struct Scheduler {
    pub(super) components: Components,
    pub(super) edits: Mutex<()>,
    pub(super) book: Mutex<BTreeMap<String, ScheduleEntry>>,
    pub(super) sizes: Mutex<HashMap<SizeKey, Sized>>,
    pub(super) forecast: Mutex<Forecast>,
    /// Notified when the book changes.
    pub(super) changed: Notify,
}

impl Scheduler {
    /// Reads the schedules from the database. One that is not understood, such as one in a time zone that this machine does not know, is
    /// kept, listed as broken, reported as an event, and makes no jobs. A record that cannot be read (written by a newer version) stays in
    /// the database.
    pub fn open(components: Components) -> Result<Scheduler, StateError> {
        let mut book = BTreeMap::new();
        for (key, bytes) in components.state_db.records(Table::Schedules)? {
            let name = String::from_utf8_lossy(&key).into_owned();
            let entry = serde_json::from_slice::<ScheduleRecord>(&bytes)
                .map(ScheduleEntry::kept)
                .map_err(|error| error.to_string());
            let why = match &entry {
                Ok(entry) => entry.schedule.why_broken().map(str::to_owned),
                Err(why) => Some(format!("its record cannot be read: {why}")),
            };
            if let Some(why) = why {
                let message = format!("schedule {name} is kept and makes no jobs: {why}");
                components.events.record(NewEvent::new(Severity::Error, "schedule.broken", &name, message));
            }
            if let Ok(entry) = entry {
                book.insert(name, entry);
            }
        }
        for (key, bytes) in components.state_db.records(Table::Speeds)? {
            if let Ok(speed) = serde_json::from_slice(&bytes) {
                components.limits.remember_speed(&String::from_utf8_lossy(&key), speed);
            }
        }
        let (edits, book) = (Mutex::new(()), Mutex::new(book));
        let (sizes, forecast) = (Mutex::default(), Mutex::default());
        Ok(Scheduler { components, edits, book, sizes, forecast, changed: Notify::new() })
    }

    pub(super) fn now(&self) -> Timestamp {
        self.components.clock.now()
    }
}
