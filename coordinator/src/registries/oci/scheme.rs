//! Finds out whether a registry that may speak plain HTTP does so.
//!
//! HTTPS is tried first, as docker does, without credentials. Plain HTTP is only used if the host does not speak TLS (nobody listens, or
//! the answer is not TLS) and answers plain HTTP with something other than a redirect to HTTPS. That a host speaks TLS is remembered for
//! good: nothing is sent to it in the clear any more. That it does not is checked again after a while.
//!
//! `known` guards the answers and is never held during I/O.

use std::collections::HashMap;
use std::time::Duration;

use http::header::LOCATION;
use parking_lot::Mutex;
use reqwest::{Client, Response, StatusCode};
use tokio::time::Instant;

use crate::registries::oci::fault::{Fault, fault};

/// The timeout for an answer while finding out which scheme a host speaks.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a host is assumed not to speak TLS.
const PLAIN_FOR: Duration = Duration::from_secs(600);
/// Maximum number of hosts that are remembered.
const MOST_KNOWN: usize = 1000;

/// The scheme by which a host is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scheme {
    /// TLS.
    Https,
    /// Plain HTTP.
    Http,
}

impl Scheme {
    /// The scheme as URLs spell it.
    pub(super) fn word(self) -> &'static str {
        match self {
            Scheme::Https => "https",
            Scheme::Http => "http",
        }
    }
}

/// What hosts were found to speak, and when.
#[derive(Debug, Default)]
pub(super) struct Schemes {
    known: Mutex<HashMap<String, (Scheme, Instant)>>,
}

impl Schemes {
    /// What `host` speaks, found out with `client` if need be.
    pub(super) async fn of(&self, client: &Client, host: &str) -> Result<Scheme, reqwest::Error> {
        let known = self.known.lock().get(host).copied();
        match known {
            Some((Scheme::Https, _)) => return Ok(Scheme::Https),
            Some((Scheme::Http, found)) if found.elapsed() < PLAIN_FOR => return Ok(Scheme::Http),
            _ => {}
        }
        let found = probe(client, host).await?;
        let mut known = self.known.lock();
        if known.len() >= MOST_KNOWN {
            known.retain(|_, (scheme, found)| *scheme == Scheme::Https || found.elapsed() < PLAIN_FOR);
        }
        if known.len() < MOST_KNOWN {
            known.insert(host.to_owned(), (found, Instant::now()));
        }
        Ok(found)
    }
}

/// Tries TLS first, and then plain HTTP if TLS is not spoken.
async fn probe(client: &Client, host: &str) -> Result<Scheme, reqwest::Error> {
    let ask = |scheme: Scheme| {
        let url = format!("{}://{host}/v2/", scheme.word());
        client.get(url).timeout(PROBE_TIMEOUT).send()
    };
    let error = match ask(Scheme::Https).await {
        Ok(_) => return Ok(Scheme::Https),
        Err(error) => error,
    };
    let fault = fault(&error);
    // Once the handshake is done, or was refused because of a certificate or its parameters, TLS was spoken.
    if !error.is_connect() || matches!(fault, Fault::Certificate(_) | Fault::Handshake(_)) {
        return Ok(Scheme::Https);
    }
    let is_plain = matches!(fault, Fault::NotTls(_));
    match ask(Scheme::Http).await {
        Ok(answer) if leads_to_tls(&answer) => Ok(Scheme::Https),
        // A TLS server answers a request in the clear with 400.
        Ok(answer) if answer.status() == StatusCode::BAD_REQUEST && !is_plain => Ok(Scheme::Https),
        Ok(_) => Ok(Scheme::Http),
        Err(error) if error.is_connect() || error.is_timeout() => Err(error),
        // The host does not answer in HTTP.
        Err(_) => Ok(Scheme::Https),
    }
}

/// Whether an answer over plain HTTP redirects to HTTPS.
fn leads_to_tls(answer: &Response) -> bool {
    let location = answer.headers().get(LOCATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
    answer.status().is_redirection() && location.to_ascii_lowercase().starts_with("https:")
}
