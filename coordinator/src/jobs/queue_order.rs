//! Which job goes next.
//!
//! The most urgent job goes first. Its layers go by the same rule, that of [`limits::priority`](crate::registries::limits::priority).

use coordinator_api::job::JobState;
use jiff::Timestamp;

use crate::registries::limits::priority;
use crate::state::job::{JobId, PullJob};

fn urgency(job: &PullJob, now: Timestamp) -> i128 {
    priority::urgency(job.priority, job.updated_at, now)
}

/// The queued job that goes next among those that `may` start: the most urgent one, and the oldest of equals.
pub fn next<'a>(
    jobs: impl Iterator<Item = &'a PullJob>,
    now: Timestamp,
    may: impl Fn(&PullJob) -> bool,
) -> Option<JobId> {
    let queued = jobs.filter(|job| job.state() == JobState::Queued && may(job));
    queued.min_by_key(|job| (std::cmp::Reverse(urgency(job, now)), job.id)).map(|job| job.id)
}

/// How many queued jobs go before `job`.
pub fn before<'a>(jobs: impl Iterator<Item = &'a PullJob>, job: &PullJob, now: Timestamp) -> usize {
    let key = |job: &PullJob| (std::cmp::Reverse(urgency(job, now)), job.id);
    jobs.filter(|other| other.state() == JobState::Queued && key(other) < key(job)).count()
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;
    use proptest::prelude::*;

    use super::*;
    use crate::registries::limits::priority::STEP;
    use crate::state::job::{Phase, tests::job};

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    #[test]
    fn priority_goes_before_age_and_only_queued_jobs_that_may_go_count() {
        let mut jobs = [job(1, 0), job(2, 5), job(3, 5), job(4, 9)];
        jobs[3].phase = Phase::Fetching;
        let all = |_: &PullJob| true;
        assert_eq!(next(jobs.iter(), at(0), all), Some(JobId(2)));
        assert_eq!(next(jobs.iter(), at(0), |job| job.id != JobId(2)), Some(JobId(3)));
        assert_eq!(before(jobs.iter(), &jobs[0], at(0)), 2);
        assert_eq!(next([].iter(), at(0), all), None);
    }

    #[test]
    fn waiting_raises_priority() {
        let (old, mut young) = (job(1, 0), job(2, 5));
        young.updated_at = at(301);
        assert_eq!(next([&old, &young].into_iter(), at(301), |_| true), Some(JobId(1)));
        young.updated_at = at(299);
        assert_eq!(next([&old, &young].into_iter(), at(301), |_| true), Some(JobId(2)));
    }

    proptest! {
        /// Under any stream of jobs, a chosen job is never so much younger than a waiting one that its priority does not make up for it. So
        /// no job waits longer than the queue in front of it and the spread of priorities allow.
        #[test]
        fn nobody_starves(stream in prop::collection::vec((0i64..90, -20i32..=20), 1..200), service in 1i64..120) {
            let (mut now, mut waiting, mut arrivals) = (0i64, Vec::<PullJob>::new(), stream.into_iter().peekable());
            let (mut last, mut arrived, mut most) = (0u64, 0i64, 0usize);
            while arrivals.peek().is_some() || !waiting.is_empty() {
                while let Some((gap, priority)) = arrivals.peek().copied() {
                    if arrived + gap > now && !waiting.is_empty() {
                        break;
                    }
                    arrived += gap;
                    now = now.max(arrived);
                    last += 1;
                    waiting.push(PullJob { updated_at: at(arrived), ..job(last, priority) });
                    arrivals.next();
                }
                most = most.max(waiting.len());
                let id = next(waiting.iter(), at(now), |_| true).unwrap();
                let place = waiting.iter().position(|job| job.id == id).unwrap();
                let chosen = waiting.remove(place);
                for other in &waiting {
                    let head_start = chosen.updated_at.duration_since(other.updated_at).as_secs();
                    let worth = i64::from(chosen.priority - other.priority) * STEP.as_secs() as i64;
                    prop_assert!(head_start <= worth, "{chosen:?} overtakes {other:?}");
                }
                let waited = at(now).duration_since(chosen.updated_at);
                let spread = SignedDuration::from_secs(40 * STEP.as_secs() as i64);
                // Whatever overtakes arrived within the spread: at most as many jobs as that time can bring.
                let overtakers = most as i64 + 40 * STEP.as_secs() as i64;
                prop_assert!(waited <= spread + SignedDuration::from_secs(overtakers * service));
                now += service;
            }
        }
    }
}
