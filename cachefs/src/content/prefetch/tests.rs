//! Prefetching in front of a real store, with a shared disk that fails on request.

use std::collections::HashMap;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use store::blocks::BLOCK;
use store::chunk::PIECE_SIZE;
use store::layout::Layout;
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

/// Waits for something that other threads do, but not for ever: what is asserted afterwards tells whether it came.
fn wait_until(came: impl Fn() -> bool) {
    let patience = Instant::now() + LONG;
    while !came() && Instant::now() < patience {
        std::thread::yield_now();
    }
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
    wait_until(|| host.chunks() >= 200);
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
    publish_some(store, trace, u64::MAX, damage);
}

/// The same, with at most `content_max` bytes of content; the other pieces are named.
fn publish_some(store: &TestStore, trace: &AccessTrace, content_max: u64, damage: impl Fn(&mut Vec<u8>)) {
    let reader = Store::open(store.dir.path()).unwrap();
    let mut writer = store.publisher.stage_startup(&trace.layers).unwrap().with_content_max(content_max);
    for touch in &trace.touches {
        let index = reader.index(&trace.layers[usize::from(touch.layer)]).unwrap();
        let piece = index.piece(&index.inode(touch.inode).unwrap(), touch.piece).unwrap();
        let store::layer::Source::Chunk { chunk, start, .. } = piece.source else { panic!("a touched hole") };
        let mut bytes = reader.read_chunk(&chunk).unwrap().piece(start, piece.len).unwrap().to_vec();
        damage(&mut bytes);
        let key = PieceKey { layer: touch.layer, inode: touch.inode, piece: touch.piece };
        let digest = store::ContentDigest::of(&bytes);
        let len = touch.blocks.content_len(piece.len);
        if writer.has_room(len) {
            writer.add(key, touch.blocks, u8::MAX, &digest, &bytes).unwrap();
        } else {
            writer.name(key, touch.blocks, u8::MAX, len).unwrap();
        }
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
    let touched = 3 * PIECE as u64 + u64::from(BLOCK);
    assert_eq!((learned.outcome.touched_bytes, learned.outcome.missed_bytes), (touched, touched));
    let told = cold.recorder.starts().pop().unwrap();
    let waits: HashMap<_, _> = told.waits.iter().map(|wait| (wait.path.as_str(), wait.reads)).collect();
    assert_eq!(waits, HashMap::from([("/f0050", 1), ("/f0003", 1), ("/f0021", 1), ("/large", 1)]));

    // The second host was running before there was a profile.
    let warm = host(&store, &second);
    publish(&store, &learned, |_| {});
    warm.watcher.update(&Store::open(store.dir.path()).unwrap()).unwrap();
    warm.node(&path);
    wait_until(|| warm.chunks() >= 4);
    warm.settle();
    start(&warm);
    assert_eq!((warm.chunks(), warm.metrics.reads_missed.get()), (4, 0));
    let outcome = trace(&warm).outcome;
    assert_eq!((outcome.prefetched_bytes, outcome.prefetched_used_bytes), (touched, touched));
    assert_eq!(outcome.missed_bytes, 0);

    // Where prefetching is off the profile changes nothing.
    let off = Host::start(store.dir.path(), third.path(), LIMIT, LONG);
    off.node(&path);
    off.settle();
    assert_eq!(off.chunks(), 0);
}

/// What a pack only names comes from the layers, neighbours with one request, whatever the order of the reads was.
#[test]
fn what_a_pack_names_is_brought_from_the_layers() {
    let store = TestStore::new();
    let content = noise(40 * PIECE, 77);
    let mut entries = many(70);
    entries.push(("large".into(), file(&content)));
    let path = image(&store, &entries);
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let start = |host: &Host| {
        (0..70).rev().for_each(|n| _ = host.content(&format!("{path}/f{n:04}")).unwrap());
        let large = host.node(&format!("{path}/large"));
        for number in [3, 1, 2, 30, 0, 31] {
            let at = number * PIECE;
            assert!(host.read(large, at as u64, 9).unwrap() == content[at..at + 9], "piece {number}");
        }
    };
    let cold = Host::start(store.dir.path(), first.path(), LIMIT, LONG);
    start(&cold);
    publish_some(&store, &trace(&cold), 3 * PIECE as u64, |_| {});
    let warm = host(&store, &second);
    warm.node(&path);
    wait_until(|| warm.chunks() >= 76);
    warm.settle();
    assert_eq!(warm.chunks(), 76, "each once");
    let requests = warm.metrics.extents_fetched.get();
    assert!(requests <= 60, "{requests} requests");
    warm.disk.set(Health::Failing);
    start(&warm);
    assert_eq!(warm.metrics.reads_missed.get(), 0);
    let outcome = trace(&warm).outcome;
    assert_eq!(outcome.prefetched_bytes, outcome.prefetched_used_bytes, "what was named counts as prefetched");
    assert!(outcome.prefetched_bytes > 70 * PIECE as u64 && outcome.missed_bytes == 0, "{outcome:?}");
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
        wait_until(|| host.metrics.startups_used.get() >= times);
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

/// A host on which an image of one large file starts, of which a pack has some blocks.
fn with_blocks(store: &TestStore, cache: &tempfile::TempDir) -> (Host, String, Vec<u8>) {
    let content = noise(3 * PIECE + 70_000, 5);
    let path = image(store, &[("large".to_owned(), file(&content))]);
    let learner = tempfile::tempdir().unwrap();
    let cold = Host::start(store.dir.path(), learner.path(), LIMIT, LONG);
    let large = cold.node(&format!("{path}/large"));
    for (offset, len) in [(10, 10), (PIECE - 5, 10), (2 * PIECE + 3 * BLOCK as usize, BLOCK as usize), (3 * PIECE, 1)] {
        cold.read(large, offset as u64, len).unwrap();
    }
    publish(store, &trace(&cold), |_| {});
    let warm = host(store, cache);
    warm.node(&path);
    wait_until(|| warm.chunks() >= 1);
    warm.settle();
    (warm, path, content)
}

#[test]
fn a_pack_brings_blocks_of_large_files_and_they_outlive_the_daemon() {
    let (store, cache) = (TestStore::new(), tempfile::tempdir().unwrap());
    let (warm, path, content) = with_blocks(&store, &cache);
    let block = BLOCK as usize;
    let brought = [(0, block), (PIECE - block, 2 * block), (2 * PIECE + 3 * block, block), (3 * PIECE + 7, block - 7)];
    let lacking = [(block, 1), (PIECE + block, 1), (2 * PIECE + 3 * block - 1, 2), (3 * PIECE + block, 1)];
    let read = |host: &Host, (offset, len): (usize, usize)| {
        let node = host.node(&format!("{path}/large"));
        let expected = content[offset..offset + len].to_vec();
        host.read(node, offset as u64, len).map(|bytes| assert!(bytes == expected, "{len} bytes at {offset}"))
    };
    let bytes = warm.metrics.bytes_from_store.get();
    assert!(bytes < 7 * u64::from(BLOCK), "{bytes} bytes for six blocks");
    warm.disk.set(Health::Failing);
    brought.iter().for_each(|range| read(&warm, *range).unwrap());
    assert_eq!(warm.metrics.reads_missed.get(), 0);
    drop(warm);

    // Another daemon verifies them once more, by what the lacking blocks contribute to the digest.
    let again = host(&store, &cache);
    again.node(&path);
    again.settle();
    again.disk.set(Health::Failing);
    brought.iter().for_each(|range| read(&again, *range).unwrap());
    again.disk.set(Health::Good);
    for range in lacking {
        read(&again, range).unwrap();
    }
    again.settle();
    read(&again, (0, content.len())).unwrap();
    assert_eq!(again.metrics.damaged_in_cache.get(), 0);
    let files = crate::fixture::files(&cache.path().join("objects"));
    assert!(files.iter().any(|path| path.metadata().unwrap().len() == content.len() as u64), "it is whole: {files:?}");
    assert!(files.iter().all(|path| path.extension().is_none()), "{files:?}");
}

#[test]
fn damaged_blocks_and_values_are_fetched_again() {
    let block = BLOCK as usize;
    // A byte of a block that is there, and one of a value of a block that is not.
    for at in [3, (3 * PIECE + 70_000).next_multiple_of(4096) + 2 * 32] {
        let (store, cache) = (TestStore::new(), tempfile::tempdir().unwrap());
        let (warm, path, content) = with_blocks(&store, &cache);
        drop(warm);
        let files = crate::fixture::files(&cache.path().join("objects"));
        let part = files.iter().find(|path| path.extension().is_some()).unwrap();
        let mut bytes = std::fs::read(part).unwrap();
        bytes[at] ^= 1;
        let file = std::fs::File::options().write(true).open(part).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes[at..=at], at as u64).unwrap();
        let again = Host::start(store.dir.path(), cache.path(), LIMIT, LONG);
        let node = again.node(&format!("{path}/large"));
        assert_eq!(again.read(node, 0, block).unwrap(), content[..block], "byte {at}");
        assert_eq!(again.metrics.damaged_in_cache.get(), 1, "byte {at}");
        assert_eq!(again.read(node, PIECE as u64, block).unwrap(), content[PIECE..PIECE + block]);
        assert_eq!(again.metrics.reads_missed.get(), 1, "the others are good");
    }
}

#[test]
fn indexes_come_with_the_pack_unless_the_catalogue_names_others() {
    let store = TestStore::new();
    let path = image(&store, &many(20));
    let learner = tempfile::tempdir().unwrap();
    let cold = Host::start(store.dir.path(), learner.path(), LIMIT, LONG);
    cold.content(&format!("{path}/f0003")).unwrap();
    let learned = trace(&cold);
    publish(&store, &learned, |_| {});
    let layout = Layout::new(store.dir.path());
    let index = layout.index(&learned.layers[0]);
    let sealed = std::fs::read(&index).unwrap();
    std::fs::write(&index, b"damaged").unwrap();
    let cache = tempfile::tempdir().unwrap();
    let warm = host(&store, &cache);
    assert_eq!(warm.content(&format!("{path}/f0003")).unwrap(), noise(PIECE, 3), "its own place is not looked at");
    assert_eq!((warm.metrics.indexes_fetched.get(), warm.metrics.damaged_in_store.get()), (1, 0));

    // A pack that cannot be read, and one whose index is not the catalogue's, leave the index to its own place.
    std::fs::write(&index, sealed).unwrap();
    let record = Store::open(store.dir.path()).unwrap().catalogue().unwrap().startup(&learned.chain).cloned().unwrap();
    let pack = layout.pack(&record.pack);
    let whole = std::fs::read(&pack).unwrap();
    let in_index = record.table.offset as usize + record.table.stored_len as usize + 100;
    for at in [in_index, record.table.offset as usize + 3] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        std::fs::write(&pack, bytes).unwrap();
        let cache = tempfile::tempdir().unwrap();
        let warm = host(&store, &cache);
        assert_eq!(warm.content(&format!("{path}/f0003")).unwrap(), noise(PIECE, 3));
        assert_eq!(warm.metrics.indexes_fetched.get(), 1);
    }
}

#[test]
fn a_new_image_of_a_repository_in_use_needs_its_content_alone() {
    let store = TestStore::new();
    let first = image(&store, &many(5));
    let cache = tempfile::tempdir().unwrap();
    let host = host(&store, &cache);
    host.content(&format!("{first}/f0001")).unwrap();
    host.prefetcher.look_ahead();
    let others = many(9);
    let entries: Vec<_> = others.iter().map(|(name, entry)| (&name[..], entry.clone())).collect();
    let layer = store.layer(&plain(&entries));
    let strange = store.layer(&plain(&[("strange", file(b"strange"))]));
    let next = store.image("a:2", &[layer]);
    store.image("b:1", &[strange]);
    let look = |indexes: u64| {
        host.watcher.update(&Store::open(store.dir.path()).unwrap()).unwrap();
        host.prefetcher.look_ahead();
        wait_until(|| host.metrics.indexes_fetched.get() >= indexes);
    };
    look(2);
    assert_eq!(host.metrics.indexes_fetched.get(), 2, "one of this repository, none of the other one");
    // Its pack appears later, and its table is fetched too.
    let index = Store::open(store.dir.path()).unwrap().index(&layer).unwrap();
    let mut learned = trace(&host);
    (learned.chain, learned.layers) = (next, vec![layer]);
    learned.touches[0].inode = index.resolve(b"f0007").unwrap().unwrap();
    publish(&store, &learned, |_| {});
    look(2);
    let record = host.watcher.snapshot().catalogue().startup(&next).cloned().unwrap();
    wait_until(|| host.prefetcher.ahead.table(&record.pack).is_some());
    host.disk.set(Health::Failing);
    let node = host.node(&format!("chains/{}/f0007", next.hex()));
    host.disk.set(Health::Good);
    assert_eq!(host.read(node, 0, PIECE).unwrap(), noise(PIECE, 7));
    assert_eq!(host.metrics.startups_used.get(), 1);
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
    wait_until(|| wrong.metrics.startups_used.get() > 0);
    assert_eq!(wrong.metrics.startups_used.get(), 1);
    let record = Store::open(store.dir.path()).unwrap().catalogue().unwrap();
    let chain = store::Digest::from_hex(path.strip_prefix("chains/").unwrap()).unwrap();
    let pack = record.startup(&chain).unwrap().pack;
    std::fs::remove_file(store::layout::Layout::new(store.dir.path()).pack(&pack)).unwrap();
    let cache = tempfile::tempdir().unwrap();
    check(&host(&store, &cache));
}

mod reports;
