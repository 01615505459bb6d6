//! Protects against requests that web pages make through an authorised person's browser.
//!
//! A browser sends requests to any address that a page names, with the rights of the machine that it runs on. It cannot hide
//! where the page came from: `Origin` says so, and `Sec-Fetch-Site` where there is no `Origin`. A page can also make its own name
//! resolve to the loopback (DNS rebinding), so that the browser takes the request for one of the same origin; then `Host` gives
//! it away.
//!
//! On plain HTTP on the loopback, where callers need no token, all three headers are checked on every request. Elsewhere a page
//! would have to know a token, but requests of other pages that would change something are refused all the same.

use std::net::IpAddr;

use coordinator_api::error::ErrorCode;
use http::header::{HOST, ORIGIN};
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderName, Uri};

use crate::http::error::ApiError;
use crate::identity::caller::Peer;

const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
/// The longest part of a header that messages quote.
const QUOTED_MAX: usize = 100;

/// Refuses a request that another site's web page makes.
pub fn check(peer: &Peer, request: &Parts) -> Result<(), ApiError> {
    let in_the_clear = matches!(peer, Peer::Loopback(_));
    let host = authority(request);
    if in_the_clear && !host.as_ref().is_some_and(is_loopback) {
        let named = host.map_or_else(|| "none".to_owned(), |host| quoted(host.as_str()));
        let message = format!(
            "this address answers by the names localhost, 127.0.0.1 and [::1] only, not by {named}: ask it by one of them"
        );
        return Err(ApiError::new(ErrorCode::Forbidden, message));
    }
    if !in_the_clear && request.method.is_safe() {
        return Ok(());
    }
    let scheme = if in_the_clear { "http" } else { "https" };
    if let Some(origin) = request.headers.get(ORIGIN) {
        let is_own = |origin: Uri| origin.scheme_str() == Some(scheme) && origin.authority() == host.as_ref();
        let own = origin.to_str().ok().and_then(|text| text.parse().ok()).is_some_and(is_own);
        if !own {
            return Err(foreign(&quoted(&String::from_utf8_lossy(origin.as_bytes()))));
        }
    }
    match request.headers.get(FETCH_SITE).map(|site| site.as_bytes()) {
        None | Some(b"same-origin" | b"none") => Ok(()),
        Some(_) => Err(foreign("another site")),
    }
}

fn foreign(origin: &str) -> ApiError {
    let message =
        format!("a web page of {origin} may not send requests here: use cachefsctl, or a page of this address");
    ApiError::new(ErrorCode::Forbidden, message)
}

/// The name by which a request addresses the coordinator; `None` unless there is exactly one.
fn authority(request: &Parts) -> Option<Authority> {
    let mut hosts = request.headers.get_all(HOST).iter();
    let named: Option<Authority> = hosts.next().and_then(|host| host.to_str().ok()?.parse().ok());
    match request.uri.authority() {
        _ if hosts.next().is_some() => None,
        // A request with an absolute target states the name twice.
        Some(target) => named.filter(|named| named == target),
        None => named,
    }
}

fn is_loopback(host: &Authority) -> bool {
    let name = host.host().trim_matches(['[', ']']);
    // `user@localhost` does not mean this host.
    !host.as_str().contains('@')
        && (name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(|address: IpAddr| address.is_loopback()))
}

/// A header's text, made fit for a message.
fn quoted(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(QUOTED_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOPBACK: &str = "127.0.0.1:7070";

    fn verdict(peer: &Peer, method: &str, headers: &[(&str, &str)]) -> bool {
        let mut request = http::Request::builder().method(method).uri("/v1/tokens");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        check(peer, &request.body(()).unwrap().into_parts().0).is_ok()
    }

    #[test]
    fn on_the_loopback_only_its_own_names_and_its_own_pages_are_answered() {
        let peer = Peer::Loopback(([127, 0, 0, 1], 1).into());
        for (headers, expected) in [
            (&[("host", LOOPBACK)][..], true),
            (&[("host", "localhost")], true),
            (&[("host", "LocalHost:7070")], true),
            (&[("host", "[::1]:7070")], true),
            (&[("host", "127.0.0.2:1")], true),
            (&[], false),
            (&[("host", "evil.example")], false),
            (&[("host", "evil.example:7070")], false),
            (&[("host", "localhost.evil.example")], false),
            (&[("host", "127.0.0.1.evil.example")], false),
            (&[("host", "127.0.0.1@evil.example")], false),
            (&[("host", "evil.example@127.0.0.1")], false),
            (&[("host", "10.0.0.1")], false),
            (&[("host", LOOPBACK), ("host", "evil.example")], false),
            (&[("host", LOOPBACK), ("origin", "http://127.0.0.1:7070")], true),
            (&[("host", LOOPBACK), ("origin", "http://127.0.0.1:8080")], false),
            (&[("host", LOOPBACK), ("origin", "https://127.0.0.1:7070")], false),
            (&[("host", LOOPBACK), ("origin", "http://evil.example")], false),
            (&[("host", LOOPBACK), ("origin", "null")], false),
            (&[("host", LOOPBACK), ("sec-fetch-site", "same-origin")], true),
            (&[("host", LOOPBACK), ("sec-fetch-site", "none")], true),
            (&[("host", LOOPBACK), ("sec-fetch-site", "cross-site")], false),
            (&[("host", LOOPBACK), ("sec-fetch-site", "same-site")], false),
        ] {
            for method in ["GET", "POST", "HEAD", "DELETE"] {
                assert_eq!(verdict(&peer, method, headers), expected, "{method} {headers:?}");
            }
        }
    }

    #[test]
    fn elsewhere_another_page_changes_nothing() {
        let peer = Peer::Remote(([10, 0, 0, 9], 1).into());
        for (method, headers, expected) in [
            ("POST", &[("host", "c.example")][..], true),
            ("POST", &[("host", "c.example"), ("origin", "https://c.example")], true),
            ("POST", &[("host", "c.example"), ("origin", "https://evil.example")], false),
            ("DELETE", &[("host", "c.example"), ("origin", "null")], false),
            ("PUT", &[("host", "c.example"), ("sec-fetch-site", "cross-site")], false),
            ("GET", &[("host", "c.example"), ("origin", "https://evil.example")], true),
        ] {
            assert_eq!(verdict(&peer, method, headers), expected, "{method} {headers:?}");
        }
    }
}
