//! What container engines leave behind when they end: shims, and what runs in their containers.

use std::path::Path;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::process::{TIMEOUT, wait_until};

/// The programs of an engine that outlive it.
const PROGRAMS: [&str; 4] = ["containerd", "containerd-shim", "runc", "docker-proxy"];

/// Ends the processes of the engine whose programs name `directory` in their command lines, and what runs below them.
pub fn end_processes(directory: &Path) {
    let gone = wait_until("the end of all processes of an engine", TIMEOUT, || {
        let left = owned_processes(directory)?;
        for pid in &left {
            let _ = kill(*pid, Signal::SIGKILL);
        }
        Ok(left.is_empty())
    });
    if let Err(error) = gone {
        eprintln!("{error:#}");
    }
}

/// The processes of the engine: its containerd, its shims, and what runs in their containers.
fn owned_processes(directory: &Path) -> Result<Vec<Pid>> {
    let marker = directory.to_string_lossy().into_owned();
    let mut parents = Vec::new();
    let mut owned = Vec::new();
    for entry in std::fs::read_dir("/proc").context("cannot list processes")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        // If a process ends during this loop, its command line is empty and it does not count.
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        let program = line.split('\0').next().unwrap_or("");
        let known = Path::new(program).file_name().and_then(|name| name.to_str());
        if known.is_some_and(|name| PROGRAMS.iter().any(|prefix| name.starts_with(prefix))) && line.contains(&marker) {
            owned.push(pid);
        }
        let status = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let fields = status.rsplit_once(')').map_or("", |(_, rest)| rest);
        let mut fields = fields.split_whitespace();
        // A zombie is dead already, and its parent will reap it.
        if fields.next().is_some_and(|state| state != "Z") {
            parents.push((pid, fields.next().and_then(|parent| parent.parse::<i32>().ok())));
        }
    }
    let mut index = 0;
    while let Some(parent) = owned.get(index).copied() {
        owned.extend(parents.iter().filter(|(_, of)| *of == Some(parent)).map(|(pid, _)| *pid));
        index += 1;
    }
    owned.sort_unstable();
    owned.dedup();
    let alive = |pid: &i32| parents.iter().any(|(other, _)| other == pid);
    Ok(owned.into_iter().filter(alive).map(Pid::from_raw).collect())
}
