//! The middleware in front of every route: authenticates and authorises callers.
//!
//! Each route says who may use it ([`Access`]). An admitted caller is in the request's extensions as a [`Caller`], which handlers
//! take as an argument.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use coordinator_api::error::ErrorCode;
use coordinator_api::event::Severity;
use coordinator_api::route;
use http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use http::request::Parts;
use http::{HeaderValue, Method};
use jiff::Timestamp;

use crate::http::access::{Access, Methods};
use crate::http::api_state::{ApiState, Leadership};
use crate::http::connections::ConnectionPermit;
use crate::http::error::ApiError;
use crate::http::extract::peer_of;
use crate::http::handlers::mirror;
use crate::http::origin;
use crate::http::quota::Holder;
use crate::http::streams::DOCUMENT;
use crate::identity::caller::Caller;
use crate::state::events::NewEvent;

/// Routes whose answers are short, arrive late, or reserve their memory themselves.
const SHORT_OR_STREAMED: &[&str] =
    &[route::STATUS, route::EVENTS, route::WAIT, route::EXPORT, route::MIRROR, route::MIRROR_PATH];

/// What the middleware in front of one route needs.
#[derive(Clone)]
pub struct Guard {
    /// The application.
    pub app: Arc<ApiState>,
    /// The route, for events.
    pub path: &'static str,
    /// The methods, and who may use each.
    pub methods: Methods,
}

impl Guard {
    fn access(&self, method: &Method) -> Access {
        let method = if method == Method::HEAD { &Method::GET } else { method };
        let found = self.methods.iter().find(|(name, _)| name.eq_ignore_ascii_case(method.as_str()));
        found.map_or(Access::Any, |(_, access)| *access)
    }

    /// Refuses requests from other sites' web pages, on every route.
    fn check_origin(&self, request: &Parts) -> Result<(), ApiError> {
        let peer = peer_of(&request.extensions);
        let checked = origin::check(&peer, request);
        checked.inspect_err(|error| {
            self.app.auth.refused(&peer.to_string(), &self.told(request), error, Instant::now());
        })
    }

    /// The request's method and route, for events.
    fn told(&self, request: &Parts) -> String {
        format!("{} {}", request.method, self.path)
    }

    /// Makes a standby read the leader's changes before it trusts a token, so that a revoked token is refused from then on here,
    /// too.
    async fn follow_leader(&self, request: &Parts) -> Result<(), ApiError> {
        let stands_by = matches!(&*self.app.leadership.borrow(), Leadership::Standby { .. });
        if !stands_by || !request.headers.contains_key(AUTHORIZATION) || self.app.auth.follow_leader().await {
            return Ok(());
        }
        match &*self.app.leadership.borrow() {
            Leadership::Standby { leader: Some((name, _)) } => Err(ApiError::standby(name)),
            _ => Err(ApiError::standby("another coordinator")),
        }
    }

    async fn admit(&self, access: Access, request: &Parts) -> Result<Caller, ApiError> {
        let peer = peer_of(&request.extensions);
        let auth = &self.app.auth;
        let what = || self.told(request);
        self.follow_leader(request).await?;
        let caller = match auth.identify(peer, &request.headers, Timestamp::now()).await {
            Ok(caller) => {
                request.extensions.get::<ConnectionPermit>().iter().for_each(|place| place.prove());
                caller
            }
            Err(error) => {
                auth.refused(&peer.to_string(), &what(), &error, Instant::now());
                return Err(self.elsewhere(request, error));
            }
        };
        let Some(why) = access.refusal(&caller) else { return Ok(caller) };
        let error = ApiError::new(ErrorCode::Forbidden, why);
        auth.refused(&caller.actor(), &what(), &error, Instant::now());
        Err(error)
    }

    /// Answers a request. The memory that answers hold until their clients have read them is limited: for lists that may be long,
    /// it is reserved before they are made.
    async fn answer(&self, holder: &Holder, request: Request, next: Next) -> Result<Response, ApiError> {
        let streams = &self.app.streams;
        let may_be_long = request.method().is_safe() && !SHORT_OR_STREAMED.contains(&self.path);
        let share = if may_be_long { Some(streams.share(holder, DOCUMENT).await?) } else { None };
        streams.hold(holder, share, next.run(request).await).await
    }

    /// A standby learns of new tokens late: a request with a token that is unknown here is referred to the leader.
    fn elsewhere(&self, request: &Parts, error: ApiError) -> ApiError {
        match (&*self.app.leadership.borrow(), request.headers.contains_key(AUTHORIZATION)) {
            (Leadership::Standby { leader: Some((name, _)) }, true) => ApiError::standby(name),
            _ => error,
        }
    }
}

/// The event for a change made by an admin.
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
        Err(error) => Err(error),
    };
    match admitted {
        Ok(caller) => {
            let event = (access == Access::Admins && !parts.method.is_safe()).then(|| change(&caller, &parts));
            let holder = Holder::from(&caller);
            parts.extensions.insert(caller);
            let answered = guard.answer(&holder, Request::from_parts(parts, body), next).await;
            let response = answered.unwrap_or_else(ApiError::into_response);
            if let Some(event) = event.filter(|_| response.status().is_success()) {
                guard.app.events.record(event);
            }
            response
        }
        Err(error) => {
            // Container engines take a Bearer challenge for that of a token server and contact it. They support Basic by
            // themselves.
            let (mut response, challenge) = if guard.path.starts_with(route::MIRROR) {
                (mirror::refused(&error), "Basic realm=\"cachefs\"")
            } else {
                (error.clone().into_response(), "Bearer realm=\"cachefs\"")
            };
            if error.code() == ErrorCode::Unauthorized {
                response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
            }
            response
        }
    }
}

#[cfg(test)]
mod tests;
