//! What is known of all snapshots, durably: the names, their parents, their labels.
//!
//! A change is one transaction of a redb database: after a kill or a power cut it has happened whole or not at all. The rules
//! are containerd's:
//!
//! - a parent is committed, and is not removed while it has children;
//! - a name stands for one snapshot, whatever its kind; committing gives a snapshot its final name and new labels;
//! - labels may change, nothing else; a label without a value is none;
//! - a chain of the shared store is one snapshot under each parent, however many ask for it.
//!
//! Writers wait for each other. A writer may hold the transaction while it makes a directory on the local disk, so that
//! directories and records are never out of step for another writer; it never waits for the shared store meanwhile.

use std::collections::HashSet;
use std::path::Path;

use jiff::Timestamp;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};
use store::Digest;

use crate::error::{Error, Result};
use crate::filter::Filters;
use crate::record::{Kind, Labels, Record, Snapshot, Usage};

/// Records by name, as JSON.
const SNAPSHOTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");
/// The ids of a parent and of a child.
const CHILDREN: TableDefinition<'_, (u64, u64), ()> = TableDefinition::new("children");
/// Names of shared snapshots by chainID and parent; the parent is empty if there is none.
const SHARED: TableDefinition<'_, (&str, &str), &str> = TableDefinition::new("shared");
/// Numbers that outlive everything.
const COUNTERS: TableDefinition<'_, &str, u64> = TableDefinition::new("counters");
/// The counter of ids: the last one given.
const LAST_ID: &str = "last-id";
/// The counter with the version of these tables.
const VERSION: &str = "version";
/// The version that this program reads and writes.
const CURRENT: u64 = 1;
/// The most bytes that a label's name and value have together: containerd's own limit.
const LABEL_MAX: usize = 4096;

/// The metadata of one root.
#[derive(Debug)]
pub struct Metadata {
    database: Database,
}

/// One reading or writing transaction's tables.
struct Tables<T> {
    snapshots: T,
}

/// What is to be made.
#[derive(Debug, Clone)]
pub struct New<'a> {
    /// Its kind; not committed.
    pub kind: Kind,
    /// Its key.
    pub key: &'a str,
    /// The name of its parent.
    pub parent: Option<&'a str>,
    /// Its labels.
    pub labels: Labels,
}

/// A snapshot with its parents, the nearest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lineage {
    /// The snapshot itself.
    pub record: Record,
    /// Its parents.
    pub parents: Vec<Record>,
}

impl<T: ReadableTable<&'static str, &'static [u8]>> Tables<T> {
    fn find(&self, name: &str) -> Result<Option<Record>> {
        self.snapshots.get(name)?.map(|bytes| decode(name, bytes.value())).transpose()
    }

    fn get(&self, name: &str) -> Result<Record> {
        self.find(name)?.ok_or_else(|| Error::NotFound(name.to_owned()))
    }

    /// The parents of a record, the nearest first.
    fn parents(&self, record: &Record) -> Result<Vec<Record>> {
        let mut parents = Vec::new();
        let mut next = record.parent.clone();
        while let Some(name) = next {
            let parent = self.get(&name)?;
            next = parent.parent.clone();
            parents.push(parent);
        }
        Ok(parents)
    }

    /// The parent called `name`, which must be committed.
    fn parent(&self, name: Option<&str>) -> Result<Option<Record>> {
        let Some(name) = name else { return Ok(None) };
        let parent = self.get(name)?;
        if parent.kind != Kind::Committed {
            return Err(Error::InvalidArgument(format!("snapshot {name} is not committed, so it cannot be a parent")));
        }
        Ok(Some(parent))
    }
}

impl Metadata {
    /// Opens the metadata in the file `path`, or begins it. A file that is there under its name is complete.
    pub fn open(path: &Path) -> Result<Metadata> {
        if !path.exists() {
            let new = path.with_extension("new");
            let _ = std::fs::remove_file(&new);
            drop(Self::prepare(&new)?);
            std::fs::rename(&new, path).map_err(Error::io("rename", &new))?;
        }
        Self::prepare(path)
    }

    fn prepare(path: &Path) -> Result<Metadata> {
        let database = Database::create(path).map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen => Error::InUse(path.parent().unwrap_or(path).to_owned()),
            error => error.into(),
        })?;
        let transaction = database.begin_write()?;
        {
            transaction.open_table(SNAPSHOTS)?;
            transaction.open_table(CHILDREN)?;
            transaction.open_table(SHARED)?;
            let mut counters = transaction.open_table(COUNTERS)?;
            let version = counters.get(VERSION)?.map(|version| version.value());
            match version {
                None => drop(counters.insert(VERSION, CURRENT)?),
                Some(CURRENT) => {}
                Some(other) => {
                    return Err(Error::FailedPrecondition(format!(
                        "{} is of version {other}, and this program knows version {CURRENT}: use a newer one",
                        path.display()
                    )));
                }
            }
        }
        transaction.commit()?;
        Ok(Metadata { database })
    }

    fn read<R>(
        &self,
        look: impl FnOnce(&Tables<redb::ReadOnlyTable<&'static str, &'static [u8]>>) -> Result<R>,
    ) -> Result<R> {
        let transaction = self.database.begin_read()?;
        look(&Tables { snapshots: transaction.open_table(SNAPSHOTS)? })
    }

    /// What is known of one snapshot.
    pub fn get(&self, name: &str) -> Result<Record> {
        self.read(|tables| tables.get(name))
    }

    /// A snapshot and its parents.
    pub fn lineage(&self, name: &str) -> Result<Lineage> {
        self.read(|tables| {
            let record = tables.get(name)?;
            Ok(Lineage { parents: tables.parents(&record)?, record })
        })
    }

    /// The snapshots that `filters` ask for.
    pub fn list(&self, filters: &Filters) -> Result<Vec<Snapshot>> {
        self.read(|tables| {
            let mut found = Vec::new();
            for entry in tables.snapshots.iter()? {
                let (name, bytes) = entry?;
                let record = decode(name.value(), bytes.value())?;
                let snapshot = Snapshot { name: name.value().to_owned(), record };
                if filters.matches(&snapshot) {
                    found.push(snapshot);
                }
            }
            Ok(found)
        })
    }

    /// Makes a snapshot. `place` makes its directory, before anybody can see the snapshot.
    pub fn create(&self, new: New<'_>, place: impl FnOnce(&Record) -> Result<()>) -> Result<Lineage> {
        check_labels(&new.labels)?;
        let transaction = self.database.begin_write()?;
        let lineage = {
            let mut tables = Tables { snapshots: transaction.open_table(SNAPSHOTS)? };
            let parent = tables.parent(new.parent)?;
            if tables.find(new.key)?.is_some() {
                return Err(Error::AlreadyExists(new.key.to_owned()));
            }
            let record = begin(&transaction, new.kind, new.parent, new.labels)?;
            link(&transaction, parent.as_ref(), &record)?;
            put(&mut tables, new.key, &record)?;
            place(&record)?;
            Lineage { parents: tables.parents(&record)?, record }
        };
        transaction.commit()?;
        Ok(lineage)
    }

    /// Makes sure that there is a committed snapshot of a chain of the shared store, under `parent`. `place` makes sure that it
    /// has its directory.
    pub fn share(
        &self,
        chain: &Digest,
        parent: Option<&str>,
        labels: Labels,
        place: impl FnOnce(&Record) -> Result<()>,
    ) -> Result<()> {
        check_labels(&labels)?;
        let transaction = self.database.begin_write()?;
        {
            let mut tables = Tables { snapshots: transaction.open_table(SNAPSHOTS)? };
            let above = tables.parent(parent)?;
            let (chain_name, parent_name) = (chain.to_string(), parent.unwrap_or_default());
            let mut shared = transaction.open_table(SHARED)?;
            if let Some(name) = shared.get((chain_name.as_str(), parent_name))? {
                return place(&tables.get(name.value())?);
            }
            let mut record = begin(&transaction, Kind::Committed, parent, labels)?;
            record.shared = Some(*chain);
            let name = format!("shared/{}/{chain_name}", record.id);
            link(&transaction, above.as_ref(), &record)?;
            put(&mut tables, &name, &record)?;
            shared.insert((chain_name.as_str(), parent_name), name.as_str())?;
            place(&record)?;
        }
        transaction.commit()?;
        Ok(())
    }

    /// Makes the active snapshot `key` the committed one `name`.
    pub fn commit(&self, name: &str, key: &str, labels: Labels, usage: Usage) -> Result<()> {
        check_labels(&labels)?;
        let transaction = self.database.begin_write()?;
        {
            let mut tables = Tables { snapshots: transaction.open_table(SNAPSHOTS)? };
            if tables.find(name)?.is_some() {
                return Err(Error::AlreadyExists(name.to_owned()));
            }
            let mut record = tables.get(key)?;
            if record.kind != Kind::Active {
                let kind = record.kind.name();
                return Err(Error::FailedPrecondition(format!(
                    "snapshot {key} is {kind}, and only an active one is committed"
                )));
            }
            let now = Timestamp::now();
            record = Record { kind: Kind::Committed, created: now, updated: now, labels, usage, ..record };
            put(&mut tables, name, &record)?;
            tables.snapshots.remove(key)?;
        }
        transaction.commit()?;
        Ok(())
    }

    /// Removes a snapshot that is nobody's parent. Returns what it was.
    pub fn remove(&self, name: &str) -> Result<Record> {
        let transaction = self.database.begin_write()?;
        let record = {
            let mut tables = Tables { snapshots: transaction.open_table(SNAPSHOTS)? };
            let record = tables.get(name)?;
            let mut children = transaction.open_table(CHILDREN)?;
            if children.range((record.id, 0)..=(record.id, u64::MAX))?.next().is_some() {
                return Err(Error::FailedPrecondition(format!(
                    "cannot remove snapshot {name}: it is the parent of others"
                )));
            }
            if let Some(parent) = &record.parent {
                children.remove((tables.get(parent)?.id, record.id))?;
            }
            if let Some(chain) = &record.shared {
                let parent = record.parent.as_deref().unwrap_or_default();
                transaction.open_table(SHARED)?.remove((chain.to_string().as_str(), parent))?;
            }
            tables.snapshots.remove(name)?;
            record
        };
        transaction.commit()?;
        Ok(record)
    }

    /// Changes labels: those in `paths` (`labels.<name>`, or `labels` for all), or all without paths. A label that `labels`
    /// lacks is removed.
    pub fn update(&self, name: &str, labels: &Labels, paths: &[String]) -> Result<Record> {
        let transaction = self.database.begin_write()?;
        let record = {
            let mut tables = Tables { snapshots: transaction.open_table(SNAPSHOTS)? };
            let mut record = tables.get(name)?;
            relabel(&mut record.labels, labels, paths).map_err(|path| {
                Error::InvalidArgument(format!("{path} of snapshot {name} cannot be changed: only labels can"))
            })?;
            check_labels(&record.labels)?;
            record.updated = Timestamp::now();
            put(&mut tables, name, &record)?;
            record
        };
        transaction.commit()?;
        Ok(record)
    }

    /// The last id that was given to a snapshot.
    pub fn last_id(&self) -> Result<u64> {
        let counters = self.database.begin_read()?.open_table(COUNTERS)?;
        Ok(counters.get(LAST_ID)?.map_or(0, |last| last.value()))
    }

    /// Gives `look` the ids of all snapshots, while none is made or removed.
    pub fn hold<R>(&self, look: impl FnOnce(&HashSet<u64>) -> R) -> Result<R> {
        let transaction = self.database.begin_write()?;
        let found = {
            let tables = Tables { snapshots: transaction.open_table(SNAPSHOTS)? };
            let mut ids = HashSet::new();
            for entry in tables.snapshots.iter()? {
                let (name, bytes) = entry?;
                ids.insert(decode(name.value(), bytes.value())?.id);
            }
            look(&ids)
        };
        transaction.abort()?;
        Ok(found)
    }
}

fn decode(name: &str, bytes: &[u8]) -> Result<Record> {
    serde_json::from_slice(bytes).map_err(|source| Error::Record { name: name.to_owned(), source })
}

/// A record with an id of its own.
fn begin(transaction: &redb::WriteTransaction, kind: Kind, parent: Option<&str>, labels: Labels) -> Result<Record> {
    let mut counters = transaction.open_table(COUNTERS)?;
    let id = counters.get(LAST_ID)?.map_or(0, |last| last.value()) + 1;
    counters.insert(LAST_ID, id)?;
    let now = Timestamp::now();
    let parent = parent.map(str::to_owned);
    Ok(Record { id, kind, parent, created: now, updated: now, labels, usage: Usage::default(), shared: None })
}

/// Notes that `parent` has the child `record`.
fn link(transaction: &redb::WriteTransaction, parent: Option<&Record>, record: &Record) -> Result<()> {
    if let Some(parent) = parent {
        transaction.open_table(CHILDREN)?.insert((parent.id, record.id), ())?;
    }
    Ok(())
}

fn put(tables: &mut Tables<redb::Table<'_, &'static str, &'static [u8]>>, name: &str, record: &Record) -> Result<()> {
    let labels = record.labels.iter().filter(|(_, value)| !value.is_empty());
    let labels = labels.map(|(label, value)| (label.clone(), value.clone())).collect();
    let bytes = serde_json::to_vec(&Record { labels, ..record.clone() })
        .map_err(|source| Error::Record { name: name.to_owned(), source })?;
    tables.snapshots.insert(name, bytes.as_slice())?;
    Ok(())
}

/// Changes `labels` as [`Metadata::update`] says. Fails with a path that is no label's.
fn relabel<'p>(labels: &mut Labels, wanted: &Labels, paths: &'p [String]) -> std::result::Result<(), &'p str> {
    if paths.is_empty() {
        labels.clone_from(wanted);
    }
    for path in paths {
        if path == "labels" {
            labels.clone_from(wanted);
            continue;
        }
        let label = path.strip_prefix("labels.").ok_or(path.as_str())?;
        match wanted.get(label) {
            Some(value) => drop(labels.insert(label.to_owned(), value.clone())),
            None => drop(labels.remove(label)),
        }
    }
    Ok(())
}

fn check_labels(labels: &Labels) -> Result<()> {
    match labels.iter().find(|(name, value)| name.len() + value.len() > LABEL_MAX) {
        Some((name, _)) => {
            let name: String = name.chars().take(40).collect();
            Err(Error::InvalidArgument(format!("label {name} and its value have more than {LABEL_MAX} bytes")))
        }
        None => Ok(()),
    }
}
