//! A slow disk: a directory mirrored through FUSE as an NFS client would show it, with a latency for each request, one
//! bandwidth for all requests together, and faults on command.
//!
//! Every request that reaches the server waits one latency in parallel with all others, as requests on a network do.
//! Bytes then take their turn on one wire. What an NFS client answers by itself, the kernel answers here too:
//! attributes and names for [`mirror::LIFETIME`], and pages across opens while size and time stay the same.
//!
//! - [`queue`]: work that is due at a given time. [`timeline`]: what was asked and when. [`wire`]: the disk's current
//!   state, and counts of requests.
//! - [`tree`]: the directory behind it, as plain files. [`mirror`]: the adapter to FUSE. [`control`]: commands.
//!
//! The directory behind it must be one file system. Extended attributes, locks and device nodes are not passed on.
//! Unlike those of an NFS client, requests that hang cannot be interrupted, so processes that wait for them cannot be
//! killed.

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::quantity;

mod control;
mod mirror;
mod queue;
mod timeline;
mod tree;
mod wire;

use wire::Wire;

/// The most that the kernel requests at once, bytes: the usual `rsize`.
const READ_MAX: u32 = 1 << 20;

/// What a slow disk is started with.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The directory to show
    source: PathBuf,
    /// An empty directory to mount on
    mountpoint: PathBuf,
    /// What each request waits
    #[arg(long, default_value = "2ms", value_parser = quantity::duration)]
    latency: Duration,
    /// Bytes a second of all requests together, such as 100M [default: unlimited]
    #[arg(long, value_parser = quantity::rate)]
    bandwidth: Option<u64>,
    /// Show the directory this many times, as 0, 1 ..., each with a page cache of its own, like as many clients
    #[arg(long, default_value_t = 0)]
    copies: usize,
    /// How far the kernel reads ahead, KiB; NFS clients since Linux 5.4 do 128, earlier ones more than 1024
    #[arg(long, default_value_t = 1024)]
    read_ahead_kib: u32,
    /// A unix socket for commands (`bench slowdisk-control`); it answers once the disk is mounted
    #[arg(long)]
    control: Option<PathBuf>,
    /// Print what was asked of the disk when it ends
    #[arg(long)]
    stats: bool,
}

/// Serves until SIGTERM or until it is unmounted.
pub(crate) fn serve(arguments: &Arguments) -> Result<()> {
    // The default timer slack of 50 us would be a quarter of the smallest latency. Threads inherit this value.
    nix::sys::prctl::set_timerslack(1000)?;
    // The kernel has already applied the caller's umask to modes.
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    let source = arguments.source.canonicalize();
    let source = source.with_context(|| format!("cannot show {}", arguments.source.display()))?;
    let mountpoint = arguments.mountpoint.canonicalize();
    let mountpoint = mountpoint.with_context(|| format!("cannot mount on {}", arguments.mountpoint.display()))?;
    let tree = tree::Tree::new(&source, arguments.copies)?;
    let wire = Arc::new(Wire::new(arguments.latency, arguments.bandwidth));
    let device = attach(&mountpoint)?;
    let end = End { mountpoint, control: arguments.control.clone(), stats: arguments.stats, wire: Arc::clone(&wire) };
    let served = mirror::Server::new(tree, Arc::clone(&wire), device, READ_MAX).map_err(anyhow::Error::from);
    let served = served.and_then(|server| {
        end.at_signal()?;
        let (mountpoint, control, kib) = (end.mountpoint.clone(), end.control.clone(), arguments.read_ahead_kib);
        std::thread::spawn(move || {
            if let Err(error) = read_ahead(&mountpoint, kib) {
                eprintln!("slowdisk: the kernel reads ahead as it does for FUSE: {error:#}");
            }
            if let Some(Err(error)) = control.map(|socket| listen(&socket, &wire)) {
                eprintln!("slowdisk: takes no commands: {error:#}");
            }
        });
        server.run().context("the connection to the kernel broke")
    });
    end.come();
    served
}

/// What has to be cleaned up at the end.
#[derive(Clone)]
struct End {
    mountpoint: PathBuf,
    control: Option<PathBuf>,
    stats: bool,
    wire: Arc<Wire>,
}

impl End {
    /// Ends the process at SIGTERM or SIGINT, also while it hangs. Processes with open files then see a disk that is gone.
    fn at_signal(&self) -> Result<()> {
        let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT])?;
        let end = self.clone();
        std::thread::spawn(move || {
            signals.forever().next();
            end.come();
            std::process::exit(0);
        });
        Ok(())
    }

    fn come(&self) {
        let _ = umount2(&self.mountpoint, MntFlags::MNT_DETACH);
        if let Some(socket) = &self.control {
            let _ = std::fs::remove_file(socket);
        }
        if self.stats {
            println!("{}", self.wire.statistics());
        }
    }
}

/// Mounts, and returns the FUSE connection.
fn attach(mountpoint: &Path) -> Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse").context("cannot open /dev/fuse")?;
    let options =
        format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions", device.as_raw_fd());
    mount(Some("slowdisk"), mountpoint, Some("fuse.slowdisk"), MsFlags::empty(), Some(options.as_str()))
        .with_context(|| format!("cannot mount on {}", mountpoint.display()))?;
    Ok(device.into())
}

/// Sets how far the kernel reads ahead on a mounted disk, KiB. FUSE by itself allows no more than 128.
pub(crate) fn read_ahead(mountpoint: &Path, kib: u32) -> Result<()> {
    let device = mountpoint.metadata()?.dev();
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let file = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    std::fs::write(&file, kib.to_string()).with_context(|| format!("cannot write {file}"))
}

fn listen(socket: &Path, wire: &Wire) -> Result<()> {
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
    control::serve(&listener, wire);
    Ok(())
}
