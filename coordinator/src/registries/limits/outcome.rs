//! How requests to registries end, and what holds them back.

use std::time::Duration;

use jiff::Timestamp;

/// How a request ended, as far as it matters to the limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// An answer about what was asked for.
    Answered,
    /// An answer that only shows that somebody is there: it rejects the credentials, says that requests come too often, or leads to where
    /// requests may not go.
    Refused,
    /// The registry did not answer; the reason in words.
    Unanswered(String),
    /// A fault, in words: of the registry if the request concerned the registry itself, otherwise of the repository or its storage.
    Failed(String),
    /// The registry asks for a pause (`Retry-After`).
    AskedToWait {
        /// How long a pause it asks for.
        wait: Duration,
        /// The fault in words (503); `None` for a rate limit (429).
        fault: Option<String>,
    },
}

/// What holds a request back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HoldReason {
    /// The registry's breaker, its rate limit, or the coordinator's own limit for it.
    Registry,
    /// The repository's breaker.
    Repository,
    /// A pause that the registry or the repository asked for (`Retry-After`).
    RetryAfter,
}

/// Why a request is held back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OnHold {
    /// What holds it back.
    pub by: HoldReason,
    /// Until when it is held back.
    pub until: Timestamp,
    /// The reason in words.
    pub why: String,
}
