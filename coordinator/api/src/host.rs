//! Hosts, and the leases by which they hold the layers that they use.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The most layers of one renewal. A host that has looked at every layer of a large store holds them all, so this is
/// far above what containers need.
pub const LAYERS_MAX: usize = 100_000;
/// The most image names of one host. They are only for people, so more are of no use.
pub const NAMES_MAX: usize = 1000;

/// What a host reports when it renews its lease.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LeaseRequest {
    /// Tells hosts of the same name apart. It is made once, in the host's cache directory.
    pub id: String,
    /// The version of its daemon.
    pub version: String,
    /// Where it mounts the store.
    pub mountpoint: String,
    /// The images in use, by name; by chainID where the store has no name for them any more.
    pub images: Vec<String>,
    /// The diffIDs of the layers in use: they stay in the store as long as the lease lives.
    pub layers: Vec<String>,
    /// Bytes that its local cache takes.
    pub cache_used: u64,
    /// The most bytes that its local cache may take.
    pub cache_limit: u64,
    /// Reads that the local cache answered since the daemon started.
    pub reads_hit: u64,
    /// Reads that waited for the shared store.
    pub reads_missed: u64,
    /// Seconds since the daemon started.
    pub uptime_seconds: u64,
}

/// The answer to a renewal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LeaseGranted {
    /// How long the lease lives without another renewal.
    pub lease_seconds: u64,
}

/// The state of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum HostState {
    /// Its lease holds its layers.
    Live,
    /// It was silent for longer than a lease lives, and holds nothing.
    Expired,
    /// It said that it has unmounted, and holds nothing.
    Unmounted,
}

impl fmt::Display for HostState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            HostState::Live => "live",
            HostState::Expired => "expired",
            HostState::Unmounted => "unmounted",
        })
    }
}

/// One host: one daemon with its cache directory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    /// The name that it gives itself.
    pub name: String,
    /// What its lease holds, and its condition, as it last reported.
    #[serde(flatten)]
    pub report: LeaseRequest,
    /// How many layers its lease holds; `layers` names no more than the first thousand.
    #[serde(default)]
    pub layers_held: u64,
    /// The share of reads that its local cache answered, from 0 to 1; none before the first read.
    pub hit_ratio: Option<f64>,
    /// Whether its lease lives.
    pub state: HostState,
    /// Who renews the lease: a token's name, or `uid 0`.
    pub caller: String,
    /// When it was first heard of.
    #[schema(value_type = String, format = DateTime)]
    pub registered_at: Timestamp,
    /// When it was last heard of.
    #[schema(value_type = String, format = DateTime)]
    pub last_seen_at: Timestamp,
    /// When its lease ends, or ended.
    #[schema(value_type = String, format = DateTime)]
    pub expires_at: Timestamp,
}

/// The hosts, by name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HostList {
    /// How long a lease lives without being renewed.
    pub lease_seconds: u64,
    /// The hosts.
    pub hosts: Vec<Host>,
    /// Set if there are more: where the next page continues.
    #[serde(rename = "continue", default, skip_serializing_if = "Option::is_none")]
    pub next_page: Option<String>,
}
