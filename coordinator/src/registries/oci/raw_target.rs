//! A client that sends a request's target byte for byte: [`reqwest`] takes a target as a URL only, and so escapes more than necessary.
//!
//! It supports no proxies: requests through a proxy use the other client. Everything else is the same: trust, names and how far they may
//! reach, timeouts, how headers are read.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use http::Uri;
use http::header::{self, HeaderValue};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::Name;
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::TokioExecutor;
use reqwest::dns::{Addrs, Resolve as _};
use reqwest::{Body, Request, Response};
use tower::Service;

use crate::registries::oci::egress::Resolver;

/// The `User-Agent` of all requests.
pub(super) const USER_AGENT: &str = concat!("cachefs/", env!("CARGO_PKG_VERSION"));

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExactError {
    /// The transport failed.
    #[error(transparent)]
    Failed(#[from] Error),
    /// The request cannot be sent.
    #[error(transparent)]
    Request(#[from] reqwest::Error),
    /// Nothing came in time.
    #[error("it does not answer in time")]
    Silent,
}

/// The resolver for connections within one reach.
#[derive(Clone)]
struct Names(Arc<Resolver>);

impl Service<Name> for Names {
    type Response = Addrs;
    type Error = Cause;
    type Future = BoxFuture<'static, Result<Addrs, Cause>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Cause>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        match name.as_str().parse() {
            Ok(name) => self.0.resolve(name),
            Err(_) => async { Err(Cause::from("it is no name of a host")) }.boxed(),
        }
    }
}

/// The client.
#[derive(Debug, Clone)]
pub(super) struct Exact {
    client: Client<HttpsConnector<HttpConnector<Names>>, Body>,
    patience: Duration,
}

impl Exact {
    /// A client with this TLS configuration that resolves names by `resolver`. It waits at most `connect` for connections, and `patience`
    /// for answers.
    pub(super) fn new(tls: &rustls::ClientConfig, resolver: Resolver, connect: Duration, patience: Duration) -> Exact {
        let mut connector = HttpConnector::new_with_resolver(Names(Arc::new(resolver)));
        connector.enforce_http(false);
        connector.set_connect_timeout(Some(connect));
        connector.set_nodelay(true);
        let mut tls = tls.clone();
        // This client speaks HTTP/1 only, and the connector wants to set ALPN itself.
        tls.alpn_protocols.clear();
        let tls = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1();
        let client = Client::builder(TokioExecutor::new())
            .http1_allow_spaces_after_header_name_in_responses(true)
            .http1_allow_obsolete_multiline_headers_in_responses(true)
            .http1_ignore_invalid_headers_in_responses(true)
            .pool_max_idle_per_host(0)
            .build(tls.wrap_connector(connector));
        Exact { client, patience }
    }

    /// Sends a request with `target` instead of its URL in the request line.
    pub(super) async fn send(&self, request: Request, target: &Uri) -> Result<Response, ExactError> {
        let mut request = http::Request::<Body>::try_from(request)?;
        *request.uri_mut() = target.clone();
        request.headers_mut().entry(header::USER_AGENT).or_insert(HeaderValue::from_static(USER_AGENT));
        let answer = tokio::time::timeout(self.patience, self.client.request(request)).await;
        Ok(Response::from(answer.map_err(|_| ExactError::Silent)??.map(Body::wrap)))
    }
}
