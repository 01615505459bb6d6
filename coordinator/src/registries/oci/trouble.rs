//! What a failed request means, and whether another may succeed.

use std::time::Duration;

use http::header::RETRY_AFTER;
use jiff::Timestamp;
use reqwest::{Response, StatusCode};

use crate::registries::error::RegistryError;
use crate::registries::oci::fault::{Failure, Fault, fault};
use crate::registries::oci::reach::Forbidden;
use crate::registries::oci::retry::parse_retry_after;

/// Why an attempt failed, and whether another may succeed.
#[derive(Debug)]
pub enum Trouble {
    /// It will fail again.
    Fatal(RegistryError),
    /// It may pass.
    Passing {
        /// What to report if it does not.
        error: RegistryError,
        /// What the registry asks for.
        retry_after: Option<Duration>,
    },
}

/// The `Retry-After` of an answer.
pub(super) fn retry_after(response: &Response) -> Option<Duration> {
    let header = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
    header.and_then(|value| parse_retry_after(value, Timestamp::now()))
}

/// Whether a status tells of a fault of the server's that may pass. That it does not know a method or a version of HTTP stays so.
pub(super) fn is_fault(status: StatusCode) -> bool {
    status.is_server_error() && !matches!(status.as_u16(), 501 | 505)
}

/// What a status that may pass means: 408, 425, 429 and faults. Others give nothing.
pub fn passing(registry: &str, what: &str, response: &Response) -> Option<Trouble> {
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
    Some(Trouble::Passing { error, retry_after })
}

/// Trouble with a host that a registry leads to.
pub(super) fn at(host: &str, trouble: Trouble) -> Trouble {
    let why = |why: String| format!("it leads to {host}: {why}");
    match trouble {
        Trouble::Fatal(RegistryError::Tls { registry, why: cause }) => {
            Trouble::Fatal(RegistryError::Tls { registry, why: why(cause) })
        }
        Trouble::Fatal(RegistryError::Handshake { registry, why: cause }) => {
            Trouble::Fatal(RegistryError::Handshake { registry, why: why(cause) })
        }
        Trouble::Passing { error: RegistryError::Unreachable { registry, why: cause }, retry_after } => {
            Trouble::Passing { error: RegistryError::Unreachable { registry, why: why(cause) }, retry_after }
        }
        other => other,
    }
}

/// Trouble with trust, with what was passed over when the registry's certificates were read.
pub(super) fn remarked(trouble: Trouble, remarks: &[String]) -> Trouble {
    match trouble {
        Trouble::Fatal(RegistryError::Tls { registry, why }) if !remarks.is_empty() => {
            Trouble::Fatal(RegistryError::Tls { registry, why: format!("{why} ({})", remarks.join("; ")) })
        }
        other => other,
    }
}

/// A redirect that is not followed.
pub(super) fn led(registry: &str, to: String, why: String) -> Trouble {
    Trouble::Fatal(RegistryError::Led { registry: registry.to_owned(), to, why })
}

pub(super) fn forbidden_place(registry: &str, forbidden: Forbidden) -> Trouble {
    let why = forbidden.to_string();
    led(registry, forbidden.host, why)
}

/// A transport failure as trouble with `registry`.
pub(super) fn trouble(registry: &str, error: impl Failure) -> Trouble {
    let registry = registry.to_owned();
    match fault(&error) {
        Fault::Forbidden(forbidden) => forbidden_place(&registry, forbidden),
        Fault::Certificate(why) | Fault::NotTls(why) | Fault::HungUp(why) => {
            Trouble::Fatal(RegistryError::Tls { registry, why })
        }
        Fault::Handshake(why) => Trouble::Fatal(RegistryError::Handshake { registry, why }),
        Fault::Connection(why) => {
            Trouble::Passing { error: RegistryError::Unreachable { registry, why }, retry_after: None }
        }
    }
}
