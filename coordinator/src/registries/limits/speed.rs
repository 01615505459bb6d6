//! How fast a registry is: bytes over the time in which anything was being fetched from it.
//!
//! Fetches run in parallel, so the speed of one layer says little: what counts is the total rate of the registry. Each stretch of work
//! gives one sample, and samples are averaged with exponentially falling weights. A stretch that the coordinator's own limits slowed down
//! measures the limit, not the registry, so it can only raise the average.

use std::time::Duration;

use jiff::Timestamp;

use crate::state::clock::until;

/// Weight of the newest sample.
const WEIGHT: f64 = 0.3;
/// A stretch ends after this time, so that a long pull counts before it ends.
const STRETCH: Duration = Duration::from_secs(20);
/// A sample needs at least this many bytes, over at least [`LEAST_TIME`].
const LEAST_BYTES: u64 = 64 << 10;
const LEAST_TIME: Duration = Duration::from_millis(5);

/// Whether the coordinator's own limits slowed the work down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Throttled {
    No,
    Yes,
}

/// The speed of one registry.
#[derive(Debug, Clone)]
pub struct Speed {
    active: usize,
    since: Timestamp,
    bytes: u64,
    throttled: Throttled,
    average: Option<f64>,
}

impl Speed {
    /// Starts from `known`, an average measured earlier in bytes a second.
    pub fn new(known: Option<f64>) -> Speed {
        let average = known.filter(|known| known.is_finite() && *known > 0.0);
        Speed { active: 0, since: Timestamp::UNIX_EPOCH, bytes: 0, throttled: Throttled::No, average }
    }

    /// Records the start of a fetch.
    pub fn begin(&mut self, now: Timestamp) {
        if self.active == 0 {
            (self.since, self.bytes, self.throttled) = (now, 0, Throttled::No);
        }
        self.active += 1;
    }

    /// Records received bytes.
    pub fn add(&mut self, now: Timestamp, bytes: u64) {
        self.bytes += bytes;
        if until(self.since, now) >= STRETCH {
            self.close(now);
        }
    }

    /// Records that the coordinator's own limits make a fetch wait.
    pub fn hold(&mut self) {
        self.throttled = Throttled::Yes;
    }

    /// Records the end of a fetch.
    pub fn end(&mut self, now: Timestamp) {
        self.active = self.active.saturating_sub(1);
        if self.active == 0 {
            self.close(now);
        }
    }

    /// Number of fetches under way.
    pub fn active(&self) -> usize {
        self.active
    }

    /// Average bytes a second, once known.
    pub fn average(&self) -> Option<f64> {
        self.average
    }

    fn close(&mut self, now: Timestamp) {
        let lasted = until(self.since, now);
        if self.bytes >= LEAST_BYTES && lasted >= LEAST_TIME {
            let sample = self.bytes as f64 / lasted.as_secs_f64();
            self.average = Some(match (self.average, self.throttled) {
                (None, _) => sample,
                (Some(average), Throttled::Yes) => average.max(sample),
                (Some(average), Throttled::No) => average + WEIGHT * (sample - average),
            });
        }
        (self.since, self.bytes, self.throttled) = (now, 0, Throttled::No);
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
