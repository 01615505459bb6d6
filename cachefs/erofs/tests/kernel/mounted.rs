//! A mounted image, and its comparison with the tree that was written.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use erofs::{BLOCK, Inode, Node, write};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{Whence, lseek};
use tempfile::TempDir;

use crate::memory::{Kind, Memory, Xattrs, holes};

/// A mounted image. Unmounted when dropped.
pub(crate) struct Mounted {
    directory: TempDir,
}

impl Mounted {
    pub(crate) fn new(tree: &mut Memory) -> Mounted {
        let mounted = Mounted { directory: tempfile::Builder::new().prefix("erofs-").tempdir().unwrap() };
        let at = mounted.directory.path();
        let (devices, paths) = tree.finish(at);
        let image = at.join("image");
        let summary = write(tree, &devices, b"name", &File::create_new(&image).unwrap(), u64::MAX).unwrap();
        assert_eq!(summary.len, fs::metadata(&image).unwrap().len());
        let mut options = Vec::new();
        let mut check = Command::new("fsck.erofs");
        for path in &paths {
            options.push(format!("device={}", path.display()));
            check.arg(format!("--device={}", path.display()));
        }
        let checked = check.arg(&image).output().expect("erofs-utils is installed");
        assert!(checked.status.success(), "{checked:?}");
        fs::create_dir(mounted.root()).unwrap();
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some(&image), &mounted.root(), Some("erofs"), flags, Some(options.join(",").as_str())).unwrap();
        mounted
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.root(), MntFlags::MNT_DETACH);
    }
}

/// Checks a path and everything below against a node. `seen` are inode numbers of nodes.
pub(crate) fn compare(path: &Path, node: Node, tree: &Memory, seen: &mut BTreeMap<Node, u64>) {
    let (inode, kind, xattrs) = &tree.nodes[node as usize];
    let found = fs::symlink_metadata(path).unwrap();
    let shown = |inode: &Inode| (inode.mode, inode.uid, inode.gid, inode.nlink, inode.mtime, inode.mtime_nsec);
    let real = Inode {
        mode: found.mode(),
        uid: found.uid(),
        gid: found.gid(),
        nlink: found.nlink() as u32,
        mtime: found.mtime(),
        mtime_nsec: found.mtime_nsec() as u32,
        ..*inode
    };
    assert_eq!(shown(&real), shown(inode), "{}", path.display());
    assert_eq!(*seen.entry(node).or_insert(found.ino()), found.ino(), "{} is one inode", path.display());
    assert!(found.ino() < 1 << 32);
    assert_eq!(listed_xattrs(path), xattrs.clone(), "{}", path.display());
    match kind {
        Kind::Directory(entries) => {
            let names: Vec<Vec<u8>> =
                fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_vec()).collect();
            assert_eq!(names, entries.keys().cloned().collect::<Vec<_>>(), "{}", path.display());
            for (name, child) in entries {
                compare(&path.join(OsStr::from_bytes(name)), *child, tree, seen);
            }
            assert!(fs::symlink_metadata(path.join("there is no such name")).is_err());
        }
        Kind::File(content) => {
            assert_eq!(&fs::read(path).unwrap(), content, "{}", path.display());
            assert_eq!(shown_holes(path), holes(content), "{}", path.display());
        }
        Kind::Link(target) => assert_eq!(fs::read_link(path).unwrap().as_os_str().as_bytes(), target),
        Kind::Special(0o020_000 | 0o060_000, (major, minor)) => {
            assert_eq!(
                (nix::sys::stat::major(found.rdev()), nix::sys::stat::minor(found.rdev())),
                ((*major).into(), (*minor).into())
            );
        }
        Kind::Special(..) => assert!(found.file_type().is_fifo()),
    }
}

/// The holes that `lseek` finds in a file, in blocks.
fn shown_holes(path: &Path) -> Vec<Range<u64>> {
    let file = File::open(path).unwrap();
    let (size, mut at, mut shown) = (file.metadata().unwrap().len() as i64, 0, Vec::new());
    while at < size {
        let hole = lseek(&file, at, Whence::SeekHole).unwrap();
        // The end counts as a hole.
        if hole < size {
            at = lseek(&file, hole, Whence::SeekData).unwrap_or(size);
            shown.push(hole as u64 / BLOCK..(at as u64).div_ceil(BLOCK));
        } else {
            at = size;
        }
    }
    shown
}

/// The extended attributes of a path, without following a link.
fn listed_xattrs(path: &Path) -> Xattrs {
    let value = |name: &OsStr| xattr::get(path, name).unwrap().unwrap_or_default();
    xattr::list(path).unwrap().map(|name| (name.as_bytes().to_vec(), value(&name))).collect()
}
