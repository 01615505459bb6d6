//! HTTP to a registry: which scheme, which trust, and what a failure means.
//!
//! Registries are spoken to over HTTPS. Hosts on the loopback and those in `insecure_registries` may answer in plain
//! HTTP: which of the two they speak is found out once, and one that speaks TLS is never spoken to in the clear. A bad
//! certificate is never a reason to fall back.
//!
//! Every request passes the [`Limits`]: it waits for its turn, and how it ends is told to them.
//!
//! `schemes` guards the answers to that question and is never held during I/O.

use std::collections::{HashMap, HashSet};
use std::error::Error as StdError;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use coordinator_api::trust::{TrustError, client_config, explain};
use http::Method;
use http::header::RETRY_AFTER;
use jiff::Timestamp;
use parking_lot::Mutex;
use reqwest::{Client, Request, RequestBuilder, Response, StatusCode};

use crate::limits::{Held, Limits, Outcome, RequestKind, allowance};
use crate::registry::error::RegistryError;
use crate::registry::retry::{Attempts, GiveUp, RetryPolicy, parse_retry_after};

/// A connection that is not there after this is not coming.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Silence on an open connection; a break is resumed, so this may be short.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// A manifest, config or token takes no longer than this, however it trickles.
const DOCUMENT_TIMEOUT: Duration = Duration::from_secs(120);
/// Patience when finding out which scheme a host speaks.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

/// What the configuration says about connections.
#[derive(Debug, Clone, Default)]
pub struct TransportSettings {
    /// `host` or `host:port` of registries that may speak plain HTTP.
    pub insecure_registries: Vec<String>,
    /// PEM files with CA certificates, trusted in addition to the system's.
    pub ca_certificates: Vec<PathBuf>,
    /// Patience.
    pub retry: RetryPolicy,
}

/// Settings that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The CA files.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The HTTP client.
    #[error("HTTPS cannot be set up on this machine: {0}")]
    Client(String),
}

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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scheme {
    Https,
    Http,
}

/// HTTP clients and what is known of the registries.
#[derive(Debug)]
pub struct Transport {
    /// For hosts elsewhere: uses the system's proxies.
    outward: Client,
    /// For the loopback: never a proxy.
    local: Client,
    insecure: HashSet<String>,
    schemes: Mutex<HashMap<String, Scheme>>,
    retry: RetryPolicy,
    limits: Arc<Limits>,
    /// What answers instead of the network.
    #[cfg(test)]
    pub(crate) stand_in: Option<Arc<dyn StandIn>>,
}

/// Answers requests in tests that must not depend on sockets, so that time can be simulated.
#[cfg(test)]
pub(crate) trait StandIn: std::fmt::Debug + Send + Sync {
    /// The answer to one request.
    fn answer(&self, request: Request) -> futures::future::BoxFuture<'static, reqwest::Result<Response>>;
}

/// The host that serves a registry's API: Docker Hub's differs from its name.
fn api_host(registry: &str) -> &str {
    match registry {
        "docker.io" => "registry-1.docker.io",
        other => other,
    }
}

/// Whether `registry` is this machine.
fn is_loopback(registry: &str) -> bool {
    let host = match registry.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => registry.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

impl Transport {
    /// Sets the clients up. Reads the CA files.
    pub fn new(settings: &TransportSettings, limits: Arc<Limits>) -> Result<Transport, TransportError> {
        let tls = client_config(&settings.ca_certificates)?;
        let build = |proxied: bool| {
            let builder = Client::builder()
                .use_preconfigured_tls(tls.clone())
                .user_agent(concat!("cachefs/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(CONNECT_TIMEOUT)
                .read_timeout(READ_TIMEOUT);
            let builder = if proxied { builder } else { builder.no_proxy() };
            builder.build().map_err(|error| TransportError::Client(root_cause(&error)))
        };
        Ok(Transport {
            outward: build(true)?,
            local: build(false)?,
            insecure: settings.insecure_registries.iter().cloned().collect(),
            schemes: Mutex::new(HashMap::new()),
            retry: settings.retry,
            limits,
            #[cfg(test)]
            stand_in: None,
        })
    }

    /// Starts counting attempts.
    pub fn attempts(&self) -> Attempts {
        self.retry.start()
    }

    /// What requests and bytes are limited by.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The client to reach `host` with.
    pub fn client(&self, host: &str) -> &Client {
        if is_loopback(host) { &self.local } else { &self.outward }
    }

    /// `https://host` or `http://host` of a registry's API.
    pub async fn base(&self, registry: &str) -> Result<String, Trouble> {
        let host = api_host(registry);
        if !is_loopback(registry) && !self.insecure.contains(registry) {
            return Ok(format!("https://{host}"));
        }
        let known = self.schemes.lock().get(registry).copied();
        let scheme = match known {
            Some(scheme) => scheme,
            None => {
                let found = self.probe(registry).await?;
                self.schemes.lock().insert(registry.to_owned(), found);
                found
            }
        };
        Ok(match scheme {
            Scheme::Https => format!("https://{host}"),
            Scheme::Http => format!("http://{host}"),
        })
    }

    /// Asks in the clear, anonymously. A TLS server refuses that at once (with 400, an alert or by hanging up), while
    /// a plain one might wait for ever for the line end that a TLS greeting lacks: hence this order.
    async fn probe(&self, registry: &str) -> Result<Scheme, Trouble> {
        let host = api_host(registry);
        let ask =
            |scheme: &str| self.client(registry).get(format!("{scheme}://{host}/v2/")).timeout(PROBE_TIMEOUT).send();
        match ask("http").await {
            Ok(answer) if answer.status() != StatusCode::BAD_REQUEST => return Ok(Scheme::Http),
            Err(error) if error.is_connect() || error.is_timeout() => return Err(trouble(registry, error)),
            Ok(_) | Err(_) => {}
        }
        match ask("https").await.map_err(|error| fault(&error)) {
            Ok(_) | Err(Fault::Certificate(_)) => Ok(Scheme::Https),
            Err(Fault::NotTls(_) | Fault::Connection(_)) => Ok(Scheme::Http),
        }
    }

    /// Sends one request when its turn has come; transport failures are classified, statuses are the caller's.
    pub async fn send(&self, registry: &str, request: RequestBuilder) -> Result<Response, Trouble> {
        let (client, request) = request.build_split();
        let request = request.map_err(|error| trouble(registry, error))?;
        let admitted = self.limits.admit(registry, kind(&request), self.retry.longest_wait).await;
        admitted.map_err(|held| Trouble::Fatal(held_back(registry, held)))?;
        let answer = self.execute(&client, request).await.map_err(|error| trouble(registry, error));
        self.report(registry, &answer);
        answer
    }

    #[cfg(not(test))]
    async fn execute(&self, client: &Client, request: Request) -> reqwest::Result<Response> {
        client.execute(request).await
    }

    #[cfg(test)]
    async fn execute(&self, client: &Client, request: Request) -> reqwest::Result<Response> {
        match &self.stand_in {
            Some(stand_in) => stand_in.answer(request).await,
            None => client.execute(request).await,
        }
    }

    /// Tells the limits how a request ended.
    fn report(&self, registry: &str, answer: &Result<Response, Trouble>) {
        let outcome = match answer {
            Err(Trouble::Fatal(error) | Trouble::Passing { error, .. }) => Outcome::Failed(error.to_string()),
            Ok(response) => {
                let fault = response.status().is_server_error().then(|| response.status().to_string());
                match (retry_after(response), fault) {
                    (Some(wait), fault) if fault.is_some() || response.status() == StatusCode::TOO_MANY_REQUESTS => {
                        Outcome::AskedToWait { wait, fault }
                    }
                    (_, Some(fault)) => Outcome::Failed(fault),
                    (_, None) => Outcome::Answered,
                }
            }
        };
        let allowance =
            answer.as_ref().ok().and_then(|response| allowance::read(response.headers(), self.limits.now()));
        self.limits.report(registry, outcome, allowance);
    }

    /// Repeats `attempt` until it succeeds, fails for good, or patience ends.
    pub async fn persist<T, F>(
        &self,
        attempts: &mut Attempts,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T, RegistryError>
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
}

/// What registries count a request as.
fn kind(request: &Request) -> RequestKind {
    match request.method() == Method::GET && request.url().path().contains("/manifests/") {
        true => RequestKind::Manifest,
        false => RequestKind::Other,
    }
}

fn held_back(registry: &str, held: Held) -> RegistryError {
    RegistryError::Held { registry: registry.to_owned(), until: held.until, why: held.why }
}

/// The `Retry-After` of an answer.
fn retry_after(response: &Response) -> Option<Duration> {
    let header = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
    header.and_then(|value| parse_retry_after(value, Timestamp::now()))
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

/// What a status that may pass means: 408, 425, 429 and 5xx. Others give nothing.
pub fn passing(registry: &str, what: &str, response: &Response) -> Option<Trouble> {
    let status = response.status();
    let retry_after = retry_after(response);
    let registry = registry.to_owned();
    let error = match status.as_u16() {
        429 => RegistryError::Limited { registry, status: 429, patience: String::new() },
        408 | 425 | 500..=599 => {
            RegistryError::Failing { registry, what: what.to_owned(), attempts: 1, why: status.to_string() }
        }
        _ => return None,
    };
    Some(Trouble::Passing { error, retry_after })
}

/// The whole body, up to `limit` bytes, within [`DOCUMENT_TIMEOUT`]: a trickle would hold its job for ever.
pub async fn read_limited(registry: &str, what: &str, response: Response, limit: u64) -> Result<Bytes, Trouble> {
    match tokio::time::timeout(DOCUMENT_TIMEOUT, read_all(registry, what, response, limit)).await {
        Ok(read) => read,
        Err(_) => {
            let why = format!("it did not come within {} seconds", DOCUMENT_TIMEOUT.as_secs());
            let (registry, what) = (registry.to_owned(), what.to_owned());
            let error = RegistryError::Failing { registry, what, attempts: 1, why };
            Err(Trouble::Passing { error, retry_after: None })
        }
    }
}

async fn read_all(registry: &str, what: &str, mut response: Response, limit: u64) -> Result<Bytes, Trouble> {
    let mut bytes = BytesMut::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| trouble(registry, error))? {
        if (bytes.len() + chunk.len()) as u64 > limit {
            let why = format!("it is longer than {limit} bytes");
            let error = RegistryError::BadAnswer { registry: registry.to_owned(), what: what.to_owned(), why };
            return Err(Trouble::Fatal(error));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes.freeze())
}

/// What kind of transport failure this is.
enum Fault {
    /// The peer speaks TLS but is not trusted, or does not trust us.
    Certificate(String),
    /// The peer does not speak TLS.
    NotTls(String),
    /// No connection, or a broken one.
    Connection(String),
}

/// The causes of an error, outermost first, looking into `io::Error`s, which hide theirs.
fn causes<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn StdError + 'static)| {
        let error: &'a (dyn StdError + 'static) = *error;
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        match inner {
            Some(inner) => Some(inner as &(dyn StdError + 'static)),
            None => error.source(),
        }
    })
}

/// The innermost cause in words: outer layers only repeat that there was an error (and the URL, which may be signed).
fn root_cause(error: &(dyn StdError + 'static)) -> String {
    causes(error).last().map(ToString::to_string).unwrap_or_default()
}

fn fault(error: &reqwest::Error) -> Fault {
    let why = root_cause(error);
    if let Some(tls) = causes(error).find_map(|cause| cause.downcast_ref::<rustls::Error>()) {
        return match tls {
            rustls::Error::InvalidMessage(_) => Fault::NotTls("it does not speak TLS".to_owned()),
            rustls::Error::InvalidCertificate(reason) => Fault::Certificate(explain(reason)),
            _ => Fault::Certificate(why),
        };
    }
    // A peer that hangs up on our greeting does not speak TLS either.
    let hung_up = causes(error)
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|error| matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset));
    match error.is_connect() && hung_up {
        true => Fault::NotTls(why),
        false if error.is_timeout() => Fault::Connection("it does not answer in time".to_owned()),
        false => Fault::Connection(why),
    }
}

/// A transport failure as trouble with `registry`.
pub fn trouble(registry: &str, error: reqwest::Error) -> Trouble {
    let registry = registry.to_owned();
    match fault(&error) {
        Fault::Certificate(why) | Fault::NotTls(why) => Trouble::Fatal(RegistryError::Tls { registry, why }),
        Fault::Connection(why) => {
            Trouble::Passing { error: RegistryError::Unreachable { registry, why }, retry_after: None }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_recognised() {
        for local in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.9.9.9", "[::1]:5000"] {
            assert!(is_loopback(local), "{local}");
        }
        for other in ["localhost.example", "128.0.0.1", "registry:5000", "[::2]:1"] {
            assert!(!is_loopback(other), "{other}");
        }
    }

    #[test]
    fn a_bad_ca_file_is_named() {
        let settings =
            TransportSettings { ca_certificates: vec![PathBuf::from("/nonexistent/ca.pem")], ..Default::default() };
        let error = Transport::new(&settings, Arc::default()).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/ca.pem"), "{error}");
    }
}
