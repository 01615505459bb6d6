//! The directory behind a slow disk, addressed by node numbers and file handles.
//!
//! A node's number is its inode number (below 2^52), except that the root is 1. Its upper bits name the copy when the
//! tree is shown several times. A node is remembered by the parent and name under which it was last seen and not by a
//! descriptor, because there are too few descriptors. These places are never forgotten: a slow disk lives for minutes.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{DirBuilder, File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, DirEntryExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::AT_FDCWD;
use nix::libc;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use parking_lot::RwLock;

/// The root's number in FUSE.
const ROOT: u64 = 1;
/// The bit at which the copy begins in a node's number. The copy is 0 when there is only one, otherwise the copy's name plus one.
const COPY_SHIFT: u32 = 52;

/// The number without the copy.
fn within(number: u64) -> u64 {
    number & ((1 << COPY_SHIFT) - 1)
}

struct Place {
    parent: u64,
    name: OsString,
}

/// A node and its attributes.
pub(super) struct Seen {
    pub(super) number: u64,
    pub(super) metadata: Metadata,
}

/// One name in a directory.
pub(super) struct Listed {
    pub(super) number: u64,
    pub(super) name: OsString,
    pub(super) kind: std::fs::FileType,
}

/// The owner and mode for what a request creates.
#[derive(Clone, Copy)]
pub(super) struct Maker {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mode: u32,
}

/// Attributes to set.
#[derive(Default)]
pub(super) struct Change {
    pub(super) mode: Option<u32>,
    pub(super) owner: (Option<u32>, Option<u32>),
    pub(super) size: Option<u64>,
    /// Access time and modification time.
    pub(super) times: (Option<TimeSpec>, Option<TimeSpec>),
}

/// The directory behind the disk.
pub(super) struct Tree {
    root: PathBuf,
    /// The root's own inode number.
    root_inode: u64,
    /// Number of directories `0`, `1` ... in the root, each of which shows the whole tree. With 0 the root itself is the tree.
    copies: usize,
    /// Guards the place of each node.
    places: RwLock<HashMap<u64, Place>>,
    /// Guards the open files.
    files: RwLock<HashMap<u64, Arc<File>>>,
    /// Guards the open directories.
    listings: RwLock<HashMap<u64, Arc<Vec<Listed>>>>,
    next_handle: AtomicU64,
}

/// Turns "not found" into the error that NFS reports for a node that is gone.
fn stale(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::NotFound { Errno::ESTALE.into() } else { error }
}

impl Tree {
    pub(super) fn new(root: &Path, copies: usize) -> io::Result<Tree> {
        Ok(Tree {
            root: root.to_owned(),
            root_inode: root.metadata()?.ino(),
            copies,
            places: RwLock::default(),
            files: RwLock::default(),
            listings: RwLock::default(),
            next_handle: AtomicU64::new(0),
        })
    }

    /// The number of an inode in the same copy as `other`. The root's inode number and 1 are swapped.
    fn number(&self, other: u64, inode: u64) -> u64 {
        let number = match inode {
            inode if inode == self.root_inode => ROOT,
            ROOT => self.root_inode,
            inode => inode,
        };
        other - within(other) + within(number)
    }

    /// The number of the root of the copy with this name.
    fn copy(&self, name: &OsStr) -> Option<u64> {
        let copy: usize = name.to_str()?.parse().ok().filter(|copy| *copy < self.copies)?;
        Some(((copy as u64 + 1) << COPY_SHIFT) + ROOT)
    }

    fn path(&self, number: u64) -> io::Result<PathBuf> {
        let places = self.places.read();
        let (mut names, mut at) = (Vec::new(), number);
        while within(at) != ROOT {
            let place = places.get(&at).filter(|_| names.len() < 1000).ok_or(Errno::ESTALE)?;
            names.push(&place.name);
            at = place.parent;
        }
        let mut path = self.root.clone();
        path.extend(names.into_iter().rev());
        Ok(path)
    }

    /// The path of a node below the directory, for people.
    pub(super) fn shown(&self, number: u64) -> String {
        let path = self.path(number).ok();
        let below = path.as_ref().and_then(|path| path.strip_prefix(&self.root).ok());
        below.map_or_else(|| format!("node {number}"), |below| below.display().to_string())
    }

    fn child(&self, parent: u64, name: &OsStr) -> io::Result<PathBuf> {
        Ok(self.path(parent)?.join(name))
    }

    pub(super) fn look_up(&self, parent: u64, name: &OsStr) -> io::Result<Seen> {
        if parent == ROOT && self.copies > 0 {
            let number = self.copy(name).ok_or(Errno::ENOENT)?;
            return Ok(Seen { number, metadata: self.root.symlink_metadata()? });
        }
        let metadata = self.child(parent, name)?.symlink_metadata()?;
        let number = self.number(parent, metadata.ino());
        self.places.write().insert(number, Place { parent, name: name.to_owned() });
        Ok(Seen { number, metadata })
    }

    pub(super) fn attributes(&self, number: u64) -> io::Result<Seen> {
        let metadata = self.path(number)?.symlink_metadata().map_err(stale)?;
        Ok(Seen { number, metadata })
    }

    pub(super) fn link_target(&self, number: u64) -> io::Result<OsString> {
        std::fs::read_link(self.path(number)?).map(PathBuf::into_os_string).map_err(stale)
    }

    fn keep(&self, file: File) -> u64 {
        let handle = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.files.write().insert(handle, Arc::new(file));
        handle
    }

    /// Opens the file and returns a handle; `flags` are those of open(2).
    pub(super) fn open(&self, number: u64, flags: i32) -> io::Result<u64> {
        let access = flags & libc::O_ACCMODE;
        let mut options = OpenOptions::new();
        options.read(access != libc::O_WRONLY).write(access != libc::O_RDONLY).custom_flags(libc::O_NOFOLLOW);
        options.open(self.path(number)?).map_err(stale).map(|file| self.keep(file))
    }

    fn file(&self, handle: u64) -> io::Result<Arc<File>> {
        self.files.read().get(&handle).cloned().ok_or_else(|| Errno::EBADF.into())
    }

    /// Reads at most `size` bytes; fewer at the end of the file.
    pub(super) fn read(&self, handle: u64, offset: u64, size: usize) -> io::Result<Vec<u8>> {
        let file = self.file(handle)?;
        let mut bytes = vec![0; size];
        let mut filled = 0;
        while filled < size {
            match file.read_at(&mut bytes[filled..], offset + filled as u64)? {
                0 => break,
                n => filled += n,
            }
        }
        bytes.truncate(filled);
        Ok(bytes)
    }

    pub(super) fn write(&self, handle: u64, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file(handle)?.write_all_at(bytes, offset)
    }

    pub(super) fn sync(&self, handle: u64) -> io::Result<()> {
        self.file(handle)?.sync_all()
    }

    pub(super) fn sync_directory(&self, number: u64) -> io::Result<()> {
        File::open(self.path(number)?).map_err(stale)?.sync_all()
    }

    pub(super) fn close(&self, handle: u64) {
        self.files.write().remove(&handle);
    }

    /// Lists the directory as it is now and returns a handle for that list.
    pub(super) fn open_directory(&self, number: u64) -> io::Result<u64> {
        let mut listed = Vec::new();
        if number == ROOT && self.copies > 0 {
            let kind = self.root.metadata()?.file_type();
            let names = (0..self.copies).map(|copy| OsString::from(copy.to_string()));
            let copies = names.filter_map(|name| Some(Listed { number: self.copy(&name)?, name, kind }));
            return Ok(self.keep_listing(copies.collect()));
        }
        for entry in std::fs::read_dir(self.path(number)?).map_err(stale)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            listed.push(Listed { number: self.number(number, entry.ino()), name: entry.file_name(), kind });
        }
        Ok(self.keep_listing(listed))
    }

    fn keep_listing(&self, listed: Vec<Listed>) -> u64 {
        let handle = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.listings.write().insert(handle, Arc::new(listed));
        handle
    }

    pub(super) fn listing(&self, handle: u64) -> io::Result<Arc<Vec<Listed>>> {
        self.listings.read().get(&handle).cloned().ok_or_else(|| Errno::EBADF.into())
    }

    pub(super) fn close_directory(&self, handle: u64) {
        self.listings.write().remove(&handle);
    }

    fn made(&self, parent: u64, name: &OsStr, maker: Maker) -> io::Result<Seen> {
        std::os::unix::fs::lchown(self.child(parent, name)?, Some(maker.uid), Some(maker.gid))?;
        self.look_up(parent, name)
    }

    /// Creates a file and opens a handle for it.
    pub(super) fn create(&self, parent: u64, name: &OsStr, maker: Maker, flags: i32) -> io::Result<(Seen, u64)> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(maker.mode).custom_flags(libc::O_NOFOLLOW);
        let options = if flags & libc::O_EXCL == 0 { options.create(true) } else { options.create_new(true) };
        let file = options.open(self.child(parent, name)?)?;
        Ok((self.made(parent, name, maker)?, self.keep(file)))
    }

    pub(super) fn make_directory(&self, parent: u64, name: &OsStr, maker: Maker) -> io::Result<Seen> {
        DirBuilder::new().mode(maker.mode).create(self.child(parent, name)?)?;
        self.made(parent, name, maker)
    }

    pub(super) fn make_symlink(&self, parent: u64, name: &OsStr, target: &Path, maker: Maker) -> io::Result<Seen> {
        std::os::unix::fs::symlink(target, self.child(parent, name)?)?;
        self.made(parent, name, maker)
    }

    pub(super) fn make_link(&self, number: u64, parent: u64, name: &OsStr) -> io::Result<Seen> {
        std::fs::hard_link(self.path(number)?, self.child(parent, name)?)?;
        self.look_up(parent, name)
    }

    pub(super) fn remove_file(&self, parent: u64, name: &OsStr) -> io::Result<()> {
        std::fs::remove_file(self.child(parent, name)?)
    }

    pub(super) fn remove_directory(&self, parent: u64, name: &OsStr) -> io::Result<()> {
        std::fs::remove_dir(self.child(parent, name)?)
    }

    pub(super) fn rename(&self, from: (u64, &OsStr), to: (u64, &OsStr)) -> io::Result<()> {
        std::fs::rename(self.child(from.0, from.1)?, self.child(to.0, to.1)?)?;
        self.look_up(to.0, to.1).map(drop)
    }

    pub(super) fn change(&self, number: u64, change: &Change) -> io::Result<Seen> {
        let path = self.path(number)?;
        if let Some(size) = change.size {
            OpenOptions::new().write(true).open(&path).map_err(stale)?.set_len(size)?;
        }
        if let (uid, gid) = change.owner
            && (uid.is_some() || gid.is_some())
        {
            std::os::unix::fs::lchown(&path, uid, gid).map_err(stale)?;
        }
        if let Some(mode) = change.mode {
            std::fs::set_permissions(&path, Permissions::from_mode(mode & 0o7777)).map_err(stale)?;
        }
        if let (access, modification) = change.times
            && (access.is_some() || modification.is_some())
        {
            let (access, modification) =
                (access.unwrap_or(TimeSpec::UTIME_OMIT), modification.unwrap_or(TimeSpec::UTIME_OMIT));
            utimensat(AT_FDCWD, &path, &access, &modification, UtimensatFlags::NoFollowSymlink)?;
        }
        self.attributes(number)
    }

    /// The result of statvfs(3) for the file system behind the disk.
    pub(super) fn statistics(&self) -> io::Result<nix::sys::statvfs::Statvfs> {
        Ok(nix::sys::statvfs::statvfs(&self.root)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_found_after_moves_and_stale_after_removal() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        std::fs::write(dir.path().join("a/b/file"), "content").unwrap();
        let tree = Tree::new(dir.path(), 0).unwrap();
        assert_eq!(tree.attributes(ROOT).unwrap().metadata.ino(), dir.path().metadata().unwrap().ino());
        let a = tree.look_up(ROOT, OsStr::new("a")).unwrap().number;
        let b = tree.look_up(a, OsStr::new("b")).unwrap().number;
        let file = tree.look_up(b, OsStr::new("file")).unwrap().number;
        tree.rename((a, OsStr::new("b")), (ROOT, OsStr::new("c"))).unwrap();
        let handle = tree.open(file, libc::O_RDONLY).unwrap();
        assert_eq!(tree.read(handle, 3, 100).unwrap(), b"tent");
        tree.remove_file(b, OsStr::new("file")).unwrap();
        assert_eq!(tree.attributes(file).err().unwrap().raw_os_error(), Some(Errno::ESTALE as i32));
        assert_eq!(tree.read(handle, 0, 3).unwrap(), b"con", "what is open stays readable");
        tree.close(handle);
        assert_eq!(tree.read(handle, 0, 3).unwrap_err().raw_os_error(), Some(Errno::EBADF as i32));
    }

    #[test]
    fn copies_have_nodes_of_their_own_and_the_same_content() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("a")).unwrap();
        std::fs::write(dir.path().join("a/file"), "content").unwrap();
        let tree = Tree::new(dir.path(), 2).unwrap();
        let files = ["0", "1"].map(|copy| {
            let root = tree.look_up(ROOT, OsStr::new(copy)).unwrap().number;
            let a = tree.look_up(root, OsStr::new("a")).unwrap().number;
            tree.look_up(a, OsStr::new("file")).unwrap().number
        });
        assert_ne!(files[0], files[1]);
        for file in files {
            let handle = tree.open(file, libc::O_RDONLY).unwrap();
            assert_eq!(tree.read(handle, 0, 100).unwrap(), b"content");
        }
        assert_eq!(tree.look_up(ROOT, OsStr::new("2")).err().unwrap().raw_os_error(), Some(Errno::ENOENT as i32));
        let listing = tree.listing(tree.open_directory(ROOT).unwrap()).unwrap();
        assert_eq!(listing.iter().map(|entry| entry.name.clone()).collect::<Vec<_>>(), ["0", "1"]);
    }
}
