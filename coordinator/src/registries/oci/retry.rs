//! How often a request is repeated, and after which pauses.
//!
//! Exponential back-off with jitter, so that many coordinators do not return in step; a registry's own `Retry-After` takes precedence.
//! Progress restarts the count: a long download over a bad line may break any number of times.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

use crate::registries::error::RegistryError;
use crate::registries::oci::attempt_error::AttemptError;

/// How often and how long to retry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Attempts in all, the first included.
    pub attempts: u32,
    /// The first pause.
    pub base: Duration,
    /// The longest pause that the back-off chooses.
    pub cap: Duration,
    /// The longest `Retry-After` that is respected; a longer one ends the job with that reason.
    pub longest_wait: Duration,
}

impl Default for RetryPolicy {
    /// About eight seconds for a registry that is down, and five minutes for one that names a time.
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
    /// The number of attempts so far.
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

    /// Records progress: the count restarts.
    pub fn progress(&mut self) {
        if self.made > 1 {
            self.made = 1;
            self.pauses = self.policy.pauses();
        }
    }
}

/// All attempts at a small document take no longer than this, including the pauses that the registry asks for.
const DOCUMENT_TIMEOUT: Duration = Duration::from_secs(600);

/// Repeats `attempt` at a small document like [`retry`], for [`DOCUMENT_TIMEOUT`] at most.
pub async fn retry_document<T, F>(
    mut attempts: Attempts,
    registry: &str,
    what: &str,
    attempt: impl FnMut() -> F,
) -> Result<T, RegistryError>
where
    F: Future<Output = Result<T, AttemptError>>,
{
    let retried = tokio::time::timeout(DOCUMENT_TIMEOUT, retry(&mut attempts, attempt)).await;
    retried.unwrap_or_else(|_| {
        let why = format!("it did not come within {} seconds in all", DOCUMENT_TIMEOUT.as_secs());
        let (registry, what) = (registry.to_owned(), what.to_owned());
        Err(RegistryError::Failing { registry, what, attempts: attempts.made(), why })
    })
}

/// Repeats `attempt` until it succeeds, fails for good, or no attempts are left.
pub async fn retry<T, F>(attempts: &mut Attempts, mut attempt: impl FnMut() -> F) -> Result<T, RegistryError>
where
    F: Future<Output = Result<T, AttemptError>>,
{
    loop {
        match attempt().await {
            Ok(value) => return Ok(value),
            Err(trouble) => pause(attempts, trouble).await?,
        }
    }
}

/// Waits before the next attempt, or says why there is none.
pub async fn pause(attempts: &mut Attempts, trouble: AttemptError) -> Result<(), RegistryError> {
    let (error, retry_after) = match trouble {
        AttemptError::Fatal(error) => return Err(error),
        AttemptError::Passing { error, retry_after } => (error, retry_after),
    };
    match attempts.again(retry_after) {
        Ok(pause) => {
            tracing::warn!(attempt = attempts.made(), pause_ms = pause.as_millis() as u64, "{error}: trying again");
            tokio::time::sleep(pause).await;
            Ok(())
        }
        Err(reason) => Err(given_up(error, reason, attempts.made())),
    }
}

/// Adds to the error how often it was tried, or how long the registry asks to wait.
fn given_up(error: RegistryError, reason: GiveUp, made: u32) -> RegistryError {
    match (error, reason) {
        (RegistryError::Limited { registry, status, .. }, GiveUp::TooLong(asked)) => {
            let patience = format!("asks to wait {} seconds", asked.as_secs());
            RegistryError::Limited { registry, status, patience }
        }
        (RegistryError::Limited { registry, status, .. }, GiveUp::Spent) => {
            RegistryError::Limited { registry, status, patience: format!("still does after {made} attempts") }
        }
        (RegistryError::Failing { registry, what, why, .. }, _) => {
            RegistryError::Failing { registry, what, attempts: made, why }
        }
        (other, _) => other,
    }
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
}
