//! Schedules at work: when one is due, its jobs are made; when jobs fail, they are tried again; what it promises is watched.
//!
//! ```text
//!        ┌──────────── something changed, a job ended, or the next time has come ────────────┐
//!        ▼                                                                                   │
//!  settle (runs whose jobs ended) ─▶ plan (deadlines) ─▶ start what is due ─▶ sleep until the next time
//!                                                            │
//!                        patterns ─▶ tags ─▶ (tag moved?) ─▶ queue.submit, then the record
//! ```
//!
//! A run is a set of ordinary jobs: the queue knows which image is under way already, so schedules cannot conflict. A slot
//! is covered once its jobs are in the queue: a coordinator that dies in between makes the same jobs again, which find
//! their layers in the store. While it was down, slots pass; the first look afterwards makes them up with one run.
//!
//! `book` guards the schedules; it is never held across an await or a write to the journal. `edits` guards the order of changes and is
//! held across the writing of one, so that the database has the last word that the book has, and nobody's change is lost
//! in another's; who only looks does not take it. Order: `edits`, then `book`.
//!
//! Time is what the wall clock says, also when it said something else before: `clock_moved`.

mod clock_moved;
mod forecast;
pub mod record;
mod settle;
mod start;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use coordinator_api::event::Severity;
use coordinator_api::schedule::{RunState, Schedule as View, ScheduleSpec};
use jiff::Timestamp;
use parking_lot::Mutex;
use store::image::ImageRef;
use store::publisher::Publisher;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::jobs::queue::{JobQueue, QueueError};
use crate::plan::schedule::{BadSchedule, Schedule, Trigger};
use crate::plan::scheduler::forecast::{Forecast, SizeKey, Sized};
use crate::plan::scheduler::record::{Entry, Record};
use crate::plan::times;
use crate::registries::limits::{Limits, RegistryNews};
use crate::registries::{Registry, TagLister};
use crate::state::clock::{Clock, after, until};
use crate::state::events::{Events, NewEvent};
use crate::state::state_db::{Durability, StateDb, StateError, Table};

pub use crate::plan::scheduler::forecast::free_space;

/// Whatever seems to be due, nobody looks more often than this unless something rings.
const SHORTEST_SLEEP: Duration = Duration::from_millis(50);
/// Nobody sleeps longer than this without a look.
const LONGEST_SLEEP: Duration = Duration::from_secs(3600);
/// The plan is looked at when a fiftieth of the time to the next deadline has passed, and within these bounds.
const REPLAN_PARTS: u32 = 50;
const REPLAN_SOONEST: Duration = Duration::from_secs(15);
const REPLAN_LATEST: Duration = Duration::from_secs(600);
/// Pauses before what failed is tried again: doubling from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_secs(60);
const LAST_PAUSE: Duration = Duration::from_secs(3600);

/// A request that the scheduler refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// No such schedule.
    #[error("there is no schedule {0}: cachefsctl schedule list shows them")]
    Unknown(String),
    /// The name is taken.
    #[error("there is a schedule {0} already: remove it first, or use cachefsctl apply")]
    Exists(String),
    /// It makes no sense.
    #[error(transparent)]
    Bad(#[from] BadSchedule),
    /// Its images could not be found out, or its jobs not be made.
    #[error("schedule {name} cannot run: {why}")]
    CannotRun {
        /// Which.
        name: String,
        /// Why.
        why: String,
    },
    /// The journal.
    #[error(transparent)]
    StateDb(#[from] StateError),
    /// The queue.
    #[error(transparent)]
    JobQueue(#[from] QueueError),
}

/// What the scheduler works with.
pub struct Parts {
    /// What time it is.
    pub clock: Arc<dyn Clock>,
    /// Memory.
    pub state_db: Arc<dyn StateDb>,
    /// Where jobs are made.
    pub queue: Arc<JobQueue>,
    /// How registries stand.
    pub limits: Arc<Limits>,
    /// Who lists tags.
    pub tag_lister: Arc<dyn TagLister>,
    /// Who knows sizes.
    pub registry: Arc<dyn Registry>,
    /// What is in the store.
    pub publisher: Arc<Publisher>,
    /// Where the store lies, for its free space.
    pub store_path: PathBuf,
    /// What people want to know.
    pub events: Arc<Events>,
}

/// All schedules of one coordinator.
pub struct Scheduler {
    parts: Parts,
    edits: Mutex<()>,
    book: Mutex<BTreeMap<String, Entry>>,
    sizes: Mutex<HashMap<SizeKey, Sized>>,
    forecast: Mutex<Forecast>,
    /// Rung when the book changes.
    changed: Notify,
}

/// Waiting after so many failures in a row.
fn pause(failures: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(LAST_PAUSE)
}

impl Scheduler {
    /// Reads the schedules from the journal. One that is not understood, such as one in a time zone that this machine does not know,
    /// is kept, listed as broken, told as an event, and makes no jobs; a record that cannot be read (written by a newer version) stays in
    /// the journal.
    pub fn open(parts: Parts) -> Result<Scheduler, StateError> {
        let mut book = BTreeMap::new();
        for (key, bytes) in parts.state_db.records(Table::Schedules)? {
            let name = String::from_utf8_lossy(&key).into_owned();
            let entry = serde_json::from_slice::<Record>(&bytes).map(Entry::kept).map_err(|error| error.to_string());
            let why = match &entry {
                Ok(entry) => entry.schedule.why_broken().map(str::to_owned),
                Err(why) => Some(format!("its record cannot be read: {why}")),
            };
            if let Some(why) = why {
                let message = format!("schedule {name} is kept and makes no jobs: {why}");
                parts.events.record(NewEvent::new(Severity::Error, "schedule.broken", &name, message));
            }
            if let Ok(entry) = entry {
                book.insert(name, entry);
            }
        }
        for (key, bytes) in parts.state_db.records(Table::Speeds)? {
            if let Ok(speed) = serde_json::from_slice(&bytes) {
                parts.limits.remember_speed(&String::from_utf8_lossy(&key), speed);
            }
        }
        let (edits, book) = (Mutex::new(()), Mutex::new(book));
        let (sizes, forecast) = (Mutex::default(), Mutex::default());
        Ok(Scheduler { parts, edits, book, sizes, forecast, changed: Notify::new() })
    }

    /// Makes jobs until `stop`.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut ended = self.parts.queue.ended();
        let mut work = JoinSet::new();
        loop {
            let scheduler = Arc::clone(&self);
            let settled = tokio::task::spawn_blocking(move || scheduler.settle()).await;
            if settled.is_err() {
                break;
            }
            self.say_registry_news();
            self.replan().await;
            let now = self.now();
            for name in self.take_unsized(now) {
                work.spawn(Arc::clone(&self).measure(name));
            }
            for start in self.take_due(now) {
                work.spawn(Arc::clone(&self).start(start));
            }
            let wake = self.next_time(now);
            tokio::select! {
                () = stop.cancelled() => break,
                () = self.parts.clock.sleep_until(wake) => {}
                () = self.changed.notified() => {}
                _ = ended.changed() => {}
                _ = work.join_next(), if !work.is_empty() => {}
            }
        }
        work.shutdown().await;
    }

    fn now(&self) -> Timestamp {
        self.parts.clock.now()
    }

    /// The next time that something may be due.
    fn next_time(&self, now: Timestamp) -> Timestamp {
        let book = self.book.lock();
        let mut wake = after(now, LONGEST_SLEEP);
        for entry in book.values() {
            let runs = entry.record.runs.iter().filter(|run| run.state == RunState::Running);
            // One that has passed waits for a job that somebody else has begun again: its end rings.
            let retries = runs.clone().filter_map(|run| run.retry_at).filter(|at| *at > now);
            let promised = entry.record.missed_for;
            let deadlines = runs.filter_map(|run| run.deadline).filter(|at| *at > now && Some(*at) != promised);
            let ready_by = matches!(entry.schedule.trigger, Trigger::ReadyBy(_)) && !entry.record.spec.paused;
            let own = entry.next_slot().filter(|_| !entry.busy).map(|slot| match entry.schedule.trigger {
                Trigger::TagMove(every) => {
                    // Of slots that have passed, the newest counts.
                    let due = times::due(&entry.slots, entry.record.covered, now);
                    let slot = due.map_or(slot, |due| due.slot);
                    after(slot, start::jitter(&entry.record.spec.name, slot, every))
                }
                _ => slot,
            });
            let own = own.map(|slot| slot.max(entry.not_before));
            let replan = entry
                .next_slot()
                .filter(|_| ready_by)
                .map(|deadline| after(now, (until(now, deadline) / REPLAN_PARTS).clamp(REPLAN_SOONEST, REPLAN_LATEST)));
            wake = retries.chain(deadlines).chain(own).chain(replan).fold(wake, Timestamp::min);
        }
        drop(book);
        let starts = self.forecast.lock().next_start(now);
        starts.into_iter().fold(wake, Timestamp::min).max(after(now, SHORTEST_SLEEP))
    }

    /// The schedules, by name.
    pub fn list(&self) -> Vec<View> {
        let names: Vec<String> = self.book.lock().keys().cloned().collect();
        names.iter().filter_map(|name| self.get(name).ok()).collect()
    }

    /// The orders, by name.
    pub fn specs(&self) -> Vec<ScheduleSpec> {
        self.book.lock().values().map(|entry| entry.record.spec.clone()).collect()
    }

    /// Schedules that this machine does not understand any more, and why.
    pub fn broken(&self) -> Vec<(String, String)> {
        let book = self.book.lock();
        book.iter().filter_map(|(name, entry)| Some((name.clone(), entry.schedule.why_broken()?.to_owned()))).collect()
    }

    /// Takes up schedules that this machine did not understand and does now, as a restart would.
    pub fn look_again(&self) {
        for (name, _) in self.broken() {
            let _edit = self.edits.lock();
            let mut book = self.book.lock();
            let Some(entry) = book.get_mut(&name) else { continue };
            let Ok(mended) = Entry::new(entry.record.clone()) else { continue };
            *entry = mended;
            drop(book);
            let message = format!("schedule {name} is understood again, and makes jobs");
            self.parts.events.record(NewEvent::new(Severity::Info, "schedule.mended", &name, message));
            self.changed.notify_one();
        }
    }

    /// One schedule.
    pub fn get(&self, name: &str) -> Result<View, ScheduleError> {
        let forecast = self.forecast.lock().of(name);
        let book = self.book.lock();
        let entry = book.get(name).ok_or_else(|| ScheduleError::Unknown(name.to_owned()))?;
        let next = match (&forecast, &entry.schedule.trigger) {
            (Some(forecast), Trigger::ReadyBy(_)) => forecast.start_at.or(Some(forecast.deadline)),
            _ => entry.next_slot(),
        };
        Ok(View {
            spec: entry.record.spec.clone(),
            trigger: entry.schedule.words(),
            next_at: next.filter(|_| !entry.record.spec.paused),
            broken: entry.schedule.why_broken().is_some(),
            trouble: entry.trouble.clone().or_else(|| entry.schedule.why_broken().map(str::to_owned)),
            forecast: forecast.filter(|_| !entry.record.spec.paused),
            runs: entry.record.runs.iter().rev().map(record::RunRecord::view).collect(),
            accuracy: entry.record.scores.accuracy(),
        })
    }

    /// The schedule that next pulls `image` on its own, and when.
    pub fn next_for(&self, image: &ImageRef) -> Option<(String, Timestamp)> {
        let book = self.book.lock();
        let meant = book.iter().filter(|(_, entry)| entry.schedule.means(image));
        let next = |(name, entry): (&String, &Entry)| {
            let retries = entry.record.runs.iter().filter_map(|run| run.retry_at);
            Some((name.clone(), retries.chain(entry.next_slot()).min()?))
        };
        meant.filter_map(next).min_by_key(|(_, at)| *at)
    }

    /// Adds a schedule. Blocks on the journal.
    pub fn add(&self, spec: ScheduleSpec) -> Result<View, ScheduleError> {
        let name = spec.name.clone();
        Schedule::parse(spec.clone())?.check_future(self.now())?;
        {
            let _edit = self.edits.lock();
            if self.book.lock().contains_key(&name) {
                return Err(ScheduleError::Exists(name));
            }
            self.put(vec![spec], Vec::new())?;
        }
        self.get(&name)
    }

    /// Refuses what [`Scheduler::replace`] would refuse, without doing it.
    pub fn check(&self, spec: &ScheduleSpec) -> Result<(), ScheduleError> {
        // What is there already stays as it is, also what this machine does not understand any more.
        if self.book.lock().get(&spec.name).is_some_and(|entry| entry.record.spec == *spec) {
            return Ok(());
        }
        Schedule::parse(spec.clone())?;
        Ok(())
    }

    /// Says so if a schedule that is new, or changes, is for a time that has passed: it is kept, and does not run.
    pub fn passed(&self, spec: &ScheduleSpec) -> Option<String> {
        if self.book.lock().get(&spec.name).is_some_and(|entry| entry.record.spec == *spec) {
            return None;
        }
        let passed = Schedule::parse(spec.clone()).ok()?.check_future(self.now()).err()?;
        Some(format!("{passed}; it is kept, and does not run"))
    }

    /// Makes `specs` all the schedules that there are, at once; the runs of those that stay are kept. Blocks on the journal.
    pub fn replace(&self, specs: &[ScheduleSpec]) -> Result<(), ScheduleError> {
        let _edit = self.edits.lock();
        let wanted = |name: &String| specs.iter().any(|spec| spec.name == *name);
        let gone = self.book.lock().keys().filter(|name| !wanted(name)).cloned().collect();
        self.put(specs.to_vec(), gone)
    }

    /// Adds or changes some schedules and removes others, all or none. To be called with `edits` held.
    fn put(&self, specs: Vec<ScheduleSpec>, gone: Vec<String>) -> Result<(), ScheduleError> {
        let now = self.now();
        let mut entries = Vec::new();
        for spec in specs {
            entries.extend(self.changed_entry(spec, now)?);
        }
        let json = |entry: &Entry| serde_json::to_vec(&entry.record).unwrap_or_default();
        let written: Vec<(String, Option<Vec<u8>>)> = entries
            .iter()
            .map(|entry| (entry.record.spec.name.clone(), Some(json(entry))))
            .chain(gone.iter().map(|name| (name.clone(), None)))
            .collect();
        let changes: Vec<(&[u8], Option<&[u8]>)> =
            written.iter().map(|(name, json)| (name.as_bytes(), json.as_deref())).collect();
        if changes.is_empty() {
            return Ok(());
        }
        self.parts.state_db.change_records(Table::Schedules, &changes, Durability::Synced)?;
        let mut book = self.book.lock();
        gone.iter().for_each(|name| _ = book.remove(name));
        book.extend(entries.into_iter().map(|entry| (entry.record.spec.name.clone(), entry)));
        drop(book);
        self.changed.notify_one();
        Ok(())
    }

    /// A schedule as it becomes by an order; nothing if it is so already.
    fn changed_entry(&self, spec: ScheduleSpec, now: Timestamp) -> Result<Option<Entry>, ScheduleError> {
        let record = match self.book.lock().get(&spec.name).map(|entry| entry.record.clone()) {
            Some(old) if old.spec == spec => return Ok(None),
            // Another trigger has other slots: those of the past are not its own.
            Some(old) => Record { spec, created_at: now, covered: now, ..old },
            None => Record::new(spec, now),
        };
        Ok(Some(Entry::new(record)?))
    }

    /// Removes a schedule; its jobs go on. Blocks on the journal.
    pub fn remove(&self, name: &str) -> Result<View, ScheduleError> {
        let _edit = self.edits.lock();
        let view = self.get(name)?;
        self.put(Vec::new(), vec![name.to_owned()])?;
        Ok(view)
    }

    /// Pauses or resumes; the slots of the pause are not made up. Blocks on the journal.
    pub fn set_paused(&self, name: &str, paused: bool) -> Result<View, ScheduleError> {
        {
            let _edit = self.edits.lock();
            let now = self.now();
            let known = self.book.lock().get(name).map(|entry| entry.record.clone());
            let mut record = known.ok_or_else(|| ScheduleError::Unknown(name.to_owned()))?;
            if record.spec.paused && !paused {
                record.covered = now;
            }
            record.spec.paused = paused;
            self.write(&record, Durability::Synced)?;
            if let Some(entry) = self.book.lock().get_mut(name) {
                entry.schedule.spec.paused = paused;
                entry.record = record;
            }
        }
        self.changed.notify_one();
        self.get(name)
    }

    fn write(&self, record: &Record, durability: Durability) -> Result<(), StateError> {
        let Ok(json) = serde_json::to_vec(record) else { return Ok(()) };
        let changes = [(record.spec.name.as_bytes(), Some(json.as_slice()))];
        self.parts.state_db.change_records(Table::Schedules, &changes, durability)
    }

    /// Changes a schedule's memory, if it still exists, and writes it down.
    fn amend(&self, name: &str, change: impl FnOnce(&mut Entry)) {
        let _edit = self.edits.lock();
        let record = {
            let mut book = self.book.lock();
            let Some(entry) = book.get_mut(name) else { return };
            change(entry);
            entry.record.clone()
        };
        if let Err(error) = self.write(&record, Durability::Synced) {
            tracing::error!("what schedule {name} did is not written down, a restart may do it again: {error}");
        }
    }

    fn say(&self, severity: Severity, kind: &'static str, name: &str, message: String) {
        self.parts.events.record(NewEvent::new(severity, kind, name, message).by(format!("schedule {name}")));
    }

    fn say_registry_news(&self) {
        for news in self.parts.limits.take_news() {
            let news = match news {
                RegistryNews::Opened { registry, until, why } => {
                    let message = format!("registry {registry} is left alone until {until}: it keeps failing ({why})");
                    NewEvent::new(Severity::Warning, "registry.down", registry, message)
                }
                RegistryNews::Closed { registry } => {
                    let message = format!("registry {registry} answers again");
                    NewEvent::new(Severity::Info, "registry.up", registry, message)
                }
            };
            self.parts.events.record(news);
        }
    }
}

#[cfg(test)]
mod month;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod world;
