//! Requests to a real registry by the OCI distribution protocol, which is Docker's v2.
//!
//! Each request is sent with the cached authorization. If it is refused, it is sent again with a fresh one, once for each way that the
//! registry offers. Some registries hide what is not public (404, 403) and send challenges at `/v2/` only, so they are asked there what
//! they demand. Failures that may pass are repeated with patience ([`super::retry`]); others are reported at once, by name.

use std::sync::Arc;

use http::{Method, header};
use reqwest::{RequestBuilder, Response, StatusCode};
use store::Digest;
use store::image::ImageRef;

use crate::registries::error::RegistryError;
use crate::registries::oci::attempt_error::{AttemptError, passing};
use crate::registries::oci::auth::{Authenticator, Authorization, ChallengeSet, Refused};
use crate::registries::oci::authorization_header::{Scope, sensitive};
use crate::registries::oci::challenge;
use crate::registries::oci::credentials::Credentials;
use crate::registries::oci::docker_config::CredentialStore;
use crate::registries::oci::error_body::{explained, words};
use crate::registries::oci::redirect::Redirects;
use crate::registries::oci::retry::{retry, retry_document};
use crate::registries::oci::token_service::{self, TokenRequest};
use crate::registries::oci::transport::{Answer, NamedBy, Transport};

/// Maximum number of authorizations that are tried for one request: one for each way to authenticate.
const MOST_WAYS: usize = 3;

/// The transport and the authenticator that all requests to registries share.
pub struct OciClient {
    transport: Arc<Transport>,
    authenticator: Authenticator,
}

/// The method of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// GET: the document itself.
    Get,
    /// HEAD: whether the document exists, and its digest unless that is the known one.
    Head {
        /// The known digest.
        unless: Option<Digest>,
    },
}

/// One request below `/v2/<repository>/`.
pub struct Ask<'a> {
    /// The repository, and the name used in messages.
    pub image: &'a ImageRef,
    /// What follows the repository, e.g. `manifests/latest`.
    pub path: String,
    /// `Accept`.
    pub accept: Option<&'static str>,
    /// The first byte wanted; 0 for all.
    pub offset: u64,
    /// What is requested, in messages.
    pub what: &'a str,
    /// The error if it does not exist.
    pub absent: RegistryError,
    /// The method.
    pub verb: Verb,
}

impl OciClient {
    /// A client over an existing transport.
    pub(super) fn new(transport: Transport, credentials: CredentialStore) -> OciClient {
        let transport = Arc::new(transport);
        let authenticator = Authenticator::new(Arc::clone(&transport), credentials);
        OciClient { transport, authenticator }
    }

    /// The transport, for its attempts and limits.
    pub fn transport(&self) -> &Transport {
        &self.transport
    }

    /// Fetches a small document with its headers. If the connection breaks in the middle, all of it is fetched again.
    pub(super) async fn document(
        &self,
        ask: &Ask<'_>,
        limit: u64,
    ) -> Result<(header::HeaderMap, bytes::Bytes), RegistryError> {
        let registry = ask.image.registry();
        let attempt = || async {
            let response = self.once(ask).await?;
            let headers = response.headers().clone();
            Ok((headers, self.transport.read(registry, ask.what, response, limit).await?))
        };
        retry_document(self.transport.attempts(), registry, ask.what, attempt).await
    }

    /// The answer to a HEAD. `None` if the registry may not support HEAD, or may count, hide or sign it differently from GET; then a GET
    /// decides.
    pub(super) async fn head(&self, ask: &Ask<'_>) -> Result<Option<Response>, RegistryError> {
        use RegistryError::{BadAnswer, MissingBlob, UnknownImage};
        match self.once(ask).await {
            Ok(response) => Ok(Some(response)),
            Err(AttemptError::Passing { .. }) => Ok(None),
            Err(AttemptError::Fatal(BadAnswer { .. } | MissingBlob { .. } | UnknownImage { .. })) => Ok(None),
            Err(AttemptError::Fatal(error)) => Err(error),
        }
    }

    /// Sends a request, with retries, until it succeeds or fails for good. Only the status of the answer counts.
    pub(super) async fn answered(&self, ask: &Ask<'_>) -> Result<(), RegistryError> {
        let mut attempts = self.transport.attempts();
        retry(&mut attempts, || self.once(ask)).await.map(drop)
    }

    /// Makes one attempt: sends the request, authorizes it if need be, and judges it by its status.
    pub async fn once(&self, ask: &Ask<'_>) -> Result<Response, AttemptError> {
        let registry = ask.image.registry();
        let scope = Scope { registry: registry.to_owned(), repository: ask.image.path().to_owned() };
        let base = self.transport.base(registry).await?;
        let used = self.authenticator.current(&scope);
        let mut answer = self.send(&base, ask, used.as_ref()).await?;
        let mut shown: Option<Authorization> = None;
        // A registry may refuse a HEAD with an authorization that works for GETs, so this is no reason to doubt the cached one.
        let ways = if ask.verb != Verb::Get && used.is_some() { 0 } else { MOST_WAYS };
        for _ in 0..ways {
            let refused = match (&shown, &used) {
                (Some(shown), _) => Refused::Fresh(shown),
                (None, Some(used)) => Refused::Kept(used),
                (None, None) => Refused::Nobody,
            };
            let Some(fresh) = self.another(&base, &scope, &answer, refused).await? else { break };
            answer = self.send(&base, ask, Some(&fresh)).await?;
            shown = Some(fresh);
        }
        if let Some(admitted) = self.as_nobody(&scope, ask, &answer).await? {
            answer = admitted;
        }
        let Answer { response, elsewhere, .. } = answer;
        if let Some(trouble) = passing(registry, ask.what, &response) {
            return Err(trouble);
        }
        match (response.status().as_u16(), elsewhere) {
            (200..=299, _) => Ok(response),
            (304, _) if ask.verb != Verb::Get => Ok(response),
            (404, None) if ask.verb == Verb::Get => {
                Err(AttemptError::Fatal(explained(ask.absent.clone(), ask.what, registry, response).await))
            }
            (404, _) => Err(AttemptError::Fatal(ask.absent.clone())),
            (_, Some(host)) => Err(AttemptError::Fatal(refused_elsewhere(ask, &host, response.status()))),
            (401 | 403, None) if ask.verb == Verb::Get => {
                let refusal = self.authenticator.refusal(&scope).await;
                Err(AttemptError::Fatal(explained(refusal, ask.what, registry, response).await))
            }
            (_, None) => Err(AttemptError::Fatal(unexpected(ask, response).await)),
        }
    }

    /// Another authorization to try after one was refused, if there is one.
    async fn another(
        &self,
        base: &str,
        scope: &Scope,
        answer: &Answer,
        refused: Refused<'_>,
    ) -> Result<Option<Authorization>, AttemptError> {
        // Only the registry itself may ask for credentials, not a server that it leads to.
        let status = answer.response.status().as_u16();
        if answer.elsewhere.is_some() || !matches!(status, 401 | 403 | 404) {
            return Ok(None);
        }
        let challenges = header_challenges(&answer.response);
        let demand = match (status, refused) {
            (401 | 403, _) if !challenges.is_empty() => Some(ChallengeSet { challenges, peer: answer.peer }),
            (403 | 404, Refused::Fresh(_)) => None,
            (404, Refused::Kept(used)) => {
                let is_outdated = self.authenticator.is_outdated(scope, used).await.map_err(AttemptError::Fatal)?;
                self.authenticator.last_demand(scope).filter(|_| is_outdated)
            }
            (403, Refused::Kept(_)) => self.authenticator.last_demand(scope),
            _ => self.demand(base, &scope.registry).await,
        };
        match demand {
            Some(demand) => self.authenticator.renew(scope, demand, refused).await.map_err(AttemptError::Fatal),
            None => Ok(None),
        }
    }

    /// What the registry demands at its root; `None` if it demands nothing or cannot be asked.
    async fn demand(&self, base: &str, registry: &str) -> Option<ChallengeSet> {
        let request = self.transport.request(Method::GET, format!("{base}/v2/"));
        let asked = self.transport.send(registry, request, NamedBy::Person, Redirects::Followed).await;
        let answer = asked.ok().filter(|answer| answer.elsewhere.is_none())?;
        let challenges = header_challenges(&answer.response);
        let is_asking = answer.response.status() == StatusCode::UNAUTHORIZED && !challenges.is_empty();
        is_asking.then_some(ChallengeSet { challenges, peer: answer.peer })
    }

    /// Repeats a request at the server that the registry leads to, if that server wants a token and gives it to anybody: gateways lead to
    /// other registries. No credentials are sent to the server or its token service.
    async fn as_nobody(&self, scope: &Scope, ask: &Ask<'_>, answer: &Answer) -> Result<Option<Answer>, AttemptError> {
        if answer.elsewhere.is_none() || answer.response.status() != StatusCode::UNAUTHORIZED {
            return Ok(None);
        }
        let challenges = header_challenges(&answer.response);
        let Some(challenge) = challenges.iter().find(|challenge| challenge.scheme == "bearer") else { return Ok(None) };
        let mut wanted = token_service::scopes_of(challenge);
        if wanted.is_empty() {
            wanted.push(token_service::own_scope(scope));
        }
        let (credentials, peer) = (&Credentials::Anonymous, answer.peer);
        let request = TokenRequest { scope, challenge, wanted, credentials, peer };
        let Ok((token, _)) = token_service::fetch(&self.transport, &request).await else { return Ok(None) };
        let request = self.request(ask, answer.url.as_str(), Some(sensitive(&token)));
        let named_by = NamedBy::Registry { name: ask.image.registry(), peer: answer.peer };
        let admitted = self.transport.send(ask.image.registry(), request, named_by, Redirects::Followed).await?;
        let elsewhere = admitted.elsewhere.clone().or_else(|| answer.elsewhere.clone());
        Ok(Some(Answer { elsewhere, ..admitted }))
    }

    async fn send(&self, base: &str, ask: &Ask<'_>, with: Option<&Authorization>) -> Result<Answer, AttemptError> {
        let url = format!("{base}/v2/{}/{}", ask.image.path(), ask.path);
        let request = self.request(ask, &url, with.map(Authorization::header));
        self.transport.send(ask.image.registry(), request, NamedBy::Person, Redirects::Followed).await
    }

    /// The request for `ask` at `url`.
    fn request(&self, ask: &Ask<'_>, url: &str, proof: Option<header::HeaderValue>) -> RequestBuilder {
        let method = if ask.verb == Verb::Get { Method::GET } else { Method::HEAD };
        let mut request = self.transport.request(method, url);
        if let Verb::Head { unless: Some(known) } = ask.verb {
            request = request.header(header::IF_NONE_MATCH, format!("\"{known}\""));
        }
        if ask.path.starts_with("blobs/") {
            request = request.header(header::ACCEPT_ENCODING, "identity");
        }
        // One header for each type, as docker sends them: some registries take a combined one for a single type.
        for accept in ask.accept.into_iter().flat_map(|types| types.split(", ")) {
            request = request.header(header::ACCEPT, accept);
        }
        if let Some(proof) = proof {
            request = request.header(header::AUTHORIZATION, proof);
        }
        if ask.offset > 0 {
            request = request.header(header::RANGE, format!("bytes={}-", ask.offset));
        }
        request
    }
}

/// All challenges of all headers.
fn header_challenges(response: &Response) -> Vec<challenge::Challenge> {
    let values = response.headers().get_all(header::WWW_AUTHENTICATE);
    values.iter().flat_map(|value| challenge::parse(&String::from_utf8_lossy(value.as_bytes()))).collect()
}

/// The error if the server that the registry leads to refuses the request. It begins with the status, by which a resumed download
/// recognises a 416.
fn refused_elsewhere(ask: &Ask<'_>, host: &str, status: StatusCode) -> RegistryError {
    let why = format!("{status} from {host}, to which it leads");
    RegistryError::BadAnswer { registry: ask.image.registry().to_owned(), what: ask.what.to_owned(), why }
}

/// The error for an unexpected status, with the registry's own explanation if there is one.
async fn unexpected(ask: &Ask<'_>, response: Response) -> RegistryError {
    let registry = ask.image.registry();
    let status = response.status();
    let why = match words(registry, ask.what, response).await {
        Some(said) => format!("{status}: {said}"),
        None => status.to_string(),
    };
    RegistryError::BadAnswer { registry: registry.to_owned(), what: ask.what.to_owned(), why }
}
