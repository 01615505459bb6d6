//! Pull jobs as the API shows them: the request, the job, the progress of its layers.
//!
//! `coordinator::state::job` shows the transitions between the states.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A request to bring images into the store.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PullRequest {
    /// Image references, as `docker pull` takes them.
    pub images: Vec<String>,
    /// `os/architecture[/variant]`; without it, the coordinator's own.
    #[serde(default)]
    pub platform: Option<String>,
    /// Higher goes first; 0 is ordinary.
    #[serde(default)]
    pub priority: i32,
}

/// The state of a pull job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// Waits for its turn.
    Queued,
    /// Asks the registry what the name means.
    Resolving,
    /// Fetches and unpacks layers.
    Fetching,
    /// Writes the image into the catalogue.
    Publishing,
    /// Done: hosts see the image.
    Published,
    /// Ended with a reason; nothing was published.
    Failed,
    /// Ended on request; nothing was published.
    Cancelled,
}

impl JobState {
    /// Whether the job has ended (only a retry moves it again).
    pub const fn is_final(self) -> bool {
        matches!(self, JobState::Published | JobState::Failed | JobState::Cancelled)
    }

    /// The word used in JSON, tables and messages.
    pub const fn word(self) -> &'static str {
        match self {
            JobState::Queued => "queued",
            JobState::Resolving => "resolving",
            JobState::Fetching => "fetching",
            JobState::Publishing => "publishing",
            JobState::Published => "published",
            JobState::Failed => "failed",
            JobState::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for JobState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

/// Where a job's bytes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobSource {
    /// The registry that the image's name points to.
    Registry,
    /// An archive that was sent with `load`.
    Archive,
}

/// One pull job: one image being brought into the store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Job {
    /// The job's number, unique within one coordinator's state directory.
    pub id: u64,
    /// The image, in its familiar form.
    pub image: String,
    /// The platform that was asked for.
    pub platform: Option<String>,
    /// Higher goes first.
    pub priority: i32,
    /// Who asked for it, if it was not a person: `schedule nightly`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
    /// Registry or archive.
    pub source: JobSource,
    /// The job's state.
    pub state: JobState,
    /// Why it failed; of a job that is under way, what is wrong with its registry at present. One sentence.
    pub reason: Option<String>,
    /// How often it was started: 1 for a job that ran through at once.
    pub attempts: u32,
    /// When it was asked for.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// When its state last changed.
    #[schema(value_type = String, format = DateTime)]
    pub updated_at: Timestamp,
    /// The manifest's digest, once resolved.
    pub manifest: Option<String>,
    /// The layers, lowest first; empty until resolved.
    pub layers: Vec<LayerProgress>,
    /// Compressed bytes received or found present.
    pub bytes_done: u64,
    /// Compressed bytes of all layers.
    pub bytes_total: u64,
    /// Compressed bytes that had to be fetched: `bytes_done` without what was present already.
    pub bytes_fetched: u64,
    /// Bytes of tar streams unpacked.
    pub unpacked_bytes: u64,
    /// Average speed of fetching since the job began to fetch.
    pub bytes_per_second: u64,
    /// Expected seconds until all layers are fetched, at that speed.
    pub eta_seconds: Option<u64>,
}

/// The state of one layer of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum LayerState {
    /// Waits for a slot among the parallel fetches.
    Waiting,
    /// Bytes are arriving.
    Fetching,
    /// All bytes are here; the rest is being unpacked and verified.
    Unpacking,
    /// In the store.
    Done,
    /// Was in the store before this job came to it.
    Present,
    /// Could not be fetched, verified or stored.
    Failed,
}

/// The progress of one layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LayerProgress {
    /// Digest of the layer as it is transferred (compressed).
    pub digest: String,
    /// Digest of the layer's tar.
    pub diff_id: String,
    /// The layer's state.
    pub state: LayerState,
    /// Compressed bytes received.
    pub bytes_done: u64,
    /// Compressed bytes in all.
    pub bytes_total: u64,
    /// Bytes of its tar stream unpacked.
    pub unpacked_bytes: u64,
}

/// The jobs, newest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct JobList {
    /// The jobs.
    pub jobs: Vec<Job>,
    /// Images that no job was made for, one sentence each: images of an archive that have no name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
    /// Set if there are more: where the next page continues.
    #[serde(rename = "continue", default, skip_serializing_if = "Option::is_none")]
    pub next_page: Option<String>,
}
