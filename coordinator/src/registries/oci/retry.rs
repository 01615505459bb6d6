//! How often and how patiently a request is repeated.
//!
//! Exponential back-off with jitter, so that many coordinators do not return in step; a registry's own `Retry-After`
//! goes first. Progress starts the count anew: a long download over a bad line may break any number of times.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use jiff::Timestamp;

/// How patient to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Attempts in all, the first included.
    pub attempts: u32,
    /// The first pause.
    pub base: Duration,
    /// The longest pause of our own choice.
    pub cap: Duration,
    /// The longest `Retry-After` that is obeyed; a longer one ends the job with that reason.
    pub longest_wait: Duration,
}

impl Default for RetryPolicy {
    /// About eight seconds of patience for a registry that is down, five minutes for one that names a time.
    fn default() -> RetryPolicy {
        RetryPolicy {
            attempts: 6,
            base: Duration::from_millis(250),
            cap: Duration::from_secs(20),
            longest_wait: Duration::from_secs(300),
        }
    }
}

/// Why there will be no further attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GiveUp {
    /// All attempts are spent.
    Spent,
    /// The registry asks for more time than the policy allows.
    TooLong(Duration),
}

/// The attempts at one request.
#[derive(Debug)]
pub struct Attempts {
    policy: RetryPolicy,
    made: u32,
    pauses: ExponentialBackoff,
}

impl RetryPolicy {
    /// Starts counting; the first attempt counts as made.
    pub fn start(&self) -> Attempts {
        Attempts { policy: *self, made: 1, pauses: self.pauses() }
    }

    fn pauses(&self) -> ExponentialBackoff {
        ExponentialBuilder::default()
            .with_min_delay(self.base)
            .with_max_delay(self.cap)
            .with_factor(2.0)
            .with_jitter()
            .without_max_times()
            .build()
    }
}

impl Attempts {
    /// How many were made.
    pub fn made(&self) -> u32 {
        self.made
    }

    /// The pause before the next attempt, which then counts as made.
    pub fn again(&mut self, retry_after: Option<Duration>) -> Result<Duration, GiveUp> {
        if self.made >= self.policy.attempts {
            return Err(GiveUp::Spent);
        }
        if let Some(asked) = retry_after.filter(|asked| *asked > self.policy.longest_wait) {
            return Err(GiveUp::TooLong(asked));
        }
        self.made += 1;
        let own = self.pauses.next().unwrap_or(self.policy.cap);
        Ok(retry_after.unwrap_or(own))
    }

    /// Something was achieved: the count starts anew.
    pub fn progress(&mut self) {
        if self.made > 1 {
            self.made = 1;
            self.pauses = self.policy.pauses();
        }
    }
}

/// Reads a `Retry-After` value: seconds, or an HTTP date seen from `now`.
pub fn parse_retry_after(value: &str, now: Timestamp) -> Option<Duration> {
    if let Ok(seconds) = value.trim().parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let date = jiff::fmt::rfc2822::parse(value.trim()).ok()?.timestamp();
    Some(Duration::try_from(date.duration_since(now)).unwrap_or(Duration::ZERO))
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: RetryPolicy = RetryPolicy {
        attempts: 3,
        base: Duration::from_millis(10),
        cap: Duration::from_millis(100),
        longest_wait: Duration::from_secs(5),
    };

    #[test]
    fn attempts_end_and_progress_renews_them() {
        let mut attempts = POLICY.start();
        assert!(attempts.again(None).is_ok());
        assert!(attempts.again(None).is_ok());
        assert_eq!(attempts.again(None), Err(GiveUp::Spent));
        attempts.progress();
        assert!(attempts.again(None).is_ok());
    }

    #[test]
    fn the_registrys_own_time_goes_first() {
        let mut attempts = POLICY.start();
        assert_eq!(attempts.again(Some(Duration::from_secs(4))), Ok(Duration::from_secs(4)));
        let asked = Duration::from_secs(6);
        assert_eq!(attempts.again(Some(asked)), Err(GiveUp::TooLong(asked)));
    }

    #[test]
    fn retry_after_takes_seconds_and_dates() {
        let now: Timestamp = "2026-11-21T10:00:00Z".parse().unwrap();
        assert_eq!(parse_retry_after("7", now), Some(Duration::from_secs(7)));
        let date = "Sat, 21 Nov 2026 10:00:30 GMT";
        assert_eq!(parse_retry_after(date, now), Some(Duration::from_secs(30)));
        let past = "Sat, 21 Nov 2026 09:00:30 GMT";
        assert_eq!(parse_retry_after(past, now), Some(Duration::ZERO));
        assert_eq!(parse_retry_after("soon", now), None);
    }
}
