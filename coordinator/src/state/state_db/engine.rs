//! What a key-value database must do to hold the coordinator's state; [`super::database`] builds on it.
//!
//! A database has families, each an ordered map of bytes to bytes. An [`Engine`] reads and changes one family at a time; all the changes of
//! one call are made, or none. After a crash of the process, every acknowledged change is there; after a power failure, those that were
//! [`Durability::Synced`].
//!
//! Engines are chosen when the program is built: [`super::rocks`] (the cargo feature `rocksdb`, the default) or `super::fjall` (`fjall`),
//! which needs no C++ compiler. Their files differ, so a state directory belongs to one of them.

use std::path::Path;

use crate::state::state_db::{Durability, StateError};

/// One change: a key and its new value; `None` removes the key.
pub(crate) type Change<'a> = (&'a [u8], Option<&'a [u8]>);

/// Receives a family's entries in key order; returns false to end the walk.
pub(crate) type Visitor<'a> = dyn FnMut(&[u8], &[u8]) -> bool + 'a;

/// An open database. Errors are the database's own messages.
pub(crate) trait Engine: Send + Sync {
    /// The value of a key.
    fn get(&self, family: &str, key: &[u8]) -> Result<Option<Vec<u8>>, String>;

    /// Passes all entries to `visit`. Concurrent changes may be seen or not.
    fn walk(&self, family: &str, visit: &mut Visitor<'_>) -> Result<(), String>;

    /// Makes changes, all or none.
    fn change(&self, family: &str, changes: &[Change<'_>], durability: Durability) -> Result<(), String>;

    /// Removes all entries. The removal survives a power failure.
    fn clear(&self, family: &str) -> Result<(), String>;
}

/// Opens or creates a database with these families in `directory`, a subdirectory of the state directory `state`.
pub(super) type Open =
    fn(state: &Path, directory: &Path, families: &[&'static str]) -> Result<Box<dyn Engine>, StateError>;

/// An engine's name, and its own subdirectory of a state directory. Neither ever changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Files {
    pub(super) engine: &'static str,
    pub(super) directory: &'static str,
}

/// The files of RocksDB.
pub(super) const ROCKSDB: Files = Files { engine: "RocksDB", directory: "journal" };
/// The files of fjall.
pub(super) const FJALL: Files = Files { engine: "fjall", directory: "journal.fjall" };
/// The files of all engines, whether or not this program was built with them.
pub(super) const ALL: [Files; 2] = [ROCKSDB, FJALL];

/// A kind of database, and how it is opened.
pub(super) struct Kind {
    /// Where it lies.
    pub(super) files: Files,
    /// Opens a database of this kind.
    pub(super) open: Open,
}
