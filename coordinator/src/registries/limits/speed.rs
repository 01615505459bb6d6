//! How fast a registry is: bytes over the time in which anything was being fetched from it.
//!
//! Fetches run side by side, so the speed of one layer says little: what counts is what the registry gives in all. Each
//! stretch of work gives one sample; samples are averaged with exponentially falling weight. A stretch that a limit of
//! ours slowed down shows the limit, not the registry: it can only raise the average.

use std::time::Duration;

use jiff::Timestamp;

use crate::state::clock::until;

/// Weight of the newest sample.
const WEIGHT: f64 = 0.3;
/// A stretch is closed after so long, so that a long pull is noticed before it ends.
const STRETCH: Duration = Duration::from_secs(20);
/// Less than this says nothing about speed.
const LEAST_BYTES: u64 = 64 << 10;
const LEAST_TIME: Duration = Duration::from_millis(5);

/// Whether a limit of ours slowed the work down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    No,
    Yes,
}

/// The speed of one registry.
#[derive(Debug, Clone)]
pub struct Speed {
    active: usize,
    since: Timestamp,
    bytes: u64,
    held: Held,
    average: Option<f64>,
}

impl Speed {
    /// One that starts from what was known before.
    pub fn new(known: Option<f64>) -> Speed {
        let average = known.filter(|known| known.is_finite() && *known > 0.0);
        Speed { active: 0, since: Timestamp::UNIX_EPOCH, bytes: 0, held: Held::No, average }
    }

    /// A fetch begins.
    pub fn begin(&mut self, now: Timestamp) {
        if self.active == 0 {
            (self.since, self.bytes, self.held) = (now, 0, Held::No);
        }
        self.active += 1;
    }

    /// Bytes have come.
    pub fn add(&mut self, now: Timestamp, bytes: u64) {
        self.bytes += bytes;
        if until(self.since, now) >= STRETCH {
            self.close(now);
        }
    }

    /// A limit of ours makes the fetch wait.
    pub fn hold(&mut self) {
        self.held = Held::Yes;
    }

    /// A fetch ends.
    pub fn end(&mut self, now: Timestamp) {
        self.active = self.active.saturating_sub(1);
        if self.active == 0 {
            self.close(now);
        }
    }

    /// Fetches under way.
    pub fn active(&self) -> usize {
        self.active
    }

    /// Bytes a second, once known.
    pub fn average(&self) -> Option<f64> {
        self.average
    }

    fn close(&mut self, now: Timestamp) {
        let lasted = until(self.since, now);
        if self.bytes >= LEAST_BYTES && lasted >= LEAST_TIME {
            let sample = self.bytes as f64 / lasted.as_secs_f64();
            self.average = Some(match (self.average, self.held) {
                (None, _) => sample,
                (Some(average), Held::Yes) => average.max(sample),
                (Some(average), Held::No) => average + WEIGHT * (sample - average),
            });
        }
        (self.since, self.bytes, self.held) = (now, 0, Held::No);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: i64) -> Timestamp {
        Timestamp::from_millisecond(milliseconds).unwrap()
    }

    #[test]
    fn parallel_fetches_are_one_stretch_and_limits_do_not_lower_the_average() {
        let mut speed = Speed::new(None);
        speed.begin(at(0));
        speed.begin(at(0));
        speed.add(at(500), 600_000);
        speed.end(at(500));
        speed.add(at(1000), 400_000);
        speed.end(at(1000));
        assert_eq!(speed.average(), Some(1_000_000.0));
        speed.begin(at(5000));
        speed.add(at(6000), 2_000_000);
        speed.end(at(6000));
        assert_eq!(speed.average(), Some(1_300_000.0));
        speed.begin(at(7000));
        speed.hold();
        speed.add(at(8000), 100_000);
        speed.end(at(8000));
        assert_eq!(speed.average(), Some(1_300_000.0));
        speed.begin(at(9000));
        speed.add(at(9010), 10);
        speed.end(at(9010));
        assert_eq!(speed.average(), Some(1_300_000.0), "too little to tell");
        assert_eq!(Speed::new(Some(f64::NAN)).average(), None);
    }
}
