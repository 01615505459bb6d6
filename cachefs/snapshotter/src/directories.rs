//! The snapshots' directories on the local disk.
//!
//! ```text
//! ROOT/
//!   metadata.redb          what is known of the snapshots (`metadata`)
//!   empty/                 nothing, for overlays that need one more lower directory
//!   snapshots/<id>/fs      a snapshot's own files; of a shared one, a link to its tree in the mount
//!   snapshots/<id>/work    overlayfs' own, of active snapshots
//!   snapshots/<id>/layers  of a shared one, the diffIDs of all layers of its tree, one a line
//! ```
//!
//! Modes do not depend on the umask: `fs` becomes the root of a container. A directory without a record is debris of a crash or
//! of a removal that failed, and is swept away.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::record::Usage;
use crate::trees::Tree;

/// Mode of the root and of what is nobody's but ours.
const PRIVATE: u32 = 0o700;
/// Mode of a new root directory of a container.
const FILES: u32 = 0o755;
/// Mode of overlayfs' work directory.
const WORK: u32 = 0o711;

/// A user and a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

/// The directories below one root.
#[derive(Debug)]
pub struct Directories {
    root: PathBuf,
}

impl Directories {
    /// Makes what is missing below `root`, which exists.
    pub fn open(root: &Path) -> Result<Directories> {
        let directories = Directories { root: root.to_owned() };
        for directory in [directories.snapshots(), directories.empty()] {
            make(&directory, PRIVATE)?;
        }
        Ok(directories)
    }

    /// An empty directory.
    pub fn empty(&self) -> PathBuf {
        self.root.join("empty")
    }

    fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    fn of(&self, id: u64) -> PathBuf {
        self.snapshots().join(id.to_string())
    }

    /// A snapshot's own files.
    pub fn files(&self, id: u64) -> PathBuf {
        self.of(id).join("fs")
    }

    /// overlayfs' work directory of an active snapshot.
    pub fn work(&self, id: u64) -> PathBuf {
        self.of(id).join("work")
    }

    /// Makes the directories of a snapshot that lies on the local disk.
    pub fn make_local(&self, id: u64, owner: Option<Owner>) -> Result<()> {
        self.make(id, |directory| {
            let files = directory.join("fs");
            make(&files, FILES)?;
            make(&directory.join("work"), WORK)?;
            match owner {
                Some(Owner { uid, gid }) => chown(&files, Some(uid), Some(gid)).map_err(Error::io("chown", &files)),
                None => Ok(()),
            }
        })
    }

    /// Makes the directory of a snapshot whose files are `tree`, unless it is there.
    pub fn make_shared(&self, id: u64, tree: &Tree) -> Result<()> {
        if fs::read_link(self.files(id)).is_ok_and(|target| target == tree.path) {
            return Ok(());
        }
        self.make(id, |directory| {
            let list = directory.join("layers");
            let lines: String = tree.layers.iter().map(|layer| format!("{layer}\n")).collect();
            let mut file = File::create(&list).map_err(Error::io("make", &list))?;
            file.write_all(lines.as_bytes()).and_then(|()| file.sync_all()).map_err(Error::io("write", &list))?;
            let link = directory.join("fs");
            symlink(&tree.path, &link).map_err(Error::io("link", &link))
        })
    }

    /// Makes a snapshot's directory with what `fill` puts into it: it has its name, and is on the disk, once it is complete. One
    /// that is there was left by a transaction that came to nothing.
    fn make(&self, id: u64, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let (new, directory) = (self.snapshots().join(format!("new-{id}")), self.of(id));
        remove(&new)?;
        remove(&directory)?;
        make(&new, PRIVATE)?;
        fill(&new)?;
        sync(&new)?;
        fs::rename(&new, &directory).map_err(Error::io("rename", &new))?;
        sync(&self.snapshots())
    }

    /// Removes a snapshot's directory, if it is there.
    pub fn remove(&self, id: u64) -> Result<()> {
        remove(&self.of(id))
    }

    /// Lets a shared snapshot's link lead to `tree`, in one step. Several may do so at once.
    pub fn relink(&self, id: u64, tree: &Tree) -> Result<()> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let new = self.of(id).join(format!("fs.new-{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
        let link = self.files(id);
        remove(&new)?;
        symlink(&tree.path, &new).and_then(|()| fs::rename(&new, &link)).map_err(Error::io("link", &link))
    }

    /// The highest id that has a directory.
    pub fn last(&self) -> Result<Option<u64>> {
        let snapshots = self.snapshots();
        let entries = fs::read_dir(&snapshots).map_err(Error::io("list", &snapshots))?;
        Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).max())
    }

    /// Removes the directories of all ids but those in `known`. Returns how many; those that cannot be removed are left for the
    /// next time.
    pub fn sweep(&self, known: &HashSet<u64>) -> Result<usize> {
        let snapshots = self.snapshots();
        let mut swept = 0;
        for entry in fs::read_dir(&snapshots).map_err(Error::io("list", &snapshots))? {
            let entry = entry.map_err(Error::io("list", &snapshots))?;
            let id = entry.file_name().to_str().and_then(|name| name.parse().ok());
            if id.is_some_and(|id| known.contains(&id)) {
                continue;
            }
            match remove(&entry.path()) {
                Ok(()) => swept += 1,
                Err(error) => tracing::warn!("a directory of a snapshot that is gone is left: {error}"),
            }
        }
        Ok(swept)
    }

    /// What a snapshot's files take up. Files that vanish meanwhile do not count.
    pub fn usage(&self, id: u64) -> Result<Usage> {
        let files = self.files(id);
        let mut usage = Usage::default();
        let mut seen = HashSet::new();
        let mut waiting = vec![files.clone()];
        while let Some(path) = waiting.pop() {
            let meta = match fs::symlink_metadata(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && path != files => continue,
                meta => meta.map_err(Error::io("look at", &path))?,
            };
            if meta.is_dir() {
                let entries = match fs::read_dir(&path) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    entries => entries.map_err(Error::io("list", &path))?,
                };
                waiting.extend(entries.flatten().map(|entry| entry.path()));
            } else if meta.nlink() > 1 && !seen.insert((meta.dev(), meta.ino())) {
                continue;
            }
            usage.size += meta.blocks() * 512;
            usage.inodes += 1;
        }
        Ok(usage)
    }
}

/// Makes a directory of exactly this mode; one that is there keeps its own.
fn make(path: &Path, mode: u32) -> Result<()> {
    match DirBuilder::new().mode(mode).create(path) {
        Ok(()) => fs::set_permissions(path, Permissions::from_mode(mode)).map_err(Error::io("chmod", path)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(Error::io("make", path)(error)),
    }
}

/// Brings a directory's entries to the disk.
fn sync(directory: &Path) -> Result<()> {
    File::open(directory).and_then(|file| file.sync_all()).map_err(Error::io("sync", directory))
}

/// Removes a directory and all in it, or a file. Links are not followed.
fn remove(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(Error::io("remove", path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debris_is_swept_and_links_are_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        fs::write(elsewhere.path().join("file"), "kept").unwrap();
        let directories = Directories::open(root.path()).unwrap();
        for id in [1, 2] {
            let layers = vec![store::Digest::of(b"1")];
            directories.make_shared(id, &Tree { path: elsewhere.path().to_owned(), layers }).unwrap();
        }
        directories.make_local(3, None).unwrap();
        fs::create_dir(root.path().join("snapshots/new-3x")).unwrap();
        fs::write(root.path().join("snapshots/file"), "").unwrap();
        assert_eq!(directories.sweep(&HashSet::from([2])).unwrap(), 4);
        directories.remove(2).unwrap();
        directories.remove(2).unwrap();
        assert_eq!(fs::read_dir(root.path().join("snapshots")).unwrap().count(), 0);
        assert!(elsewhere.path().join("file").exists());
    }

    #[test]
    fn usage_counts_each_inode_once() {
        let root = tempfile::tempdir().unwrap();
        let directories = Directories::open(root.path()).unwrap();
        directories.make_local(1, None).unwrap();
        let files = directories.files(1);
        let empty = directories.usage(1).unwrap();
        assert_eq!(empty.inodes, 1);
        fs::write(files.join("a"), vec![1; 100_000]).unwrap();
        fs::hard_link(files.join("a"), files.join("b")).unwrap();
        symlink("/nowhere", files.join("c")).unwrap();
        fs::create_dir(files.join("d")).unwrap();
        let usage = directories.usage(1).unwrap();
        assert_eq!(usage.inodes, 4);
        assert!(usage.size >= empty.size + 100_000 && usage.size < empty.size + 200_000, "{usage:?}");
        assert!(directories.usage(9).is_err());
    }
}
