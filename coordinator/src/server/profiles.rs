//! Traces in, profiles out.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use bytes::{Bytes, BytesMut};
use coordinator_api::error::{ErrorBody, ErrorCode};
use coordinator_api::profile::{Profile, ProfileFile, TraceAccepted};
use coordinator_api::route;
use futures::StreamExt;
use jiff::Timestamp;
use serde::Deserialize;
use store::image::{ImageRecord, ImageRef};
use store::profile::{PrefetchProfile, StartupRecord};
use store::trace::AccessTrace;
use utoipa::IntoParams;

use crate::access::Caller;
use crate::profiles::{NamedFile, files};
use crate::server::images::{find, time};
use crate::server::problem::{ApiQuery, Problem};
use crate::server::{App, Leadership};

/// A body that has not arrived by then holds its place for nothing.
const RECEIVE_LIMIT: Duration = Duration::from_secs(30);
/// What is too long is read to its end up to this, so that the refusal is heard.
const DRAIN_MAX: usize = 4 * AccessTrace::ENCODED_MAX;
/// Files that are listed if the request does not say how many.
const FILES_DEFAULT: usize = 1000;

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
pub async fn trace(State(app): State<Arc<App>>, caller: Caller, body: Body) -> Result<Json<TraceAccepted>, Problem> {
    let seat = app.leader()?.profiles.seat()?;
    let late = |_| Problem::new(ErrorCode::Timeout, "the trace did not arrive within 30 seconds: send it again");
    let bytes = tokio::time::timeout(RECEIVE_LIMIT, receive(body)).await.map_err(late)??;
    if caller.images.is_restricted() {
        let encoded = bytes.clone();
        app.blocking(move |app| check_trace(app, &caller, &encoded)).await?;
    }
    Ok(Json(TraceAccepted { starts: seat.submit(bytes).await? }))
}

/// Refuses a trace of images that are not for a caller. What is no trace is refused where it is read.
fn check_trace(app: &App, caller: &Caller, encoded: &[u8]) -> Result<(), Problem> {
    let Ok(trace) = AccessTrace::decode(encoded) else { return Ok(()) };
    let catalogue = app.read_catalogue()?;
    let mut images = catalogue.images().filter(|image| image.top_chain() == Some(trace.chain));
    if images.any(|image| caller.images.contain_name(&image.familiar_name())) {
        return Ok(());
    }
    let message =
        format!("{} sends a trace of chain {}, which is no image that it may use", caller.actor(), trace.chain);
    Err(Problem::new(ErrorCode::Forbidden, message))
}

/// Reads a body of a bounded length.
async fn receive(body: Body) -> Result<Bytes, Problem> {
    let (mut bytes, mut received) = (BytesMut::new(), 0);
    let mut parts = body.into_data_stream();
    while let Some(part) = parts.next().await {
        let part = part.map_err(|error| Problem::invalid(format!("the trace broke off ({error}): send it again")))?;
        received += part.len();
        if received <= AccessTrace::ENCODED_MAX {
            bytes.extend_from_slice(&part);
        } else if received > DRAIN_MAX {
            break;
        }
    }
    match received <= AccessTrace::ENCODED_MAX {
        true => Ok(bytes.freeze()),
        false => Err(Problem::new(
            ErrorCode::TooLarge,
            format!(
                "a trace is at most {} bytes long: the host that sent this one should drop it",
                AccessTrace::ENCODED_MAX
            ),
        )),
    }
}

/// What is known of an image's starts.
#[utoipa::path(get, path = route::PROFILE, params(ProfileQuery),
    responses((status = 200, body = Profile), (status = 404, body = ErrorBody)))]
pub async fn profile(
    State(app): State<Arc<App>>,
    caller: Caller,
    ApiQuery(query): ApiQuery<ProfileQuery>,
) -> Result<Json<Profile>, Problem> {
    let reference: ImageRef = query.name.parse()?;
    caller.check(&reference)?;
    let limit = query.limit.unwrap_or(FILES_DEFAULT);
    app.blocking(move |app| {
        let catalogue = app.read_catalogue()?;
        let image = &find(&catalogue, &reference)?.image;
        let no_layers =
            || Problem::not_found(format!("image {reference} has no layers, so its starts read nothing of it"));
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
        Ok::<_, Problem>(Json(view))
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
) -> Result<(), Problem> {
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
