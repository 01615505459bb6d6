//! How long a registry's `Retry-After` is respected.
//!
//! A single answer is no reason to wait for an hour: it may be a mistake, or meant for another client. So the first answer holds for a
//! short time at most, and then one more request is tried. Each further answer in a row may hold for twice as long, up to [`LONGEST`]. A
//! registry that really wants an hour is left alone for that time, with a handful of requests in between.

use std::time::Duration;

use jiff::Timestamp;

use crate::state::clock::after;

/// The longest pause before a registry is asked again.
pub const LONGEST: Duration = Duration::from_secs(3600);

/// The pause that a registry or a repository asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pause {
    until: Timestamp,
    /// Requests for a pause in a row. Those that arrive during a pause count as one with it.
    row: u32,
}

impl Default for Pause {
    fn default() -> Pause {
        Pause { until: Timestamp::UNIX_EPOCH, row: 0 }
    }
}

impl Pause {
    /// Starts a pause of `wait`, or extends the current one. The first in a row lasts no longer than `first`.
    pub fn ask(&mut self, now: Timestamp, wait: Duration, first: Duration) {
        if self.until(now).is_none() {
            self.row = self.row.saturating_add(1);
            self.until = now;
        }
        let most = first.saturating_mul(2u32.saturating_pow(self.row - 1)).min(LONGEST);
        self.until = self.until.max(after(now, wait.min(most)));
    }

    /// When the pause ends, if it is not over at `now`. An end that is further away than [`LONGEST`] was computed by a clock that was
    /// ahead, and is ignored.
    pub fn until(&self, now: Timestamp) -> Option<Timestamp> {
        (now < self.until && self.until <= after(now, LONGEST)).then_some(self.until)
    }

    /// Records an answer, which ends the row. During a pause it changes nothing: it belongs to an earlier request.
    pub fn answered(&mut self, now: Timestamp) {
        if self.until(now).is_none() {
            *self = Pause::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::state::clock::until;

    const FIRST: Duration = Duration::from_secs(60);

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    #[test]
    fn the_first_wish_holds_for_a_while_and_those_that_follow_for_longer() {
        let (mut pause, mut now, mut held) = (Pause::default(), at(1000), Vec::new());
        for _ in 0..8 {
            pause.ask(now, Duration::from_secs(86_400), FIRST);
            pause.ask(now, Duration::MAX, FIRST);
            held.push(until(now, pause.until(now).unwrap()).as_secs());
            now = pause.until(now).unwrap();
        }
        assert_eq!(held, [60, 120, 240, 480, 960, 1920, 3600, 3600]);
        pause.answered(now);
        pause.ask(now, Duration::from_secs(7), FIRST);
        assert_eq!(pause.until(now), Some(after(now, Duration::from_secs(7))), "as short as it is asked for");
        pause.answered(now);
        assert!(pause.until(now).is_some(), "an answer to an earlier question");
        let mut ahead = Pause::default();
        ahead.ask(at(1_000_000), Duration::from_secs(60), FIRST);
        assert_eq!(ahead.until(at(5)), None, "the clock was put right");
    }

    proptest! {
        #[test]
        fn nobody_is_held_for_longer_than_the_longest_and_no_longer_than_was_asked(
            wishes in prop::collection::vec((0i64..10_000, any::<u64>()), 1..60)
        ) {
            let (mut pause, mut now) = (Pause::default(), at(0));
            let mut last = now;
            for (passes, wait) in wishes {
                now = after(now, Duration::from_secs(passes as u64));
                pause.ask(now, Duration::from_secs(wait), FIRST);
                last = last.max(after(now, Duration::from_secs(wait).min(LONGEST)));
                if let Some(until) = pause.until(now) {
                    prop_assert!(until <= last);
                }
            }
        }
    }
}
