//! Removing and thinning against a real directory: what is needed stays, what a stale leader tries fails.

use std::sync::Arc;

use super::*;
use crate::catalogue::tests::image;
use crate::pack::{self, PackWriter};
use crate::profile::PieceKey;
use crate::publisher::Published;
use crate::publisher::tests::{furnish, new_store, read_f, stage};
use crate::reader::Store;

/// Nobody else needs anything.
fn nobody(_: &Object) -> bool {
    false
}

#[test]
fn what_nobody_needs_goes_and_its_bytes_are_freed() {
    let (dir, publisher) = new_store();
    let (staging, diff_id, pack) = stage(&publisher, b"hello");
    publisher.publish_layer(staging, &diff_id, Some(&pack)).unwrap();
    let collection = publisher.begin_collection().unwrap();
    assert!(publisher.begin_collection().is_none(), "one at a time");
    for object in [Object::Layer(diff_id), Object::Pack(pack)] {
        assert_eq!(collection.remove(&object, &nobody).unwrap(), Removal::Done);
        assert_eq!(collection.remove(&object, &nobody).unwrap(), Removal::Nothing);
    }
    assert!(!publisher.store().has_layer(&diff_id).unwrap());
    let trash = publisher.store().layout().trash_of(publisher.epoch());
    assert_eq!(fs::read_dir(&trash).unwrap().count(), 2);
    collection.empty_trash().unwrap();
    assert_eq!(fs::read_dir(&trash).unwrap().count(), 0);
    drop(collection);
    let (staging, diff_id, pack) = stage(&publisher, b"hello");
    assert_eq!(publisher.publish_layer(staging, &diff_id, Some(&pack)).unwrap(), Published::New);
    assert_eq!(read_f(&Store::open(dir.path()).unwrap(), &diff_id).unwrap(), b"hello");
}

#[test]
fn what_is_referred_to_held_or_otherwise_needed_stays() {
    let (_dir, publisher) = new_store();
    let image = furnish(&publisher, &image("r/a", Some("t"), 1));
    publisher.commit(vec![Change::Set(Arc::clone(&image))]).unwrap();
    let objects: Vec<_> = [Object::Layer(image.layers[0].diff_id)]
        .into_iter()
        .chain([image.manifest, image.config].map(Object::Blob))
        .collect();
    let collection = publisher.begin_collection().unwrap();
    let attempt = |also: &dyn Fn(&Object) -> bool| -> Vec<Removal> {
        objects.iter().map(|object| collection.remove(object, also).unwrap()).collect()
    };
    assert_eq!(attempt(&nobody), [Removal::Needed; 3], "an image refers to them");
    let (repository, tag, target) = (image.repository.clone(), image.tag.clone(), image.target);
    publisher.commit(vec![Change::Remove { repository, tag, target }]).unwrap();
    let hold = publisher.hold(references(&image));
    assert_eq!(attempt(&nobody), [Removal::Needed; 3], "a pull holds them");
    drop(hold);
    assert_eq!(attempt(&|_| true), [Removal::Needed; 3], "a host holds them");
    assert_eq!(attempt(&nobody), [Removal::Done; 3]);
    drop(collection);
    let collection = publisher.begin_collection().unwrap();
    assert!(references(&image).all(|digest| collection.held_lately().contains(&digest)));
}

#[test]
fn a_pack_that_a_layer_published_meanwhile_uses_stays() {
    let (dir, publisher) = new_store();
    let (staging, diff_id, pack) = stage(&publisher, b"hello");
    publisher.publish_layer(staging, &diff_id, Some(&pack)).unwrap();
    let collection = publisher.begin_collection().unwrap();
    assert_eq!(collection.remove(&Object::Layer(diff_id), &nobody).unwrap(), Removal::Done);
    // The layer is pulled once more: the very same pack.
    let (staging, diff_id, pack) = stage(&publisher, b"hello");
    assert!(!collection.wait_for_work(Duration::ZERO, &|| false), "the pull may know where pieces lie");
    publisher.publish_layer(staging, &diff_id, Some(&pack)).unwrap();
    assert!(collection.wait_for_work(Duration::ZERO, &|| false));
    assert_eq!(collection.remove(&Object::Pack(pack), &nobody).unwrap(), Removal::Needed);
    assert_eq!(collection.thin(pack, &[]).unwrap(), Removal::Needed);
    assert_eq!(read_f(&Store::open(dir.path()).unwrap(), &diff_id).unwrap(), b"hello");
}

#[test]
fn a_pack_stays_whose_layer_was_about_to_get_its_name_when_the_collection_began() {
    let (dir, publisher) = new_store();
    let (staging, diff_id, pack) = stage(&publisher, b"hello");
    publisher.claim(&staging, &diff_id, Some(&pack)).unwrap();
    let collection = publisher.begin_collection().unwrap();
    assert!(!publisher.store().has_layer(&diff_id).unwrap(), "what looks for layers now does not find it");
    publisher.reveal(&staging, &diff_id, Some(&pack)).unwrap();
    drop(staging);
    assert!(collection.wait_for_work(Duration::ZERO, &|| false));
    assert_eq!(collection.remove(&Object::Pack(pack), &nobody).unwrap(), Removal::Needed);
    assert_eq!(collection.thin(pack, &[]).unwrap(), Removal::Needed);
    assert_eq!(read_f(&Store::open(dir.path()).unwrap(), &diff_id).unwrap(), b"hello");
}

#[test]
fn a_startup_pack_stays_as_long_as_the_catalogue_names_it() {
    let (_dir, publisher) = new_store();
    let image = furnish(&publisher, &image("r/a", Some("t"), 1));
    let chain = image.top_chain().unwrap();
    publisher.commit(vec![Change::Set(Arc::clone(&image))]).unwrap();
    let mut writer = publisher.stage_startup(&image.diff_ids()).unwrap();
    let key = PieceKey { layer: 0, inode: crate::layer::InodeIndex(1), piece: 0 };
    writer.add(key, crate::blocks::Blocks::ALL, 9, &ContentDigest::of(b"bytes"), b"bytes").unwrap();
    let record = publisher.publish_startup(writer.finish().unwrap(), chain, 1, 1).unwrap();
    let collection = publisher.begin_collection().unwrap();
    let object = Object::Pack(record.pack);
    assert_eq!(collection.remove(&object, &nobody).unwrap(), Removal::Needed);
    let (repository, tag, target) = (image.repository.clone(), image.tag.clone(), image.target);
    publisher.commit(vec![Change::Remove { repository, tag, target }]).unwrap();
    assert_eq!(collection.remove(&object, &nobody).unwrap(), Removal::Done);
}

#[test]
fn a_stale_leader_deletes_nothing() {
    let (dir, old) = new_store();
    let (staging, diff_id, pack) = stage(&old, b"hello");
    old.publish_layer(staging, &diff_id, Some(&pack)).unwrap();
    let collection = old.begin_collection().unwrap();
    let path = old.store().layout().layer(&diff_id);
    // The old leader's last look at the lease is over; then another one takes over, and the old one goes on.
    fs::write(old.store().layout().leases().join(format!("{:016x}.released", old.epoch())), b"").unwrap();
    let new = Publisher::open(dir.path(), "new").unwrap();
    let error = collection.discard(&path).unwrap_err();
    assert!(matches!(error, Error::Fenced { mine: 1, current: 2 }), "{error}");
    for object in [Object::Layer(diff_id), Object::Pack(pack)] {
        assert!(matches!(collection.remove(&object, &nobody), Err(Error::Fenced { .. })));
    }
    assert!(matches!(collection.thin(pack, &[]), Err(Error::Fenced { .. })));
    assert!(matches!(collection.announce(), Err(Error::Fenced { .. })));
    assert_eq!(read_f(new.store(), &diff_id).unwrap(), b"hello");
    let collection = new.begin_collection().unwrap();
    assert_eq!(collection.remove(&Object::Layer(diff_id), &nobody).unwrap(), Removal::Done);
}

/// A pack of several chunks in the store, without a layer.
fn loose_pack(publisher: &Publisher) -> (ContentDigest, Vec<ChunkRef>) {
    let staging = publisher.stage().unwrap();
    let mut writer = PackWriter::create(&staging.pack()).unwrap();
    let chunk =
        |n: u8| (0..90_000u32).map(|at| (at.wrapping_mul(u32::from(n) * 2 + 77) >> 7) as u8 ^ n).collect::<Vec<_>>();
    let placed: Vec<_> = (0..8).map(|n| writer.append(&crate::chunk::compress(&chunk(n)).unwrap()).unwrap()).collect();
    let name = writer.finish().unwrap();
    publisher.publish_pack(&staging, &name).unwrap();
    (name, placed.iter().map(|placed| placed.in_pack(name)).collect())
}

#[test]
fn thinning_leaves_live_chunks_readable_for_old_and_new_readers() {
    let (dir, publisher) = new_store();
    let (pack, chunks) = loose_pack(&publisher);
    let reader = Store::open(dir.path()).unwrap();
    let before = reader.read_chunk(&chunks[2]).unwrap().bytes().to_vec();
    let collection = publisher.begin_collection().unwrap();
    assert_eq!(collection.thin(pack, &chunks[2..4]).unwrap(), Removal::Done);
    assert_eq!(collection.thin(pack, &chunks[2..4]).unwrap(), Removal::Nothing, "it is as thin as it should be");
    let path = publisher.store().layout().pack(&pack);
    assert!(matches!(thinned::inspect(&path, &pack).unwrap(), thinned::PackState::Thinned(_)));
    for store in [&reader, &Store::open(dir.path()).unwrap()] {
        assert_eq!(store.read_chunk(&chunks[2]).unwrap().bytes(), before);
    }
    assert!(publisher.store().read_chunk(&chunks[5]).is_err());
    assert_eq!(collection.thin(pack, &chunks[3..4]).unwrap(), Removal::Done);
    assert_eq!(fs::read_dir(publisher.store().layout().staging()).unwrap().count(), 0, "nothing is left in staging");
}

#[test]
fn a_pack_whose_record_came_alone_is_thinned_the_next_time() {
    let (_dir, publisher) = new_store();
    let (pack, chunks) = loose_pack(&publisher);
    let path = publisher.store().layout().pack(&pack);
    let whole = fs::read(&path).unwrap();
    let collection = publisher.begin_collection().unwrap();
    assert_eq!(collection.thin(pack, &chunks[..1]).unwrap(), Removal::Done);
    // As after a crash between the two: the record is there, and the pack is as it was.
    fs::write(&path, &whole).unwrap();
    assert_eq!(collection.thin(pack, &chunks[..1]).unwrap(), Removal::Done);
    assert!(fs::read(&path).unwrap() != whole);
    assert_eq!(collection.thin(pack, &chunks[..1]).unwrap(), Removal::Nothing);
}

#[test]
fn a_reader_that_holds_a_thinned_pack_open_finds_the_whole_one() {
    let (dir, publisher) = new_store();
    let (pack, chunks) = loose_pack(&publisher);
    let collection = publisher.begin_collection().unwrap();
    collection.thin(pack, &chunks[..1]).unwrap();
    drop(collection);
    let reader = Store::open(dir.path()).unwrap();
    reader.read_chunk(&chunks[0]).unwrap();
    assert!(reader.read_chunk(&chunks[6]).is_err());
    reader.read_chunk(&chunks[0]).unwrap();
    // The layer comes back, and with it all of the pack.
    assert_eq!(loose_pack(&publisher).0, pack);
    let path = publisher.store().layout().pack(&pack);
    pack::verify(&path, &pack).unwrap();
    assert!(!record_path(&path).exists(), "it is whole again");
    reader.read_chunk(&chunks[6]).unwrap();
}

#[test]
fn a_removed_pack_takes_its_record_along_and_stray_records_go() {
    let (_dir, publisher) = new_store();
    let (pack, chunks) = loose_pack(&publisher);
    let collection = publisher.begin_collection().unwrap();
    collection.thin(pack, &chunks[..1]).unwrap();
    let record = record_path(&publisher.store().layout().pack(&pack));
    assert_eq!(collection.remove_stray_record(&pack).unwrap(), Removal::Needed);
    assert_eq!(collection.remove(&Object::Pack(pack), &nobody).unwrap(), Removal::Done);
    assert!(!record.exists());
    fs::write(&record, b"left by a crash").unwrap();
    assert_eq!(collection.remove_stray_record(&pack).unwrap(), Removal::Done);
    assert_eq!(collection.thin(pack, &chunks[..1]).unwrap(), Removal::Nothing, "there is no pack");
}

#[test]
fn each_announcement_has_a_new_number() {
    let (dir, publisher) = new_store();
    {
        let collection = publisher.begin_collection().unwrap();
        assert_eq!((collection.announce().unwrap(), collection.announce().unwrap()), (1, 2));
    }
    assert_eq!(Store::open(dir.path()).unwrap().catalogue().unwrap().collected(), 2);
}
