//! The rules that containerd's own tests of snapshotters hold them to, and those of shared snapshots.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::{Arc, Barrier};

use parking_lot::Mutex;
use proptest::prelude::*;

use super::*;

/// Trees that a test adds and takes away.
#[derive(Clone, Default)]
struct FakeTrees(Arc<Mutex<BTreeMap<Digest, Tree>>>);

impl Trees for FakeTrees {
    fn tree(&self, chain: &Digest) -> io::Result<Option<Tree>> {
        Ok(self.0.lock().get(chain).cloned())
    }
}

struct Fixture {
    snapshotter: Option<Snapshotter>,
    trees: FakeTrees,
    directory: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Fixture {
        let mut fixture =
            Fixture { snapshotter: None, trees: FakeTrees::default(), directory: tempfile::tempdir().unwrap() };
        fs::create_dir(fixture.root()).unwrap();
        fixture.restart();
        fixture
    }

    fn root(&self) -> std::path::PathBuf {
        self.directory.path().join("root")
    }

    /// Opens the same root again, as after a kill.
    fn restart(&mut self) {
        self.snapshotter = None;
        self.snapshotter = Some(Snapshotter::open(&self.root(), self.trees.clone()).unwrap());
    }

    fn get(&self) -> &Snapshotter {
        self.snapshotter.as_ref().unwrap()
    }

    /// Adds a chain of these layers to the store.
    fn chain(&self, layers: &[&str]) -> Digest {
        let layers: Vec<Digest> = layers.iter().map(|layer| Digest::of(layer.as_bytes())).collect();
        let chain = layers.iter().fold(None, |parent, layer| Some(Digest::chain(parent.as_ref(), layer))).unwrap();
        let path = self.directory.path().join(chain.hex());
        fs::create_dir_all(&path).unwrap();
        self.trees.0.lock().insert(chain, Tree { path, layers });
        chain
    }

    fn committed(&self, name: &str, parent: Option<&str>) {
        let key = format!("{name}-key");
        self.get().prepare(&key, parent, Labels::new()).unwrap();
        self.get().commit(name, &key, Labels::new()).unwrap();
    }

    /// Asks for a chain as containerd does, and returns the name of its snapshot.
    fn share(&self, chain: &Digest, parent: Option<&str>) -> String {
        let wanted = labels(&[(TARGET, &chain.to_string())]);
        let error = self.get().prepare("extract-1", parent, wanted).unwrap_err();
        assert!(matches!(&error, Error::AlreadyExists(name) if *name == chain.to_string()), "{error}");
        let filter = format!("labels.\"{TARGET}\"=={chain},parent==\"{}\"", parent.unwrap_or_default());
        let found = self.get().list(&[filter]).unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].record.kind, Kind::Committed);
        found[0].name.clone()
    }

    fn names(&self, filters: &[&str]) -> Vec<String> {
        let filters: Vec<String> = filters.iter().map(|&filter| filter.to_owned()).collect();
        let mut names: Vec<String> = self.get().list(&filters).unwrap().into_iter().map(|found| found.name).collect();
        names.sort();
        names
    }
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn lower(mounts: &[Mount]) -> Vec<String> {
    let option = mounts[0].options.iter().find_map(|option| option.strip_prefix("lowerdir="));
    option.map(|lower| lower.split(':').map(str::to_owned).collect()).unwrap_or_default()
}

#[test]
fn a_committed_snapshot_takes_the_place_of_its_key() {
    let fixture = Fixture::new();
    let snapshots = fixture.get();
    let made = snapshots.prepare("key", None, labels(&[("a", "1")])).unwrap();
    assert_eq!(
        (made.len(), made[0].kind, &made[0].options[..]),
        (1, "bind", &["rw".to_owned(), "rbind".to_owned()][..])
    );
    assert_eq!(fs::metadata(&made[0].source).unwrap().permissions().mode() & 0o7777, 0o755);
    fs::write(format!("{}/file", made[0].source), vec![0; 10_000]).unwrap();
    let active = snapshots.stat("key").unwrap();
    assert_eq!((active.kind, active.created), (Kind::Active, active.updated));
    let usage = snapshots.usage("key").unwrap();
    assert!(usage.inodes == 2 && usage.size >= 10_000, "{usage:?}");
    snapshots.commit("name", "key", labels(&[("b", "2")])).unwrap();
    assert!(matches!(snapshots.stat("key"), Err(Error::NotFound(_))));
    let committed = snapshots.stat("name").unwrap();
    assert_eq!((committed.kind, committed.id, committed.labels), (Kind::Committed, active.id, labels(&[("b", "2")])));
    assert_eq!(snapshots.usage("name").unwrap(), usage);
    assert!(matches!(snapshots.mounts("name"), Err(Error::FailedPrecondition(_))));
    let next = snapshots.prepare("next", Some("name"), Labels::new()).unwrap();
    assert_eq!((next[0].kind, lower(&next)), ("overlay", vec![made[0].source.clone()]));
    assert_eq!(snapshots.mounts("next").unwrap(), next);
    let view = snapshots.view("view", Some("name"), Labels::new()).unwrap();
    assert_eq!((view[0].kind, &view[0].source, &view[0].options[0][..]), ("bind", &made[0].source, "ro"));
    snapshots.commit("top", "next", Labels::new()).unwrap();
    let view = snapshots.view("view-2", Some("top"), Labels::new()).unwrap();
    assert_eq!((view[0].kind, lower(&view).len()), ("overlay", 2));
    assert!(!view[0].options.iter().any(|option| option.starts_with("upperdir")));
}

#[test]
fn what_may_not_be_is_refused_in_containerds_classes() {
    let fixture = Fixture::new();
    let snapshots = fixture.get();
    fixture.committed("c", None);
    snapshots.prepare("a", Some("c"), Labels::new()).unwrap();
    snapshots.view("v", Some("c"), Labels::new()).unwrap();
    for taken in ["a", "v", "c"] {
        assert!(matches!(snapshots.prepare(taken, None, Labels::new()), Err(Error::AlreadyExists(_))), "{taken}");
        assert!(matches!(snapshots.view(taken, Some("c"), Labels::new()), Err(Error::AlreadyExists(_))), "{taken}");
        assert!(matches!(snapshots.commit(taken, "a", Labels::new()), Err(Error::AlreadyExists(_))), "{taken}");
    }
    assert!(matches!(snapshots.prepare("b", Some("absent"), Labels::new()), Err(Error::NotFound(_))));
    assert!(matches!(snapshots.prepare("b", Some("a"), Labels::new()), Err(Error::InvalidArgument(_))));
    assert!(matches!(snapshots.commit("n", "absent", Labels::new()), Err(Error::NotFound(_))));
    assert!(matches!(snapshots.commit("n", "v", Labels::new()), Err(Error::FailedPrecondition(_))));
    assert!(matches!(snapshots.commit("n", "c", Labels::new()), Err(Error::FailedPrecondition(_))));
    assert!(matches!(snapshots.mounts("absent"), Err(Error::NotFound(_))));
    assert!(matches!(snapshots.usage("absent"), Err(Error::NotFound(_))));
    assert!(matches!(snapshots.remove("absent"), Err(Error::NotFound(_))));
    let error = snapshots.remove("c").unwrap_err();
    assert!(matches!(error, Error::FailedPrecondition(_)) && error.to_string().contains("remove"), "{error}");
    let long = labels(&[("l", &"v".repeat(4096))]);
    assert!(matches!(snapshots.prepare("long", None, long), Err(Error::InvalidArgument(_))));
    assert!(matches!(snapshots.list(&["name==".to_owned()]), Err(Error::Filter(_))));
    for name in ["a", "v", "c"] {
        snapshots.remove(name).unwrap();
    }
    assert_eq!(fixture.names(&[]), [""; 0]);
    assert_eq!(fs::read_dir(fixture.root().join("snapshots")).unwrap().count(), 0);
}

#[test]
fn labels_change_and_nothing_else_does() {
    let fixture = Fixture::new();
    let snapshots = fixture.get();
    fixture.committed("p", None);
    snapshots.view("v", Some("p"), labels(&[("l0", "v0")])).unwrap();
    let before = snapshots.stat("v").unwrap();
    let update = |pairs: &[(&str, &str)], paths: &[&str]| {
        let paths: Vec<String> = paths.iter().map(|&path| path.to_owned()).collect();
        snapshots.update("v", &labels(pairs), &paths)
    };
    let all = [("l1", "v1"), ("l2", "v2"), ("l3", "v3")];
    let updated = update(&all, &[]).unwrap();
    assert_eq!(updated.labels, labels(&all));
    assert!(updated.updated > before.updated);
    assert_eq!(Record { labels: before.labels.clone(), updated: before.updated, ..updated }, before);
    let updated = update(&[("l1", "new"), ("l4", "v4")], &["labels.l1", "labels.l2"]).unwrap();
    assert_eq!(updated.labels, labels(&[("l1", "new"), ("l3", "v3")]));
    assert_eq!(update(&[("l4", "v4")], &["labels"]).unwrap().labels, labels(&[("l4", "v4")]));
    for path in ["parent", "kind", "name", "label"] {
        assert!(matches!(update(&[], &[path]), Err(Error::InvalidArgument(_))), "{path}");
    }
    assert!(matches!(snapshots.update("absent", &Labels::new(), &[]), Err(Error::NotFound(_))));
    assert_eq!(snapshots.stat("v").unwrap().labels, labels(&[("l4", "v4")]));
}

#[test]
fn listings_obey_filters() {
    let fixture = Fixture::new();
    let snapshots = fixture.get();
    fixture.committed("p", None);
    snapshots.prepare("a", Some("p"), labels(&[("l", "2")])).unwrap();
    snapshots.prepare("a-np", None, Labels::new()).unwrap();
    snapshots.view("v", Some("p"), labels(&[("l", "3")])).unwrap();
    assert_eq!(fixture.names(&[]), ["a", "a-np", "p", "v"]);
    assert_eq!(fixture.names(&["kind==active"]), ["a", "a-np"]);
    assert_eq!(fixture.names(&["kind==view"]), ["v"]);
    assert_eq!(fixture.names(&["kind==committed"]), ["p"]);
    assert_eq!(fixture.names(&["parent==p"]), ["a", "v"]);
    assert_eq!(fixture.names(&["parent!=\"\""]), ["a", "v"]);
    assert_eq!(fixture.names(&["labels.l"]), ["a", "v"]);
    assert_eq!(fixture.names(&["labels.l==2", "name==p"]), ["a", "p"]);
    assert_eq!(fixture.names(&["name~=^a,parent==\"\""]), ["a-np"]);
}

#[test]
fn a_chain_of_the_store_is_there_without_its_layers() {
    let mut fixture = Fixture::new();
    let (base, whole) = (fixture.chain(&["1"]), fixture.chain(&["1", "2"]));
    let below = fixture.share(&base, None);
    assert_eq!(fixture.share(&base, None), below, "asked for twice, it is one");
    let above = fixture.share(&whole, Some(&below));
    assert_eq!(fixture.names(&[]), [below.clone(), above.clone()]);
    assert_eq!(fixture.get().stat(&above).unwrap().parent.as_deref(), Some(below.as_str()));
    assert_eq!(fixture.get().usage(&above).unwrap(), Usage::default(), "nothing lies on the local disk");
    let made = fixture.get().prepare("container", Some(&above), Labels::new()).unwrap();
    let tree = fixture.directory.path().join(whole.hex());
    let lower_directories = lower(&made);
    assert_eq!(lower_directories.len(), 1, "the tree of the whole chain");
    assert_eq!(fs::read_link(&lower_directories[0]).unwrap(), tree);
    // A view must not take over the options of the store's mount.
    let view = fixture.get().view("view", Some(&above), Labels::new()).unwrap();
    assert_eq!((view[0].kind, lower(&view).len()), ("overlay", 2));
    let list = fs::read_to_string(std::path::Path::new(&lower_directories[0]).with_file_name("layers")).unwrap();
    assert_eq!(list, format!("{}\n{}\n", Digest::of(b"1"), Digest::of(b"2")));
    // The engine's own layer on top, then a container on both.
    fixture.get().commit("local", "container", Labels::new()).unwrap();
    let made = fixture.get().prepare("container-2", Some("local"), Labels::new()).unwrap();
    assert_eq!(lower(&made).len(), 2);
    fixture.restart();
    assert_eq!(fixture.share(&whole, Some(&below)), above, "after a restart too");
    for name in ["container-2", "view", "local", &above, &below] {
        fixture.get().remove(name).unwrap();
    }
    assert!(tree.is_dir(), "the store keeps it");
    assert_eq!(fixture.names(&[]), [""; 0]);
    assert_eq!(fixture.share(&base, None), fixture.names(&[])[0], "it can come again");
}

#[test]
fn a_chain_under_a_local_parent_is_shared_too() {
    let fixture = Fixture::new();
    let whole = fixture.chain(&["1", "2"]);
    fixture.committed("local", None);
    let above = fixture.share(&whole, Some("local"));
    let made = fixture.get().prepare("container", Some(&above), Labels::new()).unwrap();
    assert_eq!(lower(&made).len(), 1, "the tree holds what is below it");
    let without_parent = fixture.share(&whole, None);
    assert_ne!(above, without_parent, "each parent has its own");
    let error = fixture.get().prepare("x", Some("absent"), labels(&[(TARGET, &whole.to_string())])).unwrap_err();
    assert!(matches!(error, Error::NotFound(_)), "{error}");
}

#[test]
fn what_the_store_lacks_is_the_engines_own() {
    let fixture = Fixture::new();
    for target in [Digest::of(b"unknown").to_string(), "sha256:12".to_owned(), "../../etc".to_owned()] {
        let made = fixture.get().prepare(&target, None, labels(&[(TARGET, &target)])).unwrap();
        assert_eq!(made[0].kind, "bind", "{target}");
    }
}

#[test]
fn the_owner_of_the_root_directory_is_handed_down() {
    let fixture = Fixture::new();
    let owner = |mounts: &[Mount]| {
        let upper = mounts[0].options.iter().find_map(|option| option.strip_prefix("upperdir="));
        let meta = fs::metadata(upper.unwrap_or(&mounts[0].source)).unwrap();
        (meta.uid(), meta.gid())
    };
    let own = owner(&fixture.get().prepare("plain", None, Labels::new()).unwrap());
    assert_eq!(own.0, 0, "these tests run as root, who alone can give files away");
    let mapped = labels(&[(UID_MAPPING, "0:100000:65536"), (GID_MAPPING, "0:200000:65536")]);
    let made = fixture.get().prepare("mapped", None, mapped).unwrap();
    assert_eq!(owner(&made), (100_000, 200_000));
    assert_eq!(made[0].options, ["rw", "rbind"], "containerd maps the ids itself");
    fixture.get().commit("base", "mapped", Labels::new()).unwrap();
    assert_eq!(owner(&fixture.get().prepare("child", Some("base"), Labels::new()).unwrap()), (100_000, 200_000));
    for wrong in ["", "0:1", "1:2:3", "0:1:0", "a:b:c"] {
        let labels = labels(&[(UID_MAPPING, wrong), (GID_MAPPING, "0:1:1")]);
        let made = fixture.get().prepare("wrong", None, labels);
        assert!(matches!(made, Err(Error::InvalidArgument(_))), "{wrong}");
    }
    let one = labels(&[(UID_MAPPING, "0:1:1")]);
    assert!(matches!(fixture.get().prepare("wrong", None, one), Err(Error::InvalidArgument(_))));
}

#[test]
fn many_who_ask_for_one_chain_get_one_snapshot() {
    let fixture = Fixture::new();
    let chain = fixture.chain(&["1"]);
    let start = Barrier::new(8);
    std::thread::scope(|scope| {
        for number in 0..8 {
            let (fixture, start) = (&fixture, &start);
            scope.spawn(move || {
                start.wait();
                let wanted = labels(&[(TARGET, &chain.to_string())]);
                let error = fixture.get().prepare("extract", None, wanted).unwrap_err();
                assert!(matches!(error, Error::AlreadyExists(_)), "{error}");
                let parent = fixture.names(&["kind==committed"]);
                fixture.get().prepare(&format!("c{number}"), Some(&parent[0]), Labels::new()).unwrap();
            });
        }
    });
    assert_eq!(fixture.names(&["kind==committed"]).len(), 1);
    assert_eq!(fixture.names(&["kind==active"]).len(), 8);
    let ids: std::collections::BTreeSet<u64> =
        fixture.get().list(&[]).unwrap().iter().map(|found| found.record.id).collect();
    assert_eq!(ids.len(), 9);
}

#[test]
fn a_store_that_is_mounted_elsewhere_is_found_again() {
    let mut fixture = Fixture::new();
    let chain = fixture.chain(&["1"]);
    let base = fixture.share(&chain, None);
    fixture.get().prepare("before", Some(&base), Labels::new()).unwrap();
    let old = fixture.directory.path().join(chain.hex());
    let new = fixture.directory.path().join("elsewhere");
    fs::rename(&old, &new).unwrap();
    let error = fixture.get().prepare("lost", Some(&base), Labels::new()).unwrap_err();
    assert!(matches!(&error, Error::Tree { path, .. } if *path == old), "{error}");
    assert!(matches!(fixture.get().mounts("before"), Err(Error::Tree { .. })));
    let known = fixture.trees.0.lock().remove(&chain).unwrap();
    assert!(matches!(fixture.get().mounts("before"), Err(Error::Gone { .. })));
    fixture.trees.0.lock().insert(chain, known);
    fixture.trees.0.lock().get_mut(&chain).unwrap().path = new.clone();
    fixture.restart();
    let made = fixture.get().mounts("before").unwrap();
    assert_eq!(fs::read_link(&lower(&made)[0]).unwrap(), new);
    // A layer of the engine's own in between hides nothing.
    fixture.get().prepare("key", Some(&base), Labels::new()).unwrap();
    fixture.get().commit("local", "key", Labels::new()).unwrap();
    fs::rename(&new, &old).unwrap();
    assert!(matches!(fixture.get().view("view", Some("local"), Labels::new()), Err(Error::Tree { .. })));
}

#[test]
fn snapshots_without_their_metadata_are_not_swept_away() {
    let mut fixture = Fixture::new();
    fixture.get().prepare("a", None, Labels::new()).unwrap();
    fixture.snapshotter = None;
    fs::remove_file(fixture.root().join("metadata.redb")).unwrap();
    let refused = |why: &str| {
        let error = Snapshotter::open(&fixture.root(), fixture.trees.clone()).err().unwrap();
        assert!(matches!(&error, Error::FailedPrecondition(text) if text.contains(why)), "{error}");
        assert!(fixture.root().join("snapshots/1/fs").is_dir());
    };
    refused("is missing");
    fs::write(fixture.root().join("metadata.redb"), "").unwrap();
    refused("is missing");
    // One of before.
    fs::rename(fixture.root().join("snapshots/1"), fixture.root().join("snapshots/9")).unwrap();
    fs::create_dir_all(fixture.root().join("snapshots/1/fs")).unwrap();
    fs::remove_file(fixture.root().join("metadata.redb")).unwrap();
    drop(Metadata::open(&fixture.root().join("metadata.redb")).unwrap());
    refused("is older than they are");
}

#[test]
fn a_link_that_a_power_cut_has_taken_is_made_again() {
    let fixture = Fixture::new();
    let chain = fixture.chain(&["1"]);
    let base = fixture.share(&chain, None);
    let directory = fixture.root().join("snapshots/1");
    fs::remove_dir_all(&directory).unwrap();
    assert_eq!(fixture.share(&chain, None), base);
    assert!(directory.join("fs").is_dir() && directory.join("layers").is_file());
}

#[test]
fn a_root_is_one_processs() {
    let fixture = Fixture::new();
    let error = Snapshotter::open(&fixture.root(), fixture.trees.clone()).err().unwrap().to_string();
    assert!(error.contains("in use by another snapshotter"), "{error}");
    for wrong in ["a,b", "a:b"] {
        let root = fixture.directory.path().join(wrong);
        fs::create_dir(&root).unwrap();
        assert!(matches!(Snapshotter::open(&root, fixture.trees.clone()), Err(Error::InvalidArgument(_))), "{wrong}");
    }
}

#[derive(Debug, Clone)]
enum Step {
    Prepare(u8, Option<u8>),
    View(u8, Option<u8>),
    Share(u8, Option<u8>),
    Commit(u8, u8),
    Remove(u8),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let name = || 0..6u8;
    prop_oneof![
        (name(), proptest::option::of(name())).prop_map(|(key, parent)| Step::Prepare(key, parent)),
        (name(), proptest::option::of(name())).prop_map(|(key, parent)| Step::View(key, parent)),
        (0..2u8, proptest::option::of(name())).prop_map(|(chain, parent)| Step::Share(chain, parent)),
        (name(), name()).prop_map(|(to, key)| Step::Commit(to, key)),
        name().prop_map(Step::Remove),
        Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Whatever is asked in whatever order: every record has its directory and its parents, every directory its record.
    #[test]
    fn records_and_directories_agree(steps in proptest::collection::vec(step(), 0..40)) {
        let mut fixture = Fixture::new();
        let chains = [fixture.chain(&["1"]), fixture.chain(&["2"])];
        let name = |number: u8| format!("n{number}");
        for step in steps {
            let snapshots = fixture.get();
            match step {
                Step::Prepare(key, parent) => drop(snapshots.prepare(&name(key), parent.map(name).as_deref(), Labels::new())),
                Step::View(key, parent) => drop(snapshots.view(&name(key), parent.map(name).as_deref(), Labels::new())),
                Step::Share(chain, parent) => {
                    let wanted = labels(&[(TARGET, &chains[usize::from(chain)].to_string())]);
                    drop(snapshots.prepare("x", parent.map(name).as_deref(), wanted));
                }
                Step::Commit(to, key) => drop(snapshots.commit(&name(to), &name(key), Labels::new())),
                Step::Remove(key) => drop(snapshots.remove(&name(key))),
                Step::Restart => fixture.restart(),
            }
            let all = fixture.get().list(&[]).unwrap();
            let directories = fs::read_dir(fixture.root().join("snapshots")).unwrap().count();
            prop_assert_eq!(directories, all.len());
            for found in &all {
                let files = fixture.root().join(format!("snapshots/{}/fs", found.record.id));
                prop_assert!(files.is_dir());
                if let Some(parent) = &found.record.parent {
                    prop_assert_eq!(fixture.get().stat(parent).unwrap().kind, Kind::Committed);
                }
                if found.record.kind != Kind::Committed {
                    prop_assert_eq!(fixture.get().mounts(&found.name).unwrap().len(), 1);
                }
            }
        }
    }
}
