//! Profiles against a real store and database: what is refused, what is published, and what is left alone.

use store::blocks::Blocks;
use store::catalogue::Change;
use store::image::{ImageRecord, LayerRecord, Platform, RequestedBy};
use store::layer::InodeIndex;
use store::profile::{Origin, STARTS_TO_JUDGE};
use store::publisher::create;
use store::trace::{Outcome, Touch};

use super::*;
use crate::state::state_db::database::StateDatabase;
use crate::unpack::fixture::{content, tar_of};
use crate::unpack::{Expect, NoLocations, unpack_layer};

/// A store with one image of two layers, and its profiles.
pub(super) struct Fixture {
    pub(super) profiles: Arc<Profiles>,
    inbox: Option<Inbox>,
    image: Arc<ImageRecord>,
    _directory: tempfile::TempDir,
}

fn layer(publisher: &Publisher, files: &[(&str, Vec<u8>)]) -> LayerRecord {
    layer_of(publisher, &tar_of(files.iter().map(|(name, bytes)| (*name, bytes))))
}

/// A layer of this tar.
pub(super) fn layer_of(publisher: &Publisher, tar: &[u8]) -> LayerRecord {
    let (diff_id, size) = (Digest::of(tar), tar.len() as u64);
    unpack_layer(publisher, &NoLocations, tar, &Expect { diff_id }).unwrap();
    LayerRecord { diff_id, size, blob: diff_id, blob_size: size, media_type: "t".into() }
}

/// Publishes an image, whose config stands for its manifest, too.
fn publish(
    publisher: &Publisher,
    repository: &str,
    tag: &str,
    layers: Vec<LayerRecord>,
    published_at: u64,
) -> Arc<ImageRecord> {
    publish_running(publisher, repository, tag, layers, published_at, serde_json::json!({}))
}

/// The same, with this configuration of its containers.
pub(super) fn publish_running(
    publisher: &Publisher,
    repository: &str,
    tag: &str,
    layers: Vec<LayerRecord>,
    published_at: u64,
    container: serde_json::Value,
) -> Arc<ImageRecord> {
    let diff_ids: Vec<Digest> = layers.iter().map(|layer| layer.diff_id).collect();
    let rootfs = serde_json::json!({ "type": "layers", "diff_ids": diff_ids });
    let config = serde_json::json!({ "os": "linux", "config": container, "rootfs": rootfs }).to_string();
    let digest = Digest::of(config.as_bytes());
    publisher.put_blob(&digest, config.as_bytes()).unwrap();
    let image = Arc::new(ImageRecord {
        repository: repository.into(),
        tag: Some(tag.into()),
        target: digest,
        manifest: digest,
        media_type: "m".into(),
        config: digest,
        platform: Platform::host(),
        layers,
        published_at,
        ordered_by: RequestedBy::Operator,
    });
    publisher.commit(vec![Change::Set(Arc::clone(&image))]).unwrap();
    image
}

/// The files: `lib/aN` and `lib/bN` are small, `big` has three pieces, of which the second is a hole.
pub(super) fn fixture() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let (root, state) = (directory.path().join("store"), directory.path().join("state"));
    std::fs::create_dir_all(&root).unwrap();
    std::fs::create_dir_all(&state).unwrap();
    create(&root).unwrap();
    let publisher = Arc::new(Publisher::open(&root, "test").unwrap());
    let names: Vec<(String, Vec<u8>)> =
        (0..40u8).map(|n| (format!("lib/a{n}"), content(n, 3000 + 100 * usize::from(n)))).collect();
    let base: Vec<_> = names.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())).collect();
    let mut big = content(77, 600_000);
    big[262_144..524_288].fill(0);
    let top = [("big", big), ("lib/b0", content(90, 9)), ("empty", Vec::new())];
    let layers = vec![layer(&publisher, &base), layer(&publisher, &top)];
    let image = publish(&publisher, "r.io/a", "t", layers, 1);
    let state_db = Arc::new(StateDatabase::open(&state).unwrap());
    let (profiles, inbox) = Profiles::new(state_db, publisher, Guesses::Made);
    Fixture { profiles, inbox: Some(inbox), image, _directory: directory }
}

impl Fixture {
    pub(super) fn chain(&self) -> Digest {
        self.image.top_chain().unwrap()
    }

    /// A trace of a start that reads the named piece of each file.
    pub(super) fn trace(&self, host: &str, files: &[(u16, &str, u32)]) -> AccessTrace {
        let store = self.profiles.publisher.store();
        let touch = |(layer, path, piece): &(u16, &str, u32)| {
            let index = store.index(&self.image.layers[usize::from(*layer)].diff_id).unwrap();
            let inode = index.resolve(path.as_bytes()).unwrap().unwrap();
            Touch { layer: *layer, inode, piece: *piece, blocks: Blocks::ALL, at_ms: 0 }
        };
        AccessTrace {
            chain: self.chain(),
            layers: self.image.layers.iter().map(|layer| layer.diff_id).collect(),
            host: host.into(),
            started_at: 1,
            millis: 1,
            touches: files.iter().map(touch).collect(),
            outcome: Outcome::default(),
            profile: None,
        }
    }

    pub(super) fn take(&self, trace: &AccessTrace) -> Result<u64, TraceError> {
        self.profiles.take(&trace.encode().unwrap(), "token one")
    }

    fn build(&self) -> Result<Built, BuildError> {
        self.build_for(&self.image)
    }

    pub(super) fn build_for(&self, image: &ImageRecord) -> Result<Built, BuildError> {
        self.profiles.build_now(&image.top_chain().unwrap(), &CancellationToken::new())
    }

    /// The paths in the published pack, in order. Each piece's bytes are compared with the index's digest.
    fn packed(&self) -> Vec<String> {
        self.packed_for(&self.image)
    }

    pub(super) fn packed_for(&self, image: &ImageRecord) -> Vec<String> {
        let store = self.profiles.publisher.store();
        let catalogue = store.catalogue().unwrap();
        let record = catalogue.startup(&image.top_chain().unwrap()).expect("a startup pack");
        let table = store.startup_table(record).unwrap();
        for piece in &table.pieces {
            let index = store.index(&image.layers[usize::from(piece.key.layer)].diff_id).unwrap();
            let expected = index.piece(&index.inode(piece.key.inode).unwrap(), piece.key.piece).unwrap();
            let Some(place) = piece.place else { continue };
            let chunk = store.read_chunk(&table.chunks[place.chunk as usize]).unwrap();
            let bytes = chunk.piece(place.start, expected.len).unwrap();
            assert_eq!(store::ContentDigest::of(bytes), expected.digest);
        }
        let (files, total) = files(store, image, &table, 1000).unwrap();
        assert_eq!(files.len(), total);
        files.into_iter().map(|file| String::from_utf8(file.path).unwrap()).collect()
    }
}

#[test]
fn a_first_trace_becomes_a_pack_in_the_order_of_reading() {
    let fixture = fixture();
    let read = [(0, "lib/a7", 0), (1, "big", 2), (1, "big", 1), (1, "lib/b0", 0), (0, "lib/a0", 0), (1, "big", 0)];
    assert_eq!(fixture.take(&fixture.trace("h", &read)).unwrap(), 1);
    let Ok(Built::Published { record, pieces }) = fixture.build() else { panic!("not published") };
    assert_eq!((record.starts, pieces), (1, 5), "a hole is in no pack");
    assert_eq!(record.content_bytes, 3700 + 3000 + 9 + 262_144 + (600_000 - 524_288));
    assert_eq!(fixture.packed(), ["lib/a7", "big", "lib/b0", "lib/a0"]);
    let store = fixture.profiles.publisher.store();
    let table = store.startup_table(&record).unwrap();
    let (some, total) = files(store, &fixture.image, &table, 2).unwrap();
    assert_eq!((some.len(), total), (2, 4));
    assert_eq!((some[1].pieces, some[1].bytes, some[1].weight), (2, 262_144 + 75_712, 255));
    assert!(matches!(fixture.build(), Ok(Built::Unchanged)));
}

/// A start that reads more than a pack may hold is a bulk copy: hosts read the rest from the layers.
#[test]
fn what_a_pack_has_no_room_for_is_named() {
    let mut fixture = fixture();
    Arc::get_mut(&mut fixture.profiles).unwrap().pack_content = 270_000;
    let read = [(0, "lib/a7", 0), (1, "big", 0), (1, "big", 2), (0, "lib/a0", 0)];
    fixture.take(&fixture.trace("h", &read)).unwrap();
    let Ok(Built::Published { record, pieces }) = fixture.build() else { panic!("not published") };
    assert_eq!((pieces, record.content_bytes), (4, 3700 + 262_144 + 75_712 + 3000));
    assert!(record.pack_len < 300_000, "{}", record.pack_len);
    let table = fixture.profiles.publisher.store().startup_table(&record).unwrap();
    let named: Vec<_> = table.pieces.iter().map(|piece| (piece.key.piece, piece.place.is_none())).collect();
    assert_eq!(named, [(0, false), (0, false), (0, false), (2, true)], "what fits is held, in order");
    assert_eq!(fixture.packed(), ["lib/a7", "big", "lib/a0"]);
    assert!(matches!(fixture.build(), Ok(Built::Unchanged)));
    // An image built on this one learns all of it.
    let catalogue = fixture.profiles.publisher.catalogue();
    fixture.profiles.state_db.remove_profile(&fixture.chain()).unwrap();
    assert_eq!(fixture.profiles.needed(&fixture.chain(), &catalogue).unwrap().len(), 4);
}

#[test]
fn small_changes_are_not_published_and_large_ones_are() {
    let fixture = fixture();
    fixture.take(&fixture.trace("h0", &[(1, "big", 0)])).unwrap();
    assert!(matches!(fixture.build(), Ok(Built::Published { .. })));
    fixture.take(&fixture.trace("h1", &[(1, "big", 0), (0, "lib/a0", 0)])).unwrap();
    assert!(matches!(fixture.build(), Ok(Built::Unchanged)), "3000 of 262144 bytes more");
    fixture.take(&fixture.trace("h2", &[(0, "lib/a0", 0), (1, "big", 2)])).unwrap();
    let Ok(Built::Published { record, .. }) = fixture.build() else { panic!("not published") };
    assert_eq!(record.starts, 3);
    assert_eq!(fixture.packed(), ["big", "lib/a0"]);
}

#[test]
fn a_lost_database_does_not_replace_what_many_starts_taught() {
    let fixture = fixture();
    for host in 0..5 {
        fixture.take(&fixture.trace(&host.to_string(), &[(1, "big", 0)])).unwrap();
    }
    assert!(matches!(fixture.build(), Ok(Built::Published { .. })));
    fixture.profiles.state_db.remove_profile(&fixture.chain()).unwrap();
    for host in 0..STARTS_TO_JUDGE {
        assert_eq!(fixture.packed(), ["big"], "after {host} new starts");
        fixture.take(&fixture.trace(&host.to_string(), &[(0, "lib/a0", 0)])).unwrap();
        fixture.build().unwrap_or_else(|error| panic!("{error}"));
    }
    assert_eq!(fixture.packed(), ["lib/a0"]);
}

/// The next build of the fixture's image: the same base below a layer with a shorter `big` and without `lib/b0`.
fn next_build(fixture: &Fixture, repository: &str, tag: &str) -> Arc<ImageRecord> {
    let publisher = &fixture.profiles.publisher;
    let top = layer(publisher, &[("big", content(78, 200_000)), ("lib/c", content(91, 9)), ("lib/.wh.a1", Vec::new())]);
    publish(publisher, repository, tag, vec![fixture.image.layers[0].clone(), top], 2)
}

/// What a start of the fixture's image reads.
pub(super) const READ: [(u16, &str, u32); 5] =
    [(0, "lib/a7", 0), (0, "lib/a1", 0), (1, "big", 2), (1, "lib/b0", 0), (1, "big", 0)];

#[test]
fn a_new_build_inherits_what_its_predecessor_needed() {
    let fixture = fixture();
    fixture.take(&fixture.trace("h", &READ)).unwrap();
    let next = next_build(&fixture, "r.io/a", "t");
    fixture.profiles.published(&next);
    assert_eq!(fixture.profiles.build_queue.lock().next(Instant::now()), Next::Build(fixture.chain()), "the trace");
    assert_eq!(fixture.profiles.build_queue.lock().next(Instant::now()), Next::Build(next.top_chain().unwrap()));
    let Ok(Built::Published { record, pieces }) = fixture.build_for(&next) else { panic!("not published") };
    // A file that is in the shared layer, and the part that the new file has; neither the hidden file nor the one that is gone.
    assert_eq!(fixture.packed_for(&next), ["lib/a7", "big"]);
    assert_eq!((pieces, record.starts, record.content_bytes), (2, 0, 3700 + 200_000));
    assert_eq!(record.origin, Origin::Inherited { from: fixture.chain() });
    assert!(matches!(fixture.build_for(&next), Ok(Built::Unchanged)));
    let known = fixture.profiles.profile(&next.top_chain().unwrap()).unwrap().unwrap();
    assert_eq!((known.origin(), known.starts()), (record.origin, 0));
}

#[test]
fn a_new_tag_follows_its_repository_and_no_other() {
    let fixture = fixture();
    fixture.take(&fixture.trace("h", &READ)).unwrap();
    let elsewhere = next_build(&fixture, "r.io/b", "t");
    assert!(matches!(fixture.build_for(&elsewhere), Ok(Built::Unknown)));
    let tagged = next_build(&fixture, "r.io/a", "t2");
    assert!(
        matches!(fixture.build_for(&tagged), Ok(Built::Published { .. })),
        "the same content, but of this repository"
    );
    assert_eq!(fixture.packed_for(&tagged), ["lib/a7", "big"]);
    let mut foreign = (*tagged).clone();
    foreign.platform.architecture = "riscv64".into();
    foreign.tag = Some("t3".into());
    foreign.layers.truncate(1);
    fixture.profiles.publisher.commit(vec![Change::Set(Arc::new(foreign.clone()))]).unwrap();
    assert!(matches!(fixture.build_for(&foreign), Ok(Built::Unknown)), "another platform's starts teach nothing");
}

#[test]
fn without_a_database_the_published_pack_is_inherited() {
    let fixture = fixture();
    fixture.take(&fixture.trace("h", &READ)).unwrap();
    assert!(matches!(fixture.build(), Ok(Built::Published { .. })));
    fixture.profiles.state_db.remove_profile(&fixture.chain()).unwrap();
    let next = next_build(&fixture, "r.io/a", "t2");
    assert!(matches!(fixture.build_for(&next), Ok(Built::Published { .. })));
    assert_eq!(fixture.packed_for(&next), ["lib/a7", "big"]);
    assert!(matches!(fixture.build(), Ok(Built::Unknown)), "it has a pack that many starts may have taught");
    fixture.profiles.state_db.remove_profile(&next.top_chain().unwrap()).unwrap();
    fixture.profiles.published(&next);
    assert_eq!(
        fixture.profiles.build_queue.lock().next(Instant::now()),
        Next::Build(fixture.chain()),
        "the trace alone"
    );
    assert_eq!(fixture.profiles.build_queue.lock().next(Instant::now()), Next::Nothing);
}

#[tokio::test]
async fn a_first_trace_does_not_wait_for_what_was_inherited() {
    let fixture = fixture();
    fixture.take(&fixture.trace("h", &READ)).unwrap();
    let next = next_build(&fixture, "r.io/a", "t");
    let (chain, stop) = (next.top_chain().unwrap(), CancellationToken::new());
    fixture.profiles.build(chain, &stop).await;
    assert_eq!(fixture.profiles.publisher.catalogue().startup(&chain).unwrap().starts, 0);
    fixture.profiles.build_queue.lock().add(chain, Instant::now());
    let queued = [(); 2].map(|()| fixture.profiles.build_queue.lock().next(Instant::now()));
    assert!(queued.contains(&Next::Build(chain)), "{queued:?}");
}

#[test]
fn a_pack_that_is_damaged_is_made_anew() {
    let fixture = fixture();
    fixture.take(&fixture.trace("h", &[(1, "big", 0)])).unwrap();
    let Ok(Built::Published { record, .. }) = fixture.build() else { panic!("not published") };
    let path = fixture.profiles.publisher.store().layout().pack(&record.pack);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, b"damaged").unwrap();
    assert!(matches!(fixture.build(), Ok(Built::Published { .. })));
    let reread = store::reader::Store::open(fixture.profiles.publisher.store().layout().root()).unwrap();
    assert_eq!(reread.startup_table(&record).unwrap().pieces.len(), 1);
}

#[test]
fn what_is_of_no_image_or_no_file_is_refused() {
    let fixture = fixture();
    let good = fixture.trace("h", &[(1, "big", 0), (1, "empty", 0)]);
    let error = fixture.take(&good).unwrap_err();
    assert!(matches!(error, TraceError::NoSuchPiece { piece: 0, .. }), "an empty file has no piece: {error}");
    for (inode, piece) in [(u32::MAX, 0), (0, 0), (1, 3)] {
        let mut bad = fixture.trace("h", &[(1, "big", 0)]);
        bad.touches.push(Touch { layer: 1, inode: InodeIndex(inode), piece, blocks: Blocks::ALL, at_ms: 0 });
        assert!(matches!(fixture.take(&bad), Err(TraceError::NoSuchPiece { .. })), "{inode} {piece}");
    }
    let mut other = good.clone();
    other.layers.truncate(1);
    other.chain = other.layers[0];
    other.touches.clear();
    assert!(matches!(fixture.take(&other), Err(TraceError::UnknownChain(chain)) if chain == other.chain));
    assert!(matches!(fixture.profiles.take(b"x", "h"), Err(TraceError::Malformed(_))));
    assert_eq!(fixture.profiles.profile(&fixture.chain()).unwrap(), None, "nothing was merged");
    assert!(matches!(fixture.build(), Ok(Built::Unknown)));
}

#[test]
fn a_start_that_reads_nothing_counts_and_makes_no_pack() {
    let fixture = fixture();
    assert_eq!(fixture.take(&fixture.trace("h", &[])).unwrap(), 1);
    assert!(matches!(fixture.build(), Ok(Built::Unchanged)));
}

#[test]
fn profiles_of_images_that_are_gone_go_too() {
    let fixture = fixture();
    fixture.take(&fixture.trace("h", &[(1, "big", 0)])).unwrap();
    fixture.profiles.sweep().unwrap();
    assert!(matches!(fixture.profiles.build_queue.lock().next(Instant::now()), Next::Build(_)), "it has no pack yet");
    let ImageRecord { repository, tag, target, .. } = (*fixture.image).clone();
    fixture.profiles.publisher.commit(vec![Change::Remove { repository, tag, target }]).unwrap();
    assert!(matches!(fixture.build(), Ok(Built::Unknown)));
    fixture.profiles.sweep().unwrap();
    assert_eq!(fixture.profiles.state_db.profiled_chains().unwrap(), []);
}

#[test]
fn what_a_tag_pointed_to_a_moment_ago_is_remembered() {
    let fixture = fixture();
    fixture.take(&fixture.trace("h", &READ)).unwrap();
    let next = next_build(&fixture, "r.io/a", "t");
    let moved_at = |published_at: u64| {
        let image = Arc::new(ImageRecord { published_at, ..(*next).clone() });
        fixture.profiles.publisher.commit(vec![Change::Set(image)]).unwrap();
        fixture.profiles.sweep().unwrap();
        fixture.profiles.state_db.profiled_chains().unwrap()
    };
    let now = u64::try_from(Timestamp::now().as_second()).unwrap();
    assert_eq!(moved_at(now), [fixture.chain()], "a coordinator that starts now may still need it");
    let queue = &fixture.profiles.build_queue;
    let queued = [(); 2].map(|()| queue.lock().next(Instant::now()));
    assert!(queued.contains(&Next::Build(next.top_chain().unwrap())), "{queued:?}");
    assert_eq!(moved_at(now - 2 * LATELY), []);
}

#[test]
fn a_stopped_build_leaves_nothing() {
    let fixture = fixture();
    fixture.take(&fixture.trace("h", &[(1, "big", 0)])).unwrap();
    let stop = CancellationToken::new();
    stop.cancel();
    assert!(matches!(fixture.profiles.build_now(&fixture.chain(), &stop), Err(BuildError::Stopped)));
    let layout = fixture.profiles.publisher.store().layout().clone();
    assert_eq!(std::fs::read_dir(layout.staging()).unwrap().count(), 0);
    assert_eq!(fixture.profiles.publisher.catalogue().startups().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_inbox_refuses_and_the_worker_answers() {
    let mut fixture = fixture();
    let profiles = Arc::clone(&fixture.profiles);
    let mut permits: Vec<TracePermit> =
        (0..INBOX).map(|_| profiles.permit().unwrap_or_else(|error| panic!("{error}"))).collect();
    assert!(matches!(profiles.permit(), Err(TraceError::Busy)));
    let stop = CancellationToken::new();
    let inbox = fixture.inbox.take().unwrap();
    let running = tokio::spawn(Arc::clone(&profiles).run(inbox, stop.clone()));
    let trace = fixture.trace("h", &[(1, "big", 0), (0, "lib/a1", 0)]).encode().unwrap();
    let permit = permits.pop().unwrap();
    assert_eq!(permit.submit(trace.clone().into(), "h".to_owned()).await.unwrap(), 1);
    let permit = permits.pop().unwrap();
    assert_eq!(permit.submit(trace.into(), "h".to_owned()).await.unwrap(), 1, "the same trace once more");
    let published = async {
        while profiles.publisher.catalogue().startup(&fixture.chain()).is_none() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), published).await.unwrap();
    assert_eq!(fixture.packed(), ["big", "lib/a1"]);
    stop.cancel();
    running.await.unwrap();
    assert!(matches!(profiles.permit(), Err(TraceError::Stopping)));
    let permit = permits.pop().unwrap();
    assert!(matches!(permit.submit(Bytes::new(), "h".to_owned()).await, Err(TraceError::Stopping)));
}
