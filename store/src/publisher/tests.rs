//! Publishing, against a real directory.

use super::*;
use crate::catalogue::Change;
use crate::catalogue::tests::image;
use crate::chunk;
use crate::image::ImageRecord;
use crate::layer::{FileContent, LayerFacts, LayerTree, Metadata, NodeKind, PieceSource, ROOT};
use crate::pack::PackWriter;
use crate::reader::{Disk, PosixDisk};
use crate::recipe::RecipeWriter;

pub(super) fn new_store() -> (tempfile::TempDir, Publisher) {
    let dir = tempfile::tempdir().unwrap();
    create(dir.path()).unwrap();
    let publisher = Publisher::open(dir.path(), "test").unwrap();
    (dir, publisher)
}

/// Puts a file into the store for everything that the image refers to; only their presence counts.
pub(crate) fn furnish(publisher: &Publisher, image: &Arc<ImageRecord>) -> Arc<ImageRecord> {
    let layout = publisher.store().layout();
    let layers = image.layers.iter().map(|layer| layout.index(&layer.diff_id));
    for path in layers.chain([image.manifest, image.config].map(|digest| layout.blob(&digest))) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, b"something").unwrap();
    }
    Arc::clone(image)
}

/// Stages a layer of one file; returns its diffID and pack.
pub(super) fn stage(publisher: &Publisher, content: &[u8]) -> (Staging, Digest, ContentDigest) {
    let staging = publisher.stage().unwrap();
    let mut pack = PackWriter::create(&staging.pack()).unwrap();
    let placed = pack.append(&chunk::compress(content).unwrap()).unwrap();
    let name = pack.finish().unwrap();
    let recipe = RecipeWriter::new(Vec::new()).unwrap().finish().unwrap();
    write_synced(&staging.recipe(), &recipe).unwrap();
    let mut tree = LayerTree::new();
    let content = FileContent {
        digest: ContentDigest::of(content),
        size: content.len() as u64,
        pieces: vec![PieceSource::Chunk { chunk: 0, start: 0 }],
    };
    tree.insert(ROOT, b"f", Metadata::default(), NodeKind::File(content));
    let diff_id = Digest::of(name.as_bytes());
    let facts =
        LayerFacts { diff_id, tar_size: 1, recipe_len: recipe.len() as u64, recipe_digest: ContentDigest::of(&recipe) };
    let raw = tree.encode(&facts, &[placed.in_pack(name)]).unwrap();
    write_synced(&staging.index(), &layer::seal(&raw).unwrap()).unwrap();
    (staging, diff_id, name)
}

pub(super) fn read_f(store: &Store, diff_id: &Digest) -> Result<Vec<u8>> {
    let index = store.index(diff_id)?;
    let file = index.inode(index.resolve(b"f")?.unwrap())?;
    let layer::Source::Chunk { chunk, start, .. } = index.piece(&file, 0)?.source else { panic!("a hole") };
    Ok(store.read_chunk(&chunk)?.piece(start, file.size as u32).unwrap().to_vec())
}

#[test]
fn a_published_layer_is_read_back_and_publishing_twice_is_once() {
    let (dir, publisher) = new_store();
    let (staging, diff_id, pack) = stage(&publisher, b"hello");
    assert!(!publisher.store().has_layer(&diff_id).unwrap());
    assert_eq!(publisher.publish_layer(staging, &diff_id, Some(&pack)).unwrap(), Published::New);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(read_f(&store, &diff_id).unwrap(), b"hello");
    let (staging, diff_id, pack) = stage(&publisher, b"hello");
    assert_eq!(publisher.publish_layer(staging, &diff_id, Some(&pack)).unwrap(), Published::AlreadyPresent);
    assert_eq!(fs::read_dir(store.layout().staging()).unwrap().count(), 0, "nothing is left in staging");
}

#[test]
fn what_reads_back_differently_is_not_published() {
    let (_dir, publisher) = new_store();
    for victim in [Staging::pack, Staging::index, Staging::recipe] {
        let (staging, diff_id, pack) = stage(&publisher, b"hello");
        let path = victim(&staging);
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(publisher.publish_layer(staging, &diff_id, Some(&pack)).is_err(), "{}", path.display());
        assert!(!publisher.store().has_layer(&diff_id).unwrap());
    }
}

#[test]
fn a_stale_coordinator_publishes_nothing() {
    let (dir, old) = new_store();
    let (staging, diff_id, pack) = stage(&old, b"hello");
    // The successor takes the next epoch, as after the old leader's time to live.
    create_exclusive(&old.store.layout().leases().join(format!("{:016x}", old.epoch() + 1)), b"{}").unwrap();
    assert!(matches!(old.publish_layer(staging, &diff_id, Some(&pack)), Err(Error::Fenced { .. })));
    assert!(matches!(old.commit(vec![Change::Set(image("r/a", None, 1))]), Err(Error::Fenced { .. })));
    assert!(matches!(old.renew(), Err(Error::Fenced { .. })));
    let store = Store::open(dir.path()).unwrap();
    assert!(!store.has_layer(&diff_id).unwrap());
    assert_eq!(store.catalogue().unwrap().images().count(), 0);
}

#[test]
fn one_publisher_at_a_time_and_a_released_store_is_free() {
    let (dir, publisher) = new_store();
    let error = Publisher::open(dir.path(), "second").unwrap_err().to_string();
    assert!(error.contains("is led by test (epoch 1)"), "{error}");
    publisher.release().unwrap();
    assert!(publisher.commit(Vec::new()).is_err());
    assert_eq!(Publisher::open(dir.path(), "second").unwrap().epoch(), 2);
}

#[test]
fn readers_follow_generations() {
    let (dir, publisher) = new_store();
    let store = Store::open(dir.path()).unwrap();
    let mut follower = store.catalogue().unwrap();
    for n in 0..150u8 {
        let image = furnish(&publisher, &image("r/a", Some(&format!("t{n}")), n));
        publisher.commit(vec![Change::Set(image)]).unwrap();
        if n % 40 == 0 {
            assert!(store.refresh(&mut follower).unwrap());
            assert_eq!(follower.images().count(), usize::from(n) + 1);
        }
    }
    assert!(store.refresh(&mut follower).unwrap());
    assert!(!store.refresh(&mut follower).unwrap());
    assert_eq!(store.catalogue().unwrap().tags().count(), 150);
    assert_eq!(follower.tags().count(), 150);
    assert!(fs::read_dir(store.layout().catalogue()).unwrap().count() < 140, "old generations go");
}

/// A disk that answers for the first file at once, and for the others only when this many were asked for.
struct Crowded {
    disk: PosixDisk,
    together: usize,
    asked: std::sync::Mutex<usize>,
    more: std::sync::Condvar,
    listings: std::sync::atomic::AtomicUsize,
}

impl Disk for Crowded {
    fn read(&self, path: &Path) -> std::io::Result<Vec<u8>> {
        let mut asked = self.asked.lock().unwrap();
        *asked += 1;
        self.more.notify_all();
        let limit = std::time::Duration::from_secs(30);
        let is_early = |asked: &mut usize| *asked > 1 && *asked < self.together;
        let (asked, waited) = self.more.wait_timeout_while(asked, limit, is_early).unwrap();
        drop(asked);
        assert!(!waited.timed_out(), "the others are asked for only after this one");
        self.disk.read(path)
    }

    fn read_at(&self, path: &Path, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
        self.disk.read_at(path, offset, len)
    }

    fn list(&self, dir: &Path) -> std::io::Result<Vec<String>> {
        self.listings.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        self.disk.list(dir)
    }

    fn exists(&self, path: &Path) -> std::io::Result<bool> {
        self.disk.exists(path)
    }
}

#[test]
fn generations_are_read_beside_each_other() {
    let (dir, publisher) = new_store();
    for n in 0..20u8 {
        let image = furnish(&publisher, &image("r/a", Some(&format!("t{n}")), n));
        publisher.commit(vec![Change::Set(image)]).unwrap();
    }
    // The newest one tells which others are needed; nineteen are left, and sixteen are read at a time.
    let (asked, more, listings) = Default::default();
    let disk = Arc::new(Crowded { disk: PosixDisk::new(dir.path()), together: 17, asked, more, listings });
    let store = Store::open_on(dir.path(), Arc::clone(&disk) as _).unwrap();
    assert_eq!(store.catalogue().unwrap().tags().count(), 20);
    assert_eq!(disk.listings.load(std::sync::atomic::Ordering::SeqCst), 1);
}

#[test]
fn only_an_empty_directory_becomes_a_store() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("precious"), b"x").unwrap();
    let error = create(dir.path()).unwrap_err().to_string();
    assert!(error.ends_with("is not a cachefs store: it holds other files; choose an empty directory"), "{error}");
    assert!(Store::open(dir.path()).unwrap_err().to_string().ends_with("it has no file cachefs-store"));
    assert!(Store::open(&dir.path().join("none")).unwrap_err().to_string().contains("there is no such directory"));
}

#[test]
fn an_image_that_lacks_something_is_not_committed() {
    let (dir, publisher) = new_store();
    let image = image("r/a", Some("t"), 1);
    for victim in 0..3 {
        furnish(&publisher, &image);
        let layout = publisher.store().layout();
        let paths = [layout.index(&image.layers[0].diff_id), layout.blob(&image.manifest), layout.blob(&image.config)];
        fs::remove_file(&paths[victim]).unwrap();
        let error = publisher.commit(vec![Change::Set(Arc::clone(&image))]).unwrap_err();
        assert!(error.is_missing() && error.to_string().contains("of r/a:t is not in the store"), "{error}");
    }
    assert_eq!(Store::open(dir.path()).unwrap().catalogue().unwrap().images().count(), 0);
    publisher.commit(vec![Change::Set(furnish(&publisher, &image))]).unwrap();
}

#[test]
fn a_layer_whose_shared_pack_is_gone_is_not_published() {
    let (_dir, publisher) = new_store();
    let (staging, diff_id, pack) = stage(&publisher, b"hello");
    // As if the chunk had been found in another layer's pack that was removed since.
    let error = publisher.publish_layer(staging, &diff_id, None).unwrap_err();
    assert!(error.is_missing() && error.to_string().contains(&pack.to_string()), "{error}");
    assert!(!publisher.store().has_layer(&diff_id).unwrap());
}

#[test]
fn a_new_leader_leaves_an_old_one_nothing_to_rename() {
    let (dir, old) = new_store();
    let (staging, diff_id, pack) = stage(&old, b"hello");
    let other = old.stage().unwrap();
    let stale = staging.dir.clone();
    old.release().unwrap();
    let new = Publisher::open(dir.path(), "new").unwrap();
    assert!(!stale.exists() && !other.dir.exists(), "what the old one staged is gone");
    let layout = new.store().layout();
    assert!(layout.trash_of(new.epoch()).is_dir() && !layout.trash_of(old.epoch()).exists());
    // The old one looked at the lease before, and goes on: the rename itself must fail.
    assert!(fs::rename(stale.join("pack"), layout.pack(&pack)).is_err());
    assert!(old.publish_layer(staging, &diff_id, Some(&pack)).is_err());
    assert_eq!(new.catalogue().epoch(), new.epoch());
}

#[test]
fn an_overtaken_candidate_harms_nobody() {
    let (dir, first) = new_store();
    first.release().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let elsewhere = Holder { boot: "another".into(), ..Holder::this_process("slow") };
    let Attempt::Taken(slow) = Watch::default().attempt(store.layout(), &elsewhere, Instant::now()).unwrap() else {
        panic!("the lease is free")
    };
    // The slow candidate has its epoch and nothing more when the next one takes over.
    fs::write(store.layout().leases().join(format!("{:016x}.released", slow.epoch())), b"").unwrap();
    let leader = Publisher::open(dir.path(), "leader").unwrap();
    let staged = leader.stage().unwrap();
    let error = Publisher::new(store.clone(), slow, OnDamage::Refuse).unwrap_err();
    assert!(matches!(error, Error::Fenced { .. }), "{error}");
    assert!(staged.dir.exists() && store.layout().trash_of(leader.epoch()).exists());
    leader.commit(Vec::new()).unwrap();
}

#[test]
fn objects_are_listed_in_order_and_unknown_files_apart() {
    let (_dir, publisher) = new_store();
    let mut blobs: Vec<_> = [&b"one"[..], b"two", b"three"].iter().map(|bytes| (Digest::of(bytes), *bytes)).collect();
    for (digest, bytes) in &blobs {
        publisher.put_blob(digest, bytes).unwrap();
    }
    let layout = publisher.store().layout().clone();
    let mut temporary = layout.blob(&blobs[0].0).into_os_string();
    temporary.push(".0123.tmp");
    fs::write(&temporary, b"half").unwrap();
    fs::write(layout.root().join("packs/readme"), b"?").unwrap();
    let (whole, gone) = (ContentDigest::of(b"whole"), ContentDigest::of(b"gone"));
    let record = |pack: &ContentDigest| {
        let mut path = layout.pack(pack).into_os_string();
        path.push(crate::pack::thinned::SUFFIX);
        PathBuf::from(path)
    };
    for pack in [&whole, &gone] {
        fs::create_dir_all(record(pack).parent().unwrap()).unwrap();
        fs::write(record(pack), b"a record").unwrap();
    }
    fs::write(layout.pack(&whole), b"whole").unwrap();
    let survey = publisher.store().survey().unwrap();
    assert_eq!(
        (&survey.packs[..], &survey.thinned[..], &survey.stray_records[..]),
        (&[whole][..], &[whole][..], &[gone][..])
    );
    blobs.sort();
    assert_eq!(survey.blobs, blobs.iter().map(|(digest, _)| *digest).collect::<Vec<_>>());
    let mut unknown_files = survey.unknown_files;
    unknown_files.sort();
    assert_eq!(survey.absent, Vec::<PathBuf>::new());
    let mut expected = [PathBuf::from(temporary), layout.root().join("packs/readme"), record(&gone)];
    expected.sort();
    assert_eq!(unknown_files, expected);
    fs::rename(layout.packs(), layout.root().join("elsewhere")).unwrap();
    assert_eq!(publisher.store().survey().unwrap().absent, [layout.packs()]);
}
