//! Mounts native trees: EROFS file systems on top of a file with metadata and a data file. Kernels before 6.12 take block devices only:
//! there both files become loop devices first.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use erofs::{BLOCK, Device, WriteError};
use parking_lot::Mutex;
use rustix::fs::CWD;
use rustix::mount::{self, FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags};
use store::Digest;
use store::layer::S_IFDIR;

use crate::filesystem::Filesystem;
use crate::filesystem::native_tree::ChainContent;
use crate::filesystem::tree_mounter::Way;
use crate::mount::data_files::DataFiles;
use crate::mount::loop_device::LoopDevice;
use crate::source::failure::Failure;

/// Why a native tree cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A layer's index cannot be read.
    #[error(transparent)]
    Layer(#[from] Failure),
    /// Its metadata cannot be written.
    #[error("its metadata cannot be written: {0}")]
    Write(io::Error),
    /// EROFS cannot show what is in it.
    #[error("EROFS cannot show it: {0}")]
    Inexpressible(String),
    /// Its metadata takes too much of the local cache's disk.
    #[error(
        "its metadata would take more than {0} bytes, the part of the local cache's room that there is for metadata"
    )]
    Large(u64),
    /// The kernel does not mount it.
    #[error("the kernel does not mount it: {0}")]
    Mount(#[from] io::Error),
}

impl From<WriteError<Failure>> for Error {
    fn from(error: WriteError<Failure>) -> Error {
        match error {
            WriteError::Tree(failure) => Error::Layer(failure),
            WriteError::Io(error) => Error::Write(error),
            WriteError::TooLong(most) => Error::Large(most),
            other @ (WriteError::Inexpressible(_) | WriteError::Malformed(_)) => {
                Error::Inexpressible(other.to_string())
            }
        }
    }
}

/// A native tree that was mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NativeMount {
    /// The device number that `stat` shows of its root.
    pub device: u64,
    /// The metadata's length in bytes.
    pub len: u64,
    /// What is below it, if it is known.
    pub(super) backing: Option<Backing>,
}

/// What the kernel reads a tree's metadata from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// A file: the number in the kernel's name for it.
    File(u32),
    /// A loop device, by its device number.
    Loop(u64),
}

/// Mounts the native tree of an open chain on a directory. The metadata, of at most `most` bytes, is written to the file `metadata`,
/// which must not exist.
pub fn mount(
    filesystem: &Filesystem,
    (data_files, way): (&DataFiles, Way),
    chain: &Digest,
    (metadata, most): (&Path, u64),
    path: &Path,
) -> Result<NativeMount, Error> {
    let file = create(metadata).map_err(Error::Write)?;
    let tree = filesystem.write_native_tree(chain, &file, most)?;
    let content = Some(tree.content).filter(|content| content.blocks() > 0);
    let added = content.map(|content| data_files.add(content)).transpose()?;
    let data_file = added.as_ref().map(|added| &*added.path);
    let (mounted, backing) = superblock(way, metadata, data_file)?;
    let device = rustix::fs::fstat(&mounted).map_err(io::Error::from)?.st_dev;
    mount::move_mount(mounted.as_fd(), "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(io::Error::from)?;
    Ok(NativeMount { device, len: tree.len, backing })
}

fn create(metadata: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).mode(0o600).open(metadata)
}

/// Where the kernel shows what it knows of file systems' devices.
const BACKING_DEVICES: &str = "/sys/class/bdi";
/// The kernel's names for what is below EROFS file systems on files, before their numbers.
const BACKING_NAME: &str = "erofs-";
/// How much the kernel reads around a page fault and ahead of a sequential reader once an image has started, KiB. While it starts, what the
/// kernel takes by itself is enough (128): then less is fetched that nobody asked for, and a trace says what is needed. nginx with a
/// profile moved 3.75 MB instead of 4.40 over the shared disk, Python 7.5 instead of 8.9, in the same time (medians of 9).
const READ_AHEAD_KIB: &str = "512";
/// What the kernel takes by itself.
const KERNELS_READ_AHEAD_KIB: &str = "128";

/// The longest name of a file that the kernel takes in this place, bytes.
const SOURCE_MAX: usize = 255;

/// Held while the kernel makes a file system, which reads the metadata's first block from the local disk and opens data files.
static MAKING: Mutex<()> = Mutex::new(());

/// The numbers of what is below EROFS file systems.
fn backing_devices() -> BTreeSet<u32> {
    let names = fs::read_dir(BACKING_DEVICES).into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.filter_map(|name| name.to_str()?.strip_prefix(BACKING_NAME)?.parse().ok()).collect()
}

impl Backing {
    fn read_ahead_file(self) -> PathBuf {
        let name = match self {
            Backing::File(number) => format!("{BACKING_NAME}{number}"),
            Backing::Loop(device) => format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device)),
        };
        Path::new(BACKING_DEVICES).join(name).join("read_ahead_kb")
    }

    fn set_read_ahead(self, kib: &str) {
        if let Err(error) = fs::write(self.read_ahead_file(), kib) {
            tracing::debug!("the kernel keeps its own read-ahead on a native tree: {error}");
        }
    }
}

impl NativeMount {
    /// Has the kernel read far ahead in files that are opened from now on.
    pub fn read_far_ahead(&self) {
        if let Some(backing) = self.backing {
            backing.set_read_ahead(READ_AHEAD_KIB);
        }
    }

    /// How far the kernel reads ahead, if it is known.
    #[cfg(test)]
    pub(super) fn read_ahead(&self) -> Option<String> {
        fs::read_to_string(self.backing?.read_ahead_file()).ok()
    }
}

/// The file system, mounted nowhere yet, and what is below it.
fn superblock(way: Way, metadata: &Path, data_file: Option<&Path>) -> io::Result<(OwnedFd, Option<Backing>)> {
    match way {
        Way::Files => on_files(metadata, data_file),
        Way::Loops => {
            let metadata = LoopDevice::attach(metadata)?;
            let data = data_file.map(LoopDevice::attach).transpose()?;
            let backing = Backing::Loop(metadata.number()?);
            // A loop device has what its last user had.
            backing.set_read_ahead(KERNELS_READ_AHEAD_KIB);
            Ok((make(metadata.path(), data.as_ref().map(LoopDevice::path))?, Some(backing)))
        }
    }
}

/// One at a time, so that it is known which one is new.
fn on_files(metadata: &Path, data_file: Option<&Path>) -> io::Result<(OwnedFd, Option<Backing>)> {
    // A name of the file that the kernel takes: it refuses long ones.
    let file = File::open(metadata)?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let metadata = if metadata.as_os_str().len() > SOURCE_MAX { &short } else { metadata };
    let making = MAKING.lock();
    let others = backing_devices();
    let mounted = make(metadata, data_file)?;
    // The kernel tells no other way which one belongs to it; if others were made meanwhile, it is not known.
    let new: Vec<u32> = backing_devices().difference(&others).copied().collect();
    drop(making);
    Ok((mounted, if let [new] = new[..] { Some(Backing::File(new)) } else { None }))
}

fn make(source: &Path, device: Option<&Path>) -> io::Result<OwnedFd> {
    let context = mount::fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    mount::fsconfig_set_string(&context, "source", source)?;
    if let Some(device) = device {
        mount::fsconfig_set_string(&context, "device", device)?;
    }
    // A loop device is opened for reading only.
    mount::fsconfig_set_flag(&context, "ro")?;
    mount::fsconfig_create(&context)?;
    let flags =
        MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    Ok(mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags)?)
}

/// The most that an empty tree's metadata takes, bytes.
const PROBE_MAX: u64 = 4 * BLOCK;

/// Extended attributes of each kind that images have. A kernel whose EROFS is built without them would drop the capabilities of an image's
/// programs without a word, and one without ACLs would give groups what the mask allows.
const PROBE_XATTRS: [(&str, &[u8]); 4] = [
    ("security.cachefs", b"probe"),
    // Version 2; its entries are a tag, permissions and an id each: owner, user 1, group, mask, others.
    (
        "system.posix_acl_access",
        b"\x02\0\0\0\
          \x01\0\x07\0\xff\xff\xff\xff\
          \x02\0\x04\0\x01\0\0\0\
          \x04\0\0\0\xff\xff\xff\xff\
          \x10\0\x04\0\xff\xff\xff\xff\
          \x20\0\0\0\xff\xff\xff\xff",
    ),
    ("trusted.cachefs", b"probe"),
    ("user.cachefs", b"probe"),
];

/// The first of these ways in which the kernel mounts metadata and shows extended attributes, tried with an empty tree that is written to
/// `metadata`.
pub fn probe(data_files: &DataFiles, ways: &[Way], metadata: &Path) -> Result<Way, Error> {
    let file = create(metadata).map_err(Error::Write)?;
    let content = Arc::new(ChainContent::unread());
    erofs::write(&Empty, &[Device { blocks: content.blocks() }], b"", &file, PROBE_MAX)?;
    let data_file = data_files.add(content)?;
    Ok(probe_all(ways, metadata, &data_file.path)?)
}

fn probe_all(ways: &[Way], metadata: &Path, data_file: &Path) -> io::Result<Way> {
    let mut failed = io::Error::other("it is not to be tried");
    for way in ways {
        match probe_one(*way, metadata, data_file) {
            Ok(()) => return Ok(*way),
            Err(error) => failed = error,
        }
        // This is how a kernel says that it wants a block device.
        if failed.raw_os_error() != Some(rustix::io::Errno::NOTBLK.raw_os_error()) {
            break;
        }
    }
    Err(failed)
}

fn probe_one(way: Way, metadata: &Path, data_file: &Path) -> io::Result<()> {
    let (mounted, _) = superblock(way, metadata, Some(data_file))?;
    let root = format!("/proc/self/fd/{}", mounted.as_raw_fd());
    for (name, wanted) in PROBE_XATTRS {
        let mut value = [0; 64];
        let shown = rustix::fs::getxattr(&root, name, &mut value[..]);
        if shown.ok().and_then(|len| value.get(..len)) != Some(wanted) {
            return Err(io::Error::other(format!("its EROFS shows no extended attributes like {name}")));
        }
    }
    Ok(())
}

/// A root directory.
struct Empty;

impl erofs::Tree for Empty {
    type Error = Failure;

    fn root(&self) -> erofs::Node {
        1
    }

    fn inode(&self, _: erofs::Node) -> Result<erofs::Inode, Failure> {
        let (mode, nlink) = (S_IFDIR | 0o700, 2);
        Ok(erofs::Inode {
            mode,
            nlink,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: 0,
            mtime_nsec: 0,
            rdev: (0, 0),
            content: (0, 0),
        })
    }

    fn entries(&self, _: erofs::Node, _: &mut dyn FnMut(&[u8], erofs::Node)) -> Result<(), Failure> {
        Ok(())
    }

    fn xattrs(&self, _: erofs::Node, give: &mut dyn FnMut(erofs::Xattr<'_>)) -> Result<(), Failure> {
        PROBE_XATTRS.iter().for_each(|(name, value)| give((name.as_bytes(), value)));
        Ok(())
    }

    fn holes(&self, _: erofs::Node, _: &erofs::Inode, _: &mut dyn FnMut(Range<u64>)) -> Result<(), Failure> {
        Ok(())
    }

    fn target(&self, _: erofs::Node) -> Result<Vec<u8>, Failure> {
        Err(Failure::WrongKind)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::time::Instant;

    use nix::mount::{MntFlags, umount2};

    use super::*;
    use crate::filesystem::native_tree::tests::{contents, served, shown};
    use crate::filesystem::tests::{host, image};
    use crate::fixture::TIMEOUT;
    use crate::mount::data_files::{self, LetGo};

    #[test]
    fn the_kernel_reads_a_native_tree_through_a_data_file() {
        for way in [Way::Files, Way::Loops] {
            mounted(way);
        }
    }

    fn mounted(way: Way) {
        let (store, cache, chain, diff_ids) = image(&contents());
        let host = host(&store, &cache);
        let expected = served(&host, &chain);
        let data: (_, LetGo) = (data_files::mount().unwrap(), Box::new(|| ()));
        let data_files = DataFiles::serve(Arc::clone(&host.filesystem), 2, data, Arc::default()).unwrap();
        let root = tempfile::tempdir().unwrap();
        let id: Digest = format!("sha256:{}", chain.strip_prefix("chains/").unwrap()).parse().unwrap();
        let metadata = cache.path().join("metadata");
        let (within, short) = ((&*metadata, u64::MAX), (&*cache.path().join("short"), 4096));
        let refused = mount(&host.filesystem, (&data_files, way), &id, short, root.path()).unwrap_err();
        assert!(matches!(refused, Error::Large(4096)), "{refused}");
        assert_eq!(data_files.in_use(), BTreeSet::new());
        let nowhere = (&*cache.path().join("nowhere"), u64::MAX);
        let refused = mount(&host.filesystem, (&data_files, way), &id, nowhere, &root.path().join("none")).unwrap_err();
        assert!(matches!(refused, Error::Mount(_)), "{refused}");
        let asked = Instant::now();
        while !data_files.in_use().is_empty() {
            assert!(asked.elapsed() < TIMEOUT * 100, "what was opened for it is closed");
        }
        let mounted = mount(&host.filesystem, (&data_files, way), &id, within, root.path()).unwrap();
        assert_eq!(std::fs::metadata(root.path()).unwrap().dev(), mounted.device);
        assert_eq!(std::fs::metadata(&metadata).unwrap().len(), mounted.len);
        // The first reads come from a user who could not open a data file: what is checked is the tree's own permission.
        let mut cat = std::process::Command::new("setpriv");
        cat.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "cat"]).arg(root.path().join("large"));
        let read = cat.output();
        let seen = std::panic::catch_unwind(|| shown(root.path()));
        // What is open holds its layer, also when the tree is mounted nowhere any more.
        let file = File::open(root.path().join("large"));
        umount2(root.path(), MntFlags::MNT_DETACH).unwrap();
        assert_eq!(read.unwrap().stdout, expected["/large"].content);
        assert_eq!(seen.unwrap(), expected);
        assert_eq!(data_files.in_use(), diff_ids.into_iter().collect());
        let file = file.unwrap();
        std::thread::scope(|scope| {
            let finish = scope.spawn(|| data_files.finish());
            std::thread::sleep(TIMEOUT);
            assert!(!finish.is_finished(), "a file is open");
            drop(file);
        });
        assert_eq!(data_files.in_use(), BTreeSet::new());
    }
}
