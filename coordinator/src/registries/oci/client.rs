//! A real registry: the OCI distribution protocol, which is Docker's v2.
//!
//! Each request goes out with the authorization at hand; a refusal is answered with a fresh one, by each way that the registry offers
//! once. Some registries hide what is not for everybody (404, 403) and challenge at `/v2/` alone: there they are asked what they want
//! to see. What may pass is repeated with patience ([`super::retry`]), what will not is reported by name. What a tag means is always asked; a
//! manifest or config that is known by its digest and in the store already is not fetched again.

use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use http::{Method, header};
use reqwest::{RequestBuilder, Response, StatusCode};
use store::Digest;
use store::image::{ImageRef, Platform};
use store::reader::Store;

use crate::registries::error::RegistryError;
use crate::registries::image::manifest::{self, ACCEPT, Descriptor, MAX_CONFIG, MAX_MANIFEST};
use crate::registries::image::resolve::{Documents, Kind, resolve};
use crate::registries::limits::Limits;
use crate::registries::oci::auth::{Authenticator, Authorization, Demand, Refused};
use crate::registries::oci::blob::BlobDownload;
use crate::registries::oci::challenge;
use crate::registries::oci::credentials::Credentials;
use crate::registries::oci::docker_config::CredentialStore;
use crate::registries::oci::persist::{persist, persist_briefly};
use crate::registries::oci::proof::{Scope, sensitive};
use crate::registries::oci::redirect::Redirects;
use crate::registries::oci::tags;
use crate::registries::oci::token_service::{self, TokenRequest};
use crate::registries::oci::transport::{Answer, NamedBy, Transport, TransportError, TransportSettings};
use crate::registries::oci::trouble::{Trouble, passing};
use crate::registries::oci::words::{explained, words};
use crate::registries::{BlobStream, Document, Registry, RemoteLayer, ResolvedImage};

/// All registries that are reached over the network.
#[derive(Clone)]
pub struct OciRegistry {
    pub(super) client: Arc<OciClient>,
    store: Store,
}

/// So many authorizations are tried for one request: one for each way in.
const MOST_WAYS: usize = 3;

/// What is shared by everything that talks to registries.
pub struct OciClient {
    transport: Arc<Transport>,
    authenticator: Authenticator,
}

/// How to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// For the document itself.
    Get,
    /// Whether there is one, and unless it is this one, which.
    Head {
        /// What we know.
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
    /// What is asked for, in messages.
    pub what: &'a str,
    /// What to report when it does not exist.
    pub absent: RegistryError,
    /// How.
    pub verb: Verb,
}

impl OciRegistry {
    /// Sets up connections and credentials; nothing is contacted. `store` is where documents may be found.
    pub fn new(
        settings: &TransportSettings,
        credentials: CredentialStore,
        store: Store,
        limits: Arc<Limits>,
    ) -> Result<OciRegistry, TransportError> {
        Ok(OciRegistry::over(Transport::new(settings, limits)?, credentials, store))
    }

    /// The same over a transport that is set up.
    pub(crate) fn over(transport: Transport, credentials: CredentialStore, store: Store) -> OciRegistry {
        let transport = Arc::new(transport);
        let authenticator = Authenticator::new(Arc::clone(&transport), credentials);
        OciRegistry { client: Arc::new(OciClient { transport, authenticator }), store }
    }
}

impl Registry for OciRegistry {
    fn resolve<'a>(
        &'a self,
        image: &'a ImageRef,
        platform: Option<&'a Platform>,
    ) -> BoxFuture<'a, Result<ResolvedImage, RegistryError>> {
        async move {
            let documents = Repository { client: &self.client, store: &self.store, image };
            let root = documents.root().await?;
            resolve(&documents, &image.to_string(), root, platform).await
        }
        .boxed()
    }

    fn shows<'a>(&'a self, image: &'a ImageRef, layer: &'a RemoteLayer) -> BoxFuture<'a, Result<(), RegistryError>> {
        async move {
            let what = format!("layer {} of {image}", layer.blob);
            let repository = Repository { client: &self.client, store: &self.store, image };
            repository.shows(format!("blobs/{}", layer.blob), None, &what, missing_blob(image, &what)).await
        }
        .boxed()
    }

    fn layer(&self, image: &ImageRef, layer: &RemoteLayer) -> BlobStream {
        BlobDownload::new(Arc::clone(&self.client), image.clone(), layer).into_stream()
    }
}

/// The documents of one image's repository.
struct Repository<'a> {
    client: &'a OciClient,
    store: &'a Store,
    image: &'a ImageRef,
}

impl Repository<'_> {
    /// What the image's tag or digest points to.
    async fn root(&self) -> Result<Document, RegistryError> {
        let what = format!("the manifest of {}", self.image);
        self.manifest(&tags::reference(self.image), self.image.digest().copied(), &what).await
    }

    /// One manifest or index. Its digest is the one asked for, or, for a tag, the one that the registry states.
    async fn manifest(&self, reference: &str, expected: Option<Digest>, what: &str) -> Result<Document, RegistryError> {
        let absent =
            RegistryError::UnknownImage { registry: self.image.registry().to_owned(), image: self.image.to_string() };
        let path = format!("manifests/{reference}");
        let ask = Ask { image: self.image, path, accept: Some(ACCEPT), offset: 0, what, absent, verb: Verb::Get };
        let (headers, bytes) = self.client.document(&ask, MAX_MANIFEST).await?;
        let stated = tags::stated_digest(&headers);
        let header = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type = manifest::media_type(&bytes, header, what)?;
        let actual = Digest::of(&bytes);
        match expected.or(stated) {
            Some(expected) if expected != actual => {
                Err(RegistryError::DigestMismatch { what: what.to_owned(), expected, actual })
            }
            _ => Ok(Document { digest: actual, media_type, bytes }),
        }
    }

    /// A document that the store has, verified; one that cannot be read there is fetched.
    async fn stored(&self, digest: Digest) -> Option<Bytes> {
        let store = self.store.clone();
        tokio::task::spawn_blocking(move || store.blob(&digest)).await.ok()?.ok().map(Bytes::from)
    }

    /// Asks whether the repository has what lies at `path`; `absent` if not. Some registries know no HEAD: they are asked for
    /// the document, of which nothing is read.
    async fn shows(
        &self,
        path: String,
        accept: Option<&'static str>,
        what: &str,
        absent: RegistryError,
    ) -> Result<(), RegistryError> {
        let image = self.image;
        let mut ask = Ask { image, path, accept, offset: 0, what, absent, verb: Verb::Head { unless: None } };
        let head = self.client.head(&ask).await?;
        if head.is_some() {
            return Ok(());
        }
        ask.verb = Verb::Get;
        self.client.answered(&ask).await
    }

    /// A config.
    async fn config(&self, descriptor: &Descriptor, what: &str) -> Result<Document, RegistryError> {
        let expected = descriptor.digest(what)?;
        let absent = missing_blob(self.image, what);
        let path = format!("blobs/{expected}");
        let ask = Ask { image: self.image, path, accept: None, offset: 0, what, absent, verb: Verb::Get };
        let (_, bytes) = self.client.document(&ask, MAX_CONFIG).await?;
        match Digest::of(&bytes) {
            actual if actual == expected => {
                Ok(Document { digest: actual, media_type: descriptor.media_type.clone(), bytes })
            }
            actual => Err(RegistryError::DigestMismatch { what: what.to_owned(), expected, actual }),
        }
    }
}

impl Documents for Repository<'_> {
    fn fetch<'a>(
        &'a self,
        kind: Kind,
        descriptor: &'a Descriptor,
        what: &'a str,
    ) -> BoxFuture<'a, Result<Document, RegistryError>> {
        async move {
            let digest = descriptor.digest(what)?;
            let stored = self.stored(digest).await;
            // The store has documents of all repositories; this one must show that it has them, too.
            if stored.is_some() {
                let absent = missing_blob(self.image, what);
                match kind {
                    Kind::Manifest => self.shows(format!("manifests/{digest}"), Some(ACCEPT), what, absent).await?,
                    Kind::Config => self.shows(format!("blobs/{digest}"), None, what, absent).await?,
                }
            }
            match (stored, kind) {
                (Some(bytes), Kind::Manifest) => {
                    let media_type = manifest::media_type(&bytes, Some(&descriptor.media_type), what)?;
                    Ok(Document { digest, media_type, bytes })
                }
                (Some(bytes), Kind::Config) => {
                    Ok(Document { digest, media_type: descriptor.media_type.clone(), bytes })
                }
                (None, Kind::Manifest) => self.manifest(&digest.to_string(), Some(digest), what).await,
                (None, Kind::Config) => self.config(descriptor, what).await,
            }
        }
        .boxed()
    }
}

impl OciClient {
    /// The transport, for its patience.
    pub fn transport(&self) -> &Transport {
        &self.transport
    }

    /// A small document with its headers; a connection that breaks in the middle is repeated whole.
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
        persist_briefly(self.transport.attempts(), registry, ask.what, attempt).await
    }

    /// The answer to a HEAD; nothing where the registry may not know HEAD, or counts, hides or signs it otherwise than GET, which
    /// then tells.
    pub(super) async fn head(&self, ask: &Ask<'_>) -> Result<Option<Response>, RegistryError> {
        use RegistryError::{BadAnswer, MissingBlob, UnknownImage};
        match self.once(ask).await {
            Ok(response) => Ok(Some(response)),
            Err(Trouble::Passing { .. }) => Ok(None),
            Err(Trouble::Fatal(BadAnswer { .. } | MissingBlob { .. } | UnknownImage { .. })) => Ok(None),
            Err(Trouble::Fatal(error)) => Err(error),
        }
    }

    /// Asks with patience until there is an answer, of which only the status counts.
    async fn answered(&self, ask: &Ask<'_>) -> Result<(), RegistryError> {
        let mut attempts = self.transport.attempts();
        persist(&mut attempts, || self.once(ask)).await.map(drop)
    }

    /// One attempt: sent, authorized if need be, and judged by its status.
    pub async fn once(&self, ask: &Ask<'_>) -> Result<Response, Trouble> {
        let registry = ask.image.registry();
        let scope = Scope { registry: registry.to_owned(), repository: ask.image.path().to_owned() };
        let base = self.transport.base(registry).await?;
        let used = self.authenticator.current(&scope);
        let mut answer = self.send(&base, ask, used.as_ref()).await?;
        let mut shown: Option<Authorization> = None;
        // A HEAD that is refused to whom GETs are not is no reason to doubt what is kept.
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
                Err(Trouble::Fatal(explained(ask.absent.clone(), ask.what, registry, response).await))
            }
            (404, _) => Err(Trouble::Fatal(ask.absent.clone())),
            (_, Some(host)) => Err(Trouble::Fatal(refused_elsewhere(ask, &host, response.status()))),
            (401 | 403, None) if ask.verb == Verb::Get => {
                let refusal = self.authenticator.refusal(&scope).await;
                Err(Trouble::Fatal(explained(refusal, ask.what, registry, response).await))
            }
            (_, None) => Err(Trouble::Fatal(unexpected(ask, response).await)),
        }
    }

    /// An authorization that may lead in where what was shown did not, if there is one.
    async fn another(
        &self,
        base: &str,
        scope: &Scope,
        answer: &Answer,
        refused: Refused<'_>,
    ) -> Result<Option<Authorization>, Trouble> {
        // Only the registry itself may ask who we are, not whom it leads to.
        let status = answer.response.status().as_u16();
        if answer.elsewhere.is_some() || !matches!(status, 401 | 403 | 404) {
            return Ok(None);
        }
        let challenges = header_challenges(&answer.response);
        let demand = match (status, refused) {
            (401 | 403, _) if !challenges.is_empty() => Some(Demand { challenges, peer: answer.peer }),
            (403 | 404, Refused::Fresh(_)) => None,
            (404, Refused::Kept(used)) => {
                let is_outdated = self.authenticator.is_outdated(scope, used).await.map_err(Trouble::Fatal)?;
                self.authenticator.last_demand(scope).filter(|_| is_outdated)
            }
            (403, Refused::Kept(_)) => self.authenticator.last_demand(scope),
            _ => self.demand(base, &scope.registry).await,
        };
        match demand {
            Some(demand) => self.authenticator.renew(scope, demand, refused).await.map_err(Trouble::Fatal),
            None => Ok(None),
        }
    }

    /// What the registry wants to see, as it says at its root. One that cannot be asked says nothing.
    async fn demand(&self, base: &str, registry: &str) -> Option<Demand> {
        let request = self.transport.request(Method::GET, format!("{base}/v2/"));
        let asked = self.transport.send(registry, request, NamedBy::Person, Redirects::Followed).await;
        let answer = asked.ok().filter(|answer| answer.elsewhere.is_none())?;
        let challenges = header_challenges(&answer.response);
        let is_asking = answer.response.status() == StatusCode::UNAUTHORIZED && !challenges.is_empty();
        is_asking.then_some(Demand { challenges, peer: answer.peer })
    }

    /// The answer of whom the registry leads to, when that wants a token which it gives to anybody: gateways lead to other registries.
    /// Nothing of ours is shown to either.
    async fn as_nobody(&self, scope: &Scope, ask: &Ask<'_>, answer: &Answer) -> Result<Option<Answer>, Trouble> {
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

    async fn send(&self, base: &str, ask: &Ask<'_>, with: Option<&Authorization>) -> Result<Answer, Trouble> {
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
        // A header for each type, as docker sends them: some registries take a whole one for a type.
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

/// The registry lacks a blob of `image`.
fn missing_blob(image: &ImageRef, what: &str) -> RegistryError {
    RegistryError::MissingBlob { registry: image.registry().to_owned(), what: what.to_owned() }
}

/// All challenges of all headers.
fn header_challenges(response: &Response) -> Vec<challenge::Challenge> {
    let values = response.headers().get_all(header::WWW_AUTHENTICATE);
    values.iter().flat_map(|value| challenge::parse(&String::from_utf8_lossy(value.as_bytes()))).collect()
}

/// Whom the registry leads to refuses us; at 416, in the words that a resumed download knows.
fn refused_elsewhere(ask: &Ask<'_>, host: &str, status: StatusCode) -> RegistryError {
    let why = format!("{status} from {host}, to which it leads");
    RegistryError::BadAnswer { registry: ask.image.registry().to_owned(), what: ask.what.to_owned(), why }
}

/// A status that we have no use for, with the registry's own words where it has some.
async fn unexpected(ask: &Ask<'_>, response: Response) -> RegistryError {
    let registry = ask.image.registry();
    let status = response.status();
    let why = match words(registry, ask.what, response).await {
        Some(said) => format!("{status}: {said}"),
        None => status.to_string(),
    };
    RegistryError::BadAnswer { registry: registry.to_owned(), what: ask.what.to_owned(), why }
}
