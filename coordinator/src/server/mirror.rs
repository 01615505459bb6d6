//! The pull side of the OCI distribution protocol, for engines without a mount: `/v2/`.
//!
//! Answers have the protocol's own shapes; refusals carry the API's error as well, so that one client fits both. Layers are streamed:
//! memory holds a few blocks, whatever their size. A client that disconnects ends the work for it.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use coordinator_api::error::{ErrorBody, ErrorCode, ErrorDetail};
use coordinator_api::route;
use futures::stream;
use http::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, RANGE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use serde::Deserialize;
use serde_json::json;
use store::Digest;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio_util::io::ReaderStream;
use utoipa::IntoParams;

use crate::access::Caller;
use crate::mirror::{Ask, Blob, Document, Mirror, path_name};
use crate::server::App;
use crate::server::export::{CAPACITY, ChannelWriter};
use crate::server::problem::{ApiQuery, Problem};
use crate::unpack::write_layer_tar;

const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// Names the registry that is mirrored.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct MirrorQuery {
    /// The registry's host, as containerd sends it; without it, the path says.
    pub ns: Option<String>,
}

/// A refusal in the protocol's shape and in ours: clients show people the message of the one that they know.
fn refusal(status: StatusCode, code: &str, detail: ErrorDetail) -> Response {
    let body = json!({"errors": [{"code": code, "message": detail.message}], "error": detail});
    (status, [(API_VERSION, HeaderValue::from_static("registry/2.0"))], Json(body)).into_response()
}

fn not_found(code: &str, what: &str) -> Response {
    let message = format!("{what} is not in the store: pull it from its own registry, or run cachefsctl pull");
    refusal(StatusCode::NOT_FOUND, code, ErrorDetail { code: ErrorCode::NotFound, message })
}

/// What the API refuses, as the protocol says it.
pub(crate) fn refused(problem: &Problem) -> Response {
    let code = match problem.code() {
        ErrorCode::Unauthorized => "UNAUTHORIZED",
        ErrorCode::Forbidden => "DENIED",
        ErrorCode::NotFound => "NAME_UNKNOWN",
        ErrorCode::Busy => "TOOMANYREQUESTS",
        ErrorCode::InvalidRequest | ErrorCode::TooLarge => "UNSUPPORTED",
        _ => "UNKNOWN",
    };
    let detail = ErrorDetail { code: problem.code(), message: problem.message().to_owned() };
    refusal(problem.status(), code, detail)
}

/// Says that this is a registry.
#[utoipa::path(get, path = route::MIRROR, responses((status = 200, description = "A registry of API version 2")))]
pub async fn version() -> Response {
    ([(API_VERSION, HeaderValue::from_static("registry/2.0"))], Json(json!({}))).into_response()
}

/// Manifests, blobs, tags and the catalogue of the OCI distribution protocol, for what the store holds.
#[utoipa::path(get, path = route::MIRROR_PATH, params(MirrorQuery, ("path" = String, Path, description = "NAME/manifests/REFERENCE, NAME/blobs/DIGEST, NAME/tags/list or _catalog")),
    responses((status = 200, description = "As the protocol says"), (status = 404, body = ErrorBody)))]
pub async fn answer(
    State(app): State<Arc<App>>,
    caller: Caller,
    method: Method,
    Path(path): Path<String>,
    ApiQuery(query): ApiQuery<MirrorQuery>,
    headers: HeaderMap,
) -> Response {
    let answered = try_answer(&app, caller, &method, &path, query, &headers).await;
    answered.unwrap_or_else(|problem| refused(&problem))
}

async fn try_answer(
    app: &Arc<App>,
    caller: Caller,
    method: &Method,
    path: &str,
    query: MirrorQuery,
    headers: &HeaderMap,
) -> Result<Response, Problem> {
    let Some(ask) = Ask::parse(path, query.ns.as_deref()) else { return Ok(not_found("NAME_UNKNOWN", path)) };
    match &ask {
        Ask::Catalog => {}
        Ask::Tags(image) | Ask::Manifest(image) | Ask::Blob(image, _) => caller.check(image)?,
    }
    let found = app.blocking(move |app| find(app, &caller, ask)).await?;
    Ok(match found {
        Found::List(value) => Json(value).into_response(),
        Found::Manifest(document) => manifest(method, document),
        Found::Blob(digest, blob) => self::blob(app, method, headers, digest, blob).await,
        Found::Nothing(code, what) => not_found(code, &what),
    })
}

/// What was asked for.
enum Found {
    List(serde_json::Value),
    Manifest(Document),
    Blob(Digest, Blob),
    Nothing(&'static str, String),
}

fn find(app: &App, caller: &Caller, ask: Ask) -> Result<Found, Problem> {
    let catalogue = app.read_catalogue()?;
    let mirror = Mirror { store: &app.store, catalogue: &catalogue, originals: &app.originals };
    Ok(match ask {
        Ask::Catalog => {
            let seen = catalogue.images().filter(|image| caller.images.contain_name(&image.familiar_name()));
            let mut names: Vec<String> = seen.map(|image| path_name(&image.repository)).collect();
            names.dedup();
            Found::List(json!({"repositories": names}))
        }
        Ask::Tags(image) => match mirror.tags(&image) {
            Some(tags) => Found::List(json!({"name": path_name(&image.canonical_repository()), "tags": tags})),
            None => Found::Nothing("NAME_UNKNOWN", image.familiar_repository()),
        },
        Ask::Manifest(image) => match mirror.manifest(&image)? {
            Some(document) => Found::Manifest(document),
            None => Found::Nothing("MANIFEST_UNKNOWN", format!("image {image}")),
        },
        Ask::Blob(image, digest) => match mirror.blob(&image, &digest)? {
            Some(blob) => Found::Blob(digest, blob),
            None => Found::Nothing("BLOB_UNKNOWN", format!("blob {digest} of {}", image.familiar_repository())),
        },
    })
}

fn text(value: &str) -> HeaderValue {
    HeaderValue::from_str(value).unwrap_or(HeaderValue::from_static(""))
}

fn manifest(method: &Method, Document { digest, media_type, bytes }: Document) -> Response {
    let headers = [
        (API_VERSION, HeaderValue::from_static("registry/2.0")),
        (CONTENT_TYPE, text(&media_type)),
        (CONTENT_DIGEST, text(&digest.to_string())),
        (CONTENT_LENGTH, HeaderValue::from(bytes.len() as u64)),
    ];
    let body = if method == Method::HEAD { Body::empty() } else { Body::from(bytes) };
    (headers, body).into_response()
}

/// A part of a blob: its first byte, and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    start: u64,
    len: u64,
}

/// The part that a `Range` header asks for: nothing if it asks for none that there is. What is not understood is the whole.
fn part(headers: &HeaderMap, len: u64) -> Option<(StatusCode, Part)> {
    let whole = Some((StatusCode::OK, Part { start: 0, len }));
    let value = headers.get(RANGE).and_then(|value| value.to_str().ok()?.trim().strip_prefix("bytes="));
    let Some((first, last)) = value.and_then(|range| range.split_once('-')) else { return whole };
    let (start, end) = match (first.trim().parse::<u64>(), last.trim().parse::<u64>()) {
        (Ok(start), Ok(end)) if start <= end => (start, end.saturating_add(1).min(len)),
        (Ok(start), Err(_)) if last.trim().is_empty() => (start, len),
        (Err(_), Ok(suffix)) if first.trim().is_empty() => (len.saturating_sub(suffix), len),
        _ => return whole,
    };
    (start < end).then(|| (StatusCode::PARTIAL_CONTENT, Part { start, len: end - start }))
}

async fn blob(app: &Arc<App>, method: &Method, headers: &HeaderMap, digest: Digest, blob: Blob) -> Response {
    let len = blob.len();
    let Some((status, part)) = part(headers, len) else {
        let message = format!("blob {digest} has {len} bytes, and none of them was asked for");
        let detail = ErrorDetail { code: ErrorCode::InvalidRequest, message };
        return refusal(StatusCode::RANGE_NOT_SATISFIABLE, "SIZE_INVALID", detail);
    };
    let body = match blob {
        _ if method == Method::HEAD => Body::empty(),
        Blob::Document(mut bytes) => {
            let end = part.start.saturating_add(part.len) as usize;
            bytes.truncate(end);
            Body::from(bytes.split_off((part.start as usize).min(bytes.len())))
        }
        Blob::Original(file, _) => original(file, part),
        Blob::Tar(diff_id, _) => tar(app, diff_id, part),
    };
    let headers = [
        (API_VERSION, HeaderValue::from_static("registry/2.0")),
        (CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")),
        (CONTENT_DIGEST, text(&digest.to_string())),
        (CONTENT_LENGTH, HeaderValue::from(part.len)),
        (ACCEPT_RANGES, HeaderValue::from_static("bytes")),
    ];
    let mut response = (status, headers, body).into_response();
    if status == StatusCode::PARTIAL_CONTENT {
        let range = format!("bytes {}-{}/{len}", part.start, part.start + part.len - 1);
        response.headers_mut().insert(CONTENT_RANGE, text(&range));
    }
    response
}

/// A part of a file.
fn original(mut file: File, part: Part) -> Body {
    match file.seek(SeekFrom::Start(part.start)) {
        Ok(_) => Body::from_stream(ReaderStream::new(tokio::fs::File::from_std(file).take(part.len))),
        Err(error) => Body::from_stream(stream::iter([Err::<bytes::Bytes, _>(error)])),
    }
}

/// A part of a layer's tar. The whole is compared with its diffID; if it differs, the answer breaks off before its end.
fn tar(app: &Arc<App>, diff_id: Digest, part: Part) -> Body {
    let (sender, receiver) = mpsc::channel(CAPACITY);
    let app = Arc::clone(app);
    tokio::task::spawn_blocking(move || {
        let mut window = Window { inner: ChannelWriter::new(sender.clone()), skip: part.start, left: part.len };
        let written = write_layer_tar(&app.store, &diff_id, &mut window);
        let wanted_more = window.left > 0;
        let flushed = window.inner.flush();
        if let Err(error) = written
            && (wanted_more || flushed.is_err())
        {
            tracing::warn!("a layer for a client broke off: {error}");
            let _ = sender.blocking_send(Err(io::Error::other(error.to_string())));
        }
    });
    let blocks = stream::unfold(receiver, |mut receiver| async move { Some((receiver.recv().await?, receiver)) });
    Body::from_stream(blocks)
}

/// Passes a part of what is written on, and ends the writing after it.
struct Window<W> {
    inner: W,
    skip: u64,
    left: u64,
}

impl<W: Write> Write for Window<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let skipped = self.skip.min(bytes.len() as u64) as usize;
        self.skip -= skipped as u64;
        let rest = &bytes[skipped..];
        let wanted = self.left.min(rest.len() as u64) as usize;
        self.inner.write_all(&rest[..wanted])?;
        self.left -= wanted as u64;
        match rest.len() > wanted {
            true => Err(io::ErrorKind::WriteZero.into()),
            false => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        let ask = |range: &str| {
            let headers = HeaderMap::from_iter([(RANGE, text(range))]);
            part(&headers, 10).map(|(status, part)| (status.as_u16(), part.start, part.len))
        };
        for (range, expected) in [
            ("bytes=0-", Some((206, 0, 10))),
            ("bytes=3-5", Some((206, 3, 3))),
            ("bytes=3-99", Some((206, 3, 7))),
            ("bytes=-4", Some((206, 6, 4))),
            ("bytes=10-", None),
            ("bytes=11-", None),
            ("bytes=11-12", None),
            ("bytes=5-3", Some((200, 0, 10))),
            ("items=1-2", Some((200, 0, 10))),
            ("bytes=a-b", Some((200, 0, 10))),
        ] {
            assert_eq!(ask(range), expected, "{range}");
        }
        assert_eq!(part(&HeaderMap::new(), 10).map(|(status, _)| status), Some(StatusCode::OK));
    }

    #[test]
    fn a_window_passes_its_part_and_ends_the_writing() {
        let bytes: Vec<u8> = (0..100).collect();
        for (skip, left) in [(0, 100), (7, 20), (99, 1), (0, 1), (50, 50)] {
            let mut window = Window { inner: Vec::new(), skip, left };
            let ended = bytes.chunks(9).try_for_each(|chunk| window.write_all(chunk));
            assert_eq!(window.inner, bytes[skip as usize..(skip + left) as usize]);
            assert_eq!(ended.is_ok(), skip + left == 100);
        }
    }
}
