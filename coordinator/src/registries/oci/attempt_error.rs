//! What a failed request means, and whether another attempt may succeed.

use std::time::Duration;

use http::header::RETRY_AFTER;
use jiff::Timestamp;
use reqwest::{Response, StatusCode};

use crate::registries::error::RegistryError;
use crate::registries::oci::egress::Forbidden;
use crate::registries::oci::fault::{Failure, Fault, fault};

/// Why an attempt failed, and whether another may succeed.
#[derive(Debug)]
pub enum AttemptError {
    /// It will fail again.
    Fatal(RegistryError),
    /// It may pass.
    Passing {
        /// The error to report if it does not.
        error: RegistryError,
        /// The pause that the registry asks for.
        retry_after: Option<Duration>,
    },
}

/// The `Retry-After` of an answer.
pub(super) fn retry_after(response: &Response) -> Option<Duration> {
    let header = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
    header.and_then(|value| parse_retry_after(value, Timestamp::now()))
}

/// Whether a status reports a fault of the server that may pass. That it does not support a method (501) or an HTTP version (505) does not
/// pass.
pub(super) fn is_fault(status: StatusCode) -> bool {
    status.is_server_error() && !matches!(status.as_u16(), 501 | 505)
}

/// The trouble that a status reports, if it may pass: 408, 425, 429 and faults; `None` for others.
pub fn passing(registry: &str, what: &str, response: &Response) -> Option<AttemptError> {
    let status = response.status();
    let retry_after = retry_after(response);
    let registry = registry.to_owned();
    let error = match status.as_u16() {
        429 => RegistryError::Limited { registry, status: 429, patience: String::new() },
        code if matches!(code, 408 | 425) || is_fault(status) => {
            RegistryError::Failing { registry, what: what.to_owned(), attempts: 1, why: status.to_string() }
        }
        _ => return None,
    };
    Some(AttemptError::Passing { error, retry_after })
}

/// Adds to connection errors which host the registry leads to.
pub(super) fn at(host: &str, trouble: AttemptError) -> AttemptError {
    let why = |why: String| format!("it leads to {host}: {why}");
    match trouble {
        AttemptError::Fatal(RegistryError::Tls { registry, why: cause }) => {
            AttemptError::Fatal(RegistryError::Tls { registry, why: why(cause) })
        }
        AttemptError::Fatal(RegistryError::Handshake { registry, why: cause }) => {
            AttemptError::Fatal(RegistryError::Handshake { registry, why: why(cause) })
        }
        AttemptError::Passing { error: RegistryError::Unreachable { registry, why: cause }, retry_after } => {
            AttemptError::Passing { error: RegistryError::Unreachable { registry, why: why(cause) }, retry_after }
        }
        other => other,
    }
}

/// Adds to errors about trust which certificate files were skipped.
pub(super) fn remarked(trouble: AttemptError, remarks: &[String]) -> AttemptError {
    match trouble {
        AttemptError::Fatal(RegistryError::Tls { registry, why }) if !remarks.is_empty() => {
            AttemptError::Fatal(RegistryError::Tls { registry, why: format!("{why} ({})", remarks.join("; ")) })
        }
        other => other,
    }
}

/// The trouble if a redirect is not followed.
pub(super) fn led(registry: &str, to: String, why: String) -> AttemptError {
    AttemptError::Fatal(RegistryError::Led { registry: registry.to_owned(), to, why })
}

pub(super) fn forbidden_place(registry: &str, forbidden: Forbidden) -> AttemptError {
    let why = forbidden.to_string();
    led(registry, forbidden.host, why)
}

/// Converts a transport failure to trouble with `registry`.
pub(super) fn trouble(registry: &str, error: impl Failure) -> AttemptError {
    let registry = registry.to_owned();
    match fault(&error) {
        Fault::Forbidden(forbidden) => forbidden_place(&registry, forbidden),
        Fault::Certificate(why) | Fault::NotTls(why) | Fault::HungUp(why) => {
            AttemptError::Fatal(RegistryError::Tls { registry, why })
        }
        Fault::Handshake(why) => AttemptError::Fatal(RegistryError::Handshake { registry, why }),
        Fault::Connection(why) => {
            AttemptError::Passing { error: RegistryError::Unreachable { registry, why }, retry_after: None }
        }
    }
}

/// Reads a `Retry-After` value: seconds, or an HTTP date seen from `now`.
fn parse_retry_after(value: &str, now: Timestamp) -> Option<Duration> {
    if let Ok(seconds) = value.trim().parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let date = jiff::fmt::rfc2822::parse(value.trim()).ok()?.timestamp();
    Some(Duration::try_from(date.duration_since(now)).unwrap_or(Duration::ZERO))
}

#[cfg(test)]
mod tests {
    use super::*;

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
