//! Repeats what may pass: with patience, which ends.

use std::time::Duration;

use crate::registries::error::RegistryError;
use crate::registries::oci::retry::{Attempts, GiveUp};
use crate::registries::oci::trouble::Trouble;

/// All attempts at a small document take no longer than this, with whatever time the registry asks for in between.
const DOCUMENT_PATIENCE: Duration = Duration::from_secs(600);

/// Repeats `attempt` at a small document like [`persist`], for [`DOCUMENT_PATIENCE`] at most.
pub async fn persist_briefly<T, F>(
    mut attempts: Attempts,
    registry: &str,
    what: &str,
    attempt: impl FnMut() -> F,
) -> Result<T, RegistryError>
where
    F: Future<Output = Result<T, Trouble>>,
{
    let persisted = tokio::time::timeout(DOCUMENT_PATIENCE, persist(&mut attempts, attempt)).await;
    persisted.unwrap_or_else(|_| {
        let why = format!("it did not come within {} seconds in all", DOCUMENT_PATIENCE.as_secs());
        let (registry, what) = (registry.to_owned(), what.to_owned());
        Err(RegistryError::Failing { registry, what, attempts: attempts.made(), why })
    })
}

/// Repeats `attempt` until it succeeds, fails for good, or patience ends.
pub async fn persist<T, F>(attempts: &mut Attempts, mut attempt: impl FnMut() -> F) -> Result<T, RegistryError>
where
    F: Future<Output = Result<T, Trouble>>,
{
    loop {
        match attempt().await {
            Ok(value) => return Ok(value),
            Err(trouble) => pause(attempts, trouble).await?,
        }
    }
}

/// Waits before the next attempt, or says why there is none.
pub async fn pause(attempts: &mut Attempts, trouble: Trouble) -> Result<(), RegistryError> {
    let (error, retry_after) = match trouble {
        Trouble::Fatal(error) => return Err(error),
        Trouble::Passing { error, retry_after } => (error, retry_after),
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

/// The error with how patient we were.
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
