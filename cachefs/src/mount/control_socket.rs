//! The daemon's control socket: a client sends one request as a line of JSON, and is answered with lines of JSON.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use store::Digest;

use crate::filesystem::io_mode::OpenMode;
use crate::filesystem::tree_mounter::Way;
use crate::os::private_files;
use crate::source::metrics::Snapshot;
use crate::uplink::recorder::ContainerStart;

const SOCKET: &str = "control.sock";
/// The longest request that is read, bytes.
const REQUEST_MAX: u64 = 64 << 10;
/// How long a client waits for an answer, and the daemon for a client.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A client's request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// The daemon's [`Status`].
    Status,
    /// The last starts on this host, a list of [`NamedStart`].
    Starts,
    /// Fetch an image's layers into the local cache; answered with [`Advance`], again and again.
    Prefetch {
        /// The image, as people write it.
        image: String,
    },
    /// Where the merged tree of a chain is: a [`ChainTree`], or null if the store does not hold the chain.
    Tree {
        /// The chainID.
        chain: Digest,
    },
}

/// The merged tree of a chain's layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainTree {
    /// Its root directory, in the mount.
    pub path: PathBuf,
    /// The diffIDs of its layers, the base first.
    pub layers: Vec<Digest>,
}

/// A start, and the images that it may have been of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedStart {
    /// Their names in the store now; none if they were removed.
    pub images: Vec<String>,
    /// The start.
    #[serde(flatten)]
    pub start: ContainerStart,
}

/// How far a prefetch is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advance {
    /// Chunks of the image's layers.
    pub chunks: u64,
    /// Those that have been requested, or were here already.
    pub done: u64,
    /// Those that were requested and are not here: the cache has no room for them, or they could not be read.
    #[serde(default)]
    pub lacking: u64,
    /// Why the prefetch cannot be done.
    pub error: Option<String>,
    /// Whether this is the last answer.
    pub is_over: bool,
}

/// The answers to a request, one document per line.
pub struct Answers(Box<dyn Iterator<Item = serde_json::Result<Vec<u8>>>>);

impl Answers {
    /// One document.
    pub fn one(document: &impl Serialize) -> Answers {
        Answers(Box::new(std::iter::once(serde_json::to_vec(document))))
    }

    /// As many documents as `next` returns.
    pub fn many<T: Serialize>(next: impl FnMut() -> Option<T> + 'static) -> Answers {
        Answers(Box::new(std::iter::from_fn(next).map(|document| serde_json::to_vec(&document))))
    }
}

/// The kind of tree that engines are given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TreeKind {
    /// An EROFS file system for each image.
    Native,
    /// The same on loop devices.
    Loop,
    /// The mount's own tree.
    #[default]
    Fuse,
}

impl From<Way> for TreeKind {
    fn from(way: Way) -> TreeKind {
        match way {
            Way::Files => TreeKind::Native,
            Way::Loops => TreeKind::Loop,
        }
    }
}

/// What engines are given as an image's tree.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeStatus {
    /// The kind.
    pub kind: TreeKind,
    /// Why it is not a native tree.
    pub why: Option<String>,
    /// How many native trees are mounted.
    pub mounted: usize,
}

/// The state of one daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// The id of the process that keeps the mount.
    pub pid: u32,
    /// The id of the process that serves it now.
    #[serde(default)]
    pub worker: u32,
    /// How often that process has died and another one has taken its place.
    #[serde(default)]
    pub restarts: u32,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// Whether it was unmounted there, and goes on until the containers that use it end.
    #[serde(default)]
    pub unmounted: bool,
    /// The shared store.
    pub store: PathBuf,
    /// Seconds since the shared store last answered; nothing if it has not yet.
    pub store_answered_seconds_ago: Option<u64>,
    /// The coordinator's address, as it was given.
    pub coordinator: Option<String>,
    /// Seconds since the coordinator last renewed this host's lease; nothing if it has not yet.
    #[serde(default)]
    pub lease_renewed_seconds_ago: Option<u64>,
    /// Why the last renewal failed, if it did.
    #[serde(default)]
    pub lease_error: Option<String>,
    /// How opens of files are answered.
    pub open: OpenMode,
    /// What engines are given as an image's tree.
    #[serde(default)]
    pub tree: TreeStatus,
    /// The newest generation of the catalogue that was seen.
    pub generation: u64,
    /// Images in it.
    pub images: usize,
    /// Layers whose index was loaded.
    pub layers_opened: usize,
    /// Chains that have been looked into.
    pub chains_opened: usize,
    /// The local cache.
    pub cache: PathBuf,
    /// How much space the local cache takes, bytes.
    pub cache_used: u64,
    /// The most space that the local cache may take, bytes.
    pub cache_limit: u64,
    /// Counters since the daemon started.
    pub counters: Snapshot,
}

/// Calls `action` with a path of the socket that is short enough for a socket address, however deep the directory lies.
fn with_short_path<T>(cache: &Path, action: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let directory = File::open(cache)?;
    action(&PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(SOCKET))
}

/// Listens in the cache directory. The caller holds its lock, so an existing socket belongs to nobody and is removed.
pub fn listen(cache: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(cache.join(SOCKET)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => with_short_path(cache, |path| {
            let listener = UnixListener::bind(path)?;
            // Nobody else can have connected before: nobody else enters the directory.
            private_files::close_file(path)?;
            Ok(listener)
        }),
    }
}

/// Answers clients for ever, each on a thread of its own, because some answers take long.
pub fn serve(listener: &UnixListener, answer: impl Fn(Request) -> Answers + Send + Sync + 'static) {
    let answer = Arc::new(answer);
    for stream in listener.incoming() {
        let answer = Arc::clone(&answer);
        let serve = move || {
            if let Err(error) = stream.and_then(|stream| converse(stream, &*answer)) {
                tracing::debug!("the control socket: {error}");
            }
        };
        if let Err(error) = std::thread::Builder::new().name("cachefs-client".into()).spawn(serve) {
            tracing::warn!("a client of the control socket is not answered: {error}");
        }
    }
}

fn converse(mut stream: UnixStream, answer: &dyn Fn(Request) -> Answers) -> io::Result<()> {
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let mut line = String::new();
    BufReader::new(stream.try_clone()?.take(REQUEST_MAX)).read_line(&mut line)?;
    for document in answer(serde_json::from_str(&line)?).0 {
        let mut document = document?;
        document.push(b'\n');
        stream.write_all(&document)?;
    }
    Ok(())
}

/// Removes the socket.
pub fn remove(cache: &Path) {
    let _ = std::fs::remove_file(cache.join(SOCKET));
}

/// Sends the daemon of a cache directory a request that has one answer.
pub fn ask<T: DeserializeOwned>(cache: &Path, request: &Request) -> io::Result<T> {
    let mut answers = follow(cache, request)?;
    answers.next().unwrap_or_else(|| Err(io::ErrorKind::UnexpectedEof.into()))
}

/// Sends the daemon of a cache directory a request that has many answers.
pub fn follow<T: DeserializeOwned>(
    cache: &Path,
    request: &Request,
) -> io::Result<impl Iterator<Item = io::Result<T>> + use<T>> {
    let mut stream = with_short_path(cache, |path| UnixStream::connect(path))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    Ok(BufReader::new(stream).lines().map(|line| serde_json::from_str(&line?).map_err(io::Error::other)))
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
            worker: 8,
            restarts: 0,
            mountpoint: "/m".into(),
            unmounted: false,
            store: "/s".into(),
            store_answered_seconds_ago: Some(1),
            coordinator: None,
            lease_renewed_seconds_ago: Some(2),
            lease_error: None,
            open: OpenMode::NoOpen,
            tree: TreeStatus::default(),
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
        std::thread::spawn(move || {
            serve(&listener, move |request| match request {
                Request::Status => Answers::one(&answer),
                Request::Tree { chain } => Answers::one(&chain),
                Request::Starts => Answers::one(&Vec::<NamedStart>::new()),
                Request::Prefetch { image } => {
                    let mut left = image.len();
                    Answers::many(move || {
                        left = left.checked_sub(1)?;
                        Some(left)
                    })
                }
            });
        });
        assert_eq!(ask::<Status>(&deep, &Request::Status).unwrap(), status);
        assert!(ask::<Vec<NamedStart>>(&deep, &Request::Starts).unwrap().is_empty());
        let many = follow::<usize>(&deep, &Request::Prefetch { image: "abc".into() }).unwrap();
        assert_eq!(many.collect::<io::Result<Vec<_>>>().unwrap(), [2, 1, 0]);
        remove(&deep);
        assert!(ask::<Status>(&deep, &Request::Status).is_err());
    }
}
