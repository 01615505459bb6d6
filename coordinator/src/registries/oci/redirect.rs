//! Redirects: where an answer leads, and whether that is followed.
//!
//! A registry may redirect to storage. Credentials do not go along: signed storage refuses a request with two kinds of proof, and whoever
//! can make a registry redirect must not learn the password. There are two exceptions, both for the server that has seen the credentials
//! already (the same scheme, host and port): its own API below `/v2/`, and a place on it that answers 401 without them
//! ([`super::transport`] handles that one). Docker sends them to every place on that host, and to other ports of it. Redirects from HTTPS
//! to plain HTTP are refused. [`super::egress`] decides which addresses a target may have.

use http::header::{AUTHORIZATION, LOCATION};
use http::{HeaderMap, Method, StatusCode, Uri};
use reqwest::{Request, Url};

use crate::registries::oci::location::{self, Location};

/// The path below which a registry's API lies.
pub(super) const API: &str = "/v2/";

/// Maximum number of redirects in a row that are followed.
pub(super) const MOST_REDIRECTS: usize = 10;

/// Which redirects of a request are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redirects {
    /// All that are allowed.
    Followed,
    /// Those to another place on the same server: the request itself holds a secret, or credentials for one server only.
    WithinOrigin,
}

/// A redirect that is not followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refused {
    /// The host that it leads to, where there is one.
    pub(super) host: String,
    /// Why it is not followed.
    pub(super) why: String,
}

/// The target of an answer to a request for `from`; `None` if it is no redirect.
pub(super) fn target(from: &Url, status: StatusCode, headers: &HeaderMap) -> Result<Option<Location>, Refused> {
    if !matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    let refused = |host: &str, why: &str| Refused { host: host.to_owned(), why: why.to_owned() };
    let Some(value) = headers.get(LOCATION) else { return Ok(None) };
    let location = location::read(from, value.as_bytes());
    let Location { mut url, exact } = location.ok_or_else(|| refused("", "it names no place that can be read"))?;
    let host = url.host_str().unwrap_or_default().to_owned();
    match (from.scheme(), url.scheme()) {
        (_, "https") | ("http", "http") => {}
        ("https", "http") => return Err(refused(&host, "it leads from HTTPS to plain HTTP")),
        _ => return Err(refused(&host, "it leads to neither HTTPS nor HTTP")),
    }
    strip(&mut url);
    Ok(Some(Location { url, exact }))
}

/// Removes what a URL must not contain: a user, a password, a fragment.
pub(super) fn strip(url: &mut Url) {
    // These calls only fail for URLs without a host, which have neither.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_fragment(None);
}

/// The request that follows a redirect.
#[derive(Debug)]
pub(super) struct Onward {
    /// The request.
    pub(super) request: Request,
    /// Its exact target, if its URL would encode it in other bytes.
    pub(super) exact: Option<Uri>,
}

/// The request that an answer to `request` leads to; `None` if the answer is no redirect, or not one that `redirects` allows.
pub(super) fn onward(
    request: &Request,
    status: StatusCode,
    headers: &HeaderMap,
    redirects: Redirects,
) -> Result<Option<Onward>, Refused> {
    let found = target(request.url(), status, headers);
    match redirects {
        Redirects::Followed => Ok(found?.map(|Location { url, exact }| Onward { request: next(request, url), exact })),
        Redirects::WithinOrigin => {
            let keeps_method = *request.method() == Method::GET || matches!(status.as_u16(), 307 | 308);
            let here = found.ok().flatten().filter(|target| keeps_method && is_same_origin(request.url(), &target.url));
            Ok(here.map(|Location { url, exact }| Onward { request: at(request, url), exact }))
        }
    }
}

/// The same request for `target`. Credentials are kept only for the API of the same server.
fn next(request: &Request, target: Url) -> Request {
    let may_see = is_same_origin(request.url(), &target) && target.path().starts_with(API);
    let mut next = at(request, target);
    if !may_see {
        next.headers_mut().remove(AUTHORIZATION);
    }
    next
}

/// The same request for `target`, with all its headers.
fn at(request: &Request, target: Url) -> Request {
    let mut same = copy(request);
    *same.url_mut() = target;
    same
}

/// Copies a request. All requests of this client have bodies that can be copied.
pub(super) fn copy(request: &Request) -> Request {
    request.try_clone().unwrap_or_else(|| {
        let mut bare = Request::new(request.method().clone(), request.url().clone());
        bare.headers_mut().clone_from(request.headers());
        bare
    })
}

/// Whether two URLs belong to one server: scheme, host and port.
pub(super) fn is_same_origin(one: &Url, other: &Url) -> bool {
    let origin = |url: &Url| (url.scheme().to_owned(), url.host_str().map(str::to_owned), url.port_or_known_default());
    origin(one) == origin(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(from: &str, location: &str) -> Result<Option<String>, String> {
        let headers = HeaderMap::from_iter([(LOCATION, location.parse().unwrap())]);
        let found = target(&from.parse().unwrap(), StatusCode::TEMPORARY_REDIRECT, &headers);
        found.map(|location| location.map(|location| location.url.into())).map_err(|refused| refused.why)
    }

    #[test]
    fn targets_are_read_and_downgrades_refused() {
        let (tls, plain) = ("https://r.io/v2/a/blobs/x", "http://r.io/v2/a/blobs/x");
        assert_eq!(to(tls, "/storage/x?s=1"), Ok(Some("https://r.io/storage/x?s=1".to_owned())));
        assert_eq!(to(tls, "//s3.io/x"), Ok(Some("https://s3.io/x".to_owned())));
        assert_eq!(to(plain, "https://s3.io/x"), Ok(Some("https://s3.io/x".to_owned())));
        assert_eq!(to(plain, "http://eve:pw@s3.io/x#part"), Ok(Some("http://s3.io/x".to_owned())));
        assert!(to(tls, "http://r.io/x").unwrap_err().contains("plain HTTP"));
        for odd in ["file:///etc/passwd", "ftp://r.io/x", "data:,x", "gopher://r.io/"] {
            assert!(to(tls, odd).unwrap_err().contains("neither"), "{odd}");
        }
        assert!(to(tls, "https://[").unwrap_err().contains("no place"));
        let none = target(&tls.parse().unwrap(), StatusCode::FOUND, &HeaderMap::new());
        assert_eq!(none, Ok(None), "no Location");
        assert_eq!(target(&tls.parse().unwrap(), StatusCode::OK, &HeaderMap::new()), Ok(None));
    }

    #[test]
    fn proof_goes_along_to_the_same_servers_api_alone() {
        let mut request = Request::new(Method::GET, "https://r.io/v2/a/blobs/x".parse().unwrap());
        request.headers_mut().insert(AUTHORIZATION, "Basic x".parse().unwrap());
        request.headers_mut().insert(http::header::RANGE, "bytes=5-".parse().unwrap());
        for (place, goes_along) in [
            ("https://r.io/v2/b/blobs/x", true),
            ("https://r.io:443/v2/b/blobs/x", true),
            ("https://r.io/storage/v2/x", false),
            ("https://r.io/v2", false),
            ("https://r.io:444/v2/a/blobs/x", false),
            ("https://s.io/v2/a/blobs/x", false),
            ("https://sub.r.io/v2/a/blobs/x", false),
        ] {
            let next = next(&request, place.parse().unwrap());
            assert_eq!(next.headers().contains_key(AUTHORIZATION), goes_along, "{place}");
            assert_eq!(next.headers()[http::header::RANGE], "bytes=5-");
        }
    }

    #[test]
    fn what_holds_a_secret_stays_with_its_server() {
        let led = |method: &Method, status: u16, location: &str| {
            let mut request = Request::new(method.clone(), "https://t.io/token?a=b".parse().unwrap());
            request.headers_mut().insert(AUTHORIZATION, "Basic x".parse().unwrap());
            let headers = HeaderMap::from_iter([(LOCATION, location.parse().unwrap())]);
            let status = StatusCode::from_u16(status).unwrap();
            let onward = onward(&request, status, &headers, Redirects::WithinOrigin).unwrap();
            let request = onward.map(|onward| onward.request);
            request.map(|request| (request.url().to_string(), request.headers().contains_key(AUTHORIZATION)))
        };
        let there = Some(("https://t.io/token/?a=b".to_owned(), true));
        for status in [301, 302, 303, 307, 308] {
            assert_eq!(led(&Method::GET, status, "/token/?a=b"), there, "{status}");
            assert_eq!(led(&Method::POST, status, "/token/?a=b").is_some(), status >= 307, "{status}");
            for elsewhere in ["https://s.io/token/", "https://t.io:444/token/", "http://t.io/token/", "//s.io/"] {
                assert_eq!(led(&Method::GET, status, elsewhere), None, "{status} {elsewhere}");
            }
        }
    }

    #[test]
    fn origins_are_scheme_host_and_port() {
        let same = |a: &str, b: &str| is_same_origin(&a.parse().unwrap(), &b.parse().unwrap());
        assert!(same("https://r.io/a", "https://r.io:443/b"));
        assert!(!same("https://r.io/a", "https://r.io:444/a"));
        assert!(!same("https://r.io/a", "http://r.io/a"));
        assert!(!same("https://r.io/a", "https://s.io/a"));
    }
}
