//! Authentication: a caller is the holder of a token, a user of this machine, or nobody. A token takes precedence over the user
//! that the kernel reports.
//!
//! `refusals` guards the times of the last refusals and is not held during I/O.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use coordinator_api::access::Role;
use coordinator_api::error::ErrorCode;
use coordinator_api::event::Severity;
use http::HeaderMap;
use http::header::AUTHORIZATION;
use jiff::Timestamp;
use nix::unistd::{Gid, Uid, User, getgrouplist};
use parking_lot::Mutex;

use crate::http::error::ApiError;
use crate::identity::caller::{Caller, Images, LocalRule, Peer, Proof, local_caller};
use crate::identity::tokens::Tokens;
use crate::state::events::{Events, NewEvent};

/// At most one refusal of each peer becomes an event within this time.
const REFUSAL_EVENTS: Duration = Duration::from_secs(60);
/// How long a request to a standby waits for the standby to read the leader's changes.
const FOLLOWING: Duration = Duration::from_secs(5);
/// Peers whose refusals are counted separately.
pub(super) const REFUSED_PEERS: usize = 1000;

/// Authenticates requests and records refusals.
pub struct Auth {
    /// What users of this machine may do.
    rules: Arc<[LocalRule]>,
    /// The user that the coordinator runs as.
    pub(super) own: u32,
    tokens: Arc<Tokens>,
    events: Arc<Events>,
    refusals: Mutex<HashMap<String, Refusals>>,
    /// When the last completed read of the leader's changes began. Locked during such a read.
    followed: Arc<tokio::sync::Mutex<Option<Instant>>>,
}

/// When a peer's refusal was last recorded, and how many have followed.
struct Refusals {
    told: Instant,
    untold: u64,
}

impl Auth {
    /// Authentication with these tokens and rules.
    pub fn new(rules: Vec<LocalRule>, tokens: Arc<Tokens>, events: Arc<Events>) -> Auth {
        let (own, refusals, followed) = (Uid::effective().as_raw(), Mutex::default(), Arc::default());
        Auth { rules: rules.into(), own, tokens, events, refusals, followed }
    }

    /// Waits until this standby knows every change to tokens that the leader had made when this was called. Concurrent callers
    /// share one read. Returns whether it succeeded; a shared disk that does not answer is given up on after [`FOLLOWING`].
    pub(super) async fn follow_leader(&self) -> bool {
        let asked = Instant::now();
        let looking = async {
            let mut followed = Arc::clone(&self.followed).lock_owned().await;
            if followed.is_some_and(|began| began > asked) {
                return true;
            }
            let tokens = Arc::clone(&self.tokens);
            // The thread keeps the lock, and with it other callers waiting, even if this request gives up.
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

    /// Identifies the caller: by the request's token if it has one, else by the peer.
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

    /// Identifies a user of this machine. Their groups come from the system's database.
    async fn user(&self, peer: Peer) -> Result<Caller, ApiError> {
        let refused = || {
            let add = "an admin can add a [[local_access]] to the coordinator's configuration file";
            ApiError::new(ErrorCode::Forbidden, format!("{peer} may not use this coordinator: {add}"))
        };
        let Peer::Local(Some(account)) = peer else { return Err(refused()) };
        let (own, rules) = (self.own, Arc::clone(&self.rules));
        let find = move || local_caller(account, own, &rules, || groups(account.uid, account.gid));
        let found = if self.rules.is_empty() { find() } else { tokio::task::spawn_blocking(find).await.ok().flatten() };
        found.ok_or_else(refused)
    }

    /// Records that somebody was refused, at most once a minute per peer.
    pub fn refused(&self, who: &str, what: &str, why: &ApiError, now: Instant) {
        let untold = {
            let mut refusals = self.refusals.lock();
            if refusals.len() >= REFUSED_PEERS && !refusals.contains_key(who) {
                refusals.retain(|_, refusal| now.duration_since(refusal.told) < REFUSAL_EVENTS);
            }
            // When there are too many peers, further ones are counted together.
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

/// The token in a request: a bearer token, or the password of Basic authentication, for programs that support nothing else.
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
