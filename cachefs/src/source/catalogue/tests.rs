//! Following a store whose history is not the one that was seen.

use std::path::Path;
use std::time::{Duration, Instant};

use super::*;
use crate::fixture::{Host, Limit, TestStore, file, plain};

const LONG: Duration = Duration::from_secs(30);

fn host(store: &Path, cache: &tempfile::TempDir) -> Host {
    Host::start(store, cache.path(), Limit::Bytes(1 << 30), LONG)
}

fn names(snapshot: &CatalogueSnapshot) -> Vec<String> {
    snapshot.catalogue().images().map(|image| image.familiar_name()).collect()
}

/// The store as it was, in another directory.
fn backup(store: &TestStore) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    copy_tree(store.dir.path(), copy.path());
    copy
}

fn copy_tree(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir_all(&to).unwrap();
            copy_tree(&entry.path(), &to);
        } else {
            _ = std::fs::copy(entry.path(), &to).unwrap()
        }
    }
}

/// Puts the backup of the catalogue in place of what is there.
fn restore(backup: &tempfile::TempDir, store: &TestStore) {
    let catalogue = store.dir.path().join("catalogue");
    std::fs::remove_dir_all(&catalogue).unwrap();
    std::fs::create_dir(&catalogue).unwrap();
    copy_tree(&backup.path().join("catalogue"), &catalogue);
}

/// SEMANTICS: "A store that was restored from an older copy is followed."
#[test]
fn a_store_restored_from_a_backup_is_followed_once_that_is_certain() {
    let (store, cache) = (TestStore::new(), tempfile::tempdir().unwrap());
    let layer = store.layer(&plain(&[("f", file(b"1"))]));
    store.image("old:1", &[layer]);
    let backup = backup(&store);
    store.image("lost:1", &[layer]);
    let host = host(store.dir.path(), &cache);
    assert_eq!(names(&host.watcher.snapshot()), ["lost:1", "old:1"]);
    restore(&backup, &store);
    let (opened, now) = (Store::open(store.dir.path()).unwrap(), Instant::now());
    let look = |later: Duration| names(&host.watcher.update_at(&opened, now + later).unwrap());
    for later in [Duration::ZERO, CERTAIN / 2] {
        assert_eq!(look(later), ["lost:1", "old:1"], "it may be an old listing");
    }
    // The newest generation is there after all: it was an old listing.
    let number = host.watcher.snapshot().catalogue().generation();
    let newest = store.dir.path().join("catalogue").join(format!("{number:016x}"));
    std::fs::write(&newest, "").unwrap();
    assert_eq!(look(CERTAIN), ["lost:1", "old:1"]);
    std::fs::remove_file(&newest).unwrap();
    for later in [CERTAIN, CERTAIN * 2 - Duration::from_secs(1)] {
        assert_eq!(look(later), ["lost:1", "old:1"], "counted anew");
    }
    assert_eq!(look(CERTAIN * 2), ["old:1"]);
    assert_eq!(host.watcher.snapshot().catalogue().generation(), number - 1);
    assert_eq!(names(&self::host(store.dir.path(), &cache).watcher.snapshot()), ["old:1"], "after a restart too");
}

#[test]
fn other_generations_under_the_same_numbers_are_not_mixed_with_those_that_were_seen() {
    for more in [0, 1] {
        let (store, cache) = (TestStore::new(), tempfile::tempdir().unwrap());
        let layer = store.layer(&plain(&[("f", file(b"1"))]));
        store.image("old:1", &[layer]);
        let backup = backup(&store);
        store.image("lost:1", &[layer]);
        drop(host(store.dir.path(), &cache));
        // The restored store goes on as another one would: with a new leader.
        let restored = TestStore::in_directory(backup);
        restored.image("new:1", &[layer]);
        let mut expected = vec!["new:1", "old:1"];
        if more == 1 {
            restored.image("newer:1", &[layer]);
            expected.insert(1, "newer:1");
        }
        let host = host(restored.dir.path(), &cache);
        let snapshot = host.watcher.update(&Store::open(restored.dir.path()).unwrap()).unwrap();
        let mut found = names(&snapshot);
        found.sort();
        assert_eq!(found, expected, "{more}");
    }
}

#[test]
fn a_store_without_any_generation_leaves_hosts_what_they_know() {
    let (store, cache) = (TestStore::new(), tempfile::tempdir().unwrap());
    store.image("old:1", &[store.layer(&plain(&[("f", file(b"1"))]))]);
    let host = host(store.dir.path(), &cache);
    let catalogue = store.dir.path().join("catalogue");
    std::fs::remove_dir_all(&catalogue).unwrap();
    std::fs::create_dir(&catalogue).unwrap();
    let (opened, now) = (Store::open(store.dir.path()).unwrap(), Instant::now());
    for later in [Duration::ZERO, CERTAIN * 3] {
        assert_eq!(names(&host.watcher.update_at(&opened, now + later).unwrap()), ["old:1"]);
    }
}
