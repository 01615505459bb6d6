//! Where a coordinator listens: `unix:PATH`, `https://HOST:PORT`, or `http://HOST:PORT` on this machine.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The port used when an address names none.
pub const DEFAULT_PORT: u16 = 7411;

/// The socket used by default.
pub const DEFAULT_SOCKET: &str = "/run/cachefs/coordinator.sock";

/// Where a coordinator listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A unix socket's path.
    Unix(PathBuf),
    /// `host:port`, in the clear.
    Tcp(String),
    /// `host:port`, over TLS.
    Tls(String),
}

/// A text that is not an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a coordinator's address: {why}; write unix:PATH, https://HOST:PORT or http://HOST:PORT")]
pub struct BadAddress {
    text: String,
    why: &'static str,
}

impl Default for Address {
    fn default() -> Address {
        Address::Unix(PathBuf::from(DEFAULT_SOCKET))
    }
}

impl FromStr for Address {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Address, BadAddress> {
        let bad = |why| BadAddress { text: text.to_owned(), why };
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.is_empty() {
                Err(bad("the socket's path is empty"))
            } else {
                Ok(Address::Unix(PathBuf::from(path)))
            };
        }
        let (rest, make): (_, fn(String) -> Address) = match text.split_once("://") {
            Some(("http", rest)) => (rest, Address::Tcp),
            Some(("https", rest)) => (rest, Address::Tls),
            _ => return Err(bad("it has neither unix: nor https:// in front")),
        };
        let authority = rest.trim_end_matches('/');
        let parsed: http::uri::Authority = authority.parse().map_err(|_| bad("host and port cannot be read"))?;
        if authority.contains('@') || authority.contains('/') {
            return Err(bad("only host and port may follow the two slashes"));
        }
        let port = authority.strip_prefix(parsed.host()).unwrap_or_default();
        match (port.is_empty(), parsed.port_u16()) {
            (true, _) => Ok(make(format!("{authority}:{DEFAULT_PORT}"))),
            (false, Some(_)) => Ok(make(authority.to_owned())),
            (false, None) => Err(bad("the port is not a number up to 65535")),
        }
    }
}

impl Address {
    /// Whether nobody can overhear what is sent there: over a socket, TLS, or this machine's loopback.
    pub fn is_private(&self) -> bool {
        match self {
            Address::Unix(_) | Address::Tls(_) => true,
            Address::Tcp(authority) => {
                let host = host_of(authority);
                host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
            }
        }
    }
}

/// The host of `host:port`, without the brackets of an IPv6 address.
pub(crate) fn host_of(authority: &str) -> &str {
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
    host.trim_start_matches('[').trim_end_matches(']')
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp(authority) => write!(f, "http://{authority}"),
            Address::Tls(authority) => write!(f, "https://{authority}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_forms_parse_and_print() {
        for (text, expected) in [
            ("unix:/run/a.sock", "unix:/run/a.sock"),
            ("unix:///run/a.sock", "unix:/run/a.sock"),
            ("http://localhost:80/", "http://localhost:80"),
            ("http://[::1]:80", "http://[::1]:80"),
            ("http://h", "http://h:7411"),
            ("https://h", "https://h:7411"),
            ("https://h:443/", "https://h:443"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), expected);
        }
        for bad in ["", "unix:", "/run/a", "ftp://h", "https://", "http://", "http://h:x", "http://h/p", "http://u@h"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_overheard_by_nobody_is_known() {
        for private in ["unix:/s", "https://far:1", "http://localhost:1", "http://127.0.0.1:1", "http://[::1]:1"] {
            assert!(private.parse::<Address>().unwrap().is_private(), "{private}");
        }
        for open in ["http://far:1", "http://10.0.0.1:1", "http://localhost.example:1"] {
            assert!(!open.parse::<Address>().unwrap().is_private(), "{open}");
        }
    }
}
