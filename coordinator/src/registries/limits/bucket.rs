//! A token bucket that lends: what is taken is taken, and whoever took waits until the debt is paid.
//!
//! The rate is given with each call, so that it may change at any moment; a burst of [`BURST`] is free, or one that the caller names.

use std::time::Duration;

use jiff::Timestamp;

use crate::state::clock::until;

/// So much time's worth may be taken at once.
const BURST: f64 = 0.25;

/// What was taken from one limited good.
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

    /// Takes `count` at a time when `rate` a second are paid back.
    pub fn take(&mut self, now: Timestamp, count: f64, rate: f64) {
        self.pay(now, rate);
        self.debt += count;
    }

    /// How long to wait at `rate`.
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
        /// Whoever waits as told takes, over any time, the rate's worth plus the burst and one piece.
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
