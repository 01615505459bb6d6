//! The circuit breaker of one registry: one that is down is left alone for a while, then tried with one request.
//!
//! ```text
//!            FAILURES in a row                     time is over
//!  closed ──────────────────────▶ open ──────────────────────────▶ half-open
//!    ▲                             ▲   twice as long, up to LONGEST    │  │
//!    │                             └────────── the probe fails ────────┘  │
//!    └─────────────────────────── the probe succeeds ─────────────────────┘
//! ```
//!
//! A failure is no answer or a 5xx. A refusal (401, 404, 429) is an answer: the registry works. A registry that answers and then
//! lets its content trickle is counted apart, because its answers would end every row of failures: [`STALLS`] transfers that were
//! broken off, with none that flowed between them, open the breaker too.

use std::time::Duration;

use coordinator_api::limits::BreakerState;
use jiff::Timestamp;

use crate::clock::{after, until};

/// So many failures in a row open it: more than the attempts of one request, so that one bad image does not.
pub const FAILURES: u32 = 8;
/// So many transfers that came too slowly, with none between them that did not, open it.
pub const STALLS: u32 = 6;
/// How long it is open at first.
pub const FIRST: Duration = Duration::from_secs(15);
/// How long it is open at most.
pub const LONGEST: Duration = Duration::from_secs(300);
/// A probe that says nothing for so long is given up.
const PROBE_LOST: Duration = Duration::from_secs(120);
/// How soon those who wait for a probe look again.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed,
    Open { until: Timestamp, lasts: Duration },
    HalfOpen { probe_since: Timestamp, lasts: Duration },
}

/// The breaker of one registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Breaker {
    failures: u32,
    stalls: u32,
    state: State,
}

impl Default for Breaker {
    fn default() -> Breaker {
        Breaker { failures: 0, stalls: 0, state: State::Closed }
    }
}

/// What a report did to the breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Nothing.
    Same,
    /// It opened, until then.
    Opened(Timestamp),
    /// It closed again.
    Closed,
}

impl Breaker {
    /// Lets a request out, or says when to look again.
    pub fn admit(&mut self, now: Timestamp) -> Result<(), Timestamp> {
        match self.state {
            State::Closed => Ok(()),
            // One that is open for longer than it ever is was opened by a clock that was ahead.
            State::Open { until, lasts } if now < until && until <= after(now, lasts) => Err(until),
            State::Open { lasts, .. } => {
                self.state = State::HalfOpen { probe_since: now, lasts };
                Ok(())
            }
            State::HalfOpen { probe_since, lasts } if until(probe_since, now) >= PROBE_LOST => {
                self.state = State::HalfOpen { probe_since: now, lasts };
                Ok(())
            }
            State::HalfOpen { .. } => Err(after(now, LOOK_AGAIN)),
        }
    }

    /// Until when nothing goes out, if the breaker is open at `now`.
    pub fn opens_at(&self, now: Timestamp) -> Option<Timestamp> {
        match self.state {
            State::Open { until, lasts } if now < until && until <= after(now, lasts) => Some(until),
            _ => None,
        }
    }

    /// The registry answered.
    pub fn succeeded(&mut self) -> Turn {
        let was = std::mem::take(self);
        self.stalls = was.stalls;
        if was.state == State::Closed { Turn::Same } else { Turn::Closed }
    }

    /// The registry did not.
    pub fn failed(&mut self, now: Timestamp) -> Turn {
        self.failures = self.failures.saturating_add(1);
        let lasts = match self.state {
            State::Closed if self.failures < FAILURES => return Turn::Same,
            // Requests that were under way when it opened.
            State::Open { .. } => return Turn::Same,
            State::Closed => FIRST,
            State::HalfOpen { lasts, .. } => (lasts * 2).min(LONGEST),
        };
        let until = after(now, lasts);
        self.state = State::Open { until, lasts };
        Turn::Opened(until)
    }

    /// A transfer was broken off because it came too slowly.
    pub fn stalled(&mut self, now: Timestamp) -> Turn {
        self.stalls = self.stalls.saturating_add(1);
        if self.stalls < STALLS || self.state != State::Closed {
            return Turn::Same;
        }
        let until = after(now, FIRST);
        self.state = State::Open { until, lasts: FIRST };
        Turn::Opened(until)
    }

    /// A transfer came as fast as it must.
    pub fn flowed(&mut self) {
        self.stalls = 0;
    }

    /// Whether it is slowness that opens it.
    pub fn is_slow(&self) -> bool {
        self.stalls >= STALLS
    }

    /// Failures in a row.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// What the API shows.
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
        (1..FAILURES).for_each(|_| assert_eq!(breaker.failed(at(0)), Turn::Same));
        assert_eq!(breaker.succeeded(), Turn::Same, "the row is broken");
        (1..FAILURES).for_each(|_| assert_eq!(breaker.failed(at(0)), Turn::Same));
        assert_eq!(breaker.failed(at(0)), Turn::Opened(at(15)));
        assert_eq!(breaker.admit(at(14)), Err(at(15)));
        assert_eq!(breaker.admit(at(15)), Ok(()), "the probe");
        assert_eq!(breaker.admit(at(15)), Err(at(16)), "one at a time");
        assert_eq!(breaker.failed(at(16)), Turn::Opened(at(46)), "twice as long");
        assert_eq!(breaker.admit(at(46)), Ok(()));
        assert_eq!(breaker.admit(at(46 + 120)), Ok(()), "a lost probe is replaced");
        assert_eq!(breaker.succeeded(), Turn::Closed);
        assert_eq!((breaker.admit(at(200)), breaker.failures()), (Ok(()), 0));
    }

    #[test]
    fn one_that_a_clock_ahead_had_opened_does_not_stay_open_until_then() {
        let mut breaker = Breaker::default();
        (1..=FAILURES).for_each(|_| _ = breaker.failed(at(1_000_000)));
        assert!(breaker.admit(at(1_000_001)).is_err());
        assert_eq!(breaker.opens_at(at(5)), None);
        assert_eq!(breaker.admit(at(5)), Ok(()), "the clock was put right");
    }

    #[test]
    fn transfers_that_trickle_open_it_although_every_request_is_answered() {
        let mut breaker = Breaker::default();
        for _ in 1..STALLS {
            assert_eq!((breaker.succeeded(), breaker.stalled(at(0))), (Turn::Same, Turn::Same));
        }
        breaker.flowed();
        for _ in 1..STALLS {
            assert_eq!((breaker.succeeded(), breaker.stalled(at(0))), (Turn::Same, Turn::Same));
        }
        assert_eq!(breaker.stalled(at(0)), Turn::Opened(at(15)));
        assert!(breaker.is_slow() && breaker.admit(at(14)).is_err());
        assert_eq!(breaker.admit(at(15)), Ok(()));
        assert_eq!(breaker.succeeded(), Turn::Closed);
        assert_eq!(breaker.stalled(at(16)), Turn::Opened(at(31)), "the next one that trickles opens it again");
    }

    proptest! {
        /// Whatever happens: it never stays shut for longer than [`LONGEST`] and a probe's patience.
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
