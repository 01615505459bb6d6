//! The proxies that the environment names, read as Go reads them (`golang.org/x/net/http/httpproxy`): docker, containerd and skopeo use the
//! same proxies with the same variables.
//!
//! `HTTPS_PROXY` is for `https://` only, and `HTTP_PROXY` for `http://` only. `NO_PROXY` lists hosts that are reached directly:
//! `example.com` (with its subdomains), `*.example.com` and `.example.com` (subdomains only), addresses, networks, or `*` for all. Names
//! and addresses may have a port. Variables in capitals take precedence. This machine itself is never reached through a proxy. Unlike in
//! Go, a proxy that cannot be used is refused when the coordinator starts, and not skipped in silence.
//!
//! A proxy resolves names itself, also with SOCKS.

use std::collections::HashSet;
use std::fmt;
use std::net::IpAddr;

use reqwest::Url;

use crate::registries::oci::egress::AddressScope;

/// Why the environment's proxies cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProxyError {
    /// A variable does not name a proxy.
    #[error(
        "{variable} does not name a proxy that can be used ({why}): write http://HOST:PORT, https://HOST:PORT or socks5://HOST:PORT, or unset it"
    )]
    Address {
        /// The variable.
        variable: &'static str,
        /// What is wrong, without the value: it may hold a password.
        why: String,
    },
    /// The environment is that of a CGI program, where whoever sends a request may set variables.
    #[error(
        "HTTP_PROXY is not believed where REQUEST_METHOD is set, because a request could have set it: unset one of them"
    )]
    Cgi,
}

/// Which proxy a request takes.
#[derive(Clone, Default)]
pub(super) struct Proxies {
    http: Option<Url>,
    https: Option<Url>,
    exceptions: Vec<Exception>,
}

/// Destinations that are reached directly.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Exception {
    Everything,
    Network(IpAddr, u32),
    Address(IpAddr, Option<u16>),
    /// The name without its leading dot, whether the name itself counts besides its subdomains, and the port.
    Domain {
        suffix: String,
        also_itself: bool,
        port: Option<u16>,
    },
}

impl fmt::Debug for Proxies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A proxy's URL may hold a password.
        f.debug_struct("Proxies").field("hosts", &self.hosts()).field("exceptions", &self.exceptions).finish()
    }
}

impl Proxies {
    /// Reads the proxies from the variables that `variable` returns.
    pub(super) fn of(variable: impl Fn(&str) -> Option<String>) -> Result<Proxies, ProxyError> {
        let first = |names: [&str; 2]| names.iter().find_map(|name| variable(name).filter(|value| !value.is_empty()));
        let http = proxy("HTTP_PROXY", first(["HTTP_PROXY", "http_proxy"]))?;
        let https = proxy("HTTPS_PROXY", first(["HTTPS_PROXY", "https_proxy"]))?;
        if http.is_some() && variable("REQUEST_METHOD").is_some_and(|value| !value.is_empty()) {
            return Err(ProxyError::Cgi);
        }
        let list = first(["NO_PROXY", "no_proxy"]).unwrap_or_default();
        Ok(Proxies { http, https, exceptions: list.split(',').filter_map(Exception::parse).collect() })
    }

    /// Reads the proxies from this process's environment.
    pub(super) fn of_environment() -> Result<Proxies, ProxyError> {
        Proxies::of(|name| std::env::var(name).ok())
    }

    /// The proxy that a request for `url` takes; `None` if it goes directly.
    pub(super) fn of_url(&self, url: &Url) -> Option<&Url> {
        let proxy = match url.scheme() {
            "https" => self.https.as_ref(),
            "http" => self.http.as_ref(),
            _ => None,
        }?;
        let host = url.host_str()?;
        let port = url.port_or_known_default()?;
        let is_direct = AddressScope::of_host(host) == Some(AddressScope::Loopback)
            || self.exceptions.iter().any(|exception| exception.covers(host, port));
        (!is_direct).then_some(proxy)
    }

    /// The proxies' own hosts.
    pub(super) fn hosts(&self) -> HashSet<String> {
        let proxies = [&self.http, &self.https].into_iter().flatten();
        proxies.filter_map(|url| url.host_str().map(str::to_owned)).collect()
    }
}

/// A variable's value as a proxy's URL: with `http://` where it has no scheme.
fn proxy(variable: &'static str, value: Option<String>) -> Result<Option<Url>, ProxyError> {
    let Some(value) = value else { return Ok(None) };
    let bad = |why: &str| ProxyError::Address { variable, why: why.to_owned() };
    let value = value.trim();
    let whole = value.parse::<Url>().ok().filter(Url::has_host);
    let bare = || Some(value).filter(|value| !value.contains("://"));
    let url = whole.or_else(|| format!("http://{}", bare()?).parse().ok().filter(Url::has_host));
    let url = url.ok_or_else(|| bad("it is no address"))?;
    match url.scheme() {
        "http" | "https" => Ok(Some(url)),
        // Go's clients leave the resolving of names to the proxy in both cases.
        "socks5" | "socks5h" => {
            let port = url.port().unwrap_or(1080);
            let rest = url.as_str().split_once("://").map_or("", |(_, rest)| rest);
            let mut url: Url = format!("socks5h://{rest}").parse().map_err(|_| bad("it is no address"))?;
            url.set_port(Some(port)).map_err(|()| bad("it is no address"))?;
            Ok(Some(url))
        }
        other => Err(bad(&format!("nobody here speaks {other}"))),
    }
}

/// Parses an address; one of IPv4 that is embedded in IPv6 becomes IPv4.
fn address(text: &str) -> Option<IpAddr> {
    text.parse::<IpAddr>().ok().map(|address| address.to_canonical())
}

/// An address as a number, and its width in bits.
fn bits(address: IpAddr) -> (u128, u32) {
    match address {
        IpAddr::V4(v4) => (u128::from(v4.to_bits()), 32),
        IpAddr::V6(v6) => (v6.to_bits(), 128),
    }
}

/// A name as URLs spell it.
fn ascii(name: &str) -> String {
    let url = format!("http://{name}/").parse::<Url>().ok();
    url.and_then(|url| url.host_str().map(str::to_owned)).filter(|_| !name.is_ascii()).unwrap_or(name.to_owned())
}

impl Exception {
    /// Parses one entry of the list; `None` if it means nothing.
    fn parse(text: &str) -> Option<Exception> {
        let text = text.trim().to_lowercase();
        if text == "*" {
            return Some(Exception::Everything);
        }
        if let Some((network, length)) = text.split_once('/') {
            let (network, length) = (network.parse::<IpAddr>().ok(), length.parse::<u32>().ok());
            if let (Some(network), Some(length)) = (network, length)
                && length <= bits(network).1
            {
                return Some(Exception::Network(network, length));
            }
        }
        // A single colon precedes a port; several belong to an IPv6 address.
        let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once("]:")) {
            Some((host, port)) => (host, Some(port)),
            None => match text.split_once(':') {
                Some((host, port)) if !port.contains(':') => (host, Some(port)),
                _ => (text.as_str(), None),
            },
        };
        // An invalid port matches none.
        let port = port.filter(|port| !port.is_empty()).map(|port| port.parse().unwrap_or(0));
        if let Some(address) = address(host) {
            return Some(Exception::Address(address, port));
        }
        let name = host.strip_prefix('*').filter(|rest| rest.starts_with('.')).unwrap_or(host);
        let suffix = name.strip_prefix('.').unwrap_or(name);
        (!name.is_empty()).then(|| Exception::Domain {
            suffix: ascii(suffix),
            also_itself: !name.starts_with('.'),
            port,
        })
    }

    /// Whether it covers a URL's host and port.
    fn covers(&self, host: &str, port: u16) -> bool {
        let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
        match (self, address(bare)) {
            (Exception::Everything, _) => true,
            (Exception::Network(network, length), Some(address)) => {
                let ((network, width), (address, own)) = (bits(*network), bits(address));
                let differing = (network ^ address).checked_shr(width - length).unwrap_or(0);
                width == own && differing == 0
            }
            (Exception::Address(own, wanted), Some(address)) => *own == address && wanted.is_none_or(|own| own == port),
            (Exception::Domain { suffix, also_itself, port: wanted }, None) => {
                let is_below = bare.strip_suffix(suffix.as_str()).is_some_and(|rest| rest.ends_with('.'));
                (is_below || (*also_itself && bare == suffix)) && wanted.is_none_or(|own| own == port)
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(variables: &[(&str, &str)]) -> Result<Proxies, ProxyError> {
        let find =
            |name: &str| variables.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).to_owned());
        Proxies::of(find)
    }

    fn way(variables: &[(&str, &str)], url: &str) -> String {
        let proxies = proxies(variables).unwrap();
        proxies
            .of_url(&url.parse().unwrap())
            .map_or("direct".to_owned(), |url| url.as_str().trim_end_matches('/').to_owned())
    }

    #[test]
    fn proxies_are_read_as_go_reads_them() {
        for (value, expected) in [
            ("127.0.0.1:8080", "http://127.0.0.1:8080"),
            ("cache.corp.example.com:1234", "http://cache.corp.example.com:1234"),
            ("cache.corp.example.com", "http://cache.corp.example.com"),
            ("localhost", "http://localhost"),
            ("localhost:3128", "http://localhost:3128"),
            ("user:pa%20ss@proxy:3128", "http://user:pa%20ss@proxy:3128"),
            ("https://cache.corp.example.com", "https://cache.corp.example.com"),
            ("HTTPS://127.0.0.1:8080/", "https://127.0.0.1:8080"),
            ("socks5://127.0.0.1", "socks5h://127.0.0.1:1080"),
            ("socks5h://user:pw@proxy:9050", "socks5h://user:pw@proxy:9050"),
            ("", "direct"),
        ] {
            for (variable, url) in [("HTTP_PROXY", "http://r.tld/"), ("https_proxy", "https://r.tld/v2/")] {
                assert_eq!(way(&[(variable, value)], url), expected, "{variable}={value}");
            }
        }
        let both = [("HTTP_PROXY", "http.proxy.tld"), ("HTTPS_PROXY", "secure.proxy.tld"), ("ALL_PROXY", "all.tld")];
        assert_eq!(way(&both, "http://insecure.tld/"), "http://http.proxy.tld");
        assert_eq!(way(&both, "https://secure.tld/"), "http://secure.proxy.tld");
        assert_eq!(way(&both[..1], "https://secure.tld/"), "direct");
        assert_eq!(way(&both[2..], "https://secure.tld/"), "direct", "Go knows no such variable");
        let cases = [("http_proxy", "small"), ("HTTP_PROXY", "capital")];
        assert_eq!(way(&cases, "http://r.tld/"), "http://capital");
        assert_eq!(way(&[("http_proxy", "small"), ("HTTP_PROXY", "")], "http://r.tld/"), "http://small");
    }

    #[test]
    fn proxies_that_cannot_be_used_are_refused_without_their_password() {
        for bad in ["foo://user:hush@host", "socks4://host", "ftp://host", "http://", "http://a b", "host:port:more"] {
            let error = proxies(&[("HTTPS_PROXY", bad)]).unwrap_err().to_string();
            assert!(
                error.starts_with("HTTPS_PROXY does not name a proxy") && !error.contains("hush"),
                "{bad}: {error}"
            );
        }
        let cgi = [("HTTP_PROXY", "http://10.1.2.3:8080"), ("REQUEST_METHOD", "GET")];
        assert_eq!(proxies(&cgi).unwrap_err(), ProxyError::Cgi);
        let secure = [("HTTPS_PROXY", "https://secure.proxy.tld"), ("REQUEST_METHOD", "GET")];
        assert_eq!(way(&secure, "https://secure.tld/"), "https://secure.proxy.tld");
        let shown = format!("{:?}", proxies(&[("HTTPS_PROXY", "http://user:hush@proxy")]).unwrap());
        assert!(shown.contains("proxy") && !shown.contains("hush"), "{shown}");
    }

    #[test]
    fn exceptions_are_those_of_the_published_table() {
        let list = "foobar.com, .barbaz.net, *.wildcard.io, 192.168.1.1, 192.168.1.2:81, 192.168.1.3:80, 10.0.0.0/30, \
            2001:db8::52:0:1, [2001:db8::52:0:2]:443, [2001:db8::52:0:3]:80, 2002:db8:a::45/64";
        for (host, is_proxied) in [
            ("localhost", false),
            ("127.0.0.1", false),
            ("127.0.0.2", false),
            ("[::1]", false),
            ("[::2]", true),
            ("192.168.1.1", false),
            ("192.168.1.2", true),
            ("192.168.1.3", false),
            ("192.168.1.4", true),
            ("10.0.0.2", false),
            ("10.0.0.4", true),
            ("[2001:db8::52:0:1]", false),
            ("[2001:db8::52:0:2]", true),
            ("[2001:db8::52:0:3]", false),
            ("[2002:db8:a::123]", false),
            ("[fe80::424b:c8be:1643:a1b6]", true),
            ("[::ffff:192.168.1.1]", false),
            ("barbaz.net", true),
            ("www.barbaz.net", false),
            ("foobar.com", false),
            ("FOOBAR.COM", false),
            ("www.foobar.com", false),
            ("foofoobar.com", true),
            ("baz.com", true),
            ("localhost.net", true),
            ("barbarbaz.net", true),
            ("wildcard.io", true),
            ("nested.wildcard.io", false),
            ("awildcard.io", true),
        ] {
            let variables = |list| [("HTTP_PROXY", "proxy"), ("NO_PROXY", list)];
            let url = format!("http://{host}:80/v2/");
            assert_eq!(way(&variables(list), &url) != "direct", is_proxied, "{host}");
            assert_eq!(way(&variables("a.tld,*"), &url), "direct", "{host}");
        }
        // Here `.localhost` is this machine, as RFC 6761 has it.
        assert_eq!(way(&[("HTTP_PROXY", "proxy")], "http://local.localhost/"), "direct");
    }

    #[test]
    fn exceptions_are_read_however_they_are_written() {
        for (list, url, is_proxied) in [
            ("example.com", "http://example.com/", false),
            ("  EXAMPLE.com ,", "http://example.com/", false),
            (".example.com", "http://example.com/", true),
            ("ample.com", "http://example.com/", true),
            ("example.com", "http://foo.example.com/", false),
            ("example.com:80", "http://example.com/", false),
            ("example.com:443", "http://example.com/", true),
            ("example.com:443", "https://example.com/", false),
            ("*.example.com:5000", "http://r.example.com:5000/", false),
            ("example.com:", "http://example.com:99/", false),
            ("example.com:port", "http://example.com/", true),
            (".示例.com", "http://www.示例.com", false),
            ("xn--fsq092h.com", "http://www.示例.com", false),
            ("示例.com", "http://www.xn--fsq092h.com", false),
            (":1", "http://example.com/", true),
            ("", "http://example.com/", true),
            (".", "http://example.com/", true),
            ("10.0.0.0/8", "http://10.9.8.7:5000/", false),
            ("10.0.0.0/33", "http://10.9.8.7:5000/", true),
            ("0.0.0.0/0", "http://192.0.2.1/", false),
            ("0.0.0.0/0", "http://example.com/", true),
            ("0.0.0.0/0", "http://[2001:db8::1]/", true),
            ("::/0", "http://[2001:db8::1]/", false),
            ("192.168.1.1", "http://host.192.168.1.1.example/", true),
            ("example.com 10.0.0.1", "http://example.com/", true),
        ] {
            let variables = [("HTTP_PROXY", "proxy"), ("HTTPS_PROXY", "proxy"), ("no_proxy", list)];
            assert_eq!(way(&variables, url) != "direct", is_proxied, "{list} {url}");
        }
    }
}
