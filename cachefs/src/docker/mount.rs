//! The cachefs mount that an engine's images lie in: whether it is there, and whether it answers.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use snapshotter::bounded::Bounded;

use crate::mount::control_socket;
use crate::mount::control_socket::{Request, Status};
use crate::mount::mountpoint;
use crate::uplink::lease::roots;

/// How long a mount may take to show its top directory before it counts as hung.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Why a mount point cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The mount point serves no layers.
    #[error("{} is not a cachefs mount: run cachefs mount {} --store DIR --cache DIR first", .0.display(), .0.display())]
    NotMounted(PathBuf),
    /// Its path cannot be followed.
    #[error("cannot open {}: {source}", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

/// The state of a mount point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum State {
    /// It serves layers.
    Serving,
    /// A cachefs is mounted there, but its daemon does not answer.
    Dead,
    /// No cachefs is mounted there.
    Absent,
}

/// The path as the kernel names it, even if it cannot be reached any more.
pub(super) fn canonical(path: &Path) -> Result<PathBuf, MountError> {
    let known = mountpoint::canonical(path).ok();
    known.map_or_else(
        || std::path::absolute(path).map_err(|source| MountError::Path { path: path.to_owned(), source }),
        Ok,
    )
}

/// The state of the mount at a canonical path.
pub(super) fn state(path: &Path) -> State {
    let uppermost = mountpoint::mounted().into_iter().rfind(|mounted| mounted.path == path);
    if uppermost.is_none_or(|mounted| mounted.kind != mountpoint::TYPE) {
        return State::Absent;
    }
    let layers = path.join("layers");
    match Bounded::default().ask(TIMEOUT, || std::fs::symlink_metadata(layers)) {
        Ok(meta) if meta.is_dir() => State::Serving,
        _ => State::Dead,
    }
}

/// Checks that a mount point serves layers; returns its canonical path.
pub(super) fn serving(path: &Path) -> Result<PathBuf, MountError> {
    let path = canonical(path)?;
    match state(&path) {
        State::Serving => Ok(path),
        _ => Err(MountError::NotMounted(path)),
    }
}

/// The cache directory behind a mount that serves.
pub(super) fn cache(path: &Path) -> Option<PathBuf> {
    let cache = xattr::get(path, "user.cachefs.cache").ok().flatten()?;
    Some(OsString::from_vec(cache).into())
}

/// Lets `action` work with the mount's cache directory, after the root of an engine is noted there: the daemon then holds the
/// layers that the root has links to. A mount that hangs is given up.
pub(super) fn with_cache<R: Send + 'static>(
    bounded: &Bounded,
    (mountpoint, root): (&Path, &Path),
    action: impl FnOnce(&Path) -> io::Result<R> + Send + 'static,
) -> io::Result<R> {
    let (mountpoint, root) = (mountpoint.to_owned(), root.to_owned());
    bounded.ask(TIMEOUT, move || {
        let cache = cache(&mountpoint).ok_or(io::ErrorKind::NotConnected)?;
        roots::register(&cache, &root)?;
        action(&cache)
    })
}

/// The store behind a mount that serves, as its daemon says.
pub(super) fn store(path: &Path) -> Option<PathBuf> {
    let status: Option<Status> = control_socket::ask(&cache(path)?, &Request::Status).ok();
    status.map(|status| status.store)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_no_mount() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("layers")).unwrap();
        assert_eq!(state(dir.path()), State::Absent);
        assert!(serving(dir.path()).unwrap_err().to_string().contains("is not a cachefs mount: run cachefs mount"));
    }
}
