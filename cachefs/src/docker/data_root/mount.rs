//! The cachefs mount that a data-root's layers lead into: is it there, and does it answer.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use serde::Serialize;

use super::error::{Error, Result};

/// How long a mount may take to list its top directory before it counts as hung.
const PATIENCE: Duration = Duration::from_secs(5);

/// How a mount point stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum State {
    /// It serves layers.
    Serving,
    /// Something of cachefs is mounted there, and its daemon does not answer.
    Dead,
    /// No cachefs is mounted there.
    Absent,
}

/// The path as the kernel names it, even if it cannot be reached any more.
pub(super) fn canonical(path: &Path) -> Result<PathBuf> {
    path.canonicalize().or_else(|_| std::path::absolute(path)).map_err(|e| Error::io("open", path, e))
}

/// How the mount at a canonical path stands.
pub(super) fn state(path: &Path) -> State {
    if !is_mounted(path) {
        return State::Absent;
    }
    let (sender, receiver) = mpsc::channel();
    let layers = path.join("layers");
    // A hung daemon holds the thread for ever; the process ends without it.
    std::thread::spawn(move || sender.send(std::fs::symlink_metadata(layers).is_ok_and(|meta| meta.is_dir())));
    match receiver.recv_timeout(PATIENCE) {
        Ok(true) => State::Serving,
        _ => State::Dead,
    }
}

/// Takes a mount point that serves layers.
pub(super) fn serving(path: &Path) -> Result<PathBuf> {
    let path = canonical(path)?;
    match state(&path) {
        State::Serving => Ok(path),
        _ => Err(Error::NotMounted { path }),
    }
}

fn is_mounted(path: &Path) -> bool {
    let text = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    let mounts = text.split(|b| *b == b'\n').filter_map(parse);
    mounts.filter(|mount| mount.path == path).next_back().is_some_and(|mount| mount.is_ours())
}

/// One line of `/proc/self/mountinfo`.
struct MountLine {
    path: PathBuf,
    kind: String,
    source: String,
}

impl MountLine {
    fn is_ours(&self) -> bool {
        self.kind == "fuse.cachefs" || self.kind == "fuse" && self.source.starts_with("cachefs")
    }
}

fn parse(line: &[u8]) -> Option<MountLine> {
    let fields: Vec<_> = line.split(|b| *b == b' ').collect();
    let dash = fields.iter().position(|field| *field == b"-")?;
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    Some(MountLine {
        path: PathBuf::from(OsString::from_vec(unescape(fields.get(4)?))),
        kind: text(fields.get(dash + 1)?),
        source: text(fields.get(dash + 2)?),
    })
}

/// The kernel writes white space and backslashes as `\ooo`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut at = 0;
    while at < field.len() {
        let digits = field.get(at + 1..at + 4).filter(|_| field[at] == b'\\');
        let value = digits.and_then(|d| std::str::from_utf8(d).ok()).and_then(|d| u8::from_str_radix(d, 8).ok());
        out.push(value.unwrap_or(field[at]));
        at += if value.is_some() { 4 } else { 1 };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel() {
        let line = parse(br"36 35 0:50 / /a\040b\134c rw,noatime shared:1 - fuse.cachefs cachefs rw").unwrap();
        assert_eq!(line.path, Path::new("/a b\\c"));
        assert!(line.is_ours());
        assert!(!parse(b"36 35 0:50 / / rw - ext4 /dev/vda rw").unwrap().is_ours());
    }

    #[test]
    fn a_directory_is_no_mount() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("layers")).unwrap();
        assert_eq!(state(dir.path()), State::Absent);
        assert!(serving(dir.path()).unwrap_err().to_string().contains("is not a cachefs mount: run cachefs mount"));
    }
}
