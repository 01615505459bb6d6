//! HTTP clients, one for each reach and for each registry with its own certificates: a connection that was opened for one is never used for
//! another.
//!
//! A registry's own certificates ([`certs_d`]) apply to every request on its behalf, wherever it leads: docker trusts its CAs at the
//! storage and the token service that it names, too, and presents the same client certificate if they ask for one. The files are checked
//! with each request. If they cannot be used, this is reported, and the certificates that were read before stay in use.
//!
//! None of the clients follows redirects: [`super::transport`] does, and checks each. [`super::proxies`] decides which requests go through
//! a proxy. A proxy resolves names itself, so it has to protect the network that it stands in.
//!
//! `own` guards the map and is never held during I/O.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use coordinator_api::trust::config_with;
use lru::LruCache;
use parking_lot::Mutex;
use reqwest::redirect::Policy;
use reqwest::{Client, Proxy, Url};
use rustls::pki_types::CertificateDer;

use crate::registries::oci::certs_d::{self, Certificates, Found};
use crate::registries::oci::egress::{AddressScope, Names, Reach, Resolver};
use crate::registries::oci::fault::root_cause;
use crate::registries::oci::proxies::Proxies;
use crate::registries::oci::raw_target::{Exact, USER_AGENT};

/// The timeout for opening a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// The same while finding out whether a host speaks TLS: a plain server may wait for ever for the line end that a TLS greeting lacks.
const PROBE_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest silence on an open connection. A broken download is resumed, so this may be short.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Maximum number of idle connections that are kept to one host.
const IDLE_CONNECTIONS: usize = 8;
/// Maximum number of registries with their own certificates whose clients are cached; others' clients are built when they are needed.
const MOST_OWN: NonZeroUsize = NonZeroUsize::new(64).expect("64 is not zero");

/// What a client is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Use {
    Requests(Reach),
    Probes,
}

/// The clients of one registry, or of all registries without their own certificates.
#[derive(Debug)]
pub(super) struct ClientSet {
    clients: HashMap<Use, Client>,
    exact: HashMap<Reach, Exact>,
    /// Sentences about certificate files that were skipped, for errors about trust.
    remarks: Vec<String>,
}

impl ClientSet {
    /// The client for targets within `reach`.
    pub(super) fn client(&self, reach: Reach) -> &Client {
        &self.clients[&Use::Requests(reach)]
    }

    /// The client for targets within `reach` that must be requested in exact bytes. It uses no proxy.
    pub(super) fn exact(&self, reach: Reach) -> &Exact {
        &self.exact[&reach]
    }

    /// The client that finds out which scheme a host speaks.
    pub(super) fn probe(&self) -> &Client {
        &self.clients[&Use::Probes]
    }

    /// Sentences about files that were skipped when the certificates were read.
    pub(super) fn remarks(&self) -> &[String] {
        &self.remarks
    }
}

/// What all clients have in common.
struct Common {
    trusted: Vec<CertificateDer<'static>>,
    places: Vec<PathBuf>,
    names: Arc<dyn Names>,
    proxies: Proxies,
    proxy_hosts: Arc<HashSet<String>>,
}

impl Common {
    /// Builds clients with these certificates in addition to the common ones. Errors are sentences. Blocks.
    fn build(&self, own: Certificates) -> Result<Arc<ClientSet>, String> {
        let trusted = self.trusted.iter().cloned().chain(own.authorities).collect();
        let tls = config_with(trusted, own.shown).map_err(|error| error.to_string())?;
        let places = [AddressScope::Network, AddressScope::Loopback, AddressScope::LinkLocal].map(Reach::From);
        let uses = [Reach::Anywhere].into_iter().chain(places).map(Use::Requests).chain([Use::Probes]);
        let built = uses.map(|purpose| Ok((purpose, self.client(purpose, &tls)?))).collect::<Result<_, String>>();
        let reaches = [Reach::Anywhere].into_iter().chain(places);
        let exact = reaches.map(|reach| (reach, Exact::new(&tls, self.resolver(reach), CONNECT_TIMEOUT, READ_TIMEOUT)));
        Ok(Arc::new(ClientSet { clients: built?, exact: exact.collect(), remarks: own.remarks }))
    }

    /// The resolver for a client of this reach.
    fn resolver(&self, reach: Reach) -> Resolver {
        Resolver { reach, names: Arc::clone(&self.names), proxies: Arc::clone(&self.proxy_hosts) }
    }

    fn client(&self, purpose: Use, tls: &rustls::ClientConfig) -> Result<Client, String> {
        let (reach, connect_timeout) = match purpose {
            Use::Requests(reach) => (reach, CONNECT_TIMEOUT),
            Use::Probes => (Reach::Anywhere, PROBE_CONNECT_TIMEOUT),
        };
        let ways = self.proxies.clone();
        let builder = Client::builder()
            .use_preconfigured_tls(tls.clone())
            .user_agent(USER_AGENT)
            .redirect(Policy::none())
            .proxy(Proxy::custom(move |url| ways.of_url(url).cloned()))
            // Headers are accepted as Go accepts them.
            .http1_allow_spaces_after_header_name_in_responses(true)
            .http1_allow_obsolete_multiline_headers_in_responses(true)
            .http1_ignore_invalid_headers_in_responses(true)
            .dns_resolver(Arc::new(self.resolver(reach)))
            .pool_max_idle_per_host(IDLE_CONNECTIONS)
            .connect_timeout(connect_timeout)
            .read_timeout(READ_TIMEOUT);
        builder.build().map_err(|error| root_cause(&error))
    }
}

/// All clients.
pub(super) struct Clients {
    common: Arc<Common>,
    shared: Arc<ClientSet>,
    /// The clients of registries with their own certificates, and the directories that these were found in.
    own: Mutex<LruCache<String, Own>>,
}

impl std::fmt::Debug for Clients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Clients")
    }
}

impl Clients {
    /// Builds clients that trust these certificates and look for registries' own certificates in these places. Errors are sentences.
    /// Blocks.
    pub(super) fn new(
        trusted: Vec<CertificateDer<'static>>,
        places: Vec<PathBuf>,
        names: &Arc<dyn Names>,
        proxies: Proxies,
    ) -> Result<Clients, String> {
        let proxy_hosts = Arc::new(proxies.hosts());
        let common = Common { trusted, places, names: Arc::clone(names), proxies, proxy_hosts };
        let shared = common.build(Certificates::default())?;
        Ok(Clients { common: Arc::new(common), shared, own: Mutex::new(LruCache::new(MOST_OWN)) })
    }

    /// The clients for requests on behalf of `registry`. The error is a sentence about its certificates.
    pub(super) async fn of(&self, registry: &str) -> Result<Arc<ClientSet>, String> {
        if self.common.places.is_empty() {
            return Ok(Arc::clone(&self.shared));
        }
        let kept = self.own.lock().get(registry).cloned();
        let (common, name) = (Arc::clone(&self.common), registry.to_owned());
        let looked = tokio::task::spawn_blocking(move || look(&common, &name, kept)).await;
        match looked.map_err(|_| "reading them failed".to_owned())?? {
            Some((found, set)) => {
                self.own.lock().put(registry.to_owned(), (found, Arc::clone(&set)));
                Ok(set)
            }
            None => {
                self.own.lock().pop(registry);
                Ok(Arc::clone(&self.shared))
            }
        }
    }

    /// The clients of registries without their own certificates.
    pub(super) fn shared(&self) -> &ClientSet {
        &self.shared
    }

    /// Whether a connection for `url` ends at a proxy, so that its address says nothing about the host.
    pub(super) fn is_proxied(&self, url: &Url) -> bool {
        self.common.proxies.of_url(url).is_some()
    }

    /// Whether this is a proxy's host, to which no registry may lead.
    pub(super) fn is_proxy(&self, host: &str) -> bool {
        self.common.proxy_hosts.contains(host)
    }
}

/// A registry's own certificates, and clients with them.
type Own = (Found, Arc<ClientSet>);

/// The registry's present certificates and clients. `kept` stays in use if nothing has changed, or if the present files cannot be used,
/// because somebody may be in the middle of changing them.
fn look(common: &Common, registry: &str, kept: Option<Own>) -> Result<Option<Own>, String> {
    let Some(found) = certs_d::find(&common.places, registry)? else { return Ok(None) };
    if let Some((_, set)) = kept.as_ref().filter(|(before, _)| *before == found) {
        return Ok(Some((found, Arc::clone(set))));
    }
    let built = found.read().and_then(|certificates| {
        for remark in &certificates.remarks {
            tracing::warn!("certificates for registry {registry}: {remark}");
        }
        common.build(certificates)
    });
    match (built, kept) {
        (Ok(set), _) => {
            tracing::info!("registry {registry} has certificates of its own in {}", found.directory().display());
            Ok(Some((found, set)))
        }
        (Err(why), Some((_, set))) => {
            tracing::error!("the certificates for registry {registry} that were there before go on: {why}");
            Ok(Some((found, set)))
        }
        (Err(why), None) => Err(why),
    }
}
