//! A bearer token from the service that a challenge names.
//!
//! A password and nobody ask by GET, which a service that only knows POST (405) is asked by, too; a refresh token asks by POST. What
//! proves who we are stays with that one server. Answers are bounded, and tokens live no shorter and no longer than is sensible.

use std::borrow::Cow;
use std::time::Duration;

use http::Method;
use reqwest::{RequestBuilder, StatusCode};
use serde::Deserialize;
use serde_json::Value;
use store::go_json;
use tokio::time::Instant;

use crate::registries::error::RegistryError;
use crate::registries::oci::challenge::Challenge;
use crate::registries::oci::credential_cache::spread_out;
use crate::registries::oci::credentials::{Credentials, Secret};
use crate::registries::oci::persist::persist_briefly;
use crate::registries::oci::proof::{Scope, basic_header, bearer_header, denied, sensitive};
use crate::registries::oci::reach::Place;
use crate::registries::oci::redirect::{Redirects, strip};
use crate::registries::oci::transport::{Answer, Channel, NamedBy, Peer, Transport};
use crate::registries::oci::trouble::{Trouble, passing};
use crate::registries::oci::words::explained;

/// What a token is valid for, by the distribution specification, when the service does not say.
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// A token is not used any more this long before it expires: the request has to travel.
pub(super) const MARGIN: Duration = Duration::from_secs(10);
/// The share of a token's life by which tokens that were fetched together end apart.
const SPREAD: f64 = 0.1;
/// No token is believed to live longer: its service may have miscounted, and rights change.
const LONGEST_LIFE: Duration = Duration::from_secs(24 * 3600);
/// The longest token answer that is read.
const MAX_ANSWER: u64 = 256 << 10;
/// The longest token that is shown: servers refuse longer headers.
const MAX_TOKEN: usize = 64 << 10;
/// Longer scopes of a challenge are not asked for, nor more than these.
const MAX_SCOPE: usize = 1000;
const MOST_SCOPES: usize = 10;

/// What services call us.
const CLIENT: &str = "cachefs";

/// What a token is asked for with.
pub(super) struct TokenRequest<'a> {
    /// For what; named in errors.
    pub(super) scope: &'a Scope,
    /// The challenge, with the service's place and name.
    pub(super) challenge: &'a Challenge,
    /// The scopes as the service knows them.
    pub(super) wanted: Vec<String>,
    /// Who asks.
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

/// A number of seconds, however it is written; what is no such number is as if it were not said.
fn seconds(said: &Value) -> Option<u64> {
    let number: Option<f64> = match said {
        Value::String(text) => text.trim().parse().ok(),
        other => other.as_f64(),
    };
    number.map(|seconds| seconds.max(0.0) as u64)
}

/// Pulling from a repository.
pub(super) fn own_scope(scope: &Scope) -> String {
    format!("repository:{}:pull", scope.repository)
}

/// The scopes that a challenge asks for, of repositories only as far as pulling goes.
pub(super) fn scopes_of(challenge: &Challenge) -> Vec<String> {
    let named = challenge.get("scope").filter(|scope| scope.len() <= MAX_SCOPE).unwrap_or_default();
    named.split_ascii_whitespace().take(MOST_SCOPES).map(|scope| pulling(scope).into_owned()).collect()
}

/// A scope of a repository without what is not pulling.
fn pulling(scope: &str) -> Cow<'_, str> {
    match scope.strip_prefix("repository:").and_then(|rest| rest.rsplit_once(':')) {
        Some((name, _)) => Cow::Owned(format!("repository:{name}:pull")),
        None => Cow::Borrowed(scope),
    }
}

/// Whether a challenge asks for something else than pulling from the repository.
pub(super) fn is_other_scope(scope: &Scope, challenge: &Challenge) -> bool {
    let asked = scopes_of(challenge);
    !asked.is_empty() && asked != [own_scope(scope)]
}

/// Asks the token service that the challenge names; a header's value, and until when it is good.
pub(super) async fn fetch(
    transport: &Transport,
    wanted: &TokenRequest<'_>,
) -> Result<(Secret, Option<Instant>), RegistryError> {
    let realm = realm(transport, wanted)?;
    let host = realm.host_str().unwrap_or_default().to_owned();
    let issued = Instant::now();
    let ask = || ask(transport, wanted, &realm, &host);
    let body = persist_briefly(transport.attempts(), &host, "the token service", ask).await?;
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
) -> Result<bytes::Bytes, Trouble> {
    // What proves who we are is for this server alone.
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
            Err(Trouble::Fatal(bad_token(host, "it redirects, and credentials are not sent on")))
        }
        400 | 401 | 403 | 404 => {
            let refusal = denied(wanted.scope, wanted.credentials);
            Err(Trouble::Fatal(explained(refusal, "the token service", host, response).await))
        }
        _ => Err(Trouble::Fatal(bad_token(host, response.status()))),
    }
}

/// An answer of the token service that is no token.
fn bad_token(host: &str, why: impl ToString) -> RegistryError {
    RegistryError::BadAnswer { registry: host.to_owned(), what: "the token request".to_owned(), why: why.to_string() }
}

/// The token service's URL: never plain HTTP for a registry that speaks TLS, nor off this machine for one that is on it, unless
/// the administrator allows it for that host.
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
        (Channel::Plain, Place::Loopback) => transport.may_be_plain(&named) || transport.may_be_plain(host),
        (Channel::Plain, _) => true,
    };
    match url.scheme() {
        "https" => Ok(url),
        "http" if may_be_plain => Ok(url),
        "http" => Err(bad("it sends us to a token service without TLS")),
        _ => Err(bad("it sends us to a token service that is not on HTTPS")),
    }
}

/// The parameters that every token is asked for with.
fn parameters<'a>(wanted: &'a TokenRequest<'_>) -> Vec<(&'static str, &'a str)> {
    let mut parameters: Vec<_> = wanted.wanted.iter().map(|scope| ("scope", scope.as_str())).collect();
    parameters.extend(wanted.challenge.get("service").map(|service| ("service", service)));
    parameters
}

/// GET for a password or nobody, POST for a refresh token.
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

/// POST for a password, as OAuth2 has it.
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

/// The parameters with all scopes in one: OAuth2 has them so.
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
