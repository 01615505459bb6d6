//! Adds, lists, shows, removes, pauses, resumes and runs schedules, and shows the plan of deadlines.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequestParts, Path, State};
use coordinator_api::error::ErrorBody;
use coordinator_api::event::Severity;
use coordinator_api::route;
use coordinator_api::schedule::{Plan, Run, Schedule, ScheduleList, ScheduleSpec};
use http::request::Parts;

use crate::http::api_state::{ApiState, Leader};
use crate::http::error::ApiError;
use crate::http::extract::{ApiJson, ApiQuery, Leading};
use crate::http::pages::PageQuery;
use crate::identity::caller::Caller;
use crate::plan::scheduler::{ScheduleError, Scheduler};
use crate::state::events::NewEvent;

/// A schedule's name in the path.
pub struct ScheduleName(String);

impl<S: Send + Sync> FromRequestParts<S> for ScheduleName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        let Path(name) = path.map_err(|error: PathRejection| ApiError::invalid(error.body_text()))?;
        Ok(ScheduleName(name))
    }
}

/// Lists the schedules, ordered by name.
#[utoipa::path(get, path = route::SCHEDULES, params(PageQuery),
    responses((status = 200, body = ScheduleList), (status = 400, body = ErrorBody)))]
pub async fn list(
    Leading(leader): Leading,
    ApiQuery(query): ApiQuery<PageQuery>,
) -> Result<Json<ScheduleList>, ApiError> {
    let (scheduler, after) = (Arc::clone(&leader.scheduler), query.after::<String>()?);
    let rest = scheduler.list().into_iter().filter(|schedule| Some(&schedule.spec.name) > after.as_ref());
    let (schedules, next_page) = query.cut(rest.map(|schedule| (schedule.spec.name.clone(), schedule)));
    Ok(Json(ScheduleList { schedules, next_page }))
}

/// Adds a schedule.
#[utoipa::path(post, path = route::SCHEDULES, request_body = ScheduleSpec,
    responses((status = 200, body = Schedule), (status = 400, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn add(
    State(app): State<Arc<ApiState>>,
    caller: Caller,
    ApiJson(spec): ApiJson<ScheduleSpec>,
) -> Result<Json<Schedule>, ApiError> {
    change(&app, &caller, "schedule.added", "was added", move |scheduler| scheduler.add(spec)).await
}

/// Shows one schedule.
#[utoipa::path(get, path = route::SCHEDULE, params(("name" = String, Path, description = "The schedule's name")),
    responses((status = 200, body = Schedule), (status = 404, body = ErrorBody)))]
pub async fn detail(Leading(leader): Leading, ScheduleName(name): ScheduleName) -> Result<Json<Schedule>, ApiError> {
    Ok(Json(leader.scheduler.get(&name)?))
}

/// Removes a schedule. Its jobs go on.
#[utoipa::path(delete, path = route::SCHEDULE, params(("name" = String, Path, description = "The schedule's name")),
    responses((status = 200, body = Schedule), (status = 404, body = ErrorBody)))]
pub async fn remove(
    State(app): State<Arc<ApiState>>,
    caller: Caller,
    ScheduleName(name): ScheduleName,
) -> Result<Json<Schedule>, ApiError> {
    change(&app, &caller, "schedule.removed", "was removed", move |scheduler| scheduler.remove(&name)).await
}

/// Pauses a schedule: it makes no jobs until it is resumed.
#[utoipa::path(post, path = route::SCHEDULE_PAUSE, params(("name" = String, Path, description = "The schedule's name")),
    responses((status = 200, body = Schedule), (status = 404, body = ErrorBody)))]
pub async fn pause(
    State(app): State<Arc<ApiState>>,
    caller: Caller,
    ScheduleName(name): ScheduleName,
) -> Result<Json<Schedule>, ApiError> {
    change(&app, &caller, "schedule.paused", "was paused", move |scheduler| scheduler.set_paused(&name, true)).await
}

/// Resumes a paused schedule. Runs that were due in the meantime are not made up for.
#[utoipa::path(post, path = route::SCHEDULE_RESUME, params(("name" = String, Path, description = "The schedule's name")),
    responses((status = 200, body = Schedule), (status = 404, body = ErrorBody)))]
pub async fn resume(
    State(app): State<Arc<ApiState>>,
    caller: Caller,
    ScheduleName(name): ScheduleName,
) -> Result<Json<Schedule>, ApiError> {
    change(&app, &caller, "schedule.resumed", "goes on", move |scheduler| scheduler.set_paused(&name, false)).await
}

/// Makes a schedule's jobs now.
#[utoipa::path(post, path = route::SCHEDULE_RUN, params(("name" = String, Path, description = "The schedule's name")),
    responses((status = 200, body = Run), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn run(
    Leading(leader): Leading,
    caller: Caller,
    ScheduleName(name): ScheduleName,
) -> Result<Json<Run>, ApiError> {
    let run = leader.scheduler.run_now(&name).await?;
    tell(&leader, "schedule.run", &name, "was run by hand", &caller);
    Ok(Json(run))
}

/// Changes a schedule, and records who changed it, and how.
async fn change(
    app: &Arc<ApiState>,
    caller: &Caller,
    kind: &'static str,
    what: &str,
    work: impl FnOnce(&Scheduler) -> Result<Schedule, ScheduleError> + Send + 'static,
) -> Result<Json<Schedule>, ApiError> {
    let leader = app.leader()?;
    let scheduler = Arc::clone(&leader.scheduler);
    let changed = app.blocking(move |_| work(&scheduler)).await?;
    tell(&leader, kind, &changed.spec.name, what, caller);
    Ok(Json(changed))
}

/// Records who changed a schedule, and how.
fn tell(leader: &Leader, kind: &'static str, name: &str, what: &str, caller: &Caller) {
    let message = format!("schedule {name} {what}");
    leader.events.record(NewEvent::new(Severity::Info, kind, name, message).by(caller.actor()));
}

/// Shows the deadlines, and whether they will be met.
#[utoipa::path(get, path = route::PLAN, responses((status = 200, body = Plan)))]
pub async fn plan(Leading(leader): Leading) -> Result<Json<Plan>, ApiError> {
    let scheduler = Arc::clone(&leader.scheduler);
    Ok(Json(scheduler.plan().await))
}
