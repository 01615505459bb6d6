//! What is known of an image's starts, as the API shows it.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The answer to a trace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TraceAccepted {
    /// Starts of this image that were traced, this one included.
    pub starts: u64,
}

/// Where what is known of an image's starts comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProfileOrigin {
    /// Traces of its own starts.
    Traced,
    /// The profile of an image that it follows, until its own starts outweigh that.
    Inherited,
    /// A guess by what the image's command is, until its first start.
    Guessed,
}

/// One start of an image that had a startup pack, measured against that pack.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ProfileStart {
    /// When it began, by the host's clock.
    #[schema(value_type = String, format = DateTime)]
    pub started_at: Timestamp,
    /// Bytes that it read.
    pub read_bytes: u64,
    /// Bytes that were prefetched for it.
    pub prefetched_bytes: u64,
    /// Prefetched bytes that it read.
    pub used_bytes: u64,
    /// Bytes that it had to wait for.
    pub missed_bytes: u64,
    /// The share of prefetched bytes that it read; nothing if nothing was prefetched.
    pub precision: Option<f64>,
    /// The share of the bytes that it read which had been prefetched; nothing if it read nothing.
    pub recall: Option<f64>,
}

/// What starts of an image need, and the startup pack that holds it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Profile {
    /// The image's name in its familiar form.
    pub name: String,
    /// The image's top chainID: images of the same content share a profile.
    pub chain: String,
    /// Starts that were traced. A standby, or a coordinator that lost its database, knows only of those in the pack.
    pub starts: u64,
    /// Where what is known comes from; nothing if nothing is known.
    pub origin: Option<ProfileOrigin>,
    /// The image whose profile was inherited, or its chainID if no image has that content any more.
    pub inherited_from: Option<String>,
    /// The published startup pack's name in the store; none before the first trace, unless a profile was inherited or guessed.
    pub pack: Option<String>,
    /// When it was published.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub published_at: Option<Timestamp>,
    /// Pieces of files in the pack.
    pub pieces: u64,
    /// Bytes of file content in the pack.
    pub content_bytes: u64,
    /// Length of the pack.
    pub pack_bytes: u64,
    /// The share of prefetched bytes that starts read, over the last starts that had a pack.
    pub precision: Option<f64>,
    /// The share of the bytes read by starts that had been prefetched, over the same starts.
    pub recall: Option<f64>,
    /// The last starts that had a pack, the newest first.
    pub recent: Vec<ProfileStart>,
    /// Files of which the pack has pieces.
    pub files_total: u64,
    /// The first of them, in the order in which starts need them.
    pub files: Vec<ProfileFile>,
}

/// One file that starts read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ProfileFile {
    /// Its path below the root.
    pub path: String,
    /// Position of its layer, lowest first.
    pub layer: u16,
    /// Pieces of it in the pack.
    pub pieces: u64,
    /// Bytes of those pieces.
    pub bytes: u64,
    /// The share of starts that read it, from 0 to 1.
    pub weight: f64,
}
