//! A shared disk that is slow or fails: `bench slowdisk`, which mirrors a directory through FUSE as an NFS client would show it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::cluster::binary;
use crate::mounts;
use crate::process::{Process, TIMEOUT};

/// What can be wrong with a slow disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFault {
    /// Every request fails with EIO.
    Eio,
    /// Every request fails with ESTALE.
    Estale,
    /// No request is answered while this lasts.
    Hang,
    /// Changes fail with EROFS.
    ReadOnly,
    /// Requests that need space fail with ENOSPC.
    Enospc,
}

impl DiskFault {
    fn command(self) -> &'static str {
        match self {
            DiskFault::Eio => "eio",
            DiskFault::Estale => "estale",
            DiskFault::Hang => "hang",
            DiskFault::ReadOnly => "readonly",
            DiskFault::Enospc => "enospc",
        }
    }
}

/// Counts of the requests to a slow disk since its start or [`SlowDisk::reset`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskStats {
    /// Requests of all kinds. Each of them waited one latency.
    pub requests: u64,
    /// Bytes that were read.
    pub bytes_read: u64,
    /// Bytes that were written.
    pub bytes_written: u64,
    /// Requests of each kind: `lookup`, `getattr`, `open`, `read` ...
    pub operations: Value,
}

/// One request to a slow disk.
#[derive(Debug, Clone, PartialEq, serde::Deserialize)]
pub struct Asked {
    /// When it was asked, milliseconds since [`SlowDisk::record`].
    pub at_ms: f64,
    /// How long it waited for its answer; nothing if it was not answered yet.
    pub wait_ms: Option<f64>,
    /// `lookup`, `getattr`, `open`, `read` ...
    pub kind: String,
    /// The path below the disk, and the offset of a read.
    pub object: String,
    /// Bytes that the answer carried.
    pub bytes: u64,
}

/// A running slow disk; unmounted when dropped, even while it hangs.
#[derive(Debug)]
pub struct SlowDisk {
    mountpoint: PathBuf,
    directory: TempDir,
    process: Process,
}

impl SlowDisk {
    /// Shows `source` at `mountpoint` (created if missing). Each request waits `latency`. `bandwidth` is in bytes a
    /// second for all requests together.
    pub fn start(source: &Path, mountpoint: &Path, latency: Duration, bandwidth: Option<u64>) -> Result<Self> {
        Self::start_copies(source, mountpoint, latency, bandwidth, 0)
    }

    /// The same, but the directories `0`, `1` ... below the mount point each show `source`. They behave like separate
    /// clients, since they do not share the kernel's caches.
    pub fn start_copies(
        source: &Path,
        mountpoint: &Path,
        latency: Duration,
        bandwidth: Option<u64>,
        copies: usize,
    ) -> Result<Self> {
        std::fs::create_dir_all(mountpoint).with_context(|| format!("cannot make {}", mountpoint.display()))?;
        let directory = tempfile::Builder::new().prefix("slowdisk-").tempdir()?;
        let socket = directory.path().join("control");
        let mut command = Command::new(binary("bench")?);
        command.arg("slowdisk").arg(source).arg(mountpoint).arg("--control").arg(&socket);
        command.args(["--latency", &format!("{}us", latency.as_micros()), "--copies", &copies.to_string()]);
        if let Some(bandwidth) = bandwidth {
            command.args(["--bandwidth", &bandwidth.to_string()]);
        }
        let mountpoint = mountpoint.canonicalize()?;
        let process = Process::spawn("bench slowdisk", &mut command, &directory.path().join("log"))?;
        let mut disk = Self { mountpoint, directory, process };
        disk.process.wait_ready(TIMEOUT, || Ok(UnixStream::connect(&socket).is_ok()))?;
        Ok(disk)
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        &self.mountpoint
    }

    /// The socket that takes commands.
    pub fn control(&self) -> PathBuf {
        self.directory.path().join("control")
    }

    /// Starts a fault, which replaces the current one.
    pub fn fault(&self, fault: DiskFault) -> Result<()> {
        command(&self.control(), fault.command()).map(drop)
    }

    /// Ends the current fault.
    pub fn recover(&self) -> Result<()> {
        command(&self.control(), "ok").map(drop)
    }

    /// Sets the latency of requests from now on.
    pub fn set_latency(&self, latency: Duration) -> Result<()> {
        command(&self.control(), &format!("latency {}us", latency.as_micros())).map(drop)
    }

    /// Sets the bandwidth from now on, bytes a second. `None` means no limit.
    pub fn set_bandwidth(&self, bandwidth: Option<u64>) -> Result<()> {
        let value = bandwidth.map_or("unlimited".to_owned(), |bandwidth| bandwidth.to_string());
        command(&self.control(), &format!("bandwidth {value}")).map(drop)
    }

    /// The counts so far.
    pub fn stats(&self) -> Result<DiskStats> {
        let answer: Value = serde_json::from_str(&command(&self.control(), "stats")?)?;
        let number = |name: &str| answer[name].as_u64().with_context(|| format!("no {name} in {answer}"));
        Ok(DiskStats {
            requests: number("requests")?,
            bytes_read: number("bytes_read")?,
            bytes_written: number("bytes_written")?,
            operations: answer["operations"].clone(),
        })
    }

    /// Resets the counts to zero.
    pub fn reset(&self) -> Result<()> {
        command(&self.control(), "reset").map(drop)
    }

    /// Records all requests from now on.
    pub fn record(&self) -> Result<()> {
        command(&self.control(), "record").map(drop)
    }

    /// Ends recording, and returns the requests in the order in which they came.
    pub fn timeline(&self) -> Result<Vec<Asked>> {
        Ok(serde_json::from_str(&command(&self.control(), "timeline")?)?)
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        // A disk that hangs cannot end in an orderly way, so the fault ends first.
        let _ = self.recover();
        let asked = self.process.signal(Signal::SIGTERM).is_ok();
        if asked && self.process.wait(Duration::from_secs(10)).is_err() {
            let _ = self.process.kill();
        }
        mounts::detach_below(&self.mountpoint);
    }
}

/// Sends a command line to the slow disk behind a control socket and returns its answer.
pub fn command(socket: &Path, line: &str) -> Result<String> {
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("no slow disk listens on {}: is it mounted?", socket.display()))?;
    stream.write_all(format!("{line}\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    match answer.trim_end() {
        "" => bail!("the slow disk did not answer `{line}`"),
        answer if answer.starts_with("error: ") => bail!("the slow disk refused `{line}`: {}", &answer[7..]),
        answer => Ok(answer.to_owned()),
    }
}
