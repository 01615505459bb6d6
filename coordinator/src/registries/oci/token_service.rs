//! Fetches a bearer token from the service that a challenge names.
//!
//! Passwords and anonymous requests use GET; a service that answers 405 to a password is asked again by POST. Refresh tokens use POST.
//! Credentials go to that one server only. Answers are bounded, and a token's life is kept within sensible limits.

use std::borrow::Cow;
use std::time::Duration;

use http::Method;
use reqwest::{RequestBuilder, StatusCode};
use serde::Deserialize;
use serde_json::Value;
use store::go_json;
use tokio::time::Instant;

use crate::registries::error::RegistryError;
use crate::registries::oci::attempt_error::{AttemptError, passing};
use crate::registries::oci::authorization_header::{Scope, basic_header, bearer_header, denied, sensitive};
use crate::registries::oci::challenge::Challenge;
use crate::registries::oci::credential_cache::spread_out;
use crate::registries::oci::credentials::{Credentials, Secret};
use crate::registries::oci::egress::AddressScope;
use crate::registries::oci::error_body::explained;
use crate::registries::oci::redirect::{Redirects, strip};
use crate::registries::oci::retry::retry_document;
use crate::registries::oci::transport::{Answer, Channel, NamedBy, Peer, Transport};

/// A token's life if the service does not state one, by the distribution specification. It is also the shortest life that is believed.
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// A token is no longer used this long before it expires: the request has to travel.
pub(super) const MARGIN: Duration = Duration::from_secs(10);
/// The share of a token's life by which it is randomly shortened, so that tokens that were fetched together do not expire together.
const SPREAD: f64 = 0.1;
/// The longest life that is believed: the service may have miscounted, and rights change.
const LONGEST_LIFE: Duration = Duration::from_secs(24 * 3600);
/// The longest token answer that is read.
const MAX_ANSWER: u64 = 256 << 10;
/// The longest token that is sent: servers refuse longer headers.
const MAX_TOKEN: usize = 64 << 10;
/// The longest list of scopes in a challenge that is used, and the most scopes taken from it.
const MAX_SCOPE: usize = 1000;
const MOST_SCOPES: usize = 10;

/// The client id that is sent to token services.
const CLIENT: &str = "cachefs";

/// What a token is requested with.
pub(super) struct TokenRequest<'a> {
    /// What the token is for; named in errors.
    pub(super) scope: &'a Scope,
    /// The challenge, which states the service's URL and name.
    pub(super) challenge: &'a Challenge,
    /// The scopes to request, in the service's notation.
    pub(super) wanted: Vec<String>,
    /// The credentials to request it with.
    pub(super) credentials: &'a Credentials,
    /// The registry that named the service.
    pub(super) peer: Peer,
}

/// A token service's answer; both names of the token are in use.
#[derive(Default, Deserialize)]
#[serde(default)]
struct TokenAnswer {
    token: String,
    access_token: String,
    expires_in: Value,
}

/// Reads a number of seconds, written as a number or as text. Anything else counts as missing.
fn seconds(said: &Value) -> Option<u64> {
    let number: Option<f64> = match said {
        Value::String(text) => text.trim().parse().ok(),
        other => other.as_f64(),
    };
    number.map(|seconds| seconds.max(0.0) as u64)
}

/// The scope for pulling from a repository.
pub(super) fn own_scope(scope: &Scope) -> String {
    format!("repository:{}:pull", scope.repository)
}

/// The scopes that a challenge asks for; those of repositories are reduced to pulling.
pub(super) fn scopes_of(challenge: &Challenge) -> Vec<String> {
    let named = challenge.get("scope").filter(|scope| scope.len() <= MAX_SCOPE).unwrap_or_default();
    named.split_ascii_whitespace().take(MOST_SCOPES).map(|scope| pulling(scope).into_owned()).collect()
}

/// A scope; one of a repository is reduced to pulling.
fn pulling(scope: &str) -> Cow<'_, str> {
    match scope.strip_prefix("repository:").and_then(|rest| rest.rsplit_once(':')) {
        Some((name, _)) => Cow::Owned(format!("repository:{name}:pull")),
        None => Cow::Borrowed(scope),
    }
}

/// Whether a challenge asks for anything other than pulling from the repository.
pub(super) fn is_other_scope(scope: &Scope, challenge: &Challenge) -> bool {
    let asked = scopes_of(challenge);
    !asked.is_empty() && asked != [own_scope(scope)]
}

/// Asks the token service that the challenge names. Returns the header's value, and when it expires.
pub(super) async fn fetch(
    transport: &Transport,
    wanted: &TokenRequest<'_>,
) -> Result<(Secret, Option<Instant>), RegistryError> {
    let realm = realm(transport, wanted)?;
    let host = realm.host_str().unwrap_or_default().to_owned();
    let issued = Instant::now();
    let ask = || ask(transport, wanted, &realm, &host);
    let body = retry_document(transport.attempts(), &host, "the token service", ask).await?;
    let answer: TokenAnswer =
        go_json::from_slice(&body).map_err(|_| bad_token(&host, "it is not the JSON of a token"))?;
    let token = [answer.token, answer.access_token].into_iter().find(|token| !token.is_empty());
    let token = token.ok_or_else(|| bad_token(&host, "it holds no token"))?;
    if token.len() > MAX_TOKEN {
        return Err(bad_token(&host, format!("its token is longer than {MAX_TOKEN} bytes")));
    }
    if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(bad_token(&host, "its token is nothing that a header can hold"));
    }
    let life = seconds(&answer.expires_in).map_or(DEFAULT_LIFE, Duration::from_secs).clamp(DEFAULT_LIFE, LONGEST_LIFE);
    let life = MARGIN + spread_out(life.saturating_sub(MARGIN), SPREAD);
    Ok((bearer_header(&token), issued.checked_add(life)))
}

/// One attempt.
async fn ask(
    transport: &Transport,
    wanted: &TokenRequest<'_>,
    realm: &reqwest::Url,
    host: &str,
) -> Result<bytes::Bytes, AttemptError> {
    // Credentials are for this server only.
    let is_nobody = *wanted.credentials == Credentials::Anonymous;
    let redirects = if is_nobody { Redirects::Followed } else { Redirects::WithinOrigin };
    let named_by = NamedBy::Registry { name: &wanted.scope.registry, peer: wanted.peer };
    let request = token_request(transport, realm, wanted);
    let mut answer = transport.send(host, request, named_by, redirects).await?;
    if let (StatusCode::METHOD_NOT_ALLOWED, Some(request)) =
        (answer.response.status(), password_request(transport, realm, wanted))
    {
        answer = transport.send(host, request, named_by, redirects).await?;
    }
    let Answer { response, .. } = answer;
    if let Some(trouble) = passing(host, "the token service", &response) {
        return Err(trouble);
    }
    match response.status().as_u16() {
        200..=299 => transport.read(host, "the token service", response, MAX_ANSWER).await,
        301 | 302 | 303 | 307 | 308 => {
            Err(AttemptError::Fatal(bad_token(host, "it redirects, and credentials are not sent on")))
        }
        400 | 401 | 403 | 404 => {
            let refusal = denied(wanted.scope, wanted.credentials);
            Err(AttemptError::Fatal(explained(refusal, "the token service", host, response).await))
        }
        _ => Err(AttemptError::Fatal(bad_token(host, response.status()))),
    }
}

/// The error for an answer of the token service that holds no usable token.
fn bad_token(host: &str, why: impl ToString) -> RegistryError {
    RegistryError::BadAnswer { registry: host.to_owned(), what: "the token request".to_owned(), why: why.to_string() }
}

/// The token service's URL. Plain HTTP is refused if the registry speaks TLS. For a registry on this machine, it is accepted only if the
/// service is on this machine, too, or the administrator allows plain HTTP for its host.
fn realm(transport: &Transport, wanted: &TokenRequest<'_>) -> Result<reqwest::Url, RegistryError> {
    let (challenge, peer) = (wanted.challenge, wanted.peer);
    let bad = |why: &str| RegistryError::BadAnswer {
        registry: wanted.scope.registry.clone(),
        what: "authorization".to_owned(),
        why: why.to_owned(),
    };
    let realm = challenge.get("realm").ok_or_else(|| bad("its Bearer challenge names no realm"))?;
    let mut url: reqwest::Url = realm.parse().map_err(|_| bad("its Bearer challenge's realm is not a URL"))?;
    strip(&mut url);
    let host = url.host_str().unwrap_or_default();
    let named = url.port().map_or(host.to_owned(), |port| format!("{host}:{port}"));
    let may_be_plain = match (peer.channel, peer.place) {
        (Channel::Tls, _) => false,
        (Channel::Plain, AddressScope::Loopback) => transport.may_be_plain(&named) || transport.may_be_plain(host),
        (Channel::Plain, _) => true,
    };
    match url.scheme() {
        "https" => Ok(url),
        "http" if may_be_plain => Ok(url),
        "http" => Err(bad("it sends us to a token service without TLS")),
        _ => Err(bad("it sends us to a token service that is not on HTTPS")),
    }
}

/// The parameters of every token request.
fn parameters<'a>(wanted: &'a TokenRequest<'_>) -> Vec<(&'static str, &'a str)> {
    let mut parameters: Vec<_> = wanted.wanted.iter().map(|scope| ("scope", scope.as_str())).collect();
    parameters.extend(wanted.challenge.get("service").map(|service| ("service", service)));
    parameters
}

/// The request: GET with a password or anonymously, POST with a refresh token.
fn token_request(transport: &Transport, realm: &reqwest::Url, wanted: &TokenRequest<'_>) -> RequestBuilder {
    let mut parameters = parameters(wanted);
    match wanted.credentials {
        Credentials::Anonymous | Credentials::Registry(_) => {
            transport.request(Method::GET, realm.clone()).query(&parameters)
        }
        Credentials::Basic { user, password } => {
            parameters.push(("account", user));
            let request = transport.request(Method::GET, realm.clone()).query(&parameters);
            request.header(http::header::AUTHORIZATION, sensitive(&basic_header(user, password)))
        }
        Credentials::Identity { token, .. } => {
            parameters.extend([
                ("grant_type", "refresh_token"),
                ("client_id", CLIENT),
                ("refresh_token", token.expose()),
            ]);
            transport.request(Method::POST, realm.clone()).form(&joined(&parameters))
        }
    }
}

/// The request by POST with a password, as OAuth2 has it; `None` without a password.
fn password_request(transport: &Transport, realm: &reqwest::Url, wanted: &TokenRequest<'_>) -> Option<RequestBuilder> {
    let Credentials::Basic { user, password } = wanted.credentials else { return None };
    let mut parameters = parameters(wanted);
    parameters.extend([
        ("grant_type", "password"),
        ("client_id", CLIENT),
        ("username", user),
        ("password", password.expose()),
    ]);
    Some(transport.request(Method::POST, realm.clone()).form(&joined(&parameters)))
}

/// The parameters with all scopes in one, as OAuth2 has them.
fn joined(parameters: &[(&'static str, &str)]) -> Vec<(&'static str, String)> {
    let scopes: Vec<&str> = parameters.iter().filter(|(name, _)| *name == "scope").map(|(_, scope)| *scope).collect();
    let others = parameters.iter().filter(|(name, _)| *name != "scope");
    let others = others.map(|(name, value)| (*name, (*value).to_owned()));
    [("scope", scopes.join(" "))].into_iter().chain(others).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registries::oci::challenge;

    fn challenge(scope: &str) -> Challenge {
        challenge::parse(&format!("Bearer realm=\"https://t/\",scope=\"{scope}\"")).remove(0)
    }

    #[test]
    fn what_a_challenge_asks_for_is_asked_for_as_far_as_it_is_pulling() {
        let scope = Scope { registry: "r".to_owned(), repository: "a/b".to_owned() };
        for (asked, expected, is_other) in [
            ("", vec![], false),
            ("repository:a/b:pull", vec!["repository:a/b:pull"], false),
            ("repository:a/b:pull,push", vec!["repository:a/b:pull"], false),
            ("repository:proxy/a/b:*", vec!["repository:proxy/a/b:pull"], true),
            ("repository:a/b:pull  profile", vec!["repository:a/b:pull", "profile"], true),
        ] {
            let challenge = challenge(asked);
            assert_eq!(scopes_of(&challenge), expected, "{asked}");
            assert_eq!(is_other_scope(&scope, &challenge), is_other, "{asked}");
        }
        assert!(scopes_of(&challenge(&"x".repeat(2000))).is_empty());
        assert_eq!(scopes_of(&challenge(&"x ".repeat(400))).len(), MOST_SCOPES);
    }

    #[test]
    fn a_tokens_life_is_read_however_it_is_written() {
        for (said, expected) in [
            ("", None),
            (r#","expires_in":300"#, Some(300)),
            (r#","expires_in":300.5"#, Some(300)),
            (r#","expires_in":"300""#, Some(300)),
            (r#","expires_in":-1"#, Some(0)),
            (r#","expires_in":null"#, None),
            (r#","expires_in":"soon""#, None),
            (r#","expires_in":[]"#, None),
        ] {
            let answer: TokenAnswer =
                go_json::from_slice(format!(r#"{{"token":"old","token":"t","access_token":null{said}}}"#).as_bytes())
                    .unwrap();
            assert_eq!((answer.token.as_str(), seconds(&answer.expires_in)), ("t", expected), "{said}");
        }
    }
}
