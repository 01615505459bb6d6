//! Authentication: Basic, or a bearer token from the token service that a 401 names.
//!
//! A registry may offer several ways to authenticate, and not all of them need work. They are tried one after the other, each once for a
//! request: a token for the repository, a token for what the challenge asks for, the password itself.
//!
//! Authorizations are cached per registry and repository: tokens until shortly before they expire, each randomly shortened, and passwords
//! for as long as a credential look-up is trusted. When one is refused or has expired, the first request to notice fetches a new one and
//! all others wait for that, so there are no spikes at the token service. Credentials come from the [`CredentialCache`]; cached ones that
//! are refused are looked up again once.
//!
//! `state` guards the cached authorizations and the fetches under way; it is never held across an await.

use std::collections::HashMap;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::registries::error::RegistryError;
use crate::registries::oci::authorization_header::{Scope, basic_header, bearer_header, denied, sensitive};
use crate::registries::oci::challenge::Challenge;
use crate::registries::oci::credential_cache::{self, CredentialCache};
use crate::registries::oci::credentials::{Credentials, Secret};
use crate::registries::oci::docker_config::CredentialStore;
use crate::registries::oci::token_service::{self, MARGIN};
use crate::registries::oci::transport::{Peer, Transport};

/// Maximum number of authorizations that are cached.
const MOST_KEPT: usize = 1000;

/// A way to authenticate, in the order in which they are tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    /// A token for pulling from the repository.
    OwnScope,
    /// A token for what the challenge asks for.
    ChallengesScope,
    /// User and password.
    Basic,
}

/// What a registry demands, and which server says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChallengeSet {
    /// Its challenges.
    pub challenges: Vec<Challenge>,
    /// The registry itself.
    pub peer: Peer,
}

/// An `Authorization` header's value, and when it expires.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authorization {
    header: Secret,
    way: Way,
    expires: Option<Instant>,
}

/// What was sent when a registry refused a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused<'a> {
    /// No credentials.
    Nobody,
    /// A cached authorization, which may have become invalid.
    Kept(&'a Authorization),
    /// An authorization that was fetched for this request: this way to authenticate does not work.
    Fresh(&'a Authorization),
}

impl Refused<'_> {
    fn shown(&self) -> Option<&Authorization> {
        match self {
            Refused::Nobody => None,
            Refused::Kept(shown) | Refused::Fresh(shown) => Some(shown),
        }
    }
}

impl Authorization {
    /// The header's value.
    pub fn header(&self) -> http::HeaderValue {
        sensitive(&self.header)
    }

    /// An authorization without an expiry of its own. It is kept for as long as a credential look-up is trusted.
    fn lasting(header: Secret, way: Way) -> Authorization {
        Authorization { header, way, expires: credential_cache::life_from(Instant::now()) }
    }

    fn is_good(&self, now: Instant) -> bool {
        self.expires.is_none_or(|expires| now + MARGIN < expires)
    }
}

/// An authorization that registries accepted or may accept, and what it was made from.
#[derive(Clone)]
struct Kept {
    authorization: Authorization,
    demand: ChallengeSet,
    credentials: Credentials,
}

type Fetch = Shared<BoxFuture<'static, Result<Kept, RegistryError>>>;

#[derive(Default)]
struct State {
    kept: HashMap<Scope, Kept>,
    fetches: HashMap<Scope, Fetch>,
}

impl State {
    /// Caches an authorization. If the cache is full, expired ones are removed and, if need be, the one that expires first.
    fn keep(&mut self, scope: &Scope, fresh: &Kept) {
        if self.kept.len() >= MOST_KEPT {
            let now = Instant::now();
            self.kept.retain(|_, kept| kept.authorization.is_good(now));
        }
        if self.kept.len() >= MOST_KEPT {
            let first = self.kept.iter().min_by_key(|(_, kept)| kept.authorization.expires);
            if let Some(scope) = first.map(|(scope, _)| scope.clone()) {
                self.kept.remove(&scope);
            }
        }
        self.kept.insert(scope.clone(), fresh.clone());
    }
}

/// Answers challenges.
pub struct Authenticator {
    transport: Arc<Transport>,
    credential_cache: Arc<CredentialCache>,
    state: Mutex<State>,
}

impl Authenticator {
    /// An authenticator with an empty cache.
    pub fn new(transport: Arc<Transport>, credentials: CredentialStore) -> Authenticator {
        Authenticator {
            transport,
            credential_cache: Arc::new(CredentialCache::new(credentials)),
            state: Mutex::default(),
        }
    }

    /// The cached authorization to send without being asked, if it is still valid.
    pub fn current(&self, scope: &Scope) -> Option<Authorization> {
        let state = self.state.lock();
        let kept = state.kept.get(scope).filter(|kept| kept.authorization.is_good(Instant::now()));
        kept.map(|kept| kept.authorization.clone())
    }

    /// The demand that the cached authorization answered.
    pub fn last_demand(&self, scope: &Scope) -> Option<ChallengeSet> {
        self.state.lock().kept.get(scope).map(|kept| kept.demand.clone())
    }

    /// Whether the credentials have changed since `used` was made from them, or `used` is no longer cached. Looks them up.
    pub async fn is_outdated(&self, scope: &Scope, used: &Authorization) -> Result<bool, RegistryError> {
        let with = self.state.lock().kept.get(scope).filter(|kept| kept.authorization == *used).cloned();
        let Some(kept) = with else { return Ok(true) };
        self.credential_cache.forget(&kept.credentials);
        Ok(self.credential_cache.credentials(&scope.registry, &scope.repository).await? != kept.credentials)
    }

    /// Gets a new authorization after the registry refused what was sent and answered with this demand; `None` if there is no other.
    /// Credentials of a registry that speaks TLS are not sent in the clear.
    pub async fn renew(
        &self,
        scope: &Scope,
        demand: ChallengeSet,
        refused: Refused<'_>,
    ) -> Result<Option<Authorization>, RegistryError> {
        let shown = refused.shown();
        let fetch = {
            let mut state = self.state.lock();
            match state.kept.get(scope).map(|kept| &kept.authorization) {
                Some(kept) if Some(kept) != shown && kept.is_good(Instant::now()) => return Ok(Some(kept.clone())),
                _ => {}
            }
            let start = || self.fetch(scope.clone(), demand, refused);
            state.fetches.entry(scope.clone()).or_insert_with(start).clone()
        };
        let result = fetch.clone().await;
        let mut state = self.state.lock();
        if state.fetches.get(scope).is_some_and(|present| present.ptr_eq(&fetch)) {
            state.fetches.remove(scope);
            match &result {
                Ok(fresh) => state.keep(scope, fresh),
                Err(_) => drop(state.kept.remove(scope)),
            }
        }
        let fresh = result?.authorization;
        Ok(Some(fresh).filter(|fresh| shown.is_none_or(|shown| shown.header != fresh.header)))
    }

    fn fetch(&self, scope: Scope, demand: ChallengeSet, refused: Refused<'_>) -> Fetch {
        let (transport, credential_cache) = (Arc::clone(&self.transport), Arc::clone(&self.credential_cache));
        let after = match refused {
            Refused::Fresh(shown) => Some(shown.way),
            Refused::Nobody | Refused::Kept(_) => None,
        };
        let used = refused.shown().map(|shown| shown.header.clone());
        async move {
            let credentials = credential_cache.credentials(&scope.registry, &scope.repository).await?;
            let first = authorize(&transport, &scope, &demand, &credentials, after).await;
            let is_refused = match &first {
                Ok(authorization) => used.as_ref() == Some(&authorization.header),
                Err(error) => error.is_denial(),
            };
            if !is_refused {
                return first.map(|authorization| Kept { authorization, demand, credentials });
            }
            credential_cache.forget(&credentials);
            let fresh = credential_cache.credentials(&scope.registry, &scope.repository).await?;
            let second =
                if fresh == credentials { first } else { authorize(&transport, &scope, &demand, &fresh, None).await };
            if second.as_ref().is_err_and(RegistryError::is_denial) {
                // Somebody may log in before the next attempt.
                credential_cache.forget(&fresh);
            }
            second.map(|authorization| Kept { authorization, demand, credentials: fresh })
        }
        .boxed()
        .shared()
    }

    /// The error to report when a fresh authorization was refused, too.
    pub async fn refusal(&self, scope: &Scope) -> RegistryError {
        match self.credential_cache.credentials(&scope.registry, &scope.repository).await {
            Ok(credentials) => {
                // Somebody may log in before the next attempt.
                self.credential_cache.forget(&credentials);
                self.state.lock().kept.remove(scope);
                denied(scope, &credentials)
            }
            Err(error) => error,
        }
    }
}

/// The ways that a demand offers to these credentials, in order.
fn ways(scope: &Scope, demand: &ChallengeSet, credentials: &Credentials) -> Vec<Way> {
    let bearer = demand.challenges.iter().find(|challenge| challenge.scheme == "bearer");
    let is_other = |challenge: &&Challenge| token_service::is_other_scope(scope, challenge);
    let basic = demand.challenges.iter().any(|challenge| challenge.scheme == "basic");
    let knows_password = credentials.password().is_some();
    [
        bearer.map(|_| Way::OwnScope),
        bearer.filter(is_other).map(|_| Way::ChallengesScope),
        (basic && knows_password).then_some(Way::Basic),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Makes an authorization from these credentials, by the first way that the registry offers `after` this one. If a token service denies
/// access, the ways without one are still tried.
async fn authorize(
    transport: &Transport,
    scope: &Scope,
    demand: &ChallengeSet,
    credentials: &Credentials,
    after: Option<Way>,
) -> Result<Authorization, RegistryError> {
    let ways = ways(scope, demand, credentials);
    let is_known = |scheme: &str| demand.challenges.iter().any(|challenge| challenge.scheme == scheme);
    if !is_known("bearer") && !is_known("basic") {
        return Err(RegistryError::BadAnswer {
            registry: scope.registry.clone(),
            what: "authorization".to_owned(),
            why: "it answers 401 and asks for neither Basic nor Bearer".to_owned(),
        });
    }
    let mut refusal = denied(scope, credentials);
    for way in ways.into_iter().filter(|way| after.is_none_or(|after| *way > after)) {
        match by(way, transport, scope, demand, credentials).await {
            Err(error) if error.is_denial() => refusal = error,
            other => return other,
        }
    }
    Err(refusal)
}

/// Makes an authorization by one way.
async fn by(
    way: Way,
    transport: &Transport,
    scope: &Scope,
    demand: &ChallengeSet,
    credentials: &Credentials,
) -> Result<Authorization, RegistryError> {
    if let (Way::Basic, Some((user, password))) = (way, credentials.password()) {
        return Ok(Authorization::lasting(basic_header(user, password), way));
    }
    if let Credentials::Registry(token) = credentials {
        return Ok(Authorization::lasting(bearer_header(token.expose()), way));
    }
    let challenge = demand.challenges.iter().find(|challenge| challenge.scheme == "bearer");
    let Some(challenge) = challenge else { return Err(denied(scope, credentials)) };
    let wanted = match way {
        Way::ChallengesScope => token_service::scopes_of(challenge),
        _ => vec![token_service::own_scope(scope)],
    };
    let request = token_service::TokenRequest { scope, challenge, wanted, credentials, peer: demand.peer };
    let (header, expires) = token_service::fetch(transport, &request).await?;
    Ok(Authorization { header, way, expires })
}
