//! Mount points: which directories may be mounted on, and how mounts end.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags};
use store::Digest;

/// The file system's type in `/proc/mounts`.
pub const TYPE: &str = "fuse.cachefs";
/// The type of native trees.
const NATIVE_TYPE: &str = "erofs";
const DEVICE: &str = "/dev/fuse";
/// Major and minor number of the FUSE device.
const DEVICE_NUMBER: (u64, u64) = (10, 229);

/// Why something cannot be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such directory.
    #[error("mount point {} does not exist: create the directory first", .0.display())]
    Missing(PathBuf),
    /// It is not a directory.
    #[error("mount point {} is not a directory", .0.display())]
    NotDirectory(PathBuf),
    /// It is not empty: its files would be hidden.
    #[error("mount point {} is not empty: choose an empty directory", .0.display())]
    NotEmpty(PathBuf),
    /// A file system is mounted there already.
    #[error("mount point {} is busy: a file system of type {kind} is mounted there already", path.display())]
    Busy {
        /// The directory.
        path: PathBuf,
        /// The type of that file system.
        kind: String,
    },
    /// No cachefs is mounted there.
    #[error("no cachefs is mounted on {}", .0.display())]
    NotMounted(PathBuf),
    /// Something uses the mount.
    #[error("{} is in use: stop the containers and programs that use it, then unmount again", .0.display())]
    InUse(PathBuf),
    /// The FUSE device cannot be used.
    #[error("/dev/fuse cannot be opened ({0}): load the kernel's fuse module, or give the container that device")]
    NoDevice(io::Error),
    /// Mounting is not permitted: this user is not root.
    #[error("mounting {} is not permitted: run cachefs as root", .0.display())]
    NotPermitted(PathBuf),
    /// Any other error of the operating system.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

type Result<T> = std::result::Result<T, Error>;

/// One mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    /// Where it is mounted.
    pub path: PathBuf,
    /// Its type.
    pub kind: String,
    /// Major and minor number of its device, `0:45`.
    pub device: String,
}

impl Mounted {
    /// A cachefs that is no longer mounted.
    pub fn ended(path: &Path) -> Mounted {
        Mounted { path: path.to_owned(), kind: TYPE.to_owned(), device: String::new() }
    }

    /// The number that `stat` shows as its device; 0, which is no device, if the kernel has said nothing that can be understood.
    pub fn device_number(&self) -> u64 {
        let parts =
            self.device.split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        parts.map_or(0, |(major, minor)| nix::sys::stat::makedev(major, minor))
    }
}

/// Undoes the octal escapes of `/proc/self/mountinfo`.
fn unescape(text: &[u8]) -> PathBuf {
    let mut out = Vec::new();
    let mut rest = text;
    while let Some((first, tail)) = rest.split_first() {
        let code = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()).filter(|_| *first == b'\\') {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    OsStr::from_bytes(&out).into()
}

fn parse_line(line: &[u8]) -> Option<Mounted> {
    let mut fields = line.split(|b| *b == b' ');
    let device = String::from_utf8_lossy(fields.nth(2)?).into_owned();
    let path = unescape(fields.nth(1)?);
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    Some(Mounted { path, device, kind: String::from_utf8_lossy(kind).into_owned() })
}

/// All mounted file systems, in the order of mounting.
pub fn mounted() -> Vec<Mounted> {
    let table = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    table.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

/// The topmost file system that is mounted on a path without links. No daemon is asked.
pub fn mounted_on(path: &Path) -> Option<Mounted> {
    mounted().into_iter().rev().find(|mounted| mounted.path == path)
}

/// Whether that file system is still mounted, there or elsewhere in this mount namespace. One that is not may still be in use.
pub fn is_mounted(one: &Mounted) -> bool {
    mounted().iter().any(|mounted| mounted.device == one.device && mounted.kind == one.kind)
}

fn is_dead(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::ENOTCONN as i32)
}

/// The path without links, even if what is mounted there has lost its daemon.
pub fn canonical(path: &Path) -> Result<PathBuf> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Error::Missing(path.to_owned()),
        _ => Error::Io { action: "open mount point", path: path.to_owned(), source: error },
    };
    let absolute = std::path::absolute(path).map_err(failed)?;
    match (absolute.canonicalize(), absolute.parent(), absolute.file_name()) {
        (Err(error), Some(parent), Some(name)) if is_dead(&error) => {
            Ok(parent.canonicalize().map_err(failed)?.join(name))
        }
        (canonical, ..) => canonical.map_err(failed),
    }
}

/// The path without links of a cachefs mount, whether its daemon is alive or not.
pub fn ours(path: &Path) -> Result<PathBuf> {
    let path = match canonical(path) {
        Err(Error::Missing(path)) => return Err(Error::NotMounted(path)),
        canonical => canonical?,
    };
    if mounted_on(&path).is_some_and(|mounted| mounted.kind == TYPE) { Ok(path) } else { Err(Error::NotMounted(path)) }
}

/// How long a daemon may take to be gone after its keeper was killed.
pub(super) const DYING: Duration = Duration::from_secs(1);

/// Checks a mount point, and unmounts what a daemon that died has left there. Returns its canonical path.
pub fn prepare(path: &Path) -> Result<PathBuf> {
    let path = canonical(path)?;
    let asked = Instant::now();
    while let Some(Mounted { kind, .. }) = mounted_on(&path) {
        match std::fs::symlink_metadata(&path) {
            Err(error) if is_dead(&error) && kind.starts_with("fuse") => {
                tracing::warn!("{} was left by a daemon that died: unmounting it", path.display());
                detach(&path)?;
            }
            _ if kind == TYPE && asked.elapsed() < DYING => std::thread::sleep(DYING / 100),
            _ => return Err(Error::Busy { path, kind }),
        }
    }
    let mut entries = std::fs::read_dir(&path).map_err(|source| match source.kind() {
        io::ErrorKind::NotADirectory => Error::NotDirectory(path.clone()),
        io::ErrorKind::NotFound => Error::Missing(path.clone()),
        _ => Error::Io { action: "open mount point", path: path.clone(), source },
    })?;
    match entries.next() {
        Some(_) => Err(Error::NotEmpty(path)),
        None => Ok(path),
    }
}

/// Opens the FUSE device. Another one in its place would make the mount fail for no visible reason.
pub(super) fn open_device() -> io::Result<std::fs::File> {
    let device = std::fs::File::options().read(true).write(true).open(DEVICE)?;
    let number = device.metadata()?.rdev();
    if (nix::sys::stat::major(number), nix::sys::stat::minor(number)) == DEVICE_NUMBER {
        Ok(device)
    } else {
        Err(io::Error::other("it is another device"))
    }
}

/// Nothing below the mount itself gives more rights. What engines mount on top of it still honours setuid programs,
/// file capabilities and devices.
const FLAGS: MsFlags = MsFlags::MS_RDONLY.union(MsFlags::MS_NOSUID).union(MsFlags::MS_NODEV);

/// Mounts on `path`, which [`prepare`] returned. Nobody can use the mount before the returned descriptor is served.
/// Users other than root pass the kernel's first check (`allow_other`), because the processes of containers read
/// through an overlay on top under their own users; the root directory of the mount lets in root alone.
pub fn mount(path: &Path) -> Result<OwnedFd> {
    let device = open_device().map_err(Error::NoDevice)?;
    let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
    let options = format!(
        "fd={},rootmode=40000,user_id={uid},group_id={gid},default_permissions,allow_other",
        device.as_raw_fd()
    );
    let mounted = nix::mount::mount(Some("cachefs"), path, Some(TYPE), FLAGS, Some(options.as_str()));
    match mounted {
        Ok(()) => Ok(device.into()),
        Err(Errno::EPERM) => Err(Error::NotPermitted(path.to_owned())),
        Err(Errno::ENODEV) => Err(Error::NoDevice(Errno::ENODEV.into())),
        Err(error) => Err(Error::Io { action: "mount", path: path.to_owned(), source: error.into() }),
    }
}

/// Sets how far the kernel reads ahead on the mount, bytes. Without this it is 128 KiB: FUSE's handshake can only lower
/// that.
pub fn set_read_ahead(path: &Path, bytes: u64) -> io::Result<()> {
    // From the mount table, because stat would ask the daemon, which does not answer yet.
    let device = mounted_on(path).ok_or(io::ErrorKind::NotFound)?.device;
    std::fs::write(format!("/sys/class/bdi/{device}/read_ahead_kb"), (bytes >> 10).to_string())
}

/// Takes the mount out of the tree now; it ends when nobody uses it any more.
pub fn detach(path: &Path) -> Result<()> {
    let detached = nix::mount::umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    detached.map_err(|error| Error::Io { action: "unmount", path: path.to_owned(), source: error.into() })
}

/// Takes the mount out of the tree and ends its connection now: whoever uses it gets errors, and nobody waits any more.
pub fn abort(path: &Path) -> Result<()> {
    let flags = MntFlags::MNT_DETACH | MntFlags::MNT_FORCE | MntFlags::UMOUNT_NOFOLLOW;
    let aborted = nix::mount::umount2(path, flags);
    aborted.map_err(|error| Error::Io { action: "unmount", path: path.to_owned(), source: error.into() })
}

/// Unmounts a cachefs; one that has lost its daemon is detached.
pub fn unmount(path: &Path) -> Result<()> {
    let path = ours(path)?;
    if std::fs::symlink_metadata(&path).is_err_and(|error| is_dead(&error)) {
        return detach(&path);
    }
    // Native trees are mounted on top of it.
    for tree in mounted().into_iter().rev().filter(|mounted| is_native_tree(mounted, &path)) {
        unmount_one(&tree.path)?;
    }
    unmount_one(&path)
}

/// The path at which engines find the tree of a chain in a mount.
pub fn tree(mountpoint: &Path, chain: &Digest) -> PathBuf {
    mountpoint.join("trees").join(chain.hex())
}

/// Whether a mount is a native tree of the mount at `mountpoint`.
pub(super) fn is_native_tree(mounted: &Mounted, mountpoint: &Path) -> bool {
    mounted.kind == NATIVE_TYPE && mounted.path.parent() == Some(&mountpoint.join("chains"))
}

/// Unmounts what is on a path, unless something uses it.
pub(super) fn unmount_one(path: &Path) -> Result<()> {
    match nix::mount::umount2(path, MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(Errno::EBUSY) => Err(Error::InUse(path.to_owned())),
        Err(Errno::EPERM) => Err(Error::NotPermitted(path.to_owned())),
        Err(error) => Err(Error::Io { action: "unmount", path: path.to_owned(), source: error.into() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines() {
        let line = br"36 35 98:0 /mnt1 /mnt\0402/a\134b rw,noatime master:1 - fuse.cachefs cachefs ro,user_id=0";
        let expected = Mounted { path: r"/mnt 2/a\b".into(), kind: TYPE.into(), device: "98:0".into() };
        assert_eq!(parse_line(line), Some(expected));
        assert_eq!(parse_line(b""), None);
        assert!(mounted().iter().any(|mounted| mounted.path == Path::new("/proc")));
    }

    #[test]
    fn bad_mount_points_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        assert_eq!(prepare(dir.path()).unwrap(), path);
        let error = prepare(&path.join("none")).unwrap_err().to_string();
        assert!(error.ends_with("none does not exist: create the directory first"), "{error}");
        std::fs::write(path.join("file"), b"").unwrap();
        assert!(prepare(&path).unwrap_err().to_string().ends_with("is not empty: choose an empty directory"));
        assert!(prepare(&path.join("file")).unwrap_err().to_string().ends_with("is not a directory"));
        assert!(prepare(Path::new("/proc")).unwrap_err().to_string().contains("busy: a file system of type proc"));
        assert!(matches!(unmount(&path), Err(Error::NotMounted(_))));
    }
}
