//! The data files of native trees: a FUSE file system of its own, for the kernel alone.
//!
//! It is mounted nowhere. The keeper and the worker have the only descriptors of the mount. The worker names a data file to the kernel by a path through it
//! (`/proc/PID/fd/N/NUMBER`), when it mounts the native tree on top. So nobody else can open one, however the mount of the images
//! is configured, except as the loop device that some kernels need it to be. A data file has no page cache: reads are direct, and what they bring is kept by the file system on top.
//!
//! A file is known from [`DataFiles::add`] until the kernel closes it, which is when the last mount on top of it is gone, container
//! and all. So the files that are known say exactly which layers native trees use. They are recorded, because they stay open when the
//! worker dies. What a file consists of is then found when it is first read.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use erofs::BLOCK;
use fuser::{
    Errno, FileAttr, FileHandle, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, Request, SessionACL,
};
use parking_lot::Mutex;
use rustix::mount::{self, FsMountFlags, FsOpenFlags, MountAttrFlags};
use store::Digest;
use store::layer::S_IFREG;

use crate::filesystem::Filesystem;
use crate::filesystem::kernel_state::{Connection, KernelState, Record};
use crate::filesystem::native_tree::ChainContent;
use crate::filesystem::node::{Attributes, Node};
use crate::mount::connection::{self, RESENT};
use crate::mount::fuse::{BACKGROUND, FOREVER, READ_MAX, errno, numbered};
use crate::mount::mountpoint;
use crate::source::failure::{Failure, Result};

/// A data file that the kernel may open.
#[derive(Debug)]
struct DataFile {
    chain: Digest,
    /// Nothing until the file is first read, if an earlier worker has made it known.
    content: Option<Arc<ChainContent>>,
    /// Its length, bytes.
    len: u64,
    /// How often it is open. Who has made it known counts too: a loop device may be tried more than once.
    opens: u64,
}

#[derive(Debug, Default)]
struct Table {
    files: HashMap<u64, DataFile>,
    last: u64,
    /// The requests that an earlier worker has counted: the kernel may send the last of them once more.
    counted: HashSet<u64>,
}

/// A connection and its mount.
#[derive(Debug)]
pub struct DataMount {
    /// The FUSE device.
    pub device: OwnedFd,
    /// The mount.
    pub mount: OwnedFd,
}

/// Has the keeper let go of the mount.
pub type LetGo = Box<dyn Fn() + Send + Sync>;

/// Serves the data files.
pub struct DataFiles {
    /// Guards the mount, until no further file is to be opened.
    mount: Mutex<Option<Arc<OwnedFd>>>,
    let_go: LetGo,
    /// Guards the files that are known. Never held during I/O; taken before the records' lock.
    table: Arc<Mutex<Table>>,
    /// Guards the thread that serves, until somebody waits for its end.
    thread: Mutex<Option<JoinHandle<()>>>,
    filesystem: Arc<Filesystem>,
    state: Arc<KernelState>,
}

/// A data file that was made known. Keeps the path usable; when it is dropped the kernel must have opened the file.
#[derive(Debug)]
pub struct Added {
    number: u64,
    /// The path at which this process, its children, and the kernel on their behalf can open it.
    pub path: PathBuf,
    table: Arc<Mutex<Table>>,
    _mount: Arc<OwnedFd>,
}

impl Drop for Added {
    fn drop(&mut self) {
        self.table.lock().close(self.number);
    }
}

impl Table {
    /// Counts one open less; a file that is not open any more is forgotten.
    fn close(&mut self, number: u64) {
        if let Some(file) = self.files.get_mut(&number) {
            file.opens = file.opens.saturating_sub(1);
            if file.opens == 0 {
                self.files.remove(&number);
            }
        }
    }
}

impl Table {
    /// The files that an earlier worker has left open, and the last number that it has given.
    fn resume(state: &KernelState) -> Table {
        let mut table = Table::default();
        for record in &state.earlier {
            match record {
                Record::DataFile { number, chain, len } => {
                    table.files.insert(*number, DataFile { chain: *chain, content: None, len: *len, opens: 0 });
                    table.last = *number;
                }
                Record::DataFileOpened { number, request } if table.counted.insert(*request) => {
                    table.files.entry(*number).and_modify(|file| file.opens += 1);
                }
                Record::DataFileClosed { number, request } if table.counted.insert(*request) => {
                    table.files.entry(*number).and_modify(|file| file.opens = file.opens.saturating_sub(1));
                }
                _ => {}
            }
        }
        table.files.retain(|_, file| file.opens > 0);
        table
    }

    /// Whether a request is to be counted: it may be one that an earlier worker has counted and not answered.
    fn is_new(&self, request: RequestNumber) -> bool {
        request.0 & RESENT == 0 || !self.counted.contains(&request.without_mark())
    }
}

/// The number of a request, with the mark of one that is sent once more.
#[derive(Clone, Copy)]
struct RequestNumber(u64);

impl RequestNumber {
    fn without_mark(self) -> u64 {
        self.0 & !RESENT
    }
}

/// Makes the connection, and the mount that nobody sees.
pub fn mount() -> io::Result<DataMount> {
    let device = mountpoint::open_device()?;
    let context = mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let options = [
        ("source", "cachefs-data"),
        ("fd", &device.as_raw_fd().to_string()),
        ("rootmode", "40000"),
        // The kernel lets nobody open a file who has another user or group.
        ("user_id", &rustix::process::geteuid().as_raw().to_string()),
        ("group_id", &rustix::process::getegid().as_raw().to_string()),
    ];
    for (key, value) in options {
        mount::fsconfig_set_string(&context, key, value)?;
    }
    mount::fsconfig_create(&context)?;
    let flags = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mount = mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags)?;
    Ok(DataMount { device: device.into(), mount })
}

impl DataFiles {
    /// Serves a file system that [`mount`] has made, on `threads` threads, until the mount and everything on top of it is gone. `let_go` has
    /// others let go of the mount.
    pub fn serve(
        filesystem: Arc<Filesystem>,
        threads: usize,
        (made, let_go): (DataMount, LetGo),
        state: Arc<KernelState>,
    ) -> io::Result<DataFiles> {
        let table = Arc::new(Mutex::new(Table::resume(&state)));
        let adapter =
            Adapter { filesystem: Arc::clone(&filesystem), table: Arc::clone(&table), state: Arc::clone(&state) };
        let served = (SessionACL::Owner, threads);
        let connected = connection::connect(adapter, &made.device, served, Connection::Data, &state)?;
        let thread = std::thread::Builder::new().name("cachefs-data".to_owned()).spawn(move || {
            if let Err(error) = connected.session.run() {
                tracing::error!("the data files of native trees are no longer served: {error}");
            }
        })?;
        let (mount, thread) = (Mutex::new(Some(Arc::new(made.mount))), Mutex::new(Some(thread)));
        Ok(DataFiles { mount, let_go, table, thread, filesystem, state })
    }

    /// Makes a chain's data file known.
    pub fn add(&self, content: Arc<ChainContent>) -> Result<Added> {
        let mount = self.mount.lock().clone().ok_or(Failure::Absent)?;
        let mut table = self.table.lock();
        table.last += 1;
        let number = table.last + INodeNo::ROOT.0;
        let (chain, len) = (*content.chain(), content.blocks() * BLOCK);
        self.state.record(&Record::DataFile { number, chain, len });
        table.files.insert(number, DataFile { chain, content: Some(content), len, opens: 1 });
        let path = format!("/proc/{}/fd/{}/{number}", std::process::id(), mount.as_raw_fd()).into();
        Ok(Added { number, path, table: Arc::clone(&self.table), _mount: mount })
    }

    /// Lets nobody open a file any more, and waits until all that are open are closed.
    pub fn finish(&self) {
        drop(self.mount.lock().take());
        (self.let_go)();
        let thread = self.thread.lock().take();
        // The thread has logged why it ended, if there was a fault.
        let _ = thread.map(JoinHandle::join);
        // The kernel has let go of all files, and need not have said so of each.
        self.table.lock().files.clear();
    }

    /// The layers whose data files the kernel knows.
    pub fn in_use(&self) -> BTreeSet<Digest> {
        let table = self.table.lock();
        let chains: BTreeSet<Digest> = table.files.values().map(|file| file.chain).collect();
        drop(table);
        chains.iter().flat_map(|chain| self.filesystem.layers_of(chain)).collect()
    }
}

struct Adapter {
    filesystem: Arc<Filesystem>,
    table: Arc<Mutex<Table>>,
    state: Arc<KernelState>,
}

/// What the kernel sees of a data file: root alone may read it.
fn file_attributes(number: u64, len: u64) -> FileAttr {
    let of_root = Attributes::directory(Node::ROOT, (0, 0));
    numbered(
        INodeNo(number),
        &Attributes { mode: S_IFREG | 0o400, nlink: 1, size: len, blocks: len.div_ceil(512), ..of_root },
    )
}

impl fuser::Filesystem for Adapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Without this a read of which a part failed would come back short, and the file system on top would show zeros.
        if config.add_capabilities(InitFlags::FUSE_ASYNC_DIO).is_err() {
            return Err(io::Error::other("this kernel does not read data files asynchronously"));
        }
        let _ = config.set_max_write(READ_MAX);
        let _ = config.set_max_background(BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let number = name.to_str().and_then(|name| name.parse().ok());
        let found = number.and_then(|number| Some((number, self.table.lock().files.get(&number)?.len)));
        match found {
            Some((number, len)) => {
                reply.entry(&FOREVER, &file_attributes(number, len), Generation(0));
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        if number == INodeNo::ROOT {
            return reply.attr(&FOREVER, &numbered(number, &Attributes::directory(Node::ROOT, (0, 0))));
        }
        let len = self.table.lock().files.get(&number.0).map(|file| file.len);
        match len {
            Some(len) => reply.attr(&FOREVER, &file_attributes(number.0, len)),
            None => reply.error(Errno::ESTALE),
        }
    }

    fn open(&self, request: &Request, number: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let (number, request) = (number.0, RequestNumber(request.unique().0));
        let mut table = self.table.lock();
        let is_new = table.is_new(request);
        let known = table.files.get_mut(&number).map(|file| {
            if is_new {
                self.state.record(&Record::DataFileOpened { number, request: request.without_mark() });
                file.opens += 1;
            }
        });
        drop(table);
        match known {
            Some(()) => reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH),
            None => reply.error(Errno::ESTALE),
        }
    }

    fn release(
        &self,
        request: &Request,
        number: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        let (number, request) = (number.0, RequestNumber(request.unique().0));
        let mut table = self.table.lock();
        if table.is_new(request) {
            self.state.record(&Record::DataFileClosed { number, request: request.without_mark() });
            table.close(number);
        }
        drop(table);
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
        let known = self.table.lock().files.get(&number.0).map(|file| (file.chain, file.content.clone()));
        let filesystem = Arc::clone(&self.filesystem);
        let answer = move |content: Result<Arc<ChainContent>>| match content {
            Ok(content) => filesystem.read_data(&content, offset, size as usize, move |read| match read {
                Ok(bytes) => reply.data(bytes),
                Err(failure) => reply.error(errno(&failure)),
            }),
            Err(failure) => reply.error(errno(&failure)),
        };
        let (chain, content) = match known {
            Some((chain, content)) => (chain, content),
            None => return answer(Err(Failure::UnknownNode)),
        };
        if let Some(content) = content {
            return answer(Ok(content));
        }
        let table = Arc::clone(&self.table);
        self.filesystem.content_of_chain(chain, move |content| {
            if let Ok(found) = &content {
                table.lock().files.entry(number.0).and_modify(|file| file.content = Some(Arc::clone(found)));
            }
            answer(content);
        });
    }
}
