//! HTTP clients, one for each reach: a connection that was opened for one is never used for another.
//!
//! None of them follows redirects: [`super::transport`] does, and looks at each. Loopback hosts are reached without the system's
//! proxies. Where a proxy stands between, it is the proxy that resolves names: it has to keep strangers from the network that it
//! stands in.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use reqwest::redirect::Policy;
use reqwest::{Client, Url};

use crate::registry::fault::root_cause;
use crate::registry::reach::{Names, Place, Reach, Resolver};

/// A connection that is not there after this is not coming.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// The same for finding out whether a host speaks TLS: a plain server may wait for ever for the line end that a greeting lacks.
const PROBE_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Silence on an open connection; a break is resumed, so this may be short.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Connections to one host that are kept although nothing is asked.
const IDLE_CONNECTIONS: usize = 8;

/// The variables that name proxies.
const PROXY_VARIABLES: [&str; 6] = ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"];

/// Whether the system's proxies are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Route {
    /// Where they are configured.
    Proxied,
    /// Never.
    Direct,
}

/// What a client is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Use {
    Requests(Reach),
    Probes,
}

/// All clients.
#[derive(Debug)]
pub(super) struct Clients {
    clients: HashMap<(Use, Route), Client>,
    proxies: Arc<HashSet<String>>,
}

fn route(host: &str) -> Route {
    if Place::of_host(host) == Some(Place::Loopback) { Route::Direct } else { Route::Proxied }
}

/// The hosts of the configured proxies.
fn proxies() -> HashSet<String> {
    let given = PROXY_VARIABLES.iter().filter_map(|name| std::env::var(name).ok()).filter(|text| !text.is_empty());
    let url =
        |text: String| text.parse::<Url>().ok().filter(Url::has_host).or_else(|| format!("http://{text}").parse().ok());
    given.filter_map(url).filter_map(|url| url.host_str().map(str::to_owned)).collect()
}

impl Clients {
    /// Clients with this trust; the error is in words.
    pub(super) fn new(tls: &rustls::ClientConfig, names: &Arc<dyn Names>) -> Result<Clients, String> {
        let proxies = Arc::new(proxies());
        let mut clients = HashMap::new();
        let places = [Place::Network, Place::Loopback, Place::LinkLocal].map(Reach::From);
        let uses = [Reach::Anywhere].into_iter().chain(places).map(Use::Requests).chain([Use::Probes]);
        for (purpose, route) in uses.flat_map(|purpose| [(purpose, Route::Proxied), (purpose, Route::Direct)]) {
            let (reach, connect_timeout) = match purpose {
                Use::Requests(reach) => (reach, CONNECT_TIMEOUT),
                Use::Probes => (Reach::Anywhere, PROBE_CONNECT_TIMEOUT),
            };
            let resolver = Resolver { reach, names: Arc::clone(names), proxies: Arc::clone(&proxies) };
            let builder = Client::builder()
                .use_preconfigured_tls(tls.clone())
                .user_agent(concat!("cachefs/", env!("CARGO_PKG_VERSION")))
                .redirect(Policy::none())
                // As Go reads headers.
                .http1_allow_spaces_after_header_name_in_responses(true)
                .http1_allow_obsolete_multiline_headers_in_responses(true)
                .dns_resolver(Arc::new(resolver))
                .pool_max_idle_per_host(IDLE_CONNECTIONS)
                .connect_timeout(connect_timeout)
                .read_timeout(READ_TIMEOUT);
            let builder = if route == Route::Direct { builder.no_proxy() } else { builder };
            clients.insert((purpose, route), builder.build().map_err(|error| root_cause(&error))?);
        }
        Ok(Clients { clients, proxies })
    }

    /// The client to reach `host` with, which may lie within `reach`.
    pub(super) fn client(&self, reach: Reach, host: &str) -> &Client {
        &self.clients[&(Use::Requests(reach), route(host))]
    }

    /// The client to find out with what `host` speaks.
    pub(super) fn probe(&self, host: &str) -> &Client {
        &self.clients[&(Use::Probes, route(host))]
    }

    /// Whether a connection to `host` may end at a proxy, so that its address tells nothing of the host.
    pub(super) fn may_be_proxied(&self, host: &str) -> bool {
        route(host) == Route::Proxied && !self.proxies.is_empty()
    }

    /// Whether this is a proxy's host: a registry has no business there.
    pub(super) fn is_proxy(&self, host: &str) -> bool {
        self.proxies.contains(host)
    }
}
