//! A client that asks for exactly what it is told to: [`reqwest`] takes a target as a URL alone, and so escapes what need not be.
//!
//! It knows no proxies: where one stands between, the other client is used. Everything else is as there: trust, names and how far
//! they may reach, patience, how headers are read.

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

use crate::registries::oci::reach::Resolver;

/// What we call ourselves.
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

/// The names of one reach, for connections.
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
    /// A client with this trust that reaches as far as `resolver`, waits so long for connections, and for answers.
    pub(super) fn new(tls: &rustls::ClientConfig, resolver: Resolver, connect: Duration, patience: Duration) -> Exact {
        let mut connector = HttpConnector::new_with_resolver(Names(Arc::new(resolver)));
        connector.enforce_http(false);
        connector.set_connect_timeout(Some(connect));
        connector.set_nodelay(true);
        let mut tls = tls.clone();
        // It speaks no other version, and the connector wants to say so itself.
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

    /// The answer to a request, with another target in its line.
    pub(super) async fn send(&self, request: Request, target: &Uri) -> Result<Response, ExactError> {
        let mut request = http::Request::<Body>::try_from(request)?;
        *request.uri_mut() = target.clone();
        request.headers_mut().entry(header::USER_AGENT).or_insert(HeaderValue::from_static(USER_AGENT));
        let answer = tokio::time::timeout(self.patience, self.client.request(request)).await;
        Ok(Response::from(answer.map_err(|_| ExactError::Silent)??.map(Body::wrap)))
    }
}
