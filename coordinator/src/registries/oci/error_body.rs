//! The registry's own explanation in an answer that refuses a request: often the only place that says why.
//!
//! It is untrusted text: read up to a limit of bytes and of time, cut, and escaped by the error that prints it.

use std::time::Duration;

use reqwest::Response;
use serde::Deserialize;
use store::go_json;

use crate::registries::error::RegistryError;
use crate::registries::oci::body::read_limited;

/// Maximum number of bytes of an answer that are read for it.
const MOST_BYTES: u64 = 64 << 10;
/// Maximum number of characters that are kept.
const MOST_LETTERS: usize = 300;
/// How long reading it may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The distribution protocol's errors, and the field that Docker's token service uses instead.
#[derive(Deserialize)]
struct Body {
    #[serde(default)]
    errors: Vec<ErrorEntry>,
    #[serde(default)]
    details: String,
}

#[derive(Deserialize)]
struct ErrorEntry {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// The explanation in an answer, if it says more than its error code.
pub(super) async fn words(registry: &str, what: &str, response: Response) -> Option<String> {
    let read = tokio::time::timeout(TIMEOUT, read_limited(registry, what, response, MOST_BYTES));
    words_in(&read.await.ok()?.ok()?)
}

/// `error` with the registry's explanation, if the answer has one.
pub(super) async fn explained(error: RegistryError, what: &str, registry: &str, response: Response) -> RegistryError {
    match words(registry, what, response).await {
        Some(said) => RegistryError::Explained { error: Box::new(error), said },
        None => error,
    }
}

fn words_in(body: &[u8]) -> Option<String> {
    let body: Body = go_json::from_slice(body).ok()?;
    let first = body.errors.into_iter().next().unwrap_or(ErrorEntry { code: String::new(), message: body.details });
    let message: String = first.message.trim().chars().take(MOST_LETTERS).collect();
    let is_code = message.replace(' ', "_").eq_ignore_ascii_case(&first.code);
    (!message.is_empty() && !is_code).then_some(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_message_is_taken_unless_it_only_repeats_its_code() {
        for (body, words) in [
            (
                r#"{"errors":[{"code":"DENIED","message":"quarantined: CVE-2024-1"},{"message":"b"}]}"#,
                Some("quarantined: CVE-2024-1"),
            ),
            (r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#, None),
            (r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"OCI index found"}]}"#, Some("OCI index found")),
            (r#"{"details":"incorrect username or password"}"#, Some("incorrect username or password")),
            (r#"{"errors":[{"code":"DENIED","message":" "}]}"#, None),
            (r#"{"errors":[]}"#, None),
            (r#"{"errors":null}"#, None),
            (r#"{"errors":[{"message":7}]}"#, None),
            ("<html>", None),
            ("", None),
        ] {
            assert_eq!(words_in(body.as_bytes()).as_deref(), words, "{body}");
        }
        let long = format!(r#"{{"errors":[{{"message":"{}"}}]}}"#, "ä".repeat(5000));
        assert_eq!(words_in(long.as_bytes()).unwrap().chars().count(), MOST_LETTERS);
    }
}
