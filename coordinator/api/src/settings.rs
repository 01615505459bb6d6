//! Settings as one document: those that are wanted, and how the present ones differ from them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::limits::Limits;
use crate::retention::RetentionPolicy;
use crate::schedule::ScheduleSpec;

/// Everything that `cachefsctl apply` sets. A key that is absent leaves its subject unchanged. A key that is present is
/// complete: anything that it does not list is removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// All schedules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedules: Option<Vec<ScheduleSpec>>,
    /// What pulls may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// Names of images to pin, so that they are not collected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pins: Option<Vec<String>>,
    /// What is kept and for how long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<RetentionPolicy>,
    /// Whether an image that a host lacks is pulled without an order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pull_on_demand: Option<bool>,
}

/// A request to apply settings.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SettingsRequest {
    /// The wanted settings.
    pub settings: Settings,
    /// Whether only to say what would change.
    #[serde(default)]
    pub dry_run: bool,
}

/// The kind of a difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ChangeKind {
    /// It is new.
    Added,
    /// Its value changes.
    Changed,
    /// It goes away.
    Removed,
}

/// One difference between the present and the wanted settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Difference {
    /// The kind.
    pub kind: ChangeKind,
    /// What differs: `schedule nightly`, `limit bandwidth`.
    pub object: String,
    /// What was there.
    pub old: Option<String>,
    /// What will be there.
    pub new: Option<String>,
}

/// What was changed, or would be; empty if nothing differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SettingsAnswer {
    /// Whether nothing was changed because only the differences were asked for.
    pub dry_run: bool,
    /// The differences.
    pub differences: Vec<Difference>,
    /// Settings that are accepted and have no effect, one sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}
