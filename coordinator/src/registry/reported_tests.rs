//! What users of other clients reported of registries: passwords that expire, images that are hidden, requests that are not known.

use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::json;
use wiremock::matchers::{header, method, path, path_regex, query_param};
use wiremock::{Mock, MockServer, ResponseTemplate};

use super::manifest::OCI_MANIFEST;
use super::tests::{Client, bearer, docker_config, otherwise, serve_image};
use super::*;

const BASIC: &str = "Basic YW5uYTpodXNo";

fn challenge() -> ResponseTemplate {
    ResponseTemplate::new(401).insert_header("WWW-Authenticate", "Basic realm=\"r\"")
}

#[tokio::test]
async fn a_password_that_is_refused_by_403_is_looked_up_again() {
    // As ECR does: nobody is asked to log in, an expired password is forbidden.
    let open = MockServer::start().await;
    let there = Client::new().resolve(&serve_image(&open, None).await).await.unwrap();
    let server = MockServer::start().await;
    let good = Arc::new(Mutex::new(BASIC));
    let answers = Arc::clone(&good);
    let ecr = move |request: &wiremock::Request| match request.headers.get("authorization") {
        None => challenge(),
        Some(shown) if shown != *answers.lock() => ResponseTemplate::new(403),
        Some(_) if request.url.path().contains("/manifests/") => {
            ResponseTemplate::new(200).set_body_raw(there.manifest.bytes.to_vec(), OCI_MANIFEST)
        }
        Some(_) => ResponseTemplate::new(200).set_body_raw(there.config.bytes.to_vec(), "application/json"),
    };
    Mock::given(path_regex("^/v2/app/")).respond_with(ecr).mount(&server).await;
    let image = format!("{}/app:1", server.address());
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config.json");
    let log_in = |auth: &str| std::fs::write(&config, docker_config(&server).replace(&BASIC[6..], auth)).unwrap();
    log_in(&BASIC[6..]);
    let client = Client::with_config_file(&config);
    client.resolve(&image).await.unwrap();

    *good.lock() = "Basic bmV3Om5ldw==";
    assert!(client.refusal(&image).await.contains("user anna"), "nothing else is known yet");
    log_in("bmV3Om5ldw==");
    client.resolve(&image).await.unwrap();
    // This time somebody logs in before the old password is refused.
    log_in(&BASIC[6..]);
    *good.lock() = BASIC;
    client.resolve(&image).await.unwrap();
}

#[tokio::test]
async fn a_password_that_changed_while_it_was_kept_is_seen_at_404() {
    let server = MockServer::start().await;
    let image = serve_image(&server, Some(BASIC)).await;
    Mock::given(path("/v2/")).respond_with(challenge()).mount(&server).await;
    otherwise(&server, ResponseTemplate::new(404)).await;
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config.json");
    std::fs::write(&config, docker_config(&server).replace(&BASIC[6..], "b2xkOm9sZA==")).unwrap();
    let client = Client::with_config_file(&config);
    assert!(client.refusal(&image).await.contains("has no image"));
    std::fs::write(&config, docker_config(&server)).unwrap();
    client.resolve(&image).await.unwrap();
}

#[tokio::test]
async fn what_is_hidden_is_asked_for_as_v2_wants_it() {
    for hidden in [403, 404] {
        let server = MockServer::start().await;
        let image = serve_image(&server, Some(BASIC)).await;
        Mock::given(path("/v2/")).respond_with(challenge()).mount(&server).await;
        otherwise(&server, ResponseTemplate::new(hidden)).await;
        Client::with_docker_config(Some(&docker_config(&server))).resolve(&image).await.unwrap();
        let nobody = Client::new().refusal(&image).await;
        assert!(nobody.contains("anonymous users") && nobody.contains("docker login"), "{hidden}: {nobody}");
    }
}

#[tokio::test]
async fn a_service_that_wants_the_challenges_scope_is_asked_with_it() {
    let server = MockServer::start().await;
    let token = |scope: &str, token: &str| {
        let answer = ResponseTemplate::new(200).set_body_json(json!({"token": token}));
        Mock::given(path("/token")).and(query_param("scope", scope)).respond_with(answer)
    };
    token("repository:app:pull", "own").expect(1).mount(&server).await;
    token("repository:mirror/app:pull", "other").expect(1).mount(&server).await;
    let image = serve_image(&server, Some("Bearer other")).await;
    let wants = format!("Bearer realm=\"{}/token\",scope=\"repository:mirror/app:pull,push\"", server.uri());
    otherwise(&server, ResponseTemplate::new(401).insert_header("WWW-Authenticate", wants.as_str())).await;
    let client = Client::new();
    client.resolve(&image).await.unwrap();
    client.resolve(&image).await.unwrap();
}

#[tokio::test]
async fn the_way_without_a_token_service_is_tried_after_the_other() {
    for status in [401, 404] {
        let server = MockServer::start().await;
        Mock::given(path("/token")).respond_with(ResponseTemplate::new(status)).mount(&server).await;
        let image = serve_image(&server, Some(BASIC)).await;
        otherwise(&server, bearer(&server).append_header("WWW-Authenticate", "Basic realm=\"r\"")).await;
        Client::with_docker_config(Some(&docker_config(&server))).resolve(&image).await.unwrap();
    }
}

/// What a look finds at a registry that answers HEAD like this, for one who knows nothing and one who knows what is there.
async fn looks(head: ResponseTemplate) -> [Result<TagLook, RegistryError>; 2] {
    let server = MockServer::start().await;
    let image: ImageRef = serve_image(&server, None).await.parse().unwrap();
    Mock::given(method("HEAD")).respond_with(head).with_priority(1).mount(&server).await;
    let client = Client::new();
    let first = client.registry.look(&image, None).await;
    let known = match first {
        Ok(TagLook::At(digest)) => Some(digest),
        _ => None,
    };
    [first, client.registry.look(&image, known).await]
}

#[tokio::test]
async fn a_registry_without_head_or_digests_is_asked_for_the_document() {
    let server = MockServer::start().await;
    let image = serve_image(&server, None).await;
    let there = Client::new().resolve(&image).await.unwrap().manifest.digest;
    let no_digest = || ResponseTemplate::new(200).insert_header("Content-Type", OCI_MANIFEST);
    let stating = |digest: &str| no_digest().insert_header("Docker-Content-Digest", digest);
    for head in [
        ResponseTemplate::new(405),
        ResponseTemplate::new(404),
        ResponseTemplate::new(400),
        ResponseTemplate::new(501),
        ResponseTemplate::new(401),
        ResponseTemplate::new(403),
        ResponseTemplate::new(429),
        ResponseTemplate::new(500),
        no_digest(),
        stating("W/\"sha256:x\""),
        stating("sha512:00"),
    ] {
        assert_eq!(looks(head).await, [Ok(TagLook::At(there)), Ok(TagLook::Same)]);
    }
    let stated = stating(&format!(" {there} "));
    assert_eq!(looks(stated).await, [Ok(TagLook::At(there)), Ok(TagLook::Same)]);
}

#[tokio::test]
async fn proof_follows_a_redirect_within_the_registry_where_it_is_asked_for() {
    // The API itself, and a place of the same server that asks.
    for place in ["/v2/proxy/app", "/artifactory/api/docker/app"] {
        let server = MockServer::start().await;
        let image = serve_image(&server, Some(BASIC)).await;
        otherwise(&server, challenge()).await;
        let client = Client::with_docker_config(Some(&docker_config(&server)));
        let document = client.resolve(&image).await.unwrap().manifest;
        let to = format!("{}{place}/manifests/1", server.uri());
        Mock::given(path("/v2/app/manifests/1"))
            .and(header("authorization", BASIC))
            .respond_with(ResponseTemplate::new(307).insert_header("Location", to.as_str()))
            .with_priority(1)
            .mount(&server)
            .await;
        let target = format!("{place}/manifests/1");
        let answer = ResponseTemplate::new(200).set_body_raw(document.bytes.to_vec(), OCI_MANIFEST);
        Mock::given(path(target.as_str()))
            .and(header("authorization", BASIC))
            .respond_with(answer)
            .mount(&server)
            .await;
        Mock::given(path(target.as_str())).respond_with(challenge()).with_priority(9).mount(&server).await;
        Client::with_docker_config(Some(&docker_config(&server))).resolve(&image).await.unwrap();
    }
}

#[tokio::test]
async fn a_gateway_leads_to_a_registry_that_gives_tokens_to_anybody() {
    let (gateway, behind) = (MockServer::start().await, MockServer::start().await);
    let token = ResponseTemplate::new(200).set_body_json(json!({"token": "anybodys"}));
    Mock::given(path("/token")).respond_with(token).mount(&behind).await;
    serve_image(&behind, Some("Bearer anybodys")).await;
    otherwise(&behind, bearer(&behind)).await;
    let uri = behind.uri();
    let lead = move |request: &wiremock::Request| {
        ResponseTemplate::new(307).insert_header("Location", format!("{uri}{}", request.url.path()).as_str())
    };
    Mock::given(path_regex("^/v2/app/")).respond_with(lead).mount(&gateway).await;
    let image = format!("{}/app:1", gateway.address());
    Client::with_docker_config(Some(&docker_config(&gateway))).resolve(&image).await.unwrap();
    let shown = |request: &wiremock::Request| request.headers.get("authorization").cloned();
    let seen = behind.received_requests().await.unwrap();
    assert!(seen.iter().filter_map(shown).all(|proof| proof == "Bearer anybodys"), "{seen:?}");
    assert!(gateway.received_requests().await.unwrap().iter().all(|request| shown(request).is_none()));
}

#[tokio::test]
async fn a_registry_that_gives_fewer_tags_at_a_time_is_asked_for_fewer() {
    for most in ["100", ""] {
        let server = MockServer::start().await;
        let tags = ResponseTemplate::new(200).set_body_json(json!({"tags": ["a", "b"]}));
        let list = || Mock::given(path("/v2/app/tags/list"));
        match most {
            "" => list().and(wiremock::matchers::query_param_is_missing("n")),
            most => list().and(query_param("n", most)),
        }
        .respond_with(tags)
        .mount(&server)
        .await;
        otherwise(&server, ResponseTemplate::new(400)).await;
        let image: ImageRef = format!("{}/app:1", server.address()).parse().unwrap();
        assert_eq!(Client::new().registry.tags(&image).await.unwrap(), ["a", "b"], "{most}");
    }
}

#[tokio::test]
async fn headers_are_read_as_go_reads_them() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            let mut head = vec![0; 4096];
            let _ = connection.read(&mut head).await;
            let answer = "HTTP/1.1 404 Not Found\r\nX-Odd : value\r\nX-Folded: a,\r\n b\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            let _ = connection.write_all(answer.as_bytes()).await;
        }
    });
    let refused = Client::new().refusal(&format!("{address}/app:1")).await;
    assert!(refused.contains("has no image"), "{refused}");
}
