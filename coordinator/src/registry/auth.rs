//! How we prove who we are: Basic, or a bearer token from the token service that a 401 names.
//!
//! Tokens are kept per registry and repository until shortly before they expire, each a little less long than the others.
//! When one is refused or has expired, the first to notice fetches a new one and everybody else waits for that: no spikes
//! at the token service. Credentials come from the [`Keyring`]; kept ones that are refused are looked up again once.
//!
//! `state` guards the kept authorizations and the fetches under way; it is never held across an await.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use http::Method;
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::time::Instant;

use crate::registry::challenge::Challenge;
use crate::registry::credentials::{Credentials, Secret};
use crate::registry::docker_config::CredentialStore;
use crate::registry::error::RegistryError;
use crate::registry::keyring::{Keyring, spread_out};
use crate::registry::reach::Place;
use crate::registry::redirect::{Redirects, strip};
use crate::registry::transport::{Channel, NamedBy, Peer, Transport, Trouble, passing};

/// What a token is valid for, by the distribution specification, when the service does not say.
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// A token is not used any more this long before it expires: the request has to travel.
const MARGIN: Duration = Duration::from_secs(10);
/// The share of a token's life by which tokens that were fetched together end apart.
const SPREAD: f64 = 0.1;
/// No token is believed to live longer: its service may have miscounted, and rights change.
const LONGEST_LIFE: Duration = Duration::from_secs(24 * 3600);
/// The longest token answer that is read.
const MAX_ANSWER: u64 = 256 << 10;
/// The longest token that is shown: servers refuse longer headers.
const MAX_TOKEN: usize = 64 << 10;
/// So long a header that does not expire is shown: whoever it stands for may have changed in the file.
const HEADER_LIFE: Duration = Duration::from_secs(5 * 60);
/// So many authorizations are kept.
const MOST_KEPT: usize = 1000;

/// One repository of one registry: what a token is good for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Scope {
    /// The registry's host.
    pub registry: String,
    /// The repository's path in it.
    pub repository: String,
}

/// An `Authorization` header's value, and when it stops being good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authorization {
    header: Secret,
    expires: Option<Instant>,
}

impl Authorization {
    /// The header's value.
    pub fn header(&self) -> http::HeaderValue {
        sensitive(&self.header)
    }

    /// One that its giver takes as long as it likes to.
    fn lasting(header: Secret) -> Authorization {
        Authorization { header, expires: Instant::now().checked_add(HEADER_LIFE) }
    }

    fn is_good(&self, now: Instant) -> bool {
        self.expires.is_none_or(|expires| now + MARGIN < expires)
    }
}

type Fetch = Shared<BoxFuture<'static, Result<Authorization, RegistryError>>>;

#[derive(Default)]
struct State {
    kept: HashMap<Scope, Authorization>,
    fetches: HashMap<Scope, Fetch>,
}

impl State {
    /// Keeps an authorization; those that are over go, and if need be the one that ends first.
    fn keep(&mut self, scope: &Scope, authorization: &Authorization) {
        if self.kept.len() >= MOST_KEPT {
            let now = Instant::now();
            self.kept.retain(|_, kept| kept.is_good(now));
        }
        if self.kept.len() >= MOST_KEPT {
            let first = self.kept.iter().min_by_key(|(_, kept)| kept.expires).map(|(scope, _)| scope.clone());
            first.map(|scope| self.kept.remove(&scope));
        }
        self.kept.insert(scope.clone(), authorization.clone());
    }
}

/// Answers challenges.
pub struct Authenticator {
    transport: Arc<Transport>,
    keyring: Arc<Keyring>,
    state: Mutex<State>,
}

impl Authenticator {
    /// An authenticator that knows nothing yet.
    pub fn new(transport: Arc<Transport>, credentials: CredentialStore) -> Authenticator {
        Authenticator { transport, keyring: Arc::new(Keyring::new(credentials)), state: Mutex::default() }
    }

    /// What to send along without being asked.
    pub fn current(&self, scope: &Scope) -> Option<Authorization> {
        self.state.lock().kept.get(scope).filter(|kept| kept.is_good(Instant::now())).cloned()
    }

    /// A new authorization, after `peer`, the registry itself, refused `used` with `challenges`. Credentials of a registry that
    /// speaks TLS do not leave in the clear.
    pub async fn renew(
        &self,
        scope: &Scope,
        challenges: Vec<Challenge>,
        used: Option<&Authorization>,
        peer: Peer,
    ) -> Result<Authorization, RegistryError> {
        let fetch = {
            let mut state = self.state.lock();
            match state.kept.get(scope) {
                Some(kept) if Some(kept) != used && kept.is_good(Instant::now()) => return Ok(kept.clone()),
                _ => {}
            }
            let start = || self.fetch(scope.clone(), challenges, used.cloned(), peer);
            state.fetches.entry(scope.clone()).or_insert_with(start).clone()
        };
        let result = fetch.clone().await;
        let mut state = self.state.lock();
        if state.fetches.get(scope).is_some_and(|present| present.ptr_eq(&fetch)) {
            state.fetches.remove(scope);
            match &result {
                Ok(authorization) => state.keep(scope, authorization),
                Err(_) => drop(state.kept.remove(scope)),
            }
        }
        result
    }

    fn fetch(&self, scope: Scope, challenges: Vec<Challenge>, used: Option<Authorization>, peer: Peer) -> Fetch {
        let (transport, keyring) = (Arc::clone(&self.transport), Arc::clone(&self.keyring));
        async move {
            let credentials = keyring.credentials(&scope.registry, &scope.repository).await?;
            let first = authorize(&transport, &scope, &challenges, &credentials, peer).await;
            let is_refused = match &first {
                Ok(authorization) => used.as_ref().is_some_and(|used| used.header == authorization.header),
                Err(error) => matches!(error, RegistryError::Denied { .. }),
            };
            if !is_refused {
                return first;
            }
            keyring.forget(&credentials);
            let fresh = keyring.credentials(&scope.registry, &scope.repository).await?;
            let second = match fresh == credentials {
                true => first,
                false => authorize(&transport, &scope, &challenges, &fresh, peer).await,
            };
            if matches!(second, Err(RegistryError::Denied { .. })) {
                // Somebody may log in before the next attempt.
                keyring.forget(&fresh);
            }
            second
        }
        .boxed()
        .shared()
    }

    /// The refusal to report when a fresh authorization was not enough.
    pub async fn refusal(&self, scope: &Scope) -> RegistryError {
        match self.keyring.credentials(&scope.registry, &scope.repository).await {
            Ok(credentials) => {
                // Somebody may log in before the next attempt.
                self.keyring.forget(&credentials);
                denied(scope, &credentials)
            }
            Err(error) => error,
        }
    }
}

/// An authorization by these credentials, as the challenges want it.
async fn authorize(
    transport: &Transport,
    scope: &Scope,
    challenges: &[Challenge],
    credentials: &Credentials,
    peer: Peer,
) -> Result<Authorization, RegistryError> {
    let bearer = challenges.iter().find(|challenge| challenge.scheme == "bearer");
    let basic = challenges.iter().any(|challenge| challenge.scheme == "basic");
    match (bearer, credentials) {
        (Some(_), Credentials::Registry(token)) => {
            Ok(Authorization::lasting(Secret::new(format!("Bearer {}", token.expose()))))
        }
        (Some(challenge), _) => fetch_token(transport, scope, challenge, credentials, peer).await,
        (
            None,
            Credentials::Basic { user, password } | Credentials::Identity { password: Some((user, password)), .. },
        ) if basic => Ok(Authorization::lasting(basic_header(user, password))),
        (None, _) if basic => Err(denied(scope, credentials)),
        (None, _) => Err(RegistryError::BadAnswer {
            registry: scope.registry.clone(),
            what: "authorization".to_owned(),
            why: "it answers 401 and asks for neither Basic nor Bearer".to_owned(),
        }),
    }
}

/// 401 or 403 in words.
fn denied(scope: &Scope, credentials: &Credentials) -> RegistryError {
    let registry = &scope.registry;
    let remedy = match credentials {
        Credentials::Anonymous => format!("check the name, or run docker login {registry} as the coordinator's user"),
        _ => format!("check the name and the user's rights, or run docker login {registry} again"),
    };
    RegistryError::Denied {
        registry: registry.clone(),
        image: scope.repository.clone(),
        who: credentials.who(),
        remedy,
    }
}

/// A header's value that nothing shows. One that no header can hold is left empty, and so refused.
pub(super) fn sensitive(text: &Secret) -> http::HeaderValue {
    let mut value = http::HeaderValue::from_str(text.expose()).unwrap_or(http::HeaderValue::from_static(""));
    value.set_sensitive(true);
    value
}

fn basic_header(user: &str, password: &Secret) -> Secret {
    let pair = format!("{user}:{}", password.expose());
    Secret::new(format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair)))
}

/// A token service's answer; both names of the token are in use.
#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

/// Asks the token service that `challenge` names.
async fn fetch_token(
    transport: &Transport,
    scope: &Scope,
    challenge: &Challenge,
    credentials: &Credentials,
    peer: Peer,
) -> Result<Authorization, RegistryError> {
    let realm = realm(transport, scope, challenge, peer)?;
    let host = realm.host_str().unwrap_or_default().to_owned();
    // What proves who we are is for this place alone.
    let redirects = if *credentials == Credentials::Anonymous { Redirects::Followed } else { Redirects::Refused };
    let issued = Instant::now();
    let body = transport
        .persist_briefly(&host, "the token service", || async {
            let request = token_request(transport, &realm, scope, challenge, credentials);
            let response = transport.send(&host, request, NamedBy::Registry(peer), redirects).await?.response;
            if let Some(trouble) = passing(&host, "the token service", &response) {
                return Err(trouble);
            }
            match response.status().as_u16() {
                200..=299 => transport.read(&host, "the token service", response, MAX_ANSWER).await,
                301 | 302 | 303 | 307 | 308 => {
                    Err(Trouble::Fatal(bad_token(&host, "it redirects, and credentials are not sent on")))
                }
                400 | 401 | 403 | 404 => Err(Trouble::Fatal(denied(scope, credentials))),
                _ => Err(Trouble::Fatal(bad_token(&host, response.status()))),
            }
        })
        .await?;
    let answer: TokenAnswer =
        serde_json::from_slice(&body).map_err(|_| bad_token(&host, "it is not the JSON of a token"))?;
    let token = answer.token.or(answer.access_token).filter(|token| !token.is_empty());
    let token = token.ok_or_else(|| bad_token(&host, "it holds no token"))?;
    if token.len() > MAX_TOKEN {
        return Err(bad_token(&host, format!("its token is longer than {MAX_TOKEN} bytes")));
    }
    if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(bad_token(&host, "its token is nothing that a header can hold"));
    }
    let life = answer.expires_in.map_or(DEFAULT_LIFE, Duration::from_secs).clamp(DEFAULT_LIFE, LONGEST_LIFE);
    let life = MARGIN + spread_out(life.saturating_sub(MARGIN), SPREAD);
    Ok(Authorization { header: Secret::new(format!("Bearer {token}")), expires: issued.checked_add(life) })
}

/// An answer of the token service that is no token.
fn bad_token(host: &str, why: impl ToString) -> RegistryError {
    RegistryError::BadAnswer { registry: host.to_owned(), what: "the token request".to_owned(), why: why.to_string() }
}

/// The token service's URL: never plain HTTP for a registry that speaks TLS, nor off this machine for one that is on it, unless
/// the administrator allows it for that host.
fn realm(
    transport: &Transport,
    scope: &Scope,
    challenge: &Challenge,
    peer: Peer,
) -> Result<reqwest::Url, RegistryError> {
    let bad = |why: &str| RegistryError::BadAnswer {
        registry: scope.registry.clone(),
        what: "authorization".to_owned(),
        why: why.to_owned(),
    };
    let realm = challenge.get("realm").ok_or_else(|| bad("its Bearer challenge names no realm"))?;
    let mut url: reqwest::Url = realm.parse().map_err(|_| bad("its Bearer challenge's realm is not a URL"))?;
    strip(&mut url);
    let host = url.host_str().unwrap_or_default();
    let named = url.port().map_or(host.to_owned(), |port| format!("{host}:{port}"));
    let may_be_plain = match (peer.channel, peer.place) {
        (Channel::Tls, _) => false,
        (Channel::Plain, Place::Loopback) => transport.may_be_plain(&named) || transport.may_be_plain(host),
        (Channel::Plain, _) => true,
    };
    match url.scheme() {
        "https" => Ok(url),
        "http" if may_be_plain => Ok(url),
        "http" => Err(bad("it sends us to a token service without TLS")),
        _ => Err(bad("it sends us to a token service that is not on HTTPS")),
    }
}

/// GET for a password or nobody, POST for a refresh token.
fn token_request(
    transport: &Transport,
    realm: &reqwest::Url,
    scope: &Scope,
    challenge: &Challenge,
    credentials: &Credentials,
) -> reqwest::RequestBuilder {
    let wanted = format!("repository:{}:pull", scope.repository);
    let mut parameters = vec![("scope", wanted.as_str())];
    parameters.extend(challenge.get("service").map(|service| ("service", service)));
    match credentials {
        Credentials::Anonymous | Credentials::Registry(_) => {
            transport.request(Method::GET, realm.clone()).query(&parameters)
        }
        Credentials::Basic { user, password } => {
            parameters.push(("account", user));
            let request = transport.request(Method::GET, realm.clone()).query(&parameters);
            request.header(http::header::AUTHORIZATION, sensitive(&basic_header(user, password)))
        }
        Credentials::Identity { token, .. } => {
            parameters.extend([
                ("grant_type", "refresh_token"),
                ("client_id", "cachefs"),
                ("refresh_token", token.expose()),
            ]);
            transport.request(Method::POST, realm.clone()).form(&parameters)
        }
    }
}
