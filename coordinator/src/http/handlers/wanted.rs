//! Images that somebody waits for: raises or submits their jobs, and says why they are missing. Also takes registries' webhooks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{Request, State};
use coordinator_api::error::{ErrorBody, ErrorCode};
use coordinator_api::job::{Job, JobState};
use coordinator_api::route;
use coordinator_api::wanted::{HookAnswer, Wanted, WantedAnswer, WantedOutcome};
use http::HeaderMap;
use http::header::AUTHORIZATION;
use serde::Deserialize;
use store::image::{ImageRef, RequestedBy};
use utoipa::IntoParams;

use crate::http::api_state::{ApiState, Leader, Leadership};
use crate::http::bodies;
use crate::http::error::ApiError;
use crate::http::extract::{ApiJson, ApiName, ApiQuery, peer_of};
use crate::http::extract::{Leading, Sender};
use crate::http::handlers::pull_admission::{WAITED_FOR, check_rate, check_room};
use crate::http::quota::Holder;
use crate::identity::caller::{Caller, Peer};
use crate::jobs::queue::NewJob;
use crate::registries::webhook::HookKind;
use crate::state::clock;
use crate::state::job::{JobId, Source};

/// A secret in the URL, for registries that cannot send headers (Docker Hub).
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct HookQuery {
    /// The webhook secret.
    pub token: Option<String>,
}

/// Raises the priority of the job that pulls `image`.
pub fn raise(leader: &Leader, image: &ImageRef) -> Option<Job> {
    leader.queue.raise(image, WAITED_FOR)
}

/// Submits a job for `image`, which somebody waits for. Blocks on the database.
pub fn pull(
    leader: &Leader,
    image: &ImageRef,
    (origin, ordered_by): (Option<&str>, RequestedBy),
) -> Result<Option<Job>, ApiError> {
    let (origin, image, source) = (origin.map(str::to_owned), image.clone(), Source::Registry);
    let new = NewJob { image, platform: None, priority: WAITED_FOR, origin, ordered_by, source };
    Ok(leader.queue.submit(vec![new])?.into_iter().next())
}

/// Reports an image that a host lacks: its job is given priority, or is submitted if images are pulled on demand.
#[utoipa::path(post, path = route::WANTED, request_body = Wanted,
    responses((status = 200, body = WantedAnswer), (status = 400, body = ErrorBody)))]
pub async fn wanted(
    State(app): State<Arc<ApiState>>,
    Leading(leader): Leading,
    caller: Caller,
    Sender(peer): Sender,
    ApiJson(wanted): ApiJson<Wanted>,
) -> Result<Json<WantedAnswer>, ApiError> {
    let image: ImageRef = wanted.image.parse()?;
    caller.check(&image)?;
    let answer = app.blocking(move |app| on_demand(app, &leader, (&caller, peer), &image));
    Ok(Json(answer.await?))
}

/// Gives the job of an image that somebody lacks priority, or submits one if images are pulled on demand. Blocks on the database.
pub fn on_demand(
    app: &ApiState,
    leader: &Leader,
    (caller, peer): (&Caller, Peer),
    image: &ImageRef,
) -> Result<WantedAnswer, ApiError> {
    let answer = |outcome, job| Ok::<_, ApiError>(WantedAnswer { outcome, job, again_seconds: None });
    if app.read_catalogue()?.find(image).is_some() {
        leader.demand.found(image);
        return answer(WantedOutcome::Published, None);
    }
    if let Some(job) = raise(leader, image) {
        return answer(WantedOutcome::Raised, Some(job.id));
    }
    if !leader.settings.pull_on_demand() {
        return answer(WantedOutcome::Noted, None);
    }
    // A name that was not found a moment ago is not pulled again each time that a host looks for it.
    let now = clock::steady();
    let failed = leader.queue.last_for(image).filter(|job| job.state == JobState::Failed);
    let failed = failed.filter(|job| leader.limits.now().duration_since(job.updated_at) < TIMEOUT);
    let pause = leader.demand.pause(image, now);
    if failed.is_some() || pause.is_some() {
        let again = pause.map_or(TIMEOUT.as_secs().unsigned_abs(), |pause| pause.as_secs() + 1);
        let job = failed.map(|job| job.id);
        return Ok(WantedAnswer { outcome: WantedOutcome::Noted, job, again_seconds: Some(again) });
    }
    check_room(leader, caller, 1)?;
    check_rate(leader, caller, peer, 1)?;
    let job = pull(leader, image, (Some("a host"), RequestedBy::Host))?;
    leader.demand.pulled(image, now);
    answer(WantedOutcome::Pulled, job.map(|job| job.id))
}

/// How long to wait after a failed pull on demand.
const TIMEOUT: jiff::SignedDuration = jiff::SignedDuration::from_mins(1);

/// The longest notification, in bytes.
const NOTIFICATION_MAX: usize = 2 << 20;

/// Refuses a webhook without the right secret. If no secret is configured, all webhooks are refused.
fn check_secret(leader: &Leader, shown: Option<&str>) -> Result<(), ApiError> {
    let refused = |message: &str| Err(ApiError::new(ErrorCode::Unauthorized, message));
    let Some(secret) = &leader.hook_secret else {
        return refused("webhooks are not accepted: set webhook_secret_file in the coordinator's configuration");
    };
    if shown.is_some_and(|shown| secret.is(shown)) {
        Ok(())
    } else {
        refused("this webhook shows no valid secret: send it as Authorization: Bearer, or as ?token=")
    }
}

/// The secret in a request's header.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, secret) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| secret.trim())
}

/// Takes a registry's notification of pushes. Schedules on push that match make their jobs.
#[utoipa::path(post, path = route::HOOK, request_body(content = String, content_type = "application/json"),
    params(("kind" = String, Path, description = "docker-registry, harbor or docker-hub"), HookQuery),
    responses((status = 200, body = HookAnswer), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody)))]
pub async fn hook(
    State(app): State<Arc<ApiState>>,
    Leading(leader): Leading,
    ApiName(kind): ApiName,
    ApiQuery(query): ApiQuery<HookQuery>,
    request: Request,
) -> Result<Json<HookAnswer>, ApiError> {
    let (parts, body) = request.into_parts();
    // Checked before any of the body is read: it may be long, and come from anybody.
    check_secret(&leader, bearer(&parts.headers).or(query.token.as_deref())).inspect_err(|error| {
        let peer = peer_of(&parts.extensions).to_string();
        app.auth.refused(&peer, "POST /v1/hooks/{kind}", error, Instant::now());
    })?;
    let kind = HookKind::parse(&kind).ok_or_else(|| {
        ApiError::not_found("there is no such webhook: there are docker-registry, harbor and docker-hub")
    })?;
    let holder = Holder::Remote("webhooks".to_owned());
    let gathered = bodies::gather(&app.bodies, &holder, body, NOTIFICATION_MAX, "a notification").await?;
    let pushes = kind.pushes(&gathered.bytes).map_err(|error| ApiError::invalid(error.to_string()))?;
    let count = pushes.len();
    let jobs = app.blocking(move |_| leader.scheduler.pushed(&pushes)).await?;
    Ok(Json(HookAnswer { pushes: count, jobs }))
}

/// Why an image is missing, as far as jobs, registries and schedules tell.
pub fn not_ready(app: &ApiState, reference: &ImageRef, waited: Duration) -> ApiError {
    let why = match &*app.leadership.borrow() {
        Leadership::Leading(leader) => why_not(leader, reference),
        Leadership::Standby { .. } => "this coordinator stands by; ask the one that leads".to_owned(),
    };
    let seconds = (waited.as_secs_f64() * 1000.0).round() / 1000.0;
    ApiError::new(ErrorCode::Timeout, format!("image {reference} was not published within {seconds} s: {why}"))
}

fn why_not(leader: &Leader, reference: &ImageRef) -> String {
    let next = leader.scheduler.next_for(reference).map(|(name, at)| format!("schedule {name} pulls it at {at}"));
    let Some(job) = leader.queue.last_for(reference) else {
        return next.map_or_else(
            || format!("no job pulls it; run cachefsctl pull {reference}, or wait with --pull"),
            |next| format!("no job pulls it yet; {next}"),
        );
    };
    let held = leader.limits.held_from(reference);
    match (job.state, held) {
        (JobState::Failed, _) => {
            let next = next.map(|next| format!("; {next}")).unwrap_or_default();
            format!("job {} failed: {}{next}", job.id, job.reason.unwrap_or_default())
        }
        (JobState::Queued, Some(held)) => {
            let (registry, until) = (reference.registry(), held.until);
            format!("job {} is queued: registry {registry} is not asked before {until}: {}", job.id, held.why)
        }
        (JobState::Queued, None) => match leader.queue.before(JobId(job.id)) {
            0 => format!("job {} is queued and goes next: all places for jobs are taken", job.id),
            count => format!("job {} is queued behind {count} others", job.id),
        },
        (JobState::Fetching, _) => format!(
            "job {} is fetching: {} of {} bytes are there, {} come a second",
            job.id, job.bytes_done, job.bytes_total, job.bytes_per_second
        ),
        (state, _) => match job.reason {
            Some(reason) => format!("job {} is {state}: {reason}", job.id),
            None => format!("job {} is {state}", job.id),
        },
    }
}
