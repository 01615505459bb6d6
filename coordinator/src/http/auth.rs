//! The gate: who may use which route.
//!
//! Each route says what it is for ([`Access`]); the gate in front of it finds out who asks and lets them in, or refuses.
//! A token goes before what the kernel says of a peer. Whoever is let in is in the request's extensions as a [`Caller`],
//! which handlers take as an argument.
//!
//! `refusals` guards the times of the last events and is not held during I/O.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::connect_info::ConnectInfo;
use axum::extract::{FromRequestParts, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use coordinator_api::access::Role;
use coordinator_api::error::ErrorCode;
use coordinator_api::event::Severity;
use coordinator_api::route;
use http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method};
use jiff::Timestamp;
use nix::unistd::{Gid, Uid, User, getgrouplist};
use parking_lot::Mutex;

use crate::http::connections::Place;
use crate::http::error::ApiError;
use crate::http::handlers::mirror;
use crate::http::quota::Holder;
use crate::http::streams::DOCUMENT;
use crate::http::{App, Leadership, origin};
use crate::identity::caller::{Caller, Images, LocalRule, Peer, Proof, local_caller};
use crate::identity::tokens::Tokens;
use crate::state::events::{Events, NewEvent};

/// Of one peer's refusals, one in this time becomes an event.
const REFUSAL_EVENTS: Duration = Duration::from_secs(60);
/// How long a standby's request waits until it is known what the leader has changed.
const FOLLOWING: Duration = Duration::from_secs(5);
/// Routes whose answers are short, come late, or take their room themselves.
const SHORT_OR_STREAMED: &[&str] =
    &[route::STATUS, route::EVENTS, route::WAIT, route::EXPORT, route::MIRROR, route::MIRROR_PATH];
/// Peers whose refusals are counted apart.
const REFUSED_PEERS: usize = 1000;

/// Whom a route is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Everybody, unasked: nothing secret, or it asks for proof of its own.
    Open,
    /// Whoever has any role.
    Any,
    /// Viewers and admins, unless they are limited to some images.
    Viewers,
    /// Viewers and admins; to those who are limited to some images the handler shows only what concerns these.
    LimitedViewers,
    /// Hosts and admins; the handler looks whether the image is for them.
    Hosts,
    /// Admins. The gate records what they change.
    Admins,
    /// Admins. The handler records what they change, in its own words.
    TellingAdmins,
}

impl Access {
    /// Whether a role is enough.
    pub fn admits(self, role: Role) -> bool {
        match self {
            Access::Open | Access::Any => true,
            Access::Viewers | Access::LimitedViewers => matches!(role, Role::Viewer | Role::Admin),
            Access::Hosts => matches!(role, Role::Host | Role::Admin),
            Access::Admins | Access::TellingAdmins => role == Role::Admin,
        }
    }

    /// Why it is not for a caller, if it is not.
    fn refusal(self, caller: &Caller) -> Option<String> {
        if !self.admits(caller.role) {
            let (actor, role) = (caller.actor(), caller.role);
            return Some(format!("{actor} has the role {role}, which is not enough for this: ask an admin"));
        }
        let shows_all = self == Access::Viewers && caller.images.is_restricted();
        shows_all.then(|| format!("{} is limited to some images, and this shows all: ask an admin", caller.actor()))
    }
}

/// What a route's methods are for; methods that are not named are refused by the route itself.
pub type Methods = &'static [(&'static str, Access)];

/// Finds out who asks.
pub struct Gate {
    /// What users of this machine may do.
    rules: Arc<[LocalRule]>,
    /// The user that the coordinator runs as.
    own: u32,
    tokens: Arc<Tokens>,
    events: Arc<Events>,
    refusals: Mutex<HashMap<String, Refusals>>,
    /// When a look at what the leader has changed began, the last one that ended. Held during such a look.
    followed: Arc<tokio::sync::Mutex<Option<Instant>>>,
}

/// What one peer was refused.
struct Refusals {
    told: Instant,
    untold: u64,
}

impl Gate {
    /// A gate that knows these tokens and rules.
    pub fn new(rules: Vec<LocalRule>, tokens: Arc<Tokens>, events: Arc<Events>) -> Gate {
        let (own, refusals, followed) = (Uid::effective().as_raw(), Mutex::default(), Arc::default());
        Gate { rules: rules.into(), own, tokens, events, refusals, followed }
    }

    /// Sees to it that what the leader had changed of tokens when this was called is known: for a coordinator that stands by. Those who
    /// ask at a time share a look. Tells whether it is so; a shared disk that does not answer is not waited for.
    async fn follow_leader(&self) -> bool {
        let asked = Instant::now();
        let looking = async {
            let mut followed = Arc::clone(&self.followed).lock_owned().await;
            if followed.is_some_and(|began| began > asked) {
                return true;
            }
            let tokens = Arc::clone(&self.tokens);
            // The thread keeps the others waiting, not the request, which may give up.
            let look = tokio::task::spawn_blocking(move || {
                let began = Instant::now();
                tokens.follow_leader().map(|()| *followed = Some(began))
            });
            match look.await {
                Ok(Ok(())) => true,
                Ok(Err(error)) => {
                    tracing::warn!("what the leader has changed is not known: {error}");
                    false
                }
                Err(_) => false,
            }
        };
        tokio::time::timeout(FOLLOWING, looking).await.unwrap_or(false)
    }

    /// The tokens.
    pub fn tokens(&self) -> &Arc<Tokens> {
        &self.tokens
    }

    /// Who asks: the holder of a token that is shown, or else the peer.
    pub async fn identify(&self, peer: Peer, headers: &HeaderMap, now: Timestamp) -> Result<Caller, ApiError> {
        match (bearer(headers)?, peer) {
            (Some(token), _) => self.holder(&token, now),
            (None, Peer::Loopback(_)) => {
                Ok(Caller { proof: Proof::Nothing, role: Role::Admin, images: Images::default() })
            }
            (None, Peer::Local(_)) => self.user(peer).await,
            (None, Peer::Remote(_)) => Err(ApiError::new(
                ErrorCode::Unauthorized,
                "this coordinator wants a token: give --token-file FILE or CACHEFS_TOKEN (cachefsctl token create makes one)",
            )),
        }
    }

    fn holder(&self, token: &str, now: Timestamp) -> Result<Caller, ApiError> {
        let refused =
            |error: crate::identity::tokens::Rejected| ApiError::new(ErrorCode::Unauthorized, error.to_string());
        let verified = self.tokens.verify(token, now).map_err(refused)?;
        if let Some(id) = verified.to_write {
            let tokens = Arc::clone(&self.tokens);
            tokio::task::spawn_blocking(move || tokens.write_use(&id));
        }
        Ok(verified.caller)
    }

    /// A user of this machine. Their groups are those of the system's database.
    async fn user(&self, peer: Peer) -> Result<Caller, ApiError> {
        let refused = || {
            let add = "an admin can add a [[local_access]] to the coordinator's configuration file";
            ApiError::new(ErrorCode::Forbidden, format!("{peer} may not use this coordinator: {add}"))
        };
        let Peer::Local(Some(account)) = peer else { return Err(refused()) };
        let (own, rules) = (self.own, Arc::clone(&self.rules));
        let find = move || local_caller(account, own, &rules, || groups(account.uid, account.gid));
        let found = match self.rules.is_empty() {
            true => find(),
            false => tokio::task::spawn_blocking(find).await.ok().flatten(),
        };
        found.ok_or_else(refused)
    }

    /// Records that somebody was refused, but not each time.
    pub fn refused(&self, who: &str, what: &str, why: &ApiError, now: Instant) {
        let untold = {
            let mut refusals = self.refusals.lock();
            if refusals.len() >= REFUSED_PEERS && !refusals.contains_key(who) {
                refusals.retain(|_, refusal| now.duration_since(refusal.told) < REFUSAL_EVENTS);
            }
            // A crowd of peers is told of as one.
            let who = if refusals.len() >= REFUSED_PEERS && !refusals.contains_key(who) { "others" } else { who };
            match refusals.get_mut(who) {
                Some(refusal) if now.duration_since(refusal.told) < REFUSAL_EVENTS => {
                    refusal.untold += 1;
                    return;
                }
                Some(refusal) => {
                    refusal.told = now;
                    std::mem::take(&mut refusal.untold)
                }
                None => {
                    refusals.insert(who.to_owned(), Refusals { told: now, untold: 0 });
                    0
                }
            }
        };
        let more = if untold > 0 { format!(" ({untold} more since the last time)") } else { String::new() };
        let message = format!("{who} was refused {what}: {}{more}", why.message());
        self.events.record(NewEvent::new(Severity::Warning, "access.refused", who, message));
    }
}

/// All groups of a user, as far as the system's database knows them.
fn groups(uid: u32, gid: u32) -> Vec<u32> {
    let name =
        User::from_uid(Uid::from_raw(uid)).ok().flatten().and_then(|user| std::ffi::CString::new(user.name).ok());
    let groups = name.and_then(|name| getgrouplist(&name, Gid::from_raw(gid)).ok());
    groups.unwrap_or_default().iter().map(|group| group.as_raw()).collect()
}

/// The token that a request shows: as a bearer token, or as the password of Basic, for programs that know nothing else.
fn bearer(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(value) = headers.get(AUTHORIZATION) else { return Ok(None) };
    let unusable = || {
        ApiError::new(ErrorCode::Unauthorized, "the Authorization header cannot be understood: send Bearer and a token")
    };
    let (scheme, rest) = value.to_str().ok().and_then(|text| text.trim().split_once(' ')).ok_or_else(unusable)?;
    let rest = rest.trim();
    if scheme.eq_ignore_ascii_case("bearer") {
        return Ok(Some(rest.to_owned()));
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return Err(unusable());
    }
    let pair =
        base64::engine::general_purpose::STANDARD.decode(rest).ok().and_then(|pair| String::from_utf8(pair).ok());
    let (_, password) = pair.as_deref().and_then(|pair| pair.split_once(':')).ok_or_else(unusable)?;
    Ok(Some(password.to_owned()))
}

/// What the gate in front of one route needs.
#[derive(Clone)]
pub struct Guard {
    /// The application.
    pub app: Arc<App>,
    /// The route, for events.
    pub path: &'static str,
    /// What it is for.
    pub methods: Methods,
}

impl Guard {
    fn access(&self, method: &Method) -> Access {
        let method = if method == Method::HEAD { &Method::GET } else { method };
        let found = self.methods.iter().find(|(name, _)| name.eq_ignore_ascii_case(method.as_str()));
        found.map_or(Access::Any, |(_, access)| *access)
    }

    /// Refuses requests of other web pages, whatever the route.
    fn check_origin(&self, request: &Parts) -> Result<(), ApiError> {
        let peer = peer_of(&request.extensions);
        let checked = origin::check(&peer, request);
        checked.inspect_err(|problem| {
            self.app.gate.refused(&peer.to_string(), &self.told(request), problem, Instant::now());
        })
    }

    /// What a request wants, for events.
    fn told(&self, request: &Parts) -> String {
        format!("{} {}", request.method, self.path)
    }

    /// A token that the leader has revoked is refused here, too, from then on: a standby looks before it believes one.
    async fn follow_leader(&self, request: &Parts) -> Result<(), ApiError> {
        let stands_by = matches!(&*self.app.leadership.borrow(), Leadership::Standby { .. });
        if !stands_by || !request.headers.contains_key(AUTHORIZATION) || self.app.gate.follow_leader().await {
            return Ok(());
        }
        match &*self.app.leadership.borrow() {
            Leadership::Standby { leader: Some((name, _)) } => Err(ApiError::standby(name)),
            _ => Err(ApiError::standby("another coordinator")),
        }
    }

    async fn admit(&self, access: Access, request: &Parts) -> Result<Caller, ApiError> {
        let peer = peer_of(&request.extensions);
        let gate = &self.app.gate;
        let what = || self.told(request);
        self.follow_leader(request).await?;
        let caller = match gate.identify(peer, &request.headers, Timestamp::now()).await {
            Ok(caller) => {
                request.extensions.get::<Place>().iter().for_each(|place| place.prove());
                caller
            }
            Err(problem) => {
                gate.refused(&peer.to_string(), &what(), &problem, Instant::now());
                return Err(self.elsewhere(request, problem));
            }
        };
        let Some(why) = access.refusal(&caller) else { return Ok(caller) };
        let problem = ApiError::new(ErrorCode::Forbidden, why);
        gate.refused(&caller.actor(), &what(), &problem, Instant::now());
        Err(problem)
    }

    /// Has a request answered. What answers hold in memory until their clients have read them is bounded: for lists that may be long
    /// there is room before they are made.
    async fn answer(&self, holder: &Holder, request: Request, next: Next) -> Result<Response, ApiError> {
        let streams = &self.app.streams;
        let may_be_long = request.method().is_safe() && !SHORT_OR_STREAMED.contains(&self.path);
        let share = match may_be_long {
            true => Some(streams.share(holder, DOCUMENT).await?),
            false => None,
        };
        streams.hold(holder, share, next.run(request).await).await
    }

    /// A standby hears of new tokens late: who shows one that it does not know is sent to the leader.
    fn elsewhere(&self, request: &Parts, problem: ApiError) -> ApiError {
        match (&*self.app.leadership.borrow(), request.headers.contains_key(AUTHORIZATION)) {
            (Leadership::Standby { leader: Some((name, _)) }, true) => ApiError::standby(name),
            _ => problem,
        }
    }
}

/// Whom a request comes from.
pub(super) fn peer_of(extensions: &http::Extensions) -> Peer {
    // A connection that nobody vouches for is nobody's.
    extensions.get::<ConnectInfo<Peer>>().map_or(Peer::Local(None), |info| info.0)
}

/// What to tell of a change by an admin.
fn change(caller: &Caller, request: &Parts) -> NewEvent {
    let target = request.uri.path_and_query().map_or(request.uri.path(), |target| target.as_str());
    let message = format!("{} did {} {target}", caller.actor(), request.method);
    NewEvent::new(Severity::Info, "admin.change", request.uri.path(), message).by(caller.actor())
}

/// The middleware in front of every route.
pub async fn admit(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    let access = guard.access(request.method());
    let (mut parts, body) = request.into_parts();
    let admitted = match guard.check_origin(&parts) {
        Ok(()) if access == Access::Open => return next.run(Request::from_parts(parts, body)).await,
        Ok(()) => guard.admit(access, &parts).await,
        Err(problem) => Err(problem),
    };
    match admitted {
        Ok(caller) => {
            let news = (access == Access::Admins && !parts.method.is_safe()).then(|| change(&caller, &parts));
            let holder = Holder::from(&caller);
            parts.extensions.insert(caller);
            let answered = guard.answer(&holder, Request::from_parts(parts, body), next).await;
            let response = answered.unwrap_or_else(ApiError::into_response);
            if let Some(news) = news.filter(|_| response.status().is_success()) {
                guard.app.events.record(news);
            }
            response
        }
        Err(problem) => {
            // Engines take a Bearer challenge for one of a token server, and ask that; they know Basic by themselves.
            let (mut response, challenge) = match guard.path.starts_with(route::MIRROR) {
                true => (mirror::refused(&problem), "Basic realm=\"cachefs\""),
                false => (problem.clone().into_response(), "Bearer realm=\"cachefs\""),
            };
            if problem.code() == ErrorCode::Unauthorized {
                response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
            }
            response
        }
    }
}

/// Where a request comes from.
pub struct Sender(pub Peer);

impl<S: Send + Sync> FromRequestParts<S> for Sender {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Sender, Self::Rejection> {
        Ok(Sender(peer_of(&parts.extensions)))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Caller, ApiError> {
        let caller = parts.extensions.get::<Caller>().cloned();
        caller.ok_or_else(|| ApiError::internal("this route asks who calls but is open to everybody"))
    }
}

#[cfg(test)]
mod tests;
