//! Pull jobs: start, list, look, cancel, retry.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use coordinator_api::error::ErrorBody;
use coordinator_api::job::{Job, JobList, PullRequest};
use coordinator_api::route;
use store::image::ImageRef;

use crate::board::{BoardError, NewJob};
use crate::job::{JobId, Source};
use crate::registry::platform;
use crate::server::App;
use crate::server::problem::{ApiId, ApiJson, Problem};

/// Starts one job per image; images that are being pulled already are answered with their job.
#[utoipa::path(post, path = route::PULLS, request_body = PullRequest,
    responses((status = 200, body = JobList), (status = 400, body = ErrorBody)))]
pub async fn pull(
    State(app): State<Arc<App>>,
    ApiJson(request): ApiJson<PullRequest>,
) -> Result<Json<JobList>, Problem> {
    let board = Arc::clone(&app.leader()?.board);
    if request.images.is_empty() {
        return Err(Problem::invalid("the request names no image: give at least one"));
    }
    let platform = request.platform.as_deref().map(platform::parse).transpose()?;
    let job = |name: &String| {
        let image: ImageRef = name.parse()?;
        let (platform, priority) = (platform.clone(), request.priority);
        Ok(NewJob { image, platform, priority, origin: None, source: Source::Registry })
    };
    let new: Vec<NewJob> = request.images.iter().map(job).collect::<Result<_, store::Error>>()?;
    let jobs = app.blocking(move |_| board.submit(new)).await?;
    Ok(Json(JobList { jobs }))
}

/// The jobs, newest first.
#[utoipa::path(get, path = route::JOBS, responses((status = 200, body = JobList)))]
pub async fn list(State(app): State<Arc<App>>) -> Result<Json<JobList>, Problem> {
    Ok(Json(JobList { jobs: app.leader()?.board.list() }))
}

/// One job.
#[utoipa::path(get, path = route::JOB, params(("id" = u64, Path, description = "The job's number")),
    responses((status = 200, body = Job), (status = 404, body = ErrorBody)))]
pub async fn detail(State(app): State<Arc<App>>, ApiId(id): ApiId) -> Result<Json<Job>, Problem> {
    Ok(Json(app.leader()?.board.get(JobId(id))?))
}

/// Ends a job: a queued one at once, a running one as soon as it notices.
#[utoipa::path(post, path = route::CANCEL, params(("id" = u64, Path, description = "The job's number")),
    responses((status = 200, body = Job), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn cancel(State(app): State<Arc<App>>, ApiId(id): ApiId) -> Result<Json<Job>, Problem> {
    let board = Arc::clone(&app.leader()?.board);
    Ok(Json(app.blocking(move |_| -> Result<Job, BoardError> { board.cancel(JobId(id)) }).await?))
}

/// Queues a failed or cancelled job again.
#[utoipa::path(post, path = route::RETRY, params(("id" = u64, Path, description = "The job's number")),
    responses((status = 200, body = Job), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn retry(State(app): State<Arc<App>>, ApiId(id): ApiId) -> Result<Json<Job>, Problem> {
    let board = Arc::clone(&app.leader()?.board);
    Ok(Json(app.blocking(move |_| -> Result<Job, BoardError> { board.retry(JobId(id)) }).await?))
}
