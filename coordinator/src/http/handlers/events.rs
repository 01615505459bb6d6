//! Events, and waiting for them.

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

use crate::http::App;
use crate::http::error::{ApiError, ApiQuery};
use crate::identity::caller::Caller;

/// Events that are listed if the request does not say how many.
const LIMIT_DEFAULT: usize = 100;
/// The most events of one answer.
const LIMIT_MAX: usize = 1000;
/// The longest wait: connections that say nothing for longer are cut by some networks.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// Which events.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct EventQuery {
    /// Only events with higher numbers.
    #[serde(default)]
    pub after: u64,
    /// How many at most; 100 if it is not said, 1000 at most.
    pub limit: Option<usize>,
    /// Only what happened from this time on.
    #[param(value_type = Option<String>, format = DateTime)]
    pub since: Option<Timestamp>,
    /// How long to wait for one if there is none, at most 60 seconds; not at all if it is not said.
    #[serde(default)]
    pub wait_seconds: f64,
}

/// Whether an event is for a caller: who may see some images only sees what happened to those.
fn is_for(caller: &Caller, event: &Event) -> bool {
    let of_image = event.kind.starts_with("job.") || event.kind.starts_with("image.");
    match caller.images.is_restricted() {
        true => of_image && caller.images.contain_name(&event.subject),
        false => true,
    }
}

/// Events after a number, oldest first. If there is none it waits for one, up to the time given.
#[utoipa::path(get, path = route::EVENTS, params(EventQuery),
    responses((status = 200, body = EventList), (status = 400, body = ErrorBody)))]
pub async fn list(
    State(app): State<Arc<App>>,
    caller: Caller,
    ApiQuery(query): ApiQuery<EventQuery>,
) -> Result<Json<EventList>, ApiError> {
    let events = Arc::clone(&app.leader()?.events);
    let limit = query.limit.unwrap_or(LIMIT_DEFAULT).clamp(1, LIMIT_MAX);
    let wait = Duration::try_from_secs_f64(query.wait_seconds)
        .map_err(|_| ApiError::invalid("wait_seconds is a number of seconds, 0 or more"))?
        .min(WAIT_MAX);
    let mut newest = events.newest();
    // A number that is not given out yet comes from before a crash, or from another log.
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
            // The sender lives as long as `events`.
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
