//! Prefetching in front of a real store, with a shared disk that fails on request.

use std::collections::HashMap;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use store::chunk::PIECE_SIZE;
use store::profile::PieceKey;
use store::reader::Store;
use store::trace::AccessTrace;

use super::AGAIN;
use crate::content::cache::Prefetch;
use crate::content::cache::disk::Limit;
use crate::fixture::{Health, Host, TestStore, TreeEntry, file, noise, plain};

const PIECE: usize = PIECE_SIZE as usize;
const LIMIT: Limit = Limit::Bytes(1 << 30);
const LONG: Duration = Duration::from_secs(30);
/// Far beyond what a start may take.
const LATER: Duration = Duration::from_secs(1000);

fn host(store: &TestStore, cache: &tempfile::TempDir) -> Host {
    Host::start_with(store.dir.path(), cache.path(), LIMIT, LONG, Prefetch::On)
}

/// `count` files of one piece each, every one in a chunk of its own.
fn many(count: usize) -> Vec<(String, TreeEntry)> {
    (0..count).map(|n| (format!("f{n:04}"), file(&noise(PIECE, n as u8)))).collect()
}

fn image(store: &TestStore, entries: &[(String, TreeEntry)]) -> String {
    let entries: Vec<_> = entries.iter().map(|(name, entry)| (&name[..], entry.clone())).collect();
    let layer = store.layer(&plain(&entries));
    let chain = store.image("a:1", &[layer]);
    format!("chains/{}", chain.hex())
}

#[test]
fn what_lies_behind_a_miss_comes_along() {
    let store = TestStore::new();
    let path = image(&store, &many(100));
    let cache = tempfile::tempdir().unwrap();
    let host = host(&store, &cache);
    host.content(&format!("{path}/f0010")).unwrap();
    host.settle();
    assert_eq!(host.chunks(), 3);
    let nodes = [10, 11, 12].map(|n| (n, host.node(&format!("{path}/f{n:04}"))));
    host.disk.set(Health::Failing);
    for (n, node) in nodes {
        assert_eq!(host.read(node, 0, PIECE).unwrap(), noise(PIECE, n as u8));
    }
}

#[test]
fn nothing_comes_along_where_prefetching_is_off() {
    let store = TestStore::new();
    let path = image(&store, &many(20));
    let cache = tempfile::tempdir().unwrap();
    let host = Host::start(store.dir.path(), cache.path(), LIMIT, LONG);
    host.content(&format!("{path}/f0010")).unwrap();
    host.settle();
    assert_eq!(host.chunks(), 1);
}

#[test]
fn a_layer_of_which_much_is_read_is_streamed() {
    let store = TestStore::new();
    let path = image(&store, &many(200));
    let cache = tempfile::tempdir().unwrap();
    let host = host(&store, &cache);
    // From the back, so that reading ahead brings little.
    for n in (0..200).rev().step_by(2) {
        host.content(&format!("{path}/f{n:04}")).unwrap();
        if host.metrics.layers_streamed.get() > 0 {
            break;
        }
    }
    while host.chunks() < 200 {
        std::thread::yield_now();
    }
    host.settle();
    assert_eq!((host.metrics.layers_streamed.get(), host.chunks()), (1, 200), "each chunk once");
}

#[test]
fn a_whole_image_is_brought_on_request() {
    let store = TestStore::new();
    let path = image(&store, &many(30));
    let cache = tempfile::tempdir().unwrap();
    let host = host(&store, &cache);
    let chain = store::Digest::from_hex(path.strip_prefix("chains/").unwrap()).unwrap();
    let (send, receive) = channel();
    host.prefetcher.whole(&chain, move |progress| send.send(progress.unwrap()).unwrap());
    let progress = receive.recv().unwrap();
    while !progress.is_over() {
        std::thread::yield_now();
    }
    assert_eq!((progress.done(), progress.chunks), (30, 30));
    assert!(host.cache.is_settled(), "what is over is written");
    let nodes: Vec<_> = (0..30).map(|n| host.node(&format!("{path}/f{n:04}"))).collect();
    host.disk.set(Health::Failing);
    for (n, node) in nodes.into_iter().enumerate() {
        assert_eq!(host.read(node, 0, PIECE).unwrap(), noise(PIECE, n as u8));
    }
    let (send, receive) = channel();
    host.prefetcher.whole(&store::Digest::of(b"nothing"), move |progress| send.send(progress.is_err()).unwrap());
    assert!(receive.recv().unwrap());
}

/// The trace of the last start, as the coordinator gets it.
fn trace(host: &Host) -> AccessTrace {
    host.recorder.tick(Instant::now() + LATER);
    let spooled = std::fs::read_dir(host.recorder.spool()).unwrap().map(|entry| entry.unwrap().path());
    let mut traces: Vec<_> = spooled.collect();
    traces.sort_unstable();
    AccessTrace::decode(&std::fs::read(traces.last().unwrap()).unwrap()).unwrap()
}

/// Publishes a startup pack of what a trace names, with `damage` done to each piece.
fn publish(store: &TestStore, trace: &AccessTrace, damage: impl Fn(&mut Vec<u8>)) {
    let reader = Store::open(store.dir.path()).unwrap();
    let mut writer = store.publisher.stage_startup().unwrap();
    for touch in &trace.touches {
        let index = reader.index(&trace.layers[usize::from(touch.layer)]).unwrap();
        let piece = index.piece(&index.inode(touch.inode).unwrap(), touch.piece).unwrap();
        let store::layer::Source::Chunk { chunk, start, .. } = piece.source else { panic!("a touched hole") };
        let mut bytes = reader.read_chunk(&chunk).unwrap().piece(start, piece.len).unwrap().to_vec();
        damage(&mut bytes);
        let key = PieceKey { layer: touch.layer, inode: touch.inode, piece: touch.piece };
        let digest = store::ContentDigest::of(&bytes);
        writer.add(key, u16::MAX, &digest, &bytes).unwrap();
    }
    store.publisher.publish_startup(writer.finish().unwrap(), trace.chain, 1, 1).unwrap();
}

#[test]
fn a_start_is_traced_and_the_next_host_has_it_before_it_asks() {
    let store = TestStore::new();
    let mut entries = many(60);
    entries.push(("large".into(), file(&noise(6 * PIECE + 7, 77))));
    entries.push(("hole".into(), file(&[0; 900])));
    let path = image(&store, &entries);
    let read = [50, 3, 21];
    let start = |host: &Host| {
        for n in read {
            assert_eq!(host.content(&format!("{path}/f{n:04}")).unwrap(), noise(PIECE, n as u8));
        }
        let large = host.node(&format!("{path}/large"));
        assert_eq!(
            host.read(large, 2 * PIECE as u64 + 5, 10).unwrap(),
            noise(6 * PIECE + 7, 77)[2 * PIECE + 5..][..10]
        );
        host.content(&format!("{path}/hole")).unwrap();
    };
    let (first, second, third) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let cold = Host::start(store.dir.path(), first.path(), LIMIT, LONG);
    start(&cold);
    // A reader that comes before a piece is written to the local cache waits for it too.
    cold.settle();
    start(&cold);
    let learned = trace(&cold);
    assert_eq!(learned.touches.len(), 4, "first touches only, and nothing of a hole");
    assert_eq!(learned.outcome.touched_bytes, 4 * PIECE as u64);
    assert_eq!(learned.outcome.missed_bytes, 4 * PIECE as u64);
    let told = cold.recorder.starts().pop().unwrap();
    let waits: HashMap<_, _> = told.waits.iter().map(|wait| (wait.path.as_str(), wait.reads)).collect();
    assert_eq!(waits, HashMap::from([("/f0050", 1), ("/f0003", 1), ("/f0021", 1), ("/large", 1)]));

    // The second host was running before there was a profile.
    let warm = host(&store, &second);
    publish(&store, &learned, |_| {});
    warm.watcher.update(&Store::open(store.dir.path()).unwrap()).unwrap();
    warm.node(&path);
    while warm.chunks() < 4 {
        std::thread::yield_now();
    }
    warm.settle();
    start(&warm);
    assert_eq!((warm.chunks(), warm.metrics.reads_missed.get()), (4, 0));
    let outcome = trace(&warm).outcome;
    assert_eq!((outcome.prefetched_bytes, outcome.prefetched_used_bytes), (4 * PIECE as u64, 4 * PIECE as u64));
    assert_eq!(outcome.missed_bytes, 0);

    // Where prefetching is off the profile changes nothing.
    let off = Host::start(store.dir.path(), third.path(), LIMIT, LONG);
    off.node(&path);
    off.settle();
    assert_eq!(off.chunks(), 0);
}

#[test]
fn an_image_that_was_evicted_uses_its_pack_again() {
    let store = TestStore::new();
    let path = image(&store, &many(60));
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let cold = Host::start(store.dir.path(), first.path(), LIMIT, LONG);
    (0..8).for_each(|n| _ = cold.content(&format!("{path}/f{n:04}")).unwrap());
    publish(&store, &trace(&cold), |_| {});
    let limit = Limit::Bytes(4 << 20);
    let host = Host::start_with(store.dir.path(), second.path(), limit, LONG, Prefetch::On);
    let chain = store::Digest::from_hex(path.strip_prefix("chains/").unwrap()).unwrap();
    let look = |after: Duration| host.prefetcher.looked_into_at(&chain, Instant::now() + after);
    let used = |times: u64| {
        let patience = Instant::now() + LONG;
        while host.metrics.startups_used.get() < times && Instant::now() < patience {
            std::thread::yield_now();
        }
        host.settle();
        assert_eq!(host.metrics.startups_used.get(), times);
    };
    look(Duration::ZERO);
    used(1);
    assert_eq!(host.chunks(), 8);
    look(AGAIN / 2);
    used(1);
    look(AGAIN + AGAIN / 4);
    used(1);
    look(AGAIN * 3);
    used(2);
    assert_eq!(host.chunks(), 8, "what is here is not fetched");
    assert!(host.cache.make_room_for(2 << 20), "this needs more than is free");
    assert!(host.metrics.evicted_objects.get() > 0);
    look(AGAIN * 5);
    used(3);
    assert!(host.chunks() > 8, "and what was evicted is");
    (0..8).for_each(|n| _ = host.content(&format!("{path}/f{n:04}")).unwrap());
    assert_eq!(host.metrics.reads_missed.get(), 0);
}

/// SEMANTICS: "Prefetching changes no byte and fails nothing."
/// A startup pack that does not hold what it says, or is gone, costs a start nothing but its help.
#[test]
fn a_wrong_startup_pack_is_a_hint_not_taken() {
    let store = TestStore::new();
    let path = image(&store, &many(60));
    let cold_cache = tempfile::tempdir().unwrap();
    let cold = Host::start(store.dir.path(), cold_cache.path(), LIMIT, LONG);
    for n in 0..8 {
        cold.content(&format!("{path}/f{n:04}")).unwrap();
    }
    publish(&store, &trace(&cold), |bytes| bytes[3] ^= 1);
    let check = |host: &Host| {
        for n in 0..8 {
            assert_eq!(host.content(&format!("{path}/f{n:04}")).unwrap(), noise(PIECE, n as u8));
        }
        host.settle();
    };
    let cache = tempfile::tempdir().unwrap();
    let wrong = host(&store, &cache);
    check(&wrong);
    // The pack's table is read while the files are, and may come after them.
    let patience = std::time::Instant::now() + LONG;
    while wrong.metrics.startups_used.get() == 0 && std::time::Instant::now() < patience {
        std::thread::yield_now();
    }
    assert_eq!(wrong.metrics.startups_used.get(), 1);
    let record = Store::open(store.dir.path()).unwrap().catalogue().unwrap();
    let chain = store::Digest::from_hex(path.strip_prefix("chains/").unwrap()).unwrap();
    let pack = record.startup(&chain).unwrap().pack;
    std::fs::remove_file(store::layout::Layout::new(store.dir.path()).pack(&pack)).unwrap();
    let cache = tempfile::tempdir().unwrap();
    check(&host(&store, &cache));
}
