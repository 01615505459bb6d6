//! The time, and waiting for a time: injected wherever a decision depends on it.
//!
//! Schedules follow wall-clock time, which may jump (a corrected clock, a machine that slept). So nothing waits long for an instant without
//! another look at the clock.
//!
//! Where a wrong clock would do harm, other times are used: leases go by [`steady`], which does not jump, and removal by age goes by a time
//! that [`crate::admin::gc`] counts.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::BoxFuture;
use jiff::{SignedDuration, Timestamp};

/// The longest sleep without a look at the wall clock.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// A source of time.
pub trait Clock: Send + Sync {
    /// The current time.
    fn now(&self) -> Timestamp;

    /// Completes at `time`, or somewhat before it: callers check the time again.
    fn sleep_until(&self, time: Timestamp) -> BoxFuture<'static, ()>;
}

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

/// A time that advances evenly from the wall clock's first reading in this process, whatever happens to the wall clock later. For spans
/// within one process: it may be compared only with other readings of itself.
pub fn steady() -> Timestamp {
    static BEGAN: OnceLock<(Timestamp, Instant)> = OnceLock::new();
    let (wall, instant) = BEGAN.get_or_init(|| (Timestamp::now(), Instant::now()));
    after(*wall, instant.elapsed())
}

/// The span from `now` to `then`; zero if `then` has passed.
pub fn until(now: Timestamp, then: Timestamp) -> Duration {
    Duration::try_from(then.duration_since(now)).unwrap_or(Duration::ZERO)
}

/// `time` plus `duration`, at most the end of time.
pub fn after(time: Timestamp, duration: Duration) -> Timestamp {
    SignedDuration::try_from(duration)
        .ok()
        .and_then(|duration| time.checked_add(duration).ok())
        .unwrap_or(Timestamp::MAX)
}

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    fn sleep_until(&self, time: Timestamp) -> BoxFuture<'static, ()> {
        tokio::time::sleep(until(Timestamp::now(), time).min(LOOK_AGAIN)).boxed()
    }
}

/// Tokio's clock, which tests pause: a time in which nothing happens then passes at once, be it years.
/// Converts seconds since 1970; what is too far away becomes the last time that there is.
pub fn timestamp(seconds: u64) -> Timestamp {
    i64::try_from(seconds).ok().and_then(|seconds| Timestamp::from_second(seconds).ok()).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct TestClock {
    began: Timestamp,
    instant: tokio::time::Instant,
    /// How far it is ahead (or behind, if negative), in seconds.
    off: &'static std::sync::atomic::AtomicI64,
}

#[cfg(test)]
impl TestClock {
    /// A clock that shows `began` now.
    pub(crate) fn at(began: &str) -> TestClock {
        let off = Box::leak(Box::default());
        TestClock { began: began.parse().unwrap(), instant: tokio::time::Instant::now(), off }
    }

    /// Sets the clock ahead of the time that it should show, or behind it.
    pub(crate) fn put(&self, off: SignedDuration) {
        self.off.store(off.as_secs(), std::sync::atomic::Ordering::SeqCst);
    }
}

#[cfg(test)]
impl Clock for TestClock {
    fn now(&self) -> Timestamp {
        after(self.began, self.instant.elapsed())
            + SignedDuration::from_secs(self.off.load(std::sync::atomic::Ordering::SeqCst))
    }

    fn sleep_until(&self, time: Timestamp) -> BoxFuture<'static, ()> {
        let wait = until(self.now(), time);
        // As with the machine's clock: one that was moved is checked again.
        let moved = self.off.load(std::sync::atomic::Ordering::SeqCst) != 0;
        tokio::time::sleep(if moved { wait.min(LOOK_AGAIN) } else { wait }).boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steady_clock_goes_on() {
        let (first, second) = (steady(), steady());
        assert!(first <= second);
        assert!(second.duration_since(Timestamp::now()).as_secs().abs() < 60);
    }
}
