//! A token bucket that lends: callers take first, then wait until the debt is paid off.
//!
//! The rate is passed with each call, so it may change at any moment. A burst of [`BURST`], or of a size that the caller chooses, is free.

use std::time::Duration;

use jiff::Timestamp;

use crate::state::clock::until;

/// The free burst, in seconds at the given rate.
const BURST: f64 = 0.25;

/// The debt for one limited resource.
#[derive(Debug, Clone, Copy)]
pub struct Bucket {
    debt: f64,
    at: Timestamp,
}

impl Bucket {
    /// A bucket without debt.
    pub fn new(now: Timestamp) -> Bucket {
        Bucket { debt: 0.0, at: now }
    }

    /// Takes `count` units, while debt is paid off at `rate` units a second.
    pub fn take(&mut self, now: Timestamp, count: f64, rate: f64) {
        self.pay(now, rate);
        self.debt += count;
    }

    /// How long to wait at `rate` until the debt is within the free burst.
    pub fn wait(&mut self, now: Timestamp, rate: f64) -> Duration {
        self.wait_over(now, rate, rate * BURST)
    }

    /// How long to wait at `rate` until no more than `free` is owed.
    pub fn wait_over(&mut self, now: Timestamp, rate: f64, free: f64) -> Duration {
        self.pay(now, rate);
        let seconds = ((self.debt - free) / rate).max(0.0);
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    fn pay(&mut self, now: Timestamp, rate: f64) {
        self.debt = (self.debt - until(self.at, now).as_secs_f64() * rate).max(0.0);
        self.at = now;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::state::clock::after;

    proptest! {
        /// A caller that waits as told takes, over any time, no more than the rate allows plus the burst and one piece.
        #[test]
        fn the_rate_is_kept(pieces in prop::collection::vec(1u32..100_000, 1..200), rate in 1_000.0..1e7) {
            let begin = Timestamp::UNIX_EPOCH;
            let (mut bucket, mut now, mut taken) = (Bucket::new(begin), begin, 0.0);
            for piece in pieces {
                bucket.take(now, f64::from(piece), rate);
                taken += f64::from(piece);
                let wait = bucket.wait(now, rate);
                now = after(now, wait);
                let allowed = (until(begin, now).as_secs_f64() + BURST) * rate;
                prop_assert!(taken <= allowed * 1.000_001 + 1.0, "{taken} in {now} at {rate}");
            }
            prop_assert!(taken >= (until(begin, now).as_secs_f64()) * rate * 0.999 - 1.0, "and not much less");
        }
    }
}
