//! Runs whose jobs have ended are published, retried after a pause, or given up. Deadlines that have passed are reported.

use std::time::Duration;

use coordinator_api::event::Severity;
use coordinator_api::job::{Job, JobState};
use coordinator_api::schedule::RunState;
use jiff::Timestamp;
use store::image::ImageRef;

use crate::plan::scheduler::pauses::LAST_PAUSE;
use crate::plan::scheduler::record::RunRecord;
use crate::plan::scheduler::state::Scheduler;
use crate::state::clock::after;
use crate::state::job::JobId;
use crate::state::state_db::{Durability, Table};

/// Failed jobs are retried this many times, for about three hours. The next slot comes anyway.
const TRIES: u32 = 8;
/// The first pause. It is short, because registries announce a push a moment before its tag can be requested.
const FIRST_RETRY: Duration = Duration::from_secs(5);
/// Each pause is this many times as long as the one before, up to the longest.
const FACTOR: u32 = 4;

/// What becomes of a run.
#[derive(Debug, Clone, PartialEq)]
enum Verdict {
    /// Jobs are under way, or the time to retry has not come.
    Wait,
    /// All are published, the last one at this time.
    Published(Timestamp),
    /// The failed ones are to be retried later; the text says why they failed.
    Later(String),
    /// These are to be retried now.
    Again(Vec<JobId>),
    /// The run has failed; the text says why.
    Failed(String),
}

fn reason(image: &ImageRef, job: Option<&Job>) -> String {
    match job {
        Some(job) if job.state == JobState::Cancelled => format!("job {} for {image} was cancelled", job.id),
        Some(job) => format!("{image}: {}", job.reason.clone().unwrap_or_default()),
        None => format!("the job for {image} is not known any more"),
    }
}

/// Judges a run by its jobs as the queue has them.
fn judge(run: &RunRecord, jobs: &[Option<Job>], now: Timestamp) -> Verdict {
    let state = |job: &Option<Job>| job.as_ref().map(|job| job.state);
    if jobs.iter().any(|job| state(job).is_some_and(|state| !state.is_final())) {
        return Verdict::Wait;
    }
    let Some((image, job)) = run.images.iter().zip(jobs).find(|(_, job)| state(job) != Some(JobState::Published))
    else {
        return Verdict::Published(jobs.iter().flatten().map(|job| job.updated_at).max().unwrap_or(now));
    };
    let why = reason(image, job.as_ref());
    let failed = |job: &&Option<Job>| state(job) == Some(JobState::Failed);
    let retriable = jobs.iter().all(|job| failed(&job) || state(job) == Some(JobState::Published));
    match run.retry_at {
        _ if !retriable || run.tries >= TRIES => Verdict::Failed(why),
        None => Verdict::Later(why),
        Some(at) if now < at => Verdict::Wait,
        Some(_) => Verdict::Again(jobs.iter().filter(failed).flatten().map(|job| JobId(job.id)).collect()),
    }
}

impl Scheduler {
    /// Judges every run that is not over, and acts on it. Blocks on the database.
    pub(super) fn settle(&self) {
        let now = self.now();
        self.follow_clock(now);
        let open: Vec<(String, RunRecord)> = {
            let book = self.book.lock();
            let runs = book.iter().flat_map(|(name, entry)| {
                let running = entry.record.runs.iter().filter(|run| run.state == RunState::Running);
                running.map(move |run| (name.clone(), run.clone()))
            });
            runs.collect()
        };
        let mut over = false;
        for (name, run) in open {
            let jobs: Vec<Option<Job>> = run.jobs.iter().map(|job| self.components.queue.get(*job).ok()).collect();
            let verdict = judge(&run, &jobs, now);
            over |= matches!(verdict, Verdict::Published(_) | Verdict::Failed(_));
            self.carry_out(&name, &run, verdict, now);
            self.watch_deadline(&name, &run, now);
        }
        if over {
            self.keep_speeds();
        }
    }

    fn carry_out(&self, name: &str, run: &RunRecord, verdict: Verdict, now: Timestamp) {
        let change = |change: &dyn Fn(&mut RunRecord)| {
            self.amend(name, |entry| {
                let same = entry.record.runs.iter_mut().find(|other| other.jobs == run.jobs && other.slot == run.slot);
                if let Some(other) = same {
                    change(other);
                    if other.state == RunState::Published {
                        let ended = other.clone();
                        entry.record.scores.count(&ended);
                    }
                }
            });
        };
        match verdict {
            Verdict::Wait => {}
            Verdict::Published(at) => change(&|run| {
                (run.state, run.ended_at, run.retry_at, run.reason) = (RunState::Published, Some(at), None, None);
            }),
            Verdict::Later(why) => {
                let at = self.retry_time(run, now);
                change(&|run| (run.retry_at, run.reason) = (Some(at), Some(why.clone())));
                let message = format!("schedule {name} tries again at {at}: {why}");
                self.say(Severity::Warning, "schedule.retry", name, message);
            }
            Verdict::Again(jobs) => {
                change(&|run| (run.retry_at, run.tries) = (None, run.tries + 1));
                for job in jobs {
                    if let Err(error) = self.components.queue.retry(job) {
                        tracing::warn!("job {job} of schedule {name} is not tried again: {error}");
                    }
                }
            }
            Verdict::Failed(why) => {
                change(&|run| {
                    (run.state, run.ended_at, run.retry_at) = (RunState::Failed, Some(now), None);
                    run.reason = Some(why.clone());
                });
                self.say(Severity::Error, "schedule.failed", name, format!("schedule {name} gives up: {why}"));
            }
        }
    }

    /// The time of the next retry: after a pause that grows, and not before the registry may be asked again.
    fn retry_time(&self, run: &RunRecord, now: Timestamp) -> Timestamp {
        let at = after(now, FIRST_RETRY.saturating_mul(FACTOR.saturating_pow(run.tries)).min(LAST_PAUSE));
        let held = run.images.iter().filter_map(|image| self.components.limits.held_from(image));
        held.map(|held| held.until).fold(at, Timestamp::max)
    }

    /// Reports, once, that a deadline has passed while its run goes on.
    fn watch_deadline(&self, name: &str, run: &RunRecord, now: Timestamp) {
        let Some(deadline) = run.deadline.filter(|deadline| *deadline <= now) else { return };
        let over = |entry: &crate::plan::scheduler::ScheduleEntry| {
            let same = entry.record.runs.iter().find(|other| other.slot == run.slot && other.jobs == run.jobs);
            same.is_none_or(|run| run.state == RunState::Published)
        };
        let said =
            self.book.lock().get(name).is_none_or(|entry| entry.record.missed_for == Some(deadline) || over(entry));
        if said {
            return;
        }
        self.amend(name, |entry| entry.record.missed_for = Some(deadline));
        let why = run.reason.clone().map(|why| format!(" ({why})")).unwrap_or_default();
        let message =
            format!("schedule {name} has missed its deadline {deadline}: its images are not all published{why}");
        self.say(Severity::Error, "schedule.missed", name, message);
    }

    /// Writes the measured speeds to the database.
    fn keep_speeds(&self) {
        let speeds = self.components.limits.speeds();
        let written: Vec<(String, Vec<u8>)> =
            speeds.into_iter().map(|(registry, speed)| (registry, format!("{speed:.1}").into_bytes())).collect();
        let changes: Vec<(&[u8], Option<&[u8]>)> =
            written.iter().map(|(registry, speed)| (registry.as_bytes(), Some(speed.as_slice()))).collect();
        if let Err(error) = self.components.state_db.change_records(Table::Speeds, &changes, Durability::Eventual) {
            tracing::warn!("measured speeds are not remembered: {error}");
        }
    }
}
