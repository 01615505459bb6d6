//! Daemons that were unmounted while something still used the mount. No table of mounts lists them, so they are found
//! among the processes.
//!
//! A daemon holds the lock of its cache directory open, and that path tells where its control socket is. Only processes
//! of this user in this mount namespace are looked at: others (containers) could claim anything, and their paths mean
//! something else here.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use cachefs::mount::control_socket::{self, Request, Status};

/// The daemons on this host that still run after their unmount.
pub(crate) fn daemons() -> Vec<Status> {
    let own = fs::read_link("/proc/self/ns/mnt").ok();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path());
    let daemons = processes.filter(|process| is_daemon(process, own.as_deref())).filter_map(|process| ask(&process));
    // A daemon's keeper and its worker both hold the lock.
    let daemons: BTreeMap<u32, Status> = daemons.map(|status| (status.pid, status)).collect();
    daemons.into_values().filter(|status| status.unmounted).collect()
}

/// Whether a process, given by its directory in `/proc`, may be one of our daemons.
fn is_daemon(process: &Path, namespace: Option<&Path>) -> bool {
    let is_ours = fs::metadata(process).is_ok_and(|meta| meta.uid() == nix::unistd::geteuid().as_raw());
    is_ours
        && fs::read(process.join("comm")).is_ok_and(|name| name.trim_ascii() == b"cachefs")
        && fs::read_link(process.join("ns/mnt")).ok().as_deref() == namespace
}

/// Asks the daemon of the cache directory whose lock the process holds open.
fn ask(process: &Path) -> Option<Status> {
    let open = fs::read_dir(process.join("fd")).ok()?.flatten();
    let paths = open.filter_map(|entry| fs::read_link(entry.path()).ok());
    let mut caches = paths.filter(|path| path.file_name() == Some(OsStr::new("lock"))).filter_map(cache);
    caches.find_map(|cache| control_socket::ask(&cache, &Request::Status).ok())
}

fn cache(lock: PathBuf) -> Option<PathBuf> {
    lock.parent().map(Path::to_owned)
}
