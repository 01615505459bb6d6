//! Checks of the store: start, look, stop.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use coordinator_api::error::ErrorBody;
use coordinator_api::fsck::{Fsck, FsckRequest};
use coordinator_api::route;

use crate::http::App;
use crate::http::error::{ApiError, ApiJson};
use crate::identity::caller::Caller;

/// Starts a check of the store, and answers at once.
#[utoipa::path(post, path = route::FSCK, request_body = FsckRequest,
    responses((status = 200, body = Fsck), (status = 409, body = ErrorBody)))]
pub async fn start(
    State(app): State<Arc<App>>,
    caller: Caller,
    ApiJson(request): ApiJson<FsckRequest>,
) -> Result<Json<Fsck>, ApiError> {
    let fsck = Arc::clone(&app.leader()?.fsck);
    Ok(Json(app.blocking(move |_| fsck.start(request, caller.actor())).await?))
}

/// The check that runs, or the last one.
#[utoipa::path(get, path = route::FSCK, responses((status = 200, body = Fsck), (status = 404, body = ErrorBody)))]
pub async fn show(State(app): State<Arc<App>>) -> Result<Json<Fsck>, ApiError> {
    Ok(Json(app.leader()?.fsck.view()?))
}

/// Interrupts the check that runs: a deep one goes on from there when it is started again.
#[utoipa::path(post, path = route::FSCK_STOP,
    responses((status = 200, body = Fsck), (status = 409, body = ErrorBody)))]
pub async fn stop(State(app): State<Arc<App>>, caller: Caller) -> Result<Json<Fsck>, ApiError> {
    Ok(Json(app.leader()?.fsck.stop(caller.actor())?))
}
