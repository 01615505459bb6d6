//! Pure decisions about order: which job goes next.

use coordinator_api::job::JobState;

use crate::job::{JobId, PullJob};

/// The queued job that goes next: the highest priority, and among equals the oldest.
pub fn next<'a>(jobs: impl Iterator<Item = &'a PullJob>) -> Option<JobId> {
    let queued = jobs.filter(|job| job.state() == JobState::Queued);
    queued.min_by_key(|job| (std::cmp::Reverse(job.priority), job.id)).map(|job| job.id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{Phase, tests::job};

    #[test]
    fn priority_goes_before_age_and_only_queued_jobs_count() {
        let mut jobs = vec![job(1, 0), job(2, 5), job(3, 5), job(4, 9)];
        jobs[3].phase = Phase::Fetching;
        assert_eq!(next(jobs.iter()), Some(JobId(2)));
        jobs.remove(1);
        assert_eq!(next(jobs.iter()), Some(JobId(3)));
        assert_eq!(next([].iter()), None);
    }
}
