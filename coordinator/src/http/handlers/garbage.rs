//! Collections, the retention policy, and pins.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use coordinator_api::error::ErrorBody;
use coordinator_api::event::Severity;
use coordinator_api::retention::{
    CollectRequest, CollectionPlan, CollectionStatus, Pin, PinList, PinRequest, RetentionPolicy,
};
use coordinator_api::route;
use coordinator_api::settings::Settings;
use serde::Deserialize;
use store::catalogue::{self, Catalogue};
use store::image::ImageRef;
use utoipa::IntoParams;

use crate::admin::settings::{SettingsError, in_words};
use crate::http::api_state::{ApiState, Leader};
use crate::http::error::ApiError;
use crate::http::extract::{ApiJson, ApiQuery, Leading};
use crate::http::handlers::images::NameQuery;
use crate::http::pages::PageQuery;
use crate::identity::caller::Caller;
use crate::state::clock::timestamp;
use crate::state::events::NewEvent;

/// A grace that replaces the configured one.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct PlanQuery {
    /// How many seconds unreferenced objects stay.
    pub grace_seconds: Option<u64>,
}

/// Shows the running and the last collection.
#[utoipa::path(get, path = route::GC,
    responses((status = 200, body = CollectionStatus), (status = 503, body = ErrorBody)))]
pub async fn status(Leading(leader): Leading) -> Result<Json<CollectionStatus>, ApiError> {
    Ok(Json(leader.garbage.status()))
}

/// Begins a collection.
#[utoipa::path(post, path = route::GC, request_body = CollectRequest,
    responses((status = 200, body = CollectionStatus), (status = 409, body = ErrorBody)))]
pub async fn collect(
    Leading(leader): Leading,
    caller: Caller,
    ApiJson(request): ApiJson<CollectRequest>,
) -> Result<Json<CollectionStatus>, ApiError> {
    let status = leader.garbage.begin(request.grace_seconds, Some(caller.actor()))?;
    let grace = request.grace_seconds.map_or("the policy's grace".to_owned(), |grace| format!("a grace of {grace} s"));
    let message = format!("a collection was begun with {grace}");
    leader.events.record(NewEvent::new(Severity::Info, "collection.begun", "store", message).by(caller.actor()));
    Ok(Json(status))
}

/// Shows what a collection would remove.
#[utoipa::path(get, path = route::GC_PLAN, params(PlanQuery),
    responses((status = 200, body = CollectionPlan), (status = 503, body = ErrorBody)))]
pub async fn plan(
    State(app): State<Arc<ApiState>>,
    Leading(leader): Leading,
    ApiQuery(query): ApiQuery<PlanQuery>,
) -> Result<Json<CollectionPlan>, ApiError> {
    app.blocking(move |_| leader.garbage.plan(query.grace_seconds)).await.map(Json)
}

/// Shows the retention policy.
#[utoipa::path(get, path = route::RETENTION,
    responses((status = 200, body = RetentionPolicy), (status = 503, body = ErrorBody)))]
pub async fn policy(
    State(app): State<Arc<ApiState>>,
    Leading(leader): Leading,
) -> Result<Json<RetentionPolicy>, ApiError> {
    app.blocking(move |_| leader.garbage.policy()).await.map(Json)
}

/// Changes the retention policy.
#[utoipa::path(put, path = route::RETENTION, request_body = RetentionPolicy,
    responses((status = 200, body = RetentionPolicy), (status = 400, body = ErrorBody)))]
pub async fn set_policy(
    State(app): State<Arc<ApiState>>,
    Leading(leader): Leading,
    caller: Caller,
    ApiJson(policy): ApiJson<RetentionPolicy>,
) -> Result<Json<RetentionPolicy>, ApiError> {
    app.blocking(move |_| -> Result<_, SettingsError> {
        let wish = Settings { retention: Some(policy.clone()), ..Settings::default() };
        let differences = leader.settings.differences(&wish)?;
        leader.garbage.set_policy(&policy)?;
        if !differences.is_empty() {
            let message = format!("what is kept was changed: {}", in_words(&differences));
            let event = NewEvent::new(Severity::Info, "retention.changed", "retention", message);
            leader.events.record(event.by(caller.actor()));
        }
        Ok(Json(policy))
    })
    .await
}

/// Lists the pinned names.
#[utoipa::path(get, path = route::PINS, params(PageQuery),
    responses((status = 200, body = PinList), (status = 400, body = ErrorBody)))]
pub async fn pins(
    State(app): State<Arc<ApiState>>,
    ApiQuery(query): ApiQuery<PageQuery>,
) -> Result<Json<PinList>, ApiError> {
    let (after, catalogue) = (query.after::<String>()?, app.blocking(ApiState::read_catalogue).await?);
    let mut all: Vec<Pin> = catalogue.pins().map(|pin| view(&catalogue, pin)).collect();
    all.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    let rest = all.into_iter().filter(|pin| Some(&pin.name) > after.as_ref());
    let (pins, next_page) = query.cut(rest.map(|pin| (pin.name.clone(), pin)));
    Ok(Json(PinList { pins, next_page }))
}

/// Pins a name.
#[utoipa::path(post, path = route::PINS, request_body = PinRequest,
    responses((status = 200, body = Pin), (status = 400, body = ErrorBody)))]
pub async fn pin(
    State(app): State<Arc<ApiState>>,
    Leading(leader): Leading,
    caller: Caller,
    ApiJson(request): ApiJson<PinRequest>,
) -> Result<Json<Pin>, ApiError> {
    let reference: ImageRef = request.name.parse()?;
    app.blocking(move |app| {
        let pin = leader.garbage.pin(&reference)?;
        tell(&leader, &caller, "image.pinned", &pin, "was pinned");
        Ok::<_, ApiError>(Json(view(&app.read_catalogue()?, &pin)))
    })
    .await
}

/// Unpins a name.
#[utoipa::path(delete, path = route::PINS, params(NameQuery),
    responses((status = 200, body = Pin), (status = 404, body = ErrorBody)))]
pub async fn unpin(
    State(app): State<Arc<ApiState>>,
    Leading(leader): Leading,
    caller: Caller,
    ApiQuery(query): ApiQuery<NameQuery>,
) -> Result<Json<Pin>, ApiError> {
    let reference: ImageRef = query.name.parse()?;
    app.blocking(move |app| {
        let pin = leader.garbage.unpin(&reference)?;
        tell(&leader, &caller, "image.unpinned", &pin, "is no longer pinned");
        Ok::<_, ApiError>(Json(view(&app.read_catalogue()?, &pin)))
    })
    .await
}

/// Records who changed a pin, and how.
fn tell(leader: &Leader, caller: &Caller, kind: &'static str, pin: &catalogue::Pin, what: &str) {
    let name = pin.familiar_name();
    let message = format!("image {name} {what}");
    leader.events.record(NewEvent::new(Severity::Info, kind, name, message).by(caller.actor()));
}

fn view(catalogue: &Catalogue, pin: &catalogue::Pin) -> Pin {
    let name = pin.familiar_name();
    let present = name.parse().is_ok_and(|reference| catalogue.find(&reference).is_some());
    Pin { name, since: timestamp(pin.since), present }
}
