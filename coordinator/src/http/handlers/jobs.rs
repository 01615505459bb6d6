//! Pull jobs: start, list, look, cancel, retry.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use coordinator_api::access::Role;
use coordinator_api::error::{ErrorBody, ErrorCode};
use coordinator_api::event::Severity;
use coordinator_api::job::{Job, JobList, JobState, PullRequest};
use coordinator_api::route;
use store::image::{ImageRef, OrderedBy};

use crate::http::auth::Sender;
use crate::http::demand::DEFAULT_PER_MINUTE;
use crate::http::error::{ApiError, ApiId, ApiJson, ApiQuery};
use crate::http::handlers::wanted::WAITED_FOR;
use crate::http::pages::PageQuery;
use crate::http::{App, Leader};
use crate::identity::caller::{Caller, Peer};
use crate::jobs::queue::{NewJob, QueueError};
use crate::registries::image::platform;
use crate::state::clock;
use crate::state::events::NewEvent;
use crate::state::job::{JobId, PullJob, Source};

/// The most images of one request.
const IMAGES_MAX: usize = 1000;
/// With so many jobs queued, hosts get no new ones.
const QUEUED_MAX: u64 = 5000;

/// Starts one job per image; images that are being pulled already are answered with their job.
#[utoipa::path(post, path = route::PULLS, request_body = PullRequest,
    responses((status = 200, body = JobList), (status = 400, body = ErrorBody)))]
pub async fn pull(
    State(app): State<Arc<App>>,
    caller: Caller,
    Sender(peer): Sender,
    ApiJson(request): ApiJson<PullRequest>,
) -> Result<Json<JobList>, ApiError> {
    let leader = app.leader()?;
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

/// Whose order a caller's is.
pub fn ordered_by(caller: &Caller) -> OrderedBy {
    match caller.role {
        Role::Host => OrderedBy::Host,
        Role::Viewer | Role::Admin => OrderedBy::Operator,
    }
}

/// Refuses jobs that a host asks for when there are too many, of all hosts or of its own. Admins know what they do.
pub fn check_host(leader: &Leader, caller: &Caller, peer: Peer, new: usize) -> Result<(), ApiError> {
    if caller.role == Role::Admin {
        return Ok(());
    }
    check_room(leader, caller, new)?;
    check_rate(leader, caller, peer, new)
}

/// Counts jobs that a host asks for; one that asks for many is told to ask again later.
pub fn check_rate(leader: &Leader, caller: &Caller, peer: Peer, new: usize) -> Result<(), ApiError> {
    let per_minute = leader.limits.rules().demands_per_minute.unwrap_or(DEFAULT_PER_MINUTE);
    leader.demand.admit((caller, peer), new, per_minute, clock::steady()).map_err(|wait| {
        let who = caller.actor();
        let message = format!(
            "{who} has asked for more pulls than the {per_minute} a minute that a host may ask for: ask again in {} s, or raise \
             demands_per_minute in the limits",
            wait.as_secs_f64().ceil()
        );
        ApiError::later(message, wait)
    })
}

/// Refuses jobs that a host asks for while very many wait: it can ask again later. Admins know what they do.
pub fn check_room(leader: &Leader, caller: &Caller, new: usize) -> Result<(), ApiError> {
    let queued = leader.queue.counts().queued;
    if caller.role == Role::Admin || queued.saturating_add(new as u64) <= QUEUED_MAX {
        return Ok(());
    }
    let message = format!("{queued} jobs are waiting already: ask again when some of them have ended");
    Err(ApiError::new(ErrorCode::Busy, message))
}

/// Records what somebody did to a job.
pub fn tell(leader: &Leader, kind: &'static str, job: &Job, what: &str, caller: &Caller) {
    let message = format!("job {} ({}) {what}", job.id, job.image);
    leader.events.record(NewEvent::new(Severity::Info, kind, &job.image, message).by(caller.actor()));
}

/// The most urgent that a host can make a job: as urgent as what somebody waits for.
const HOST_PRIORITY_MAX: i32 = WAITED_FOR;

/// Refuses what is an admin's to decide. A tag is one image for all hosts, so a host does not say of which platform.
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

/// The jobs that the caller may see, newest first.
#[utoipa::path(get, path = route::JOBS, params(PageQuery),
    responses((status = 200, body = JobList), (status = 400, body = ErrorBody)))]
pub async fn list(
    State(app): State<Arc<App>>,
    caller: Caller,
    ApiQuery(query): ApiQuery<PageQuery>,
) -> Result<Json<JobList>, ApiError> {
    let (queue, before) = (Arc::clone(&app.leader()?.queue), query.after::<u64>()?.map(JobId));
    let is_seen = |job: &PullJob| caller.images.contain(&job.image);
    let (jobs, next_page) = queue.with_jobs(before, &is_seen, |jobs| query.cut(jobs.map(|job| (job.id, job))));
    Ok(Json(JobList { jobs, left_out: Vec::new(), next_page }))
}

/// One job.
#[utoipa::path(get, path = route::JOB, params(("id" = u64, Path, description = "The job's number")),
    responses((status = 200, body = Job), (status = 404, body = ErrorBody)))]
pub async fn detail(State(app): State<Arc<App>>, caller: Caller, ApiId(id): ApiId) -> Result<Json<Job>, ApiError> {
    let job = app.leader()?.queue.get(JobId(id))?;
    // Whoever may not see the image learns nothing, not even that there is such a job.
    match caller.images.contain_name(&job.image) {
        true => Ok(Json(job)),
        false => Err(QueueError::Unknown(JobId(id)).into()),
    }
}

/// Ends a job: a queued one at once, a running one as soon as it notices.
#[utoipa::path(post, path = route::CANCEL, params(("id" = u64, Path, description = "The job's number")),
    responses((status = 200, body = Job), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn cancel(State(app): State<Arc<App>>, caller: Caller, ApiId(id): ApiId) -> Result<Json<Job>, ApiError> {
    let leader = app.leader()?;
    let queue = Arc::clone(&leader.queue);
    let job = app.blocking(move |_| -> Result<Job, QueueError> { queue.cancel(JobId(id)) }).await?;
    // A running job tells of its end itself.
    match job.state {
        JobState::Cancelled => tell(&leader, "job.cancelled", &job, "was cancelled", &caller),
        _ => tell(&leader, "job.cancelling", &job, "is being cancelled", &caller),
    }
    Ok(Json(job))
}

/// Queues a failed or cancelled job again.
#[utoipa::path(post, path = route::RETRY, params(("id" = u64, Path, description = "The job's number")),
    responses((status = 200, body = Job), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn retry(State(app): State<Arc<App>>, caller: Caller, ApiId(id): ApiId) -> Result<Json<Job>, ApiError> {
    let leader = app.leader()?;
    let queue = Arc::clone(&leader.queue);
    let job = app.blocking(move |_| -> Result<Job, QueueError> { queue.retry(JobId(id)) }).await?;
    tell(&leader, "job.retried", &job, "is queued again", &caller);
    Ok(Json(job))
}
