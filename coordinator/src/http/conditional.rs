//! Conditional requests and ranges, as in RFC 9110.

use http::header::{IF_NONE_MATCH, IF_RANGE, RANGE};
use http::{HeaderMap, StatusCode};
use store::Digest;

/// A range of bytes: its start and length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) start: u64,
    pub(super) len: u64,
}

/// The `ETag` of content with this digest, as registries write it.
pub(super) fn etag(digest: &Digest) -> String {
    format!("\"{digest}\"")
}

/// Whether `If-None-Match` says that the client already has this content.
pub(super) fn is_had(headers: &HeaderMap, digest: &Digest) -> bool {
    let own = etag(digest);
    let lists = headers.get_all(IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
    let mut tags = lists.flat_map(|list| list.split(',')).map(str::trim);
    tags.any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == own)
}

/// Parses a number that consists of digits only.
fn number(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// The part of `len` bytes that the `Range` header asks for, and the status to answer with. `None` if the range is not
/// satisfiable. A range that is not understood, or that is for other content (`If-Range`), yields the whole.
pub(super) fn part(headers: &HeaderMap, digest: &Digest, len: u64) -> Option<(StatusCode, Part)> {
    let whole = Some((StatusCode::OK, Part { start: 0, len }));
    let is_of_others = headers.get(IF_RANGE).is_some_and(|value| value.as_bytes() != etag(digest).as_bytes());
    let value = headers.get(RANGE).and_then(|value| value.to_str().ok()?.trim().strip_prefix("bytes="));
    let Some((first, last)) = value.and_then(|range| range.split_once('-')).filter(|_| !is_of_others && len > 0) else {
        return whole;
    };
    let (first, last) = (first.trim(), last.trim());
    let (start, end) = match (number(first), number(last)) {
        (Some(start), Some(end)) if start <= end => (start, end.saturating_add(1).min(len)),
        (Some(start), None) if last.is_empty() => (start, len),
        (None, Some(suffix)) if first.is_empty() => (len.saturating_sub(suffix), len),
        _ => return whole,
    };
    (start < end).then(|| (StatusCode::PARTIAL_CONTENT, Part { start, len: end - start }))
}

#[cfg(test)]
mod tests {
    use http::HeaderName;

    use super::*;

    fn headers(fields: &[(HeaderName, &str)]) -> HeaderMap {
        fields.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect()
    }

    #[test]
    fn ranges() {
        let digest = Digest::of(b"x");
        let ask = |fields: &[(HeaderName, &str)], len| {
            part(&headers(fields), &digest, len).map(|(status, part)| (status.as_u16(), part.start, part.len))
        };
        for (range, expected) in [
            ("bytes=0-", Some((206, 0, 10))),
            ("bytes=3-5", Some((206, 3, 3))),
            ("bytes=3-99", Some((206, 3, 7))),
            ("bytes=-4", Some((206, 6, 4))),
            ("bytes=-40", Some((206, 0, 10))),
            ("bytes=-0", None),
            ("bytes=10-", None),
            ("bytes=11-", None),
            ("bytes=11-12", None),
            ("bytes=5-3", Some((200, 0, 10))),
            ("bytes=0-1,3-4", Some((200, 0, 10))),
            ("bytes=+1-5", Some((200, 0, 10))),
            ("bytes=-", Some((200, 0, 10))),
            ("items=1-2", Some((200, 0, 10))),
            ("bytes=a-b", Some((200, 0, 10))),
        ] {
            assert_eq!(ask(&[(RANGE, range)], 10), expected, "{range}");
        }
        assert_eq!(ask(&[], 10), Some((200, 0, 10)));
        assert_eq!(ask(&[(RANGE, "bytes=0-")], 0), Some((200, 0, 0)), "as Go has it");
        assert_eq!(ask(&[(RANGE, "bytes=3-5"), (IF_RANGE, &etag(&digest))], 10), Some((206, 3, 3)));
        assert_eq!(ask(&[(RANGE, "bytes=3-5"), (IF_RANGE, "\"other\"")], 10), Some((200, 0, 10)));
    }

    #[test]
    fn what_a_client_has_is_read_from_its_tags() {
        let digest = Digest::of(b"x");
        let own = etag(&digest);
        for (list, expected) in [
            (own.clone(), true),
            (format!("W/{own}"), true),
            (format!("\"other\", {own}"), true),
            ("*".to_owned(), true),
            (digest.to_string(), false),
            ("\"other\"".to_owned(), false),
        ] {
            assert_eq!(is_had(&headers(&[(IF_NONE_MATCH, &list)]), &digest), expected, "{list}");
        }
        assert!(!is_had(&HeaderMap::new(), &digest));
    }
}
