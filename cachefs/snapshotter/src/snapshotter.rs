//! The operations of a snapshotter: metadata, directories and trees together.
//!
//! Everything here may block on the local disk, and asking for a tree on the shared one: callers run it on threads that may
//! wait.
//!
//! What a crash leaves: a directory is made before its record is written and removed after its record is, so that a record
//! always has its directory. Directories without a record are swept when the snapshotter starts and at every [`cleanup`].
//!
//! [`cleanup`]: Snapshotter::cleanup

use std::path::Path;

use store::Digest;

use crate::directories::{Directories, Owner};
use crate::error::{Error, Result};
use crate::filter::Filters;
use crate::metadata::{Lineage, Metadata, New};
use crate::mounts::{Mount, mounts};
use crate::record::{GID_MAPPING, IMAGE, Kind, Labels, Record, Snapshot, TARGET, UID_MAPPING, Usage};
use crate::trees::{Tree, Trees};

/// A snapshotter on one root.
pub struct Snapshotter {
    metadata: Metadata,
    directories: Directories,
    trees: Box<dyn Trees>,
    overlay_options: Vec<String>,
}

impl Snapshotter {
    /// Opens the root, an existing directory, and sweeps what a crash has left. Only one process may have it open.
    pub fn open(root: &Path, trees: impl Trees) -> Result<Snapshotter> {
        // Its path becomes part of overlayfs' options, which have no way to quote these.
        if root.to_str().is_none_or(|root| root.contains([',', ':', '\\'])) {
            let path = root.display();
            return Err(Error::InvalidArgument(format!(
                "{path} cannot hold snapshots: choose a path without , : and \\"
            )));
        }
        let directories = Directories::open(root)?;
        let metadata = Metadata::open(&root.join("metadata.redb"))?;
        let overlay_options = overlay_options(Path::new("/sys/module/overlay/parameters"));
        let snapshotter = Snapshotter { metadata, directories, trees: Box::new(trees), overlay_options };
        snapshotter.cleanup()?;
        Ok(snapshotter)
    }

    /// Begins a snapshot that will be written to. Fails with [`Error::AlreadyExists`] if its labels name a chain that the
    /// store holds: then the committed snapshot of that chain is listed.
    pub fn prepare(&self, key: &str, parent: Option<&str>, labels: Labels) -> Result<Vec<Mount>> {
        if let Some((chain, target)) = target(&labels)
            && let Some(tree) = self.tree(&chain, labels.get(IMAGE))
        {
            self.metadata.share(&chain, parent, labels, |record| self.directories.make_shared(record.id, &tree))?;
            return Err(Error::AlreadyExists(target));
        }
        self.create(New { kind: Kind::Active, key, parent, labels })
    }

    /// The tree of a chain, if this host has it or can have it soon. While the mount is away, engines fetch for themselves.
    fn tree(&self, chain: &Digest, image: Option<&String>) -> Option<Tree> {
        let found = self.trees.tree(chain).and_then(|tree| match (tree, image) {
            (None, Some(image)) => self.trees.bring(chain, image),
            (tree, _) => Ok(tree),
        });
        found.unwrap_or_else(|error| {
            tracing::warn!(
                "{chain} is left to the engine, because the mount of the shared store does not answer: {error}"
            );
            None
        })
    }

    /// Begins a snapshot that shows its parent and cannot be written to.
    pub fn view(&self, key: &str, parent: Option<&str>, labels: Labels) -> Result<Vec<Mount>> {
        self.create(New { kind: Kind::View, key, parent, labels })
    }

    fn create(&self, new: New<'_>) -> Result<Vec<Mount>> {
        // A parent never changes, so it may be looked at before the transaction.
        let owner = match mapped_root(&new.labels)? {
            Some(owner) => Some(owner),
            None => new.parent.map(|parent| self.owner(parent)).transpose()?,
        };
        let made = self.metadata.create(new, |record| self.directories.make_local(record.id, owner));
        made.map(|lineage| self.mounts_of(&lineage))
    }

    /// The owner of a snapshot's root directory.
    fn owner(&self, name: &str) -> Result<Owner> {
        let record = self.metadata.get(name)?;
        let path = self.directories.files(record.id);
        self.directories.owner(record.id).map_err(|source| match record.shared {
            Some(_) => Error::Tree { path, source },
            None => Error::Io { action: "look at", path, source },
        })
    }

    fn mounts_of(&self, lineage: &Lineage) -> Vec<Mount> {
        mounts(&self.directories, lineage, &self.overlay_options)
    }

    /// What to mount for a snapshot that is not committed.
    pub fn mounts(&self, key: &str) -> Result<Vec<Mount>> {
        let lineage = self.metadata.lineage(key)?;
        if lineage.record.kind == Kind::Committed {
            return Err(Error::FailedPrecondition(format!(
                "snapshot {key} is committed: prepare or view one on top of it"
            )));
        }
        Ok(self.mounts_of(&lineage))
    }

    /// Makes the active snapshot `key` the committed one `name`.
    pub fn commit(&self, name: &str, key: &str, labels: Labels) -> Result<()> {
        let usage = self.directories.usage(self.metadata.get(key)?.id)?;
        self.metadata.commit(name, key, labels, usage)
    }

    /// Removes a snapshot that is nobody's parent. The store keeps what is shared.
    pub fn remove(&self, name: &str) -> Result<()> {
        let record = self.metadata.remove(name)?;
        // Its name is free now, so this is no failure of the removal.
        if let Err(error) = self.directories.remove(record.id) {
            tracing::warn!("snapshot {name} is removed, and its directory will be later: {error}");
        }
        Ok(())
    }

    /// What is known of one snapshot.
    pub fn stat(&self, name: &str) -> Result<Record> {
        self.metadata.get(name)
    }

    /// Changes labels.
    pub fn update(&self, name: &str, labels: &Labels, paths: &[String]) -> Result<Record> {
        self.metadata.update(name, labels, paths)
    }

    /// The snapshots that all of the request's filters together ask for.
    pub fn list(&self, filters: &[String]) -> Result<Vec<Snapshot>> {
        self.metadata.list(&Filters::parse(filters)?)
    }

    /// What a snapshot takes up on the local disk: nothing, if it is shared.
    pub fn usage(&self, name: &str) -> Result<Usage> {
        let record = self.metadata.get(name)?;
        match record.kind {
            Kind::Active => self.directories.usage(record.id),
            Kind::View | Kind::Committed => Ok(record.usage),
        }
    }

    /// Removes directories of snapshots that are gone.
    pub fn cleanup(&self) -> Result<()> {
        let swept = self.metadata.hold(|known| self.directories.sweep(known))??;
        if swept > 0 {
            tracing::info!("removed {swept} directories of snapshots that are gone");
        }
        Ok(())
    }
}

/// The chainID that a snapshot is to have, with its text.
fn target(labels: &Labels) -> Option<(Digest, String)> {
    let text = labels.get(TARGET)?;
    Some((text.parse().ok()?, text.clone()))
}

/// The ids that root of the container has on this host, if the labels map them.
fn mapped_root(labels: &Labels) -> Result<Option<Owner>> {
    let root = |label: &str| -> Result<Option<u32>> {
        let Some(mapping) = labels.get(label) else { return Ok(None) };
        let wrong =
            || Error::InvalidArgument(format!("label {label} is {mapping:?}, and should be CONTAINER:HOST:SIZE"));
        for range in mapping.split(',') {
            let numbers: Option<Vec<u32>> = range.split(':').map(|number| number.parse().ok()).collect();
            let Some([container, host, size]) = numbers.as_deref() else { return Err(wrong()) };
            if *container == 0 && *size > 0 {
                return Ok(Some(*host));
            }
        }
        Err(Error::InvalidArgument(format!("label {label} is {mapping:?}, which has no id for root")))
    };
    match (root(UID_MAPPING)?, root(GID_MAPPING)?) {
        (None, None) => Ok(None),
        (Some(uid), Some(gid)) => Ok(Some(Owner { uid, gid })),
        _ => Err(Error::InvalidArgument(format!("of the labels {UID_MAPPING} and {GID_MAPPING} only one is there"))),
    }
}

/// The options that containerd's own snapshotter gives to overlayfs on this kernel: no index of hard links, because lower
/// directories are shared by many overlays.
fn overlay_options(parameters: &Path) -> Vec<String> {
    if parameters.join("index").exists() { vec!["index=off".to_owned()] } else { Vec::new() }
}

#[cfg(test)]
mod tests;
