//! A pull job: one image being brought into the store.
//!
//! ```text
//!               ┌────────────────── retry ──────────────────┐
//!               ▼                                           │
//!  request ─▶ queued ─▶ resolving ─▶ fetching ─▶ publishing │ ─▶ published
//!             │  ▲         │            │            │      │
//!             │  └─restart─┴────────────┴────────────┤      │
//!             │            ├────────────┼────────────┼─▶ failed
//!             └────────────┴────────────┴────────────┴─▶ cancelled
//! ```
//!
//! "Restart" means the coordinator's: whatever was under way begins again, and finds the layers that are already in the store. "Retry" is a
//! user's request, for failed and cancelled jobs. [`ALLOWED`] is the only table of transitions.
//!
//! A job is recorded as under way before it begins, and the record is taken back when the coordinator stops in good order. So the next
//! coordinator, on this machine or another, knows which jobs were under way when one died. An image with unforeseen contents may be the
//! cause. A job that was under way at [`DEATHS_MAX`] deaths in a row has failed ([`PullJob::resume`]).

use std::path::PathBuf;

use coordinator_api::job::{JobState, LayerProgress};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use store::Digest;
use store::image::{ImageRef, Platform, RequestedBy};

/// A job has failed once this many coordinators in a row have died while it was under way.
pub const DEATHS_MAX: u32 = 3;

/// A job's number; a larger number means a younger job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobId(pub u64);

impl std::fmt::Display for JobId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Where a job's bytes come from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The registry that the image's name points to.
    Registry,
    /// The same registry, for content that the store lost: layers and documents are fetched, the catalogue is left alone.
    Restore,
    /// An archive on the coordinator's own disk, removed when no unfinished job needs it.
    Archive {
        /// The file.
        spool: PathBuf,
        /// The name that the user gave, for an image without one.
        name: Option<ImageRef>,
    },
}

/// Where a job stands, with the data that only this phase has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Waiting for its turn.
    Queued,
    /// Asking the registry.
    Resolving,
    /// Fetching layers.
    Fetching,
    /// Writing the catalogue.
    Publishing,
    /// Done.
    Published,
    /// Ended in failure.
    Failed {
        /// Why, in one sentence.
        reason: String,
    },
    /// Ended on request.
    Cancelled,
}

/// What an ended job leaves for people to look at.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The manifest, if the name was resolved.
    pub manifest: Option<Digest>,
    /// The layers as they stood.
    pub layers: Vec<LayerProgress>,
    /// Compressed bytes that were fetched.
    pub bytes_fetched: u64,
    /// The average speed, in bytes a second.
    pub bytes_per_second: u64,
}

/// A pull job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullJob {
    /// Its number.
    pub id: JobId,
    /// The image.
    pub image: ImageRef,
    /// The requested platform.
    pub platform: Option<Platform>,
    /// Jobs with a higher priority go first.
    pub priority: i32,
    /// Who asked for it, if not a person, such as `schedule nightly`.
    #[serde(default)]
    pub origin: Option<String>,
    /// Whether the image counts as ordered by an operator or by a host.
    #[serde(default)]
    pub ordered_by: RequestedBy,
    /// Where the image comes from.
    pub source: Source,
    /// How often it was started.
    pub attempts: u32,
    /// How many coordinators in a row died while it was under way.
    #[serde(default)]
    pub deaths: u32,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When its phase last changed.
    pub updated_at: Timestamp,
    /// Its current phase.
    pub phase: Phase,
    /// What it leaves for people to look at.
    pub report: Report,
}

/// From each state, the states that may follow.
const ALLOWED: [(JobState, &[JobState]); 7] = {
    use JobState::{Cancelled, Failed, Fetching, Published, Publishing, Queued, Resolving};
    [
        (Queued, &[Resolving, Cancelled]),
        (Resolving, &[Fetching, Failed, Cancelled, Queued]),
        (Fetching, &[Publishing, Failed, Cancelled, Queued]),
        (Publishing, &[Published, Failed, Cancelled, Queued]),
        (Published, &[]),
        (Failed, &[Queued]),
        (Cancelled, &[Queued]),
    ]
};

/// A transition that the table does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("job {id} is {from} and cannot become {to}")]
pub struct BadTransition {
    /// The job.
    pub id: JobId,
    /// The state that it is in.
    pub from: JobState,
    /// The state that it was to enter.
    pub to: JobState,
}

impl Phase {
    /// The phase without its data.
    pub fn state(&self) -> JobState {
        match self {
            Phase::Queued => JobState::Queued,
            Phase::Resolving => JobState::Resolving,
            Phase::Fetching => JobState::Fetching,
            Phase::Publishing => JobState::Publishing,
            Phase::Published => JobState::Published,
            Phase::Failed { .. } => JobState::Failed,
            Phase::Cancelled => JobState::Cancelled,
        }
    }
}

/// Whether `to` may follow `from`.
pub fn is_allowed(from: JobState, to: JobState) -> bool {
    ALLOWED.iter().any(|(state, next)| *state == from && next.contains(&to))
}

impl PullJob {
    /// Takes up a job that was under way when a coordinator died: it is queued again, or has failed after [`DEATHS_MAX`] deaths. Returns
    /// whether the job was under way.
    pub fn resume(&mut self, now: Timestamp) -> bool {
        if self.state().is_final() || self.state() == JobState::Queued {
            return false;
        }
        self.deaths += 1;
        let phase = if self.deaths < DEATHS_MAX {
            Phase::Queued
        } else {
            Phase::Failed {
                reason: format!(
                    "{} coordinators ended without a word while it was under way, the last ones for lack of memory perhaps: \
                     see their logs, then run cachefsctl retry {}",
                    self.deaths, self.id
                ),
            }
        };
        // The table allows both from every state of a job that is under way.
        self.enter(phase, now).is_ok()
    }

    /// Whether a coordinator died while it was under way, and no attempt has ended since.
    pub fn is_suspect(&self) -> bool {
        self.deaths > 0
    }

    /// The state of the current phase.
    pub fn state(&self) -> JobState {
        self.phase.state()
    }

    /// Enters `phase` at the time `now`, if the table allows it.
    pub fn enter(&mut self, phase: Phase, now: Timestamp) -> Result<(), BadTransition> {
        let (from, to) = (self.state(), phase.state());
        if !is_allowed(from, to) {
            return Err(BadTransition { id: self.id, from, to });
        }
        if to == JobState::Resolving {
            self.attempts += 1;
        }
        self.phase = phase;
        self.updated_at = now;
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn job(id: u64, priority: i32) -> PullJob {
        PullJob {
            id: JobId(id),
            image: "alpine".parse().unwrap(),
            platform: None,
            priority,
            origin: None,
            ordered_by: RequestedBy::Operator,
            source: Source::Registry,
            attempts: 0,
            deaths: 0,
            created_at: Timestamp::UNIX_EPOCH,
            updated_at: Timestamp::UNIX_EPOCH,
            phase: Phase::Queued,
            report: Report::default(),
        }
    }

    #[test]
    fn the_table_has_a_row_for_each_state_and_ends_where_the_api_says() {
        for (state, next) in ALLOWED {
            assert_eq!(ALLOWED.iter().filter(|(other, _)| *other == state).count(), 1);
            let only_retry = next.iter().all(|next| *next == JobState::Queued);
            assert_eq!(state.is_final(), only_retry, "{state}");
        }
    }

    #[test]
    fn a_job_goes_only_where_it_may() {
        let mut job = job(1, 0);
        let now = Timestamp::now();
        assert!(job.enter(Phase::Published, now).is_err());
        for phase in [Phase::Resolving, Phase::Fetching, Phase::Publishing, Phase::Published] {
            job.enter(phase, now).unwrap();
        }
        assert_eq!(job.attempts, 1);
        let error = job.enter(Phase::Queued, now).unwrap_err();
        assert_eq!(error.to_string(), "job 1 is published and cannot become queued");
    }

    #[test]
    fn a_job_that_is_under_way_at_three_deaths_has_failed() {
        let mut job = job(4, 0);
        let now = Timestamp::now();
        assert!(!job.resume(now), "a queued job is nobody's death");
        for (deaths, phase) in [(1, Phase::Resolving), (2, Phase::Fetching)] {
            job.enter(Phase::Resolving, now).unwrap();
            job.phase = phase;
            assert!(job.resume(now));
            assert_eq!((job.deaths, job.attempts, job.state()), (deaths, deaths, JobState::Queued));
        }
        job.enter(Phase::Resolving, now).unwrap();
        assert!(job.resume(now) && job.state() == JobState::Failed, "{job:?}");
        let Phase::Failed { reason } = &job.phase else { panic!("{job:?}") };
        assert!(reason.starts_with("3 coordinators ended") && reason.ends_with("cachefsctl retry 4"), "{reason}");
        assert!(!job.resume(now), "what has failed is not taken up");
    }

    #[test]
    fn jobs_of_older_versions_are_nobodys_death() {
        let mut old = serde_json::to_value(job(7, 0)).unwrap();
        old.as_object_mut().unwrap().remove("deaths");
        assert_eq!(serde_json::from_value::<PullJob>(old).unwrap().deaths, 0);
    }

    #[test]
    fn jobs_survive_being_written_down() {
        let mut job = job(7, -2);
        job.source = Source::Archive { spool: PathBuf::from("/s/1.tar"), name: Some("a/b:c".parse().unwrap()) };
        job.phase = Phase::Failed { reason: "why".to_owned() };
        let text = serde_json::to_string(&job).unwrap();
        assert_eq!(serde_json::from_str::<PullJob>(&text).unwrap(), job);
    }
}
