//! Whole runs, with a store made by hand and no dockerd.

use std::path::PathBuf;

use super::*;
use crate::docker::samples::{self, Part};
use store::publisher::Publisher;

struct World {
    dir: tempfile::TempDir,
    publisher: Publisher,
    root: Root,
    owned: OwnedEntries,
    base: Digest,
    top: Digest,
}

impl World {
    /// A store with layers `base` and `top`, and an empty data-root.
    fn new() -> World {
        let dir = tempfile::tempdir().unwrap();
        let publisher = samples::store(&dir.path().join("store"));
        let base = samples::layer(&publisher, &[Part::Literal(b"h1"), Part::File("a", "hello\n")]).0;
        let top = samples::layer(&publisher, &[Part::Literal(b"h2"), Part::File("b", "more")]).0;
        let data = dir.path().join("data");
        std::fs::create_dir(&data).unwrap();
        let root = Root::open(&data).unwrap();
        let owned = OwnedEntries::new("/m".into(), dir.path().join("store"), String::new());
        World { dir, publisher, root, owned, base, top }
    }

    fn try_apply(&mut self, running: bool) -> Result<Outcome> {
        let store = self.publisher.store();
        let (wanted, present) = (DesiredState::read(store)?, ActualState::read(&self.root)?);
        Work { root: &self.root, store, wanted: &wanted, present: &present, running }.apply(&mut self.owned)
    }

    fn apply(&mut self) -> Outcome {
        self.try_apply(false).unwrap()
    }

    /// All files with their contents, and links with their targets.
    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut directories = vec![self.root.path().to_owned()];
        while let Some(directory) = directories.pop() {
            for entry in std::fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                let meta = std::fs::symlink_metadata(&path).unwrap();
                if meta.is_dir() {
                    directories.push(path);
                } else if meta.is_symlink() {
                    files.insert(path.clone(), std::fs::read_link(path).unwrap().into_os_string().into_encoded_bytes());
                } else {
                    files.insert(path.clone(), std::fs::read(path).unwrap());
                }
            }
        }
        files
    }

    fn entry(&self, chain: &Digest, file: &str) -> String {
        std::fs::read_to_string(self.root.layer_entry(chain).join(file)).unwrap()
    }
}

#[test]
fn an_image_is_written_as_docker_writes_it_and_once() {
    let mut world = World::new();
    let (base, top) = (world.base, world.top);
    let image = samples::image(&world.publisher, "app", &[base, top]);
    let outcome = world.apply();
    assert_eq!((outcome.images_added, outcome.layers_added, outcome.names_set.len()), (1, 2, 2));
    let chain = Digest::chain(Some(&base), &top);
    assert_eq!(world.entry(&chain, "diff"), top.to_string());
    assert_eq!(world.entry(&chain, "parent"), base.to_string());
    assert_eq!(world.entry(&chain, "size"), "4");
    assert_eq!(world.entry(&chain, "cache-id"), chain.hex());
    assert_eq!(std::fs::read(world.root.image_content().join(image.config.hex())).unwrap().len(), {
        world.publisher.store().blob(&image.config).unwrap().len()
    });
    let references = References::read(&world.root).unwrap();
    assert_eq!(references.get("q.io/app:v1"), Some(image.config));
    assert_eq!(references.get(&format!("q.io/app@{}", image.target)), Some(image.config));
    let origins = world.root.distribution().join("v2metadata-by-diffid/sha256").join(top.hex());
    let blob = Digest::of(top.as_bytes());
    let expected = format!("[{{\"Digest\":\"{blob}\",\"SourceRepository\":\"q.io/app\",\"HMAC\":\"\"}}]");
    assert_eq!(std::fs::read_to_string(origins).unwrap(), expected);
    let by_digest = world.root.distribution().join("diffid-by-digest/sha256").join(blob.hex());
    assert_eq!(std::fs::read_to_string(by_digest).unwrap(), top.to_string());
    let before = world.files();
    let outcome = world.apply();
    assert_eq!((outcome.images_added, outcome.layers_added, outcome.names_set.len()), (0, 0, 0));
    assert_eq!(world.files(), before);
}

#[test]
fn what_vanishes_from_the_store_leaves_nothing_but_origins() {
    let mut world = World::new();
    let (base, top) = (world.base, world.top);
    let image = samples::image(&world.publisher, "app", &[base, top]);
    world.apply();
    samples::remove(&world.publisher, &image);
    let outcome = world.try_apply(true).unwrap();
    assert_eq!((outcome.waiting, outcome.images_removed), (Waiting { images: 1, layers: 2, names: 2 }, 0));
    let outcome = world.apply();
    assert_eq!((outcome.images_removed, outcome.layers_removed, outcome.names_removed.len()), (1, 2, 2));
    let left = world.files().into_keys().filter(|path| !path.starts_with(world.root.distribution()));
    let left: Vec<_> = left.map(|path| path.file_name().unwrap().to_owned()).collect();
    assert_eq!(left, ["cachefs-data-root.json", "repositories.json"]);
    assert!(world.owned.layers.is_empty() && world.owned.images.is_empty() && world.owned.references.is_empty());
}

#[test]
fn a_running_dockerd_meets_nothing_that_it_does_not_know() {
    let mut world = World::new();
    samples::image(&world.publisher, "app", &[world.base]);
    world.apply();
    let before = world.files();
    samples::image(&world.publisher, "other", &[world.base, world.top]);
    let outcome = world.try_apply(true).unwrap();
    assert!(outcome.restart_needed);
    assert_eq!(outcome.waiting, Waiting { images: 1, layers: 1, names: 2 });
    assert_eq!(world.files(), before);
    // Damage to what it knows is repaired all the same.
    std::fs::remove_file(world.root.overlay_layer(&world.base.hex()).join("diff")).unwrap();
    world.try_apply(true).unwrap();
    assert_eq!(world.files(), before);
    // One that starts while layers are written meets none of them.
    std::fs::create_dir(world.root.path().join("volumes")).unwrap();
    let held = std::fs::File::create(world.root.volume_database()).unwrap();
    held.lock().unwrap();
    let error = world.try_apply(false).unwrap_err().to_string();
    assert!(error.contains("would not see the change: stop it"), "{error}");
    let known = ActualState::read(&world.root).unwrap();
    assert_eq!((known.layers.len(), known.images.len(), known.references.iter().count()), (1, 1, 2));
    drop(held);
    assert_eq!(world.apply().images_added, 1);
}

#[test]
fn a_layer_that_the_store_lost_costs_only_its_images() {
    let mut world = World::new();
    let lost = samples::layer(&world.publisher, &[Part::Literal(b"h3")]).0;
    samples::image(&world.publisher, "broken", &[world.base, lost, world.top]);
    let whole = samples::image(&world.publisher, "whole", &[world.base, world.top]);
    std::fs::remove_dir_all(world.publisher.store().layout().layer(&lost)).unwrap();
    let outcome = world.apply();
    assert_eq!(outcome.skipped.len(), 1);
    assert_eq!(outcome.skipped[0].image, "q.io/broken:v1");
    assert_eq!(outcome.skipped[0].why, format!("layer {lost} is not in the store"));
    assert_eq!(outcome.images_added, 1);
    let references = References::read(&world.root).unwrap();
    let names: Vec<_> = references.iter().collect();
    assert_eq!(names.len(), 2);
    assert!(names.iter().all(|(_, image)| *image == whole.config));
}

#[test]
fn links_follow_the_mount_and_broken_layers_are_repaired() {
    let mut world = World::new();
    samples::image(&world.publisher, "app", &[world.base, world.top]);
    world.apply();
    let before = world.files();
    world.owned.mount = "/elsewhere".into();
    world.apply();
    let diff = world.root.overlay_layer(&world.base.hex()).join("diff");
    assert_eq!(std::fs::read_link(&diff).unwrap(), PathBuf::from("/elsewhere/trees").join(world.base.hex()));
    world.owned.mount = "/m".into();
    std::fs::remove_dir_all(world.root.overlay_layer(&world.base.hex())).unwrap();
    std::fs::remove_file(world.root.layer_entry(&world.base).join("size")).unwrap();
    world.apply();
    assert_eq!(world.files(), before);
}

#[test]
fn on_top_of_a_layer_that_docker_pulled() {
    let mut world = World::new();
    samples::image(&world.publisher, "app", &[world.base, world.top]);
    world.root.make_directories().unwrap();
    let (entry, directory) = (world.root.layer_entry(&world.base), world.root.overlay_layer("pulled"));
    std::fs::create_dir_all(&entry).unwrap();
    std::fs::create_dir_all(directory.join("diff")).unwrap();
    std::fs::write(directory.join("link"), "SHORT").unwrap();
    for (name, text) in [("cache-id", "pulled"), ("size", "6"), ("diff", &world.base.to_string())] {
        std::fs::write(entry.join(name), text).unwrap();
    }
    let before = world.files();
    let outcome = world.apply();
    assert_eq!(outcome.layers_added, 1);
    let chain = Digest::chain(Some(&world.base), &world.top);
    assert_eq!(world.entry(&chain, "parent"), world.base.to_string());
    assert!(!world.root.overlay_layer(&chain.hex()).join("lower").exists(), "the tree of the store is whole");
    let after = world.files();
    assert!(before.iter().all(|(path, content)| after.get(path) == Some(content)));
}

#[test]
fn a_name_that_changed_meanwhile_is_left_alone() {
    let mut world = World::new();
    samples::image(&world.publisher, "app", &[world.base]);
    world.root.make_directories().unwrap();
    let store = world.publisher.store();
    let (wanted, present) = (DesiredState::read(store).unwrap(), ActualState::read(&world.root).unwrap());
    let mut references = References::default();
    references.set("q.io/app:v1", Digest::of(b"mine"));
    references.write(&world.root).unwrap();
    let work = Work { root: &world.root, store, wanted: &wanted, present: &present, running: false };
    let outcome = work.apply(&mut world.owned).unwrap();
    assert_eq!(outcome.names_kept, BTreeSet::from(["q.io/app:v1".to_owned()]));
    assert!(!world.owned.references.contains_key("q.io/app:v1"));
    assert_eq!(References::read(&world.root).unwrap().get("q.io/app:v1"), Some(Digest::of(b"mine")));
    assert!(world.dir.path().is_dir());
}

#[test]
fn a_config_that_docker_cannot_use_is_left_out_and_the_name_keeps_its_image() {
    for more in [r#","os":"Linux""#, r#","OS":"LINUX""#, r#","created":"""#, r#","config":{"Labels":{"a":1}}"#] {
        let mut world = World::new();
        let good = samples::image(&world.publisher, "app", &[world.base]);
        world.apply();
        let bad = samples::image_with(&world.publisher, "app", &[world.base, world.top], more);
        samples::image(&world.publisher, "other", &[world.top]);
        let outcome = world.apply();
        let skipped: Vec<_> = outcome.skipped.iter().map(|skipped| skipped.image.as_str()).collect();
        assert_eq!((skipped, outcome.images_added), (vec!["q.io/app:v1"], 1), "{more}");
        assert!(outcome.skipped[0].why.starts_with("Docker cannot use its config: "), "{}", outcome.skipped[0].why);
        let present = ActualState::read(&world.root).unwrap();
        assert_eq!(present.references.get("q.io/app:v1"), Some(good.config), "{more}");
        assert!(present.images.contains_key(&good.config) && !present.images.contains_key(&bad.config));
    }
}

#[test]
fn a_config_with_keys_in_another_case_is_an_image() {
    let mut world = World::new();
    samples::image_with(&world.publisher, "app", &[world.base], r#","OS":"linux","RootFS":{"Type":"layers"}"#);
    assert_eq!(world.apply().images_added, 1);
}
