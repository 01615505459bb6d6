//! The settings that one document holds: what is wished, and what differs from it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::limits::Limits;
use crate::retention::RetentionPolicy;
use crate::schedule::ScheduleSpec;

/// Everything that `cachefsctl apply` brings about. A key that is absent leaves its subject as it is; a key that is
/// present is the whole truth about it: what it does not name is removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// All schedules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedules: Option<Vec<ScheduleSpec>>,
    /// What pulling may use up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// Names of images that are not to be collected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pins: Option<Vec<String>>,
    /// What is kept and for how long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<RetentionPolicy>,
    /// Whether an image that a host lacks is pulled without anybody's order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pull_on_demand: Option<bool>,
}

/// Asks for settings to be brought about.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SettingsRequest {
    /// The wish.
    pub settings: Settings,
    /// Only say what would change.
    #[serde(default)]
    pub dry_run: bool,
}

/// What kind of difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ChangeKind {
    /// It is new.
    Added,
    /// It becomes another.
    Changed,
    /// It goes away.
    Removed,
}

/// One difference between what is and what is wished.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Difference {
    /// Which kind.
    pub kind: ChangeKind,
    /// What it is about: `schedule nightly`, `limit bandwidth`.
    pub object: String,
    /// What was there.
    pub old: Option<String>,
    /// What will be there.
    pub new: Option<String>,
}

/// What was, or would be, changed; empty when all is as wished.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SettingsAnswer {
    /// Whether nothing was done.
    pub dry_run: bool,
    /// The differences.
    pub differences: Vec<Difference>,
    /// What is taken and has no effect, one sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}
