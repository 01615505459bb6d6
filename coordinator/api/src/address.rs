//! Where a coordinator listens: `unix:PATH` or `http://HOST:PORT`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The port used when an `http://` address names none.
pub const DEFAULT_PORT: u16 = 7411;

/// The socket used when nobody says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/cachefs/coordinator.sock";

/// Where a coordinator listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A unix socket's path.
    Unix(PathBuf),
    /// `host:port`.
    Tcp(String),
}

/// A text that is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a coordinator's address: {why}; write unix:PATH or http://HOST:PORT")]
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
            return match path.is_empty() {
                true => Err(bad("the socket's path is empty")),
                false => Ok(Address::Unix(PathBuf::from(path))),
            };
        }
        let Some(rest) = text.strip_prefix("http://") else {
            return Err(bad("it has neither unix: nor http:// in front"));
        };
        let authority = rest.trim_end_matches('/');
        let parsed: http::uri::Authority = authority.parse().map_err(|_| bad("host and port cannot be read"))?;
        if authority.contains('@') || authority.contains('/') {
            return Err(bad("only host and port may follow http://"));
        }
        let port = authority.strip_prefix(parsed.host()).unwrap_or_default();
        match (port.is_empty(), parsed.port_u16()) {
            (true, _) => Ok(Address::Tcp(format!("{authority}:{DEFAULT_PORT}"))),
            (false, Some(_)) => Ok(Address::Tcp(authority.to_owned())),
            (false, None) => Err(bad("the port is not a number up to 65535")),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp(authority) => write!(f, "http://{authority}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_parse_and_print() {
        for (text, expected) in [
            ("unix:/run/a.sock", "unix:/run/a.sock"),
            ("unix:///run/a.sock", "unix:/run/a.sock"),
            ("http://localhost:80/", "http://localhost:80"),
            ("http://[::1]:80", "http://[::1]:80"),
            ("http://h", "http://h:7411"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), expected);
        }
        for bad in ["", "unix:", "/run/a", "https://h", "http://", "http://h:x", "http://h/p", "http://u@h"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }
}
