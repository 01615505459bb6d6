//! Parses `Location` headers as Go's `net/url` does: signed links are signed over their exact bytes, and those who made them tested them
//! with docker and skopeo.
//!
//! A path that consists of bytes that are valid in paths is kept as it is; in any other path, all bytes but letters, digits and
//! `-_.~$&+,/:;=@` are escaped, as in Go. A query is kept. Where [`Url`] would escape more of it than necessary (`'`, and bytes outside of
//! ASCII), the exact target is kept beside the URL. What no request line can hold (blanks, quotes, `<`, `>`) is escaped in any case.

use http::Uri;
use reqwest::Url;

/// The target of a redirect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Location {
    /// The target as a URL.
    pub(super) url: Url,
    /// The exact request target, if the URL would encode it in other bytes.
    pub(super) exact: Option<Uri>,
}

/// Parses the value of a `Location` in an answer from `from`; `None` if it is no URL.
pub(super) fn read(from: &Url, value: &[u8]) -> Option<Location> {
    if value.iter().any(u8::is_ascii_control) {
        return None;
    }
    let (whole, _fragment) = split(value, b'#');
    let (place, query) = split(whole, b'?');
    let (origin, path) = place.split_at(origin_len(place)?);
    let mut text = [origin, &escaped_path(path)?].concat();
    if let Some(query) = query {
        text.push(b'?');
        text.extend(escaped(query, |byte| byte.is_ascii()));
    }
    let url = from.join(std::str::from_utf8(&text).ok()?).ok()?;
    let exact = query.filter(|query| query.iter().any(|byte| *byte == b'\'' || !byte.is_ascii()));
    let exact = exact.and_then(|query| exactly(&url, query));
    Some(Location { url, exact })
}

/// Splits at the first byte `at`, which belongs to neither part; without one, there is no second part.
fn split(bytes: &[u8], at: u8) -> (&[u8], Option<&[u8]>) {
    match bytes.iter().position(|byte| *byte == at) {
        Some(at) => (&bytes[..at], Some(&bytes[at + 1..])),
        None => (bytes, None),
    }
}

/// The length of a URL's scheme and host; `None` if they cannot be told from the rest.
fn origin_len(place: &[u8]) -> Option<usize> {
    let is_scheme = |bytes: &[u8]| bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(byte));
    let scheme = place.iter().position(|byte| *byte == b':').filter(|at| is_scheme(&place[..*at]));
    let begin = scheme.map_or(0, |at| at + 1);
    if !place[begin..].starts_with(b"//") {
        // A scheme without a host is never followed, so there is no path to escape.
        return Some(if scheme.is_some() { place.len() } else { 0 });
    }
    let end = place[begin + 2..].iter().position(|byte| *byte == b'/').map_or(place.len(), |at| begin + 2 + at);
    (!place[..end].contains(&b'\\')).then_some(end)
}

/// Whether a byte is never escaped in a path.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-_.~$&+,/:;=@".contains(&byte)
}

/// A path as Go sends it; `None` if it contains an invalid escape.
fn escaped_path(path: &[u8]) -> Option<Vec<u8>> {
    let plain = unescaped(path)?;
    let is_valid = path.iter().all(|byte| is_plain(*byte) || b"!'()*[]%".contains(byte));
    Some(if is_valid { path.to_vec() } else { escaped(&plain, is_plain) })
}

/// A path with its escapes decoded; `None` if one is invalid.
fn unescaped(path: &[u8]) -> Option<Vec<u8>> {
    let mut plain = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((first, behind)) = rest.split_first() {
        (plain, rest) = if *first == b'%' {
            let digits = std::str::from_utf8(behind.get(..2)?).ok()?;
            let is_hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
            plain.push(is_hex.then(|| u8::from_str_radix(digits, 16).ok())??);
            (plain, &behind[2..])
        } else {
            plain.push(*first);
            (plain, behind)
        };
    }
    Some(plain)
}

/// Escapes all bytes except those that `is_kept` accepts.
fn escaped(bytes: &[u8], is_kept: impl Fn(u8) -> bool) -> Vec<u8> {
    let escape = |byte: &u8| if is_kept(*byte) { vec![*byte] } else { format!("%{byte:02X}").into_bytes() };
    bytes.iter().flat_map(escape).collect()
}

/// The target of a request for `url` with exactly this query, if such a request can be sent.
fn exactly(url: &Url, query: &[u8]) -> Option<Uri> {
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    let mut target = format!("{}://{}{port}{}?", url.scheme(), url.host_str()?, url.path()).into_bytes();
    target.extend(escaped(query, |byte| !b" \"<>".contains(&byte)));
    Uri::try_from(target).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The target in the line of the request that a `Location` leads to.
    fn line(value: &[u8]) -> Option<String> {
        let location = read(&"http://r.io/v2/app/blobs/x".parse().unwrap(), value)?;
        let target = location.exact.unwrap_or_else(|| location.url.as_str().parse().unwrap());
        Some(target.path_and_query().unwrap().to_string())
    }

    /// What docker 20.10 and skopeo 1.9 (Go 1.19) were seen to ask for.
    const AS_GO: &[(&str, Option<&str>)] = &[
        ("/s/a'b\"c?sig=a'b", Some("/s/a%27b%22c?sig=a'b")),
        ("/s/a|b^c[d]{e}`f\\g?x=a|b^c[d]{e}`f\\g", Some("/s/a%7Cb%5Ec%5Bd%5D%7Be%7D%60f%5Cg?x=a|b^c[d]{e}`f\\g")),
        ("/s/é?x=é", Some("/s/%C3%A9?x=é")),
        ("/s/%2f%2F%c3%A9%7e%41?x=%2f%2F%c3%A9%7e%41", Some("/s/%2f%2F%c3%A9%7e%41?x=%2f%2F%c3%A9%7e%41")),
        ("/s/a+b?x=a+b", Some("/s/a+b?x=a+b")),
        ("/s/x?", Some("/s/x?")),
        ("/s/x?#f", Some("/s/x?")),
        ("/s/a b?x", Some("/s/a%20b?x")),
        ("/s/<>?x", Some("/s/%3C%3E?x")),
        ("/s/100%?x=100%", None),
        ("/s/%zz?x=%zz", None),
        ("/s/x?x=100%", Some("/s/x?x=100%")),
        ("/s/x?x=%zz", Some("/s/x?x=%zz")),
        (
            "/s/a;b=c,d:e@f&g=h!i$j*k(l)~m?a;b=c,d:e@f&g=h!i$j*k(l)~m/n?o",
            Some("/s/a;b=c,d:e@f&g=h!i$j*k(l)~m?a;b=c,d:e@f&g=h!i$j*k(l)~m/n?o"),
        ),
        ("/s/./a/../b//c/.?x=/../y", Some("/s/b//c/?x=/../y")),
        ("/s/x\t?y", None),
        ("/s/x?y\tz", None),
        ("/s/\u{7f}?", None),
        ("?q=1", Some("/v2/app/blobs/x?q=1")),
        ("x/y?q=2", Some("/v2/app/blobs/x/y?q=2")),
        ("../z", Some("/v2/app/z")),
        ("/s/a#frag?x=1", Some("/s/a")),
        ("/s/x?a=b#c#d", Some("/s/x?a=b")),
        ("/s/\\..\\a", Some("/s/%5C..%5Ca")),
        ("/s/a%20b?x=%20", Some("/s/a%20b?x=%20")),
        ("/s/:a@b", Some("/s/:a@b")),
        ("/s/(x)!*'?x=(y)!*'", Some("/s/(x)!*'?x=(y)!*'")),
        ("/s/%25?x=%25", Some("/s/%25?x=%25")),
        ("/s/a%00b?x=%00", Some("/s/a%00b?x=%00")),
        ("/s/a%5Bb%5D?x=%5B", Some("/s/a%5Bb%5D?x=%5B")),
        ("/s/%27%22?x=%27%22", Some("/s/%27%22?x=%27%22")),
        ("/s/[%27?x", Some("/s/[%27?x")),
        ("/s/'%2f'?x", Some("/s/'%2f'?x")),
        ("/s/\"%2f\"?x", Some("/s/%22/%22?x")),
        ("http://s3.io", Some("/")),
        ("http://s3.io?x='1'", Some("/?x='1'")),
        ("http://s3.io/..", Some("/")),
        ("http://s3.io/'x'", Some("/'x'")),
    ];

    #[test]
    fn targets_are_asked_for_as_go_asks_for_them() {
        for (value, expected) in AS_GO {
            assert_eq!(line(value.as_bytes()).as_deref(), *expected, "{value:?}");
        }
    }

    #[test]
    fn what_is_asked_for_otherwise_than_by_go() {
        // Go sends what no request line can hold.
        assert_eq!(line(b"/x?a b\"<>'").as_deref(), Some("/x?a%20b%22%3C%3E'"));
        assert_eq!(line(b"/x?\xe9").as_deref(), Some("/x?%E9"), "no UTF-8");
        // Go keeps escaped dots; they mean the same.
        assert_eq!(line(b"/s/%2e%2e/a").as_deref(), Some("/a"));
    }

    #[test]
    fn exact_targets_keep_their_host_and_lose_who_is_named_there() {
        let from = "http://r.io/v2/".parse().unwrap();
        let location = read(&from, b"https://eve:pw@s3.io:444/x?y=''#z").unwrap();
        assert_eq!(location.exact.unwrap().to_string(), "https://s3.io:444/x?y=''");
        assert_eq!(read(&from, b"/x?y=%27").unwrap().exact, None);
        assert_eq!(read(&from, b"http://s3.io\\@r.io/"), None);
        assert_eq!(read(&from, b"/\\s3.io/x").unwrap().url.as_str(), "http://r.io/%5Cs3.io/x");
    }

    proptest! {
        #[test]
        fn any_value_is_survived(value: Vec<u8>, text in "[a-z:/?#%'\"\\\\@.\\[\\]é ]{0,30}") {
            let from = "https://r.io/v2/app/blobs/x".parse().unwrap();
            for value in [&value[..], text.as_bytes()] {
                if let Some(Location { url, exact: Some(exact) }) = read(&from, value) {
                    prop_assert_eq!(url.host_str(), exact.host());
                }
            }
        }
    }
}
