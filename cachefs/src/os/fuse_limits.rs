//! How long the kernel waits for a FUSE daemon.
//!
//! Since Linux 6.15 an administrator can set limits (`fs.fuse.default_request_timeout`, `fs.fuse.max_request_timeout`). When one request
//! takes longer, the kernel ends the whole connection, and with it everything that runs on the mount. So every read must be answered
//! before, with an error if need be.

use std::time::Duration;

/// Reads are answered this long before the kernel's limit, or at half of a limit that is too short for that.
const MARGIN: Duration = Duration::from_secs(2);

/// How long a read may wait that should wait for `wanted` at most, for FUSE connections that are made now.
pub fn read_timeout(wanted: Duration) -> Duration {
    let setting = |name: &str| {
        let text = std::fs::read_to_string(format!("/proc/sys/fs/fuse/{name}")).ok()?;
        text.trim().parse().ok().map(Duration::from_secs)
    };
    let limit = limit(setting("default_request_timeout"), setting("max_request_timeout"));
    let allowed = within(wanted, limit);
    if let Some(limit) = limit.filter(|_| allowed < wanted) {
        tracing::warn!(
            "reads wait {} s for the shared store instead of {}, because the kernel ends FUSE connections after a request of {} s: see \
             fs.fuse.max_request_timeout and fs.fuse.default_request_timeout in sysctl",
            allowed.as_secs_f64(),
            wanted.as_secs_f64(),
            limit.as_secs(),
        );
    }
    allowed
}

/// The limit of a connection that asks for none. A setting of zero means that there is none.
fn limit(default: Option<Duration>, max: Option<Duration>) -> Option<Duration> {
    let set = |setting: Option<Duration>| setting.filter(|setting| !setting.is_zero());
    match (set(default), set(max)) {
        (Some(default), Some(max)) => Some(default.min(max)),
        (default, max) => default.or(max),
    }
}

fn within(wanted: Duration, limit: Option<Duration>) -> Duration {
    let allowed = limit.map(|limit| limit.saturating_sub(MARGIN).max(limit / 2));
    allowed.map_or(wanted, |allowed| allowed.min(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_end_before_the_kernel_ends_the_connection() {
        let seconds = Duration::from_secs;
        let within_limits = |default, max| within(seconds(30), limit(Some(seconds(default)), Some(seconds(max))));
        assert_eq!((within_limits(0, 0), within(seconds(30), limit(None, None))), (seconds(30), seconds(30)));
        assert_eq!(
            (within_limits(0, 15), within_limits(15, 0), within_limits(60, 15)),
            (seconds(13), seconds(13), seconds(13))
        );
        assert_eq!((within_limits(20, 60), within_limits(60, 0)), (seconds(18), seconds(30)));
        assert_eq!(within_limits(0, 1), Duration::from_millis(500));
    }
}
