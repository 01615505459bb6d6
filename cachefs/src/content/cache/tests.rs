//! The cache in front of a real store, with a shared disk that fails on request.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use store::chunk::PIECE_SIZE;

use super::disk::Limit;
use crate::fixture::{Health, Host, TIMEOUT, TestStore, TreeEntry, cached, file, noise, plain};
use crate::source::failure::Failure;

const PIECE: usize = PIECE_SIZE as usize;
const LIMIT: Limit = Limit::Bytes(1 << 30);
const LONG: Duration = Duration::from_secs(30);

/// A store with one layer, a cache directory, and the layer's path in the mount.
fn one_layer(entries: &[(&str, TreeEntry)]) -> (TestStore, tempfile::TempDir, String) {
    let store = TestStore::new();
    let diff_id = store.layer(&plain(entries));
    (store, tempfile::tempdir().unwrap(), format!("layers/{}", diff_id.hex()))
}

fn host(store: &TestStore, cache: &tempfile::TempDir) -> Host {
    Host::start(store.dir.path(), cache.path(), LIMIT, LONG)
}

#[test]
fn what_was_read_once_is_read_without_the_store_even_after_a_restart() {
    let large = noise(3 * PIECE + 5, 1);
    let (store, cache, layer) = one_layer(&[("large", file(&large)), ("small", file(b"hello"))]);
    let first = host(&store, &cache);
    for _ in 0..2 {
        assert_eq!(first.content(&format!("{layer}/large")).unwrap(), large);
        assert_eq!(first.content(&format!("{layer}/small")).unwrap(), b"hello");
        first.settle();
    }
    assert_eq!(first.chunks(), 5);
    let names: Vec<_> = cached(cache.path()).iter().map(|f| f.extension().is_none()).collect();
    assert_eq!(names, [true, true], "both are whole");
    drop(store);
    let second = Host::start(std::path::Path::new("/nowhere"), cache.path(), LIMIT, TIMEOUT);
    assert_eq!(second.content(&format!("{layer}/large")).unwrap(), large);
    assert_eq!(second.content(&format!("{layer}/small")).unwrap(), b"hello");
}

#[test]
fn small_files_of_one_chunk_come_together() {
    let names: Vec<_> = (0..40).map(|n| format!("f{n}")).collect();
    let mut entries: Vec<_> =
        names.iter().enumerate().map(|(n, name)| (&name[..], file(&noise(100 + n, n as u8)))).collect();
    entries.insert(20, ("directory", TreeEntry::Directory));
    entries.insert(30, ("empty", file(b"")));
    let (store, cache, layer) = one_layer(&entries);
    let host = host(&store, &cache);
    host.content(&format!("{layer}/f17")).unwrap();
    host.settle();
    for (n, name) in names.iter().enumerate() {
        assert_eq!(host.content(&format!("{layer}/{name}")).unwrap(), noise(100 + n, n as u8));
    }
    assert_eq!(host.content(&format!("{layer}/empty")).unwrap(), b"");
    assert_eq!(host.chunks(), 1);
}

#[test]
fn many_readers_of_a_chunk_cause_one_fetch_and_none_of_them_blocks() {
    let (store, cache, layer) = one_layer(&[("f", file(&noise(PIECE, 1)))]);
    let host = host(&store, &cache);
    let node = host.node(&format!("{layer}/f"));
    host.disk.set(Health::Hanging);
    let answered = std::sync::Arc::new(AtomicUsize::new(0));
    for n in 0..100 {
        let answered = answered.clone();
        // All these calls return although nothing can be read yet.
        host.filesystem.read(node, n * 10, 10, move |bytes| {
            assert_eq!(bytes.unwrap(), &noise(PIECE, 1)[n as usize * 10..][..10]);
            answered.fetch_add(1, Ordering::SeqCst);
        });
    }
    assert_eq!(answered.load(Ordering::SeqCst), 0);
    host.disk.set(Health::Good);
    host.settle();
    assert_eq!((answered.load(Ordering::SeqCst), host.chunks()), (100, 1));
}

/// SEMANTICS: "Holes are holes."
#[test]
fn holes_cost_nothing() {
    let mut content = vec![0; 10 * PIECE];
    content[5 * PIECE..6 * PIECE].copy_from_slice(&noise(PIECE, 1));
    let (store, cache, layer) = one_layer(&[("sparse", file(&content)), ("zeros", file(&[0; 500]))]);
    let host = host(&store, &cache);
    let node = host.node(&format!("{layer}/sparse"));
    assert_eq!(host.read(node, 0, 4 * PIECE).unwrap(), content[..4 * PIECE]);
    assert_eq!(host.content(&format!("{layer}/zeros")).unwrap(), [0; 500]);
    assert_eq!(host.chunks(), 0);
    assert_eq!(host.content(&format!("{layer}/sparse")).unwrap(), content);
    host.settle();
    assert_eq!(host.chunks(), 1);
    let used = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&cached(cache.path())[0]).unwrap());
    assert!(used * 512 < 2 * PIECE as u64, "holes take no room in the cache");
}

#[test]
fn a_damaged_cache_entry_is_fetched_again() {
    let large = noise(3 * PIECE, 1);
    let (store, cache, layer) = one_layer(&[("large", file(&large)), ("small", file(b"hello"))]);
    let fill = host(&store, &cache);
    for name in ["large", "small"] {
        fill.content(&format!("{layer}/{name}")).unwrap();
    }
    fill.settle();
    drop(fill);
    for path in cached(cache.path()) {
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.len() / 2;
        bytes[at] ^= 4;
        std::fs::write(&path, bytes).unwrap();
    }
    let host = host(&store, &cache);
    for _ in 0..2 {
        assert_eq!(host.content(&format!("{layer}/large")).unwrap(), large);
        assert_eq!(host.content(&format!("{layer}/small")).unwrap(), b"hello");
        host.settle();
    }
    assert_eq!(host.metrics.damaged_in_cache.get(), 2);
    for path in cached(cache.path()) {
        let name = path.file_name().unwrap().to_str().unwrap();
        assert_eq!(crate::fixture::hash_file(&path).unwrap().hex(), name);
    }
}

#[test]
fn a_truncated_cache_entry_is_fetched_again() {
    let (store, cache, layer) = one_layer(&[("f", file(b"hello"))]);
    host(&store, &cache).content(&format!("{layer}/f")).unwrap();
    let host = host(&store, &cache);
    while cached(cache.path()).is_empty() {
        std::thread::yield_now();
    }
    std::fs::write(&cached(cache.path())[0], b"he").unwrap();
    assert_eq!(host.content(&format!("{layer}/f")).unwrap(), b"hello");
}

/// SEMANTICS: "No byte that does not match its digest is ever shown"
#[test]
fn damage_in_the_store_is_an_error_and_never_wrong_bytes() {
    let (store, cache, layer) = one_layer(&[("f", file(&noise(5000, 1)))]);
    let host = host(&store, &cache);
    let node = host.node(&format!("{layer}/f"));
    store.damage_packs();
    assert_eq!(host.read(node, 0, 100), Err(Failure::Damaged));
    host.settle();
    assert_eq!(
        (host.requests(), host.metrics.damaged_in_store.get()),
        (4, 1),
        "read once more, each time through the name too, then given up"
    );
    store.damage_packs();
    assert_eq!(host.read(node, 0, 100).unwrap(), noise(5000, 1)[..100]);
}

#[test]
fn a_hung_disk_costs_uncached_reads_their_time_and_cached_ones_nothing() {
    let (store, cache, layer) =
        one_layer(&[("cached", file(&noise(PIECE + 1, 1))), ("uncached", file(&noise(PIECE + 1, 2)))]);
    let host = Host::start(store.dir.path(), cache.path(), LIMIT, TIMEOUT);
    let [cached, uncached] = ["cached", "uncached"].map(|name| host.node(&format!("{layer}/{name}")));
    host.read(cached, 0, 10).unwrap();
    host.settle();
    host.disk.set(Health::Hanging);
    let start = std::time::Instant::now();
    assert_eq!(host.read(uncached, 0, 10), Err(Failure::TimedOut));
    assert!(start.elapsed() >= TIMEOUT && start.elapsed() < 10 * TIMEOUT);
    let start = std::time::Instant::now();
    assert_eq!(host.read(cached, 0, 10).unwrap(), noise(10, 1));
    assert!(start.elapsed() < TIMEOUT);
    host.disk.set(Health::Good);
    assert_eq!(host.read(uncached, 0, 10).unwrap(), noise(10, 2), "no restart is needed");
}

/// A layer of `count` files in as many chunks.
fn chunks_apart(store: &TestStore, count: usize) -> String {
    let names: Vec<_> = (0..count).map(|n| format!("f{n}")).collect();
    let entries = names.iter().enumerate().map(|(n, name)| (&name[..], file(&noise(PIECE, n as u8))));
    format!("layers/{}", store.layer(&plain(&entries.collect::<Vec<_>>())).hex())
}

/// SEMANTICS: "What is cached is opened and read however many reads wait for the shared disk."
#[test]
fn cached_images_are_opened_and_read_while_more_reads_hang_than_there_are_threads() {
    let (store, cache, layer) = one_layer(&[("large", file(&noise(2 * PIECE, 1))), ("small", file(b"hello"))]);
    let other = chunks_apart(&store, 40);
    let fill = host(&store, &cache);
    for name in ["large", "small"] {
        fill.content(&format!("{layer}/{name}")).unwrap();
    }
    let uncached: Vec<_> = (0..40).map(|n| format!("{other}/f{n}")).collect();
    fill.node(&uncached[0]);
    fill.settle();
    drop(fill);
    let again = host(&store, &cache);
    let nodes: Vec<_> = uncached.iter().map(|path| again.node(path)).collect();
    again.disk.set(Health::Hanging);
    let answered = std::sync::Arc::new(AtomicUsize::new(0));
    for node in nodes {
        let answered = answered.clone();
        again.filesystem.read(node, 0, 10, move |bytes| _ = answered.fetch_add(bytes.unwrap().len(), Ordering::SeqCst));
    }
    // The index, what is read, and what is handed to the kernel: all of it is on this host's own disk.
    assert_eq!(again.content(&format!("{layer}/large")).unwrap(), noise(2 * PIECE, 1));
    let (send, receive) = std::sync::mpsc::channel();
    let small = again.node(&format!("{layer}/small"));
    again.filesystem.whole_file(small, move |whole| send.send(whole.unwrap().is_some()).unwrap());
    assert!(receive.recv_timeout(LONG / 2).unwrap(), "it lies in the cached chunk of its neighbours");
    assert_eq!(answered.load(Ordering::SeqCst), 0);
    again.disk.set(Health::Good);
    again.settle();
    assert_eq!(answered.load(Ordering::SeqCst), 400);
}

#[test]
fn a_prefetch_reserves_only_what_it_is_asking_for() {
    let store = TestStore::new();
    let layer = chunks_apart(&store, 20);
    let cache = tempfile::tempdir().unwrap();
    let host = host(&store, &cache);
    let wanted = host.node(&format!("{layer}/f15"));
    let index = index_of(&host, &layer);
    let orders = super::walk::Walk::new(index, 0, 0).within(0..20);
    assert_eq!(orders.len(), 20);
    host.disk.set(Health::Hanging);
    let prefetching = host.cache.clone();
    let prefetch = std::thread::spawn(move || prefetching.prefetch(orders));
    while host.requests() < 1 {
        std::thread::yield_now();
    }
    let (send, receive) = std::sync::mpsc::channel();
    host.filesystem.read(wanted, 0, PIECE, move |bytes| send.send(bytes.map(<[u8]>::to_vec)).unwrap());
    // Were it reserved by the prefetch, the reader would wait behind fifteen others.
    while host.requests() < 2 {
        std::thread::yield_now();
    }
    host.disk.set(Health::Good);
    assert_eq!(receive.recv().unwrap().unwrap(), noise(PIECE, 15));
    prefetch.join().unwrap();
    host.settle();
    assert_eq!(host.chunks(), 20, "each chunk once");
}

/// The index of a layer that has been looked up.
fn index_of(host: &Host, layer: &str) -> std::sync::Arc<store::layer::LayerIndex> {
    let diff_id = store::Digest::from_hex(layer.strip_prefix("layers/").unwrap()).unwrap();
    let (send, receive) = std::sync::mpsc::channel();
    let later = std::time::Instant::now() + LONG;
    host.indexes.load(diff_id, later, Box::new(move |index| send.send(index).unwrap()));
    receive.recv().unwrap().unwrap()
}

#[test]
fn a_fetch_that_panics_is_an_error_to_its_readers_and_the_next_one_works() {
    let (store, cache, layer) = one_layer(&[("large", file(&noise(2 * PIECE, 1))), ("small", file(b"hello"))]);
    let host = host(&store, &cache);
    host.disk.set(Health::Panicking);
    let start = std::time::Instant::now();
    assert_eq!(host.find(&layer), Err(Failure::Unreachable), "the index");
    host.disk.set(Health::Good);
    let nodes = ["large", "small"].map(|name| host.node(&format!("{layer}/{name}")));
    host.disk.set(Health::Panicking);
    for node in nodes {
        assert_eq!(host.read(node, 0, 5), Err(Failure::Unreachable));
    }
    assert!(host.refresh_catalogue().is_err());
    assert!(start.elapsed() < LONG, "nobody waits until the time is up");
    host.disk.set(Health::Good);
    assert_eq!(host.read(nodes[0], 0, PIECE).unwrap(), noise(PIECE, 1));
    assert_eq!(host.read(nodes[1], 0, 5).unwrap(), b"hello");
    assert!(host.refresh_catalogue().is_ok());
    host.settle();
}

#[test]
fn a_failing_disk_is_tried_again_until_the_time_is_up() {
    let (store, cache, layer) = one_layer(&[("f", file(b"hello"))]);
    let host = Host::start(store.dir.path(), cache.path(), LIMIT, TIMEOUT);
    let node = host.node(&format!("{layer}/f"));
    host.disk.set(Health::Failing);
    assert_eq!(host.read(node, 0, 10), Err(Failure::TimedOut));
    assert!(host.metrics.store_errors.get() > 1);
    host.disk.set(Health::Good);
    assert_eq!(host.read(node, 0, 10).unwrap(), b"hello");
}

#[test]
fn a_partial_file_goes_on_where_it_was_after_a_restart() {
    let large = noise(8 * PIECE, 1);
    let (store, cache, layer) = one_layer(&[("large", file(&large))]);
    let path = format!("{layer}/large");
    let first = host(&store, &cache);
    first.read(first.node(&path), 2 * PIECE as u64, 3 * PIECE).unwrap();
    first.settle();
    drop(first);
    assert!(cached(cache.path())[0].extension().is_some_and(|e| e == "part"));
    let second = host(&store, &cache);
    assert_eq!(second.content(&path).unwrap(), large);
    second.settle();
    assert_eq!(second.chunks(), 5);
    assert!(cached(cache.path())[0].extension().is_none());
}

#[test]
fn the_least_recently_used_go_and_what_is_open_stays() {
    let names = ["a", "b", "c", "d"];
    let size = 2 * PIECE + 1;
    let entries: Vec<_> = (0..).zip(names).map(|(n, name)| (name, file(&noise(size, n)))).collect();
    let (store, cache, layer) = one_layer(&entries);
    let host = Host::start(store.dir.path(), cache.path(), Limit::Bytes(3 * (2 * PIECE as u64 + 4096) + 40_000), LONG);
    let nodes = names.map(|name| host.node(&format!("{layer}/{name}")));
    let read = |n: usize| {
        host.read(nodes[n], 0, size).unwrap();
        host.settle();
    };
    (0..3).for_each(read);
    host.filesystem.open(nodes[0]).unwrap();
    read(1);
    assert!(host.cache.disk().is_crowded());
    assert_eq!(host.cache.evict(), 1);
    let before = host.chunks();
    read(0);
    read(1);
    assert_eq!(host.chunks(), before, "a is open, and b was used after c");
    read(2);
    assert_eq!(host.chunks(), before + 3);
    host.filesystem.release(nodes[0]);
}

/// SEMANTICS: "With `no-open`, the cache does not know what is open."
#[test]
fn what_nobody_opens_goes_by_its_last_read_and_is_fetched_again() {
    let size = 2 * PIECE;
    let entries = [("a", file(&noise(size, 1))), ("b", file(&noise(size, 2)))];
    let (store, cache, layer) = one_layer(&entries);
    let host = Host::start(store.dir.path(), cache.path(), Limit::Bytes(2 * size as u64 + 4096), TIMEOUT);
    let [a, b] = ["a", "b"].map(|name| host.node(&format!("{layer}/{name}")));
    for node in [b, a, b] {
        host.read(node, 0, size).unwrap();
        host.settle();
    }
    assert_eq!((host.cache.evict(), host.chunks()), (1, 4));
    host.disk.set(Health::Failing);
    assert_eq!(host.read(b, 0, size).unwrap(), noise(size, 2));
    assert_eq!(host.read(a, 0, size), Err(Failure::TimedOut));
    host.disk.set(Health::Good);
    assert_eq!(host.read(a, 0, size).unwrap(), noise(size, 1));
}

#[test]
fn a_limit_that_was_lowered_is_kept_from_the_start() {
    let (store, cache, layer) = one_layer(&[("f", file(&noise(2 * PIECE, 1)))]);
    let first = host(&store, &cache);
    first.content(&format!("{layer}/f")).unwrap();
    first.settle();
    let second = Host::start(store.dir.path(), cache.path(), Limit::Bytes(PIECE as u64), LONG);
    std::thread::spawn(move || second.cache.keep_room());
    while !cached(cache.path()).is_empty() {
        std::thread::yield_now();
    }
}

/// SEMANTICS: "The cache directory may be removed at any moment."
#[test]
fn the_cache_directory_may_vanish_at_any_moment() {
    let large = noise(2 * PIECE, 1);
    let (store, cache, layer) =
        one_layer(&[("large", file(&large)), ("small", file(b"hello")), ("other", file(&large[1..]))]);
    let host = host(&store, &cache);
    for _ in 0..3 {
        assert_eq!(host.content(&format!("{layer}/large")).unwrap(), large);
        assert_eq!(host.content(&format!("{layer}/small")).unwrap(), b"hello");
        host.settle();
        // Open files keep serving, so there may be nothing to write after the first round.
        let _ = std::fs::remove_dir_all(cache.path().join("objects"));
    }
    assert!(!cache.path().join("objects").exists());
    let node = host.node(&format!("{layer}/other"));
    host.read(node, 0, PIECE).unwrap();
    host.settle();
    std::fs::remove_dir_all(cache.path().join("objects")).unwrap();
    assert_eq!(host.content(&format!("{layer}/other")).unwrap(), large[1..]);
    host.settle();
    assert!(
        host.cache.disk().accepts() && host.metrics.cache_write_errors.get() == 0,
        "that is no failure of the disk"
    );
}

/// SEMANTICS: "A full or broken local disk fails no read."
#[test]
fn a_cache_that_takes_nothing_fails_no_read() {
    let large = noise(2 * PIECE, 1);
    let (store, cache, layer) =
        one_layer(&[("large", file(&large)), ("small", file(b"hello")), ("other", file(b"world"))]);
    let host = host(&store, &cache);
    let objects = cache.path().join("objects");
    std::fs::remove_dir_all(&objects).unwrap();
    std::fs::write(&objects, b"in the way").unwrap();
    for _ in 0..3 {
        assert_eq!(host.content(&format!("{layer}/large")).unwrap(), large);
        assert_eq!(host.content(&format!("{layer}/small")).unwrap(), b"hello");
        assert_eq!(host.content(&format!("{layer}/other")).unwrap(), b"world");
        host.settle();
    }
    assert_eq!(host.chunks(), 3, "the last chunks stay in memory");
    assert!(host.metrics.cache_write_errors.get() >= 1);
    assert!(!host.cache.disk().accepts());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]
    #[test]
    fn any_read_gives_the_files_bytes(
        pieces in proptest::collection::vec(any::<bool>(), 0..6),
        tail in 0..PIECE,
        reads in proptest::collection::vec((any::<prop::sample::Index>(), 0usize..3 * PIECE), 1..12),
    ) {
        let mut content = Vec::new();
        for (n, is_hole) in pieces.iter().enumerate() {
            content.extend(if *is_hole { vec![0; PIECE] } else { noise(PIECE, n as u8) });
        }
        content.extend(noise(tail, 99));
        let (store, cache, layer) = one_layer(&[("before", file(b"x")), ("f", file(&content))]);
        let host = host(&store, &cache);
        let node = host.node(&format!("{layer}/f"));
        for (offset, len) in reads {
            let offset = offset.index(content.len() + 10);
            let expected = &content[offset.min(content.len())..(offset + len).min(content.len())];
            prop_assert_eq!(host.read(node, offset as u64, len).unwrap(), expected);
        }
    }
}
