//! What processes have used so far according to `/proc`, and the kernel's caches.

use std::path::Path;

use anyhow::{Context, Result};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use tests::cluster::Mount;

/// Resident memory of a process, MiB.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Memory {
    /// All of it.
    pub(crate) resident: f64,
    /// Its own memory. The rest is mapped files, which the kernel can drop at any moment.
    pub(crate) anonymous: f64,
    /// The most that it ever had.
    pub(crate) peak: f64,
}

/// The memory of process `pid`.
pub(crate) fn memory(pid: u32) -> Result<Memory> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).context("the process has ended")?;
    let mib = |key: &str| -> Result<f64> {
        let line = text.lines().find_map(|line| line.strip_prefix(key)).with_context(|| format!("no {key}"))?;
        Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
    };
    Ok(Memory { resident: mib("VmRSS:")?, anonymous: mib("RssAnon:")?, peak: mib("VmHWM:")? })
}

/// The memory of what serves a mount: of the worker, and the keeper's own beside it.
pub(crate) fn memory_of_mount(mount: &mut Mount) -> Result<Memory> {
    let (worker, keeper) = (memory(mount.worker()?)?, memory(mount.process().pid())?);
    // The rest of the keeper is the same program.
    let with = |own: f64| own + keeper.anonymous;
    Ok(Memory { resident: with(worker.resident), anonymous: with(worker.anonymous), peak: with(worker.peak) })
}

/// Processor time of process `pid` and of its ended children, seconds.
pub(crate) fn cpu_seconds(pid: u32) -> Result<f64> {
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).context("the process has ended")?;
    let after_name = &stat[stat.rfind(')').context("no name")? + 1..];
    let ticks: f64 = after_name.split_whitespace().skip(11).take(4).filter_map(|n| n.parse::<f64>().ok()).sum();
    Ok(ticks / TICKS_PER_SECOND)
}

/// Processor time of all children of this process that have ended and were waited for, seconds.
pub(crate) fn cpu_of_ended_children() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).context("the kernel tells no usage")?;
    let seconds = |time: TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// How often process `pid` has called write and related system calls. A FUSE daemon does so once for every reply.
pub(crate) fn writes(pid: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io")).context("the process has ended")?;
    let calls = text.lines().find_map(|line| line.strip_prefix("syscw: ")).context("the kernel counts no writes")?;
    Ok(calls.parse()?)
}

/// Writes back dirty pages and empties the kernel's caches of pages, names and inodes.
pub(crate) fn drop_kernel_caches() -> Result<()> {
    nix::unistd::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("cannot drop the page cache: this needs root")
}

/// Bytes of all files below a directory.
pub(crate) fn bytes_below(dir: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        sum += if metadata.is_dir() { bytes_below(&entry.path())? } else { metadata.len() };
    }
    Ok(sum)
}
