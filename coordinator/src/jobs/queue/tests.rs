//! The queue against a database in memory.

use std::path::PathBuf;

use super::*;
use crate::registries::limits::{Outcome, Target};
use crate::state::state_db::memory::MemoryStateDb;

impl JobQueue {
    fn submit_one(&self, new: NewJob) -> Job {
        self.submit(vec![new]).unwrap().remove(0)
    }
}

fn new(image: &str) -> NewJob {
    let ordered_by = RequestedBy::Operator;
    NewJob {
        image: image.parse().unwrap(),
        platform: None,
        priority: 0,
        origin: None,
        ordered_by,
        source: Source::Registry,
    }
}

#[tokio::test]
async fn one_image_is_pulled_once_at_a_time() {
    let queue = JobQueue::open(Arc::new(MemoryStateDb::default())).unwrap();
    let first = queue.submit_one(new("a"));
    let again = queue.submit_one(NewJob { priority: 7, ..new("a") });
    assert_eq!((first.id, again.id, again.priority), (1, 1, 7));
    assert_eq!(queue.submit_one(new("b")).id, 2);
    let started = queue.start_next().await;
    assert_eq!((started.job.id, started.job.attempts), (JobId(1), 1));
    assert_eq!(queue.submit_one(new("a")).id, 1, "running is under way, too");
    queue.end(JobId(1), Phase::Failed { reason: "why".to_owned() });
    assert_eq!(queue.submit_one(new("a")).id, 3);
}

#[tokio::test]
async fn a_restart_queues_what_was_under_way() {
    let state_db = Arc::new(MemoryStateDb::default());
    {
        let queue = JobQueue::open(state_db.clone()).unwrap();
        queue.submit_one(new("a"));
        queue.submit_one(new("b"));
        let started = queue.start_next().await;
        queue.end(started.job.id, Phase::Cancelled);
        queue.start_next().await;
    }
    let queue = JobQueue::open(state_db).unwrap();
    let states: Vec<_> = queue.list().iter().map(|job| (job.id, job.state)).collect();
    assert_eq!(states, [(2, JobState::Queued), (1, JobState::Cancelled)]);
    assert_eq!(queue.start_next().await.job.id, JobId(2));
}

#[tokio::test]
async fn a_job_that_kills_three_coordinators_has_failed_until_somebody_retries_it() {
    let state_db = Arc::new(MemoryStateDb::default());
    JobQueue::open(state_db.clone()).unwrap().submit_one(new("a"));
    for deaths in 1..=3 {
        let queue = JobQueue::open(state_db.clone()).unwrap();
        assert!(queue.given_up().is_empty());
        let started = queue.start_next().await;
        assert_eq!((started.job.deaths, started.job.attempts), (deaths - 1, deaths));
        queue.begin(started.job.id).unwrap();
    }
    let queue = JobQueue::open(state_db.clone()).unwrap();
    let job = queue.get(JobId(1)).unwrap();
    assert_eq!((job.state, job.attempts), (JobState::Failed, 3));
    assert!(job.reason.unwrap().contains("3 coordinators"));
    assert_eq!(queue.given_up().iter().map(|job| job.id).collect::<Vec<_>>(), [JobId(1)]);
    assert!(queue.given_up().is_empty(), "it is told once");
    assert_eq!(JobQueue::open(state_db.clone()).unwrap().get(JobId(1)).unwrap().state, JobState::Failed);
    queue.retry(JobId(1)).unwrap();
    assert_eq!(queue.start_next().await.job.deaths, 0, "an admin's retry counts anew");
}

#[tokio::test]
async fn a_standing_order_does_not_kill_three_more() {
    let state_db = Arc::new(MemoryStateDb::default());
    let mut job = crate::state::job::tests::job(1, 0);
    (job.image, job.deaths, job.phase) = ("a".parse().unwrap(), 3, Phase::Failed { reason: "why".to_owned() });
    state_db.put_job(&job).unwrap();
    let queue = JobQueue::open(state_db.clone()).unwrap();
    queue.submit_one(NewJob { origin: Some("schedule hourly".to_owned()), ..new("a") });
    let started = queue.start_next().await;
    assert_eq!(started.job.deaths, 2);
    queue.begin(started.job.id).unwrap();
    let queue = JobQueue::open(state_db).unwrap();
    assert_eq!(queue.get(JobId(2)).unwrap().state, JobState::Failed);
    queue.submit_one(new("a"));
    assert_eq!(queue.start_next().await.job.deaths, 0, "a person's order counts anew");
}

#[tokio::test]
async fn a_stop_in_good_order_is_nobodys_death() {
    let state_db = Arc::new(MemoryStateDb::default());
    JobQueue::open(state_db.clone()).unwrap().submit_one(new("a"));
    for _ in 0..5 {
        let queue = JobQueue::open(state_db.clone()).unwrap();
        let started = queue.start_next().await;
        queue.begin(started.job.id).unwrap();
        queue.suspend();
        assert_eq!(queue.get(started.job.id).unwrap().state, JobState::Queued);
        // A beginning that is written after the coordinator stopped does not undo that.
        state_db.put_job(&started.job).unwrap();
        queue.begin(started.job.id).unwrap();
    }
    let queue = JobQueue::open(state_db).unwrap();
    let started = queue.start_next().await;
    assert_eq!((started.job.deaths, started.job.attempts), (0, 6));
}

#[tokio::test]
async fn jobs_under_way_at_a_death_run_one_at_a_time() {
    let state_db = Arc::new(MemoryStateDb::default());
    let queue = JobQueue::open(state_db.clone()).unwrap();
    for image in ["a", "b"] {
        queue.submit_one(new(image));
        let started = queue.start_next().await;
        queue.begin(started.job.id).unwrap();
    }
    let queue = JobQueue::open(state_db).unwrap();
    queue.submit_one(new("c"));
    assert_eq!(queue.start_next().await.job.id, JobId(1));
    assert_eq!(queue.start_next().await.job.id, JobId(3), "one that was under way waits for the other");
    assert!(queue.try_start(&|_: &PullJob| true).is_none());
    queue.end(JobId(1), Phase::Cancelled);
    assert_eq!(queue.start_next().await.job.id, JobId(2));
}

#[tokio::test]
async fn cancelling_is_immediate_for_queued_jobs_and_a_signal_for_running_ones() {
    let queue = JobQueue::open(Arc::new(MemoryStateDb::default())).unwrap();
    queue.submit_one(new("a"));
    let started = queue.start_next().await;
    queue.submit_one(new("b"));
    assert_eq!(queue.cancel(JobId(2)).unwrap().state, JobState::Cancelled);
    assert_eq!(queue.cancel(JobId(1)).unwrap().state, JobState::Resolving);
    assert!(started.stop.is_cancelled());
    assert_eq!(queue.cancel(JobId(9)), Err(QueueError::Unknown(JobId(9))));
    let error = queue.cancel(JobId(2)).unwrap_err().to_string();
    assert_eq!(error, "job 2 is cancelled and cannot become cancelled");
    assert_eq!(queue.retry(JobId(2)).unwrap().state, JobState::Queued);
    assert!(queue.retry(JobId(2)).is_err());
}

#[tokio::test]
async fn whoever_waits_for_a_running_job_raises_the_priority_of_what_it_does() {
    let queue = JobQueue::open(Arc::new(MemoryStateDb::default())).unwrap();
    queue.submit_one(new("a"));
    let started = queue.start_next().await;
    assert_eq!(started.priority.get(), started.job.priority);
    queue.raise(&started.job.image, 40).unwrap();
    assert_eq!(started.priority.get(), 40);
    queue.submit_one(NewJob { priority: 50, ..new("a") });
    assert_eq!(started.priority.get(), 50);
}

#[test]
fn ended_jobs_are_forgotten_in_the_end() {
    let state_db = MemoryStateDb::default();
    for id in 1..=KEEP_ENDED as u64 + 5 {
        let mut job = crate::state::job::tests::job(id, 0);
        job.phase = Phase::Cancelled;
        state_db.put_job(&job).unwrap();
    }
    let queue = JobQueue::open(Arc::new(state_db)).unwrap();
    assert_eq!(queue.list().len(), KEEP_ENDED);
    assert!(queue.get(JobId(5)).is_err());
    assert!(queue.get(JobId(6)).is_ok());
}

#[test]
fn an_archive_lives_as_long_as_its_last_unfinished_job() {
    let dir = tempfile::tempdir().unwrap();
    let spool = dir.path().join("1.tar");
    std::fs::write(&spool, b"x").unwrap();
    let queue = JobQueue::open(Arc::new(MemoryStateDb::default())).unwrap();
    let source = |spool: &PathBuf| Source::Archive { spool: spool.clone(), name: None };
    for image in ["a", "b"] {
        queue.submit_one(NewJob { source: source(&spool), ..new(image) });
    }
    queue.cancel(JobId(1)).unwrap();
    assert!(spool.exists());
    queue.cancel(JobId(2)).unwrap();
    assert!(!spool.exists());
    assert_eq!(queue.retry(JobId(2)), Err(QueueError::ArchiveGone(JobId(2))));
}

#[tokio::test]
async fn a_job_that_is_kept_waiting_is_queued_again_until_it_has_waited_often_enough() {
    let queue = JobQueue::open(Arc::new(MemoryStateDb::default())).unwrap();
    let id = JobId(queue.submit_one(new("a")).id);
    for attempt in 1..=6 {
        assert_eq!(queue.start_next().await.job.attempts, attempt);
        assert_eq!(queue.arrived(id), Some(0));
        assert_eq!(queue.postpone(id), Postponed::Queued);
        assert_eq!(queue.get(id).unwrap().state, JobState::Queued);
    }
    let started = queue.start_next().await;
    assert_eq!(queue.postpone(id), Postponed::TooOften);
    assert_eq!(queue.get(id).unwrap().state, JobState::Resolving, "its runner ends it");
    assert_eq!(queue.kept_waiting(&started.job, Duration::ZERO), None, "nobody has asked for it");
    queue.limits.report(
        Target::registry("docker.io"),
        Outcome::AskedToWait { wait: Duration::from_secs(60), fault: None },
        None,
    );
    let waits = |source| {
        let job = PullJob { source, ..started.job.clone() };
        (
            queue.kept_waiting(&job, Duration::from_secs(5)).is_some(),
            queue.kept_waiting(&job, Duration::from_secs(70)).is_some(),
        )
    };
    assert_eq!(waits(Source::Registry), (true, false));
    assert_eq!(waits(Source::Archive { spool: "/s".into(), name: None }), (false, false));
}
