//! The board against a journal in memory.

use std::path::PathBuf;

use super::*;
use crate::registries::limits::{Outcome, Target};
use crate::state::state_db::memory::MemoryJournal;

impl Board {
    fn submit_one(&self, new: NewJob) -> Job {
        self.submit(vec![new]).unwrap().remove(0)
    }
}

fn new(image: &str) -> NewJob {
    let ordered_by = OrderedBy::Operator;
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
    let board = Board::open(Arc::new(MemoryJournal::default())).unwrap();
    let first = board.submit_one(new("a"));
    let again = board.submit_one(NewJob { priority: 7, ..new("a") });
    assert_eq!((first.id, again.id, again.priority), (1, 1, 7));
    assert_eq!(board.submit_one(new("b")).id, 2);
    let started = board.start_next().await;
    assert_eq!((started.job.id, started.job.attempts), (JobId(1), 1));
    assert_eq!(board.submit_one(new("a")).id, 1, "running is under way, too");
    board.end(JobId(1), Phase::Failed { reason: "why".to_owned() });
    assert_eq!(board.submit_one(new("a")).id, 3);
}

#[tokio::test]
async fn a_restart_queues_what_was_under_way() {
    let journal = Arc::new(MemoryJournal::default());
    {
        let board = Board::open(journal.clone()).unwrap();
        board.submit_one(new("a"));
        board.submit_one(new("b"));
        let started = board.start_next().await;
        board.end(started.job.id, Phase::Cancelled);
        board.start_next().await;
    }
    let board = Board::open(journal).unwrap();
    let states: Vec<_> = board.list().iter().map(|job| (job.id, job.state)).collect();
    assert_eq!(states, [(2, JobState::Queued), (1, JobState::Cancelled)]);
    assert_eq!(board.start_next().await.job.id, JobId(2));
}

#[tokio::test]
async fn a_job_that_kills_three_coordinators_has_failed_until_somebody_retries_it() {
    let journal = Arc::new(MemoryJournal::default());
    Board::open(journal.clone()).unwrap().submit_one(new("a"));
    for deaths in 1..=3 {
        let board = Board::open(journal.clone()).unwrap();
        assert!(board.given_up().is_empty());
        let started = board.start_next().await;
        assert_eq!((started.job.deaths, started.job.attempts), (deaths - 1, deaths));
        board.begin(started.job.id).unwrap();
    }
    let board = Board::open(journal.clone()).unwrap();
    let job = board.get(JobId(1)).unwrap();
    assert_eq!((job.state, job.attempts), (JobState::Failed, 3));
    assert!(job.reason.unwrap().contains("3 coordinators"));
    assert_eq!(board.given_up().iter().map(|job| job.id).collect::<Vec<_>>(), [JobId(1)]);
    assert!(board.given_up().is_empty(), "it is told once");
    assert_eq!(Board::open(journal.clone()).unwrap().get(JobId(1)).unwrap().state, JobState::Failed);
    board.retry(JobId(1)).unwrap();
    assert_eq!(board.start_next().await.job.deaths, 0, "an admin's retry counts anew");
}

#[tokio::test]
async fn a_standing_order_does_not_kill_three_more() {
    let journal = Arc::new(MemoryJournal::default());
    let mut job = crate::state::job::tests::job(1, 0);
    (job.image, job.deaths, job.phase) = ("a".parse().unwrap(), 3, Phase::Failed { reason: "why".to_owned() });
    journal.put_job(&job).unwrap();
    let board = Board::open(journal.clone()).unwrap();
    board.submit_one(NewJob { origin: Some("schedule hourly".to_owned()), ..new("a") });
    let started = board.start_next().await;
    assert_eq!(started.job.deaths, 2);
    board.begin(started.job.id).unwrap();
    let board = Board::open(journal).unwrap();
    assert_eq!(board.get(JobId(2)).unwrap().state, JobState::Failed);
    board.submit_one(new("a"));
    assert_eq!(board.start_next().await.job.deaths, 0, "a person's order counts anew");
}

#[tokio::test]
async fn a_stop_in_good_order_is_nobodys_death() {
    let journal = Arc::new(MemoryJournal::default());
    Board::open(journal.clone()).unwrap().submit_one(new("a"));
    for _ in 0..5 {
        let board = Board::open(journal.clone()).unwrap();
        let started = board.start_next().await;
        board.begin(started.job.id).unwrap();
        board.suspend();
        assert_eq!(board.get(started.job.id).unwrap().state, JobState::Queued);
        // A beginning that was on its way when the coordinator stopped does not undo that.
        journal.put_job(&started.job).unwrap();
        board.begin(started.job.id).unwrap();
    }
    let board = Board::open(journal).unwrap();
    let started = board.start_next().await;
    assert_eq!((started.job.deaths, started.job.attempts), (0, 6));
}

#[tokio::test]
async fn jobs_under_way_at_a_death_run_one_at_a_time() {
    let journal = Arc::new(MemoryJournal::default());
    let board = Board::open(journal.clone()).unwrap();
    for image in ["a", "b"] {
        board.submit_one(new(image));
        let started = board.start_next().await;
        board.begin(started.job.id).unwrap();
    }
    let board = Board::open(journal).unwrap();
    board.submit_one(new("c"));
    assert_eq!(board.start_next().await.job.id, JobId(1));
    assert_eq!(board.start_next().await.job.id, JobId(3), "one that was under way waits for the other");
    assert!(board.try_start(&|_: &PullJob| true).is_none());
    board.end(JobId(1), Phase::Cancelled);
    assert_eq!(board.start_next().await.job.id, JobId(2));
}

#[tokio::test]
async fn cancelling_is_immediate_for_queued_jobs_and_a_signal_for_running_ones() {
    let board = Board::open(Arc::new(MemoryJournal::default())).unwrap();
    board.submit_one(new("a"));
    let started = board.start_next().await;
    board.submit_one(new("b"));
    assert_eq!(board.cancel(JobId(2)).unwrap().state, JobState::Cancelled);
    assert_eq!(board.cancel(JobId(1)).unwrap().state, JobState::Resolving);
    assert!(started.stop.is_cancelled());
    assert_eq!(board.cancel(JobId(9)), Err(BoardError::Unknown(JobId(9))));
    let error = board.cancel(JobId(2)).unwrap_err().to_string();
    assert_eq!(error, "job 2 is cancelled and cannot become cancelled");
    assert_eq!(board.retry(JobId(2)).unwrap().state, JobState::Queued);
    assert!(board.retry(JobId(2)).is_err());
}

#[tokio::test]
async fn whoever_waits_for_a_running_job_raises_the_priority_of_what_it_does() {
    let board = Board::open(Arc::new(MemoryJournal::default())).unwrap();
    board.submit_one(new("a"));
    let started = board.start_next().await;
    assert_eq!(started.priority.get(), started.job.priority);
    board.raise(&started.job.image, 40).unwrap();
    assert_eq!(started.priority.get(), 40);
    board.submit_one(NewJob { priority: 50, ..new("a") });
    assert_eq!(started.priority.get(), 50);
}

#[test]
fn ended_jobs_are_forgotten_in_the_end() {
    let journal = MemoryJournal::default();
    for id in 1..=KEEP_ENDED as u64 + 5 {
        let mut job = crate::state::job::tests::job(id, 0);
        job.phase = Phase::Cancelled;
        journal.put_job(&job).unwrap();
    }
    let board = Board::open(Arc::new(journal)).unwrap();
    assert_eq!(board.list().len(), KEEP_ENDED);
    assert!(board.get(JobId(5)).is_err());
    assert!(board.get(JobId(6)).is_ok());
}

#[test]
fn an_archive_lives_as_long_as_its_last_unfinished_job() {
    let dir = tempfile::tempdir().unwrap();
    let spool = dir.path().join("1.tar");
    std::fs::write(&spool, b"x").unwrap();
    let board = Board::open(Arc::new(MemoryJournal::default())).unwrap();
    let source = |spool: &PathBuf| Source::Archive { spool: spool.clone(), name: None };
    for image in ["a", "b"] {
        board.submit_one(NewJob { source: source(&spool), ..new(image) });
    }
    board.cancel(JobId(1)).unwrap();
    assert!(spool.exists());
    board.cancel(JobId(2)).unwrap();
    assert!(!spool.exists());
    assert_eq!(board.retry(JobId(2)), Err(BoardError::ArchiveGone(JobId(2))));
}

#[tokio::test]
async fn a_job_that_is_kept_waiting_is_queued_again_until_it_has_waited_often_enough() {
    let board = Board::open(Arc::new(MemoryJournal::default())).unwrap();
    let id = JobId(board.submit_one(new("a")).id);
    for attempt in 1..=6 {
        assert_eq!(board.start_next().await.job.attempts, attempt);
        assert_eq!(board.arrived(id), Some(0));
        assert_eq!(board.postpone(id), Postponed::Queued);
        assert_eq!(board.get(id).unwrap().state, JobState::Queued);
    }
    let started = board.start_next().await;
    assert_eq!(board.postpone(id), Postponed::TooOften);
    assert_eq!(board.get(id).unwrap().state, JobState::Resolving, "its runner ends it");
    assert_eq!(board.kept_waiting(&started.job, Duration::ZERO), None, "nobody has asked for it");
    board.limits.report(
        Target::registry("docker.io"),
        Outcome::AskedToWait { wait: Duration::from_secs(60), fault: None },
        None,
    );
    let waits = |source| {
        let job = PullJob { source, ..started.job.clone() };
        (
            board.kept_waiting(&job, Duration::from_secs(5)).is_some(),
            board.kept_waiting(&job, Duration::from_secs(70)).is_some(),
        )
    };
    assert_eq!(waits(Source::Registry), (true, false));
    assert_eq!(waits(Source::Archive { spool: "/s".into(), name: None }), (false, false));
}
