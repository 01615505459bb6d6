//! The coordinator's condition as Prometheus metrics.
//!
//! Every value is looked up for each request: each has one source, so a metric cannot go stale. A standby reports only that it is
//! one, and what the catalogue says.

use std::sync::Arc;

use axum::extract::State;
use axum::response::IntoResponse;
use coordinator_api::host::HostState;
use coordinator_api::limits::BreakerState;
use coordinator_api::route;
use coordinator_api::schedule::{Run, RunState};
use coordinator_api::status::{JobCounts, Role, Status};
use http::header::CONTENT_TYPE;
use jiff::Timestamp;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::http::api_state::{ApiState, Leader, Leadership};
use crate::http::error::ApiError;
use crate::http::handlers::status::condition;
use crate::plan::scheduler::free_space;

/// The content type that Prometheus negotiates for this text.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// One label and its value.
type Label = [(&'static str, String); 1];

/// The metrics of one answer.
struct Page(Registry);

impl Page {
    fn gauge(&mut self, name: &str, help: &str, value: u64) {
        let gauge = Gauge::<i64>::default();
        gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        self.0.register(name, help, gauge);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        let counter = Counter::<u64>::default();
        counter.inc_by(value);
        self.0.register(name, help, counter);
    }

    fn gauges(&mut self, name: &str, help: &str, label: &'static str, values: impl IntoIterator<Item = (String, u64)>) {
        let family = Family::<Label, Gauge>::default();
        for (value_of_label, value) in values {
            family.get_or_create(&[(label, value_of_label)]).set(i64::try_from(value).unwrap_or(i64::MAX));
        }
        self.0.register(name, help, family);
    }
}

/// Metrics that every coordinator has.
fn tell_status(page: &mut Page, status: &Status) {
    page.gauge("leading", "Whether this coordinator leads the store", u64::from(status.role == Role::Leader));
    page.gauge("epoch", "The leader's fencing epoch", status.epoch.unwrap_or(0));
    page.gauge("uptime_seconds", "Seconds since this process started", status.uptime_seconds);
    page.gauge("catalogue_generation", "The catalogue's generation", status.generation);
    page.gauge("images", "Images in the catalogue", status.images);
    page.gauge("layers", "Different layers of those images", status.layers);
    page.gauge("layer_bytes", "Bytes of those layers, uncompressed", status.layer_bytes);
    page.counter("fetched_bytes", "Compressed layer bytes that were fetched from registries", status.bytes_fetched);
    let JobCounts { queued, running, published, failed, cancelled } = status.jobs;
    let states = [
        ("queued", queued),
        ("running", running),
        ("published", published),
        ("failed", failed),
        ("cancelled", cancelled),
    ];
    let states = states.map(|(state, count)| (state.to_owned(), count));
    page.gauges("jobs", "Pull jobs that are remembered", "state", states);
}

/// Seconds since 1970.
fn unix(at: Timestamp) -> u64 {
    u64::try_from(at.as_second()).unwrap_or(0)
}

/// Metrics about the store's upkeep: checks and collections.
fn tell_keeping(page: &mut Page, leader: &Leader) {
    // A check or collection that never happened has no time, rather than one long ago.
    if let Ok(check) = leader.fsck.view()
        && let Some(ended) = check.ended_at
    {
        page.gauge("damaged_objects", "Objects that the last check of the store left damaged", check.damaged);
        page.gauge("last_check_timestamp_seconds", "When the last check of the store ended", unix(ended));
    }
    let garbage = leader.garbage.status();
    page.counter("collections", "Collections of garbage that have begun since this coordinator leads", garbage.number);
    page.gauge("collecting", "Whether a collection of garbage runs", u64::from(garbage.running.is_some()));
    if let Some(last) = garbage.last {
        let failures = last.failures.len() as u64 + u64::from(last.stopped.is_some());
        page.gauge("last_collection_timestamp_seconds", "When the last collection began", unix(last.started_at));
        page.gauge("last_collection_freed_bytes", "Bytes that it freed", last.freed_bytes);
        page.gauge("last_collection_failures", "Things that it could not take, or that it broke off", failures);
    }
}

/// Metrics that only the leader has.
fn tell_leader(page: &mut Page, leader: &Leader, status: &Status) {
    let schedules = leader.scheduler.list();
    page.gauge("schedules", "Schedules", schedules.len() as u64);
    let now = Timestamp::now();
    let is_late = |run: &Run| run.state == RunState::Running && run.deadline.is_some_and(|deadline| deadline <= now);
    let late = schedules.iter().filter(|schedule| schedule.runs.iter().any(is_late)).count();
    page.gauge("schedules_late", "Schedules whose deadline has passed while images are missing", late as u64);
    let at_risk = status.deadlines_at_risk;
    page.gauge("schedules_at_risk", "Deadlines that will be missed as things stand", at_risk);
    let states = [HostState::Live, HostState::Expired, HostState::Unmounted];
    page.gauges("hosts", "Hosts", "state", states.map(|state| (state.to_string(), leader.hosts.count(state))));
    let registries = leader.limits.view();
    let open = registries.iter().map(|r| (r.registry.clone(), u64::from(r.breaker != BreakerState::Closed)));
    page.gauges("registry_breaker_open", "Whether a registry is left alone for its failures", "registry", open);
    let fetching = registries.iter().map(|r| (r.registry.clone(), r.fetching as u64));
    page.gauges("registry_fetching", "Layers that are being fetched", "registry", fetching);
    tell_keeping(page, leader);
}

/// The metrics of this coordinator.
#[utoipa::path(get, path = route::METRICS,
    responses((status = 200, body = String, content_type = "application/openmetrics-text")))]
pub async fn metrics(State(app): State<Arc<ApiState>>) -> Result<impl IntoResponse, ApiError> {
    let mut page = Page(Registry::with_prefix("cachefs_coordinator"));
    let status = condition(&app).await?;
    tell_status(&mut page, &status);
    let free = app.blocking(|app| Ok::<_, ApiError>(free_space(&app.store_path))).await?;
    if let Some(free) = free {
        page.gauge("store_free_bytes", "Bytes that may be written to the shared store", free);
    }
    let leadership = app.leadership.borrow().clone();
    if let Leadership::Leading(leader) = leadership {
        tell_leader(&mut page, &leader, &status);
    }
    let mut text = String::new();
    encode(&mut text, &page.0).map_err(|_| ApiError::internal("the metrics cannot be written"))?;
    Ok(([(CONTENT_TYPE, OPEN_METRICS)], text))
}
