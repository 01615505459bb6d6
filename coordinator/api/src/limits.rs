//! What pulls may use, and the condition of the registries.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::quantity::optional_size_text;

/// What pulls may use. What is absent is not limited, except the number of layers at a time, for which the
/// coordinator's configuration counts, and `demands_per_minute`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Layers that are fetched at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parallel_layers: Option<usize>,
    /// Bytes a second, e.g. `20M`.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "optional_size_text")]
    pub bandwidth: Option<String>,
    /// Pulls that one host may ask for per minute (30 if absent), four minutes' worth of them at once. All hosts of one
    /// token together may ask for ten times as many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub demands_per_minute: Option<u32>,
    /// Other bandwidths at times of day; the first window that contains the time counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub windows: Vec<Window>,
    /// Limits of single registries, by host; they hold in addition to the others.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub registries: BTreeMap<String, RegistryLimits>,
}

/// A time of day with a bandwidth of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// The first minute, `HH:MM`.
    pub from: String,
    /// The minute after the last one. If it is before `from`, the window ends on the next day.
    pub to: String,
    /// The zone of both [default: UTC].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
    /// Bytes a second; absent: not limited in this window.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "optional_size_text")]
    pub bandwidth: Option<String>,
}

/// What pulls from one registry may use.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RegistryLimits {
    /// Layers that are fetched at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parallel_layers: Option<usize>,
    /// Bytes a second, e.g. `20M`.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "optional_size_text")]
    pub bandwidth: Option<String>,
    /// Requests a minute, of any kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u32>,
}

/// Whether requests go out to a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum BreakerState {
    /// Requests go out.
    Closed,
    /// The registry failed too often: no requests until `waits_until`.
    Open,
    /// One request goes out, to see whether the registry works again.
    HalfOpen,
}

/// The condition of one registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RegistryCondition {
    /// The registry's host.
    pub registry: String,
    /// The circuit breaker.
    pub breaker: BreakerState,
    /// Failures in a row.
    pub failures: u32,
    /// No request goes out before this time: the breaker is open, or the registry asked for a pause.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub waits_until: Option<Timestamp>,
    /// Why requests wait.
    pub why: Option<String>,
    /// Requests that the registry still allows, where it says so.
    pub rate_limit_remaining: Option<u64>,
    /// Layers being fetched from it.
    pub fetching: usize,
    /// Measured speed, bytes a second.
    pub bytes_per_second: Option<u64>,
}
