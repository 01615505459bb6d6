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
        self.begin(id)?;
        let files = self.files(id);
        make(&files, FILES)?;
        make(&self.work(id), WORK)?;
        match owner {
            Some(Owner { uid, gid }) => chown(&files, Some(uid), Some(gid)).map_err(Error::io("chown", &files)),
            None => Ok(()),
        }
    }

    /// Makes the directory of a snapshot whose files are `tree`. The list of layers is on the disk before the link to the tree
    /// is there: the host's lease goes by it.
    pub fn make_shared(&self, id: u64, tree: &Tree) -> Result<()> {
        self.begin(id)?;
        let list = self.of(id).join("layers");
        let lines: String = tree.layers.iter().map(|layer| format!("{layer}\n")).collect();
        let written =
            File::create(&list).and_then(|mut file| file.write_all(lines.as_bytes()).and_then(|()| file.sync_all()));
        written.map_err(Error::io("write", &list))?;
        let link = self.files(id);
        symlink(&tree.path, &link).map_err(Error::io("link", &link))
    }

    /// Makes an empty directory for a new id. One that is there was left by a crash: ids are not given twice.
    fn begin(&self, id: u64) -> Result<()> {
        self.remove(id)?;
        make(&self.of(id), PRIVATE)
    }

    /// Removes a snapshot's directory, if it is there.
    pub fn remove(&self, id: u64) -> Result<()> {
        remove(&self.of(id))
    }

    /// Removes the directories of all ids but those in `known`. Returns how many there were.
    pub fn sweep(&self, known: &HashSet<u64>) -> Result<usize> {
        let snapshots = self.snapshots();
        let mut swept = 0;
        for entry in fs::read_dir(&snapshots).map_err(Error::io("list", &snapshots))? {
            let entry = entry.map_err(Error::io("list", &snapshots))?;
            let id = entry.file_name().to_str().and_then(|name| name.parse().ok());
            if id.is_none_or(|id| !known.contains(&id)) {
                remove(&entry.path())?;
                swept += 1;
            }
        }
        Ok(swept)
    }

    /// The owner of a snapshot's root directory.
    pub fn owner(&self, id: u64) -> io::Result<Owner> {
        let meta = fs::metadata(self.files(id))?;
        Ok(Owner { uid: meta.uid(), gid: meta.gid() })
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
