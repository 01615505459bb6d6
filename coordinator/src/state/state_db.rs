//! What the coordinator remembers across restarts: jobs, and facts that save work.
//!
//! The facts (what a blob was found to be, where a piece lies) are a cache of what the store says: losing them costs time, never a layer.
//! Lost profiles are learned again. Jobs are promises to people: a job is on disk before its request is answered.
//!
//! [`database`] keeps it. [`super::replicated`] wraps that, and copies what other coordinators must know into the store's handover log.

pub mod database;
mod engine;
#[cfg(feature = "fjall")]
mod fjall;
#[cfg(test)]
pub(crate) mod memory;
#[cfg(feature = "rocksdb")]
mod rocks;

use std::path::PathBuf;

use store::Digest;
use store::chunk::PieceLocation;
use store::profile::PrefetchProfile;

use crate::state::job::{JobId, PullJob};
use crate::unpack::ChunkLocations;

pub use store::publisher::Durability;

/// The coordinator's database.
pub trait StateDb: Send + Sync {
    /// All jobs, oldest first. Jobs that cannot be read (because a newer version wrote them) are left out with a warning.
    fn jobs(&self) -> Result<Vec<PullJob>, StateError>;

    /// Writes a job. When this returns, the job survives a power failure.
    fn put_job(&self, job: &PullJob) -> Result<(), StateError>;

    /// Writes several jobs, all or none where the database can. When this returns, they survive a power failure.
    fn put_jobs(&self, jobs: &[PullJob]) -> Result<(), StateError> {
        jobs.iter().try_for_each(|job| self.put_job(job))
    }

    /// Forgets jobs.
    fn remove_jobs(&self, jobs: &[JobId]) -> Result<(), StateError>;

    /// The layer that a blob was found to be when it was last unpacked.
    fn diff_id_of(&self, blob: &Digest) -> Result<Option<Digest>, StateError>;

    /// Remembers which layer a blob was found to be.
    fn record_blob(&self, blob: &Digest, diff_id: &Digest) -> Result<(), StateError>;

    /// The profile of a chain: what is known of its starts. A profile that cannot be read is left out with a warning.
    fn profile(&self, chain: &Digest) -> Result<Option<PrefetchProfile>, StateError>;

    /// The chains that have a profile.
    fn profiled_chains(&self) -> Result<Vec<Digest>, StateError>;

    /// Writes a profile.
    fn put_profile(&self, profile: &PrefetchProfile) -> Result<(), StateError>;

    /// Forgets a profile.
    fn remove_profile(&self, chain: &Digest) -> Result<(), StateError>;

    /// The records of a table, by key. Only the module that the table belongs to interprets their bytes.
    fn records(&self, table: Table) -> Result<Vec<KeyValue>, StateError>;

    /// One record of a table.
    fn record(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StateError>;

    /// Writes (`Some`) and removes (`None`) records, all or none. A [`Durability::Synced`] change survives a power failure
    /// once this returns; any change survives the end of the process.
    fn change_records(
        &self,
        table: Table,
        changes: &[(&[u8], Option<&[u8]>)],
        durability: Durability,
    ) -> Result<(), StateError>;

    /// Why another coordinator could not take over, from the store, what this one knows. `None` if it could, or if the database shares
    /// nothing. Blocks on the shared disk.
    fn check_handover(&self) -> Result<Option<String>, StateError> {
        Ok(None)
    }

    /// For a standby: takes over what the leader has written since the last time, and calls `changed` if that was anything. A concurrent
    /// call returns only after `changed` has run. Blocks on the shared disk.
    fn follow_leader(&self, _changed: &dyn Fn() -> Result<(), StateError>) -> Result<(), StateError> {
        Ok(())
    }

    /// Rewrites what other coordinators can take over. Blocks on the shared disk.
    fn renew_handover(&self) -> Result<(), StateError> {
        Ok(())
    }

    /// Where pieces lie, for the unpacker.
    fn locations(&self) -> &dyn ChunkLocations;

    /// Forgets the pieces whose location is `gone`, and returns how many. Reads all of them.
    fn forget_locations(&self, gone: &dyn Fn(&PieceLocation) -> bool) -> Result<u64, StateError>;

    /// Forgets the locations of all pieces.
    fn forget_all_locations(&self) -> Result<(), StateError>;
}

/// A key and its bytes.
pub type KeyValue = (Vec<u8>, Vec<u8>);

/// Tables of records. Each belongs to one module, which alone interprets them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Table {
    /// [`crate::state::events`].
    Events,
    /// [`crate::admin::fsck`].
    Fsck,
    /// [`crate::plan::scheduler`]: by name.
    Schedules,
    /// [`crate::admin::settings`]: by subject.
    Settings,
    /// [`crate::plan::scheduler`]: the measured speed of each registry, by host.
    Speeds,
    /// [`crate::admin::gc`].
    Garbage,
    /// [`crate::identity::tokens`].
    Tokens,
    /// [`crate::identity::hosts`].
    Hosts,
    /// [`crate::state::replicated`]: how far the handover log is known.
    HandoverLog,
    /// [`crate::jobs::pull`]: which layer a blob from a registry was found to be, for layers that no image refers to yet.
    Verified,
    /// [`crate::jobs::pull`]: the same for all layers, known to this coordinator alone.
    Shown,
}

impl Table {
    /// All tables.
    pub const ALL: [Table; 11] = [
        Table::Events,
        Table::Fsck,
        Table::Schedules,
        Table::Settings,
        Table::Speeds,
        Table::Garbage,
        Table::Tokens,
        Table::Hosts,
        Table::HandoverLog,
        Table::Verified,
        Table::Shown,
    ];

    /// The tables that another coordinator needs to go on, besides the jobs.
    pub const SHARED: [Table; 5] = [Table::Schedules, Table::Settings, Table::Speeds, Table::Tokens, Table::Verified];

    /// The table's name in the database; it never changes.
    pub fn name(self) -> &'static str {
        match self {
            Table::Events => "events",
            Table::Fsck => "fsck",
            Table::Schedules => "schedules",
            Table::Settings => "settings",
            Table::Speeds => "speeds",
            Table::Garbage => "garbage",
            Table::Tokens => "tokens",
            Table::Hosts => "hosts",
            Table::HandoverLog => "ledger",
            Table::Verified => "verified",
            Table::Shown => "shown",
        }
    }
}

/// A failure of the database.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Another process has it open.
    #[error("state directory {} is in use by another coordinator: give each its own --state", path.display())]
    InUse {
        /// The state directory.
        path: PathBuf,
    },
    /// The database cannot be opened.
    #[error("the database in {} cannot be opened: {why}; repair the disk, or move the directory away to start with an empty one (no layer is lost)", path.display())]
    Open {
        /// The state directory.
        path: PathBuf,
        /// The database's message.
        why: String,
    },
    /// One record is not understood.
    #[error("{what} in the coordinator's database cannot be read: {why}; {remedy}")]
    Unreadable {
        /// What the record is.
        what: String,
        /// What is wrong with it.
        why: String,
        /// What to do.
        remedy: String,
    },
    /// The state that coordinators share cannot be read.
    #[error("what the last leader left cannot be taken over: {why}")]
    HandoverLog {
        /// The store's message.
        why: String,
    },
    /// Only the leader changes shared state.
    #[error("nothing was changed: {why}")]
    NotLeading {
        /// Who leads, as far as is known.
        why: String,
    },
    /// The database cannot be read or written any more.
    #[error("the database in {} fails: {why}; check the disk and its free space", path.display())]
    Access {
        /// The state directory.
        path: PathBuf,
        /// The database's message.
        why: String,
    },
}
