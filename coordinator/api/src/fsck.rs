//! Checks of the store: what to do, how far it is, what was found.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How thorough a check is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FsckDepth {
    /// Checks that everything that images refer to is there, and that every small file matches its digest.
    #[default]
    Fast,
    /// Also compares every byte of every pack with its digest, and every layer's tar with its diffID.
    Deep,
}

/// A request to check the store.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FsckRequest {
    /// How thorough the check is.
    #[serde(default)]
    pub depth: FsckDepth,
    /// Whether to move what is damaged into quarantine and fetch it again.
    #[serde(default)]
    pub repair: bool,
    /// Whether to learn again from the store what a lost database or catalogue knew.
    #[serde(default)]
    pub rebuild: bool,
    /// Whether to start over, even if an interrupted check could be resumed.
    #[serde(default)]
    pub restart: bool,
}

/// The state of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FsckState {
    /// Under way.
    Running,
    /// Done; `damaged` says how much damage is left.
    Finished,
    /// Stopped on request, or because the coordinator ended. A deep check goes on from here when it is started again.
    Interrupted,
    /// It could not go on, for `reason`.
    Failed,
}

/// What a check is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FsckPhase {
    /// The superblock and the generations of the catalogue; counts generations.
    Catalogue,
    /// What images refer to; counts images.
    Images,
    /// The index and recipe of each layer, and the lengths of its packs; counts layers.
    Layers,
    /// What nothing refers to; counts objects.
    Orphans,
    /// All bytes of each pack; counts bytes.
    Packs,
    /// The tar of each layer; counts bytes.
    Content,
    /// Restoring facts from the store to the database; counts layers.
    Rebuilding,
    /// Quarantine, and fetching again; counts objects.
    Repairing,
}

impl FsckPhase {
    /// Whether `done` and `total` are bytes.
    pub fn counts_bytes(self) -> bool {
        matches!(self, FsckPhase::Packs | FsckPhase::Content)
    }

    /// The name of the phase, for people.
    pub fn word(self) -> &'static str {
        match self {
            FsckPhase::Catalogue => "catalogue",
            FsckPhase::Images => "images",
            FsckPhase::Layers => "layers",
            FsckPhase::Orphans => "orphans",
            FsckPhase::Packs => "packs",
            FsckPhase::Content => "content",
            FsckPhase::Rebuilding => "rebuilding",
            FsckPhase::Repairing => "repairing",
        }
    }
}

/// What became of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FsckOutcome {
    /// The object is as it was found.
    Damaged,
    /// The object is whole again.
    Repaired,
    /// The object could not be repaired, for `reason`; it is as it was found.
    NotRepaired,
}

/// One thing that is damaged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FsckFinding {
    /// What it is: `layer`, `pack`, `blob`, `generation`, `superblock`, `startup_pack`, `catalogue`.
    pub kind: String,
    /// Its name: a digest or a number.
    pub object: String,
    /// What is wrong, in one sentence.
    pub message: String,
    /// The images that need it, the first few of them.
    pub images: Vec<String>,
    /// How many images need it.
    pub images_affected: u64,
    /// What became of it.
    pub outcome: FsckOutcome,
    /// Why it could not be repaired.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// How many objects were looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FsckCounts {
    /// Generations of the catalogue.
    pub generations: u64,
    /// Images.
    pub images: u64,
    /// Manifests and configs.
    pub blobs: u64,
    /// Layers.
    pub layers: u64,
    /// Packs.
    pub packs: u64,
    /// Bytes of packs and tars that were read and compared.
    pub bytes: u64,
}

/// Objects that nothing refers to. They are not damage; garbage collection removes them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FsckOrphans {
    /// Layers that no image has.
    pub layers: u64,
    /// Packs that no layer and no startup table refers to.
    pub packs: u64,
    /// Their bytes.
    pub pack_bytes: u64,
    /// Manifests and configs of no image.
    pub blobs: u64,
    /// Files that do not belong where they lie.
    #[serde(rename = "strangers")]
    pub unknown_files: u64,
}

/// What a rebuild learned again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FsckRebuilt {
    /// Pieces whose place is known again.
    pub pieces: u64,
    /// Layer blobs whose diffID is known again.
    pub blobs: u64,
    /// Images that are in the catalogue again, by the names that they have now.
    pub images: Vec<String>,
}

/// One check of the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Fsck {
    /// The request.
    pub request: FsckRequest,
    /// The state of the check.
    pub state: FsckState,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When it began; for a resumed check, when it first began.
    #[schema(value_type = String, format = DateTime)]
    pub started_at: Timestamp,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub ended_at: Option<Timestamp>,
    /// Whether it went on from where an earlier one was interrupted.
    pub resumed: bool,
    /// What it is doing, or was last.
    pub phase: FsckPhase,
    /// How far the phase is: objects, or bytes where the phase counts bytes.
    pub done: u64,
    /// How far the phase has to go.
    pub total: u64,
    /// What was looked at.
    pub checked: FsckCounts,
    /// What nothing refers to.
    pub orphans: FsckOrphans,
    /// What was learned again, if that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rebuilt: Option<FsckRebuilt>,
    /// The damage found, the first thousand findings.
    pub findings: Vec<FsckFinding>,
    /// How many findings are left out.
    pub findings_left_out: u64,
    /// How much damage is left.
    pub damaged: u64,
}
