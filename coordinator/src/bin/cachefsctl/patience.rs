//! Retries while a coordinator restarts or another one takes over. All commands that wait use these rules.
//!
//! An error that may pass ([`ClientError::may_pass`]) is reported once, and the request is repeated every second within a bound.
//! Any other error ends the command at once.

use std::time::Duration;

use coordinator_api::ClientError;
use tokio::time::Instant;

use crate::output::{Output, warn};

/// The pause after a failed request.
const PAUSE: Duration = Duration::from_secs(1);

/// How long a command keeps retrying.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Bound {
    /// Until the command is interrupted.
    Endless,
    /// For this long after the last answer.
    Away(Duration),
    /// Until this time, whether or not there were answers.
    Until(Instant),
}

/// The retries of one command.
#[derive(Debug)]
pub(crate) struct Patience {
    output: Output,
    bound: Bound,
    /// When the first of the present failures happened.
    away: Option<Instant>,
}

impl Patience {
    /// Retries within `bound`.
    pub(crate) fn new(output: Output, bound: Bound) -> Patience {
        Patience { output, bound, away: None }
    }

    /// Sends a request until it is answered, refused for good, or the bound is reached. Then returns the last error.
    pub(crate) async fn ask<T>(&mut self, request: impl AsyncFn() -> Result<T, ClientError>) -> Result<T, ClientError> {
        loop {
            match request().await {
                Ok(answer) => {
                    self.away = None;
                    return Ok(answer);
                }
                Err(error) if error.may_pass() && self.goes_on() => {
                    if self.away.is_none() {
                        warn(self.output, &format!("{error}; trying again"));
                        self.away = Some(Instant::now());
                    }
                    tokio::time::sleep(PAUSE).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether there is time for another attempt.
    fn goes_on(&self) -> bool {
        let next = Instant::now() + PAUSE;
        match self.bound {
            Bound::Endless => true,
            Bound::Away(bound) => self.away.is_none_or(|since| next <= since + bound),
            Bound::Until(end) => next <= end,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use coordinator_api::Address;
    use coordinator_api::error::{ErrorCode, ErrorDetail};

    use super::*;

    fn refused(code: ErrorCode) -> ClientError {
        ClientError::Refused(ErrorDetail { code, message: "no".to_owned() })
    }

    /// How many requests are sent, and how many seconds that takes, if every request fails with `error`.
    async fn insisted(bound: Bound, error: impl Fn() -> ClientError) -> (usize, u64) {
        let (sent, begun) = (Cell::new(0), Instant::now());
        let request = async || {
            sent.set(sent.get() + 1);
            Err::<(), _>(error())
        };
        Patience::new(Output::Text, bound).ask(request).await.unwrap_err();
        (sent.get(), begun.elapsed().as_secs())
    }

    #[tokio::test(start_paused = true)]
    async fn what_may_pass_is_asked_again_within_the_bound() {
        let away = || {
            let source = std::io::ErrorKind::ConnectionRefused.into();
            ClientError::Unreachable { address: Address::default(), source }
        };
        let bound = Duration::from_secs(120);
        assert_eq!(insisted(Bound::Away(bound), away).await, (121, 120));
        let until = |seconds| Bound::Until(Instant::now() + Duration::from_secs(seconds));
        assert_eq!(insisted(until(10), away).await, (11, 10));
        assert_eq!(insisted(until(0), away).await, (1, 0), "who does not want to wait does not");
        assert_eq!(insisted(until(10), || refused(ErrorCode::Standby)).await, (11, 10));
        assert_eq!(insisted(Bound::Endless, || refused(ErrorCode::NotFound)).await, (1, 0));
        let not_let_in = || {
            let source = std::io::ErrorKind::PermissionDenied.into();
            ClientError::Unreachable { address: Address::default(), source }
        };
        assert_eq!(insisted(Bound::Endless, not_let_in).await, (1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn every_answer_renews_the_patience() {
        let (sent, mut patience) = (Cell::new(0), Patience::new(Output::Text, Bound::Away(Duration::from_secs(5))));
        for _ in 0..4 {
            let request = async || {
                sent.set(sent.get() + 1);
                if sent.get() % 5 == 0 { Ok(()) } else { Err(refused(ErrorCode::Busy)) }
            };
            patience.ask(request).await.unwrap();
        }
        assert_eq!(sent.get(), 20);
    }
}
