//! Collections against a real store: what is removed, what stays, and what can still be read.

use std::collections::{BTreeSet, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use coordinator_api::retention::{
    CollectSettings, CollectionReport, GarbageItem, GarbageKind, GarbageReason, Quota, RetentionRule,
};
use parking_lot::Mutex;
use store::image::{LayerRecord, Platform, RequestedBy};
use store::layer::{InodeIndex, Source};
use store::pack::thinned::{PackState, inspect};
use store::publisher::{Object, Publisher, create};
use store::reader::Store;
use store::{ContentDigest, Digest};

use super::survey::Sizes;
use super::*;
use crate::identity::hosts::LayersInUse;
use crate::state::events::Events;
use crate::state::state_db::StateDb;
use crate::state::state_db::memory::MemoryStateDb;
use crate::unpack::fixture::tar_of;
use crate::unpack::{Expect, unpack_layer};

/// The hosts' leases, set by each test.
struct Hosts(Mutex<LayersInUse>);

impl Holds for Hosts {
    fn layers_in_use(&self) -> LayersInUse {
        self.0.lock().clone()
    }
}

/// A store with the coordinator's components.
struct World {
    collector: Arc<GarbageCollector>,
    state_db: Arc<MemoryStateDb>,
    hosts: Arc<Hosts>,
    publisher: Arc<Publisher>,
    directory: tempfile::TempDir,
}

/// Files of a layer: name, and seed of the content.
type Files<'a> = &'a [(&'a str, u64)];

/// 300 kB that do not compress.
fn content(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..300_000).map(|_| next()).collect()
}

fn lead(
    directory: &std::path::Path,
    state_db: &Arc<MemoryStateDb>,
    hosts: &Arc<Hosts>,
) -> (Arc<Publisher>, Arc<GarbageCollector>) {
    let publisher = Arc::new(Publisher::open(directory, "test").unwrap());
    let events = Arc::new(Events::open(Arc::clone(state_db) as _).unwrap());
    let collector =
        GarbageCollector::open(Arc::clone(&publisher), Arc::clone(state_db) as _, Arc::clone(hosts) as _, events)
            .unwrap();
    (publisher, Arc::new(collector))
}

impl World {
    fn new() -> World {
        let directory = tempfile::tempdir().unwrap();
        create(directory.path()).unwrap();
        let state_db = Arc::new(MemoryStateDb::default());
        let hosts = Arc::new(Hosts(Mutex::new(LayersInUse::Layers(BTreeSet::new()))));
        let (publisher, collector) = lead(directory.path(), &state_db, &hosts);
        World { collector, state_db, hosts, publisher, directory }
    }

    /// Publishes a layer and returns its diffID.
    fn layer(&self, files: Files<'_>) -> Digest {
        let tar = tar_of(files.iter().map(|(name, seed)| (*name, content(*seed))));
        let diff_id = Digest::of(&tar);
        unpack_layer(&self.publisher, self.state_db.locations(), tar.as_slice(), &Expect { diff_id }).unwrap();
        diff_id
    }

    /// Publishes an image of these layers.
    fn image(&self, name: &str, published_at: u64, layers: &[Files<'_>]) -> ImageRecord {
        let reference: ImageRef = name.parse().unwrap();
        let record = |files: &Files<'_>| {
            let diff_id = self.layer(files);
            LayerRecord { diff_id, size: 1, blob: diff_id, blob_size: 1, media_type: String::new() }
        };
        let manifest = Digest::of(name.as_bytes());
        self.publisher.put_blob(&manifest, name.as_bytes()).unwrap();
        let image = ImageRecord {
            repository: reference.canonical_repository(),
            tag: reference.tag().map(str::to_owned),
            target: manifest,
            manifest,
            media_type: String::new(),
            config: manifest,
            platform: Platform::host(),
            layers: layers.iter().map(record).collect(),
            published_at,
            ordered_by: RequestedBy::Operator,
        };
        self.publisher.commit(vec![Change::Set(Arc::new(image.clone()))]).unwrap();
        image
    }

    fn remove(&self, image: &ImageRecord) {
        let reference = image.familiar_name().parse().unwrap();
        self.collector.remove(&reference, image, Forced::No).unwrap();
    }

    /// Runs a collection, which must not fail.
    fn collect(&self, grace: u64) -> CollectionReport {
        let report = run::collect(&self.collector, Some(grace));
        assert_eq!((&report.stopped, &report.failures), (&None, &Vec::new()));
        report
    }

    fn has(&self, layer: &Digest) -> bool {
        self.publisher.store().has_layer(layer).unwrap()
    }

    /// Reads every byte of a layer through a newly opened store.
    fn read(&self, layer: &Digest, files: Files<'_>) {
        let store = Store::open(self.directory.path()).unwrap();
        let index = store.index(layer).unwrap();
        for (name, seed) in files {
            let file = index.inode(index.resolve(name.as_bytes()).unwrap().unwrap()).unwrap();
            let mut bytes: Vec<u8> = Vec::new();
            for number in 0..file.piece_count() {
                let piece = index.piece(&file, number).unwrap();
                let Source::Chunk { chunk, start, .. } = piece.source else { panic!("a hole in {name}") };
                bytes.extend(store.read_chunk(&chunk).unwrap().piece(start, piece.len).unwrap());
            }
            assert!(bytes == content(*seed), "{name} of {layer}");
        }
    }

    /// The packs in the store, with the bytes that they take on the disk.
    fn packs(&self) -> Vec<(ContentDigest, u64)> {
        let survey = Sizes::default().survey(self.publisher.store()).unwrap();
        let mut packs: Vec<_> = survey.packs.into_iter().collect();
        packs.sort_unstable();
        packs
    }

    fn pack_path(&self, pack: &ContentDigest) -> PathBuf {
        self.publisher.store().layout().pack(pack)
    }
}

fn kinds(items: &[GarbageItem]) -> Vec<GarbageKind> {
    let mut kinds: Vec<_> = items.iter().map(|item| item.kind).collect();
    kinds.sort_unstable();
    kinds
}

#[test]
fn what_was_removed_goes_when_its_grace_is_over_and_not_before() {
    let world = World::new();
    let keep = world.image("q.io/keep:1", 1, &[&[("shared", 1)], &[("k", 2)]]);
    let gone = world.image("q.io/gone:1", 1, &[&[("shared", 1)], &[("g", 3)]]);
    assert_eq!(world.collector.plan(None).unwrap().items, []);
    world.remove(&gone);
    let hour = 3600;
    let plan = world.collector.plan(Some(hour)).unwrap();
    assert_eq!(kinds(&plan.items), [GarbageKind::Layer, GarbageKind::Pack, GarbageKind::Blob]);
    assert!(plan.items.iter().all(|item| item.due > plan.at && item.reason == GarbageReason::Unreferenced));
    assert!(plan.needed_bytes < plan.store_bytes);
    let report = world.collect(hour);
    assert_eq!((report.items.len(), report.marked, report.freed_bytes), (0, 3, 0));
    assert_eq!(world.collect(hour).marked, 3, "the grace is not over");
    assert!(world.has(&gone.layers[1].diff_id));
    // Backdates the marks by more than an hour.
    let table = Marks::of(&*world.state_db);
    let marks = table.remembered().unwrap().marks;
    let objects: HashSet<Object> = marks.keys().copied().collect();
    table.update(&mut marks.clone(), &HashSet::new(), &|_| false, age::wall()).unwrap();
    table.update(&mut Default::default(), &objects, &|_| false, age::wall() - hour - 5).unwrap();
    let report = world.collect(hour);
    assert_eq!(kinds(&report.items), [GarbageKind::Layer, GarbageKind::Pack, GarbageKind::Blob]);
    assert!(report.freed_bytes > 300_000 && report.marked == 0);
    assert!(!world.has(&gone.layers[1].diff_id) && world.has(&gone.layers[0].diff_id));
    world.read(&keep.layers[0].diff_id, &[("shared", 1)]);
    world.read(&keep.layers[1].diff_id, &[("k", 2)]);
    assert_eq!(world.collector.plan(None).unwrap().items, []);
    let trash = world.publisher.store().layout().trash_of(world.publisher.epoch());
    assert_eq!(std::fs::read_dir(trash).unwrap().count(), 0);
}

#[test]
fn a_layer_whose_pieces_lie_in_another_ones_pack_reads_on_and_the_rest_of_the_pack_is_freed() {
    let world = World::new();
    let first: Files<'_> = &[("a", 1), ("b", 2), ("c", 3), ("d", 4), ("e", 5), ("f", 6), ("g", 7), ("h", 8)];
    let second: Files<'_> = &[("other", 9), ("copy of c", 3)];
    let gone = world.image("q.io/first:1", 1, &[first]);
    let kept = world.image("q.io/second:1", 1, &[second]);
    let before = world.packs();
    world.remove(&gone);
    let plan = world.collector.plan(Some(0)).unwrap();
    assert!(plan.items.iter().any(|item| item.kind == GarbageKind::PackPart && item.bytes > 2_000_000), "{plan:?}");
    let report = world.collect(0);
    assert_eq!(kinds(&report.items), [GarbageKind::Layer, GarbageKind::PackPart, GarbageKind::Blob]);
    let after = world.packs();
    assert_eq!(before.len(), after.len());
    let sum = |packs: &[(ContentDigest, u64)]| packs.iter().map(|(_, size)| *size).sum::<u64>();
    assert!(sum(&before) > 2_600_000 && sum(&after) < 800_000, "{before:?} {after:?}");
    assert!(report.freed_bytes > 1_900_000);
    world.read(&kept.layers[0].diff_id, second);
    let thinned: Vec<_> = after
        .iter()
        .filter(|(pack, _)| matches!(inspect(&world.pack_path(pack), pack).unwrap(), PackState::Thinned(_)))
        .collect();
    assert_eq!(thinned.len(), 1);
    assert_eq!(kinds(&world.collect(0).items), [], "it is as thin as it should be");
    // A new layer stores again what was dropped, but not what is still there.
    let third: Files<'_> = &[("again a", 1), ("again c", 3)];
    let again = world.image("q.io/third:1", 1, &[third]);
    world.read(&again.layers[0].diff_id, third);
    // The first layer comes back.
    let back = world.image("q.io/first:2", 1, &[first]);
    world.read(&back.layers[0].diff_id, first);
    world.read(&kept.layers[0].diff_id, second);
}

#[test]
fn what_a_host_leases_stays_and_nothing_goes_before_hosts_are_known() {
    let world = World::new();
    let image = world.image("q.io/a:1", 1, &[&[("a", 1)]]);
    let layer = image.layers[0].diff_id;
    world.remove(&image);
    *world.hosts.0.lock() = LayersInUse::NotYetKnown { until: Timestamp::UNIX_EPOCH };
    let report = run::collect(&world.collector, Some(0));
    assert!(report.stopped.unwrap().contains("hosts have not all been heard of"));
    assert!(world.collector.plan(Some(0)).unwrap().waiting.is_some());
    *world.hosts.0.lock() = LayersInUse::Layers(BTreeSet::from([layer]));
    assert_eq!(kinds(&world.collect(0).items), [GarbageKind::Blob], "its manifest is no longer needed");
    world.read(&layer, &[("a", 1)]);
    *world.hosts.0.lock() = LayersInUse::Layers(BTreeSet::new());
    assert_eq!(kinds(&world.collect(0).items), [GarbageKind::Layer, GarbageKind::Pack]);
}

#[test]
fn rules_and_quota_take_images_but_neither_pinned_nor_leased_ones() {
    let world = World::new();
    let [pinned, leased, old, new] = [("pinned", 1, 1), ("leased", 2, 1), ("old", 3, 1), ("new", 4, 100)]
        .map(|(tag, seed, at)| world.image(&format!("q.io/a:{tag}"), at, &[&[(tag, seed)]]));
    world.collector.pin(&"q.io/a:pinned".parse().unwrap()).unwrap();
    *world.hosts.0.lock() = LayersInUse::Layers(BTreeSet::from([leased.layers[0].diff_id]));
    let rule = RetentionRule { pattern: "q.io/*".into(), keep_last: Some(1), keep_for_seconds: None };
    let mut policy = RetentionPolicy { rules: vec![rule], ..RetentionPolicy::default() };
    world.collector.set_policy(&policy).unwrap();
    let plan = world.collector.plan(None).unwrap();
    let named: Vec<_> = plan.items.iter().filter(|item| item.kind == GarbageKind::Image).collect();
    assert_eq!((named.len(), named[0].name.as_str()), (1, "q.io/a:old"));
    assert!(named[0].bytes > 300_000);
    let report = world.collect(3600);
    assert_eq!(report.items.iter().map(|item| item.name.as_str()).collect::<Vec<_>>(), ["q.io/a:old"]);
    assert!(world.has(&old.layers[0].diff_id), "its layers have their grace");
    let tags = || world.publisher.catalogue().images().filter_map(|image| image.tag.clone()).collect::<Vec<_>>();
    assert_eq!(tags(), ["leased", "new", "pinned"]);
    // There is room for one image only: the newest is one of the last, the others are protected.
    policy.quota = Some(Quota { limit_bytes: 400_000, high_percent: 90, low_percent: 80 });
    world.collector.set_policy(&policy).unwrap();
    assert!(world.collector.plan(None).unwrap().over_quota_bytes > 500_000);
    policy.rules.clear();
    world.collector.set_policy(&policy).unwrap();
    world.collect(3600);
    assert_eq!(tags(), ["leased", "pinned"]);
    let named: ImageRef = "q.io/a:pinned".parse().unwrap();
    assert!(world.collector.remove(&named, &pinned, Forced::No).unwrap_err().to_string().contains("is pinned"));
    world.collector.unpin(&"q.io/a:pinned".parse().unwrap()).unwrap();
    assert!(world.collector.unpin(&"q.io/a:pinned".parse().unwrap()).is_err());
    world.collect(3600);
    assert_eq!(tags(), ["leased"]);
    world.read(&new.layers[0].diff_id, &[("new", 4)]);
}

#[test]
fn a_pin_is_lifted_with_a_forced_removal_and_may_come_before_its_image() {
    let world = World::new();
    let reference: ImageRef = "q.io/a:1".parse().unwrap();
    world.collector.pin(&reference).unwrap();
    let image = world.image("q.io/a:1", 1, &[&[("a", 1)]]);
    assert!(world.collector.remove(&reference, &image, Forced::No).is_err());
    world.collector.remove(&reference, &image, Forced::Yes).unwrap();
    assert_eq!((world.publisher.catalogue().images().count(), world.publisher.catalogue().pins().count()), (0, 0));
}

#[test]
fn a_pinned_digest_keeps_its_bytes_whatever_becomes_of_its_tag() {
    let world = World::new();
    let files: &[Files<'_>] = &[&[("a", 1)]];
    let image = world.image("q.io/a:3", 1, files);
    let by_digest: ImageRef = format!("q.io/a@{}", image.manifest).parse().unwrap();
    world.collector.pin(&by_digest).unwrap();
    // Retention leaves it alone; removing the pinned name itself requires force.
    let rule = RetentionRule { pattern: "q.io/*".into(), keep_last: None, keep_for_seconds: Some(1) };
    world.collector.set_policy(&RetentionPolicy { rules: vec![rule], ..RetentionPolicy::default() }).unwrap();
    world.collect(0);
    assert_eq!(world.publisher.catalogue().images().count(), 1);
    assert!(world.collector.remove(&by_digest, &image, Forced::No).unwrap_err().to_string().contains("is pinned"));
    world.remove(&image);
    world.collect(0);
    let catalogue = world.publisher.catalogue();
    let listed: Vec<_> = catalogue.images().map(|image| (image.familiar_name(), catalogue.is_pinned(image))).collect();
    assert_eq!(listed, [(by_digest.to_string(), true)]);
    world.read(&image.layers[0].diff_id, &[("a", 1)]);
    let kept = Arc::clone(catalogue.images().next().unwrap());
    assert!(world.collector.remove(&by_digest, &kept, Forced::No).is_err());
    world.collector.remove(&by_digest, &kept, Forced::Yes).unwrap();
    world.collect(0);
    assert!(!world.has(&image.layers[0].diff_id), "and goes once it is let go");
}

#[test]
fn orphans_go_and_what_a_pull_holds_starts_its_grace_anew() {
    let world = World::new();
    let files: Files<'_> = &[("a", 1)];
    let layer = world.layer(files);
    let report = world.collect(3600);
    assert_eq!(report.marked, 2);
    let hold = world.publisher.hold([layer]);
    assert_eq!(kinds(&world.collect(0).items), []);
    drop(hold);
    // It was held since the last collection, so it has not been unreferenced as long as its mark says.
    let report = world.collect(3600);
    assert_eq!((report.items.len(), report.marked), (0, 2));
    assert_eq!(kinds(&world.collect(0).items), [GarbageKind::Layer, GarbageKind::Pack]);
}

#[test]
fn work_that_began_before_is_waited_for_and_pulls_go_on_meanwhile() {
    let world = World::new();
    let files: Files<'_> = &[("a", 1), ("b", 2)];
    let gone = world.image("q.io/a:1", 1, &[files]);
    world.remove(&gone);
    let early = world.publisher.stage().unwrap();
    std::thread::scope(|scope| {
        let collecting = scope.spawn(|| world.collect(0));
        let is_waiting = || {
            let running = world.collector.status().running;
            running.is_some_and(|progress| progress.phase == CollectionPhase::Waiting)
        };
        while !is_waiting() {
            assert!(!collecting.is_finished(), "it must wait for the work that began before");
            std::thread::yield_now();
        }
        // The same layer is pulled while the collection waits to remove its pack.
        let back = world.image("q.io/a:2", 1, &[files]);
        assert_eq!(back.layers[0].diff_id, gone.layers[0].diff_id);
        drop(early);
        let report = collecting.join().unwrap();
        assert!(report.spared >= 1, "the pack is used again");
    });
    world.read(&gone.layers[0].diff_id, files);
}

/// A store with much to collect: one pack entirely, another one mostly.
fn wasteful() -> (World, [ContentDigest; 2]) {
    let world = World::new();
    let gone = world.image("q.io/gone:1", 1, &[&[("a", 1)]]);
    let big: Files<'_> = &[("b", 2), ("c", 3), ("d", 4), ("e", 5), ("f", 6), ("g", 7), ("h", 8)];
    let shared = world.image("q.io/shared:1", 1, &[big]);
    world.image("q.io/shares:1", 1, &[&[("copy of b", 2)]]);
    let pack = |image: &ImageRecord| world.publisher.store().index(&image.layers[0].diff_id).unwrap().pack(0).unwrap();
    let packs = [pack(&gone), pack(&shared)];
    [&gone, &shared].into_iter().for_each(|image| world.remove(image));
    (world, packs)
}

/// A collection removes layers and blobs but leaves all packs as they are, and says why.
fn check_that_packs_stay(world: &World, why: &str) {
    let before = world.packs();
    let plan = world.collector.plan(Some(0)).unwrap();
    assert!(plan.waiting.as_ref().is_some_and(|waiting| waiting.contains(why)), "{plan:?}");
    let taken = |items: &[GarbageItem], kind| items.iter().filter(|item| item.kind == kind).count();
    for _ in 0..2 {
        let report = run::collect(&world.collector, Some(0));
        for items in [&plan.items, &report.items] {
            assert_eq!((taken(items, GarbageKind::Pack), taken(items, GarbageKind::PackPart)), (0, 0), "{items:?}");
        }
        assert!(report.stopped.is_none() && report.failures.len() == 1, "{report:?}");
        assert!(report.failures[0].contains(why) && report.failures[0].contains("fsck --repair"), "{report:?}");
        assert_eq!(world.packs(), before, "no pack goes, and none is thinned");
    }
    assert_eq!(world.publisher.catalogue().collected(), 0, "nobody need forget where pieces lie");
}

/// After the repair, everything that was due before is removed.
fn check_that_packs_go([whole, part]: [ContentDigest; 2], world: &World) {
    let report = world.collect(0);
    let names = |kind| report.items.iter().filter(move |item| item.kind == kind).map(|item| item.name.as_str());
    assert_eq!(names(GarbageKind::Pack).collect::<Vec<_>>(), [whole.to_string()]);
    assert_eq!(names(GarbageKind::PackPart).collect::<Vec<_>>(), [part.to_string()]);
    assert!(!world.pack_path(&whole).exists() && world.pack_path(&part).exists());
    world.read(&world.layer(&[("copy of b", 2)]), &[("copy of b", 2)]);
}

#[test]
fn while_a_layers_index_cannot_be_read_no_pack_goes() {
    let (world, packs) = wasteful();
    let damaged = world.image("q.io/damaged:1", 1, &[&[("z", 20)]]).layers[0].diff_id;
    let index = world.publisher.store().layout().index(&damaged);
    let whole = std::fs::read(&index).unwrap();
    std::fs::write(&index, b"x").unwrap();
    check_that_packs_stay(&world, "cannot be read");
    std::fs::write(&index, whole).unwrap();
    check_that_packs_go(packs, &world);
    world.read(&damaged, &[("z", 20)]);
}

#[test]
fn while_an_image_lacks_a_layer_no_pack_goes() {
    let (world, packs) = wasteful();
    let files: Files<'_> = &[("z", 20), ("y", 21)];
    let missing = world.image("q.io/missing:1", 1, &[files]).layers[0].diff_id;
    // This holds even if the database knows what the layer used: a layer that is fetched again may use other packs.
    assert_eq!(world.collector.plan(Some(0)).unwrap().waiting, None);
    let (layer, aside) = (world.publisher.store().layout().layer(&missing), world.directory.path().join("aside"));
    std::fs::rename(&layer, &aside).unwrap();
    check_that_packs_stay(&world, &format!("layer {missing} cannot be read (it is missing)"));
    std::fs::rename(&aside, &layer).unwrap();
    check_that_packs_go(packs, &world);
    world.read(&missing, files);
}

#[test]
fn an_unreadable_layer_that_nobody_needs_goes_and_holds_nothing_up() {
    let (world, packs) = wasteful();
    let orphan = world.layer(&[("z", 20)]);
    std::fs::write(world.publisher.store().layout().index(&orphan), b"x").unwrap();
    let own = world.packs().len();
    let first = world.collect(0);
    assert!(first.items.iter().any(|item| item.name == orphan.to_string()), "{first:?}");
    assert!(!world.has(&orphan));
    let second = world.collect(0);
    let gone: Vec<_> = first.items.iter().chain(&second.items).filter(|item| item.kind == GarbageKind::Pack).collect();
    assert_eq!((gone.len(), world.packs().len()), (2, own - 2), "{gone:?}");
    assert!(!world.pack_path(&packs[0]).exists() && world.pack_path(&packs[1]).exists());
}

#[test]
fn a_coordinator_that_missed_a_collection_forgets_where_pieces_lie() {
    let world = World::new();
    let big: Files<'_> = &[("a", 1), ("b", 2), ("c", 3), ("d", 4), ("e", 5), ("f", 6)];
    let first = world.image("q.io/first:1", 1, &[big]);
    world.image("q.io/second:1", 1, &[&[("c", 3)]]);
    let World { publisher, collector, state_db, hosts, directory } = world;
    publisher.release().unwrap();
    drop(collector);
    // Another coordinator with its own database collects: the pack is thinned.
    let other_state_db = Arc::new(MemoryStateDb::default());
    let (publisher, collector) = lead(directory.path(), &other_state_db, &hosts);
    let other = World { collector, state_db: other_state_db, hosts: Arc::clone(&hosts), publisher, directory };
    other.remove(&first);
    assert!(kinds(&other.collect(0).items).contains(&GarbageKind::PackPart));
    other.publisher.release().unwrap();
    let World { directory, .. } = other;
    // The first one leads again, and unpacks a layer whose pieces it once knew to be there.
    let (publisher, collector) = lead(directory.path(), &state_db, &hosts);
    let world = World { collector, state_db, hosts, publisher, directory };
    let files: Files<'_> = &[("again a", 1), ("again c", 3)];
    let image = world.image("q.io/third:1", 1, &[files]);
    world.read(&image.layers[0].diff_id, files);
}

#[test]
fn startup_packs_go_with_their_images_and_when_they_are_superseded() {
    let world = World::new();
    let image = world.image("q.io/a:1", 1, &[&[("a", 1)]]);
    let chain = image.top_chain().unwrap();
    let publish = |seed: u64| {
        let mut writer = world.publisher.stage_startup(&image.diff_ids()).unwrap();
        let bytes = content(seed);
        let key = store::profile::PieceKey { layer: 0, inode: InodeIndex(1), piece: 0 };
        writer.add(key, store::blocks::Blocks::ALL, 9, &ContentDigest::of(&bytes), &bytes).unwrap();
        world.publisher.publish_startup(writer.finish().unwrap(), chain, 1, 1).unwrap().pack
    };
    let (first, second) = (publish(1), publish(2));
    let report = world.collect(0);
    assert_eq!(report.items.iter().map(|item| item.name.clone()).collect::<Vec<_>>(), [first.to_string()]);
    assert_eq!(report.items[0].reason, GarbageReason::NoLayer);
    assert!(world.pack_path(&second).exists());
    world.remove(&image);
    world.collect(0);
    assert_eq!(world.packs(), []);
}

#[test]
fn senseless_policies_are_refused_and_good_ones_survive() {
    let world = World::new();
    let refused = |policy: RetentionPolicy| world.collector.set_policy(&policy).unwrap_err().to_string();
    let rule = RetentionRule { pattern: "[".into(), keep_last: None, keep_for_seconds: None };
    assert!(refused(RetentionPolicy { rules: vec![rule], ..RetentionPolicy::default() }).contains("is not a pattern"));
    let quota = Quota { limit_bytes: 0, high_percent: 90, low_percent: 80 };
    assert!(refused(RetentionPolicy { quota: Some(quota), ..RetentionPolicy::default() }).contains("0 bytes"));
    let collect = CollectSettings { every_seconds: 5, grace_seconds: 7, thin_below_percent: 0 };
    let policy = RetentionPolicy { collect, ..RetentionPolicy::default() };
    world.collector.set_policy(&policy).unwrap();
    assert_eq!(world.collector.policy().unwrap(), policy);
    assert_eq!(world.collector.plan(None).unwrap().grace_seconds, 7);
}

#[test]
fn a_store_whose_directories_are_away_is_not_taken_for_an_empty_one() {
    let world = World::new();
    world.image("q.io/a:1", 1, &[&[("a", 1)]]);
    let layout = world.publisher.store().layout();
    for dir in [layout.layers(), layout.blobs(), layout.packs()] {
        let aside = dir.with_extension("aside");
        std::fs::rename(&dir, &aside).unwrap();
        let refused = world.collector.plan(Some(0)).unwrap_err().to_string();
        assert!(refused.contains(&*dir.to_string_lossy()), "{refused}");
        std::fs::rename(&aside, &dir).unwrap();
    }
    assert!(world.collector.plan(Some(0)).unwrap().needed_bytes > 0);
}

#[test]
fn freed_room_is_what_the_disk_says() {
    let world = World::new();
    let image = world.image("q.io/a:1", 1, &[&[("a", 1), ("b", 2)]]);
    let room = || -> u64 {
        let survey = Sizes::default().survey(world.publisher.store()).unwrap();
        let blocks = |pack: &ContentDigest| std::fs::metadata(world.pack_path(pack)).unwrap().blocks() * 512;
        assert_eq!(survey.packs.keys().map(blocks).sum::<u64>(), survey.packs.values().sum::<u64>());
        survey.bytes()
    };
    let before = room();
    world.remove(&image);
    assert_eq!(world.collect(0).freed_bytes, before);
    assert_eq!(room(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn collections_run_one_at_a_time_by_request_and_end_with_the_coordinator() {
    let world = World::new();
    let image = world.image("q.io/a:1", 1, &[&[("a", 1)]]);
    world.remove(&image);
    let early = world.publisher.stage().unwrap();
    let stop = CancellationToken::new();
    let running = tokio::spawn(Arc::clone(&world.collector).run(stop.clone()));
    let status = world.collector.begin(Some(0), None).unwrap();
    assert_eq!((status.number, status.running.is_some()), (1, true));
    assert!(matches!(world.collector.begin(None, None), Err(GarbageError::Running)));
    // It waits for the work in progress until the coordinator stops.
    stop.cancel();
    running.await.unwrap();
    let last = world.collector.status().last.unwrap();
    assert!(last.stopped.is_some() || !last.failures.is_empty(), "{last:?}");
    assert!(matches!(world.collector.begin(None, None), Err(GarbageError::Stopping)));
    drop(early);
}
