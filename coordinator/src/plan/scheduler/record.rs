//! What is remembered of a schedule: the order as it was written, what is covered, its runs and how they were forecast.

use std::collections::VecDeque;

use coordinator_api::schedule::{Accuracy, Run, RunState, ScheduleSpec};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use store::image::ImageRef;

use crate::plan::spec::{BadSchedule, Schedule};
use crate::plan::times::Slots;
use crate::state::job::JobId;

/// Runs beyond this number are forgotten, oldest first.
const KEEP_RUNS: usize = 20;

/// One run of a schedule: the jobs that it made at one time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// What the run is for: a slot, a deadline, or the time of a push.
    pub slot: Timestamp,
    /// When its jobs were made.
    pub started_at: Timestamp,
    /// When the last of its jobs ended for good.
    pub ended_at: Option<Timestamp>,
    /// Its state.
    pub state: RunState,
    /// The images that it pulls.
    pub images: Vec<ImageRef>,
    /// Its jobs, in the order of the images.
    pub jobs: Vec<JobId>,
    /// How many earlier slots it makes up for.
    pub made_up: u64,
    /// Why it failed, or failed last.
    pub reason: Option<String>,
    /// The deadline that was promised.
    pub deadline: Option<Timestamp>,
    /// When it was expected to end.
    pub predicted_at: Option<Timestamp>,
    /// How many bytes it was expected to fetch.
    pub predicted_bytes: Option<u64>,
    /// How often failed jobs were retried.
    pub tries: u32,
    /// When they will be retried.
    pub retry_at: Option<Timestamp>,
}

impl RunRecord {
    /// The run as the API shows it.
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

/// Forecasts compared with what happened, as sums, so that forgotten runs still count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    count: u64,
    in_time: u64,
    error_seconds: f64,
    absolute_seconds: f64,
}

impl Scores {
    /// Counts a run that was published, if it was forecast.
    pub fn count(&mut self, run: &RunRecord) {
        let (Some(predicted), Some(ended)) = (run.predicted_at, run.ended_at) else { return };
        let error = ended.duration_since(predicted).as_secs_f64();
        self.count += 1;
        self.in_time += u64::from(run.deadline.is_none_or(|deadline| ended <= deadline));
        self.error_seconds += error;
        self.absolute_seconds += error.abs();
    }

    /// The means of the sums.
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

/// A schedule as the database keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScheduleRecord {
    /// The order as it was written.
    pub spec: ScheduleSpec,
    /// When it begins: earlier slots do not count.
    pub created_at: Timestamp,
    /// Slots up to here have run or were made up.
    pub covered: Timestamp,
    /// Its runs, oldest first.
    pub runs: VecDeque<RunRecord>,
    /// The scores of all its runs.
    pub scores: Scores,
    /// The deadline whose risk was reported.
    #[serde(default)]
    pub warned_for: Option<Timestamp>,
    /// The deadline whose miss was reported.
    #[serde(default)]
    pub missed_for: Option<Timestamp>,
}

impl ScheduleRecord {
    /// A schedule that begins at `now`.
    pub fn new(spec: ScheduleSpec, now: Timestamp) -> ScheduleRecord {
        ScheduleRecord {
            spec,
            created_at: now,
            covered: now,
            runs: VecDeque::new(),
            scores: Scores::default(),
            warned_for: None,
            missed_for: None,
        }
    }

    /// Adds a run. Older runs that only wait for a retry end as failed.
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
pub struct ScheduleEntry {
    /// The order, checked.
    pub schedule: Schedule,
    /// What is remembered of it.
    pub record: ScheduleRecord,
    /// The slots at which it runs on its own.
    pub slots: Slots,
    /// Why its last attempt made no jobs.
    pub trouble: Option<String>,
    /// How many attempts in a row made no jobs.
    pub failures: u32,
    /// No attempt is made before this time.
    pub not_before: Timestamp,
    /// Whether an attempt is under way.
    pub busy: bool,
    /// When the sizes of its images were last asked for.
    pub sized_at: Option<Timestamp>,
    /// The images that it meant then.
    pub meant: Vec<ImageRef>,
    /// Why that is not known.
    pub unknown: Option<String>,
    /// How many images were beyond the most of one run at the last look.
    pub left_out: usize,
}

impl ScheduleEntry {
    /// Checks the schedule of a record.
    pub fn new(record: ScheduleRecord) -> Result<ScheduleEntry, BadSchedule> {
        let schedule = Schedule::parse(record.spec.clone())?;
        Ok(ScheduleEntry::of(schedule, record))
    }

    /// Checks the schedule of a record that was accepted once. If this machine does not understand it, it is kept and makes no jobs.
    pub fn kept(record: ScheduleRecord) -> ScheduleEntry {
        let schedule = Schedule::parse(record.spec.clone())
            .unwrap_or_else(|BadSchedule { why, .. }| Schedule::broken(record.spec.clone(), why));
        ScheduleEntry::of(schedule, record)
    }

    fn of(schedule: Schedule, record: ScheduleRecord) -> ScheduleEntry {
        let slots = schedule.slots(record.created_at);
        let not_before = record.created_at;
        ScheduleEntry {
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

    /// The next slot at which it runs on its own.
    pub fn next_slot(&self) -> Option<Timestamp> {
        if self.record.spec.paused { None } else { self.slots.next(self.record.covered) }
    }
}
