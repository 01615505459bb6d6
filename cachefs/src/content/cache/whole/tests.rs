//! Whole files in front of a real store, with a shared disk that fails on request.

use std::fs::File;
use std::io::Read;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use store::chunk::PIECE_SIZE;

use super::WholeFile;
use crate::content::cache::disk::Limit;
use crate::fixture::{Health, Host, TIMEOUT, TestStore, TreeEntry, cached, file, noise, plain};
use crate::source::failure::{Failure, Result};

const PIECE: usize = PIECE_SIZE as usize;
const LIMIT: Limit = Limit::Bytes(1 << 30);
const LONG: Duration = Duration::from_secs(30);

/// A store with one file in one layer, a cache directory, and hosts that come and go on them.
struct Bench {
    store: TestStore,
    cache: tempfile::TempDir,
    path: String,
}

impl Bench {
    fn new(entry: TreeEntry) -> Bench {
        let store = TestStore::new();
        let diff_id = store.layer(&plain(&[("f", entry)]));
        Bench { store, cache: tempfile::tempdir().unwrap(), path: format!("layers/{}/f", diff_id.hex()) }
    }

    fn host(&self, limit: Limit, timeout: Duration) -> Host {
        let host = Host::start(self.store.dir.path(), self.cache.path(), limit, timeout);
        // Loads the layer's index, before the shared disk fails.
        host.node(&self.path);
        host
    }

    fn ask(&self, host: &Host) -> Receiver<Result<Option<WholeFile>>> {
        let (send, receive) = channel();
        host.filesystem.whole_file(host.node(&self.path), move |whole| send.send(whole).unwrap());
        receive
    }

    /// Waits for what an open is given.
    fn whole(&self, host: &Host) -> Option<Vec<u8>> {
        self.ask(host).recv().unwrap().unwrap().as_ref().map(bytes)
    }

    /// Inverts a byte of the one cache file.
    fn damage(&self, at: usize) {
        let objects = cached(self.cache.path());
        let mut bytes = std::fs::read(&objects[0]).unwrap();
        bytes[at] = !bytes[at];
        std::fs::write(&objects[0], bytes).unwrap();
    }
}

/// The bytes that the kernel would read.
fn bytes(whole: &WholeFile) -> Vec<u8> {
    use std::os::fd::AsFd;
    let mut file = File::from(whole.as_fd().try_clone_to_owned().unwrap());
    std::io::Seek::rewind(&mut file).unwrap();
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

/// SEMANTICS: "What is passed through outlives its name in the cache."
#[test]
fn a_small_file_is_fetched_while_its_open_waits_and_is_written_once() {
    let bench = Bench::new(file(b"hello"));
    let host = bench.host(LIMIT, LONG);
    host.disk.set(Health::Hanging);
    let waiting: Vec<_> = (0..20).map(|_| bench.ask(&host)).collect();
    assert!(waiting.iter().all(|receive| receive.try_recv().is_err()), "the calls returned although nothing is here");
    host.disk.set(Health::Good);
    let files_given: Vec<_> = waiting.iter().map(|receive| receive.recv().unwrap().unwrap().unwrap()).collect();
    assert!(files_given.iter().all(|whole| bytes(whole) == b"hello"));
    host.settle();
    assert_eq!(host.chunks(), 1);
    let again = bench.ask(&host).try_recv().unwrap().unwrap().unwrap();
    assert_eq!(bytes(&again), b"hello", "now it is given at once");
    for path in cached(bench.cache.path()) {
        std::fs::remove_file(path).unwrap();
    }
    assert_eq!(bytes(&again), b"hello", "a removed file goes on");
}

#[test]
fn a_small_file_that_does_not_come_fails_its_open_in_time() {
    let bench = Bench::new(file(b"hello"));
    let host = bench.host(LIMIT, TIMEOUT);
    host.disk.set(Health::Hanging);
    let waiting = bench.ask(&host);
    std::thread::sleep(TIMEOUT);
    while host.cache.expire(std::time::Instant::now()) == 0 {
        std::thread::yield_now();
    }
    assert_eq!(waiting.recv().unwrap().err(), Some(Failure::TimedOut));
    host.disk.set(Health::Good);
    assert_eq!(bench.whole(&host).unwrap(), b"hello");
}

#[test]
fn what_the_cache_does_not_take_is_left_to_reads() {
    let bench = Bench::new(file(b"hello"));
    let host = bench.host(Limit::Bytes(0), LONG);
    assert_eq!((bench.whole(&host), host.chunks()), (None, 0));
    for content in [vec![], vec![0; 5000]] {
        let bench = Bench::new(file(&content));
        let host = bench.host(LIMIT, LONG);
        assert_eq!((bench.whole(&host), host.chunks()), (None, 0), "there is nothing to fetch");
    }
}

#[test]
fn a_large_file_is_whole_once_it_was_read_and_after_a_restart_once_it_was_verified() {
    let content = noise(3 * PIECE + 7, 1);
    let bench = Bench::new(file(&content));
    let host = bench.host(LIMIT, LONG);
    assert_eq!(bench.whole(&host), None);
    host.settle();
    assert_eq!(host.chunks(), 0, "what nobody has read is not fetched");
    host.read(host.node(&bench.path), 0, content.len()).unwrap();
    host.settle();
    assert_eq!(bench.whole(&host).unwrap(), content);
    let host = bench.host(LIMIT, LONG);
    assert_eq!(bench.whole(&host), None, "nothing is known of the file yet");
    host.settle();
    assert_eq!(bench.whole(&host).unwrap(), content);
    assert_eq!(host.chunks(), 0);
}

#[test]
fn a_file_that_is_here_by_half_is_completed_and_one_that_is_here_by_less_is_not() {
    let content = noise(6 * PIECE, 1);
    for (read, fetched) in [(2, 2), (3, 6), (5, 6)] {
        let bench = Bench::new(file(&content));
        let host = bench.host(LIMIT, LONG);
        host.read(host.node(&bench.path), 0, read * PIECE).unwrap();
        host.settle();
        assert_eq!(bench.whole(&host), None);
        host.settle();
        assert_eq!(host.chunks(), fetched, "after {read} pieces were read");
        assert_eq!(bench.whole(&host), (fetched == 6).then(|| content.clone()));
    }
}

#[test]
fn completing_ends_with_the_shared_disk() {
    let content = noise(4 * PIECE, 1);
    let bench = Bench::new(file(&content));
    let host = bench.host(LIMIT, TIMEOUT);
    host.read(host.node(&bench.path), 0, 2 * PIECE).unwrap();
    host.settle();
    host.disk.set(Health::Failing);
    assert_eq!(bench.whole(&host), None, "the open does not wait for that");
    while !host.cache.is_settled() {
        host.cache.expire(std::time::Instant::now());
        std::thread::yield_now();
    }
    host.disk.set(Health::Good);
    assert_eq!(bench.whole(&host), None);
    host.settle();
    assert_eq!(bench.whole(&host).unwrap(), content);
}

/// SEMANTICS: "With `passthrough`, a file is verified when it is opened."
#[test]
fn a_damaged_file_is_never_given() {
    for content in [noise(5000, 1), noise(3 * PIECE, 1)] {
        let bench = Bench::new(file(&content));
        let host = bench.host(LIMIT, LONG);
        host.read(host.node(&bench.path), 0, content.len()).unwrap();
        host.settle();
        drop(host);
        bench.damage(content.len() - 1);
        let host = bench.host(LIMIT, LONG);
        let given = bench.whole(&host);
        assert!(given.is_none_or(|given| given == content));
        host.settle();
        assert_eq!(host.metrics.damaged_in_cache.get(), 1);
        host.read(host.node(&bench.path), 0, content.len()).unwrap();
        host.settle();
        assert_eq!(bench.whole(&host).unwrap(), content);
    }
}

#[test]
fn a_sparse_file_is_whole_when_its_holes_are_verified_too() {
    let mut content = vec![0; 6 * PIECE];
    content[3 * PIECE..4 * PIECE].copy_from_slice(&noise(PIECE, 1));
    let bench = Bench::new(file(&content));
    let host = bench.host(LIMIT, LONG);
    host.read(host.node(&bench.path), 0, content.len()).unwrap();
    host.settle();
    assert_eq!(bench.whole(&host), None);
    host.settle();
    assert_eq!(bench.whole(&host).unwrap(), content);
    drop(host);
    bench.damage(PIECE);
    let host = bench.host(LIMIT, LONG);
    assert_eq!(bench.whole(&host), None);
    host.settle();
    assert_eq!((bench.whole(&host), host.metrics.damaged_in_cache.get()), (None, 1), "a hole that is none");
}
