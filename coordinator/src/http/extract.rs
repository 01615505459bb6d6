//! Extractors: the arguments of handlers. Each of them refuses with an [`ApiError`].

use std::sync::Arc;

use axum::extract::connect_info::ConnectInfo;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use http::header::CONTENT_TYPE;
use http::request::Parts;
use serde::de::DeserializeOwned;

use crate::http::api_state::{ApiState, Leader};
use crate::http::bodies;
use crate::http::error::ApiError;
use crate::http::quota::Holder;
use crate::identity::caller::{Caller, Peer};

/// The leader's components. A standby refuses and names the leader.
pub struct Leading(pub Arc<Leader>);

impl FromRequestParts<Arc<ApiState>> for Leading {
    type Rejection = ApiError;

    async fn from_request_parts(_: &mut Parts, app: &Arc<ApiState>) -> Result<Leading, ApiError> {
        app.leader().map(Leading)
    }
}

/// Query parameters.
pub struct ApiQuery<T>(pub T);

/// The default limit of JSON bodies, in bytes.
const BODY_MAX: usize = 2 << 20;

/// A JSON body of at most `LIMIT` bytes. Only for routes that authenticate their callers.
pub struct ApiJson<T, const LIMIT: usize = BODY_MAX>(pub T);

/// A job's number in the path.
pub struct ApiId(pub u64);

/// A name in the path.
pub struct ApiName(pub String);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for ApiQuery<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let query = Query::<T>::from_request_parts(parts, state).await;
        let Query(value) = query.map_err(|error: QueryRejection| ApiError::invalid(error.body_text()))?;
        Ok(ApiQuery(value))
    }
}

impl<T: DeserializeOwned, const LIMIT: usize> FromRequest<Arc<ApiState>> for ApiJson<T, LIMIT> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<ApiState>) -> Result<Self, ApiError> {
        let (mut parts, body) = request.into_parts();
        let caller = Caller::from_request_parts(&mut parts, app).await?;
        let kind = parts.headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        // Web pages can send other content types without a preflight request.
        let is_json = kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"));
        if !is_json {
            return Err(ApiError::invalid("the request's body is JSON: send Content-Type: application/json"));
        }
        let gathered = bodies::gather(&app.bodies, &Holder::from(&caller), body, LIMIT, "a request's body").await?;
        let value = serde_json::from_slice(&gathered.bytes);
        value
            .map(ApiJson)
            .map_err(|error| ApiError::invalid(format!("the request's body is not what it should be: {error}")))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for ApiId {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path = Path::<u64>::from_request_parts(parts, state).await;
        let Path(id) = path.map_err(|_: PathRejection| ApiError::invalid("a job's number is a whole number"))?;
        Ok(ApiId(id))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for ApiName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        let Path(name) = path.map_err(|error: PathRejection| ApiError::invalid(error.body_text()))?;
        Ok(ApiName(name))
    }
}

/// The peer that a request comes from.
pub(super) fn peer_of(extensions: &http::Extensions) -> Peer {
    // A connection without a known peer has no rights.
    extensions.get::<ConnectInfo<Peer>>().map_or(Peer::Local(None), |info| info.0)
}

/// The peer that a request comes from.
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
