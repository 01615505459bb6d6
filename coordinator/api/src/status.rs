//! The coordinator's own condition.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::limits::RegistryCondition;

/// Which program answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// The program's name.
    pub name: String,
    /// The program's version.
    pub version: String,
    /// The API versions it speaks.
    pub api: Vec<String>,
}

/// Whether this coordinator writes the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// It holds the lease and writes.
    Leader,
    /// Another one holds the lease; this one answers questions and waits.
    Standby,
}

/// The number of jobs in each state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JobCounts {
    /// Waiting for their turn.
    pub queued: u64,
    /// Resolving, fetching or publishing.
    pub running: u64,
    /// Done.
    pub published: u64,
    /// Ended with a reason.
    pub failed: u64,
    /// Ended on request.
    pub cancelled: u64,
}

/// The coordinator's condition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// The program's version.
    pub version: String,
    /// Leader or standby.
    pub role: Role,
    /// The leader's own name, where it is known.
    pub leader: Option<String>,
    /// The leader's fencing epoch, where it is known.
    pub epoch: Option<u64>,
    /// When this process started.
    #[schema(value_type = String, format = DateTime)]
    pub started_at: Timestamp,
    /// Seconds since then.
    pub uptime_seconds: u64,
    /// The shared store's directory.
    pub store: String,
    /// The state directory.
    pub state: String,
    /// The catalogue's generation.
    pub generation: u64,
    /// Images in the catalogue.
    pub images: u64,
    /// Different layers of those images.
    pub layers: u64,
    /// Bytes of those layers' tar streams.
    pub layer_bytes: u64,
    /// Jobs by state.
    pub jobs: JobCounts,
    /// Compressed layer bytes fetched since this process started.
    pub bytes_fetched: u64,
    /// Deadlines of schedules that will be missed as things stand.
    #[serde(default)]
    pub deadlines_at_risk: u64,
    /// Registries to which no requests go out at present.
    #[serde(default)]
    pub registries_waiting: Vec<RegistryCondition>,
    /// What is kept but no longer understood, such as a schedule in a time zone that the machine does not know: one
    /// sentence each.
    #[serde(default)]
    pub troubles: Vec<String>,
}
