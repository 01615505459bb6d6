//! Images that somebody waits for: what is done about them, why they are not there, and what registries say was pushed.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use coordinator_api::error::{ErrorBody, ErrorCode};
use coordinator_api::job::{Job, JobState};
use coordinator_api::route;
use coordinator_api::wanted::{HookAnswer, Wanted, WantedAnswer, WantedOutcome};
use http::HeaderMap;
use http::header::AUTHORIZATION;
use serde::Deserialize;
use store::image::ImageRef;
use utoipa::IntoParams;

use crate::access::Caller;
use crate::board::NewJob;
use crate::hooks::HookKind;
use crate::job::{JobId, Source};
use crate::server::problem::{ApiJson, ApiQuery, Problem};
use crate::server::{App, Leader, Leadership};

/// The priority of what somebody waits for: before anything that people order with ordinary numbers.
pub const WAITED_FOR: i32 = 100;

/// A secret in the address, for registries that cannot send headers (Docker Hub).
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct HookQuery {
    /// The webhook secret.
    pub token: Option<String>,
}

/// Raises the job that pulls `image`.
pub fn raise(leader: &Leader, image: &ImageRef) -> Option<Job> {
    leader.board.raise(image, WAITED_FOR)
}

/// Pulls `image` for one who waits. Blocks on the journal.
pub fn pull(leader: &Leader, image: &ImageRef, origin: Option<&str>) -> Result<Option<Job>, Problem> {
    let (origin, image) = (origin.map(str::to_owned), image.clone());
    let new = NewJob { image, platform: None, priority: WAITED_FOR, origin, source: Source::Registry };
    Ok(leader.board.submit(vec![new])?.into_iter().next())
}

/// A host lacks an image: its job goes before others, or is made if images are pulled on demand.
#[utoipa::path(post, path = route::WANTED, request_body = Wanted,
    responses((status = 200, body = WantedAnswer), (status = 400, body = ErrorBody)))]
pub async fn wanted(
    State(app): State<Arc<App>>,
    caller: Caller,
    ApiJson(wanted): ApiJson<Wanted>,
) -> Result<Json<WantedAnswer>, Problem> {
    let image: ImageRef = wanted.image.parse()?;
    caller.check(&image)?;
    let leader = app.leader()?;
    let answer = app.blocking(move |app| {
        if app.read_catalogue()?.find(&image).is_some() {
            return Ok::<_, Problem>(WantedAnswer { outcome: WantedOutcome::Published, job: None });
        }
        if let Some(job) = raise(&leader, &image) {
            return Ok(WantedAnswer { outcome: WantedOutcome::Raised, job: Some(job.id) });
        }
        if !leader.settings.pull_on_demand() {
            return Ok(WantedAnswer { outcome: WantedOutcome::Noted, job: None });
        }
        // What failed a moment ago is not pulled again at every look of every host.
        let failed = leader.board.last_for(&image).filter(|job| job.state == JobState::Failed);
        if let Some(job) = failed.filter(|job| leader.limits.now().duration_since(job.updated_at) < PATIENCE) {
            return Ok(WantedAnswer { outcome: WantedOutcome::Noted, job: Some(job.id) });
        }
        let job = pull(&leader, &image, Some("a host"))?;
        Ok(WantedAnswer { outcome: WantedOutcome::Pulled, job: job.map(|job| job.id) })
    });
    Ok(Json(answer.await?))
}

/// How long a failed pull on demand is not tried again.
const PATIENCE: jiff::SignedDuration = jiff::SignedDuration::from_mins(1);

/// A registry tells of pushes; on-push schedules that mean them make their jobs.
#[utoipa::path(post, path = route::HOOK, request_body(content = String, content_type = "application/json"),
    params(("kind" = String, Path, description = "docker-registry, harbor or docker-hub"), HookQuery),
    responses((status = 200, body = HookAnswer), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody)))]
pub async fn hook(
    State(app): State<Arc<App>>,
    Path(kind): Path<String>,
    ApiQuery(query): ApiQuery<HookQuery>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<HookAnswer>, Problem> {
    let leader = app.leader()?;
    let Some(secret) = &leader.hook_secret else {
        return Err(Problem::new(
            ErrorCode::Unauthorized,
            "webhooks are not accepted: set webhook_secret_file in the coordinator's configuration",
        ));
    };
    let header = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let bearer =
        header.and_then(|value| value.split_once(' ')).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    let shown = bearer.map(|(_, secret)| secret.trim()).or(query.token.as_deref());
    if !shown.is_some_and(|shown| secret.is(shown)) {
        return Err(Problem::new(
            ErrorCode::Unauthorized,
            "this webhook shows no valid secret: send it as Authorization: Bearer, or as ?token=",
        ));
    }
    let kind = HookKind::parse(&kind).ok_or_else(|| {
        Problem::not_found(format!("there is no webhook {kind}: there are docker-registry, harbor and docker-hub"))
    })?;
    let pushes = kind.pushes(&body).map_err(|error| Problem::invalid(error.to_string()))?;
    let count = pushes.len();
    let jobs = app.blocking(move |_| leader.scheduler.pushed(&pushes)).await?;
    Ok(Json(HookAnswer { pushes: count, jobs }))
}

/// Why an image is not there, as far as jobs, registries and schedules tell.
pub fn not_ready(app: &App, reference: &ImageRef, waited: Duration) -> Problem {
    let why = match &*app.leadership.borrow() {
        Leadership::Leading(leader) => why_not(leader, reference),
        Leadership::Standby { .. } => "this coordinator stands by; ask the one that leads".to_owned(),
    };
    let seconds = (waited.as_secs_f64() * 1000.0).round() / 1000.0;
    Problem::new(ErrorCode::Timeout, format!("image {reference} was not published within {seconds} s: {why}"))
}

fn why_not(leader: &Leader, reference: &ImageRef) -> String {
    let next = leader.scheduler.next_for(reference).map(|(name, at)| format!("schedule {name} pulls it at {at}"));
    let Some(job) = leader.board.last_for(reference) else {
        return next.map_or_else(
            || format!("no job pulls it; run cachefsctl pull {reference}, or wait with --pull"),
            |next| format!("no job pulls it yet; {next}"),
        );
    };
    let held = leader.limits.held(reference.registry());
    match (job.state, held) {
        (JobState::Failed, _) => {
            let next = next.map(|next| format!("; {next}")).unwrap_or_default();
            format!("job {} failed: {}{next}", job.id, job.reason.unwrap_or_default())
        }
        (JobState::Queued, Some(held)) => {
            let (registry, until) = (reference.registry(), held.until);
            format!("job {} is queued: registry {registry} is not asked before {until}: {}", job.id, held.why)
        }
        (JobState::Queued, None) => match leader.board.before(JobId(job.id)) {
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
