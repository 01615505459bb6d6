//! Every path of version 1, spelled once for the server, the client and the OpenAPI description.
//!
//! Image names hold slashes and colons, so they travel as the query parameter `name`, never in the path.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, PercentEncode, utf8_percent_encode};

/// The OpenAPI description.
pub const OPENAPI: &str = "/openapi.json";
/// GET: which program answers.
pub const VERSION: &str = "/v1/version";
/// GET: the coordinator's condition.
pub const STATUS: &str = "/v1/status";
/// GET: the coordinator's condition as Prometheus reads it.
pub const METRICS: &str = "/metrics";
/// GET: the images.
pub const IMAGES: &str = "/v1/images";
/// GET: one image (`name`); DELETE: remove its name, with `force` even a pinned one.
pub const IMAGE: &str = "/v1/image";
/// GET: one image (`name`) as a docker-save tar.
pub const EXPORT: &str = "/v1/image/export";
/// GET: answers when the image (`name`) is published, or after `timeout_seconds`.
pub const WAIT: &str = "/v1/image/wait";
/// POST: bring images into the store.
pub const PULLS: &str = "/v1/pulls";
/// POST: an archive as the body.
pub const LOAD: &str = "/v1/load";
/// GET: the jobs.
pub const JOBS: &str = "/v1/jobs";
/// GET: one job.
pub const JOB: &str = "/v1/jobs/{id}";
/// POST: end a job.
pub const CANCEL: &str = "/v1/jobs/{id}/cancel";
/// POST: start an ended job again.
pub const RETRY: &str = "/v1/jobs/{id}/retry";
/// POST: an access trace of one start, encoded as the crate `store` does.
pub const TRACES: &str = "/v1/traces";
/// GET: what is known of the starts of an image (`name`), with the first `limit` files.
pub const PROFILE: &str = "/v1/profile";
/// GET: the schedules; POST: one more.
pub const SCHEDULES: &str = "/v1/schedules";
/// GET: one schedule; DELETE: remove it.
pub const SCHEDULE: &str = "/v1/schedules/{name}";
/// POST: pause a schedule.
pub const SCHEDULE_PAUSE: &str = "/v1/schedules/{name}/pause";
/// POST: resume a schedule.
pub const SCHEDULE_RESUME: &str = "/v1/schedules/{name}/resume";
/// POST: make a schedule's jobs now.
pub const SCHEDULE_RUN: &str = "/v1/schedules/{name}/run";
/// GET: deadlines and how they will be met.
pub const PLAN: &str = "/v1/plan";
/// GET: schedules, limits and the rest as one document; PUT: apply such a document.
pub const SETTINGS: &str = "/v1/settings";
/// GET: the condition of each registry.
pub const REGISTRIES: &str = "/v1/registries";
/// POST: an image that a host lacks.
pub const WANTED: &str = "/v1/wanted";
/// POST: a registry's notification (`docker-registry`, `harbor` or `docker-hub`), authenticated by the webhook secret.
pub const HOOK: &str = "/v1/hooks/{kind}";

/// GET: the check that runs or ran last; POST: start one.
pub const FSCK: &str = "/v1/fsck";
/// POST: interrupt the check that runs.
pub const FSCK_STOP: &str = "/v1/fsck/stop";
/// GET: the present and the last garbage collection; POST: begin one.
pub const GC: &str = "/v1/gc";
/// GET: what a collection would remove, with a grace of `grace_seconds` instead of the settings'.
pub const GC_PLAN: &str = "/v1/gc/plan";
/// GET: what is kept and for how long; PUT: change it.
pub const RETENTION: &str = "/v1/retention";
/// GET: the pins; POST: pin an image; DELETE: unpin one (`name`).
pub const PINS: &str = "/v1/pins";
/// GET: events after number `after`, waiting up to `wait_seconds` for one.
pub const EVENTS: &str = "/v1/events";
/// GET: the hosts.
pub const HOSTS: &str = "/v1/hosts";
/// POST: renew a host's lease; DELETE: give it up.
pub const LEASE: &str = "/v1/hosts/{name}/lease";
/// GET: the tokens; POST: make one.
pub const TOKENS: &str = "/v1/tokens";
/// DELETE: revoke a token.
pub const TOKEN: &str = "/v1/tokens/{name}";

/// All bytes but RFC 3986's unreserved characters.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// `value`, escaped for a part of a path or of a query.
fn escaped(value: &str) -> PercentEncode<'_> {
    utf8_percent_encode(value, RESERVED)
}

/// `route` with a name in it.
pub fn with_name(route: &str, name: &str) -> String {
    route.replace("{name}", &escaped(name).to_string())
}

/// GET: a redirect to [`MIRROR`].
pub const MIRROR_BARE: &str = "/v2";
/// GET: says that this is a registry (OCI distribution protocol, pull side).
pub const MIRROR: &str = "/v2/";
/// GET: the protocol's manifests, blobs, tags and catalogue.
pub const MIRROR_PATH: &str = "/v2/{*path}";
/// [`MIRROR_PATH`] in the OpenAPI description, which has no parameters that hold slashes.
pub const MIRROR_PATH_DESCRIBED: &str = "/v2/{path}";

/// `route` with the job's number in it.
pub fn with_id(route: &str, id: u64) -> String {
    route.replace("{id}", &id.to_string())
}

/// `route` with query parameters; absent values are left out.
pub fn with_query(route: &str, parameters: &[(&str, Option<&str>)]) -> String {
    let mut text = route.to_owned();
    let mut separator = '?';
    for (name, value) in parameters {
        let Some(value) = value else { continue };
        text.push(separator);
        text.push_str(name);
        text.push('=');
        text.extend(escaped(value));
        separator = '&';
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_escaped() {
        let text = with_query(IMAGE, &[("name", Some("a/b:1 é")), ("x", None), ("y", Some("2"))]);
        assert_eq!(text, "/v1/image?name=a%2Fb%3A1%20%C3%A9&y=2");
        assert_eq!(with_id(CANCEL, 7), "/v1/jobs/7/cancel");
        assert_eq!(with_name(TOKEN, "a/b c"), "/v1/tokens/a%2Fb%20c");
    }
}
