//! How long the scheduler waits: after failures, and between checks of tags.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use jiff::Timestamp;

/// Pauses before a failed attempt is repeated: they double from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_secs(60);
pub(super) const LAST_PAUSE: Duration = Duration::from_secs(3600);

/// Checks of tags are spread over their interval divided by this, so that many schedules do not ask in step.
const JITTER: u32 = 10;

/// The pause after this many failures in a row.
pub(super) fn pause(failures: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(LAST_PAUSE)
}

/// How much later than its slot a check of tags happens. It is always the same for one schedule and slot, and less than a tenth of the
/// interval, so that two checks are an interval apart, give or take a tenth.
pub(super) fn jitter(name: &str, slot: Timestamp, every: Duration) -> Duration {
    let mut hasher = DefaultHasher::new();
    (name, slot.as_second()).hash(&mut hasher);
    every.mul_f64((hasher.finish() % 10_000) as f64 / 10_000.0 / f64::from(JITTER))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_are_spread_over_a_tenth_of_their_interval() {
        let every = Duration::from_secs(300);
        let slots = (0..500).map(|n| Timestamp::from_second(n * 300).unwrap());
        let offsets: Vec<Duration> = slots.map(|slot| jitter("app", slot, every)).collect();
        assert!(offsets.iter().all(|offset| *offset < every / JITTER));
        let mean = offsets.iter().sum::<Duration>() / 500;
        assert!((12..18).contains(&mean.as_secs()), "{mean:?}");
        let at = Timestamp::from_second(300).unwrap();
        assert_ne!(jitter("app", at, every), jitter("other", at, every));
    }
}
