//! The latest plan: when the work for each deadline starts, and what is promised for it.

use coordinator_api::schedule::PlanEntry;
use jiff::Timestamp;
use store::Digest;
use store::image::{ImageRef, Platform};

/// One image for one platform.
pub(super) type SizeKey = (ImageRef, Option<Platform>);

/// What an image consists of.
#[derive(Debug, Clone)]
pub(super) struct Sized {
    /// What its tag pointed to.
    pub(super) target: Digest,
    /// The layers' diffIDs and compressed sizes.
    pub(super) layers: Vec<(Digest, u64)>,
}

/// What is promised when a deadline's run starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Prediction {
    /// When it is to end.
    pub(super) end: Timestamp,
    /// How many bytes it is to fetch.
    pub(super) bytes: u64,
}

#[derive(Debug, Clone)]
pub(super) struct Forecasted {
    pub(super) promise: Option<Prediction>,
    pub(super) start: Timestamp,
    pub(super) running: bool,
    pub(super) entry: PlanEntry,
}

/// The latest plan.
#[derive(Debug, Default)]
pub(super) struct Forecast {
    pub(super) deadlines: Vec<Forecasted>,
}

impl Forecast {
    /// A schedule's soonest deadline.
    pub(super) fn of(&self, schedule: &str) -> Option<PlanEntry> {
        self.deadlines.iter().find(|other| other.entry.schedule == schedule).map(|found| found.entry.clone())
    }

    pub(super) fn waiting(&self) -> impl Iterator<Item = &Forecasted> {
        self.deadlines.iter().filter(|other| !other.running)
    }

    /// When the next run is to start, if not now.
    pub(super) fn next_start(&self, now: Timestamp) -> Option<Timestamp> {
        self.waiting().map(|other| other.start).filter(|start| *start > now).min()
    }

    /// When a deadline's run is to start.
    pub(super) fn start_of(&self, schedule: &str, deadline: Timestamp) -> Option<Timestamp> {
        let same = |other: &&Forecasted| other.entry.schedule == schedule && other.entry.deadline == deadline;
        self.waiting().find(same).map(|found| found.start)
    }

    /// What is promised for a deadline.
    pub(super) fn promise(&self, schedule: &str, deadline: Timestamp) -> Option<Prediction> {
        let same = |other: &&Forecasted| other.entry.schedule == schedule && other.entry.deadline == deadline;
        self.deadlines.iter().find(same).and_then(|found| found.promise)
    }
}
