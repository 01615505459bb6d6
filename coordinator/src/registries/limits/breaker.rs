//! The circuit breaker of one registry, or of one repository: one that is down is left alone for a while, then tried with one request.
//!
//! ```text
//!          FAILURES in a row, or                   time is over
//!         SEVERAL repositories fail
//!  closed ──────────────────────▶ open ──────────────────────────▶ half-open
//!    ▲ │                           ▲   twice as long, up to LONGEST    │  │ ▲
//!    │ │                           └────────── the probe fails ────────┘  │ │
//!    └─┼───────────────────────── the probe succeeds ─────────────────────┘ │
//!      └────────── the breaker of one of its repositories opens ────────────┘
//! ```
//!
//! What each outcome counts as:
//!
//! | what happened | the registry's breaker | the repository's breaker |
//! | --- | --- | --- |
//! | no connection, no TLS, no answer in time; 5xx to `/v2/` or for a token | a failure | nothing |
//! | 5xx to a document, or its storage is broken | its repository counts as failed | a failure |
//! | 401, 403, 429 | an answer: it is there | nothing; a probe that ends so is followed by another |
//! | any other answer | an answer; the count of failed repositories restarts | an answer |
//!
//! When a repository's breaker opens, the registry may be the cause, so the registry is probed before anything else is sent. A registry
//! that answers nothing but 5xx is thus known to be down even if only one of its images is wanted. Failing repositories do not delay
//! working ones, with one exception: if [`SEVERAL`] have failed and not one document arrived in between, the registry may be the cause, and
//! all wait for [`FIRST`]. The registry's probe is a request for `/v2/`, never the document of whichever request waits, so it says
//! something about the registry. (A token service has no `/v2/` and is probed by the next request.) A repository's probe is the next
//! request to that repository.
//!
//! A registry that answers, but then sends its content at a trickle, is counted separately, because its answers would end every row of
//! failures: [`STALLS`] aborted transfers, with no fast enough one between them, open the breaker, too.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use coordinator_api::limits::BreakerState;
use jiff::Timestamp;

use crate::state::clock::{after, until};

/// This many failures in a row open a breaker: more than the attempts at one request, so that one bad image does not.
pub const FAILURES: u32 = 8;
/// This many repositories with a failed document, and no document received in between, open a registry's breaker.
pub const SEVERAL: usize = 8;
/// This many transfers that were too slow, with no fast enough one between them, open a breaker.
pub const STALLS: u32 = 6;
/// How long a breaker stays open at first.
pub const FIRST: Duration = Duration::from_secs(15);
/// How long a suspected breaker counts as having been open: half of [`FIRST`], so that a failed probe, which doubles it, opens the breaker
/// for [`FIRST`].
const SUSPECTED: Duration = Duration::from_millis(7500);
/// How long a breaker stays open at most.
pub const LONGEST: Duration = Duration::from_secs(300);
/// A probe without a result after this time is given up.
const PROBE_LOST: Duration = Duration::from_secs(120);
/// How soon requests that wait for a probe check again.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed,
    Open { until: Timestamp, lasts: Duration },
    HalfOpen { probe_since: Timestamp, lasts: Duration },
}

/// The breaker of one registry or repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Breaker {
    failures: u32,
    stalls: u32,
    /// Hashes of the repositories that failed since the last document was received; [`SEVERAL`] at most.
    failing: Vec<u64>,
    state: State,
}

impl Default for Breaker {
    fn default() -> Breaker {
        Breaker { failures: 0, stalls: 0, failing: Vec::new(), state: State::Closed }
    }
}

/// What a caller may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// The request itself.
    Go,
    /// One probe; no other caller gets one meanwhile.
    Probe,
}

/// How a report changed the breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transition {
    /// It did not change.
    Same,
    /// It opened, until this time.
    Opened(Timestamp),
    /// It closed again.
    Closed,
    /// It was suspected but not open, and is closed again.
    Cleared,
}

impl Breaker {
    /// Admits a request or a probe, or says when to check again.
    pub fn admit(&mut self, now: Timestamp) -> Result<Pass, Timestamp> {
        match self.state {
            State::Closed => Ok(Pass::Go),
            // An end further away than `lasts` was computed by a clock that was ahead.
            State::Open { until, lasts } if now < until && until <= after(now, lasts) => Err(until),
            State::Open { lasts, .. } => {
                self.state = State::HalfOpen { probe_since: now, lasts };
                Ok(Pass::Probe)
            }
            State::HalfOpen { probe_since, lasts } if until(probe_since, now) >= PROBE_LOST => {
                self.state = State::HalfOpen { probe_since: now, lasts };
                Ok(Pass::Probe)
            }
            State::HalfOpen { .. } => Err(after(now, LOOK_AGAIN)),
        }
    }

    /// Until when requests are held back, if the breaker is open at `now`.
    pub fn opens_at(&self, now: Timestamp) -> Option<Timestamp> {
        match self.state {
            State::Open { until, lasts } if now < until && until <= after(now, lasts) => Some(until),
            _ => None,
        }
    }

    /// Records an answer with what was asked for, or that it does not exist.
    pub fn succeeded(&mut self) -> Transition {
        let was = std::mem::take(self);
        self.stalls = was.stalls;
        match was.state {
            State::Closed => Transition::Same,
            State::Open { lasts, .. } | State::HalfOpen { lasts, .. } if lasts < FIRST => Transition::Cleared,
            State::Open { .. } | State::HalfOpen { .. } => Transition::Closed,
        }
    }

    /// Records an answer that only shows that the registry is there.
    pub fn refused(&mut self) -> Transition {
        let failing = std::mem::take(&mut self.failing);
        let transition = self.succeeded();
        if transition == Transition::Same {
            self.failing = failing;
        }
        transition
    }

    /// Records that it may be down: the next request is a probe.
    pub fn suspect(&mut self, now: Timestamp) {
        if self.state == State::Closed {
            self.state = State::Open { until: now, lasts: SUSPECTED };
        }
    }

    /// Records that a probe ended without a result: the next request is a probe again.
    pub fn undecided(&mut self, now: Timestamp) {
        if let State::HalfOpen { lasts, .. } = self.state {
            self.state = State::Open { until: now, lasts };
        }
    }

    /// Records that a document of one of the registry's repositories failed.
    pub fn document_failed(&mut self, repository: &str, now: Timestamp) -> Transition {
        if self.state != State::Closed {
            return Transition::Same;
        }
        let mut hasher = DefaultHasher::new();
        repository.hash(&mut hasher);
        let repository = hasher.finish();
        if !self.failing.contains(&repository) {
            self.failing.push(repository);
        }
        if self.failing.len() < SEVERAL {
            return Transition::Same;
        }
        let until = after(now, FIRST);
        self.state = State::Open { until, lasts: FIRST };
        Transition::Opened(until)
    }

    /// Records that there was no answer, or a fault.
    pub fn failed(&mut self, now: Timestamp) -> Transition {
        self.failures = self.failures.saturating_add(1);
        let lasts = match self.state {
            State::Closed if self.failures < FAILURES => return Transition::Same,
            // This request was sent before the breaker opened.
            State::Open { .. } => return Transition::Same,
            State::Closed => FIRST,
            State::HalfOpen { lasts, .. } => (lasts * 2).min(LONGEST),
        };
        let until = after(now, lasts);
        self.state = State::Open { until, lasts };
        Transition::Opened(until)
    }

    /// Records that a transfer was aborted because it was too slow.
    pub fn stalled(&mut self, now: Timestamp) -> Transition {
        self.stalls = self.stalls.saturating_add(1);
        if self.stalls < STALLS || self.state != State::Closed {
            return Transition::Same;
        }
        let until = after(now, FIRST);
        self.state = State::Open { until, lasts: FIRST };
        Transition::Opened(until)
    }

    /// Records that a transfer was fast enough.
    pub fn flowed(&mut self) {
        self.stalls = 0;
    }

    /// Whether slow transfers have opened it.
    pub fn is_slow(&self) -> bool {
        self.stalls >= STALLS
    }

    /// Whether documents of several repositories have opened it.
    pub fn is_failing_everywhere(&self) -> bool {
        self.failing.len() >= SEVERAL && self.failures == 0
    }

    /// Failures in a row.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// The state as the API shows it.
    pub fn view(&self) -> BreakerState {
        match self.state {
            State::Closed => BreakerState::Closed,
            State::Open { .. } => BreakerState::Open,
            State::HalfOpen { .. } => BreakerState::HalfOpen,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    #[test]
    fn it_opens_after_failures_in_a_row_and_closes_with_a_good_probe() {
        let mut breaker = Breaker::default();
        (1..FAILURES).for_each(|_| assert_eq!(breaker.failed(at(0)), Transition::Same));
        assert_eq!(breaker.succeeded(), Transition::Same, "the row is broken");
        (1..FAILURES).for_each(|_| assert_eq!(breaker.failed(at(0)), Transition::Same));
        assert_eq!(breaker.failed(at(0)), Transition::Opened(at(15)));
        assert_eq!(breaker.admit(at(14)), Err(at(15)));
        assert_eq!(breaker.admit(at(15)), Ok(Pass::Probe));
        assert_eq!(breaker.admit(at(15)), Err(at(16)), "one at a time");
        assert_eq!(breaker.failed(at(16)), Transition::Opened(at(46)), "twice as long");
        assert_eq!(breaker.admit(at(46)), Ok(Pass::Probe));
        assert_eq!(breaker.admit(at(46 + 120)), Ok(Pass::Probe), "a lost probe is replaced");
        breaker.undecided(at(167));
        assert_eq!(breaker.admit(at(167)), Ok(Pass::Probe), "one that told nothing, too");
        assert_eq!(breaker.succeeded(), Transition::Closed);
        assert_eq!((breaker.admit(at(200)), breaker.failures()), (Ok(Pass::Go), 0));
    }

    #[test]
    fn one_that_is_suspected_is_probed_before_anything_else() {
        let mut breaker = Breaker::default();
        breaker.suspect(at(0));
        assert_eq!((breaker.opens_at(at(0)), breaker.admit(at(0))), (None, Ok(Pass::Probe)));
        assert_eq!(breaker.succeeded(), Transition::Cleared, "nobody was told that it is down");
        breaker.suspect(at(1));
        assert_eq!((breaker.admit(at(1)), breaker.failed(at(1))), (Ok(Pass::Probe), Transition::Opened(at(16))));
        breaker.suspect(at(2));
        assert_eq!(breaker.admit(at(2)), Err(at(16)), "it is known to be down");
        assert_eq!((breaker.admit(at(16)), breaker.failed(at(16))), (Ok(Pass::Probe), Transition::Opened(at(46))));
    }

    #[test]
    fn one_that_a_clock_ahead_had_opened_does_not_stay_open_until_then() {
        let mut breaker = Breaker::default();
        (1..=FAILURES).for_each(|_| _ = breaker.failed(at(1_000_000)));
        assert!(breaker.admit(at(1_000_001)).is_err());
        assert_eq!(breaker.opens_at(at(5)), None);
        assert_eq!(breaker.admit(at(5)), Ok(Pass::Probe), "the clock was put right");
    }

    #[test]
    fn transfers_that_trickle_open_it_although_every_request_is_answered() {
        let mut breaker = Breaker::default();
        for _ in 1..STALLS {
            assert_eq!((breaker.succeeded(), breaker.stalled(at(0))), (Transition::Same, Transition::Same));
        }
        breaker.flowed();
        for _ in 1..STALLS {
            assert_eq!((breaker.succeeded(), breaker.stalled(at(0))), (Transition::Same, Transition::Same));
        }
        assert_eq!(breaker.stalled(at(0)), Transition::Opened(at(15)));
        assert!(breaker.is_slow() && breaker.admit(at(14)).is_err());
        assert_eq!(breaker.admit(at(15)), Ok(Pass::Probe));
        assert_eq!(breaker.succeeded(), Transition::Closed);
        assert_eq!(breaker.stalled(at(16)), Transition::Opened(at(31)), "the next one that trickles opens it again");
    }

    #[test]
    fn documents_that_fail_tell_of_the_registry_when_several_repositories_fail_and_no_document_comes() {
        let mut breaker = Breaker::default();
        let name = |number: usize| format!("bad-{number}");
        for _ in 0..100 {
            (1..SEVERAL).for_each(|number| assert_eq!(breaker.document_failed(&name(number), at(0)), Transition::Same));
        }
        assert_eq!(breaker.succeeded(), Transition::Same, "a document came");
        (1..SEVERAL).for_each(|number| assert_eq!(breaker.document_failed(&name(number), at(0)), Transition::Same));
        assert_eq!(breaker.refused(), Transition::Same, "that it asks who we are tells nothing of its documents");
        assert_eq!(breaker.document_failed(&name(SEVERAL), at(0)), Transition::Opened(at(15)));
        assert!(breaker.is_failing_everywhere() && breaker.admit(at(14)).is_err());
        assert_eq!(breaker.admit(at(15)), Ok(Pass::Probe));
        assert_eq!(breaker.document_failed("late", at(15)), Transition::Same, "what was under way is no probe");
        assert_eq!(breaker.refused(), Transition::Closed, "the probe: it is there");
        assert_eq!(breaker, Breaker::default());
    }

    proptest! {
        /// Whatever happens, requests are never blocked for longer than [`LONGEST`] plus the time until a probe is given up.
        #[test]
        fn it_always_lets_something_through_again(steps in prop::collection::vec((0i64..400, any::<bool>()), 1..100)) {
            let (mut breaker, mut now) = (Breaker::default(), 0);
            for (pause, works) in steps {
                now += pause;
                if breaker.admit(at(now)).is_ok() {
                    if works { breaker.succeeded() } else { breaker.failed(at(now)) };
                }
            }
            let soonest = (0..).find(|wait| breaker.clone().admit(at(now + wait)).is_ok()).unwrap();
            prop_assert!(soonest <= (LONGEST + PROBE_LOST).as_secs() as i64);
        }
    }
}
