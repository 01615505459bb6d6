//! What is known of one snapshot.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use store::Digest;

use crate::filter::Fields;

/// Labels: any text under any name.
pub type Labels = BTreeMap<String, String>;

/// The label that names the chainID that a snapshot will have once its layer is unpacked.
pub const TARGET: &str = "containerd.io/snapshot.ref";
/// The label with the mapping of uids, for snapshots of containers in a user namespace.
pub const UID_MAPPING: &str = "containerd.io/snapshot/uidmapping";
/// The same for gids.
pub const GID_MAPPING: &str = "containerd.io/snapshot/gidmapping";

/// What may be done with a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Read only, and no parent of others.
    View,
    /// Written to.
    Active,
    /// Complete, and a parent for others.
    Committed,
}

impl Kind {
    /// Its name in filters.
    pub fn name(self) -> &'static str {
        match self {
            Kind::View => "view",
            Kind::Active => "active",
            Kind::Committed => "committed",
        }
    }
}

/// What a snapshot takes up on the local disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// In bytes, whole blocks.
    pub size: u64,
    /// Files and directories.
    pub inodes: u64,
}

/// One snapshot as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Names its directory; never used twice.
    pub id: u64,
    /// Its kind.
    pub kind: Kind,
    /// The name of its parent, if it has one.
    pub parent: Option<String>,
    /// When it was made or, if it is committed, committed.
    pub created: Timestamp,
    /// When its labels last changed.
    pub updated: Timestamp,
    /// Its labels.
    pub labels: Labels,
    /// What it took up when it was committed.
    pub usage: Usage,
    /// The chain whose tree in the shared store is this snapshot with all its parents. Without it, the snapshot lies on the
    /// local disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared: Option<Digest>,
}

/// A snapshot with its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its name; the key of one that is not committed.
    pub name: String,
    /// All else.
    pub record: Record,
}

impl Fields for Snapshot {
    fn field(&self, path: &[String]) -> Option<&str> {
        let (first, rest) = path.split_first()?;
        match first.as_str() {
            "name" => Some(&self.name),
            "parent" => Some(self.record.parent.as_deref().unwrap_or_default()),
            "kind" => Some(self.record.kind.name()),
            "labels" => self.record.labels.get(&rest.join(".")).map(String::as_str),
            _ => None,
        }
    }
}
