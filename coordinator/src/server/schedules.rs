//! Schedules: list, add, look, remove, pause, resume, run now; the plan of deadlines.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequestParts, Path, State};
use coordinator_api::error::ErrorBody;
use coordinator_api::route;
use coordinator_api::schedule::{Plan, Run, Schedule, ScheduleList, ScheduleSpec};
use http::request::Parts;

use crate::scheduler::ScheduleError;
use crate::server::App;
use crate::server::problem::{ApiJson, Problem};

/// A schedule's name in the path.
pub struct ScheduleName(String);

impl<S: Send + Sync> FromRequestParts<S> for ScheduleName {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        let Path(name) = path.map_err(|error: PathRejection| Problem::invalid(error.body_text()))?;
        Ok(ScheduleName(name))
    }
}

/// The schedules, by name.
#[utoipa::path(get, path = route::SCHEDULES, responses((status = 200, body = ScheduleList)))]
pub async fn list(State(app): State<Arc<App>>) -> Result<Json<ScheduleList>, Problem> {
    Ok(Json(ScheduleList { schedules: app.leader()?.scheduler.list() }))
}

/// Adds a schedule.
#[utoipa::path(post, path = route::SCHEDULES, request_body = ScheduleSpec,
    responses((status = 200, body = Schedule), (status = 400, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn add(State(app): State<Arc<App>>, ApiJson(spec): ApiJson<ScheduleSpec>) -> Result<Json<Schedule>, Problem> {
    let scheduler = Arc::clone(&app.leader()?.scheduler);
    Ok(Json(app.blocking(move |_| scheduler.add(spec)).await?))
}

/// One schedule.
#[utoipa::path(get, path = route::SCHEDULE, params(("name" = String, Path, description = "The schedule's name")),
    responses((status = 200, body = Schedule), (status = 404, body = ErrorBody)))]
pub async fn detail(State(app): State<Arc<App>>, ScheduleName(name): ScheduleName) -> Result<Json<Schedule>, Problem> {
    Ok(Json(app.leader()?.scheduler.get(&name)?))
}

/// Removes a schedule; its jobs go on.
#[utoipa::path(delete, path = route::SCHEDULE, params(("name" = String, Path, description = "The schedule's name")),
    responses((status = 200, body = Schedule), (status = 404, body = ErrorBody)))]
pub async fn remove(State(app): State<Arc<App>>, ScheduleName(name): ScheduleName) -> Result<Json<Schedule>, Problem> {
    let scheduler = Arc::clone(&app.leader()?.scheduler);
    Ok(Json(app.blocking(move |_| scheduler.remove(&name)).await?))
}

/// Lets a schedule make no jobs for the time being.
#[utoipa::path(post, path = route::SCHEDULE_PAUSE, params(("name" = String, Path, description = "The schedule's name")),
    responses((status = 200, body = Schedule), (status = 404, body = ErrorBody)))]
pub async fn pause(State(app): State<Arc<App>>, ScheduleName(name): ScheduleName) -> Result<Json<Schedule>, Problem> {
    let scheduler = Arc::clone(&app.leader()?.scheduler);
    Ok(Json(app.blocking(move |_| scheduler.set_paused(&name, true)).await?))
}

/// Lets it make jobs again; what would have been due meanwhile is not made up.
#[utoipa::path(post, path = route::SCHEDULE_RESUME, params(("name" = String, Path, description = "The schedule's name")),
    responses((status = 200, body = Schedule), (status = 404, body = ErrorBody)))]
pub async fn resume(State(app): State<Arc<App>>, ScheduleName(name): ScheduleName) -> Result<Json<Schedule>, Problem> {
    let scheduler = Arc::clone(&app.leader()?.scheduler);
    Ok(Json(app.blocking(move |_| scheduler.set_paused(&name, false)).await?))
}

/// Makes its jobs now.
#[utoipa::path(post, path = route::SCHEDULE_RUN, params(("name" = String, Path, description = "The schedule's name")),
    responses((status = 200, body = Run), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn run(State(app): State<Arc<App>>, ScheduleName(name): ScheduleName) -> Result<Json<Run>, Problem> {
    let scheduler = Arc::clone(&app.leader()?.scheduler);
    Ok(Json(scheduler.run_now(&name).await.map_err(|error: ScheduleError| Problem::from(error))?))
}

/// Deadlines and how they will be met.
#[utoipa::path(get, path = route::PLAN, responses((status = 200, body = Plan)))]
pub async fn plan(State(app): State<Arc<App>>) -> Result<Json<Plan>, Problem> {
    let scheduler = Arc::clone(&app.leader()?.scheduler);
    Ok(Json(scheduler.plan().await))
}
