//! HTTP to a registry: which scheme, which trust, where redirects lead, and what a failure means.
//!
//! Registries are reached over HTTPS. Hosts on the loopback interface and those in `insecure_registries` may use plain HTTP
//! ([`super::scheme`]): nothing is sent in the clear to one that speaks TLS, and a bad certificate is never a reason to fall back.
//! Redirects are followed here, and each is checked ([`super::redirect`], [`super::egress`]).
//!
//! Every request passes the [`Limits`]: it waits for its turn, and its outcome is reported to them. A registry that was left alone because
//! its breaker was open is probed with a request for `/v2/` before anything else is requested.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use coordinator_api::trust::{TrustError, read_certificates};
use http::header::{AUTHORIZATION, CONTENT_ENCODING};
use http::{Method, Uri};
use reqwest::{Client, Request, RequestBuilder, Response, StatusCode, Url};

use crate::registries::error::RegistryError;
use crate::registries::limits::breaker::Pass;
use crate::registries::limits::rate_limit;
use crate::registries::limits::{Limits, OnHold, Outcome, RequestKind, Target};
use crate::registries::oci::attempt_error::{
    AttemptError, at, forbidden_place, is_fault, led, remarked, retry_after, trouble,
};
use crate::registries::oci::body::{DOCUMENT_TIMEOUT, decoded, read_limited};
use crate::registries::oci::clients::{ClientSet, Clients};
use crate::registries::oci::egress::{AddressScope, Names, Reach, SystemNames};
use crate::registries::oci::proxies::{Proxies, ProxyError};
use crate::registries::oci::redirect::{self, API, MOST_REDIRECTS, Redirects, is_same_origin};
use crate::registries::oci::retry::{Attempts, RetryPolicy};
use crate::registries::oci::scheme::{Scheme, Schemes};
use crate::state::clock::{after, until};

/// A registry that does not answer `/v2/` within this time is still down.
const PROBE_TIMEOUT: Duration = Duration::from_secs(30);

/// What the configuration says about connections.
#[derive(Debug, Clone, Default)]
pub struct TransportSettings {
    /// `host` or `host:port` of registries that may speak plain HTTP.
    pub insecure_registries: Vec<String>,
    /// PEM files with CA certificates, trusted in addition to the system's.
    pub ca_certificates: Vec<PathBuf>,
    /// Directories with registries' own certificates, each in a subdirectory `HOST[:PORT]`. The first that has one for a registry counts.
    pub certs_d: Vec<PathBuf>,
    /// How often and how long requests are repeated.
    pub retry: RetryPolicy,
}

/// Settings that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The CA files.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The environment's proxies.
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    /// The HTTP client.
    #[error("HTTPS cannot be set up on this machine: {0}")]
    Client(String),
}

/// What is known about a server that answered: it decides where that server may lead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Where it lies.
    pub place: AddressScope,
    /// Whether TLS was spoken.
    pub channel: Channel,
}

/// The kind of connection to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// TLS: nothing that it leads to is requested in the clear.
    Tls,
    /// Plain HTTP.
    Plain,
}

/// Who named the target of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NamedBy<'a> {
    /// A person: it may be anywhere.
    Person,
    /// A registry.
    Registry {
        /// Its name: its certificates apply to the target.
        name: &'a str,
        /// What is known about it.
        peer: Peer,
    },
}

/// Whether a request is still at the server that it was meant for, or was led to another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    AtHome,
    Led,
}

/// An answer, and who gave it.
#[derive(Debug)]
pub struct Answer {
    /// The answer.
    pub response: Response,
    /// Who gave it.
    pub peer: Peer,
    /// The URL that it came from.
    pub url: Url,
    /// The host that gave it, if redirects led to a server other than the one that was asked.
    pub elsewhere: Option<String>,
}

/// HTTP clients, and what is known about the registries.
#[derive(Debug)]
pub struct Transport {
    clients: Clients,
    insecure: HashSet<String>,
    schemes: Schemes,
    retry: RetryPolicy,
    limits: Arc<Limits>,
    /// Answers requests in place of the network.
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

/// `registry` without its port.
fn host_of(registry: &str) -> &str {
    match registry.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => registry,
    }
}

impl Transport {
    /// Sets the clients up. Reads the CA files.
    pub fn new(settings: &TransportSettings, limits: Arc<Limits>) -> Result<Transport, TransportError> {
        Transport::with_names(settings, limits, &(Arc::new(SystemNames) as Arc<dyn Names>))
    }

    /// The same with another resolver of names.
    pub(crate) fn with_names(
        settings: &TransportSettings,
        limits: Arc<Limits>,
        names: &Arc<dyn Names>,
    ) -> Result<Transport, TransportError> {
        let mut trusted = Vec::new();
        for path in &settings.ca_certificates {
            trusted.extend(read_certificates(path)?);
        }
        let clients = Clients::new(trusted, settings.certs_d.clone(), names, Proxies::of_environment()?);
        Ok(Transport {
            clients: clients.map_err(TransportError::Client)?,
            insecure: settings.insecure_registries.iter().cloned().collect(),
            schemes: Schemes::default(),
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

    /// The limits on requests and bytes.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// A request to be sent by [`Transport::send`].
    pub fn request(&self, method: Method, url: impl reqwest::IntoUrl) -> RequestBuilder {
        // The client that sends it is chosen for each hop; this one only builds it.
        self.clients.shared().client(Reach::Anywhere).request(method, url)
    }

    /// `https://host` or `http://host` of a registry's API.
    pub async fn base(&self, registry: &str) -> Result<String, AttemptError> {
        let host = api_host(registry);
        let scheme = if self.may_be_plain(registry) {
            let clients = self.clients_of(registry).await?;
            self.schemes.of(clients.probe(), host).await.map_err(|error| trouble(registry, error))?
        } else {
            Scheme::Https
        };
        Ok(format!("{}://{host}", scheme.word()))
    }

    /// The clients for requests on behalf of a registry.
    async fn clients_of(&self, registry: &str) -> Result<Arc<ClientSet>, AttemptError> {
        let unusable = |why| RegistryError::Certificates { registry: registry.to_owned(), why };
        self.clients.of(registry).await.map_err(|why| AttemptError::Fatal(unusable(why)))
    }

    /// Whether a host may speak plain HTTP, because it is on this machine or the administrator allows it.
    pub fn may_be_plain(&self, registry: &str) -> bool {
        AddressScope::of_host(host_of(registry)) == Some(AddressScope::Loopback) || self.insecure.contains(registry)
    }

    /// Sends one request when its turn has come, and follows redirects. Transport failures are classified; the caller judges the status.
    pub async fn send(
        &self,
        registry: &str,
        request: RequestBuilder,
        named_by: NamedBy<'_>,
        redirects: Redirects,
    ) -> Result<Answer, AttemptError> {
        let request = request.build().map_err(|error| trouble(registry, error))?;
        let (kind, path) = (kind(&request), request.url().path().to_owned());
        // A target that a registry names is not one of its repositories.
        let is_registrys = matches!(named_by, NamedBy::Person) && path.starts_with(API);
        let (on_behalf_of, reach) = match named_by {
            NamedBy::Person => (registry, Reach::Anywhere),
            NamedBy::Registry { name, peer } => (name, Reach::From(peer.place)),
        };
        let clients = self.clients_of(on_behalf_of).await?;
        let target = Target { registry, repository: repository(&path).filter(|_| is_registrys) };
        let deadline = after(self.limits.now(), self.retry.longest_wait);
        loop {
            let admitted = self.limits.admit(target, kind, until(self.limits.now(), deadline)).await;
            match admitted.map_err(|held| AttemptError::Fatal(held_back(registry, held)))? {
                Pass::Probe if is_registrys => self.probe(registry, request.url(), &clients).await,
                Pass::Probe | Pass::Go => break,
            }
        }
        let mut way = Way::AtHome;
        let answer = self.follow(registry, request, (&clients, reach), redirects, &mut way).await;
        let answer = answer.map_err(|trouble| remarked(trouble, clients.remarks()));
        self.report(target, kind, &answer, way);
        answer
    }

    /// Probes a registry with a request for `/v2/`.
    async fn probe(&self, registry: &str, url: &Url, clients: &ClientSet) {
        let mut root = url.clone();
        root.set_path(API);
        root.set_query(None);
        let mut way = Way::AtHome;
        let request = Request::new(Method::GET, root);
        let asked = self.follow(registry, request, (clients, Reach::Anywhere), Redirects::Followed, &mut way);
        let target = Target::registry(registry);
        match tokio::time::timeout(PROBE_TIMEOUT, asked).await {
            Ok(answer) => self.report(target, RequestKind::Other, &answer, way),
            Err(_) => {
                let why = format!("{API} is not answered within {} seconds", PROBE_TIMEOUT.as_secs());
                self.limits.report(target, Outcome::Unanswered(why), None);
            }
        }
    }

    /// Sends a request and follows its redirects. `way` tells whether it was led to another server, even if it failed.
    async fn follow(
        &self,
        registry: &str,
        mut request: Request,
        (clients, mut reach): (&ClientSet, Reach),
        redirects: Redirects,
        way: &mut Way,
    ) -> Result<Answer, AttemptError> {
        let first = request.url().clone();
        let proof = request.headers().get(AUTHORIZATION).cloned();
        let mut exact = None;
        for _ in 0..=MOST_REDIRECTS {
            let url = request.url().clone();
            let shown = request.headers().contains_key(AUTHORIZATION);
            let again = redirect::copy(&request);
            if !is_same_origin(&url, &first) {
                *way = Way::Led;
            }
            let mut response = self.hop(registry, request, exact.as_ref(), clients, reach).await?;
            let peer = self.peer(&url, &response);
            if let (StatusCode::UNAUTHORIZED, Way::AtHome, false, Some(proof)) =
                (response.status(), *way, shown, &proof)
            {
                // The server that has already seen the credentials asks for them at the place that it led to.
                let mut proven = redirect::copy(&again);
                proven.headers_mut().insert(AUTHORIZATION, proof.clone());
                response = self.hop(registry, proven, exact.as_ref(), clients, reach).await?;
            }
            let onward = redirect::onward(&again, response.status(), response.headers(), redirects);
            let Some(onward) = onward.map_err(|refused| led(registry, refused.host, refused.why))? else {
                let elsewhere = (!is_same_origin(&url, &first)).then(|| host_in(&url).to_owned());
                return Ok(Answer { response, peer, url, elsewhere });
            };
            tracing::debug!("registry {registry} leads from {} to {}", host_in(&url), host_in(onward.request.url()));
            reach = Reach::From(peer.place);
            (request, exact) = (onward.request, onward.exact);
        }
        Err(led(registry, host_in(&first).to_owned(), format!("it redirects more than {MOST_REDIRECTS} times")))
    }

    /// Sends a request without following redirects. `exact` is the target in exact bytes, if the URL would encode it in others.
    async fn hop(
        &self,
        registry: &str,
        request: Request,
        exact: Option<&Uri>,
        clients: &ClientSet,
        reach: Reach,
    ) -> Result<Response, AttemptError> {
        let host = host_in(request.url()).to_owned();
        if reach != Reach::Anywhere && self.clients.is_proxy(&host) {
            return Err(led(registry, host, "it is our proxy".to_owned()));
        }
        reach.check(&host).map_err(|forbidden| forbidden_place(registry, forbidden))?;
        let answer = match exact.filter(|_| !self.clients.is_proxied(request.url())) {
            Some(exact) => {
                let answer = clients.exact(reach).send(request, exact).await;
                answer.map_err(|error| trouble(registry, error))
            }
            None => {
                let answer = self.execute(clients.client(reach), request).await;
                answer.map_err(|error| trouble(registry, error))
            }
        };
        answer.map_err(|trouble| match reach {
            Reach::From(_) if host != host_of(registry) => at(&host, trouble),
            _ => trouble,
        })
    }

    /// Who answered a request for `url`.
    fn peer(&self, url: &Url, response: &Response) -> Peer {
        let host = host_in(url);
        let address = response.remote_addr().filter(|_| !self.clients.is_proxied(url));
        let by_address = address.map(|address| AddressScope::of(address.ip()));
        Peer {
            place: by_address.or(AddressScope::of_host(host)).unwrap_or(AddressScope::Network),
            channel: if url.scheme() == "https" { Channel::Tls } else { Channel::Plain },
        }
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

    /// Reports to the limits how a request ended. Rate-limit headers only count if the registry itself sends them, in answers about
    /// manifests.
    fn report(&self, target: Target<'_>, kind: RequestKind, answer: &Result<Answer, AttemptError>, way: Way) {
        let outcome = match answer {
            Err(AttemptError::Fatal(error) | AttemptError::Passing { error, .. }) => unanswered(error, way),
            Ok(answer) => answered(&answer.response),
        };
        let own = answer.as_ref().ok().filter(|_| (kind, way) == (RequestKind::Manifest, Way::AtHome));
        let rate_limit = own.and_then(|answer| rate_limit::read(answer.response.headers(), self.limits.now()));
        self.limits.report(target, outcome, rate_limit);
    }

    /// Reads the small document in an answer. One that does not arrive in time counts against the registry.
    pub async fn read(
        &self,
        registry: &str,
        what: &str,
        response: Response,
        limit: u64,
    ) -> Result<Bytes, AttemptError> {
        let began = tokio::time::Instant::now();
        let codings = response.headers().get_all(CONTENT_ENCODING).iter().filter_map(|value| value.to_str().ok());
        let coding = codings.collect::<Vec<_>>().join(",");
        let read = read_limited(registry, what, response, limit).await;
        if read.is_ok() {
            self.limits.flowed(registry);
        } else if began.elapsed() >= DOCUMENT_TIMEOUT {
            self.limits.stalled(registry, format!("{what} did not come within {} seconds", DOCUMENT_TIMEOUT.as_secs()));
        }
        decoded(&coding, read?, limit).await.map_err(|why| {
            AttemptError::Fatal(RegistryError::BadAnswer { registry: registry.to_owned(), what: what.to_owned(), why })
        })
    }
}

/// The outcome of an answer, as far as it matters to the limits.
fn answered(response: &Response) -> Outcome {
    let status = response.status();
    let fault = is_fault(status).then(|| status.to_string());
    match (status.as_u16(), retry_after(response), fault) {
        (_, Some(wait), Some(fault)) => Outcome::AskedToWait { wait, fault: Some(fault) },
        (429, Some(wait), None) => Outcome::AskedToWait { wait, fault: None },
        (_, None, Some(fault)) => Outcome::Failed(fault),
        (401 | 403 | 429, _, None) => Outcome::Refused,
        _ => Outcome::Answered,
    }
}

/// The outcome of a request without an answer, as far as it matters to the limits.
fn unanswered(error: &RegistryError, way: Way) -> Outcome {
    match (error, way) {
        // The registry did answer: its answer led there.
        (RegistryError::Led { .. }, _) => Outcome::Refused,
        (error, Way::AtHome) => Outcome::Unanswered(error.to_string()),
        (error, Way::Led) => Outcome::Failed(error.to_string()),
    }
}

/// The repository in `/v2/REPOSITORY/KIND/NAME`.
fn repository(path: &str) -> Option<&str> {
    let (rest, _) = path.strip_prefix(API)?.rsplit_once('/')?;
    rest.rsplit_once('/').map(|(repository, _)| repository)
}

/// The kind that registries count a request as.
fn kind(request: &Request) -> RequestKind {
    if request.method() == Method::GET && request.url().path().contains("/manifests/") {
        RequestKind::Manifest
    } else {
        RequestKind::Other
    }
}

fn held_back(registry: &str, held: OnHold) -> RegistryError {
    RegistryError::Postponed { registry: registry.to_owned(), until: held.until, why: held.why }
}

/// A URL's host, without its port.
fn host_in(url: &Url) -> &str {
    url.host_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_and_named_registries_may_speak_plain_http() {
        let settings = TransportSettings { insecure_registries: vec!["r.io:5000".to_owned()], ..Default::default() };
        let transport = Transport::new(&settings, Arc::default()).unwrap();
        for plain in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.9.9.9", "[::1]:5000", "[::1]", "r.io:5000"]
        {
            assert!(transport.may_be_plain(plain), "{plain}");
        }
        for other in ["localhost.example", "128.0.0.1", "registry:5000", "[::2]:1", "r.io", "r.io:5001"] {
            assert!(!transport.may_be_plain(other), "{other}");
        }
    }

    #[test]
    fn requests_name_the_repository_that_they_are_for() {
        for (path, named) in [
            ("/v2/", None),
            ("/v2/app", None),
            ("/v2/app/manifests/1", Some("app")),
            ("/v2/team/app/blobs/sha256:00", Some("team/app")),
            ("/v2/team/app/tags/list", Some("team/app")),
            ("/v2/a/manifests/manifests/1", Some("a/manifests")),
            ("/token/a/b", None),
        ] {
            assert_eq!(repository(path), named, "{path}");
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
