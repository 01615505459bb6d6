//! What the coordinator remembers beyond a restart: jobs, and facts that save work.
//!
//! The facts (what a blob was found to be, where a chunk lies) are a cache of what the store says: losing them loses
//! time, never a layer. Profiles are learned again if they are lost. Jobs are promises to people: a job is on disk before
//! its request is answered.
//!
//! [`database`] keeps it. [`super::replicated`] stands before that and gives what other coordinators must know, too, to the store's ledger.

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

/// The coordinator's memory.
pub trait StateDb: Send + Sync {
    /// All jobs, oldest first. Jobs that cannot be read (written by a newer version) are left out with a warning.
    fn jobs(&self) -> Result<Vec<PullJob>, StateError>;

    /// Writes a job; when this returns it survives a power failure.
    fn put_job(&self, job: &PullJob) -> Result<(), StateError>;

    /// Writes several jobs, all or none where the database can; when this returns they survive a power failure.
    fn put_jobs(&self, jobs: &[PullJob]) -> Result<(), StateError> {
        jobs.iter().try_for_each(|job| self.put_job(job))
    }

    /// Forgets jobs.
    fn remove_jobs(&self, jobs: &[JobId]) -> Result<(), StateError>;

    /// What a blob was found to be when it was last unpacked.
    fn diff_id_of(&self, blob: &Digest) -> Result<Option<Digest>, StateError>;

    /// Remembers what a blob was found to be.
    fn record_blob(&self, blob: &Digest, diff_id: &Digest) -> Result<(), StateError>;

    /// What is known of the starts of a chain. A profile that cannot be read is left out with a warning.
    fn profile(&self, chain: &Digest) -> Result<Option<PrefetchProfile>, StateError>;

    /// The chains of which there are profiles.
    fn profiled_chains(&self) -> Result<Vec<Digest>, StateError>;

    /// Writes a profile.
    fn put_profile(&self, profile: &PrefetchProfile) -> Result<(), StateError>;

    /// Forgets a profile.
    fn remove_profile(&self, chain: &Digest) -> Result<(), StateError>;

    /// The records of a table, by key. Their bytes are the business of the module that the table belongs to.
    fn records(&self, table: Table) -> Result<Vec<Record>, StateError>;

    /// One record.
    fn record(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StateError>;

    /// Writes (`Some`) and removes (`None`) records, all or none. A [`Durability::Synced`] change survives a power failure
    /// once this returns; any change survives the end of the process.
    fn change_records(
        &self,
        table: Table,
        changes: &[(&[u8], Option<&[u8]>)],
        durability: Durability,
    ) -> Result<(), StateError>;

    /// Whether another coordinator could take over from the store what this one knows; why it could not. Nothing for a database
    /// that shares nothing. Blocks on the shared disk.
    fn check_handover(&self) -> Result<Option<String>, StateError> {
        Ok(None)
    }

    /// For a coordinator that stands by: takes over what the leader has written since the last time, and calls `changed` if that was
    /// anything, before anybody hears that there is nothing new. Blocks on the shared disk.
    fn follow_leader(&self, _changed: &dyn Fn() -> Result<(), StateError>) -> Result<(), StateError> {
        Ok(())
    }

    /// Writes what others can take over anew. Blocks on the shared disk.
    fn renew_handover(&self) -> Result<(), StateError> {
        Ok(())
    }

    /// Where chunks lie, for the unpacker.
    fn locations(&self) -> &dyn ChunkLocations;

    /// Forgets the pieces whose location is `gone`; tells how many. Reads all of them.
    fn forget_locations(&self, gone: &dyn Fn(&PieceLocation) -> bool) -> Result<u64, StateError>;

    /// Forgets all pieces.
    fn forget_all_locations(&self) -> Result<(), StateError>;
}

/// A key and its bytes.
pub type Record = (Vec<u8>, Vec<u8>);

/// Tables of records whose meaning belongs to one module each.
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
    /// [`crate::plan::scheduler`]: what was measured of each registry, by host.
    Speeds,
    /// [`crate::admin::gc`].
    Garbage,
    /// [`crate::identity::tokens`].
    Tokens,
    /// [`crate::identity::hosts`].
    Hosts,
    /// [`crate::state::replicated`]: how far the ledger is known.
    Ledger,
    /// [`crate::jobs::pull`]: which layer a blob from a registry was found to be; for layers that no image refers to yet.
    Verified,
    /// [`crate::jobs::pull`]: the same, for all layers, known to this coordinator alone.
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
        Table::Ledger,
        Table::Verified,
        Table::Shown,
    ];

    /// The tables that another coordinator needs to go on; jobs apart.
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
            Table::Ledger => "ledger",
            Table::Verified => "verified",
            Table::Shown => "shown",
        }
    }
}

/// Whether a change must survive a power failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// On disk before the call returns.
    Synced,
    /// Soon.
    Eventual,
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
    /// It cannot be opened.
    #[error("the database in {} cannot be opened: {why}; repair the disk, or move the directory away to start with an empty one (no layer is lost)", path.display())]
    Open {
        /// The state directory.
        path: PathBuf,
        /// What the database says.
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
    /// What coordinators share cannot be read.
    #[error("what the last leader left cannot be taken over: {why}")]
    Ledger {
        /// What the store says.
        why: String,
    },
    /// Only the leader changes what all coordinators share.
    #[error("nothing was changed: {why}")]
    NotLeading {
        /// Who leads, as far as is known.
        why: String,
    },
    /// It cannot be read or written any more.
    #[error("the database in {} fails: {why}; check the disk and its free space", path.display())]
    Access {
        /// The state directory.
        path: PathBuf,
        /// What the database says.
        why: String,
    },
}
