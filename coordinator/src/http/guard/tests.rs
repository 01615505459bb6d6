//! Every route with every role, and how the guard handles headers and peers.

use std::net::SocketAddr;
use std::time::Duration;

use axum::body::Body;
use axum::extract::connect_info::ConnectInfo;
use base64::Engine as _;
use coordinator_api::access::{NewToken, Role};
use http::HeaderMap;
use parking_lot::Mutex;
use store::reader::Store;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::*;
use crate::http::auth::{Auth, REFUSED_PEERS};
use crate::http::bodies;
use crate::http::counts::Counts;
use crate::http::handlers::profiles;
use crate::http::mirror::Plains;
use crate::http::router::{router, routes};
use crate::http::streams::Streams;
use crate::identity::caller::{Account, Images, LocalRule, Peer, Proof, Subject};
use crate::identity::tokens::Tokens;
use crate::registries::blob_cache::BlobCache;
use crate::state::events::Events;
use crate::state::state_db::memory::MemoryStateDb;

/// An application that stands by: the handlers answer whoever passes the guard, somehow.
struct Bench {
    app: Arc<ApiState>,
    _directory: tempfile::TempDir,
}

const REMOTE: Peer = Peer::Remote(SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 9)), 1234));
/// A user without a rule, and one whom the only rule of a [`Bench`] names.
const STRANGER: Account = Account { uid: 64_999, gid: 64_999 };
const FRIEND: Account = Account { uid: 64_998, gid: 64_998 };

impl Bench {
    fn new() -> Bench {
        let directory = tempfile::tempdir().unwrap();
        store::publisher::create(directory.path()).unwrap();
        let store = Store::open(directory.path()).unwrap();
        let state_db = Arc::new(MemoryStateDb::default());
        let events = Arc::new(Events::open(state_db.clone()).unwrap());
        let tokens = Arc::new(Tokens::open(state_db).unwrap());
        let rule = LocalRule { subject: Subject::User(FRIEND.uid), role: Role::Viewer, images: Images::default() };
        let (_, leadership) = watch::channel(Leadership::Standby { leader: None });
        let app = Arc::new(ApiState {
            catalogue: Mutex::new(store.catalogue().unwrap()),
            counts: Counts::default(),
            bodies: bodies::room(),
            traces: profiles::room(),
            plains: Plains::default(),
            streams: Streams::new(store.clone()),
            store,
            store_path: directory.path().to_owned(),
            state_path: directory.path().to_owned(),
            name: "bench".to_owned(),
            started_at: Timestamp::now(),
            auth: Auth::new(vec![rule], tokens, Arc::clone(&events)),
            events,
            stopping: CancellationToken::new(),
            originals: Arc::new(BlobCache::none()),
            leadership,
        });
        Bench { app, _directory: directory }
    }

    fn token(&self, role: Role) -> String {
        let new = NewToken { name: role.word().to_owned(), role, images: Vec::new(), expires_seconds: None };
        let root = Caller { proof: Proof::Local { uid: 0 }, role: Role::Admin, images: Images::default() };
        self.app.auth.tokens().create(new, &root, Timestamp::now()).unwrap().token
    }

    async fn answer(&self, peer: Option<Peer>, method: &str, path: &str, authorization: Option<&str>) -> Response {
        // Some handlers require query parameters; waiting requests must not wait.
        let uri = format!("{}?name=a&timeout_seconds=0&id=1", path.replace("{id}", "1").replace("{name}", "a"));
        let request = http::Request::builder().method(method).uri(uri).header("host", "localhost");
        let mut request = request.body(Body::empty()).unwrap();
        if let Some(text) = authorization {
            request.headers_mut().insert(AUTHORIZATION, text.parse().unwrap());
        }
        if let Some(peer) = peer {
            request.extensions_mut().insert(ConnectInfo(peer));
        }
        router(Arc::clone(&self.app)).oneshot(request).await.unwrap()
    }

    async fn status(&self, peer: Peer, method: &str, path: &str, authorization: Option<&str>) -> u16 {
        self.answer(Some(peer), &method.to_uppercase(), path, authorization).await.status().as_u16()
    }

    fn refusals(&self) -> Vec<String> {
        self.app.events.after(0, 100).into_iter().map(|event| event.message).collect()
    }
}

#[tokio::test]
async fn every_route_is_for_those_whom_the_table_names_and_nobody_else() {
    let bench = Bench::new();
    let tokens = Role::ALL.map(|role| (role, format!("Bearer {}", bench.token(role))));
    let mut walked = 0;
    for (path, methods, _) in routes() {
        for (method, access) in methods {
            let open = *access == Access::Open;
            assert_eq!(bench.status(REMOTE, method, path, None).await != 401, open, "{method} {path} with no token");
            assert_eq!(
                bench.status(REMOTE, method, path, Some("Bearer cfs_0_0")).await != 401,
                open,
                "{method} {path} with a wrong token"
            );
            for (role, header) in &tokens {
                let status = bench.status(REMOTE, method, path, Some(header)).await;
                assert_eq!(status != 403, access.admits(*role), "{method} {path} as {role}: {status}");
                assert_ne!(status, 401, "{method} {path} as {role}");
                walked += 1;
            }
            assert_eq!(bench.status(Peer::Local(Some(STRANGER)), method, path, None).await != 403, open);
            assert_ne!(bench.status(Peer::Loopback(([127, 0, 0, 1], 1).into()), method, path, None).await, 403);
        }
        assert!([405, 401].contains(&bench.status(REMOTE, "patch", path, None).await), "{path}");
    }
    assert!(walked > 50, "{walked}");
}

#[test]
fn roles_admit_as_documented() {
    let admitted = |access: Access| Role::ALL.map(|role| access.admits(role));
    assert_eq!(admitted(Access::Open), [true, true, true]);
    assert_eq!(admitted(Access::Any), [true, true, true]);
    assert_eq!(admitted(Access::Viewers), [true, false, true]);
    assert_eq!(admitted(Access::Hosts), [false, true, true]);
    assert_eq!(admitted(Access::LimitedViewers), [true, false, true]);
    assert_eq!(admitted(Access::Admins), [false, false, true]);
    assert_eq!(admitted(Access::AdminsSelfAudited), [false, false, true]);
}

#[tokio::test]
async fn who_is_limited_to_some_images_sees_no_lists_of_all() {
    let bench = Bench::new();
    let images = vec!["team/*".to_owned()];
    let new = NewToken { name: "some".to_owned(), role: Role::Viewer, images, expires_seconds: None };
    let root = Caller { proof: Proof::Local { uid: 0 }, role: Role::Admin, images: Images::default() };
    let token = bench.app.auth.tokens().create(new, &root, Timestamp::now()).unwrap().token;
    for (path, methods, _) in routes() {
        for (method, access) in methods {
            let status = bench.status(REMOTE, method, path, Some(&format!("Bearer {token}"))).await;
            // The handlers of the other routes refuse or filter by themselves; the image `a` is not allowed.
            if *access == Access::Viewers {
                assert_eq!(status, 403, "{method} {path}");
            }
        }
    }
    let text = bench.answer(Some(REMOTE), "GET", "/v1/image", Some(&format!("Bearer {token}"))).await;
    assert_eq!(text.status(), 403);
}

#[tokio::test]
async fn whoever_asks_is_known_by_token_or_socket_or_not_at_all() {
    let bench = Bench::new();
    let viewer = bench.token(Role::Viewer);
    let basic = base64::engine::general_purpose::STANDARD.encode(format!("anybody:{viewer}"));
    let own = Account { uid: bench.app.auth.own, gid: 0 };
    for (peer, header, expected) in [
        (REMOTE, Some(format!("Bearer {viewer}")), Ok("token viewer")),
        (REMOTE, Some(format!("bearer  {viewer} ")), Ok("token viewer")),
        (REMOTE, Some(format!("Basic {basic}")), Ok("token viewer")),
        (REMOTE, Some(viewer.clone()), Err(ErrorCode::Unauthorized)),
        (REMOTE, Some("Digest x".to_owned()), Err(ErrorCode::Unauthorized)),
        (REMOTE, Some("Basic !".to_owned()), Err(ErrorCode::Unauthorized)),
        (REMOTE, None, Err(ErrorCode::Unauthorized)),
        (Peer::Local(Some(Account { uid: 0, gid: 0 })), None, Ok("uid 0")),
        (Peer::Local(Some(own)), Some(format!("Bearer {viewer}")), Ok("token viewer")),
        (Peer::Local(Some(own)), Some("Bearer cfs_x_y".to_owned()), Err(ErrorCode::Unauthorized)),
        (Peer::Local(Some(FRIEND)), None, Ok("uid 64998")),
        (Peer::Local(Some(STRANGER)), None, Err(ErrorCode::Forbidden)),
        (Peer::Local(None), None, Err(ErrorCode::Forbidden)),
        (Peer::Loopback(([127, 0, 0, 1], 1).into()), None, Ok("loopback")),
    ] {
        let mut headers = HeaderMap::new();
        headers.extend(header.as_ref().map(|text| (AUTHORIZATION, text.parse().unwrap())));
        let found = bench.app.auth.identify(peer, &headers, Timestamp::now()).await;
        let found = found.map(|caller| caller.actor()).map_err(|error| error.code());
        assert_eq!(found, expected.map(str::to_owned), "{peer} {header:?}");
    }
}

#[tokio::test]
async fn a_connection_that_nobody_vouches_for_is_nobodys() {
    let bench = Bench::new();
    assert_eq!(bench.answer(None, "GET", "/v1/status", None).await.status(), 403);
    let refused = bench.answer(Some(REMOTE), "GET", "/v1/status", None).await;
    assert!(refused.headers()[WWW_AUTHENTICATE].to_str().unwrap().starts_with("Bearer"));
    assert_eq!(bench.refusals().len(), 2, "one for each peer");
}

#[tokio::test]
async fn the_mirror_refuses_as_registries_do() {
    let bench = Bench::new();
    let images = vec!["team/*".to_owned()];
    let new = NewToken { name: "some".to_owned(), role: Role::Host, images, expires_seconds: None };
    let root = Caller { proof: Proof::Local { uid: 0 }, role: Role::Admin, images: Images::default() };
    let token = bench.app.auth.tokens().create(new, &root, Timestamp::now()).unwrap().token;
    let basic = base64::engine::general_purpose::STANDARD.encode(format!("anybody:{token}"));
    for (path, authorization, status, code, words) in [
        ("/v2/", None, 401, "UNAUTHORIZED", "wants a token"),
        ("/v2/other/app/manifests/1", None, 401, "UNAUTHORIZED", "wants a token"),
        ("/v2/", Some("Basic eDp5"), 401, "UNAUTHORIZED", "not known here"),
        ("/v2/other/app/manifests/1", Some(basic.as_str()), 403, "DENIED", "token some may not use image"),
        ("/v2/other/app/tags/list", Some(&basic), 403, "DENIED", "token some may not use image"),
        ("/v2/team/app/manifests/1", Some(&basic), 404, "MANIFEST_UNKNOWN", "is not in the store"),
    ] {
        let header =
            authorization.map(|text| if text.starts_with("Basic") { text.to_owned() } else { format!("Basic {text}") });
        let answer = bench.answer(Some(REMOTE), "GET", path, header.as_deref()).await;
        assert_eq!(answer.status(), status, "{path}");
        assert_eq!(answer.headers()["docker-distribution-api-version"], "registry/2.0", "{path}");
        let challenge = answer.headers().get(WWW_AUTHENTICATE).map(|value| value.to_str().unwrap().to_owned());
        assert_eq!(challenge.as_deref(), (status == 401).then_some("Basic realm=\"cachefs\""), "{path}");
        let body = axum::body::to_bytes(answer.into_body(), 10_000).await.unwrap();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["errors"][0]["code"], code, "{path}: {body}");
        assert!(body["errors"][0]["message"].as_str().unwrap().contains(words), "{path}: {body}");
        assert_eq!(body["errors"][0]["message"], body["error"]["message"], "in our own shape as well");
    }
}

#[tokio::test]
async fn where_the_mirror_begins_is_told_to_anybody() {
    let bench = Bench::new();
    for method in ["GET", "HEAD"] {
        let answer = bench.answer(Some(REMOTE), method, "/v2", None).await;
        assert_eq!(answer.status(), 301);
        assert_eq!(answer.headers()["location"], "/v2/?name=a&timeout_seconds=0&id=1", "with what was asked for");
    }
    assert_eq!(bench.answer(Some(REMOTE), "POST", "/v2", None).await.status(), 405);
}

#[tokio::test]
async fn refusals_are_told_once_a_minute_for_each_peer() {
    let bench = Bench::new();
    let auth = &bench.app.auth;
    let why = ApiError::new(ErrorCode::Forbidden, "no");
    let start = Instant::now();
    for second in 0..61 {
        auth.refused("a", "GET /x", &why, start + Duration::from_secs(second));
    }
    assert_eq!(
        bench.refusals(),
        ["a was refused GET /x: no", "a was refused GET /x: no (59 more since the last time)"]
    );
    for peer in 0..2 * REFUSED_PEERS {
        auth.refused(&format!("peer {peer}"), "GET /x", &why, start + Duration::from_secs(61));
    }
    let told = bench.app.events.after(0, 10_000).len();
    assert!(told <= REFUSED_PEERS + 3, "{told} events for a crowd");
}
