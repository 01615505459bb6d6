//! Turns an uploaded archive into jobs.
//!
//! The upload is spooled to the coordinator's own disk, because a tar's index may come last. Once its jobs exist, they own the
//! file.

use std::path::PathBuf;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use coordinator_api::error::ErrorBody;
use coordinator_api::job::JobList;
use coordinator_api::route;
use futures::StreamExt;
use serde::Deserialize;
use store::crash::{CrashPoint, crash_point};
use store::image::{ImageRef, RequestedBy};
use tokio_util::sync::CancellationToken;
use utoipa::IntoParams;

use crate::http::api_state::{ApiState, Leader};
use crate::http::error::ApiError;
use crate::http::extract::{ApiQuery, Leading};
use crate::http::handlers::pull_admission::tell;
use crate::identity::caller::Caller;
use crate::jobs::pull::pipe::pipe_until;
use crate::jobs::queue::NewJob;
use crate::registries::archive::Archive;
use crate::registries::archive::spool::{Spool, spool};
use crate::state::job::Source;

/// A name for an image that has none in the archive.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct LoadQuery {
    /// The image's name.
    pub name: Option<String>,
}

/// Takes a docker-save tar or an OCI layout in a tar, compressed or not, and submits a job for each image in it.
#[utoipa::path(post, path = route::LOAD, params(LoadQuery),
    request_body(content = Vec<u8>, content_type = "application/x-tar"),
    responses((status = 200, body = JobList), (status = 400, body = ErrorBody)))]
pub async fn load(
    State(app): State<Arc<ApiState>>,
    Leading(leader): Leading,
    caller: Caller,
    ApiQuery(query): ApiQuery<LoadQuery>,
    body: Body,
) -> Result<Json<JobList>, ApiError> {
    let name = query.name.as_deref().map(str::parse::<ImageRef>).transpose()?;
    let path = leader.spools.join(format!("{:016x}.tar", rand::random::<u64>()));
    let spooled = receive(&app, body, path).await?;
    let submitted = Arc::clone(&leader);
    let jobs = app.blocking(move |_| submit(&submitted, spooled, name)).await?;
    jobs.jobs.iter().for_each(|job| tell(&leader, "job.submitted", job, "was sent as an archive", &caller));
    Ok(Json(jobs))
}

/// Spools the body to `path`.
async fn receive(app: &Arc<ApiState>, body: Body, path: PathBuf) -> Result<Spool, ApiError> {
    // Also cancelled if this future is dropped because the client has gone.
    let gone = CancellationToken::new();
    let on_return = gone.clone().drop_guard();
    let (mut writer, reader) = pipe_until(&gone);
    let spooling = tokio::spawn({
        let app = Arc::clone(app);
        async move { app.blocking(move |_| spool(reader, &path, &gone)).await }
    });
    let mut chunks = body.into_data_stream();
    let mut broken = None;
    while let Some(chunk) = chunks.next().await {
        match chunk {
            Ok(bytes) if writer.write(&bytes).await.is_ok() => {}
            // The spooler has ended and will report why.
            Ok(_) => break,
            Err(error) => {
                broken = Some(error);
                break;
            }
        }
    }
    match broken {
        Some(_) => drop((writer, on_return)),
        None => drop(writer.finish().await),
    }
    let spooled = spooling.await.map_err(|_| ApiError::internal("the upload was interrupted: send it again"))?;
    match broken {
        Some(error) => Err(ApiError::invalid(format!("the upload broke off ({error}): send it again"))),
        None => spooled,
    }
}

/// Submits one job per name in the archive.
fn submit(leader: &Leader, spooled: Spool, name: Option<ImageRef>) -> Result<JobList, ApiError> {
    let archive = Archive::open(spooled.path(), name.as_ref())?;
    crash_point(CrashPoint::UploadOpened);
    let spool = spooled.path().to_owned();
    let job = |image: &ImageRef| {
        let source = Source::Archive { spool: spool.clone(), name: name.clone() };
        let ordered_by = RequestedBy::Operator;
        NewJob { image: image.clone(), platform: None, priority: 0, origin: None, ordered_by, source }
    };
    let jobs = leader.queue.submit(archive.names().map(job).collect())?;
    crash_point(CrashPoint::UploadSubmitted);
    spooled.keep();
    Ok(JobList { jobs, left_out: archive.left_out(), next_page: None })
}
