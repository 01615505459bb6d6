//! A directory tree with every attribute that a container can see, and the differences of two such trees.
//!
//! Directories are walked by descriptor, so paths may be longer than PATH_MAX. Contents are streamed through BLAKE3.
//! Attributes that have no meaning across file systems (inode numbers, allocated blocks, access and change times, sizes
//! of directories) are left out.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::dir::{Dir, Type};
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};

mod difference;

pub use difference::{Ignore, diff};

/// A path below the tree's root, without a leading slash; the root itself is empty.
pub type RelativePath = Vec<u8>;

/// A tree by path.
pub type Tree = BTreeMap<RelativePath, Entry>;

/// What kind of thing an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A character device; 0:0 is overlayfs's whiteout.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// One entry with all attributes that must match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What it is.
    pub kind: Kind,
    /// The type according to the directory listing; `None` if the listing did not tell.
    pub listed_kind: Option<Kind>,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of a file or of a link's target; 0 for everything else.
    pub size: u64,
    /// Seconds of the modification time.
    pub mtime: i64,
    /// Nanoseconds of the modification time.
    pub mtime_nsec: i64,
    /// The link count from stat.
    pub nlink: u64,
    /// Device number of a device node.
    pub rdev: u64,
    /// Target of a symbolic link.
    pub target: Option<Vec<u8>>,
    /// Extended attributes, those of `security.` and `trusted.` included.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// BLAKE3 of a file's content.
    pub content: Option<blake3::Hash>,
    /// All paths in the tree that are this inode, sorted. Empty if there is only one.
    pub hard_links: Vec<RelativePath>,
}

/// Reads a tree. Mounts below `root` are crossed.
pub fn snapshot(root: &Path) -> Result<Tree> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let directory = Dir::open(root, flags, Mode::empty()).with_context(|| format!("cannot open {}", root.display()))?;
    let mut walk = Walk::default();
    let status = fstat(&directory)?;
    let xattrs = xattrs_of(Path::new(&format!("/proc/self/fd/{}/.", directory.as_raw_fd())))?;
    walk.tree.insert(Vec::new(), entry_of(&status, None, xattrs)?);
    walk.directory(directory, &mut Vec::new()).with_context(|| format!("cannot read the tree {}", root.display()))?;
    Ok(walk.finish())
}

#[derive(Default)]
struct Walk {
    tree: Tree,
    inodes: HashMap<(u64, u64), Vec<RelativePath>>,
}

impl Walk {
    fn directory(&mut self, mut directory: Dir, path: &mut RelativePath) -> Result<()> {
        let mut names = Vec::new();
        for listed in directory.iter() {
            let listed = listed.with_context(|| format!("cannot list /{}", path.escape_ascii()))?;
            if !matches!(listed.file_name().to_bytes(), b"." | b"..") {
                names.push((listed.file_name().to_owned(), listed.file_type()));
            }
        }
        names.sort_by(|(one, _), (other, _)| one.cmp(other));
        for (name, listed) in names {
            let length = path.len();
            if length > 0 {
                path.push(b'/');
            }
            path.extend_from_slice(name.to_bytes());
            self.entry(&directory, &name, listed, path).with_context(|| format!("at /{}", path.escape_ascii()))?;
            path.truncate(length);
        }
        Ok(())
    }

    fn entry(&mut self, parent: &Dir, name: &CStr, listed: Option<Type>, path: &mut RelativePath) -> Result<()> {
        let status = fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW).context("listed, but stat fails")?;
        let xattrs = xattrs_of(&through_descriptor(parent, name))?;
        let mut entry = entry_of(&status, listed, xattrs)?;
        match entry.kind {
            Kind::File => entry.content = Some(content_of(parent, name, entry.size)?),
            Kind::Symlink => entry.target = Some(readlinkat(parent, name)?.as_bytes().to_vec()),
            _ => {}
        }
        let kind = entry.kind;
        if kind != Kind::Directory && entry.nlink > 1 {
            self.inodes.entry((status.st_dev, status.st_ino)).or_default().push(path.clone());
        }
        if self.tree.insert(path.clone(), entry).is_some() {
            bail!("the directory lists one name twice");
        }
        if kind == Kind::Directory {
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let inner = Dir::openat(parent.as_fd(), name, flags, Mode::empty()).context("cannot open the directory")?;
            self.directory(inner, path)?;
        }
        Ok(())
    }

    fn finish(mut self) -> Tree {
        for mut paths in self.inodes.into_values().filter(|paths| paths.len() > 1) {
            paths.sort();
            for path in &paths {
                if let Some(entry) = self.tree.get_mut(path) {
                    entry.hard_links.clone_from(&paths);
                }
            }
        }
        self.tree
    }
}

fn entry_of(status: &FileStat, listed: Option<Type>, xattrs: BTreeMap<Vec<u8>, Vec<u8>>) -> Result<Entry> {
    let kind = match SFlag::from_bits_truncate(status.st_mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFREG => Kind::File,
        SFlag::S_IFDIR => Kind::Directory,
        SFlag::S_IFLNK => Kind::Symlink,
        SFlag::S_IFCHR => Kind::CharDevice,
        SFlag::S_IFBLK => Kind::BlockDevice,
        SFlag::S_IFIFO => Kind::Fifo,
        SFlag::S_IFSOCK => Kind::Socket,
        other => bail!("stat tells the unknown type {other:?}"),
    };
    let sized = matches!(kind, Kind::File | Kind::Symlink);
    let device = matches!(kind, Kind::CharDevice | Kind::BlockDevice);
    Ok(Entry {
        kind,
        listed_kind: listed.map(listed_kind),
        mode: status.st_mode & 0o7777,
        uid: status.st_uid,
        gid: status.st_gid,
        size: if sized { u64::try_from(status.st_size)? } else { 0 },
        mtime: status.st_mtime,
        mtime_nsec: status.st_mtime_nsec,
        nlink: status.st_nlink,
        rdev: if device { status.st_rdev } else { 0 },
        target: None,
        xattrs,
        content: None,
        hard_links: Vec::new(),
    })
}

fn listed_kind(kind: Type) -> Kind {
    match kind {
        Type::File => Kind::File,
        Type::Directory => Kind::Directory,
        Type::Symlink => Kind::Symlink,
        Type::CharacterDevice => Kind::CharDevice,
        Type::BlockDevice => Kind::BlockDevice,
        Type::Fifo => Kind::Fifo,
        Type::Socket => Kind::Socket,
    }
}

/// A short path to an entry at any depth, through the open descriptor of its directory.
fn through_descriptor(parent: &Dir, name: &CStr) -> PathBuf {
    Path::new(&format!("/proc/self/fd/{}", parent.as_raw_fd())).join(OsStr::from_bytes(name.to_bytes()))
}

fn xattrs_of(path: &Path) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let names = match xattr::list(path) {
        Ok(names) => names,
        Err(error) if error.kind() == std::io::ErrorKind::Unsupported => return Ok(BTreeMap::new()),
        Err(error) => return Err(error).context("cannot list extended attributes"),
    };
    let mut found = BTreeMap::new();
    for name in names {
        let value = xattr::get(path, &name).with_context(|| format!("cannot read the attribute {name:?}"))?;
        found.insert(name.as_bytes().to_vec(), value.with_context(|| format!("{name:?} is listed but missing"))?);
    }
    Ok(found)
}

fn content_of(parent: &Dir, name: &CStr, size: u64) -> Result<blake3::Hash> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file = File::from(openat(parent.as_fd(), name, flags, Mode::empty()).context("cannot open the file")?);
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file).context("cannot read the file")?;
    if hasher.count() != size {
        bail!("stat tells {size} bytes, reading gives {}", hasher.count());
    }
    Ok(hasher.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::open;
    use nix::sys::stat::mkdirat;

    #[test]
    fn paths_longer_than_the_kernel_takes_are_read() {
        let root = tempfile::tempdir().unwrap();
        let (flags, name) = (OFlag::O_DIRECTORY | OFlag::O_RDONLY, "x".repeat(250));
        let mut directory = open(root.path(), flags, Mode::empty()).unwrap();
        for _ in 0..20 {
            mkdirat(&directory, name.as_str(), Mode::S_IRWXU).unwrap();
            directory = openat(&directory, name.as_str(), flags, Mode::empty()).unwrap();
        }
        nix::unistd::symlinkat("target", &directory, "link").unwrap();
        let tree = snapshot(root.path()).unwrap();
        let (path, link) = tree.last_key_value().unwrap();
        assert_eq!((tree.len(), path.len(), link.kind), (22, 20 * 251 + 4, Kind::Symlink));
    }
}
