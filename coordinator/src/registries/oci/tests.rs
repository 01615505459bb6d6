//! The distribution protocol against servers that misbehave, one fault each.
//!
//! `wiremock` plays registries and token services; where the bytes on the wire matter (answers cut short, odd ranges), see
//! `wire_tests`. Real registries are for the tests outside this crate.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use futures::TryStreamExt;
use serde_json::json;
use store::reader::Store;
use tempfile::TempDir;
use tokio::net::TcpListener;
use wiremock::matchers::{body_string_contains, header, header_exists, method, path, query_param};
use wiremock::{Mock, MockServer, Request, Respond, ResponseTemplate};

use crate::registries::image::manifest::{DOCKER_MANIFEST, OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST};
use crate::registries::oci::docker_config::CredentialStore;
use crate::registries::oci::registry::OciRegistry;
use crate::registries::oci::retry::RetryPolicy;
use crate::registries::oci::transport::TransportSettings;
use crate::registries::*;

/// Few attempts and short pauses, so that failures are over soon.
pub(super) const IMPATIENT: RetryPolicy = RetryPolicy {
    attempts: 3,
    base: Duration::from_millis(5),
    cap: Duration::from_millis(20),
    longest_wait: Duration::from_secs(5),
};

/// A client with an empty store and, if wanted, Docker credentials.
pub(super) struct Client {
    pub(super) registry: OciRegistry,
    _directory: TempDir,
}

impl Client {
    pub(super) fn new() -> Client {
        Client::with_docker_config(None)
    }

    pub(super) fn with_docker_config(text: Option<&str>) -> Client {
        let directory = tempfile::tempdir().unwrap();
        let config = text.map(|text| {
            let path = directory.path().join("config.json");
            std::fs::write(&path, text).unwrap();
            path
        });
        Client::start(directory, config)
    }

    /// A client that reads its credentials from a file that may change.
    pub(super) fn with_config_file(config: &std::path::Path) -> Client {
        Client::start(tempfile::tempdir().unwrap(), Some(config.to_owned()))
    }

    fn start(directory: TempDir, config: Option<PathBuf>) -> Client {
        let store = directory.path().join("store");
        std::fs::create_dir(&store).unwrap();
        store::publisher::create(&store).unwrap();
        let settings = TransportSettings { retry: IMPATIENT, ..TransportSettings::default() };
        let store = Store::open(&store).unwrap();
        let registry = OciRegistry::new(&settings, CredentialStore { config }, store, Arc::default()).unwrap();
        Client { registry, _directory: directory }
    }

    pub(super) async fn resolve(&self, image: &str) -> Result<ResolvedImage, RegistryError> {
        self.registry.resolve(&image.parse().unwrap(), None).await
    }

    pub(super) async fn refusal(&self, image: &str) -> String {
        self.resolve(image).await.unwrap_err().to_string()
    }

    /// All bytes of a layer.
    pub(super) async fn layer(&self, address: &str, content: &[u8]) -> Result<Vec<u8>, RegistryError> {
        self.blob(address, &layer_of(content)).await
    }

    /// All bytes of a layer with this description, which may be wrong.
    pub(super) async fn blob(&self, address: &str, layer: &RemoteLayer) -> Result<Vec<u8>, RegistryError> {
        let image: ImageRef = format!("{address}/app:1").parse().unwrap();
        let stream = self.registry.layer(&image, layer);
        stream.map_ok(|bytes| bytes.to_vec()).try_concat().await
    }
}

pub(super) fn layer_of(content: &[u8]) -> RemoteLayer {
    RemoteLayer {
        diff_id: Digest::of(content),
        blob: Digest::of(content),
        claimed: content.len() as u64,
        media_type: OCI_LAYER.to_owned(),
        encoding: Compression::Plain,
    }
}

/// Credentials of user anna for `server`.
pub(super) fn docker_config(server: &MockServer) -> String {
    let auth = base64::engine::general_purpose::STANDARD.encode("anna:hush");
    json!({"auths": {server.address().to_string(): {"auth": auth}}}).to_string()
}

/// The digest of a JSON document, and its bytes.
fn document(value: serde_json::Value) -> (String, Vec<u8>) {
    let bytes = value.to_string().into_bytes();
    (Digest::of(&bytes).to_string(), bytes)
}

/// Serves the manifest and config of an image `app:1` with one layer, to requests with the authorization `guard`, if there is one.
pub(super) async fn serve_image(server: &MockServer, guard: Option<&str>) -> String {
    let layer = Digest::of(b"layer").to_string();
    let (config_digest, config) =
        document(json!({"os": "linux", "architecture": crate::registries::image::platform::own().architecture,
        "rootfs": {"type": "layers", "diff_ids": [layer]}}));
    let (_, manifest) = document(json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST,
        "config": {"mediaType": OCI_CONFIG, "digest": config_digest, "size": config.len()},
        "layers": [{"mediaType": OCI_LAYER, "digest": layer, "size": 5}]}));
    for (route, body, media_type) in
        [("manifests/1".to_owned(), manifest, OCI_MANIFEST), (format!("blobs/{config_digest}"), config, OCI_CONFIG)]
    {
        let mut mock = Mock::given(method("GET")).and(path(format!("/v2/app/{route}")));
        if let Some(guard) = guard {
            mock = mock.and(header("authorization", guard));
        }
        mock.respond_with(ResponseTemplate::new(200).set_body_raw(body, media_type)).mount(server).await;
    }
    format!("{}/app:1", server.address())
}

/// Answers every request for the repository that no other mock answers.
pub(super) async fn otherwise(server: &MockServer, answer: ResponseTemplate) {
    Mock::given(wiremock::matchers::path_regex("^/v2/app/")).respond_with(answer).with_priority(9).mount(server).await;
}

pub(super) fn bearer(server: &MockServer) -> ResponseTemplate {
    let challenge = format!(r#"Bearer realm="{}/token",service="s",scope="repository:app:pull""#, server.uri());
    ResponseTemplate::new(401).insert_header("WWW-Authenticate", challenge.as_str())
}

#[tokio::test]
async fn an_image_is_resolved_to_its_layers() {
    let server = MockServer::start().await;
    let image = serve_image(&server, None).await;
    let resolved = Client::new().resolve(&image).await.unwrap();
    assert_eq!(resolved.layers, [RemoteLayer { claimed: 5, ..layer_of(b"layer") }]);
    assert_eq!(resolved.manifest.digest, Digest::of(&resolved.manifest.bytes));
}

#[tokio::test]
async fn basic_credentials_are_shown_when_asked_for() {
    let server = MockServer::start().await;
    let basic = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode("anna:hush"));
    let image = serve_image(&server, Some(&basic)).await;
    otherwise(&server, ResponseTemplate::new(401).insert_header("WWW-Authenticate", "Basic realm=\"r\"")).await;
    Client::with_docker_config(Some(&docker_config(&server))).resolve(&image).await.unwrap();

    let nobody = Client::new().refusal(&image).await;
    assert!(nobody.contains("anonymous users") && nobody.contains("docker login"), "{nobody}");
    let wrong = docker_config(&server).replace(&basic["Basic ".len()..], "YW5uYTp3cm9uZw==");
    let anna = Client::with_docker_config(Some(&wrong)).refusal(&image).await;
    assert!(anna.contains("user anna") && !anna.contains("wrong"), "{anna}");
}

#[tokio::test]
async fn a_token_is_fetched_once_and_again_when_it_is_refused() {
    let server = MockServer::start().await;
    let token = |text: &str| ResponseTemplate::new(200).set_body_json(json!({"token": text, "expires_in": 300}));
    let service = || {
        Mock::given(path("/token")).and(query_param("scope", "repository:app:pull")).and(query_param("service", "s"))
    };
    service().respond_with(token("old")).up_to_n_times(1).expect(1).mount(&server).await;
    service().respond_with(token("new")).expect(1).mount(&server).await;
    let image = serve_image(&server, Some("Bearer new")).await;
    // The registry does not accept the first token.
    Mock::given(path("/v2/app/manifests/1"))
        .and(header("authorization", "Bearer old"))
        .respond_with(bearer(&server))
        .with_priority(1)
        .mount(&server)
        .await;
    otherwise(&server, bearer(&server)).await;
    let client = Client::new();
    // A token that is refused at once is a refusal, not a loop.
    let refused = client.refusal(&image).await;
    assert!(refused.contains("anonymous users"), "{refused}");
    client.resolve(&image).await.unwrap();
    client.resolve(&image).await.unwrap();
}

#[tokio::test]
async fn many_requests_share_one_token() {
    let server = MockServer::start().await;
    let slow =
        ResponseTemplate::new(200).set_body_json(json!({"access_token": "t"})).set_delay(Duration::from_millis(50));
    Mock::given(path("/token")).respond_with(slow).expect(1).mount(&server).await;
    let image = serve_image(&server, Some("Bearer t")).await;
    otherwise(&server, bearer(&server)).await;
    let client = Client::new();
    let all = futures::future::join_all((0..8).map(|_| client.resolve(&image))).await;
    assert!(all.iter().all(Result::is_ok));
}

#[tokio::test]
async fn credentials_go_to_the_token_service() {
    let server = MockServer::start().await;
    Mock::given(method("GET"))
        .and(path("/token"))
        .and(query_param("account", "anna"))
        .and(header_exists("authorization"))
        .respond_with(ResponseTemplate::new(200).set_body_json(json!({"token": "t"})))
        .expect(1)
        .mount(&server)
        .await;
    let image = serve_image(&server, Some("Bearer t")).await;
    otherwise(&server, bearer(&server)).await;
    Client::with_docker_config(Some(&docker_config(&server))).resolve(&image).await.unwrap();
}

#[tokio::test]
async fn a_refresh_token_is_exchanged_by_post() {
    let server = MockServer::start().await;
    Mock::given(method("POST"))
        .and(path("/token"))
        .and(body_string_contains("grant_type=refresh_token"))
        .and(body_string_contains("refresh_token=long-lived"))
        .respond_with(ResponseTemplate::new(200).set_body_json(json!({"access_token": "t"})))
        .expect(1)
        .mount(&server)
        .await;
    let image = serve_image(&server, Some("Bearer t")).await;
    otherwise(&server, bearer(&server)).await;
    let config = json!({"auths": {server.address().to_string(): {"identitytoken": "long-lived"}}}).to_string();
    Client::with_docker_config(Some(&config)).resolve(&image).await.unwrap();
}

#[tokio::test]
async fn a_token_service_that_fails_is_named() {
    for (answer, words) in [
        (ResponseTemplate::new(401), "user anna"),
        (ResponseTemplate::new(500), "after 3 attempts: 500"),
        (ResponseTemplate::new(200).set_body_string("<html>"), "not the JSON of a token"),
        (ResponseTemplate::new(200).set_body_json(json!({"expires_in": 3})), "holds no token"),
    ] {
        let server = MockServer::start().await;
        Mock::given(path("/token")).respond_with(answer).mount(&server).await;
        otherwise(&server, bearer(&server)).await;
        let client = Client::with_docker_config(Some(&docker_config(&server)));
        let error = client.refusal(&format!("{}/app:1", server.address())).await;
        assert!(error.contains(words) && !error.contains("hush"), "{error}");
    }
}

#[tokio::test]
async fn retry_after_is_obeyed_up_to_a_limit() {
    let server = MockServer::start().await;
    let limit = |seconds: &str| ResponseTemplate::new(429).insert_header("Retry-After", seconds);
    let image = serve_image(&server, None).await;
    Mock::given(path("/v2/app/manifests/1"))
        .respond_with(limit("1"))
        .up_to_n_times(1)
        .with_priority(1)
        .mount(&server)
        .await;
    let begin = Instant::now();
    Client::new().resolve(&image).await.unwrap();
    assert!(begin.elapsed() >= Duration::from_secs(1));

    otherwise(&server, limit("86400")).await;
    let begin = Instant::now();
    let error = Client::new().refusal(&format!("{}/app:2", server.address())).await;
    assert!(error.contains("asks to wait 86400 seconds"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(1));
}

#[tokio::test]
async fn what_may_pass_is_repeated_and_in_the_end_reported() {
    let server = MockServer::start().await;
    let image = serve_image(&server, None).await;
    Mock::given(path("/v2/app/manifests/1"))
        .respond_with(ResponseTemplate::new(502))
        .up_to_n_times(2)
        .with_priority(1)
        .mount(&server)
        .await;
    Client::new().resolve(&image).await.unwrap();

    otherwise(&server, ResponseTemplate::new(503)).await;
    let error = Client::new().refusal(&format!("{}/app:2", server.address())).await;
    assert!(error.contains("after 3 attempts: 503"), "{error}");
}

#[tokio::test]
async fn a_registry_that_is_not_there_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let error = Client::new().refusal(&format!("{address}/app:1")).await;
    assert!(error.starts_with(&format!("cannot reach registry {address}: Connection refused")), "{error}");
}

#[tokio::test]
async fn an_unknown_image_is_named() {
    let server = MockServer::start().await;
    let image = format!("{}/app:nope", server.address());
    let error = Client::new().refusal(&image).await;
    assert_eq!(error, format!("registry {} has no image {image}: check the name and the tag", server.address()));
}

#[tokio::test]
async fn wrong_bytes_are_refused_before_they_are_read() {
    let server = MockServer::start().await;
    let image = serve_image(&server, None).await;
    let other = Digest::of(b"other").to_string();
    let by_digest = format!("{}/app@{other}", server.address());
    let lie = ResponseTemplate::new(200).set_body_raw(r#"{"schemaVersion":2}"#, OCI_MANIFEST);
    Mock::given(path(format!("/v2/app/manifests/{other}"))).respond_with(lie).mount(&server).await;
    assert!(Client::new().refusal(&by_digest).await.contains(&format!("instead of {other}")));

    let stated = ResponseTemplate::new(200)
        .insert_header("Docker-Content-Digest", other.as_str())
        .set_body_raw(r#"{"schemaVersion":2}"#, OCI_MANIFEST);
    Mock::given(path("/v2/app/manifests/1")).respond_with(stated).with_priority(1).mount(&server).await;
    assert!(Client::new().refusal(&image).await.contains(&format!("instead of {other}")));
}

#[tokio::test]
async fn what_is_no_container_image_is_named_by_its_type() {
    let layer = |media_type: &str| {
        json!({"schemaVersion": 2, "mediaType": DOCKER_MANIFEST,
            "config": {"mediaType": OCI_CONFIG, "digest": Digest::of(b"c"), "size": 1},
            "layers": [{"mediaType": media_type, "digest": Digest::of(b"l"), "size": 1}]})
    };
    let chart = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": [],
        "config": {"mediaType": "application/vnd.cncf.helm.config.v1+json", "digest": Digest::of(b"c"), "size": 1}});
    let (config_digest, config) = document(json!({"rootfs": {"diff_ids": [Digest::of(b"t")]}}));
    for (manifest, media_type, words) in [
        (json!({"schemaVersion": 1, "fsLayers": []}), "application/json", "manifest.v1+json of"),
        (chart, OCI_MANIFEST, "vnd.cncf.helm.config.v1+json of the config"),
        (layer("application/x-squashfs"), DOCKER_MANIFEST, "x-squashfs of layer"),
        (json!({"schemaVersion": 2}), "text/html", "text/html of"),
    ] {
        let server = MockServer::start().await;
        let text = manifest.to_string().replace(&Digest::of(b"c").to_string(), &config_digest);
        let answer = ResponseTemplate::new(200).set_body_raw(text, media_type);
        Mock::given(path("/v2/app/manifests/1")).respond_with(answer).mount(&server).await;
        let answer = ResponseTemplate::new(200).set_body_raw(config.clone(), OCI_CONFIG);
        Mock::given(path(format!("/v2/app/blobs/{config_digest}"))).respond_with(answer).mount(&server).await;
        let error = Client::new().refusal(&format!("{}/app:1", server.address())).await;
        assert!(error.starts_with("unsupported media type") && error.contains(words), "{error}");
    }
}

#[tokio::test]
async fn a_registry_that_does_not_check_digests_leads_nowhere() {
    /// Serves the same index under every name: a cycle, if it were followed.
    struct Circle;
    impl Respond for Circle {
        fn respond(&self, _: &Request) -> ResponseTemplate {
            let entry = json!({"mediaType": OCI_INDEX, "digest": Digest::of(b"x"), "size": 100});
            let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]});
            ResponseTemplate::new(200).set_body_raw(index.to_string(), OCI_INDEX)
        }
    }
    let server = MockServer::start().await;
    Mock::given(wiremock::matchers::path_regex("^/v2/app/")).respond_with(Circle).mount(&server).await;
    let error = Client::new().refusal(&format!("{}/app:1", server.address())).await;
    assert!(error.contains("has digest"), "{error}");
}
