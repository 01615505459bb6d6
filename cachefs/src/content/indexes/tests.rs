//! Indexes in front of a real store: damaged, evicted and removed copies, and how much room they take.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::Duration;

use store::Digest;
use store::layer::Metadata;

use super::blocks::{BLOCK, MEMORY};
use super::*;
use crate::fixture::{Entries, Health, Host, TIMEOUT, TestStore, file, files, noise, plain};
use crate::fixture::{Filesystem, Found, Lifetime, Limit, Node};

const LIMIT: Limit = Limit::Bytes(1 << 30);
const LONG: Duration = Duration::from_secs(30);
const MIB: usize = 1 << 20;

/// A layer of many small files, whose index takes several blocks.
fn wide(store: &TestStore) -> String {
    let names: Vec<_> = (0..3000).map(|n| format!("f{n:05}")).collect();
    let entries: Vec<_> = names.iter().map(|name| (&name[..], file(b""))).collect();
    format!("layers/{}", store.layer(&plain(&entries)).hex())
}

/// A layer whose index takes a little more than `bytes` bytes, because its files have large attributes.
fn heavy(store: &TestStore, bytes: usize, seed: u8) -> String {
    let entries: Entries = (0..bytes.div_ceil(MIB))
        .map(|n| {
            let value = noise(bytes.min(MIB), seed.wrapping_add(n as u8));
            let xattrs = BTreeMap::from([(b"user.large".to_vec(), value)]);
            let metadata = Metadata { permissions: 0o644, xattrs, ..Metadata::default() };
            (format!("f{seed}-{n}"), metadata, file(b"x"))
        })
        .collect();
    let name = Digest::of(format!("{bytes} {seed}").as_bytes());
    format!("layers/{}", store.layer_called(&entries, name).hex())
}

fn host(store: &TestStore, cache: &tempfile::TempDir, limit: Limit) -> Host {
    Host::start(store.dir.path(), cache.path(), limit, LONG)
}

fn diff_id(layer: &str) -> Digest {
    Digest::from_hex(layer.strip_prefix("layers/").unwrap()).unwrap()
}

/// The only cache file, which is the copy of an index.
fn copy_of(cache: &Path) -> PathBuf {
    let [copy] = &files(&cache.join("objects"))[..] else { panic!("not one file") };
    copy.clone()
}

/// The answer that the kernel would get.
fn ask<T: Send + 'static>(
    host: &Host,
    node: Node,
    attempt: impl FnMut(&Filesystem) -> Result<T> + Send + 'static,
) -> Result<T> {
    let (send, receive) = channel();
    host.filesystem.answer(node, attempt, move |answer| send.send(answer).unwrap());
    receive.recv().unwrap()
}

/// If the index were mapped, SIGBUS would kill the daemon here, because the file has no such pages.
#[test]
fn an_index_whose_copy_goes_bad_while_it_is_in_use_is_an_error_to_nobody() {
    let cut = |path: &Path| File::options().write(true).open(path).unwrap().set_len(100).unwrap();
    let flip = |path: &Path| {
        let mut bytes = std::fs::read(path).unwrap();
        bytes.iter_mut().skip(BLOCK).for_each(|byte| *byte ^= 1);
        std::fs::write(path, bytes).unwrap();
    };
    let remove = |path: &Path| std::fs::remove_file(path).unwrap();
    let damages: [&dyn Fn(&Path); 3] = [&cut, &flip, &remove];
    for (damage, counted) in damages.into_iter().zip([1, 1, 0]) {
        let (store, cache) = (TestStore::new(), tempfile::tempdir().unwrap());
        let layer = wide(&store);
        let host = host(&store, &cache, LIMIT);
        let root = host.node(&layer);
        damage(&copy_of(cache.path()));
        assert_eq!(host.lookup(root, b"nothing"), Ok(Found::Absent(Lifetime::Forever)));
        assert!(host.find(&format!("{layer}/f02999")).is_ok());
        let metrics = (host.metrics.damaged_in_cache.get(), host.metrics.indexes_fetched.get());
        assert_eq!(metrics, (counted, 2));
        assert_eq!(files(&cache.path().join("objects")).len(), 1, "the copy is there again");
    }
}

#[test]
fn a_lost_index_is_an_error_only_while_the_store_is_away() {
    let (store, cache) = (TestStore::new(), tempfile::tempdir().unwrap());
    let layer = wide(&store);
    let host = Host::start(store.dir.path(), cache.path(), LIMIT, TIMEOUT);
    let root = host.node(&layer);
    std::fs::remove_file(copy_of(cache.path())).unwrap();
    host.disk.set(Health::Hanging);
    let (send, receive) = channel();
    host.filesystem.lookup(root, b"f02999", move |found| send.send(found).unwrap());
    assert!(receive.try_recv().is_err(), "the worker that asked goes on");
    assert_eq!(host.lookup(root, b"f02998"), Err(Failure::TimedOut));
    host.disk.set(Health::Good);
    assert!(host.find(&format!("{layer}/f02999")).is_ok());
}

#[test]
fn indexes_take_so_much_memory_and_no_more() {
    let (store, cache) = (TestStore::new(), tempfile::tempdir().unwrap());
    let host = host(&store, &cache, LIMIT);
    for seed in [0, 100] {
        let layer = heavy(&store, MEMORY * 3 / 4, seed);
        for n in 0..MEMORY * 3 / 4 / MIB {
            let node = host.node(&format!("{layer}/f{seed}-{n}"));
            let value = ask(&host, node, move |tree| tree.xattr(node, b"user.large")).unwrap();
            assert_eq!(value, noise(MIB, seed.wrapping_add(n as u8)));
        }
    }
    let taken = host.indexes.blocks.bytes();
    assert!(taken > MEMORY / 2 && taken <= MEMORY, "{taken}");
}

/// SEMANTICS: "Layers' indexes count in the cache's room,"
#[test]
fn indexes_count_in_the_caches_room_and_are_evicted() {
    let (store, cache) = (TestStore::new(), tempfile::tempdir().unwrap());
    let room = 8 * MIB as u64;
    let host = host(&store, &cache, Limit::Bytes(room));
    let layers: Vec<_> = (0..12).map(|seed| heavy(&store, MIB, 10 * seed)).collect();
    let attribute = |n: usize| {
        let node = host.node(&format!("{}/f{}-0", layers[n], 10 * n));
        ask(&host, node, move |tree| tree.xattr(node, b"user.large")).map(|value| value.len())
    };
    // The kernel knows the first one as long as this test lasts.
    host.filesystem.learns(host.node(&layers[0]).slot(), 1);
    for n in 0..layers.len() {
        assert_eq!(attribute(n), Ok(MIB));
        host.cache.disk().survey();
        assert!(host.cache.disk().used() <= room, "{} after {n}", host.cache.disk().used());
    }
    assert!(host.metrics.evicted_objects.get() >= 4);
    let has = |n: usize| {
        let digest = host.indexes.known.lock()[&diff_id(&layers[n])];
        host.cache.disk().open_object(&digest).is_ok()
    };
    assert!(has(0), "what is in use stays");
    let gone = (1..layers.len()).find(|n| !has(*n)).unwrap();
    // Its blocks may still be in memory: they are dropped, so that they must be read again.
    host.indexes.blocks.clear();
    assert_eq!(attribute(gone), Ok(MIB), "it comes again");
    assert_eq!(host.metrics.damaged_in_cache.get(), 0);
}

#[test]
fn an_index_that_the_cache_has_no_room_for_stays_in_memory_and_a_huge_one_is_refused() {
    let (store, cache) = (TestStore::new(), tempfile::tempdir().unwrap());
    let host = host(&store, &cache, Limit::Bytes(4 * MIB as u64));
    let (large, other, huge) = (heavy(&store, 40 * MIB, 0), heavy(&store, 41 * MIB, 50), heavy(&store, 65 * MIB, 100));
    let read = |layer: &str, name: &str| {
        let node = host.find(&format!("{layer}/{name}"))?.node;
        ask(&host, node, move |tree| tree.xattr(node, b"user.large")).map(|value| value.len())
    };
    let kept = || host.indexes.kept.lock().iter().map(|copy| copy.kept_len()).sum::<usize>();
    assert_eq!(read(&large, "f0-39"), Ok(MIB));
    assert!(kept() > 40 * MIB && host.cache.disk().used() == 0);
    assert_eq!(read(&other, "f50-7"), Ok(MIB));
    assert!(kept() > 41 * MIB && kept() < KEPT, "the other one made room");
    assert_eq!(read(&large, "f0-38"), Ok(MIB), "and comes back when it is needed");
    assert_eq!(read(&huge, "f100-0"), Err(Failure::NoRoom));
    assert!(kept() < KEPT);
}

#[test]
fn copies_of_an_earlier_version_are_taken_over() {
    let (store, cache) = (TestStore::new(), tempfile::tempdir().unwrap());
    let layer = wide(&store);
    host(&store, &cache, LIMIT).node(&layer);
    let names = files(&cache.path().join("indexes"));
    let [name] = &names[..] else { panic!("{names:?}") };
    std::fs::rename(copy_of(cache.path()), name).unwrap();
    let host = Host::start(Path::new("/nowhere"), cache.path(), LIMIT, TIMEOUT);
    assert!(host.find(&format!("{layer}/f00007")).is_ok());
    assert_eq!((host.metrics.indexes_fetched.get(), std::fs::metadata(name).unwrap().len()), (0, 0));
}

#[test]
fn a_layer_that_is_not_there_is_looked_for_once_in_a_while() {
    let (store, cache) = (TestStore::new(), tempfile::tempdir().unwrap());
    let host = host(&store, &cache, LIMIT);
    let absent = |n: u8| format!("layers/{}", Digest::of(&[n]).hex());
    let layers = host.node("layers");
    let before = host.disk.opens();
    for _ in 0..500 {
        let name = Digest::of(&[1]).hex();
        let found = host.lookup(layers, name.as_bytes());
        assert!(matches!(found, Ok(Found::Absent(_))), "{found:?}");
    }
    let asked = host.disk.opens() - before;
    assert!(asked < 50, "{asked} times in less than a minute");
    (0..255).for_each(|n| _ = host.find(&absent(n)));
    // A layer that was absent a moment ago is there when an image has it.
    let entries = plain(&[("f", file(b"1"))]);
    let published = Digest::of(format!("{entries:?}").as_bytes());
    assert_eq!(host.find(&format!("layers/{}", published.hex())), Err(Failure::Absent));
    assert_eq!(store.layer(&entries), published);
    let chain = store.image("app:v1", &[published]);
    assert_eq!(host.content(&format!("chains/{}/f", chain.hex())).unwrap(), b"1");
    assert_eq!(host.content(&format!("layers/{}/f", published.hex())).unwrap(), b"1");
}
