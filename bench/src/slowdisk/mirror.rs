//! A slow disk's FUSE server: takes requests from the kernel at once and answers each when [`super::wire`] allows it.

use std::ffi::OsStr;
use std::fs::Metadata;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, Session, SessionACL,
    TimeOrNow, WriteFlags,
};
use nix::libc;
use nix::sys::time::TimeSpec;

use super::tree::{Change, Maker, Seen, Tree};
use super::wire::{Operation, Wire};

/// How long the kernel trusts attributes and names: the minimum of an NFS client by default (acregmin).
pub(super) const LIFETIME: Duration = Duration::from_secs(3);
/// Threads that take requests from the kernel; none of them waits.
const WORKERS: usize = 2;
/// How many requests such as read-ahead, for which no process waits, the kernel has in flight.
const BACKGROUND: u16 = 64;

/// A session on a mounted connection.
pub(super) struct Server(Session<Mirror>);

impl Server {
    /// Negotiates the session with the kernel.
    pub(super) fn new(tree: Tree, wire: Arc<Wire>, device: OwnedFd, read_ahead: u32) -> io::Result<Server> {
        let mut config = Config::default();
        config.acl = SessionACL::All;
        config.n_threads = Some(WORKERS);
        config.clone_fd = true;
        let mirror = Mirror { tree: Arc::new(tree), wire, read_ahead };
        Session::from_fd(mirror, device, SessionACL::All, config).map(Server)
    }

    /// Answers requests until the disk is unmounted.
    pub(super) fn run(self) -> io::Result<()> {
        self.0.run()
    }
}

struct Mirror {
    tree: Arc<Tree>,
    wire: Arc<Wire>,
    read_ahead: u32,
}

impl Mirror {
    /// Waits for the latency, does `work` unless a fault forbids it, and answers.
    fn ask<T>(
        &self,
        operation: Operation,
        object: &Object<'_>,
        work: impl FnOnce(&Tree) -> io::Result<T> + Send + 'static,
        answer: impl FnOnce(Result<T, Errno>) + Send + 'static,
    ) {
        let (tree, wire) = (Arc::clone(&self.tree), Arc::clone(&self.wire));
        let place = wire.timeline.asked(operation.name(), || object.describe(&tree));
        self.wire.request(operation, move || {
            let result = wire.admit(operation).and_then(|()| work(&tree)).map_err(|error| errno(&error));
            wire.timeline.answered(place, 0);
            answer(result);
        });
    }

    /// Like [`Mirror::ask`], for requests that transfer bytes. `bytes` returns their number; the answer comes when the
    /// wire has carried them.
    fn carry<T: Send + 'static>(
        &self,
        operation: Operation,
        object: &Object<'_>,
        work: impl FnOnce(&Tree) -> io::Result<T> + Send + 'static,
        bytes: impl FnOnce(&T) -> usize + Send + 'static,
        answer: impl FnOnce(Result<T, Errno>) + Send + 'static,
    ) {
        let (tree, wire) = (Arc::clone(&self.tree), Arc::clone(&self.wire));
        let place = wire.timeline.asked(operation.name(), || object.describe(&tree));
        self.wire.request(operation, move || {
            let result = wire.admit(operation).and_then(|()| work(&tree)).map_err(|error| errno(&error));
            let (carried, carrier) = (result.as_ref().map_or(0, bytes) as u64, Arc::clone(&wire));
            carrier.carry(operation, carried, move || {
                wire.timeline.answered(place, carried);
                answer(result);
            });
        });
    }
}

/// What a request is about.
enum Object<'a> {
    Node(INodeNo),
    Name(INodeNo, &'a OsStr),
    Range(INodeNo, u64),
    Disk,
}

impl Object<'_> {
    /// The path below the disk's directory, for people.
    fn describe(&self, tree: &Tree) -> String {
        match self {
            Object::Node(node) => tree.shown(node.0),
            Object::Name(parent, name) => format!("{}/{}", tree.shown(parent.0), name.display()),
            Object::Range(node, offset) => format!("{} +{offset}", tree.shown(node.0)),
            Object::Disk => String::new(),
        }
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_i32(error.raw_os_error().unwrap_or(libc::EIO))
}

fn file_type(kind: std::fs::FileType) -> FileType {
    match kind {
        kind if kind.is_dir() => FileType::Directory,
        kind if kind.is_symlink() => FileType::Symlink,
        kind if kind.is_char_device() => FileType::CharDevice,
        kind if kind.is_block_device() => FileType::BlockDevice,
        kind if kind.is_fifo() => FileType::NamedPipe,
        kind if kind.is_socket() => FileType::Socket,
        _ => FileType::RegularFile,
    }
}

fn system_time(seconds: i64, nanoseconds: i64) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let time = if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    time.and_then(|time| time.checked_add(Duration::from_nanos(nanoseconds.unsigned_abs()))).unwrap_or(UNIX_EPOCH)
}

/// The kernel's encoding of a device number in FUSE: 12 bits of major number, 20 of minor number.
fn device_number(device: u64) -> u32 {
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    ((minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xfff00) << 12)) as u32
}

fn attributes(number: u64, metadata: &Metadata) -> FileAttr {
    FileAttr {
        ino: INodeNo(number),
        size: metadata.size(),
        blocks: metadata.blocks(),
        atime: system_time(metadata.atime(), metadata.atime_nsec()),
        mtime: system_time(metadata.mtime(), metadata.mtime_nsec()),
        ctime: system_time(metadata.ctime(), metadata.ctime_nsec()),
        crtime: UNIX_EPOCH,
        kind: file_type(metadata.file_type()),
        perm: (metadata.mode() & 0o7777) as u16,
        nlink: metadata.nlink() as u32,
        uid: metadata.uid(),
        gid: metadata.gid(),
        rdev: device_number(metadata.rdev()),
        blksize: 4096,
        flags: 0,
    }
}

/// The answer for a name that does not exist: node 0 lets the kernel remember that for a while, as an NFS client does.
fn absent() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

fn reply_entry(reply: ReplyEntry, seen: Result<Seen, Errno>) {
    match seen {
        Ok(seen) => reply.entry(&LIFETIME, &attributes(seen.number, &seen.metadata), Generation(0)),
        Err(error) => reply.error(error),
    }
}

fn reply_attributes(reply: ReplyAttr, seen: Result<Seen, Errno>) {
    match seen {
        Ok(seen) => reply.attr(&LIFETIME, &attributes(seen.number, &seen.metadata)),
        Err(error) => reply.error(error),
    }
}

fn reply_empty(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

fn reply_opened(reply: ReplyOpen, handle: Result<u64, Errno>, flags: FopenFlags) {
    match handle {
        Ok(handle) => reply.opened(FileHandle(handle), flags),
        Err(error) => reply.error(error),
    }
}

fn maker(request: &Request, mode: u32, umask: u32) -> Maker {
    Maker { uid: request.uid(), gid: request.gid(), mode: mode & !umask & 0o7777 }
}

fn time(time: TimeOrNow) -> TimeSpec {
    match time {
        TimeOrNow::Now => TimeSpec::UTIME_NOW,
        TimeOrNow::SpecificTime(time) => TimeSpec::from_duration(time.duration_since(UNIX_EPOCH).unwrap_or_default()),
    }
}

impl Filesystem for Mirror {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = [
            InitFlags::FUSE_ASYNC_READ,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            // The kernel drops pages when size or time have changed: close-to-open consistency.
            InitFlags::FUSE_AUTO_INVAL_DATA,
        ];
        for flag in wanted {
            if config.add_capabilities(flag).is_err() {
                eprintln!("slowdisk: this kernel has no {flag:?}");
            }
        }
        let _ = config.set_max_write(self.read_ahead);
        if let Err(most) = config.set_max_readahead(self.read_ahead) {
            let _ = config.set_max_readahead(most);
        }
        let _ = config.set_max_background(BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let object = Object::Name(parent, name);
        let name = name.to_owned();
        let look_up = move |tree: &Tree| match tree.look_up(parent.0, &name) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            found => found.map(Some),
        };
        self.ask(Operation::Lookup, &object, look_up, move |found| match found.transpose() {
            Some(seen) => reply_entry(reply, seen),
            None => reply.entry(&LIFETIME, &absent(), Generation(0)),
        });
    }

    fn getattr(&self, _: &Request, node: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let object = Object::Node(node);
        self.ask(
            Operation::Attributes,
            &object,
            move |tree| tree.attributes(node.0),
            |seen| {
                reply_attributes(reply, seen);
            },
        );
    }

    fn setattr(
        &self,
        _: &Request,
        node: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let change = Change { mode, owner: (uid, gid), size, times: (atime.map(time), mtime.map(time)) };
        let set = move |tree: &Tree| tree.change(node.0, &change);
        self.ask(Operation::SetAttributes, &Object::Node(node), set, |seen| reply_attributes(reply, seen));
    }

    fn readlink(&self, _: &Request, node: INodeNo, reply: ReplyData) {
        self.ask(
            Operation::ReadLink,
            &Object::Node(node),
            move |tree| tree.link_target(node.0),
            |target| match target {
                Ok(target) => reply.data(target.as_encoded_bytes()),
                Err(error) => reply.error(error),
            },
        );
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let (name, maker) = (name.to_owned(), maker(request, mode, umask));
        let make = move |tree: &Tree| tree.make_directory(parent.0, &name, maker);
        self.ask(Operation::Create, &Object::Node(parent), make, |seen| reply_entry(reply, seen));
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let (name, target, maker) = (name.to_owned(), target.to_owned(), maker(request, 0o777, 0));
        let make = move |tree: &Tree| tree.make_symlink(parent.0, &name, &target, maker);
        self.ask(Operation::Create, &Object::Node(parent), make, |seen| reply_entry(reply, seen));
    }

    fn link(&self, _: &Request, node: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.to_owned();
        let make = move |tree: &Tree| tree.make_link(node.0, parent.0, &name);
        self.ask(Operation::Create, &Object::Node(parent), make, |seen| reply_entry(reply, seen));
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        let remove = move |tree: &Tree| tree.remove_file(parent.0, &name);
        self.ask(Operation::Remove, &Object::Node(parent), remove, |done| reply_empty(reply, done));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        let remove = move |tree: &Tree| tree.remove_directory(parent.0, &name);
        self.ask(Operation::Remove, &Object::Node(parent), remove, |done| reply_empty(reply, done));
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if !flags.is_empty() {
            // NFS supports none of these flags either.
            return reply.error(Errno::EINVAL);
        }
        let (name, new_name) = (name.to_owned(), new_name.to_owned());
        let rename = move |tree: &Tree| tree.rename((parent.0, &name), (new_parent.0, &new_name));
        self.ask(Operation::Rename, &Object::Node(parent), rename, |done| reply_empty(reply, done));
    }

    fn open(&self, _: &Request, node: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let reading = flags.0 & libc::O_ACCMODE == libc::O_RDONLY;
        let operation = if reading { Operation::Open } else { Operation::OpenForWriting };
        let answer = |handle| reply_opened(reply, handle, FopenFlags::FOPEN_KEEP_CACHE);
        self.ask(operation, &Object::Node(node), move |tree| tree.open(node.0, flags.0), answer);
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (name, maker) = (name.to_owned(), maker(request, mode, umask));
        let create = move |tree: &Tree| tree.create(parent.0, &name, maker, flags);
        self.ask(Operation::Create, &Object::Node(parent), create, |created| match created {
            Ok((seen, handle)) => {
                let (attributes, flags) = (attributes(seen.number, &seen.metadata), FopenFlags::FOPEN_KEEP_CACHE);
                reply.created(&LIFETIME, &attributes, Generation(0), FileHandle(handle), flags);
            }
            Err(error) => reply.error(error),
        });
    }

    fn read(
        &self,
        _: &Request,
        node: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let read = move |tree: &Tree| tree.read(handle.0, offset, size as usize);
        self.carry(Operation::Read, &Object::Range(node, offset), read, Vec::len, |bytes| match bytes {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(error),
        });
    }

    fn write(
        &self,
        _: &Request,
        node: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let bytes = data.to_vec();
        let write = move |tree: &Tree| tree.write(handle.0, offset, &bytes).map(|()| bytes.len());
        self.carry(
            Operation::Write,
            &Object::Range(node, offset),
            write,
            |written| *written,
            |written| match written {
                Ok(written) => reply.written(written as u32),
                Err(error) => reply.error(error),
            },
        );
    }

    fn fsync(&self, _: &Request, node: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        self.ask(
            Operation::Sync,
            &Object::Node(node),
            move |tree| tree.sync(handle.0),
            |done| reply_empty(reply, done),
        );
    }

    fn fsyncdir(&self, _: &Request, node: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.ask(
            Operation::Sync,
            &Object::Node(node),
            move |tree| tree.sync_directory(node.0),
            |done| reply_empty(reply, done),
        );
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.tree.close(handle.0);
        reply.ok();
    }

    fn opendir(&self, _: &Request, node: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let flags = FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR;
        let answer = move |handle| reply_opened(reply, handle, flags);
        self.ask(Operation::Open, &Object::Node(node), move |tree| tree.open_directory(node.0), answer);
    }

    fn readdir(&self, _: &Request, node: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        // The server sends the end of the list with the last names, so reading the end costs no request.
        if self.tree.listing(handle.0).is_ok_and(|names| offset > 0 && offset as usize >= names.len()) {
            return reply.ok();
        }
        self.ask(
            Operation::List,
            &Object::Node(node),
            move |tree| tree.listing(handle.0),
            move |names| match names {
                Ok(names) => {
                    for (index, entry) in names.iter().enumerate().skip(offset as usize) {
                        if reply.add(INodeNo(entry.number), index as u64 + 1, file_type(entry.kind), &entry.name) {
                            break;
                        }
                    }
                    reply.ok();
                }
                Err(error) => reply.error(error),
            },
        );
    }

    fn readdirplus(&self, _: &Request, node: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        if self.tree.listing(handle.0).is_ok_and(|names| offset > 0 && offset as usize >= names.len()) {
            return reply.ok();
        }
        let tree = Arc::clone(&self.tree);
        self.ask(
            Operation::List,
            &Object::Node(node),
            move |tree| tree.listing(handle.0),
            move |names| match names {
                Ok(names) => {
                    for (index, entry) in names.iter().enumerate().skip(offset as usize) {
                        // A name that was removed in the meantime is left out.
                        let Ok(seen) = tree.look_up(node.0, &entry.name) else { continue };
                        let (number, attributes) = (INodeNo(seen.number), attributes(seen.number, &seen.metadata));
                        if reply.add(number, index as u64 + 1, &entry.name, &LIFETIME, &attributes, Generation(0)) {
                            break;
                        }
                    }
                    reply.ok();
                }
                Err(error) => reply.error(error),
            },
        );
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.tree.close_directory(handle.0);
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let wire = Arc::clone(&self.wire);
        self.ask(Operation::Statistics, &Object::Disk, Tree::statistics, move |disk| match disk {
            Ok(disk) => {
                let free = if wire.is_full() { 0 } else { disk.blocks_available() };
                let (block, names) = (disk.fragment_size() as u32, disk.name_max() as u32);
                reply.statfs(disk.blocks(), free, free, disk.files(), disk.files_free(), block, names, block);
            }
            Err(error) => reply.error(error),
        });
    }
}
