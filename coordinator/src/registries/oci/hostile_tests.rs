//! Malicious registries, one attack each: what they learn, and what they cost.

use std::io::Write as _;

use wiremock::matchers::path_regex;

use crate::registries::oci::tests::{Client, bearer, docker_config, layer_of, otherwise, serve_image};
use crate::registries::*;
use flate2::write::GzEncoder;
use futures::StreamExt;
use serde_json::json;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use wiremock::matchers::{method, path};
use wiremock::{Mock, MockServer, ResponseTemplate};

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[tokio::test]
async fn a_manifest_that_is_packed_is_unpacked_and_a_bomb_is_not() {
    let server = MockServer::start().await;
    let image = serve_image(&server, None).await;
    let plain = Client::new().resolve(&image).await.unwrap().manifest;
    let packed = ResponseTemplate::new(200)
        .insert_header("Content-Encoding", "gzip")
        .insert_header("Docker-Content-Digest", plain.digest.to_string().as_str())
        .set_body_raw(gzip(&plain.bytes), crate::registries::image::manifest::OCI_MANIFEST);
    Mock::given(path("/v2/app/manifests/1")).respond_with(packed).with_priority(1).mount(&server).await;
    assert_eq!(Client::new().resolve(&image).await.unwrap().manifest.bytes, plain.bytes);

    let bomb = gzip(&vec![b' '; 64 << 20]);
    for (coding, body, words) in [
        ("gzip", bomb, "longer than"),
        ("gzip", b"\x1f\x8b{}".to_vec(), "not the gzip"),
        ("gzip, gzip, gzip", b"{}".to_vec(), "packed 3 times"),
    ] {
        let server = MockServer::start().await;
        let answer = ResponseTemplate::new(200).insert_header("Content-Encoding", coding);
        otherwise(&server, answer.set_body_raw(body, crate::registries::image::manifest::OCI_MANIFEST)).await;
        let error = Client::new().refusal(&format!("{}/app:1", server.address())).await;
        assert!(error.contains(words), "{error}");
    }
}

#[tokio::test]
async fn a_token_that_no_header_holds_or_that_lives_for_ever_is_bounded() {
    for (token, words) in
        [("a\nX-Evil: 1".to_owned(), "nothing that a header can hold"), ("x".repeat(65 << 10), "longer than")]
    {
        let server = MockServer::start().await;
        let answer = ResponseTemplate::new(200).set_body_json(json!({"token": token}));
        Mock::given(path("/token")).respond_with(answer).mount(&server).await;
        otherwise(&server, bearer(&server)).await;
        let error = Client::new().refusal(&format!("{}/app:1", server.address())).await;
        assert!(error.contains(words), "{error}");
    }
    let server = MockServer::start().await;
    let answer = ResponseTemplate::new(200).set_body_json(json!({"token": "t", "expires_in": u64::MAX}));
    Mock::given(path("/token")).respond_with(answer).mount(&server).await;
    let image = serve_image(&server, Some("Bearer t")).await;
    otherwise(&server, bearer(&server)).await;
    for _ in 0..50 {
        Client::new().resolve(&image).await.unwrap();
    }
}

#[tokio::test]
async fn a_password_is_shown_to_the_registry_and_to_nobody_it_leads_to() {
    let (registry, elsewhere) = (MockServer::start().await, MockServer::start().await);
    serve_image(&elsewhere, None).await;
    let to = |path: &str| {
        ResponseTemplate::new(302).insert_header("Location", format!("{}{path}", elsewhere.uri()).as_str())
    };
    let basic = ResponseTemplate::new(401).insert_header("WWW-Authenticate", "Basic realm=\"r\"");
    Mock::given(path_regex("^/v2/app/"))
        .and(wiremock::matchers::header_exists("authorization"))
        .and(path("/v2/app/manifests/1"))
        .respond_with(to("/v2/app/manifests/1"))
        .with_priority(1)
        .mount(&registry)
        .await;
    otherwise(&registry, basic).await;
    let client = Client::with_docker_config(Some(&docker_config(&registry)));
    let error = client.refusal(&format!("{}/app:1", registry.address())).await;
    assert!(
        error.contains("refuses") || error.contains("lacks"),
        "the config is asked of the registry itself: {error}"
    );
    let seen = elsewhere.received_requests().await.unwrap();
    assert!(!seen.is_empty() && seen.iter().all(|request| !request.headers.contains_key("authorization")), "{seen:?}");
    let seen = registry.received_requests().await.unwrap();
    assert!(seen.iter().any(|request| request.headers.contains_key("authorization")));
}

#[tokio::test]
async fn a_token_request_with_a_password_is_not_led_on() {
    let (registry, thief) = (MockServer::start().await, MockServer::start().await);
    let answer = ResponseTemplate::new(200).set_body_json(json!({"token": "t"}));
    Mock::given(method("GET")).and(path("/token")).respond_with(answer).mount(&thief).await;
    let to = ResponseTemplate::new(307).insert_header("Location", format!("{}/token", thief.uri()).as_str());
    Mock::given(path("/token")).respond_with(to).mount(&registry).await;
    otherwise(&registry, bearer(&registry)).await;
    let image = format!("{}/app:1", registry.address());
    let error = Client::with_docker_config(Some(&docker_config(&registry))).refusal(&image).await;
    assert!(error.contains("credentials are not sent on"), "{error}");
    assert!(thief.received_requests().await.unwrap().is_empty());
    // A request without credentials may be redirected.
    let _ = Client::new().refusal(&image).await;
    assert_eq!(thief.received_requests().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_byte_for_each_connection_is_no_progress() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let content = vec![7; 1000];
    tokio::spawn(async move {
        let mut sent = 0;
        while let Ok((mut connection, _)) = listener.accept().await {
            let mut head = vec![0; 2000];
            let count = connection.read(&mut head).await.unwrap_or(0);
            let blob = String::from_utf8_lossy(&head[..count]).contains("/blobs/");
            let answer = match blob && sent > 0 {
                true => format!(
                    "HTTP/1.1 206 x\r\nContent-Range: bytes {sent}-999/1000\r\nContent-Length: {}\r\n\r\n\u{7}",
                    1000 - sent
                ),
                false if blob => "HTTP/1.1 200 x\r\nContent-Length: 1000\r\n\r\n\u{7}".to_owned(),
                false => "HTTP/1.1 200 x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_owned(),
            };
            sent += usize::from(blob);
            let _ = connection.write_all(answer.as_bytes()).await;
        }
    });
    let image: ImageRef = format!("{address}/app:1").parse().unwrap();
    let client = Client::new();
    let mut stream = client.registry.layer(&image, &layer_of(&content));
    let mut bytes = 0;
    let ended = tokio::time::timeout(Duration::from_secs(60), async {
        while let Some(piece) = stream.next().await {
            match piece {
                Ok(piece) => bytes += piece.len(),
                Err(error) => return error.to_string(),
            }
        }
        "whole".to_owned()
    });
    let ended = ended.await.unwrap();
    assert!(ended != "whole" && bytes < 100, "{bytes}: {ended}");
}

#[tokio::test]
async fn endless_headers_end() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            tokio::spawn(async move {
                let _ = connection.write_all(b"HTTP/1.1 200 OK\r\n").await;
                let line = format!("X-Long: {}\r\n", "x".repeat(1000));
                while connection.write_all(line.as_bytes()).await.is_ok() {}
            });
        }
    });
    let refused = tokio::time::timeout(Duration::from_secs(60), async {
        Client::new().refusal(&format!("{address}/app:1")).await
    });
    let refused = refused.await.unwrap();
    assert!(refused.contains(&address.to_string()), "{refused}");
}
