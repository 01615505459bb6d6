//! HTTP clients, one for each reach and each registry with certificates of its own: a connection that was opened for one is never used for
//! another.
//!
//! A registry's own certificates ([`certs_d`]) count for whatever is asked on its behalf, wherever it leads: docker trusts its
//! authorities at the storage and the token service that it names, too, and shows them the same certificate if they ask for one. They are looked
//! at with each request; those that cannot be used are reported, and what was read before goes on.
//!
//! None of the clients follows redirects: [`super::transport`] does, and looks at each. Which of them go through a proxy is for
//! [`super::proxies`]. Where a proxy stands between, it is the proxy that resolves names: it has to keep strangers from the network
//! that it stands in.
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
use crate::registries::oci::exact::{Exact, USER_AGENT};
use crate::registries::oci::fault::root_cause;
use crate::registries::oci::proxies::Proxies;
use crate::registries::oci::reach::{Names, Place, Reach, Resolver};

/// A connection that is not there after this is not coming.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// The same for finding out whether a host speaks TLS: a plain server may wait for ever for the line end that a greeting lacks.
const PROBE_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Silence on an open connection; a break is resumed, so this may be short.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Connections to one host that are kept although nothing is asked.
const IDLE_CONNECTIONS: usize = 8;
/// Registries with certificates of their own whose clients are kept; those of others are made when they are needed.
const MOST_OWN: NonZeroUsize = NonZeroUsize::new(64).expect("64 is not zero");

/// What a client is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Use {
    Requests(Reach),
    Probes,
}

/// The clients of one registry, or of all that have no certificates of their own.
#[derive(Debug)]
pub(super) struct ClientSet {
    clients: HashMap<Use, Client>,
    exact: HashMap<Reach, Exact>,
    /// What to say of its certificates when there is no trust.
    remarks: Vec<String>,
}

impl ClientSet {
    /// The client for what may lie within `reach`.
    pub(super) fn client(&self, reach: Reach) -> &Client {
        &self.clients[&Use::Requests(reach)]
    }

    /// The client for what may lie within `reach` and has to be asked for in exact bytes; it goes through no proxy.
    pub(super) fn exact(&self, reach: Reach) -> &Exact {
        &self.exact[&reach]
    }

    /// The client to find out with what a host speaks.
    pub(super) fn probe(&self) -> &Client {
        &self.clients[&Use::Probes]
    }

    /// What was passed over when its certificates were read, in words.
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
    /// Clients with these certificates besides; the error is in words. Blocks.
    fn build(&self, own: Certificates) -> Result<Arc<ClientSet>, String> {
        let trusted = self.trusted.iter().cloned().chain(own.authorities).collect();
        let tls = config_with(trusted, own.shown).map_err(|error| error.to_string())?;
        let places = [Place::Network, Place::Loopback, Place::LinkLocal].map(Reach::From);
        let uses = [Reach::Anywhere].into_iter().chain(places).map(Use::Requests).chain([Use::Probes]);
        let built = uses.map(|purpose| Ok((purpose, self.client(purpose, &tls)?))).collect::<Result<_, String>>();
        let reaches = [Reach::Anywhere].into_iter().chain(places);
        let exact = reaches.map(|reach| (reach, Exact::new(&tls, self.resolver(reach), CONNECT_TIMEOUT, READ_TIMEOUT)));
        Ok(Arc::new(ClientSet { clients: built?, exact: exact.collect(), remarks: own.remarks }))
    }

    /// What names mean to a client of this reach.
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
            // As Go reads headers.
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
    /// Of registries with certificates of their own, and where those were found.
    own: Mutex<LruCache<String, Own>>,
}

impl std::fmt::Debug for Clients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Clients")
    }
}

impl Clients {
    /// Clients that trust these certificates and look for registries' own in these places; the error is in words. Blocks.
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

    /// The clients for what is asked on behalf of `registry`; the error says in words what is wrong with its certificates.
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

    /// The clients of registries without certificates of their own.
    pub(super) fn shared(&self) -> &ClientSet {
        &self.shared
    }

    /// Whether a connection for `url` ends at a proxy, so that its address tells nothing of the host.
    pub(super) fn is_proxied(&self, url: &Url) -> bool {
        self.common.proxies.of_url(url).is_some()
    }

    /// Whether this is a proxy's host: a registry has no business there.
    pub(super) fn is_proxy(&self, host: &str) -> bool {
        self.common.proxy_hosts.contains(host)
    }
}

/// A registry's own certificates, and clients with them.
type Own = (Found, Arc<ClientSet>);

/// Those of now: what was kept, if nothing has changed, or nothing that can be used. Somebody may be in the middle of changing them.
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
