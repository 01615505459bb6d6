//! Which registries each kind of login is sent to: those that want a password, and those that want a token.

use base64::Engine as _;
use serde_json::json;
use wiremock::matchers::path;
use wiremock::{Mock, MockServer, ResponseTemplate};

use crate::registries::oci::tests::{Client, bearer, otherwise, serve_image};

/// A login as it stands in Docker's configuration.
fn config(server: &MockServer, login: &serde_json::Value) -> String {
    json!({"auths": {server.address().to_string(): login}}).to_string()
}

#[tokio::test]
async fn a_registrys_own_token_is_shown_to_it_without_asking_for_another() {
    let server = MockServer::start().await;
    let answer = ResponseTemplate::new(200).set_body_json(json!({"token": "other"}));
    Mock::given(path("/token")).respond_with(answer).expect(0).mount(&server).await;
    let image = serve_image(&server, Some("Bearer direct")).await;
    otherwise(&server, bearer(&server)).await;
    let client = Client::with_docker_config(Some(&config(&server, &json!({"registrytoken": "direct"}))));
    client.resolve(&image).await.unwrap();
    let wrong = Client::with_docker_config(Some(&config(&server, &json!({"registrytoken": "stale-token"}))));
    let error = wrong.refusal(&image).await;
    assert!(error.contains("the logged-in user") && !error.contains("stale-token"), "{error}");
}

#[tokio::test]
async fn beside_a_refresh_token_the_password_is_for_registries_that_take_no_tokens() {
    let server = MockServer::start().await;
    let auth = base64::engine::general_purpose::STANDARD.encode("anna:hush");
    let image = serve_image(&server, Some(&format!("Basic {auth}"))).await;
    otherwise(&server, ResponseTemplate::new(401).insert_header("WWW-Authenticate", "Basic realm=\"r\"")).await;
    let login = json!({"auth": auth, "identitytoken": "refresh"});
    Client::with_docker_config(Some(&config(&server, &login))).resolve(&image).await.unwrap();
    let alone = Client::with_docker_config(Some(&config(&server, &json!({"identitytoken": "refresh"}))));
    assert!(alone.refusal(&image).await.contains("the logged-in user"));
}

#[tokio::test]
async fn a_part_of_a_registry_has_its_own_login() {
    let server = MockServer::start().await;
    let auth = base64::engine::general_purpose::STANDARD.encode("anna:hush");
    let image = serve_image(&server, Some(&format!("Basic {auth}"))).await;
    otherwise(&server, ResponseTemplate::new(401).insert_header("WWW-Authenticate", "Basic realm=\"r\"")).await;
    let address = server.address().to_string();
    let both = |one: &str, other: &str| json!({"auths": {address.clone(): {"auth": one}, format!("{address}/app"): {"auth": other}}});
    Client::with_docker_config(Some(&both("ZXZlOng=", &auth).to_string())).resolve(&image).await.unwrap();
    let wrong = Client::with_docker_config(Some(&both(&auth, "ZXZlOng=").to_string())).refusal(&image).await;
    assert!(wrong.contains("user eve"), "{wrong}");
}
