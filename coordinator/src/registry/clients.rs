//! HTTP clients, one for each reach: a connection that was opened for one is never used for another.
//!
//! None of them follows redirects: [`super::transport`] does, and looks at each. Which of them go through a proxy is for
//! [`super::proxies`]. Where a proxy stands between, it is the proxy that resolves names: it has to keep strangers from the network
//! that it stands in.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use reqwest::redirect::Policy;
use reqwest::{Client, Proxy, Url};

use crate::registry::fault::root_cause;
use crate::registry::proxies::Proxies;
use crate::registry::reach::{Names, Place, Reach, Resolver};

/// A connection that is not there after this is not coming.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// The same for finding out whether a host speaks TLS: a plain server may wait for ever for the line end that a greeting lacks.
const PROBE_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Silence on an open connection; a break is resumed, so this may be short.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Connections to one host that are kept although nothing is asked.
const IDLE_CONNECTIONS: usize = 8;

/// What a client is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Use {
    Requests(Reach),
    Probes,
}

/// All clients.
#[derive(Debug)]
pub(super) struct Clients {
    clients: HashMap<Use, Client>,
    proxies: Proxies,
    proxy_hosts: Arc<HashSet<String>>,
}

impl Clients {
    /// Clients with this trust, on these ways; the error is in words.
    pub(super) fn new(tls: &rustls::ClientConfig, names: &Arc<dyn Names>, proxies: Proxies) -> Result<Clients, String> {
        let proxy_hosts = Arc::new(proxies.hosts());
        let mut clients = HashMap::new();
        let places = [Place::Network, Place::Loopback, Place::LinkLocal].map(Reach::From);
        let uses = [Reach::Anywhere].into_iter().chain(places).map(Use::Requests).chain([Use::Probes]);
        for purpose in uses {
            let (reach, connect_timeout) = match purpose {
                Use::Requests(reach) => (reach, CONNECT_TIMEOUT),
                Use::Probes => (Reach::Anywhere, PROBE_CONNECT_TIMEOUT),
            };
            let resolver = Resolver { reach, names: Arc::clone(names), proxies: Arc::clone(&proxy_hosts) };
            let ways = proxies.clone();
            let builder = Client::builder()
                .use_preconfigured_tls(tls.clone())
                .user_agent(concat!("cachefs/", env!("CARGO_PKG_VERSION")))
                .redirect(Policy::none())
                .proxy(Proxy::custom(move |url| ways.of_url(url).cloned()))
                // As Go reads headers.
                .http1_allow_spaces_after_header_name_in_responses(true)
                .http1_allow_obsolete_multiline_headers_in_responses(true)
                .http1_ignore_invalid_headers_in_responses(true)
                .dns_resolver(Arc::new(resolver))
                .pool_max_idle_per_host(IDLE_CONNECTIONS)
                .connect_timeout(connect_timeout)
                .read_timeout(READ_TIMEOUT);
            clients.insert(purpose, builder.build().map_err(|error| root_cause(&error))?);
        }
        Ok(Clients { clients, proxies, proxy_hosts })
    }

    /// The client for what may lie within `reach`.
    pub(super) fn client(&self, reach: Reach) -> &Client {
        &self.clients[&Use::Requests(reach)]
    }

    /// The client to find out with what a host speaks.
    pub(super) fn probe(&self) -> &Client {
        &self.clients[&Use::Probes]
    }

    /// Whether a connection for `url` ends at a proxy, so that its address tells nothing of the host.
    pub(super) fn is_proxied(&self, url: &Url) -> bool {
        self.proxies.of_url(url).is_some()
    }

    /// Whether this is a proxy's host: a registry has no business there.
    pub(super) fn is_proxy(&self, host: &str) -> bool {
        self.proxy_hosts.contains(host)
    }
}
