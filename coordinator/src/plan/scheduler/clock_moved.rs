//! Schedules follow the present clock, even after it was ahead.
//!
//! A clock that is ahead makes schedules run for times that have not come, and those times then count as covered. Once the clock is put
//! right, the schedules would be silent until then. So whatever is remembered from further ahead than [`TOLERANCE`] is taken back to the
//! present, and an event says so. A clock that was put right by less makes nothing run twice, and delays nothing for longer than that.

use std::time::Duration;

use coordinator_api::event::Severity;
use coordinator_api::schedule::RunState;
use jiff::Timestamp;

use crate::plan::scheduler::pauses::LAST_PAUSE;
use crate::plan::scheduler::record::ScheduleEntry;
use crate::plan::scheduler::state::Scheduler;
use crate::state::clock::after;

/// What is remembered from no further ahead than this is no sign of a clock that was wrong.
const TOLERANCE: Duration = Duration::from_secs(300);
/// The longest wait for a retry, whatever a registry says.
const LONGEST_WAIT: Duration = Duration::from_secs(24 * 3600);

impl ScheduleEntry {
    /// Whether the covered slot lies ahead for a good reason: it is a deadline whose run began before it.
    fn began_early(&self, now: Timestamp) -> bool {
        let covered = self.record.covered;
        self.record.runs.iter().any(|run| run.slot == covered && run.deadline.is_some() && run.started_at <= now)
    }

    /// The latest time that is remembered as past although it is still to come, if there is one.
    fn ahead_of(&self, now: Timestamp) -> Option<Timestamp> {
        let covered = (!self.began_early(now)).then_some(self.record.covered);
        let latest = covered.into_iter().chain([self.record.created_at]).max();
        latest.filter(|at| *at > after(now, TOLERANCE))
    }

    /// Takes times that lie ahead back to `now`.
    fn take_back(&mut self, now: Timestamp) {
        if !self.began_early(now) {
            self.record.covered = self.record.covered.min(now);
        }
        if self.record.created_at > now {
            self.record.created_at = now;
            self.slots = self.schedule.slots(now);
        }
        self.sized_at = self.sized_at.filter(|at| *at <= now);
        (self.record.warned_for, self.record.missed_for) = (None, None);
    }

    /// Whether a retry is put off for longer than any retry should be.
    fn waits_too_long(&self, now: Timestamp) -> bool {
        let retries = self.record.runs.iter().filter(|run| run.state == RunState::Running);
        retries.filter_map(|run| run.retry_at).any(|at| at > after(now, LONGEST_WAIT))
    }
}

impl Scheduler {
    /// Corrects what a clock that was ahead has left. Blocks on the database.
    pub(super) fn follow_clock(&self, now: Timestamp) {
        let (mut ahead, mut waiting) = (Vec::new(), Vec::new());
        for (name, entry) in &mut *self.book.lock() {
            entry.not_before = entry.not_before.min(after(now, LAST_PAUSE));
            ahead.extend(entry.ahead_of(now).map(|until| (name.clone(), until)));
            waiting.extend(entry.waits_too_long(now).then(|| name.clone()));
        }
        for name in waiting {
            self.amend(&name, |entry| {
                let tried = entry.record.runs.iter_mut().filter(|run| run.retry_at > Some(after(now, LONGEST_WAIT)));
                tried.for_each(|run| run.retry_at = Some(now));
            });
        }
        for (name, until) in ahead {
            self.amend(&name, |entry| entry.take_back(now));
            let message = format!(
                "schedule {name} was run, or made, at {until}, which is still to come: the clock was ahead, and what is next follows the clock that is"
            );
            self.say(Severity::Warning, "schedule.clock", &name, message);
        }
    }
}
