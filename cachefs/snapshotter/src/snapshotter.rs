//! The operations of a snapshotter: metadata, directories and trees together.
//!
//! Everything here may block on the local disk, and asking for a tree on the shared one: callers run it on threads that may
//! wait.
//!
//! What a crash leaves: a directory is on the disk before its record is written and removed after its record is, so that a record
//! always has its directory. Directories without a record are swept when the snapshotter starts and at every [`cleanup`].
//!
//! [`cleanup`]: Snapshotter::cleanup

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use store::Digest;

use crate::bounded::Bounded;
use crate::directories::{Directories, Owner};
use crate::error::{Error, Result};
use crate::filter::Filters;
use crate::metadata::{Lineage, Metadata, New};
use crate::mounts::{Mount, mounts};
use crate::record::{GID_MAPPING, Kind, Labels, Record, Snapshot, TARGET, UID_MAPPING, Usage};
use crate::trees::{Tree, Trees};

/// How long a tree may take to show its root.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A snapshotter on one root.
pub struct Snapshotter {
    metadata: Metadata,
    directories: Directories,
    trees: Box<dyn Trees>,
    /// Looks at trees, which may hang.
    bounded: Bounded,
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
        let path = root.join("metadata.redb");
        let last = directories.last()?.unwrap_or(0);
        let begun = fs::metadata(&path).is_ok_and(|meta| meta.len() > 0);
        if !begun && last > 0 {
            return Err(strange(root, "is missing"));
        }
        let metadata = Metadata::open(&path)?;
        // A transaction that came to nothing leaves at most the next one.
        if last > metadata.last_id()? + 1 {
            return Err(strange(root, "is older than they are"));
        }
        let overlay_options = overlay_options(Path::new("/sys/module/overlay/parameters"));
        let bounded = Bounded::default();
        let snapshotter = Snapshotter { metadata, directories, trees: Box::new(trees), bounded, overlay_options };
        snapshotter.cleanup()?;
        Ok(snapshotter)
    }

    /// Begins a snapshot that will be written to. Fails with [`Error::AlreadyExists`] if its labels name a chain that the
    /// store holds: then the committed snapshot of that chain is listed.
    pub fn prepare(&self, key: &str, parent: Option<&str>, labels: Labels) -> Result<Vec<Mount>> {
        if let Some((chain, target)) = target(&labels)
            && let Some(tree) = self.tree(&chain)
        {
            self.metadata.share(&chain, parent, labels, |record| self.directories.make_shared(record.id, &tree))?;
            return Err(Error::AlreadyExists(target));
        }
        self.create(New { kind: Kind::Active, key, parent, labels })
    }

    /// The tree of a chain, if this host has it. While the mount is away, engines fetch for themselves.
    fn tree(&self, chain: &Digest) -> Option<Tree> {
        self.trees.tree(chain).unwrap_or_else(|error| {
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
        let below = match new.parent {
            Some(parent) => {
                let lineage = self.metadata.lineage(parent)?;
                let tree = self.reach(parent, std::iter::once(&lineage.record).chain(&lineage.parents))?;
                Some((lineage.record, tree))
            }
            None => None,
        };
        let owner = match (mapped_root(&new.labels)?, below) {
            (None, Some((parent, tree))) => Some(self.owner(&parent, tree)?),
            (mapped, _) => mapped,
        };
        let made = self.metadata.create(new, |record| self.directories.make_local(record.id, owner))?;
        Ok(self.mounts_of(&made))
    }

    /// Makes sure that the tree below a snapshot with these parents, the nearest first, can be seen, and returns the attributes
    /// of its root; nothing without a shared parent. The store may be mounted elsewhere by now: then the link is set anew.
    fn reach<'r>(&self, name: &str, mut parents: impl Iterator<Item = &'r Record>) -> Result<Option<fs::Metadata>> {
        let Some((id, chain)) = parents.find_map(|record| Some((record.id, record.shared?))) else { return Ok(None) };
        let link = self.directories.files(id);
        if let Ok(root) = self.look_at(&link) {
            return Ok(Some(root));
        }
        let path = fs::read_link(&link).unwrap_or_else(|_| link.clone());
        match self.trees.tree(&chain) {
            // A daemon that has just come back learns by the question what is needed here.
            Ok(Some(tree)) => {
                if tree.path != path {
                    self.directories.relink(id, &tree)?;
                }
                self.look_at(&link).map(Some).map_err(|source| Error::Tree { path: tree.path, source })
            }
            Ok(None) => Err(Error::Gone { name: name.to_owned(), chain }),
            Err(source) => Err(Error::Tree { path, source }),
        }
    }

    /// The attributes of what a link leads to, if it answers in time.
    fn look_at(&self, link: &Path) -> io::Result<fs::Metadata> {
        let link = link.to_owned();
        self.bounded.ask(TIMEOUT, move || fs::metadata(link))
    }

    /// The owner of a snapshot's root directory; `tree` is the root of the nearest tree, which is the snapshot's own if it is
    /// shared.
    fn owner(&self, record: &Record, tree: Option<fs::Metadata>) -> Result<Owner> {
        let meta = match tree.filter(|_| record.shared.is_some()) {
            Some(root) => root,
            None => {
                let path = self.directories.files(record.id);
                fs::metadata(&path).map_err(Error::io("look at", &path))?
            }
        };
        Ok(Owner { uid: meta.uid(), gid: meta.gid() })
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
        self.reach(key, lineage.parents.iter())?;
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

/// The refusal to sweep away what may be containers' files.
fn strange(root: &Path, why: &str) -> Error {
    let root = root.display();
    Error::FailedPrecondition(format!(
        "{root} holds snapshots, but {root}/metadata.redb, which says whose they are, {why}: bring the right one back, or remove all \
         containers and images of this containerd and then {root}/snapshots"
    ))
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
