//! All settings as one document, and the condition of the registries.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use coordinator_api::error::ErrorBody;
use coordinator_api::event::Severity;
use coordinator_api::limits::RegistryCondition;
use coordinator_api::route;
use coordinator_api::settings::{Settings, SettingsAnswer, SettingsRequest};

use crate::admin::settings::{SettingsError, in_words};
use crate::http::api_state::ApiState;
use crate::http::error::ApiError;
use crate::http::extract::{ApiJson, Leading};
use crate::identity::caller::Caller;
use crate::state::events::NewEvent;

/// Shows the present settings, as a document that can be sent back.
#[utoipa::path(get, path = route::SETTINGS, responses((status = 200, body = Settings)))]
pub async fn present(State(app): State<Arc<ApiState>>, Leading(leader): Leading) -> Result<Json<Settings>, ApiError> {
    let book = Arc::clone(&leader.settings);
    Ok(Json(app.blocking(move |_| book.present()).await?))
}

/// Applies a document of settings, or only shows what would change.
#[utoipa::path(put, path = route::SETTINGS, request_body = SettingsRequest,
    responses((status = 200, body = SettingsAnswer), (status = 400, body = ErrorBody)))]
pub async fn apply(
    State(app): State<Arc<ApiState>>,
    Leading(leader): Leading,
    caller: Caller,
    ApiJson(request): ApiJson<SettingsRequest>,
) -> Result<Json<SettingsAnswer>, ApiError> {
    let book = Arc::clone(&leader.settings);
    let SettingsRequest { settings, dry_run } = request;
    let done = app.blocking(move |_| -> Result<_, SettingsError> {
        let warnings = book.warnings(&settings);
        let differences = if dry_run { book.differences(&settings)? } else { book.apply(&settings)? };
        Ok((differences, warnings))
    });
    let (differences, warnings) = done.await?;
    if !dry_run && !differences.is_empty() {
        let message = format!("settings were applied: {}", in_words(&differences));
        leader.events.record(NewEvent::new(Severity::Info, "settings.applied", "settings", message).by(caller.actor()));
    }
    Ok(Json(SettingsAnswer { dry_run, differences, warnings }))
}

/// Shows the condition of the registries: breaker, waits, rate limits, speed.
#[utoipa::path(get, path = route::REGISTRIES, responses((status = 200, body = [RegistryCondition])))]
pub async fn registries(Leading(leader): Leading) -> Result<Json<Vec<RegistryCondition>>, ApiError> {
    Ok(Json(leader.limits.view()))
}
