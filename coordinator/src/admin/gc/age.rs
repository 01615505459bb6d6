//! The age of objects, counted as time that passed while a coordinator was running.
//!
//! A machine's clock may be wrong by hours or by decades when a process starts, and be corrected later. A collector that trusted
//! it would take new objects for old ones and give them no grace. So the time that determines age is counted: it begins with the
//! machine's time when the database is new, is saved with each collection, and continues from there. While a coordinator runs,
//! counted time passes as fast as real time, and up to twice as fast while it is behind the machine's clock, as it is after the
//! coordinator was down. So an object is never collected before half of its grace has passed while a coordinator was running,
//! whatever the clock says, and never much later than it should be.
//!
//! Times that were taken from the machine's clock (when an image was published) are compared with [`Ages::today`]: the counted
//! time or the machine's, whichever is earlier.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use parking_lot::Mutex;

/// The counted time, seconds since 1970.
#[derive(Debug)]
struct Counted {
    seconds: u64,
    /// When `seconds` was last brought up to date.
    seen: Instant,
}

#[derive(Debug)]
pub(super) struct Ages {
    counted: Mutex<Counted>,
}

/// The counted time after `elapsed` more seconds, when the machine's clock shows `wall`.
fn count(counted: u64, elapsed: u64, wall: u64) -> u64 {
    let next = counted.saturating_add(elapsed);
    next.saturating_add(wall.saturating_sub(next).min(elapsed))
}

/// The machine's clock, seconds since 1970.
pub(super) fn wall() -> u64 {
    u64::try_from(Timestamp::now().as_second()).unwrap_or(0)
}

impl Ages {
    /// Continues from the time that was counted before, or starts with the machine's time.
    pub(super) fn from(counted: Option<u64>) -> Ages {
        let counted = Counted { seconds: counted.unwrap_or_else(wall), seen: Instant::now() };
        Ages { counted: Mutex::new(counted) }
    }

    /// The counted time, seconds since 1970.
    pub(super) fn now(&self) -> u64 {
        let mut counted = self.counted.lock();
        let elapsed = counted.seen.elapsed().as_secs();
        counted.seen += Duration::from_secs(elapsed);
        counted.seconds = count(counted.seconds, elapsed, wall());
        counted.seconds
    }

    /// The present, to compare with times from the machine's clock without making anything look older than it is.
    pub(super) fn today(&self) -> u64 {
        self.now().min(wall())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOUR: u64 = 3600;

    #[test]
    fn a_clock_that_is_wrong_makes_nothing_old() {
        let start = 1_000 * HOUR;
        // The clock is ten years ahead, or in 1970, for an hour.
        assert_eq!(count(start, HOUR, start + 87_600 * HOUR), start + 2 * HOUR);
        assert_eq!(count(start, HOUR, 0), start + HOUR);
        // Once the clock is right again, time passes at its own pace, and a counted time that is behind catches up.
        assert_eq!(count(start + 2 * HOUR, HOUR, start + 2 * HOUR), start + 3 * HOUR);
        let caught_up = (0..24).fold(start, |counted, hour| count(counted, HOUR, start + (24 + hour + 1) * HOUR));
        assert_eq!(caught_up, start + 48 * HOUR, "a day that it was down for, in a day");
    }

    #[test]
    fn it_begins_with_the_machines_time_and_goes_on_with_its_own() {
        let fresh = Ages::from(None);
        assert!(wall() - fresh.now() <= 2 && fresh.today() <= wall());
        let behind = Ages::from(Some(5));
        assert!(behind.now() < 60 && behind.today() < 60);
        let ahead = Ages::from(Some(u64::MAX / 2));
        assert!(ahead.now() >= u64::MAX / 2 && ahead.today() <= wall());
    }

    proptest! {
        /// Whatever the clock shows, at least the time that passed is counted, and at most twice that.
        #[test]
        fn what_is_counted_is_bounded_by_what_passed(
            steps in prop::collection::vec((0u64..100 * HOUR, any::<u32>()), 1..50),
        ) {
            let start = 1_800_000_000;
            let counted = steps.iter().fold(start, |counted, (elapsed, wall)| count(counted, *elapsed, u64::from(*wall)));
            let passed: u64 = steps.iter().map(|(elapsed, _)| elapsed).sum();
            prop_assert!((passed..=2 * passed).contains(&(counted - start)));
        }
    }
}
