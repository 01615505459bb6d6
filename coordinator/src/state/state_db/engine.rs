//! What a key-value database has to do to hold the coordinator's state: [`super::database`] stands on it.
//!
//! A database has families, each an ordered map of bytes to bytes. An [`Engine`] reads and changes one family at a time: all the changes of
//! one call are made, or none. After a crash of the process all changes are there that were answered; after a power failure those that
//! were [`Durability::Synced`].
//!
//! Engines are chosen when the program is built: [`super::rocks`] (the cargo feature `rocksdb`, the default) or `super::fjall` (`fjall`),
//! which needs no C++ compiler. Their files differ, so a state directory belongs to one of them.

use std::path::Path;

use crate::state::state_db::{Durability, StateError};

/// One change: a key, and its new value; none removes it.
pub(crate) type Change<'a> = (&'a [u8], Option<&'a [u8]>);

/// Receives a family's entries in the order of their keys; false ends the walk.
pub(crate) type Visitor<'a> = dyn FnMut(&[u8], &[u8]) -> bool + 'a;

/// An open database. Errors are what the database says, in words.
pub(crate) trait Engine: Send + Sync {
    /// The value of a key.
    fn get(&self, family: &str, key: &[u8]) -> Result<Option<Vec<u8>>, String>;

    /// Shows all entries to `visit`. What is changed meanwhile may be shown or not.
    fn walk(&self, family: &str, visit: &mut Visitor<'_>) -> Result<(), String>;

    /// Makes changes, all or none.
    fn change(&self, family: &str, changes: &[Change<'_>], durability: Durability) -> Result<(), String>;

    /// Removes all entries; survives a power failure.
    fn clear(&self, family: &str) -> Result<(), String>;
}

/// Opens or creates a database with these families, in a directory of a state directory.
pub(super) type Open =
    fn(state: &Path, directory: &Path, families: &[&'static str]) -> Result<Box<dyn Engine>, StateError>;

/// What an engine is called, and the subdirectory of a state directory that is its own. Neither ever changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Files {
    pub(super) engine: &'static str,
    pub(super) directory: &'static str,
}

/// RocksDB's.
pub(super) const ROCKSDB: Files = Files { engine: "RocksDB", directory: "journal" };
/// fjall's.
pub(super) const FJALL: Files = Files { engine: "fjall", directory: "journal.fjall" };
/// Those of all engines, whether or not this program was built with them.
pub(super) const ALL: [Files; 2] = [ROCKSDB, FJALL];

/// How a database of one kind is opened.
pub(super) struct Kind {
    /// Where it lies.
    pub(super) files: Files,
    /// Opens it.
    pub(super) open: Open,
}
