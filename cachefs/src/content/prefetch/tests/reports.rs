//! What users of other systems reported of starts and prefetching.

use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use store::layout::Layout;
use store::reader::Store;

use super::{LATER, LIMIT, LONG, PIECE, host, image, many, publish, trace, wait_until};
use crate::content::cache::Prefetch;
use crate::content::cache::disk::Limit;
use crate::fixture::{Health, Host, TIMEOUT, TestStore, TreeEntry, file, noise, plain};

/// An image of ten files, of which a pack has one; the pack's path, and where its content begins.
fn packed(store: &TestStore) -> (String, PathBuf, u64) {
    let path = image(store, &many(10));
    let learner = tempfile::tempdir().unwrap();
    let cold = Host::start(store.dir.path(), learner.path(), LIMIT, LONG);
    (2..6).for_each(|n| _ = cold.content(&format!("{path}/f{n:04}")).unwrap());
    let learned = trace(&cold);
    publish(store, &learned, |_| {});
    let catalogue = Store::open(store.dir.path()).unwrap().catalogue().unwrap();
    let record = catalogue.startup(&learned.chain).unwrap();
    (path, Layout::new(store.dir.path()).pack(&record.pack), record.content_offset())
}

/// SEMANTICS: "Prefetching changes no byte and fails nothing." One file of the share may hang where others answer.
#[test]
fn a_pack_that_hangs_delays_a_start_and_fails_nothing() {
    let store = TestStore::new();
    let (path, pack, content) = packed(&store);
    for from in [0, content] {
        let cache = tempfile::tempdir().unwrap();
        let host = Host::start_with(store.dir.path(), cache.path(), LIMIT, Duration::from_secs(2), Prefetch::On);
        host.disk.stick(Some((pack.clone(), from)));
        for n in 2..6 {
            let read = host.content(&format!("{path}/f{n:04}"));
            assert!(read == Ok(noise(PIECE, n as u8)), "{n} from {from}: {:?}", read.map(drop));
        }
        // Not at all by a read that came before the pack was in use.
        assert!(host.metrics.store_timeouts.get() <= u64::from(from > 0), "the pack is waited for once");
        host.disk.stick(None);
        host.settle();
    }
}

/// nydus: what failed once was never tried again.
#[test]
fn a_start_that_could_not_begin_begins_at_the_next_look() {
    let store = TestStore::new();
    let (path, ..) = packed(&store);
    let cache = tempfile::tempdir().unwrap();
    let host = Host::start_with(store.dir.path(), cache.path(), LIMIT, TIMEOUT, Prefetch::On);
    host.disk.set(Health::Failing);
    assert!(host.find(&path).is_err());
    host.settle();
    host.disk.set(Health::Good);
    host.node(&path);
    wait_until(|| host.metrics.startups_used.get() > 0);
    host.settle();
    assert_eq!(host.metrics.startups_used.get(), 1);
    host.content(&format!("{path}/f0003")).unwrap();
    assert_eq!(trace(&host).touches.len(), 1);
}

#[test]
fn a_start_is_recorded_however_late_it_reads_and_however_long_a_read_waits() {
    let store = TestStore::new();
    let path = image(&store, &many(60));
    let cache = tempfile::tempdir().unwrap();
    let host = Host::start(store.dir.path(), cache.path(), LIMIT, LONG);
    let nodes = [10, 30, 50].map(|n| host.node(&format!("{path}/f{n:04}")));
    let after = |seconds: u64| host.recorder.tick(Instant::now() + Duration::from_secs(seconds));
    // A container that was created, and is started minutes later.
    after(500);
    host.read(nodes[0], 0, 1).unwrap();
    host.disk.set(Health::Hanging);
    let (send, receive) = channel();
    host.filesystem.read(nodes[1], 0, 1, move |read| send.send(read.map(<[u8]>::len)).unwrap());
    after(4);
    host.disk.set(Health::Good);
    assert_eq!(receive.recv().unwrap().unwrap(), 1);
    host.read(nodes[2], 0, 1).unwrap();
    after(2);
    assert!(host.recorder.is_recording());
    after(4);
    assert!(!host.recorder.is_recording());
    assert_eq!(trace(&host).touches.len(), 3);
    assert_eq!(host.recorder.starts()[0].waits.len(), 3);

    // The daemon's end is a start's end too.
    let again = Host::start(store.dir.path(), cache.path(), LIMIT, LONG);
    again.content(&format!("{path}/f0001")).unwrap();
    again.recorder.finish();
    assert_eq!(trace(&again).touches.len(), 1);
}

/// Images on one base that start together, as after a boot, do not learn each other's reads where it is known who reads.
#[test]
fn what_is_read_through_a_native_tree_belongs_to_its_image_alone() {
    let store = TestStore::new();
    let base = store.layer(&plain(&[("base", file(b"base"))]));
    let tops = ["a", "b"].map(|name| store.layer(&plain(&[(name, file(name.as_bytes()))])));
    let chains = [store.image("a:1", &[base, tops[0]]), store.image("b:1", &[base, tops[1]])];
    let cache = tempfile::tempdir().unwrap();
    let host = Host::start(store.dir.path(), cache.path(), LIMIT, LONG);
    chains.iter().for_each(|chain| _ = host.node(&format!("chains/{}", chain.hex())));
    let image = tempfile::tempfile().unwrap();
    let content = host.filesystem.write_native_tree(&chains[1], &image, u64::MAX).unwrap().content;
    let (send, receive) = channel();
    let len = content.blocks() as usize * 4096;
    host.filesystem.read_data(&content, 0, len, move |read| send.send(read.map(<[u8]>::len)).unwrap());
    assert_eq!(receive.recv().unwrap().unwrap(), len);
    host.recorder.tick(Instant::now() + LATER);
    let starts = host.recorder.starts();
    assert_eq!(starts.iter().map(|start| (start.chain, start.pieces)).collect::<Vec<_>>(), [(chains[1], 2)]);
}

#[test]
fn packs_of_old_images_are_no_news() {
    let store = TestStore::new();
    let old = store.layer(&plain(&[("old", file(b"old"))]));
    let new = store.layer(&plain(&[("new", file(b"new"))]));
    let chains = [store.image("a:0", &[old]), store.image("a:1", &[new])];
    store.image("b:1", &[new]);
    let learner = tempfile::tempdir().unwrap();
    let cold = Host::start(store.dir.path(), learner.path(), LIMIT, LONG);
    cold.content(&format!("chains/{}/old", chains[0].hex())).unwrap();
    let learned = trace(&cold);
    let cache = tempfile::tempdir().unwrap();
    let host = host(&store, &cache);
    host.content(&format!("chains/{}/new", chains[1].hex())).unwrap();
    host.prefetcher.look_ahead();
    publish(&store, &learned, |_| {});
    host.watcher.update(&Store::open(store.dir.path()).unwrap()).unwrap();
    host.prefetcher.look_ahead();
    host.settle();
    assert_eq!(host.metrics.indexes_fetched.get(), 1);

    // The image has another name, whose repository is in use, too.
    let next = store.layer(&plain(&[("next", file(b"next"))]));
    store.image("b:2", &[next]);
    host.watcher.update(&Store::open(store.dir.path()).unwrap()).unwrap();
    host.prefetcher.look_ahead();
    wait_until(|| host.metrics.indexes_fetched.get() >= 2);
    assert_eq!(host.metrics.indexes_fetched.get(), 2);
}

/// dragonfly, Alluxio and others: success was said without looking.
#[test]
fn what_a_full_cache_does_not_take_is_counted() {
    let store = TestStore::new();
    let path = image(&store, &many(30));
    let cache = tempfile::tempdir().unwrap();
    let limit = Limit::Bytes(2 << 20);
    let host = Host::start_with(store.dir.path(), cache.path(), limit, LONG, Prefetch::On);
    let chain = store::Digest::from_hex(path.strip_prefix("chains/").unwrap()).unwrap();
    let (send, receive) = channel();
    host.prefetcher.whole(&chain, move |progress| send.send(progress.unwrap()).unwrap());
    let progress = receive.recv().unwrap();
    wait_until(|| progress.is_over());
    host.settle();
    let here = crate::fixture::cached(cache.path()).len() as u64;
    assert!((1..30).contains(&here), "{here}");
    assert_eq!((progress.done(), progress.lacking()), (30, 30 - here));
}

/// Alluxio/alluxio#10318: a load stopped when the cache was full.
#[test]
fn a_start_makes_room_in_a_crowded_cache() {
    let store = TestStore::new();
    let entries = many(60);
    let others: Vec<_> = (0..60).map(|n| (format!("o{n}"), file(&noise(PIECE - 7, n as u8)))).collect();
    let named = |entries: &[(String, TreeEntry)]| {
        plain(&entries.iter().map(|(name, entry)| (&name[..], entry.clone())).collect::<Vec<_>>())
    };
    let path = image(&store, &entries);
    let other = store.image("b:1", &[store.layer(&named(&others))]);
    let (learner, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let cold = Host::start(store.dir.path(), learner.path(), LIMIT, LONG);
    (0..40).for_each(|n| _ = cold.content(&format!("{path}/f{n:04}")).unwrap());
    publish(&store, &trace(&cold), |_| {});
    let limit = Limit::Bytes(14 << 20);
    let host = Host::start_with(store.dir.path(), cache.path(), limit, LONG, Prefetch::On);
    for n in 0..60 {
        if host.cache.disk().is_crowded() {
            break;
        }
        host.content(&format!("chains/{}/o{n}", other.hex())).unwrap();
        host.settle();
    }
    assert!(host.cache.disk().is_crowded());
    let cache_of_files = host.cache.clone();
    std::thread::spawn(move || cache_of_files.keep_room());
    let missed = host.metrics.reads_missed.get();
    host.node(&path);
    wait_until(|| host.metrics.startups_used.get() > 0);
    host.settle();
    (0..40).for_each(|n| _ = host.content(&format!("{path}/f{n:04}")).unwrap());
    // What came while the last was being evicted may be lost. All but six were.
    let missed = host.metrics.reads_missed.get() - missed;
    assert!(missed < 12, "{missed} of 40");
}
