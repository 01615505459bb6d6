//! What users of other clients reported about registries: passwords that expire, images that are hidden, requests that are not supported.

use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::json;
use wiremock::matchers::{header, method, path, path_regex, query_param};
use wiremock::{Mock, MockServer, ResponseTemplate};

use crate::registries::image::manifest::OCI_MANIFEST;
use crate::registries::oci::tests::{Client, bearer, docker_config, otherwise, serve_image};
use crate::registries::*;

const BASIC: &str = "Basic YW5uYTpodXNo";

fn challenge() -> ResponseTemplate {
    ResponseTemplate::new(401).insert_header("WWW-Authenticate", "Basic realm=\"r\"")
}

#[tokio::test]
async fn a_password_that_is_refused_by_403_is_looked_up_again() {
    // As ECR does: a request without a login gets a challenge, and one with an expired password gets 403.
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

/// The results of `TagLister::look` at a registry that answers HEAD like this: first without a known digest, then with the one that was
/// found.
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
    // The API itself, and a place on the same server that asks for credentials.
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

/// A server that answers every connection with these bytes.
async fn answering(answer: Vec<u8>) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            let mut head = vec![0; 4096];
            let _ = connection.read(&mut head).await;
            let _ = connection.write_all(&answer).await;
            let _ = connection.shutdown().await;
        }
    });
    address
}

#[tokio::test]
async fn headers_are_read_as_go_reads_them() {
    for odd in [
        "X-Odd : value",
        "X-Folded: a,\r\n b",
        "X Foo: a",
        "X-\u{dc}ml: a",
        "X-A: a\u{1}b",
        "Set-Cookie: visid=\u{1}; path=/",
        "X-Latin: \u{fc}\u{e4}",
        "X-Empty:",
        "X-A: b\r\nX-A: c",
    ] {
        let head = format!("HTTP/1.1 404 Not Found\r\n{odd}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        // Each letter is a byte, as in old encodings.
        let address = answering(head.chars().map(|letter| letter as u8).collect()).await;
        let refused = Client::new().refusal(&format!("{address}/app:1")).await;
        assert!(refused.contains("has no image"), "{odd:?}: {refused}");
    }
}

#[tokio::test]
async fn repositories_that_fail_hold_up_no_other_of_their_registry() {
    let server = MockServer::start().await;
    let image = serve_image(&server, None).await;
    let fails = ResponseTemplate::new(500);
    Mock::given(path_regex("^/v2/bad")).respond_with(fails).mount(&server).await;
    let client = Client::new();
    let mut said = String::new();
    for round in 0..15 {
        said = client.refusal(&format!("{}/bad{}:1", server.address(), round % 3)).await;
    }
    assert!(said.contains("its repository bad2 failed 8 times in a row, last with: 500"), "{said}");
    let seen = server.received_requests().await.unwrap();
    let asked = seen.iter().filter(|request| request.url.path().starts_with("/v2/bad")).count();
    assert!(asked <= 24, "each is left alone after eight failures: {asked}");
    let begin = std::time::Instant::now();
    client.resolve(&image).await.unwrap();
    assert!(begin.elapsed().as_secs() < 5);
}

#[tokio::test]
async fn a_fault_that_asks_for_an_hour_is_one_repositorys() {
    let server = MockServer::start().await;
    let image = serve_image(&server, None).await;
    let fault = ResponseTemplate::new(503).insert_header("Retry-After", "3600");
    Mock::given(path_regex("^/v2/bad")).respond_with(fault).mount(&server).await;
    let client = Client::new();
    let bad = format!("{}/bad:1", server.address());
    client.refusal(&bad).await;
    client.resolve(&image).await.unwrap();
    let held = client.registry.client.transport().limits().held_from(&bad.parse().unwrap()).unwrap();
    let lasts = held.until.duration_since(jiff::Timestamp::now()).as_secs();
    assert!((50..=60).contains(&lasts), "{lasts}");
}

#[tokio::test]
async fn what_is_left_of_a_rate_limit_counts_where_the_registry_says_it_of_manifests() {
    let spent = |limit: &str, answer: ResponseTemplate| {
        let answer = answer.insert_header("X-RateLimit-Limit", limit).insert_header("X-RateLimit-Remaining", "0");
        answer.insert_header("X-RateLimit-Reset", "3000")
    };
    let there = Client::new().resolve(&serve_image(&MockServer::start().await, None).await).await.unwrap();
    let manifest = || ResponseTemplate::new(200).set_body_raw(there.manifest.bytes.to_vec(), OCI_MANIFEST);
    let config = || ResponseTemplate::new(200).set_body_raw(there.config.bytes.to_vec(), "application/json");
    let storage = MockServer::start().await;
    Mock::given(path("/manifest")).respond_with(spent("100", manifest())).mount(&storage).await;
    let led = ResponseTemplate::new(307).insert_header("Location", format!("{}/manifest", storage.uri()).as_str());
    for (says, manifest, config, counts) in [
        ("the registry of manifests", spent("100", manifest()), config(), true),
        ("a limiter that is off", spent("0", manifest()), config(), false),
        ("the registry of blobs", manifest(), spent("100", config()), false),
        ("storage", led, config(), false),
    ] {
        let server = MockServer::start().await;
        Mock::given(path("/v2/app/manifests/1")).respond_with(manifest).mount(&server).await;
        Mock::given(path_regex("^/v2/app/blobs/")).respond_with(config).mount(&server).await;
        let client = Client::new();
        client.resolve(&format!("{}/app:1", server.address())).await.unwrap();
        let limits = client.registry.client.transport().limits();
        assert_eq!(limits.rate_limit(&server.address().to_string()).is_some(), counts, "{says}");
        assert!(limits.held(&server.address().to_string()).is_none(), "{says}");
    }
}

#[tokio::test]
async fn a_refusal_is_told_in_the_registrys_own_words_too() {
    let said = |status: u16, message: &str| {
        let errors = json!({"errors": [{"code": "DENIED", "message": message, "detail": {}}]});
        ResponseTemplate::new(status).set_body_json(errors)
    };
    for (answer, ours, its) in [
        (said(403, "This image is quarantined: CVE-2024-1"), "docker login", "This image is quarantined: CVE-2024-1"),
        (said(404, "project team not found, or proxy cache endpoint unhealthy"), "has no image", "endpoint unhealthy"),
        (said(404, "a\u{1b}[2Jb"), "check the name", "a\\u{1b}[2Jb"),
        (said(451, "not in your country"), "451", "not in your country"),
        (said(403, &"x".repeat(9000)), "check the name", "xxx"),
    ] {
        let server = MockServer::start().await;
        otherwise(&server, answer).await;
        let error = Client::new().refusal(&format!("{}/app:1", server.address())).await;
        assert!(error.contains(ours) && error.contains(its) && error.len() < 700, "{error}");
    }
    let server = MockServer::start().await;
    let refused = ResponseTemplate::new(401).set_body_json(json!({"details": "incorrect username or password"}));
    Mock::given(path("/token")).respond_with(refused).mount(&server).await;
    otherwise(&server, bearer(&server)).await;
    let error = Client::with_docker_config(Some(&docker_config(&server)));
    let error = error.refusal(&format!("{}/app:1", server.address())).await;
    assert!(
        error.contains("user anna") && error.ends_with("the registry says: incorrect username or password"),
        "{error}"
    );
}
