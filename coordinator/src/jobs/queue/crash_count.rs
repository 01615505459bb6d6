//! A job is recorded as under way before it begins, and the record is taken back when the coordinator stops in good order. So what is left
//! in the database tells the next coordinator which jobs the last one was working on when it died.

use coordinator_api::job::JobState;

use crate::jobs::queue::JobQueue;
use crate::state::job::{JobId, Phase, PullJob};
use crate::state::state_db::StateError;

impl JobQueue {
    /// The jobs that were given up when the database was read. Returned once.
    pub fn given_up(&self) -> Vec<PullJob> {
        std::mem::take(&mut self.given_up.lock())
    }

    /// Records that a started job is under way, before anything is done for it. Blocks on the database.
    pub fn begin(&self, id: JobId) -> Result<(), StateError> {
        let standing = || self.jobs.lock().get(&id).map(|entry| entry.job.clone());
        let Some(started) = standing() else { return Ok(()) };
        self.state_db.put_job(&started)?;
        match standing() {
            // The job was queued again meanwhile, which was perhaps written before this.
            Some(now) if now.state() == JobState::Queued => self.state_db.put_job(&now),
            _ => Ok(()),
        }
    }

    /// Records jobs that are under way as queued again: the coordinator stops in good order, and the next one resumes them. Blocks on the
    /// database.
    pub fn suspend(&self) {
        let suspended: Vec<PullJob> = {
            let mut jobs = self.jobs.lock();
            let running = jobs.values_mut().filter(|entry| entry.job.state() != JobState::Queued);
            // Jobs that have ended cannot be queued.
            let queued = running.filter_map(|entry| {
                let mut job = entry.job.clone();
                (!job.state().is_final() && job.enter(Phase::Queued, self.clock.now()).is_ok()).then(|| {
                    entry.job = job.clone();
                    job
                })
            });
            queued.collect()
        };
        for job in suspended {
            if let Err(error) = self.state_db.put_job(&job) {
                tracing::warn!("that job {} was stopped in good order is not written down: {error}", job.id);
            }
        }
    }
}
