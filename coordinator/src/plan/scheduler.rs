//! Schedules at work: makes jobs when a schedule is due, retries failed ones, and watches the deadlines that were promised.
//!
//! ```text
//!        ┌──────────── something changed, a job ended, or the next time has come ────────────┐
//!        ▼                                                                                   │
//!  settle (runs whose jobs ended) ─▶ plan (deadlines) ─▶ start what is due ─▶ sleep until the next time
//!                                                            │
//!                        patterns ─▶ tags ─▶ (tag moved?) ─▶ queue.submit, then the record
//! ```
//!
//! A run is a set of ordinary jobs. The queue knows which images are under way already, so schedules cannot conflict. A slot is covered
//! once its jobs are in the queue: after a coordinator dies in between, the same jobs are made again, and they find their layers in the
//! store. Slots pass while the coordinator is down; the first look afterwards makes them up with one run.
//!
//! Time is what the wall clock says, even if it said something else before: see `clock_moved`.

mod clock_moved;
mod error;
mod forecast;
mod pauses;
pub mod record;
mod replan;
mod settle;
mod start;
mod state;

use std::sync::Arc;
use std::time::Duration;

use coordinator_api::event::Severity;
use coordinator_api::schedule::{RunState, Schedule as View, ScheduleSpec};
use jiff::Timestamp;
use store::image::ImageRef;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::plan::scheduler::pauses::jitter;
use crate::plan::scheduler::record::{ScheduleEntry, ScheduleRecord};
use crate::plan::spec::{Schedule, Trigger};
use crate::plan::times;
use crate::registries::limits::RegistryEvent;
use crate::state::clock::{after, until};
use crate::state::events::NewEvent;
use crate::state::state_db::{Durability, StateError, Table};

pub use crate::plan::scheduler::error::ScheduleError;
pub use crate::plan::scheduler::replan::free_space;
pub use crate::plan::scheduler::state::{Components, Scheduler};

/// The shortest sleep between two looks, whatever seems to be due, unless there is a notification.
const SHORTEST_SLEEP: Duration = Duration::from_millis(50);
/// The longest sleep without a look.
const LONGEST_SLEEP: Duration = Duration::from_secs(3600);
/// The plan is made again after a fiftieth of the time to the next deadline, within these bounds.
const REPLAN_PARTS: u32 = 50;
const REPLAN_SOONEST: Duration = Duration::from_secs(15);
const REPLAN_LATEST: Duration = Duration::from_secs(600);
impl Scheduler {
    /// Makes jobs until `stop` is cancelled.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut ended = self.components.queue.ended();
        let mut work = JoinSet::new();
        loop {
            let scheduler = Arc::clone(&self);
            let settled = tokio::task::spawn_blocking(move || scheduler.settle()).await;
            if settled.is_err() {
                break;
            }
            self.record_registry_events();
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
                () = self.components.clock.sleep_until(wake) => {}
                () = self.changed.notified() => {}
                _ = ended.changed() => {}
                _ = work.join_next(), if !work.is_empty() => {}
            }
        }
        work.shutdown().await;
    }

    /// The next time that something may be due.
    fn next_time(&self, now: Timestamp) -> Timestamp {
        let book = self.book.lock();
        let mut wake = after(now, LONGEST_SLEEP);
        for entry in book.values() {
            let runs = entry.record.runs.iter().filter(|run| run.state == RunState::Running);
            // A retry that is overdue waits for a job that somebody else restarted: its completion wakes the scheduler.
            let retries = runs.clone().filter_map(|run| run.retry_at).filter(|at| *at > now);
            let promised = entry.record.missed_for;
            let deadlines = runs.filter_map(|run| run.deadline).filter(|at| *at > now && Some(*at) != promised);
            let ready_by = matches!(entry.schedule.trigger, Trigger::ReadyBy(_)) && !entry.record.spec.paused;
            let own = entry.next_slot().filter(|_| !entry.busy).map(|slot| match entry.schedule.trigger {
                Trigger::TagMove(every) => {
                    // Of slots that have passed, the newest counts.
                    let due = times::due(&entry.slots, entry.record.covered, now);
                    let slot = due.map_or(slot, |due| due.slot);
                    after(slot, jitter(&entry.record.spec.name, slot, every))
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

    /// The schedules, sorted by name.
    pub fn list(&self) -> Vec<View> {
        let names: Vec<String> = self.book.lock().keys().cloned().collect();
        names.iter().filter_map(|name| self.get(name).ok()).collect()
    }

    /// The schedules as they were written, sorted by name.
    pub fn specs(&self) -> Vec<ScheduleSpec> {
        self.book.lock().values().map(|entry| entry.record.spec.clone()).collect()
    }

    /// Schedules that this machine no longer understands, and why.
    pub fn broken(&self) -> Vec<(String, String)> {
        let book = self.book.lock();
        book.iter().filter_map(|(name, entry)| Some((name.clone(), entry.schedule.why_broken()?.to_owned()))).collect()
    }

    /// Takes up schedules that this machine did not understand before and does now, as a restart would.
    pub fn look_again(&self) {
        for (name, _) in self.broken() {
            let _edit = self.edits.lock();
            let mut book = self.book.lock();
            let Some(entry) = book.get_mut(&name) else { continue };
            let Ok(mended) = ScheduleEntry::new(entry.record.clone()) else { continue };
            *entry = mended;
            drop(book);
            let message = format!("schedule {name} is understood again, and makes jobs");
            self.components.events.record(NewEvent::new(Severity::Info, "schedule.mended", &name, message));
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
        let next = |(name, entry): (&String, &ScheduleEntry)| {
            let retries = entry.record.runs.iter().filter_map(|run| run.retry_at);
            Some((name.clone(), retries.chain(entry.next_slot()).min()?))
        };
        meant.filter_map(next).min_by_key(|(_, at)| *at)
    }

    /// Adds a schedule. Blocks on the database.
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
        // A schedule that is already there stays as it is, even if this machine no longer understands it.
        if self.book.lock().get(&spec.name).is_some_and(|entry| entry.record.spec == *spec) {
            return Ok(());
        }
        Schedule::parse(spec.clone())?;
        Ok(())
    }

    /// A warning if a schedule that is new, or changes, is for a time that has passed: it is kept, and does not run.
    pub fn passed(&self, spec: &ScheduleSpec) -> Option<String> {
        if self.book.lock().get(&spec.name).is_some_and(|entry| entry.record.spec == *spec) {
            return None;
        }
        let passed = Schedule::parse(spec.clone()).ok()?.check_future(self.now()).err()?;
        Some(format!("{passed}; it is kept, and does not run"))
    }

    /// Replaces all schedules with `specs` at once. Those that stay keep their runs. Blocks on the database.
    pub fn replace(&self, specs: &[ScheduleSpec]) -> Result<(), ScheduleError> {
        let _edit = self.edits.lock();
        let wanted = |name: &String| specs.iter().any(|spec| spec.name == *name);
        let gone = self.book.lock().keys().filter(|name| !wanted(name)).cloned().collect();
        self.put(specs.to_vec(), gone)
    }

    /// Adds or changes some schedules and removes others, all or none. The caller holds `edits`.
    fn put(&self, specs: Vec<ScheduleSpec>, gone: Vec<String>) -> Result<(), ScheduleError> {
        let now = self.now();
        let mut entries = Vec::new();
        for spec in specs {
            entries.extend(self.changed_entry(spec, now)?);
        }
        let json = |entry: &ScheduleEntry| serde_json::to_vec(&entry.record).unwrap_or_default();
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
        self.components.state_db.change_records(Table::Schedules, &changes, Durability::Synced)?;
        let mut book = self.book.lock();
        gone.iter().for_each(|name| _ = book.remove(name));
        book.extend(entries.into_iter().map(|entry| (entry.record.spec.name.clone(), entry)));
        drop(book);
        self.changed.notify_one();
        Ok(())
    }

    /// A schedule as an order makes it; `None` if it is like that already.
    fn changed_entry(&self, spec: ScheduleSpec, now: Timestamp) -> Result<Option<ScheduleEntry>, ScheduleError> {
        let record = match self.book.lock().get(&spec.name).map(|entry| entry.record.clone()) {
            Some(old) if old.spec == spec => return Ok(None),
            // Another trigger has other slots, and past ones are not its own.
            Some(old) => ScheduleRecord { spec, created_at: now, covered: now, ..old },
            None => ScheduleRecord::new(spec, now),
        };
        Ok(Some(ScheduleEntry::new(record)?))
    }

    /// Removes a schedule; its jobs continue. Blocks on the database.
    pub fn remove(&self, name: &str) -> Result<View, ScheduleError> {
        let _edit = self.edits.lock();
        let view = self.get(name)?;
        self.put(Vec::new(), vec![name.to_owned()])?;
        Ok(view)
    }

    /// Pauses or resumes a schedule. Slots that pass during a pause are not made up. Blocks on the database.
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

    fn write(&self, record: &ScheduleRecord, durability: Durability) -> Result<(), StateError> {
        let Ok(json) = serde_json::to_vec(record) else { return Ok(()) };
        let changes = [(record.spec.name.as_bytes(), Some(json.as_slice()))];
        self.components.state_db.change_records(Table::Schedules, &changes, durability)
    }

    /// Changes what is remembered of a schedule, if it still exists, and writes it to the database.
    fn amend(&self, name: &str, change: impl FnOnce(&mut ScheduleEntry)) {
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
        self.components.events.record(NewEvent::new(severity, kind, name, message).by(format!("schedule {name}")));
    }

    fn record_registry_events(&self) {
        for event in self.components.limits.take_events() {
            let event = match event {
                RegistryEvent::Opened { registry, until, why } => {
                    let message = format!("registry {registry} is left alone until {until}: it keeps failing ({why})");
                    NewEvent::new(Severity::Warning, "registry.down", registry, message)
                }
                RegistryEvent::Closed { registry } => {
                    let message = format!("registry {registry} answers again");
                    NewEvent::new(Severity::Info, "registry.up", registry, message)
                }
            };
            self.components.events.record(event);
        }
    }
}

#[cfg(test)]
mod month;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod world;
