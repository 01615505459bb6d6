//! Where an answer sends us, and whether we go.
//!
//! A registry may send us on to storage. Nothing that proves who we are goes along, not even to another path of the same host:
//! signed storage refuses a request that shows two kinds of proof, and whoever can make a registry send us somewhere must not
//! learn our password. From HTTPS nothing leads to plain HTTP. How far a target may lie is for [`super::reach`].

use http::header::{AUTHORIZATION, LOCATION};
use http::{HeaderMap, StatusCode};
use reqwest::{Request, Url};

/// So many redirects in a row are followed.
pub(super) const MOST_REDIRECTS: usize = 10;

/// Whether an answer of this kind may send us elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redirects {
    /// Yes.
    Followed,
    /// No: the request itself holds a secret, or proves who we are to one place alone.
    Refused,
}

/// A redirect that is not followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refused {
    /// The host that it leads to, where there is one.
    pub(super) host: String,
    /// Why.
    pub(super) why: String,
}

/// The target of an answer to a request for `from`; nothing if it is no redirect.
pub(super) fn target(from: &Url, status: StatusCode, headers: &HeaderMap) -> Result<Option<Url>, Refused> {
    if !matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    let refused = |host: &str, why: &str| Refused { host: host.to_owned(), why: why.to_owned() };
    let Some(location) = headers.get(LOCATION) else { return Ok(None) };
    let location = std::str::from_utf8(location.as_bytes()).ok().and_then(|text| from.join(text).ok());
    let mut url = location.ok_or_else(|| refused("", "it names no place that can be read"))?;
    let host = url.host_str().unwrap_or_default().to_owned();
    match (from.scheme(), url.scheme()) {
        (_, "https") | ("http", "http") => {}
        ("https", "http") => return Err(refused(&host, "it leads from HTTPS to plain HTTP")),
        _ => return Err(refused(&host, "it leads to neither HTTPS nor HTTP")),
    }
    strip(&mut url);
    Ok(Some(url))
}

/// Takes away what a URL must not bring along: a user, a password, a fragment.
pub(super) fn strip(url: &mut Url) {
    // These fail only for URLs without a host, which have neither.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_fragment(None);
}

/// The same request for `target`, without any proof of who we are.
pub(super) fn next(request: &Request, target: Url) -> Request {
    let mut next = Request::new(request.method().clone(), target);
    next.headers_mut().clone_from(request.headers());
    next.headers_mut().remove(AUTHORIZATION);
    next
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
        found.map(|url| url.map(String::from)).map_err(|refused| refused.why)
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
    fn no_proof_goes_along() {
        let mut request = Request::new(http::Method::GET, "https://r.io/v2/".parse().unwrap());
        request.headers_mut().insert(AUTHORIZATION, "Basic x".parse().unwrap());
        request.headers_mut().insert(http::header::RANGE, "bytes=5-".parse().unwrap());
        let next = next(&request, "https://r.io/storage".parse().unwrap());
        assert!(next.headers().get(AUTHORIZATION).is_none());
        assert_eq!(next.headers()[http::header::RANGE], "bytes=5-");
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
