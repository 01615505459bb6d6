//! Jobs whose registry asks to wait (`Retry-After`). They give up their slot and wait among the queued jobs, which are not started before
//! that time. Layers that a job has completed by then are in the store when it resumes.

use std::time::Duration;

use coordinator_api::job::{JobState, LayerState};
use jiff::Timestamp;

use crate::jobs::queue::JobQueue;
use crate::state::clock::until;
use crate::state::job::{JobId, Phase, PullJob, Source};

/// How often in a row a job waits for a registry that gives nothing in between: for half an hour, if the registry asks for the longest time
/// that is obeyed.
const MOST_WAITS: u32 = 6;

/// What happens to a job whose registry asks to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Postponed {
    /// It is queued again.
    Queued,
    /// It has waited often enough.
    TooOften,
}

impl JobQueue {
    /// How much of a running job has arrived: a number that grows as long as anything is done for the job. `None` once its layers are
    /// there.
    pub fn arrived(&self, id: JobId) -> Option<u64> {
        let jobs = self.jobs.lock();
        let entry = jobs.get(&id)?;
        match (entry.job.state(), &entry.progress) {
            (JobState::Resolving, _) => Some(0),
            (JobState::Fetching, Some(progress)) => {
                let meters = progress.layers.iter().map(|layer| layer.meter());
                Some(1 + meters.map(|meter| meter.fetched() + meter.view().unpacked_bytes).sum::<u64>())
            }
            _ => None,
        }
    }

    /// The time until which a job's registry has asked to wait, if it is more than `patience` from now.
    pub fn kept_waiting(&self, job: &PullJob, patience: Duration) -> Option<Timestamp> {
        let asked = self.limits.asked_to_wait(&job.image).filter(|_| job.source == Source::Registry)?;
        (until(self.clock.now(), asked) > patience).then_some(asked)
    }

    /// Queues a running job again, because its registry asks to wait. Blocks on the database.
    pub fn postpone(&self, id: JobId) -> Postponed {
        {
            let mut jobs = self.jobs.lock();
            let Some(entry) = jobs.get_mut(&id) else { return Postponed::TooOften };
            let has_brought = entry.report().layers.iter().any(|layer| layer.state == LayerState::Done);
            entry.postponed = if has_brought { 1 } else { entry.postponed + 1 };
            if entry.postponed > MOST_WAITS {
                return Postponed::TooOften;
            }
        }
        let queued = self.step(id, Phase::Queued, |entry| {
            entry.job.report = entry.report();
            entry.progress = None;
        });
        if let Some(Err(error)) = queued.map(|job| self.state_db.put_job(&job)) {
            tracing::warn!("that job {id} waits for its registry is not written down: {error}");
        }
        self.look_again();
        Postponed::Queued
    }
}
