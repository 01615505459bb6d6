//! The daemon's control socket: whoever connects is told the daemon's state as one JSON document.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::OpenMode;
use crate::metrics::Snapshot;

const SOCKET: &str = "control.sock";
/// A daemon that does not answer within this is not well.
const PATIENCE: Duration = Duration::from_secs(5);

/// The state of one daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// The shared store.
    pub store: PathBuf,
    /// Seconds since the shared store last answered; nothing if it has not yet.
    pub store_answered_seconds_ago: Option<u64>,
    /// The coordinator's address, as it was given.
    pub coordinator: Option<String>,
    /// How opens of files are answered.
    pub open: OpenMode,
    /// The newest generation of the catalogue that was seen.
    pub generation: u64,
    /// Images in it.
    pub images: usize,
    /// Layers whose index is mapped.
    pub layers_opened: usize,
    /// Chains that have been looked into.
    pub chains_opened: usize,
    /// The local cache.
    pub cache: PathBuf,
    /// What it takes, bytes.
    pub cache_used: u64,
    /// The most that it may take, bytes.
    pub cache_limit: u64,
    /// Counters since the daemon started.
    pub counters: Snapshot,
}

/// Does something with a path of the socket that is short enough for a socket address, however deep the directory lies.
fn with_short_path<T>(cache: &Path, action: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let directory = File::open(cache)?;
    action(&PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(SOCKET))
}

/// Listens in the cache directory. The caller holds its lock, so a socket that is there is nobody's.
pub fn listen(cache: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(cache.join(SOCKET)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => with_short_path(cache, |path| UnixListener::bind(path)),
    }
}

/// Answers for ever.
pub fn serve(listener: &UnixListener, status: impl Fn() -> Status) {
    for stream in listener.incoming() {
        let answered = stream.and_then(|mut stream| {
            stream.set_write_timeout(Some(PATIENCE))?;
            stream.write_all(&serde_json::to_vec(&status())?)
        });
        if let Err(error) = answered {
            tracing::debug!("the control socket: {error}");
        }
    }
}

/// Removes the socket.
pub fn remove(cache: &Path) {
    let _ = std::fs::remove_file(cache.join(SOCKET));
}

/// Asks the daemon of a cache directory.
pub fn ask(cache: &Path) -> io::Result<Status> {
    let mut stream = with_short_path(cache, |path| UnixStream::connect(path))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    serde_json::from_slice(&answer).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_connects_is_told_even_deep_down() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let listener = listen(&deep).unwrap();
        let status = Status {
            version: "1".into(),
            pid: 7,
            mountpoint: "/m".into(),
            store: "/s".into(),
            store_answered_seconds_ago: Some(1),
            coordinator: None,
            open: OpenMode::NoOpen,
            generation: 3,
            images: 2,
            layers_opened: 1,
            chains_opened: 0,
            cache: deep.clone(),
            cache_used: 5,
            cache_limit: 10,
            counters: Snapshot::default(),
        };
        let answer = status.clone();
        std::thread::spawn(move || serve(&listener, || answer.clone()));
        assert_eq!(ask(&deep).unwrap(), status);
        remove(&deep);
        assert!(ask(&deep).is_err());
    }
}
