//! Where registries may lead requests: addresses of this machine and of its link are not for registries elsewhere.
//!
//! Registries lead to other servers: to storage that holds their blobs, to the service that gives out tokens. A registry on the network
//! must not lead to this machine's own services or to those on its link (a cloud's metadata service gives its credentials to whoever asks
//! from here). A name does not tell where it leads, so the [`Resolver`] judges the addresses that a connection is opened to; an address in
//! a URL is judged before the URL is requested ([`Reach::check`]).
//!
//! A registry on this machine may lead to this machine, and one on the link to the link. What a person names may be anywhere.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

/// Metadata services of clouds outside of the link's address ranges: AWS over IPv6, Alibaba, Oracle.
const METADATA: [IpAddr; 3] = [
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
];

/// Where an address lies, as seen from this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AddressScope {
    /// On this machine.
    Loopback,
    /// On this machine's link, with its neighbours only; metadata services count as such.
    LinkLocal,
    /// Anywhere else.
    Network,
}

impl AddressScope {
    /// Where `address` lies. An IPv4 address that is embedded in an IPv6 one counts as itself.
    pub fn of(address: IpAddr) -> AddressScope {
        if METADATA.contains(&address) {
            return AddressScope::LinkLocal;
        }
        match address {
            // A connection to 0.0.0.0 arrives at this machine.
            IpAddr::V4(v4) if v4.is_loopback() || v4.octets()[0] == 0 => AddressScope::Loopback,
            IpAddr::V4(v4) if v4.is_link_local() => AddressScope::LinkLocal,
            IpAddr::V4(_) => AddressScope::Network,
            IpAddr::V6(v6) if v6.is_loopback() || v6.is_unspecified() => AddressScope::Loopback,
            IpAddr::V6(v6) if v6.is_unicast_link_local() => AddressScope::LinkLocal,
            IpAddr::V6(v6) => wrapped(v6).map_or(AddressScope::Network, |v4| AddressScope::of(IpAddr::V4(v4))),
        }
    }

    /// Where a URL's host lies, if it is an address or a name for this machine; `None` for all other names.
    pub fn of_host(host: &str) -> Option<AddressScope> {
        let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
        if let Ok(address) = bare.parse() {
            return Some(AddressScope::of(address));
        }
        let name = bare.trim_end_matches('.').to_ascii_lowercase();
        (name == "localhost" || name.ends_with(".localhost")).then_some(AddressScope::Loopback)
    }
}

/// The IPv4 address that is embedded in this one: mapped, compatible, NAT64 or 6to4.
fn wrapped(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let bytes = address.octets();
    let at = |begin: usize| Ipv4Addr::new(bytes[begin], bytes[begin + 1], bytes[begin + 2], bytes[begin + 3]);
    match address.segments() {
        [0, 0, 0, 0, 0, 0xffff, ..] | [0x64, 0xff9b, 0, 0, 0, 0, ..] => Some(at(12)),
        [0, 0, 0, 0, 0, 0, ..] if bytes[12] != 0 => Some(at(12)),
        [0x2002, ..] => Some(at(2)),
        _ => None,
    }
}

/// How far a request may reach, depending on who named its target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reach {
    /// A person named it.
    Anywhere,
    /// A registry in this place named it.
    From(AddressScope),
}

/// A target that a registry must not lead to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forbidden {
    /// The host that was named.
    pub host: String,
    /// Where it lies.
    pub place: AddressScope,
}

impl fmt::Display for Forbidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (place, may) = match self.place {
            AddressScope::Loopback => {
                ("an address of the coordinator's own machine", "only a registry on that machine")
            }
            _ => ("an address of the coordinator's own link", "only a registry on that link"),
        };
        write!(f, "{place}, to which {may} may lead")
    }
}

impl std::error::Error for Forbidden {}

impl Reach {
    /// Whether it covers `place`.
    pub fn covers(self, place: AddressScope) -> bool {
        match self {
            Reach::Anywhere => true,
            Reach::From(own) => place == AddressScope::Network || place == own,
        }
    }

    /// Refuses a host that is evidently out of reach. Other names are judged when they are resolved.
    pub fn check(self, host: &str) -> Result<(), Forbidden> {
        match AddressScope::of_host(host) {
            Some(place) if !self.covers(place) => Err(Forbidden { host: host.to_owned(), place }),
            _ => Ok(()),
        }
    }
}

/// Resolves names of hosts.
pub trait Names: Send + Sync {
    /// The addresses of a host.
    fn look_up(&self, name: String) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>>;
}

/// The system's resolver.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemNames;

impl Names for SystemNames {
    fn look_up(&self, name: String) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>> {
        async move { Ok(tokio::net::lookup_host((name.as_str(), 0)).await?.collect()) }.boxed()
    }
}

/// Resolves names for connections, leaving out the addresses that are out of reach.
pub struct Resolver {
    /// How far connections may reach.
    pub reach: Reach,
    /// The resolver behind it.
    pub names: Arc<dyn Names>,
    /// The proxies' own hosts, which may be anywhere because the administrator named them.
    pub proxies: Arc<HashSet<String>>,
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let host = name.as_str().to_owned();
        let reach = if self.proxies.contains(&host) { Reach::Anywhere } else { self.reach };
        let found = self.names.look_up(host.clone());
        async move {
            let found = found.await?;
            let (near, far): (Vec<_>, Vec<_>) =
                found.into_iter().partition(|address| reach.covers(AddressScope::of(address.ip())));
            match (near.is_empty(), far.first()) {
                (true, Some(first)) => Err(Forbidden { host, place: AddressScope::of(first.ip()) }.into()),
                _ => Ok(Box::new(near.into_iter()) as Addrs),
            }
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_lie_where_a_connection_to_them_arrives() {
        for (text, expected) in [
            ("127.0.0.1", AddressScope::Loopback),
            ("127.8.9.10", AddressScope::Loopback),
            ("0.0.0.0", AddressScope::Loopback),
            ("0.1.2.3", AddressScope::Loopback),
            ("::1", AddressScope::Loopback),
            ("::", AddressScope::Loopback),
            ("::ffff:127.0.0.1", AddressScope::Loopback),
            ("::127.0.0.1", AddressScope::Loopback),
            ("::ffff:0.0.0.0", AddressScope::Loopback),
            ("64:ff9b::7f00:1", AddressScope::Loopback),
            ("2002:7f00:1::", AddressScope::Loopback),
            ("169.254.169.254", AddressScope::LinkLocal),
            ("::ffff:169.254.169.254", AddressScope::LinkLocal),
            ("64:ff9b::a9fe:a9fe", AddressScope::LinkLocal),
            ("fe80::1", AddressScope::LinkLocal),
            ("fd00:ec2::254", AddressScope::LinkLocal),
            ("100.100.100.200", AddressScope::LinkLocal),
            ("10.0.0.1", AddressScope::Network),
            ("128.0.0.1", AddressScope::Network),
            ("::ffff:10.0.0.1", AddressScope::Network),
            ("2001:db8::1", AddressScope::Network),
            ("::2", AddressScope::Network),
            ("fd00::1", AddressScope::Network),
        ] {
            assert_eq!(AddressScope::of(text.parse().unwrap()), expected, "{text}");
        }
    }

    #[test]
    fn hosts_of_urls_are_judged_as_urls_are_read() {
        // The URL parser knows every way in which an IPv4 address can be written.
        for odd in ["127.1", "2130706433", "0x7f.1", "0177.0.0.1", "[::ffff:7f00:1]", "LOCALHOST", "a.localhost."] {
            let url: reqwest::Url = format!("http://{odd}/").parse().unwrap();
            assert_eq!(AddressScope::of_host(url.host_str().unwrap()), Some(AddressScope::Loopback), "{odd}");
        }
        for other in ["localhost.example", "example.com", "r.localhost.example"] {
            assert_eq!(AddressScope::of_host(other), None, "{other}");
        }
    }

    #[test]
    fn a_registry_leads_to_the_network_and_to_where_it_is() {
        let (here, link, network) = (AddressScope::Loopback, AddressScope::LinkLocal, AddressScope::Network);
        for (reach, covered) in [
            (Reach::Anywhere, &[here, link, network][..]),
            (Reach::From(network), &[network]),
            (Reach::From(here), &[here, network]),
            (Reach::From(link), &[link, network]),
        ] {
            for place in [here, link, network] {
                assert_eq!(reach.covers(place), covered.contains(&place), "{reach:?} {place:?}");
            }
        }
    }

    struct Rebound;

    impl Names for Rebound {
        fn look_up(&self, name: String) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>> {
            let addresses: &[&str] = match name.as_str() {
                "inner.example" => &["127.0.0.1:0", "[::1]:0"],
                "both.example" => &["169.254.169.254:0", "192.0.2.7:0"],
                _ => &["192.0.2.7:0"],
            };
            let found = addresses.iter().map(|address| address.parse().unwrap()).collect();
            async move { Ok(found) }.boxed()
        }
    }

    #[tokio::test]
    async fn names_are_judged_by_their_addresses() {
        let resolver = |reach| Resolver { reach, names: Arc::new(Rebound), proxies: Arc::default() };
        let network = resolver(Reach::From(AddressScope::Network));
        let look_up = async |resolver: &Resolver, name: &str| {
            let found = resolver.resolve(name.parse().unwrap()).await;
            found.map(|found| found.map(|address| address.ip().to_string()).collect::<Vec<_>>())
        };
        let error = look_up(&network, "inner.example").await.unwrap_err();
        let expected = Forbidden { host: "inner.example".to_owned(), place: AddressScope::Loopback };
        assert_eq!(error.downcast_ref::<Forbidden>(), Some(&expected));
        assert_eq!(look_up(&network, "both.example").await.unwrap(), ["192.0.2.7"]);
        let here = resolver(Reach::From(AddressScope::Loopback));
        assert_eq!(look_up(&here, "inner.example").await.unwrap(), ["127.0.0.1", "::1"]);
        let proxies = Arc::new(HashSet::from(["inner.example".to_owned()]));
        let proxied = Resolver { proxies, ..resolver(Reach::From(AddressScope::Network)) };
        assert!(look_up(&proxied, "inner.example").await.is_ok(), "the proxy's own name");
    }
}
