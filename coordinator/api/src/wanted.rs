//! Reports of hosts that lack an image, and answers to webhooks.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Names an image that something on a host looked for and did not find.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// The image, as `docker pull` takes it.
    pub image: String,
}

/// What the coordinator does about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WantedOutcome {
    /// It is published already.
    Published,
    /// Its job goes before others from now on.
    Raised,
    /// A job was made.
    Pulled,
    /// Nothing: there is no job, and images are not pulled on demand.
    Noted,
}

/// The coordinator's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WantedAnswer {
    /// What it does about it.
    pub outcome: WantedOutcome,
    /// The job, if there is one.
    pub job: Option<u64>,
    /// The name was not found a while ago: another report has no effect for this many seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub again_seconds: Option<u64>,
}

/// What a registry's notification led to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HookAnswer {
    /// Pushed tags that the payload told of.
    pub pushes: usize,
    /// The jobs that were made, or were under way already.
    pub jobs: Vec<u64>,
}
