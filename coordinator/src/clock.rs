//! What time it is, and waiting for a time: injected wherever a decision depends on it.
//!
//! Schedules speak of wall-clock time, which may jump (a corrected clock, a machine that slept). So nobody waits long for
//! an instant without looking again.

use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use jiff::{SignedDuration, Timestamp};

/// The longest sleep without a look at the wall clock.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// A source of time.
pub trait Clock: Send + Sync {
    /// The time.
    fn now(&self) -> Timestamp;

    /// Ends at `time`, or somewhat before it: callers look again.
    fn sleep_until(&self, time: Timestamp) -> BoxFuture<'static, ()>;
}

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

/// From `now` to `then`; nothing for the past.
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

/// Tokio's clock, which tests pause: then years pass as fast as nothing happens in them.
#[cfg(test)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct TestClock {
    began: Timestamp,
    instant: tokio::time::Instant,
}

#[cfg(test)]
impl TestClock {
    /// A clock that shows `began` now.
    pub(crate) fn at(began: &str) -> TestClock {
        TestClock { began: began.parse().unwrap(), instant: tokio::time::Instant::now() }
    }
}

#[cfg(test)]
impl Clock for TestClock {
    fn now(&self) -> Timestamp {
        after(self.began, self.instant.elapsed())
    }

    fn sleep_until(&self, time: Timestamp) -> BoxFuture<'static, ()> {
        tokio::time::sleep(until(self.now(), time)).boxed()
    }
}
