//! The pull side of the OCI distribution protocol at `/v2/`, for engines without a mount.
//!
//! Answers have the protocol's own shapes. Refusals contain the API's error as well, so that one client fits both. Layers are
//! streamed ([`crate::http::streams`]): memory holds a few blocks, whatever the size of a layer. When a client disconnects, the
//! work for it ends.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{FromRequestParts, Path, Query, Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use coordinator_api::error::{ErrorBody, ErrorCode, ErrorDetail};
use coordinator_api::route;
use http::header::{
    ACCEPT, ACCEPT_RANGES, ALLOW, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, LINK, LOCATION, RETRY_AFTER,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use serde::Deserialize;
use serde_json::json;
use store::Digest;
use store::catalogue::Catalogue;
use store::image::{DEFAULT_REGISTRY, ImageRef};
use utoipa::IntoParams;

use crate::http::api_state::ApiState;
use crate::http::conditional::{Part, etag, is_had, part};
use crate::http::error::{ApiError, RETRY_AFTER_SECONDS};
use crate::http::extract::Sender;
use crate::http::handlers::pull_through;
use crate::http::mirror::{Ask, Blob, Document, Indexes, Mirror, Misasked};
use crate::http::quota::{Holder, Share};
use crate::http::streams::{BLOCK, Blocks, DOCUMENT, FILE, Streams, TAR, TarPart};
use crate::identity::caller::{Caller, Peer};
use crate::registries::image::manifest::{DOCKER_LIST, OCI_INDEX};
use crate::unpack::LayerTar;

const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// The most names in one answer. Its `Link` header leads to more.
const PAGE_MAX: usize = 10_000;

/// The registry that is mirrored, and the part of a list.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct MirrorQuery {
    /// The registry's host, as containerd sends it. Without it, the path tells the registry.
    pub ns: Option<String>,
    /// How many names of a list to return at most.
    pub n: Option<String>,
    /// The name after which the returned list begins.
    pub last: Option<String>,
}

/// A refusal in the protocol's shape and in the API's: each client shows its user the message of the shape that it knows.
fn refusal(status: StatusCode, code: &str, detail: ErrorDetail) -> Response {
    let body = json!({"errors": [{"code": code, "message": detail.message}], "error": detail});
    (status, [(API_VERSION, HeaderValue::from_static("registry/2.0"))], Json(body)).into_response()
}

fn not_found(code: &str, what: &str) -> Response {
    let message = format!("{what} is not in the store: pull it from its own registry, or run cachefsctl pull");
    refusal(StatusCode::NOT_FOUND, code, ErrorDetail { code: ErrorCode::NotFound, message })
}

/// Translates an API error into the protocol's shape.
pub(crate) fn refused(error: &ApiError) -> Response {
    let code = match error.code() {
        ErrorCode::Unauthorized => "UNAUTHORIZED",
        ErrorCode::Forbidden => "DENIED",
        ErrorCode::NotFound => "NAME_UNKNOWN",
        ErrorCode::Busy => "TOOMANYREQUESTS",
        ErrorCode::InvalidRequest | ErrorCode::TooLarge => "UNSUPPORTED",
        _ => "UNKNOWN",
    };
    let detail = ErrorDetail { code: error.code(), message: error.message().to_owned() };
    let mut response = refusal(error.status(), code, detail);
    if error.code() == ErrorCode::Busy {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER_SECONDS));
    }
    response
}

/// Redirects `/v2` to where a registry's API begins, as docker-registry does. Open to everybody, because it reveals nothing.
pub async fn moved(uri: Uri) -> Response {
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    let location = HeaderValue::try_from(format!("{}{query}", route::MIRROR));
    let location = location.unwrap_or(HeaderValue::from_static(route::MIRROR));
    (StatusCode::MOVED_PERMANENTLY, [(LOCATION, location)]).into_response()
}

/// Says that this is a registry.
#[utoipa::path(get, path = route::MIRROR, responses((status = 200, description = "A registry of API version 2")))]
pub async fn version() -> Response {
    ([(API_VERSION, HeaderValue::from_static("registry/2.0"))], Json(json!({}))).into_response()
}

/// Manifests, blobs, tags and the catalogue of the OCI distribution protocol, for what the store holds.
#[utoipa::path(get, path = route::MIRROR_PATH_DESCRIBED, params(MirrorQuery, ("path" = String, Path, description = "NAME/manifests/REFERENCE, NAME/blobs/DIGEST, NAME/tags/list or _catalog")),
    responses((status = 200, description = "As the protocol says"), (status = 404, body = ErrorBody)))]
pub async fn answer(
    State(app): State<Arc<ApiState>>,
    caller: Caller,
    Sender(peer): Sender,
    request: Request,
) -> Response {
    let (mut parts, _) = request.into_parts();
    let path = Path::<String>::from_request_parts(&mut parts, &app).await;
    let query = Query::<MirrorQuery>::from_request_parts(&mut parts, &app).await;
    let (Ok(Path(path)), Ok(Query(query))) = (path, query) else {
        return misasked(Misasked::Path, parts.uri.path());
    };
    let asking = Asking {
        app: &app,
        holder: Holder::from(&caller),
        caller,
        peer,
        method: &parts.method,
        headers: &parts.headers,
    };
    match asking.answer(&path, query).await {
        Ok(response) => response,
        Err(error) => refused(&error),
    }
}

/// The answer for methods other than GET and HEAD: this registry cannot be pushed to.
pub async fn no_such_method(method: Method, uri: Uri) -> Response {
    let message = format!("{} does not take {method}: this registry is for pulling only", uri.path());
    let detail = ErrorDetail { code: ErrorCode::InvalidRequest, message };
    let mut response = refusal(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", detail);
    response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    response
}

/// The answer for a path that the protocol does not define, or that is malformed.
fn misasked(why: Misasked, path: &str) -> Response {
    let path: String = path.chars().take(300).collect();
    let (code, message) = match why {
        Misasked::Path => return not_found("NAME_UNKNOWN", &path),
        Misasked::Name => ("NAME_INVALID", format!("{path} names no repository: write it as docker pull takes it")),
        Misasked::Reference => ("MANIFEST_INVALID", format!("{path} ends with neither a tag nor a digest")),
        Misasked::Digest => {
            ("DIGEST_INVALID", format!("{path} does not end with a digest: write sha256: and 64 digits"))
        }
    };
    refusal(StatusCode::BAD_REQUEST, code, ErrorDetail { code: ErrorCode::InvalidRequest, message })
}

/// One request and its caller.
struct Asking<'a> {
    app: &'a Arc<ApiState>,
    holder: Holder,
    caller: Caller,
    peer: Peer,
    method: &'a Method,
    headers: &'a HeaderMap,
}

impl Asking<'_> {
    async fn answer(self, path: &str, query: MirrorQuery) -> Result<Response, ApiError> {
        let ask = match Ask::parse(path, query.ns.as_deref()) {
            Ok(ask) => self.read(ask, &query).await?,
            Err(why) => return Ok(misasked(why, path)),
        };
        match &ask {
            Ask::Catalog => {}
            Ask::Manifest(image) if image.digest().is_none() => self.caller.check(image)?,
            Ask::Manifest(image) | Ask::Tags(image) | Ask::Blob(image, _) => self.caller.check_repository(image)?,
        }
        let page = match Page::parse(&query) {
            Ok(page) => page,
            Err(text) => {
                let message = format!("n is a whole number of names, not {text}");
                let detail = ErrorDetail { code: ErrorCode::InvalidRequest, message };
                return Ok(refusal(StatusCode::BAD_REQUEST, "PAGINATION_NUMBER_INVALID", detail));
            }
        };
        // Before the request takes a share of the room for answers: it may wait for long.
        if let Ask::Manifest(image) = &ask
            && let Some(leader) = pull_through::leader(self.app, &self.caller)
            && !self.knows(image).await?
        {
            pull_through::wait(self.app, &leader, (&self.caller, self.peer), image).await;
        }
        let share = self.app.streams.share(&self.holder, DOCUMENT.max(TAR)).await?;
        // A mirror of Docker Hub, or of the registry that `ns` names, has that registry as a fallback.
        let is_backed =
            query.ns.is_some() || ask.repository().is_some_and(|image| image.registry() == DEFAULT_REGISTRY);
        let indexes = match takes_indexes(self.headers) {
            true if is_backed => Indexes::Completed,
            true => Indexes::Taken,
            false => Indexes::Untaken,
        };
        let caller = self.caller.clone();
        let found = self.app.blocking(move |app| find(app, &caller, ask, indexes)).await?;
        Ok(match found {
            Found::List(shape, names) => list(path, &query, shape, &page, names, share),
            Found::Manifest(document) if is_had(self.headers, &document.digest) => unchanged(&document.digest),
            Found::Manifest(document) => manifest(self.method, document, share),
            Found::Blob(digest, blob) => self.blob(digest, blob, share).await?,
            Found::Nothing(code, what) => not_found(code, &what),
        })
    }
}

impl Asking<'_> {
    /// Whether the store has an image, or knows it as one of another platform.
    async fn knows(&self, image: &ImageRef) -> Result<bool, ApiError> {
        let (caller, image) = (self.caller.clone(), image.clone());
        let known = self.app.blocking(move |app| {
            let catalogue = app.read_catalogue()?;
            Ok::<_, ApiError>(mirror(app, &catalogue, &caller).knows(&image)?)
        });
        known.await
    }

    /// Where a path can be read in two ways, chooses the one that the store has.
    async fn read(&self, ask: Ask, query: &MirrorQuery) -> Result<Ask, ApiError> {
        let Some(other) = ask.of_port().filter(|_| query.ns.is_none()) else { return Ok(ask) };
        let repository = other.repository().map(ImageRef::canonical_repository);
        let is_there = self.app.blocking(move |app| {
            let catalogue = app.read_catalogue()?;
            Ok::<_, store::Error>(catalogue.images().any(|image| Some(&image.repository) == repository.as_ref()))
        });
        Ok(if is_there.await? { other } else { ask })
    }
}

/// The result of a request.
enum Found {
    List(List, Vec<String>),
    Manifest(Document),
    Blob(Digest, Blob),
    Nothing(&'static str, String),
}

fn mirror<'a>(app: &'a ApiState, catalogue: &'a Catalogue, caller: &'a Caller) -> Mirror<'a> {
    let (originals, plains, seen) = (&*app.originals, &app.plains, &caller.images);
    Mirror { store: &app.store, catalogue, originals, plains, seen }
}

/// A list of names.
enum List {
    Repositories,
    Tags,
}

fn find(app: &ApiState, caller: &Caller, ask: Ask, indexes: Indexes) -> Result<Found, ApiError> {
    let catalogue = app.read_catalogue()?;
    let mirror = mirror(app, &catalogue, caller);
    Ok(match ask {
        Ask::Catalog => Found::List(List::Repositories, mirror.repositories()),
        Ask::Tags(image) => match mirror.tags(&image) {
            Some(tags) => Found::List(List::Tags, tags),
            None => Found::Nothing("NAME_UNKNOWN", image.familiar_repository()),
        },
        Ask::Manifest(image) => match mirror.manifest(&image, indexes)? {
            Some(document) => Found::Manifest(document),
            None => Found::Nothing("MANIFEST_UNKNOWN", format!("image {image}")),
        },
        Ask::Blob(image, digest) => match mirror.blob(&image, &digest)? {
            Some(blob) => Found::Blob(digest, blob),
            None => Found::Nothing("BLOB_UNKNOWN", format!("blob {digest} of {}", image.familiar_repository())),
        },
    })
}

/// The requested part of a list.
struct Page {
    /// How many names at most, if the request says so.
    n: Option<usize>,
    last: Option<String>,
}

impl Page {
    /// Parses the query. The error is the text that is not a number.
    fn parse(query: &MirrorQuery) -> Result<Page, String> {
        let number = |text: &String| text.parse().map_err(|_| text.chars().take(50).collect::<String>());
        Ok(Page { n: query.n.as_ref().map(number).transpose()?, last: query.last.clone() })
    }

    /// Cuts this part out of `names`, which are sorted. The flag tells whether more follow.
    fn cut(&self, names: Vec<String>) -> (Vec<String>, bool) {
        let most = self.n.unwrap_or(PAGE_MAX).min(PAGE_MAX);
        let after = |name: &String| self.last.as_ref().is_none_or(|last| name > last);
        let mut names: Vec<String> = names.into_iter().filter(after).take(most.saturating_add(1)).collect();
        let more = names.len() > most && most > 0;
        names.truncate(most);
        (names, more)
    }
}

/// A part of a list of names, with a link to the next one.
fn list(path: &str, query: &MirrorQuery, shape: List, page: &Page, names: Vec<String>, share: Share) -> Response {
    let (names, more) = page.cut(names);
    let next = names.last().filter(|_| more).map(|last| {
        let n = page.n.unwrap_or(PAGE_MAX).to_string();
        let parameters = [("n", Some(n.as_str())), ("last", Some(last.as_str())), ("ns", query.ns.as_deref())];
        format!("<{}>; rel=\"next\"", route::with_query(&format!("{}{path}", route::MIRROR), &parameters))
    });
    let document = match shape {
        List::Repositories => json!({"repositories": names}),
        List::Tags => json!({"name": path.strip_suffix("/tags/list"), "tags": names}),
    };
    let bytes = Bytes::from(document.to_string());
    let headers = [
        (API_VERSION, HeaderValue::from_static("registry/2.0")),
        (CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (CONTENT_LENGTH, HeaderValue::from(bytes.len() as u64)),
    ];
    let mut response = (headers, Streams::document(bytes, share)).into_response();
    response.headers_mut().extend(next.map(|next| (LINK, text(&next))));
    response
}

fn text(value: &str) -> HeaderValue {
    HeaderValue::from_str(value).unwrap_or(HeaderValue::from_static(""))
}

/// The answer for a client that already has the content.
fn unchanged(digest: &Digest) -> Response {
    let headers = [
        (API_VERSION, HeaderValue::from_static("registry/2.0")),
        (CONTENT_DIGEST, text(&digest.to_string())),
        (ETAG, text(&etag(digest))),
    ];
    (StatusCode::NOT_MODIFIED, headers).into_response()
}

/// Whether a client accepts indexes. A client that sends `Accept` must list them.
fn takes_indexes(headers: &HeaderMap) -> bool {
    let lists: Vec<&str> = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok()).collect();
    let mut types =
        lists.iter().flat_map(|list| list.split(',')).map(|one| one.split(';').next().unwrap_or(one).trim());
    lists.is_empty() || types.any(|one| [OCI_INDEX, DOCKER_LIST, "*/*", "application/*"].contains(&one))
}

fn manifest(method: &Method, Document { digest, media_type, bytes }: Document, share: Share) -> Response {
    let headers = [
        (API_VERSION, HeaderValue::from_static("registry/2.0")),
        (CONTENT_TYPE, text(&media_type)),
        (CONTENT_DIGEST, text(&digest.to_string())),
        (ETAG, text(&etag(&digest))),
        (CONTENT_LENGTH, HeaderValue::from(bytes.len() as u64)),
    ];
    let body = if method == Method::HEAD { Body::empty() } else { Streams::document(bytes.into(), share) };
    (headers, body).into_response()
}

impl Asking<'_> {
    async fn blob(&self, digest: Digest, blob: Blob, share: Share) -> Result<Response, ApiError> {
        let len = blob.len();
        if is_had(self.headers, &digest) {
            return Ok(unchanged(&digest));
        }
        let Some((status, part)) = part(self.headers, &digest, len) else {
            let message = format!("blob {digest} has {len} bytes, and none of them was asked for");
            let detail = ErrorDetail { code: ErrorCode::InvalidRequest, message };
            let mut response = refusal(StatusCode::RANGE_NOT_SATISFIABLE, "SIZE_INVALID", detail);
            response.headers_mut().insert(CONTENT_RANGE, text(&format!("bytes */{len}")));
            return Ok(response);
        };
        let body = self.blob_body(blob, part, share).await?;
        let headers = [
            (API_VERSION, HeaderValue::from_static("registry/2.0")),
            (CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")),
            (CONTENT_DIGEST, text(&digest.to_string())),
            (ETAG, text(&etag(&digest))),
            (CONTENT_LENGTH, HeaderValue::from(part.len)),
            (ACCEPT_RANGES, HeaderValue::from_static("bytes")),
        ];
        let mut response = (status, headers, body).into_response();
        if status == StatusCode::PARTIAL_CONTENT {
            let range = format!("bytes {}-{}/{len}", part.start, part.start + part.len - 1);
            response.headers_mut().insert(CONTENT_RANGE, text(&range));
        }
        Ok(response)
    }

    /// A body with a part of a blob.
    async fn blob_body(&self, blob: Blob, part: Part, mut share: Share) -> Result<Body, ApiError> {
        Ok(match blob {
            _ if self.method == Method::HEAD => Body::empty(),
            Blob::Document(bytes) => {
                let start = (part.start as usize).min(bytes.len());
                let end = bytes.len().min(start.saturating_add(part.len as usize));
                Streams::document(Bytes::from(bytes).slice(start..end), share)
            }
            Blob::Original(file, _) => {
                share.shrink(FILE);
                self.app.streams.body(FilePart { file, at: part.start, left: part.len, _share: share })
            }
            Blob::Tar(diff_id, _) => {
                let index = self.app.streams.index(&self.holder, &share, &diff_id).await?;
                let (skip, left, open) = (part.start, part.len, Arc::clone(&index.index));
                let tar = self.app.blocking(move |app| LayerTar::open(&app.store, open)).await?;
                self.app.streams.body(TarPart { tar, skip, left, index, share })
            }
        })
    }
}

/// A part of a file that is being streamed.
struct FilePart {
    file: File,
    at: u64,
    left: u64,
    _share: Share,
}

impl Blocks for FilePart {
    fn next_block(&mut self) -> io::Result<Option<Bytes>> {
        let mut block = vec![0; self.left.min(BLOCK as u64) as usize];
        if block.is_empty() {
            return Ok(None);
        }
        self.file.read_exact_at(&mut block, self.at)?;
        self.at += block.len() as u64;
        self.left -= block.len() as u64;
        Ok(Some(block.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registries::image::manifest::DOCKER_MANIFEST;

    #[test]
    fn clients_say_whether_they_take_indexes() {
        for (accept, expected) in [
            (&[][..], true),
            (&["*/*"], true),
            (&["application/json, application/vnd.oci.image.index.v1+json;q=0.5"], true),
            (&[DOCKER_MANIFEST, DOCKER_LIST], true),
            (&[DOCKER_MANIFEST], false),
            (&["application/vnd.oci.image.manifest.v1+json, application/json"], false),
        ] {
            let headers = accept.iter().map(|value| (ACCEPT, text(value))).collect();
            assert_eq!(takes_indexes(&headers), expected, "{accept:?}");
        }
    }

    #[test]
    fn lists_are_cut_into_pages() {
        let names = || ["a", "b", "c", "d"].map(str::to_owned).to_vec();
        let cut = |n: Option<usize>, last: Option<&str>| {
            let (names, more) = Page { n, last: last.map(str::to_owned) }.cut(names());
            (names.concat(), more)
        };
        assert_eq!(cut(None, None), ("abcd".to_owned(), false));
        assert_eq!(cut(Some(2), None), ("ab".to_owned(), true));
        assert_eq!(cut(Some(2), Some("b")), ("cd".to_owned(), false));
        assert_eq!(cut(Some(4), None), ("abcd".to_owned(), false));
        assert_eq!(cut(Some(0), None), (String::new(), false));
        assert_eq!(cut(Some(9), Some("bb")), ("cd".to_owned(), false), "after a name that is not there");
        assert_eq!(cut(Some(usize::MAX), Some("d")), (String::new(), false));
    }
}
