//! Lists events and waits for new ones.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use coordinator_api::error::ErrorBody;
use coordinator_api::event::{Event, EventList};
use coordinator_api::route;
use jiff::Timestamp;
use serde::Deserialize;
use utoipa::IntoParams;

use crate::http::api_state::ApiState;
use crate::http::error::ApiError;
use crate::http::extract::{ApiQuery, Leading};
use crate::identity::caller::Caller;

/// Events that are listed if the request does not say how many.
const LIMIT_DEFAULT: usize = 100;
/// The most events of one answer.
const LIMIT_MAX: usize = 1000;
/// The longest wait: some networks cut connections that are silent for longer.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// Which events to list.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct EventQuery {
    /// Only events with higher numbers.
    #[serde(default)]
    pub after: u64,
    /// How many at most: 100 by default, 1000 at most.
    pub limit: Option<usize>,
    /// Only what happened from this time on.
    #[param(value_type = Option<String>, format = DateTime)]
    pub since: Option<Timestamp>,
    /// How many seconds to wait for an event if there is none: 0 by default, at most 60.
    #[serde(default)]
    pub wait_seconds: f64,
}

/// Whether a caller may see an event: a caller limited to some images sees only events about those images.
fn is_for(caller: &Caller, event: &Event) -> bool {
    let of_image = event.kind.starts_with("job.") || event.kind.starts_with("image.");
    if caller.images.is_restricted() { of_image && caller.images.contain_name(&event.subject) } else { true }
}

/// Lists events after a number, oldest first. If there is none, waits for one, up to the given time.
#[utoipa::path(get, path = route::EVENTS, params(EventQuery),
    responses((status = 200, body = EventList), (status = 400, body = ErrorBody)))]
pub async fn list(
    State(app): State<Arc<ApiState>>,
    Leading(leader): Leading,
    caller: Caller,
    ApiQuery(query): ApiQuery<EventQuery>,
) -> Result<Json<EventList>, ApiError> {
    let events = Arc::clone(&leader.events);
    let limit = query.limit.unwrap_or(LIMIT_DEFAULT).clamp(1, LIMIT_MAX);
    let wait = Duration::try_from_secs_f64(query.wait_seconds)
        .map_err(|_| ApiError::invalid("wait_seconds is a number of seconds, 0 or more"))?
        .min(WAIT_MAX);
    let mut newest = events.newest();
    // A number that has not been assigned yet comes from before a crash, or from another log.
    let after = query.after.min(*newest.borrow());
    let mut last = query.since.map_or(after, |since| after.max(events.before(since)));
    let waiting = async {
        loop {
            let looked_at = events.after(last, limit);
            last = looked_at.last().map_or(last, |event| event.id);
            let seen: Vec<Event> = looked_at.into_iter().filter(|event| is_for(&caller, event)).collect();
            if !seen.is_empty() {
                return seen;
            }
            // The sender lives as long as `events`, so this cannot fail.
            let _ = newest.wait_for(|newest| *newest > last).await;
        }
    };
    let found = tokio::select! {
        biased;
        found = waiting => found,
        () = app.stopping.cancelled() => Vec::new(),
        () = tokio::time::sleep(wait) => Vec::new(),
    };
    Ok(Json(EventList { log: events.name().to_owned(), last, events: found }))
}
