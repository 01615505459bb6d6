//! Submits, lists, shows, cancels and retries pull jobs.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use coordinator_api::access::Role;
use coordinator_api::error::{ErrorBody, ErrorCode};
use coordinator_api::job::{Job, JobList, JobState, PullRequest};
use coordinator_api::route;
use store::image::ImageRef;

use crate::http::api_state::ApiState;
use crate::http::error::ApiError;
use crate::http::extract::{ApiId, ApiJson, ApiQuery};
use crate::http::extract::{Leading, Sender};
use crate::http::handlers::pull_admission::{WAITED_FOR, check_host, ordered_by, tell};
use crate::http::pages::PageQuery;
use crate::identity::caller::Caller;
use crate::jobs::queue::{NewJob, QueueError};
use crate::registries::image::platform;
use crate::state::job::{JobId, PullJob, Source};

/// The most images in one request.
const IMAGES_MAX: usize = 1000;

/// Submits one job per image. For an image that is being pulled already, its job is returned.
#[utoipa::path(post, path = route::PULLS, request_body = PullRequest,
    responses((status = 200, body = JobList), (status = 400, body = ErrorBody)))]
pub async fn pull(
    State(app): State<Arc<ApiState>>,
    Leading(leader): Leading,
    caller: Caller,
    Sender(peer): Sender,
    ApiJson(request): ApiJson<PullRequest>,
) -> Result<Json<JobList>, ApiError> {
    let queue = Arc::clone(&leader.queue);
    if request.images.is_empty() {
        return Err(ApiError::invalid("the request names no image: give at least one"));
    }
    check_order(&caller, &request)?;
    if request.images.len() > IMAGES_MAX {
        let message = format!("the request names more than {IMAGES_MAX} images: send it in parts");
        return Err(ApiError::new(ErrorCode::TooLarge, message));
    }
    check_host(&leader, &caller, peer, request.images.len())?;
    let platform = request.platform.as_deref().map(platform::parse).transpose()?;
    let job = |name: &String| {
        let image: ImageRef = name.parse()?;
        let (platform, priority, ordered_by) = (platform.clone(), request.priority, ordered_by(&caller));
        Ok(NewJob { image, platform, priority, origin: None, ordered_by, source: Source::Registry })
    };
    let new: Vec<NewJob> = request.images.iter().map(job).collect::<Result<_, store::Error>>()?;
    new.iter().try_for_each(|job| caller.check(&job.image))?;
    let jobs = app.blocking(move |_| queue.submit(new)).await?;
    jobs.iter().for_each(|job| tell(&leader, "job.submitted", job, "was asked for", &caller));
    Ok(Json(JobList { jobs, left_out: Vec::new(), next_page: None }))
}

/// The highest priority that a host may give a job: that of images that somebody waits for.
const HOST_PRIORITY_MAX: i32 = WAITED_FOR;

/// Refuses what only an admin may decide. A tag is one image for all hosts, so a host may not choose its platform.
fn check_order(caller: &Caller, request: &PullRequest) -> Result<(), ApiError> {
    if caller.role != Role::Host {
        return Ok(());
    }
    let actor = caller.actor();
    if request.platform.is_some() {
        let why = "a tag is of one platform for all hosts, so an admin says which: leave the platform out";
        return Err(ApiError::new(ErrorCode::Forbidden, format!("{actor} has the role host, and {why}")));
    }
    if request.priority > HOST_PRIORITY_MAX {
        let why = format!("a host's priority is {HOST_PRIORITY_MAX} at most");
        return Err(ApiError::new(ErrorCode::Forbidden, format!("{actor} has the role host, and {why}")));
    }
    Ok(())
}

/// Lists the jobs that the caller may see, newest first.
#[utoipa::path(get, path = route::JOBS, params(PageQuery),
    responses((status = 200, body = JobList), (status = 400, body = ErrorBody)))]
pub async fn list(
    Leading(leader): Leading,
    caller: Caller,
    ApiQuery(query): ApiQuery<PageQuery>,
) -> Result<Json<JobList>, ApiError> {
    let (queue, before) = (Arc::clone(&leader.queue), query.after::<u64>()?.map(JobId));
    let is_seen = |job: &PullJob| caller.images.contain(&job.image);
    let (jobs, next_page) = queue.with_jobs(before, &is_seen, |jobs| query.cut(jobs.map(|job| (job.id, job))));
    Ok(Json(JobList { jobs, left_out: Vec::new(), next_page }))
}

/// Shows one job.
#[utoipa::path(get, path = route::JOB, params(("id" = u64, Path, description = "The job's number")),
    responses((status = 200, body = Job), (status = 404, body = ErrorBody)))]
pub async fn detail(Leading(leader): Leading, caller: Caller, ApiId(id): ApiId) -> Result<Json<Job>, ApiError> {
    let job = leader.queue.get(JobId(id))?;
    // A caller who may not see the image does not even learn that the job exists.
    if caller.images.contain_name(&job.image) { Ok(Json(job)) } else { Err(QueueError::Unknown(JobId(id)).into()) }
}

/// Cancels a job: a queued one at once, a running one as soon as it notices.
#[utoipa::path(post, path = route::CANCEL, params(("id" = u64, Path, description = "The job's number")),
    responses((status = 200, body = Job), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn cancel(
    State(app): State<Arc<ApiState>>,
    Leading(leader): Leading,
    caller: Caller,
    ApiId(id): ApiId,
) -> Result<Json<Job>, ApiError> {
    let queue = Arc::clone(&leader.queue);
    let job = app.blocking(move |_| -> Result<Job, QueueError> { queue.cancel(JobId(id)) }).await?;
    // A running job records its end itself.
    match job.state {
        JobState::Cancelled => tell(&leader, "job.cancelled", &job, "was cancelled", &caller),
        _ => tell(&leader, "job.cancelling", &job, "is being cancelled", &caller),
    }
    Ok(Json(job))
}

/// Queues a failed or cancelled job again.
#[utoipa::path(post, path = route::RETRY, params(("id" = u64, Path, description = "The job's number")),
    responses((status = 200, body = Job), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn retry(
    State(app): State<Arc<ApiState>>,
    Leading(leader): Leading,
    caller: Caller,
    ApiId(id): ApiId,
) -> Result<Json<Job>, ApiError> {
    let queue = Arc::clone(&leader.queue);
    let job = app.blocking(move |_| -> Result<Job, QueueError> { queue.retry(JobId(id)) }).await?;
    tell(&leader, "job.retried", &job, "is queued again", &caller);
    Ok(Json(job))
}
