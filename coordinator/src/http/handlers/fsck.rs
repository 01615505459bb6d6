//! Starts, shows and stops checks of the store.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use coordinator_api::error::ErrorBody;
use coordinator_api::fsck::{Fsck, FsckRequest};
use coordinator_api::route;

use crate::http::api_state::ApiState;
use crate::http::error::ApiError;
use crate::http::extract::{ApiJson, Leading};
use crate::identity::caller::Caller;

/// Starts a check of the store and answers at once.
#[utoipa::path(post, path = route::FSCK, request_body = FsckRequest,
    responses((status = 200, body = Fsck), (status = 409, body = ErrorBody)))]
pub async fn start(
    State(app): State<Arc<ApiState>>,
    Leading(leader): Leading,
    caller: Caller,
    ApiJson(request): ApiJson<FsckRequest>,
) -> Result<Json<Fsck>, ApiError> {
    let fsck = Arc::clone(&leader.fsck);
    Ok(Json(app.blocking(move |_| fsck.start(request, caller.actor())).await?))
}

/// Shows the running check, or the last one.
#[utoipa::path(get, path = route::FSCK, responses((status = 200, body = Fsck), (status = 404, body = ErrorBody)))]
pub async fn show(Leading(leader): Leading) -> Result<Json<Fsck>, ApiError> {
    Ok(Json(leader.fsck.view()?))
}

/// Stops the running check. A deep check resumes there when it is started again.
#[utoipa::path(post, path = route::FSCK_STOP,
    responses((status = 200, body = Fsck), (status = 409, body = ErrorBody)))]
pub async fn stop(Leading(leader): Leading, caller: Caller) -> Result<Json<Fsck>, ApiError> {
    Ok(Json(leader.fsck.stop(caller.actor())?))
}
