//! What is remembered of a schedule: the order as it was written, what is covered, its runs and how they were forecast.

use std::collections::VecDeque;

use coordinator_api::schedule::{Accuracy, Run, RunState, ScheduleSpec};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use store::image::ImageRef;

use crate::plan::schedule::{BadSchedule, Schedule};
use crate::plan::times::Slots;
use crate::state::job::JobId;

/// Runs beyond this number are forgotten, oldest first.
const KEEP_RUNS: usize = 20;

/// One time that a schedule made jobs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// What it stands for: a slot, a deadline, a push.
    pub slot: Timestamp,
    /// When its jobs were made.
    pub started_at: Timestamp,
    /// When the last of them ended for good.
    pub ended_at: Option<Timestamp>,
    /// How it stands.
    pub state: RunState,
    /// What it pulls.
    pub images: Vec<ImageRef>,
    /// Its jobs, in the order of the images.
    pub jobs: Vec<JobId>,
    /// Earlier slots that it stands for.
    pub made_up: u64,
    /// Why it failed, or last failed.
    pub reason: Option<String>,
    /// What was promised.
    pub deadline: Option<Timestamp>,
    /// When it was expected to end.
    pub predicted_at: Option<Timestamp>,
    /// What it was expected to fetch.
    pub predicted_bytes: Option<u64>,
    /// How often failed jobs were tried again.
    pub tries: u32,
    /// When they will be.
    pub retry_at: Option<Timestamp>,
}

impl RunRecord {
    /// What the API shows.
    pub fn view(&self) -> Run {
        Run {
            slot: self.slot,
            started_at: self.started_at,
            ended_at: self.ended_at,
            state: self.state,
            images: self.images.iter().map(ToString::to_string).collect(),
            jobs: self.jobs.iter().map(|job| job.0).collect(),
            made_up: self.made_up,
            reason: self.reason.clone(),
            retry_at: self.retry_at,
            deadline: self.deadline,
            predicted_at: self.predicted_at,
            predicted_bytes: self.predicted_bytes,
        }
    }
}

/// Forecasts held against what happened; sums, so that forgotten runs still count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    count: u64,
    in_time: u64,
    error_seconds: f64,
    absolute_seconds: f64,
}

impl Scores {
    /// Counts a run that ended well, if it was forecast.
    pub fn count(&mut self, run: &RunRecord) {
        let (Some(predicted), Some(ended)) = (run.predicted_at, run.ended_at) else { return };
        let error = ended.duration_since(predicted).as_secs_f64();
        self.count += 1;
        self.in_time += u64::from(run.deadline.is_none_or(|deadline| ended <= deadline));
        self.error_seconds += error;
        self.absolute_seconds += error.abs();
    }

    /// Their means.
    pub fn accuracy(&self) -> Option<Accuracy> {
        let mean = |sum: f64| sum / self.count as f64;
        (self.count > 0).then(|| Accuracy {
            scored: self.count,
            in_time: self.in_time,
            mean_error_seconds: mean(self.error_seconds),
            mean_absolute_error_seconds: mean(self.absolute_seconds),
        })
    }
}

/// What survives a restart.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The order.
    pub spec: ScheduleSpec,
    /// Its beginning: earlier slots do not count.
    pub created_at: Timestamp,
    /// Slots up to here are run or made up.
    pub covered: Timestamp,
    /// Oldest first.
    pub runs: VecDeque<RunRecord>,
    /// Of all its runs.
    pub scores: Scores,
    /// The deadline whose risk was said.
    #[serde(default)]
    pub warned_for: Option<Timestamp>,
    /// The deadline whose miss was said.
    #[serde(default)]
    pub missed_for: Option<Timestamp>,
}

impl Record {
    /// A schedule that begins at `now`.
    pub fn new(spec: ScheduleSpec, now: Timestamp) -> Record {
        Record {
            spec,
            created_at: now,
            covered: now,
            runs: VecDeque::new(),
            scores: Scores::default(),
            warned_for: None,
            missed_for: None,
        }
    }

    /// Adds a run; older ones that only wait for another try give way to it.
    pub fn begin(&mut self, run: RunRecord) {
        let waiting = self.runs.iter_mut().filter(|old| old.state == RunState::Running && old.retry_at.is_some());
        for old in waiting {
            old.state = RunState::Failed;
            old.ended_at = Some(run.started_at);
            old.retry_at = None;
        }
        self.runs.push_back(run);
        while self.runs.len() > KEEP_RUNS {
            self.runs.pop_front();
        }
    }
}

/// A schedule as the scheduler works with it.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The order, checked.
    pub schedule: Schedule,
    /// Its memory.
    pub record: Record,
    /// When it runs on its own.
    pub slots: Slots,
    /// Why its last attempt made no jobs.
    pub trouble: Option<String>,
    /// Attempts in a row that made none.
    pub failures: u32,
    /// No attempt before this.
    pub not_before: Timestamp,
    /// An attempt is under way.
    pub busy: bool,
    /// When the sizes of its images were last asked for.
    pub sized_at: Option<Timestamp>,
    /// The images that it meant then.
    pub meant: Vec<ImageRef>,
    /// Why that is not known.
    pub unknown: Option<String>,
    /// Images beyond the most of one run, when it was last looked.
    pub left_out: usize,
}

impl Entry {
    /// Checks a record.
    pub fn new(record: Record) -> Result<Entry, BadSchedule> {
        let schedule = Schedule::parse(record.spec.clone())?;
        Ok(Entry::of(schedule, record))
    }

    /// Checks a record that was accepted once: what this machine does not understand is kept, and makes no jobs.
    pub fn kept(record: Record) -> Entry {
        let schedule = Schedule::parse(record.spec.clone())
            .unwrap_or_else(|BadSchedule { why, .. }| Schedule::broken(record.spec.clone(), why));
        Entry::of(schedule, record)
    }

    fn of(schedule: Schedule, record: Record) -> Entry {
        let slots = schedule.slots(record.created_at);
        let not_before = record.created_at;
        Entry {
            schedule,
            record,
            slots,
            trouble: None,
            failures: 0,
            not_before,
            busy: false,
            sized_at: None,
            meant: Vec::new(),
            unknown: None,
            left_out: 0,
        }
    }

    /// The next slot on its own.
    pub fn next_slot(&self) -> Option<Timestamp> {
        if self.record.spec.paused { None } else { self.slots.next(self.record.covered) }
    }
}
