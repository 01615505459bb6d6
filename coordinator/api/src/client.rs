//! The client: one method per route, over a unix socket, TLS, or TCP on this machine.
//!
//! Each request opens its own connection: the callers are people and long-lived streams, for which a pool would only
//! add states. Nothing here has a time limit of its own except connecting; callers that need one wrap the future.

mod pages;
mod retention;
mod schedules;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use rustls::pki_types::ServerName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::access::{NewToken, TokenCreated, TokenInfo, TokenList};
use crate::address::{Address, host_of};
use crate::credentials::{Credentials, TokenError, TokenSource};
use crate::error::{ErrorBody, ErrorCode, ErrorDetail};
use crate::event::EventList;
use crate::fsck::{Fsck, FsckRequest};
use crate::host::{HostList, LeaseGranted, LeaseRequest};
use crate::image::{Image, ImageDetail, ImageList};
use crate::job::{Job, JobList, PullRequest};
use crate::printable::printable;
use crate::profile::{Profile, TraceAccepted};
use crate::route;
use crate::status::{Status, Version};
use crate::trust::{TrustError, client_config, explain};

/// A request's body: nothing, JSON or a stream.
pub type RequestBody = BoxBody<Bytes, io::Error>;

/// After this time an attempt to connect is given up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why an answer that is not HTTP is refused.
const NOT_HTTP: &str = "it does not answer in HTTP; write https:// if it listens with TLS";

/// The longest JSON answer that is read, bytes.
const MAX_ANSWER: usize = 256 << 20;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The coordinator cannot be reached.
    #[error("cannot reach the coordinator at {address}: {} ({source})", remedy(source))]
    Unreachable {
        /// Where.
        address: Address,
        /// The system's answer.
        source: io::Error,
    },
    /// The connection ended before the answer did.
    #[error("the coordinator at {address} broke off its answer: see its log, then try again ({source})")]
    Broken {
        /// Where.
        address: Address,
        /// What HTTP says.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Something answered, but not with this API.
    #[error("what answers at {address} is not a coordinator of this version: {why}")]
    NotACoordinator {
        /// Where.
        address: Address,
        /// What was wrong with the answer.
        why: String,
    },
    /// The TLS connection cannot be trusted.
    #[error(
        "no trusted connection to the coordinator at {address}: {why}; give its authority, or its own certificate, with --ca-certificate FILE"
    )]
    Untrusted {
        /// Where.
        address: Address,
        /// What TLS says.
        why: String,
    },
    /// The certificates to trust cannot be used.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The token to show cannot be used.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The coordinator refused the request.
    #[error("{}", printable(&.0.message))]
    Refused(ErrorDetail),
}

/// What to try if the coordinator cannot be reached.
fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "this user may not; root may, and others as [[local_access]] in the coordinator's configuration says"
        }
        _ => "is cachefs-coordinator running?",
    }
}

impl ClientError {
    /// The coordinator's code, if it was the coordinator that refused.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            ClientError::Refused(detail) => Some(detail.code),
            _ => None,
        }
    }

    /// Whether the same request may succeed later by itself, because the coordinator restarts or another one takes
    /// over.
    pub fn may_pass(&self) -> bool {
        match self {
            ClientError::Unreachable { source, .. } => source.kind() != io::ErrorKind::PermissionDenied,
            ClientError::Broken { .. } => true,
            ClientError::Refused(detail) => {
                matches!(detail.code, ErrorCode::Standby | ErrorCode::Busy | ErrorCode::Internal | ErrorCode::Full)
            }
            _ => false,
        }
    }
}

/// A client of one coordinator.
#[derive(Clone)]
pub struct Client {
    address: Address,
    token: Option<TokenSource>,
    /// Set for an address that uses TLS.
    tls: Option<TlsConnector>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("address", &self.address).finish_non_exhaustive()
    }
}

/// Whether to override what protects an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forced {
    /// The request is refused if something protects the object.
    No,
    /// The protection is overridden.
    Yes,
}

/// What to do about an image that has no pull job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absent {
    /// Wait until somebody pulls it.
    Wait,
    /// Pull it.
    Pull,
}

/// An answer that arrives as a stream.
#[derive(Debug)]
pub struct Download {
    /// The whole length, if the coordinator tells it.
    pub length: Option<u64>,
    body: Incoming,
    address: Address,
}

impl Download {
    /// The next bytes, or nothing at the end. An answer that is cut short is an error.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        while let Some(frame) = self.body.frame().await {
            let frame = frame.map_err(|source| broken(&self.address, source))?;
            if let Ok(data) = frame.into_data() {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }
}

/// An answer that ended early.
fn broken(address: &Address, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
    ClientError::Broken { address: address.clone(), source: source.into() }
}

/// A body of no bytes.
fn nothing() -> RequestBody {
    Empty::new().map_err(|never| match never {}).boxed()
}

impl Client {
    /// A client of the coordinator at `address`. Reads the certificates to trust; nothing is sent yet.
    pub fn new(address: Address, credentials: &Credentials) -> Result<Client, ClientError> {
        let tls = match &address {
            Address::Tls(_) => {
                let mut config = client_config(credentials.ca_certificate.as_slice())?;
                config.alpn_protocols = vec![b"http/1.1".to_vec()];
                Some(TlsConnector::from(Arc::new(config)))
            }
            Address::Unix(_) | Address::Tcp(_) => None,
        };
        Ok(Client { address, token: credentials.token.clone(), tls })
    }

    /// The coordinator's address.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Which program answers.
    pub async fn version(&self) -> Result<Version, ClientError> {
        self.ask(Method::GET, route::VERSION).await
    }

    /// The coordinator's condition.
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.ask(Method::GET, route::STATUS).await
    }

    /// The images.
    pub async fn images(&self) -> Result<ImageList, ClientError> {
        self.list(route::IMAGES).await
    }

    /// One image in full.
    pub async fn image(&self, name: &str) -> Result<ImageDetail, ClientError> {
        self.ask(Method::GET, &route::with_query(route::IMAGE, &[("name", Some(name))])).await
    }

    /// Removes an image's name; with [`Forced::Yes`], even a pinned one. Its layers stay until garbage collection.
    pub async fn remove(&self, name: &str, forced: Forced) -> Result<Image, ClientError> {
        let force = (forced == Forced::Yes).then_some("true");
        self.ask(Method::DELETE, &route::with_query(route::IMAGE, &[("name", Some(name)), ("force", force)])).await
    }

    /// One image as a docker-save tar.
    pub async fn export(&self, name: &str) -> Result<Download, ClientError> {
        let path = route::with_query(route::EXPORT, &[("name", Some(name))]);
        let response = self.send(Method::GET, &path, None, nothing()).await?;
        let length = response.headers().get(http::header::CONTENT_LENGTH);
        let length = length.and_then(|value| value.to_str().ok()?.parse().ok());
        Ok(Download { length, body: response.into_body(), address: self.address.clone() })
    }

    /// Answers once the image is published; refuses with [`ErrorCode::Timeout`] after `timeout`. Its queued job goes
    /// before others; with [`Absent::Pull`], one is made if there is none.
    pub async fn wait(&self, name: &str, timeout: Duration, absent: Absent) -> Result<Image, ClientError> {
        let seconds = timeout.as_secs_f64().to_string();
        let pull = (absent == Absent::Pull).then_some("true");
        let parameters = [("name", Some(name)), ("timeout_seconds", Some(seconds.as_str())), ("pull", pull)];
        self.ask(Method::GET, &route::with_query(route::WAIT, &parameters)).await
    }

    /// Starts pull jobs, one per image.
    pub async fn pull(&self, request: &PullRequest) -> Result<JobList, ClientError> {
        self.tell(route::PULLS, request).await
    }

    /// Sends an archive; answers with the jobs that store its images. `name` is given to an image that has none.
    pub async fn load(&self, name: Option<&str>, archive: RequestBody) -> Result<JobList, ClientError> {
        let path = route::with_query(route::LOAD, &[("name", name)]);
        let response = self.send(Method::POST, &path, Some("application/x-tar"), archive).await?;
        self.read(response).await
    }

    /// The jobs, newest first.
    pub async fn jobs(&self) -> Result<JobList, ClientError> {
        self.list(route::JOBS).await
    }

    /// One job.
    pub async fn job(&self, id: u64) -> Result<Job, ClientError> {
        self.ask(Method::GET, &route::with_id(route::JOB, id)).await
    }

    /// Ends a job.
    pub async fn cancel(&self, id: u64) -> Result<Job, ClientError> {
        self.ask(Method::POST, &route::with_id(route::CANCEL, id)).await
    }

    /// Starts an ended job again.
    pub async fn retry(&self, id: u64) -> Result<Job, ClientError> {
        self.ask(Method::POST, &route::with_id(route::RETRY, id)).await
    }

    /// Sends an encoded access trace. A refusal with [`ErrorCode::InvalidRequest`], [`ErrorCode::NotFound`],
    /// [`ErrorCode::TooLarge`], [`ErrorCode::Forbidden`] or [`ErrorCode::Conflict`] is final: drop the trace. After any
    /// other failure it may be sent again, and counts once.
    /// Works on any tokio runtime: callers that block give it a current-thread one.
    pub async fn send_trace(&self, trace: Vec<u8>) -> Result<TraceAccepted, ClientError> {
        let body = Full::new(Bytes::from(trace)).map_err(|never| match never {}).boxed();
        let response = self.send(Method::POST, route::TRACES, Some("application/octet-stream"), body).await?;
        self.read(response).await
    }

    /// What is known of an image's starts, with the first `files` files (or as many as the coordinator thinks fit).
    pub async fn profile(&self, name: &str, files: Option<usize>) -> Result<Profile, ClientError> {
        let limit = files.map(|files| files.to_string());
        let parameters = [("name", Some(name)), ("limit", limit.as_deref())];
        self.ask(Method::GET, &route::with_query(route::PROFILE, &parameters)).await
    }

    /// Starts a check of the store; refuses with [`ErrorCode::Conflict`] while one runs.
    pub async fn start_fsck(&self, request: &FsckRequest) -> Result<Fsck, ClientError> {
        self.tell(route::FSCK, request).await
    }

    /// The check that runs or ran last; refuses with [`ErrorCode::NotFound`] if there was none.
    pub async fn fsck(&self) -> Result<Fsck, ClientError> {
        self.ask(Method::GET, route::FSCK).await
    }

    /// Interrupts the check that runs.
    pub async fn stop_fsck(&self) -> Result<Fsck, ClientError> {
        self.ask(Method::POST, route::FSCK_STOP).await
    }

    /// Up to `limit` events after number `after` and from `since` on. If there are none yet, waits for one, at most for
    /// `wait`.
    pub async fn events(
        &self,
        after: u64,
        limit: usize,
        since: Option<Timestamp>,
        wait: Duration,
    ) -> Result<EventList, ClientError> {
        let (after, limit, wait) = (after.to_string(), limit.to_string(), wait.as_secs_f64().to_string());
        let since = since.map(|since| since.to_string());
        let parameters = [
            ("after", Some(&*after)),
            ("limit", Some(&*limit)),
            ("since", since.as_deref()),
            ("wait_seconds", Some(&*wait)),
        ];
        self.ask(Method::GET, &route::with_query(route::EVENTS, &parameters)).await
    }

    /// The hosts.
    pub async fn hosts(&self) -> Result<HostList, ClientError> {
        self.list(route::HOSTS).await
    }

    /// Renews the lease of the host called `name`, with what it holds from now on.
    pub async fn renew_lease(&self, name: &str, lease: &LeaseRequest) -> Result<LeaseGranted, ClientError> {
        self.tell(&route::with_name(route::LEASE, name), lease).await
    }

    /// Gives up the lease of the host called `name` with that id.
    pub async fn release_lease(&self, name: &str, id: &str) -> Result<LeaseGranted, ClientError> {
        let path = route::with_query(&route::with_name(route::LEASE, name), &[("id", Some(id))]);
        self.ask(Method::DELETE, &path).await
    }

    /// The tokens.
    pub async fn tokens(&self) -> Result<TokenList, ClientError> {
        self.list(route::TOKENS).await
    }

    /// Makes a token.
    pub async fn create_token(&self, token: &NewToken) -> Result<TokenCreated, ClientError> {
        self.tell(route::TOKENS, token).await
    }

    /// Revokes the token of that name.
    pub async fn revoke_token(&self, name: &str) -> Result<TokenInfo, ClientError> {
        self.ask(Method::DELETE, &route::with_name(route::TOKEN, name)).await
    }

    /// Sends a request without a body and reads a JSON answer.
    async fn ask<T: DeserializeOwned>(&self, method: Method, path: &str) -> Result<T, ClientError> {
        let response = self.send(method, path, None, nothing()).await?;
        self.read(response).await
    }

    /// Posts JSON and reads a JSON answer.
    async fn tell<T: DeserializeOwned>(&self, path: &str, message: &impl Serialize) -> Result<T, ClientError> {
        self.send_json(Method::POST, path, message).await
    }

    /// Sends JSON and reads a JSON answer.
    async fn send_json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        message: &impl Serialize,
    ) -> Result<T, ClientError> {
        let text = serde_json::to_vec(message).map_err(|source| broken(&self.address, source))?;
        let body = Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed();
        let response = self.send(method, path, Some("application/json"), body).await?;
        self.read(response).await
    }

    /// Connects, sends, and turns a refusal into an error.
    async fn send(
        &self,
        method: Method,
        path: &str,
        content_type: Option<&str>,
        body: RequestBody,
    ) -> Result<Response<Incoming>, ClientError> {
        let host = match &self.address {
            Address::Unix(_) => "coordinator",
            Address::Tcp(authority) | Address::Tls(authority) => authority,
        };
        let mut request = Request::builder().method(method).uri(path).header(http::header::HOST, host);
        if let Some(content_type) = content_type {
            request = request.header(http::header::CONTENT_TYPE, content_type);
        }
        if let Some(token) = self.authorization()? {
            request = request.header(http::header::AUTHORIZATION, token);
        }
        let request = request.body(body).map_err(|source| broken(&self.address, source))?;
        let response = match &self.address {
            Address::Unix(path) => self.exchange(UnixStream::connect(path), request).await?,
            Address::Tcp(authority) => self.exchange(TcpStream::connect(authority), request).await?,
            Address::Tls(authority) => {
                let secured = self.secure(authority).await?;
                self.exchange(async { Ok(secured) }, request).await?
            }
        };
        if response.status().is_success() { Ok(response) } else { Err(self.refusal(response).await) }
    }

    /// The token to show, if there is one and nobody can overhear it.
    fn authorization(&self) -> Result<Option<HeaderValue>, ClientError> {
        let Some(source) = self.token.as_ref().filter(|_| self.address.is_private()) else { return Ok(None) };
        let mut value = HeaderValue::try_from(format!("Bearer {}", source.read()?.expose()))
            .map_err(|source| broken(&self.address, source))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    /// A connection over TLS.
    async fn secure(&self, authority: &str) -> Result<TlsStream<TcpStream>, ClientError> {
        let untrusted = |why: String| ClientError::Untrusted { address: self.address.clone(), why };
        let connector = self.tls.as_ref().ok_or_else(|| untrusted("TLS is not set up".to_owned()))?;
        let name = ServerName::try_from(host_of(authority).to_owned()).map_err(|error| untrusted(error.to_string()))?;
        let shaken = async { connector.connect(name, TcpStream::connect(authority).await?).await };
        let shaken = tokio::time::timeout(CONNECT_TIMEOUT, shaken).await;
        shaken.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(|error| {
            let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
            match tls {
                Some(rustls::Error::InvalidCertificate(reason)) => untrusted(explain(reason)),
                Some(rustls::Error::InvalidMessage(_)) => untrusted("it does not speak TLS".to_owned()),
                Some(other) => untrusted(other.to_string()),
                None => ClientError::Unreachable { address: self.address.clone(), source: error },
            }
        })
    }

    /// One request over a connection of its own.
    async fn exchange<S>(
        &self,
        connect: impl Future<Output = io::Result<S>>,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, ClientError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let unreachable = |source| ClientError::Unreachable { address: self.address.clone(), source };
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, connect)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(unreachable)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|source| broken(&self.address, source))?;
        // Errors of the connection itself surface in the request and in the body.
        tokio::spawn(connection);
        sender.send_request(request).await.map_err(|source| {
            if source.is_parse() {
                ClientError::NotACoordinator { address: self.address.clone(), why: NOT_HTTP.to_owned() }
            } else {
                broken(&self.address, source)
            }
        })
    }

    /// Reads a JSON answer.
    async fn read<T: DeserializeOwned>(&self, response: Response<Incoming>) -> Result<T, ClientError> {
        let bytes = self.collect(response).await?;
        serde_json::from_slice(&bytes)
            .map_err(|why| ClientError::NotACoordinator { address: self.address.clone(), why: why.to_string() })
    }

    /// Reads an error answer.
    async fn refusal(&self, response: Response<Incoming>) -> ClientError {
        let status = response.status();
        let bytes = match self.collect(response).await {
            Ok(bytes) => bytes,
            Err(error) => return error,
        };
        match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(body) => ClientError::Refused(body.error),
            Err(_) => ClientError::NotACoordinator {
                address: self.address.clone(),
                why: format!("it answers {status} without the API's error document"),
            },
        }
    }

    /// The whole body, up to [`MAX_ANSWER`].
    async fn collect(&self, response: Response<Incoming>) -> Result<Bytes, ClientError> {
        let body = http_body_util::Limited::new(response.into_body(), MAX_ANSWER);
        let collected = body.collect().await.map_err(|source| broken(&self.address, source))?;
        Ok(collected.to_bytes())
    }
}
