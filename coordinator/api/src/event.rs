//! Events: what happened, for people and for programs that watch.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How much an event matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// For the record.
    Info,
    /// Somebody should look at it.
    Warning,
    /// Something that was promised did not happen.
    Error,
}

impl Severity {
    /// The word used in JSON, tables and messages.
    pub const fn word(self) -> &'static str {
        match self {
            Severity::Info => "info",
            Severity::Warning => "warning",
            Severity::Error => "error",
        }
    }
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Its number; later ones are higher.
    pub id: u64,
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    /// How much it matters.
    pub severity: Severity,
    /// What kind of thing: two words with a dot between them, the object first (`job.failed`, `schedule.at_risk`,
    /// `token.created`).
    pub kind: String,
    /// The object that it happened to: an image, a job's number, a host, a token's name.
    pub subject: String,
    /// Who caused it, if somebody did: a token's name, `uid 0`, a schedule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actor: Option<String>,
    /// One sentence for people.
    pub message: String,
}

/// Events, oldest first, and where the list goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EventList {
    /// The name of the log. Another log (that of a coordinator with another state directory) counts from 1 again, so a
    /// follower must begin at the beginning.
    pub log: String,
    /// The number of the last event that was examined: later ones are new.
    pub last: u64,
    /// The events that the caller may see.
    pub events: Vec<Event>,
}
