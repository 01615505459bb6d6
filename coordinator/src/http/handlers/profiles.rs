//! Receives traces and shows profiles.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use coordinator_api::error::{ErrorBody, ErrorCode};
use coordinator_api::profile::{Profile, ProfileFile, ProfileOrigin, ProfileStart, TraceAccepted};
use coordinator_api::route;
use jiff::Timestamp;
use serde::Deserialize;
use store::catalogue::Catalogue;
use store::image::{ImageRecord, ImageRef};
use store::profile::{Origin, PrefetchProfile, StartupRecord};
use store::trace::{AccessTrace, Outcome};
use utoipa::IntoParams;

use crate::http::api_state::{ApiState, Leadership};
use crate::http::bodies;
use crate::http::error::ApiError;
use crate::http::extract::{ApiQuery, Leading};
use crate::http::handlers::images::find;
use crate::http::quota::{Holder, Quota, UsedUp};
use crate::identity::caller::Caller;
use crate::profiles::{NamedFile, TraceError, files};
use crate::state::clock::timestamp;

/// Files that are listed if the request does not say how many.
const FILES_DEFAULT: usize = 1000;

/// The weight of a trace, and how many traces one caller and all callers may send at the same time.
const TRACE: u64 = 1 << 10;
const TRACES_OF_ONE: u64 = 8;
const TRACES_OF_ALL: u64 = 64;

/// A quota for callers that send traces: no caller can take it all.
pub fn room() -> Quota {
    Quota::new(TRACES_OF_ALL * TRACE, TRACES_OF_ONE * TRACE, Duration::ZERO)
}

/// Names one image, and limits the files to list.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ProfileQuery {
    /// The image, as `docker pull` takes it.
    pub name: String,
    /// How many files to list: 1000 by default.
    pub limit: Option<usize>,
}

/// Takes the trace of one container's start from a host.
#[utoipa::path(post, path = route::TRACES,
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 200, body = TraceAccepted), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 408, body = ErrorBody), (status = 413, body = ErrorBody), (status = 429, body = ErrorBody)))]
pub async fn trace(
    State(app): State<Arc<ApiState>>,
    Leading(leader): Leading,
    caller: Caller,
    body: Body,
) -> Result<Json<TraceAccepted>, ApiError> {
    let holder = Holder::from(&caller);
    let _own = app.traces.take(&holder, TRACE).await.map_err(|UsedUp| TraceError::Busy)?;
    let permit = leader.profiles.permit()?;
    let gathered = bodies::gather(&app.bodies, &holder, body, AccessTrace::ENCODED_MAX, "a trace").await?;
    let bytes = gathered.bytes.clone();
    let sender = caller.actor();
    if caller.images.is_restricted() {
        let encoded = bytes.clone();
        app.blocking(move |app| check_trace(app, &caller, &encoded)).await?;
    }
    Ok(Json(TraceAccepted { starts: permit.submit(bytes, sender).await? }))
}

/// Refuses a trace of an image that the caller may not use. A malformed trace is refused where it is decoded.
fn check_trace(app: &ApiState, caller: &Caller, encoded: &[u8]) -> Result<(), ApiError> {
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

/// Shows what is known of an image's starts.
#[utoipa::path(get, path = route::PROFILE, params(ProfileQuery),
    responses((status = 200, body = Profile), (status = 404, body = ErrorBody)))]
pub async fn profile(
    State(app): State<Arc<ApiState>>,
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
        let record = catalogue.startup(&chain);
        if let Some(record) = record {
            show_pack(app, image, record, limit, &mut view)?;
        }
        let origin = learned.as_ref().map(PrefetchProfile::origin).or(record.map(|record| record.origin));
        show_origin(origin, &catalogue, &caller, &mut view);
        Ok::<_, ApiError>(Json(view))
    })
    .await
}

/// What the coordinator has learned, without the published pack.
fn view(image: &ImageRecord, learned: Option<&PrefetchProfile>) -> Profile {
    Profile {
        name: image.familiar_name(),
        chain: String::new(),
        starts: learned.map_or(0, PrefetchProfile::starts),
        origin: None,
        inherited_from: None,
        pack: None,
        published_at: None::<Timestamp>,
        pieces: 0,
        content_bytes: 0,
        pack_bytes: 0,
        precision: learned.and_then(PrefetchProfile::precision),
        recall: learned.and_then(PrefetchProfile::recall),
        recent: learned.into_iter().flat_map(|learned| learned.outcomes().iter().rev()).map(start).collect(),
        files_total: 0,
        files: Vec::new(),
    }
}

fn start((began, outcome): &(u64, Outcome)) -> ProfileStart {
    ProfileStart {
        started_at: timestamp(*began),
        read_bytes: outcome.touched_bytes,
        prefetched_bytes: outcome.prefetched_bytes,
        used_bytes: outcome.prefetched_used_bytes,
        missed_bytes: outcome.missed_bytes,
        precision: outcome.precision(),
        recall: outcome.recall(),
    }
}

/// Adds where the profile comes from. A caller who may not use the predecessor sees its chainID alone.
fn show_origin(origin: Option<Origin>, catalogue: &Catalogue, caller: &Caller, view: &mut Profile) {
    view.origin = origin.map(|origin| match origin {
        Origin::Traced => ProfileOrigin::Traced,
        Origin::Inherited { .. } => ProfileOrigin::Inherited,
        Origin::Guessed => ProfileOrigin::Guessed,
    });
    if let Some(Origin::Inherited { from }) = origin {
        let names = catalogue.image_of_chain(&from).map(|image| image.familiar_name());
        let name = names.filter(|name| caller.images.contain_name(name));
        view.inherited_from = Some(name.unwrap_or_else(|| from.to_string()));
    }
}

/// Adds what the published startup pack contains.
fn show_pack(
    app: &ApiState,
    image: &ImageRecord,
    record: &StartupRecord,
    limit: usize,
    view: &mut Profile,
) -> Result<(), ApiError> {
    let table = app.store.startup_table(record)?;
    let (named, total) = files(&app.store, image, &table, limit)?;
    view.starts = view.starts.max(record.starts.into());
    view.pack = Some(record.pack.to_string());
    view.published_at = Some(timestamp(record.published_at));
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
        weight: f64::from(named.weight) / f64::from(u8::MAX),
    }
}
