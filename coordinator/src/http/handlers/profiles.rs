//! Traces in, profiles out.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use coordinator_api::error::{ErrorBody, ErrorCode};
use coordinator_api::profile::{Profile, ProfileFile, TraceAccepted};
use coordinator_api::route;
use jiff::Timestamp;
use serde::Deserialize;
use store::image::{ImageRecord, ImageRef};
use store::profile::{PrefetchProfile, StartupRecord};
use store::trace::AccessTrace;
use utoipa::IntoParams;

use crate::http::bodies;
use crate::http::error::{ApiError, ApiQuery};
use crate::http::handlers::images::{find, time};
use crate::http::quota::{Holder, Quota, UsedUp};
use crate::http::{App, Leadership};
use crate::identity::caller::Caller;
use crate::profiles::{NamedFile, TraceError, files};

/// Files that are listed if the request does not say how many.
const FILES_DEFAULT: usize = 1000;

/// What a trace counts for, and how many of them one caller and all may send at a time.
const TRACE: u64 = 1 << 10;
const TRACES_OF_ONE: u64 = 8;
const TRACES_OF_ALL: u64 = 64;

/// Places for those who send traces: none of them takes all.
pub fn room() -> Quota {
    Quota::new(TRACES_OF_ALL * TRACE, TRACES_OF_ONE * TRACE, Duration::ZERO)
}

/// Names one image.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ProfileQuery {
    /// The image, as `docker pull` takes it.
    pub name: String,
    /// How many files to list; 1000 if it is not said.
    pub limit: Option<usize>,
}

/// Takes what a host traced of one container's start.
#[utoipa::path(post, path = route::TRACES,
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 200, body = TraceAccepted), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 408, body = ErrorBody), (status = 413, body = ErrorBody), (status = 429, body = ErrorBody)))]
pub async fn trace(State(app): State<Arc<App>>, caller: Caller, body: Body) -> Result<Json<TraceAccepted>, ApiError> {
    let holder = Holder::from(&caller);
    let _own = app.traces.take(&holder, TRACE).await.map_err(|UsedUp| TraceError::Busy)?;
    let seat = app.leader()?.profiles.seat()?;
    let gathered = bodies::gather(&app.bodies, &holder, body, AccessTrace::ENCODED_MAX, "a trace").await?;
    let bytes = gathered.bytes.clone();
    let sender = caller.actor();
    if caller.images.is_restricted() {
        let encoded = bytes.clone();
        app.blocking(move |app| check_trace(app, &caller, &encoded)).await?;
    }
    Ok(Json(TraceAccepted { starts: seat.submit(bytes, sender).await? }))
}

/// Refuses a trace of images that are not for a caller. What is no trace is refused where it is read.
fn check_trace(app: &App, caller: &Caller, encoded: &[u8]) -> Result<(), ApiError> {
    let Ok(trace) = AccessTrace::decode(encoded) else { return Ok(()) };
    let catalogue = app.read_catalogue()?;
    let mut images = catalogue.images().filter(|image| image.top_chain() == Some(trace.chain));
    if images.any(|image| caller.images.contain_name(&image.familiar_name())) {
        return Ok(());
    }
    let message =
        format!("{} sends a trace of chain {}, which is no image that it may use", caller.actor(), trace.chain);
    Err(ApiError::new(ErrorCode::Forbidden, message))
}

/// What is known of an image's starts.
#[utoipa::path(get, path = route::PROFILE, params(ProfileQuery),
    responses((status = 200, body = Profile), (status = 404, body = ErrorBody)))]
pub async fn profile(
    State(app): State<Arc<App>>,
    caller: Caller,
    ApiQuery(query): ApiQuery<ProfileQuery>,
) -> Result<Json<Profile>, ApiError> {
    let reference: ImageRef = query.name.parse()?;
    caller.check(&reference)?;
    let limit = query.limit.unwrap_or(FILES_DEFAULT);
    app.blocking(move |app| {
        let catalogue = app.read_catalogue()?;
        let image = &find(&catalogue, &reference)?.image;
        let no_layers =
            || ApiError::not_found(format!("image {reference} has no layers, so its starts read nothing of it"));
        let chain = image.top_chain().ok_or_else(no_layers)?;
        let learned = match &*app.leadership.borrow() {
            Leadership::Leading(leader) => Some(Arc::clone(leader)),
            Leadership::Standby { .. } => None,
        };
        let learned = learned.map(|leader| leader.profiles.profile(&chain)).transpose()?.flatten();
        let mut view = view(image, learned.as_ref());
        view.chain = chain.to_string();
        if let Some(record) = catalogue.startup(&chain) {
            show_pack(app, image, record, limit, &mut view)?;
        }
        Ok::<_, ApiError>(Json(view))
    })
    .await
}

/// What the coordinator learned, without the pack.
fn view(image: &ImageRecord, learned: Option<&PrefetchProfile>) -> Profile {
    Profile {
        name: image.familiar_name(),
        chain: String::new(),
        starts: learned.map_or(0, PrefetchProfile::starts),
        pack: None,
        published_at: None::<Timestamp>,
        pieces: 0,
        content_bytes: 0,
        pack_bytes: 0,
        precision: learned.and_then(PrefetchProfile::precision),
        recall: learned.and_then(PrefetchProfile::recall),
        files_total: 0,
        files: Vec::new(),
    }
}

/// Adds what the published pack says.
fn show_pack(
    app: &App,
    image: &ImageRecord,
    record: &StartupRecord,
    limit: usize,
    view: &mut Profile,
) -> Result<(), ApiError> {
    let table = app.store.startup_table(record)?;
    let (named, total) = files(&app.store, image, &table, limit)?;
    view.starts = view.starts.max(record.starts.into());
    view.pack = Some(record.pack.to_string());
    view.published_at = Some(time(record.published_at));
    view.pieces = table.pieces.len() as u64;
    view.content_bytes = record.content_bytes;
    view.pack_bytes = record.pack_len;
    view.files_total = total as u64;
    view.files = named.iter().map(file).collect();
    Ok(())
}

fn file(named: &NamedFile) -> ProfileFile {
    ProfileFile {
        path: String::from_utf8_lossy(&named.path).into_owned(),
        layer: named.layer,
        pieces: named.pieces,
        bytes: named.bytes,
        weight: f64::from(named.weight) / f64::from(u16::MAX),
    }
}
