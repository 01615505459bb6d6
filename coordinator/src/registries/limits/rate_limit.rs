//! How many requests a registry still allows: the rate-limit headers in use.
//!
//! Docker Hub sends `ratelimit-limit: 100;w=21600` and `ratelimit-remaining: 76;w=21600` (a sliding window in seconds; only manifests
//! count). The IETF draft has `RateLimit-Limit`, `RateLimit-Remaining` and `RateLimit-Reset` (seconds). GitHub sends the same with `X-` and
//! a reset in seconds since 1970. A limit of 0 is ignored: rate limiters that are switched off, or have lost their database, send it.

use std::time::Duration;

use http::HeaderMap;
use jiff::Timestamp;

use crate::state::clock::{after, until};

/// How many requests a registry still allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateLimit {
    /// Requests left.
    pub remaining: u64,
    /// When more will be allowed: at the reset, or once a sliding window gives one request back.
    pub more_at: Timestamp,
}

/// The wait that is assumed if neither a window nor a reset is stated.
const UNKNOWN_WINDOW: Duration = Duration::from_secs(60);
/// Resets of this value or more are taken for seconds since 1970.
const EPOCH_FROM: u64 = 1_000_000_000;

fn value<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).or_else(|| headers.get(format!("x-{name}"))).and_then(|value| value.to_str().ok())
}

/// The number before the first `;`, and the window after `w=`.
fn parse(text: &str) -> Option<(u64, Option<u64>)> {
    let mut parts = text.split([';', ',']).map(str::trim);
    let number = parts.next()?.parse().ok()?;
    let window = parts.find_map(|part| part.strip_prefix("w=")).and_then(|window| window.parse().ok());
    Some((number, window))
}

/// Reads the rate-limit headers of an answer that arrived at `now`.
pub fn read(headers: &HeaderMap, now: Timestamp) -> Option<RateLimit> {
    let (remaining, window) = parse(value(headers, "ratelimit-remaining")?)?;
    let limit = value(headers, "ratelimit-limit").and_then(parse);
    if limit.is_some_and(|(limit, _)| limit == 0) {
        return None;
    }
    let reset = value(headers, "ratelimit-reset").and_then(parse).map(|(reset, _)| reset);
    let window = window.or(limit.and_then(|(_, window)| window));
    let wait = match (reset, window, limit) {
        (Some(epoch), _, _) if epoch >= EPOCH_FROM => {
            let at = i64::try_from(epoch).ok().and_then(|at| Timestamp::from_second(at).ok());
            at.map_or(UNKNOWN_WINDOW, |at| until(now, at))
        }
        (Some(seconds), _, _) => Duration::from_secs(seconds),
        (None, Some(window), Some((limit, _))) => Duration::from_secs(window.div_ceil(limit)),
        (None, Some(window), _) => Duration::from_secs(window),
        (None, None, _) => UNKNOWN_WINDOW,
    };
    Some(RateLimit { remaining, more_at: after(now, wait) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rate_limit(headers: &[(&'static str, &str)]) -> Option<(u64, u64)> {
        let now = Timestamp::from_second(1_700_000_000).unwrap();
        let headers = headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        read(&headers, now).map(|rate_limit| (rate_limit.remaining, until(now, rate_limit.more_at).as_secs()))
    }

    #[test]
    fn all_dialects_are_read() {
        let hub = [("ratelimit-limit", "100;w=21600"), ("ratelimit-remaining", "76;w=21600")];
        assert_eq!(rate_limit(&hub), Some((76, 216)));
        let ietf = [("RateLimit-Limit", "10"), ("RateLimit-Remaining", "0"), ("RateLimit-Reset", "30")];
        assert_eq!(rate_limit(&ietf), Some((0, 30)));
        let github = [("x-ratelimit-remaining", "5"), ("x-ratelimit-reset", "1700000090")];
        assert_eq!(rate_limit(&github), Some((5, 90)));
        assert_eq!(rate_limit(&[("ratelimit-remaining", "7")]), Some((7, 60)));
        assert_eq!(rate_limit(&[("ratelimit-limit", "100")]), None);
        assert_eq!(rate_limit(&[("ratelimit-remaining", "many")]), None);
        assert_eq!(rate_limit(&[("x-ratelimit-limit", "0"), ("x-ratelimit-remaining", "0")]), None, "switched off");
    }

    proptest! {
        #[test]
        fn any_header_is_survived(remaining in "[ -~]{0,20}", limit in "[0-9;w=]{0,24}", reset in "[0-9]{0,24}") {
            let headers =
                [("ratelimit-remaining", &*remaining), ("ratelimit-limit", &*limit), ("ratelimit-reset", &*reset)];
            let _ = rate_limit(&headers);
        }
    }
}
