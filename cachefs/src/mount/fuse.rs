//! FUSE: a thin adapter over [`crate::filesystem`]. Beside `data_files` and `connection`, the only file that names fuser.
//!
//! Requests are answered on the FUSE thread that took them, or handed on as a callback that owns the reply; no thread
//! ever waits. Immutable answers carry a lifetime of years, so the kernel asks once.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BackingId, Errno, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyXattr, Request, SessionACL,
};
use nix::sys::statfs::{EXT4_SUPER_MAGIC, statfs};
use store::Digest;
use store::layer::{S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT};

use crate::filesystem::io_mode::OpenMode;
use crate::filesystem::io_mode::{self, IoMode, ModeInUse};
use crate::filesystem::kernel_state::{Connection, KernelState};
use crate::filesystem::node::{Attributes, CATALOGUE, Detail, Found, Lifetime, Listed, Node, ReplyRoom, Slot};
use crate::filesystem::{Filesystem, Seek};
use crate::mount::connection::{self, Connected};
use crate::source::failure::{Failure, Result};

/// What "for ever" is to the kernel: it cannot count much further in jiffies.
pub(super) const FOREVER: Duration = Duration::from_secs(10 * 365 * 86_400);
/// Largest read and readahead, bytes: the most pages that the kernel puts into one request by default.
pub(super) const READ_MAX: u32 = 1 << 20;
/// How many background requests, such as readahead, the kernel has in flight at most. At this number it holds back
/// whoever reads anything, cached or not. So requests that wait for a shared disk, of which each reading thread has a
/// few, must not reach it.
pub(super) const BACKGROUND: u16 = 8192;

/// fuser warns about every request that a file system need not implement, such as the ioctls of a copy-up.
pub const LOG_FILTER: &str = "fuser=error";

/// The open files. A backing id keeps a cache file known to the kernel, which reads it past the daemon.
type OpenFiles = io_mode::OpenFiles<BackingId>;

/// Serves `filesystem` on an open `/dev/fuse` whose file system is mounted, until it is unmounted.
pub struct Server(Connected<Adapter>);

impl Server {
    /// Performs the handshake with the kernel, or goes on with the connection that another worker has left in `state`. `local` is a directory on
    /// the host's own disk.
    pub fn new(
        filesystem: Arc<Filesystem>,
        device: &OwnedFd,
        threads: usize,
        open_mode: Arc<ModeInUse>,
        local: &Path,
        state: &KernelState,
    ) -> io::Result<Server> {
        let inode_flags = inode_flags(local);
        let adapter = Adapter { filesystem, open_mode, open_files: Arc::default(), inode_flags };
        connection::connect(adapter, device, (SessionACL::All, threads), Connection::Mount, state).map(Server)
    }

    /// Whether another worker can take the connection over without losing a request.
    pub fn can_resume(&self) -> bool {
        self.0.can_resume
    }

    /// What has the kernel forget a chain's root, although it was told to keep that, and with it everything below that is not in use.
    pub fn forget_chains(&self, filesystem: Arc<Filesystem>) -> impl Fn(&Digest) + Send + Sync + use<> {
        let notifier = self.0.session.notifier();
        move |chain| {
            let chains = INodeNo(filesystem.numbers().of(filesystem.chains()));
            // An error says that the kernel does not know it.
            let _ = notifier.inval_entry(chains, OsStr::new(&chain.hex()));
        }
    }

    /// Answers requests until the file system is unmounted.
    pub fn run(self) -> io::Result<()> {
        self.0.session.run()
    }
}

#[derive(Clone)]
struct Adapter {
    filesystem: Arc<Filesystem>,
    open_mode: Arc<ModeInUse>,
    open_files: Arc<OpenFiles>,
    /// What `lsattr` shows of every file.
    inode_flags: u32,
}

/// The flags of files without any, as the file system of a directory shows them. ext4 says of each file how its blocks are
/// mapped, and takes flags back only with that.
fn inode_flags(local: &Path) -> u32 {
    const FS_EXTENT_FL: u32 = 0x0008_0000;
    let is_ext4 = statfs(local).is_ok_and(|found| found.filesystem_type() == EXT4_SUPER_MAGIC);
    if is_ext4 { FS_EXTENT_FL } else { 0 }
}

impl Adapter {
    /// The node that the kernel means by a number.
    fn node(&self, number: INodeNo) -> Node {
        self.filesystem.numbers().node(number.0)
    }

    /// Agrees with the kernel on the open mode, or falls back.
    fn agree(&self, config: &mut KernelConfig) {
        let (needed, since) = match self.open_mode.get() {
            OpenMode::NoOpen => (InitFlags::FUSE_NO_OPEN_SUPPORT, "3.16"),
            OpenMode::Passthrough => (InitFlags::FUSE_PASSTHROUGH, "6.9"),
            OpenMode::Cached => return,
        };
        // A depth of one: an overlayfs on top must still be within the kernel's limit of two.
        let stackable = needed != InitFlags::FUSE_PASSTHROUGH || config.set_max_stack_depth(1).is_ok();
        if !stackable || config.add_capabilities(needed).is_err() {
            self.open_mode.fall_back(&format_args!("it needs Linux {since} or later"));
        }
    }

    /// Opens a file in the I/O mode that its inode is in. If the inode is closed: with passthrough if the content
    /// allows that, else cached.
    fn open_through(&self, node: Node, reply: ReplyOpen) {
        if let Some(mode) = self.open_files.join(node) {
            return reply_opened(&self.filesystem, reply, &mode);
        }
        if self.open_mode.get() != OpenMode::Passthrough {
            let mode = self.open_files.enter(node, IoMode::Cached);
            return reply_opened(&self.filesystem, reply, &mode);
        }
        let (filesystem, open_files) = (Arc::clone(&self.filesystem), Arc::clone(&self.open_files));
        let open_mode = Arc::clone(&self.open_mode);
        self.filesystem.whole_file(node, move |whole| {
            let wanted = match whole.map(|whole| whole.map(|file| reply.open_backing(&file))) {
                Ok(Some(Ok(backing))) => IoMode::Passthrough(Arc::new(backing)),
                Ok(Some(Err(error))) => {
                    open_mode.fall_back(&format_args!("the kernel does not take the local cache's files: {error}"));
                    IoMode::Cached
                }
                Ok(None) => IoMode::Cached,
                Err(failure) => {
                    filesystem.release(node);
                    return reply.error(errno(&failure));
                }
            };
            reply_opened(&filesystem, reply, &open_files.enter(node, wanted));
        });
    }
}

fn reply_opened(filesystem: &Filesystem, reply: ReplyOpen, mode: &IoMode<BackingId>) {
    match mode {
        IoMode::Cached => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH),
        // Without FOPEN_KEEP_CACHE: the kernel refuses to keep a cache that it does not have.
        IoMode::Passthrough(backing) => {
            filesystem.metrics().opens_passthrough.one();
            reply.opened_passthrough(FileHandle(0), FopenFlags::FOPEN_NOFLUSH, backing);
        }
    }
}

/// Counts the inodes that a listing tells the kernel of, and passes the count to the tree whenever the slot changes and
/// when this is dropped: most entries of a listing are in one slot.
struct Learned<'a> {
    filesystem: &'a Filesystem,
    slot: Slot,
    count: u32,
}

impl Learned<'_> {
    fn one(&mut self, slot: Slot) {
        if slot != self.slot {
            self.filesystem.learns(self.slot, self.count);
            (self.slot, self.count) = (slot, 0);
        }
        self.count += 1;
    }
}

impl Drop for Learned<'_> {
    fn drop(&mut self) {
        self.filesystem.learns(self.slot, self.count);
    }
}

pub(super) fn errno(failure: &Failure) -> Errno {
    Errno::from_i32(failure.errno())
}

fn lifetime(lifetime: Lifetime) -> Duration {
    match lifetime {
        Lifetime::Forever => FOREVER,
        Lifetime::Second => Duration::from_secs(1),
        Lifetime::None => Duration::ZERO,
    }
}

fn file_type(mode: u32) -> FileType {
    match mode & S_IFMT {
        S_IFDIR => FileType::Directory,
        S_IFLNK => FileType::Symlink,
        S_IFCHR => FileType::CharDevice,
        S_IFBLK => FileType::BlockDevice,
        S_IFIFO => FileType::NamedPipe,
        0o140000 => FileType::Socket,
        _ => FileType::RegularFile,
    }
}

fn system_time((seconds, nanoseconds): (i64, u32)) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let time = if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    time.and_then(|time| time.checked_add(Duration::from_nanos(nanoseconds.into()))).unwrap_or(UNIX_EPOCH)
}

/// The kernel's encoding of a device number in FUSE: 12 bits of major, 20 of minor.
fn device_number((major, minor): (u32, u32)) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xfff00) << 12)
}

fn file_attr(filesystem: &Filesystem, attributes: &Attributes) -> FileAttr {
    numbered(INodeNo(filesystem.numbers().of(attributes.node)), attributes)
}

pub(super) fn numbered(ino: INodeNo, attributes: &Attributes) -> FileAttr {
    let time = system_time(attributes.mtime);
    FileAttr {
        ino,
        size: attributes.size,
        blocks: attributes.blocks,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: file_type(attributes.mode),
        perm: (attributes.mode & 0o7777) as u16,
        nlink: attributes.nlink,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: device_number(attributes.rdev),
        blksize: 4096,
        flags: 0,
    }
}

/// The answer for a name that is not there: node 0 lets the kernel keep that, which an error would not.
fn absent() -> FileAttr {
    numbered(INodeNo(0), &Attributes::directory(Node::ROOT, (0, 0)))
}

fn reply_xattr(reply: ReplyXattr, size: u32, value: Result<Vec<u8>>) {
    match value {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() <= size as usize => reply.data(&value),
        Ok(_) => reply.error(errno(&Failure::TooSmall)),
        Err(failure) => reply.error(errno(&failure)),
    }
}

/// Whether a listing was tried before.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Attempt {
    First,
    Last,
}

/// The reply to a listing: of names, or of what `stat` shows as well.
trait Listing: Send + Sized + 'static {
    const DETAIL: Detail;

    fn add(&mut self, filesystem: &Filesystem, entry: &Listed<'_>) -> ReplyRoom;
    fn send(self);
    fn refuse(self, failure: &Failure);
}

fn room(is_full: bool) -> ReplyRoom {
    if is_full { ReplyRoom::Full } else { ReplyRoom::Left }
}

impl Listing for ReplyDirectory {
    const DETAIL: Detail = Detail::Names;

    fn add(&mut self, filesystem: &Filesystem, entry: &Listed<'_>) -> ReplyRoom {
        let number = INodeNo(filesystem.numbers().of(entry.node));
        room(self.add(number, entry.offset, file_type(entry.file_type), OsStr::from_bytes(entry.name)))
    }

    fn send(self) {
        self.ok();
    }

    fn refuse(self, failure: &Failure) {
        self.error(errno(failure));
    }
}

impl Listing for ReplyDirectoryPlus {
    const DETAIL: Detail = Detail::Attributes;

    fn add(&mut self, filesystem: &Filesystem, entry: &Listed<'_>) -> ReplyRoom {
        let Some((attributes, keep)) = entry.attributes else { return ReplyRoom::Left };
        let attr = file_attr(filesystem, &attributes);
        // The number of an entry is the one that `stat` shows.
        let number = INodeNo(filesystem.numbers().of(entry.node));
        room(self.add(number, entry.offset, OsStr::from_bytes(entry.name), &lifetime(keep), &attr, Generation(0)))
    }

    fn send(self) {
        self.ok();
    }

    fn refuse(self, failure: &Failure) {
        self.error(errno(failure));
    }
}

fn list<R: Listing>(filesystem: &Arc<Filesystem>, node: Node, offset: u64, mut reply: R, attempt: Attempt) {
    let mut learned = Learned { filesystem, slot: CATALOGUE, count: 0 };
    let mut given = 0;
    let listed = filesystem.list(node, offset, R::DETAIL, &mut |entry| {
        given += 1;
        let room = reply.add(filesystem, &entry);
        // The kernel learns of an inode only with its attributes, and never from `.` and `..`.
        if room == ReplyRoom::Left && entry.attributes.is_some() && !matches!(entry.name, b"." | b"..") {
            learned.one(entry.node.slot());
        }
        room
    });
    // The tree is told before the answer is sent: the kernel may forget what it learned at once.
    drop(learned);
    match listed {
        Ok(()) => reply.send(),
        // The kernel asks for the rest, and then gets the error.
        Err(_) if given > 0 => reply.send(),
        Err(failure) if attempt == Attempt::Last => reply.refuse(&failure),
        Err(failure) => {
            let again = Arc::clone(filesystem);
            filesystem.recover(node, failure, move |recovered| match recovered {
                Ok(()) => list(&again, node, offset, reply, Attempt::Last),
                Err(failure) => reply.refuse(&failure),
            });
        }
    }
}

/// `ioctl(2)` commands that the kernel sends for an inode's flags: `unsigned int`, and `struct fsxattr`.
const FS_IOC_GETFLAGS: u32 = 0x8008_6601;
const FS_IOC_FSGETXATTR: u32 = 0x801c_581f;

impl fuser::Filesystem for Adapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = [
            // Attributes come with listings, as long as somebody asks for them.
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_ASYNC_DIO,
            // Directories need no open: the kernel then keeps listings as if told to. With the next flag it asks for
            // the mtime first, which tells it when the catalogue tree has changed.
            InitFlags::FUSE_NO_OPENDIR_SUPPORT,
            InitFlags::FUSE_AUTO_INVAL_DATA,
            // ACLs, and the fact that there are none, are kept with the inode: `ls -l` asks for them at every file.
            InitFlags::FUSE_POSIX_ACL,
        ];
        for flag in wanted {
            if config.add_capabilities(flag).is_err() {
                tracing::debug!("this kernel has no {flag:?}");
            }
        }
        let _ = config.set_max_write(READ_MAX);
        if let Err(most) = config.set_max_readahead(READ_MAX) {
            let _ = config.set_max_readahead(most);
        }
        let _ = config.set_max_background(BACKGROUND);
        self.agree(config);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let filesystem = Arc::clone(&self.filesystem);
        self.filesystem.lookup(self.node(parent), name.as_bytes(), move |found| match found {
            Ok(Found::Entry(attributes, keep)) => {
                filesystem.learns(attributes.node.slot(), 1);
                let keep_attributes = lifetime(attributes.lifetime());
                reply.entry_with_ttls(
                    &keep_attributes,
                    &lifetime(keep),
                    &file_attr(&filesystem, &attributes),
                    Generation(0),
                );
            }
            Ok(Found::Absent(Lifetime::Forever)) => reply.entry(&FOREVER, &absent(), Generation(0)),
            Ok(Found::Absent(_)) => reply.error(errno(&Failure::Absent)),
            Err(failure) => reply.error(errno(&failure)),
        });
    }

    fn forget(&self, _: &Request, number: INodeNo, count: u64) {
        self.filesystem.forgets(self.node(number), count);
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let (node, filesystem) = (self.node(number), Arc::clone(&self.filesystem));
        self.filesystem.answer(
            node,
            move |tree| tree.attributes(node),
            move |result| match result {
                Ok(attributes) => reply.attr(&lifetime(attributes.lifetime()), &file_attr(&filesystem, &attributes)),
                Err(failure) => reply.error(errno(&failure)),
            },
        );
    }

    fn readlink(&self, _: &Request, number: INodeNo, reply: ReplyData) {
        let node = self.node(number);
        self.filesystem.answer(
            node,
            move |tree| tree.link_target(node),
            |result| match result {
                Ok(target) => reply.data(&target),
                Err(failure) => reply.error(errno(&failure)),
            },
        );
    }

    fn open(&self, _: &Request, number: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.filesystem.metrics().opens.one();
        if self.open_mode.get() == OpenMode::NoOpen {
            // ENOSYS tells the kernel that files need no open, and that it need not ask again.
            return reply.error(Errno::ENOSYS);
        }
        let (node, this) = (self.node(number), self.clone());
        self.filesystem.answer(
            node,
            move |tree| tree.open(node),
            move |opened| match opened {
                Ok(()) if this.open_mode.wanted() == OpenMode::Passthrough => this.open_through(node, reply),
                Ok(()) => reply_opened(&this.filesystem, reply, &IoMode::Cached),
                Err(failure) => reply.error(errno(&failure)),
            },
        );
    }

    fn release(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        let node = self.node(number);
        self.open_files.leave(node);
        self.filesystem.release(node);
        reply.ok();
    }

    fn read(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.filesystem.read(self.node(number), offset, size as usize, move |result| match result {
            Ok(bytes) => reply.data(bytes),
            Err(failure) => reply.error(errno(&failure)),
        });
    }

    fn lseek(&self, _: &Request, number: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let aim = match whence {
            nix::libc::SEEK_DATA => Seek::Data,
            nix::libc::SEEK_HOLE => Seek::Hole,
            // The kernel handles the other kinds of seeks itself.
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else { return reply.error(errno(&Failure::NoData)) };
        let node = self.node(number);
        self.filesystem.answer(
            node,
            move |tree| tree.seek(node, offset, aim),
            |result| match result {
                Ok(offset) => reply.offset(offset as i64),
                Err(failure) => reply.error(errno(&failure)),
            },
        );
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // ENOSYS tells the kernel that directories need no open, and that it need not ask again.
        reply.error(Errno::ENOSYS);
    }

    fn readdir(&self, _: &Request, number: INodeNo, _: FileHandle, offset: u64, reply: ReplyDirectory) {
        list(&self.filesystem, self.node(number), offset, reply, Attempt::First);
    }

    fn readdirplus(&self, _: &Request, number: INodeNo, _: FileHandle, offset: u64, reply: ReplyDirectoryPlus) {
        list(&self.filesystem, self.node(number), offset, reply, Attempt::First);
    }

    /// Answers for the inode flags of `chattr` and `lsattr`. Programs look before they change anything, and give back what they
    /// saw; the change itself is made to a container's own copy.
    #[expect(clippy::host_endian_bytes, reason = "the kernel takes the number as it lies in memory")]
    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        command: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        match command {
            FS_IOC_GETFLAGS => reply.ioctl(0, &self.inode_flags.to_ne_bytes()),
            FS_IOC_FSGETXATTR => reply.ioctl(0, &[0; 28]),
            _ => reply.error(Errno::ENOTTY),
        }
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        // A read-only tree without a size of its own; overlayfs wants the longest name.
        reply.statfs(0, 0, 0, 0, 0, 4096, 255, 4096);
    }

    fn getxattr(&self, _: &Request, number: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let (node, name) = (self.node(number), name.as_bytes().to_vec());
        let attempt = move |tree: &Filesystem| tree.xattr(node, &name);
        self.filesystem.answer(node, attempt, move |value| reply_xattr(reply, size, value));
    }

    fn listxattr(&self, _: &Request, number: INodeNo, size: u32, reply: ReplyXattr) {
        let node = self.node(number);
        let attempt = move |tree: &Filesystem| tree.xattr_names(node);
        self.filesystem.answer(node, attempt, move |names| reply_xattr(reply, size, names));
    }
}
