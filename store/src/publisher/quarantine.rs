//! Quarantine: damaged objects are moved below `quarantine/`, where no reader looks.
//!
//! Moving is fenced like publishing. The object first gets a second name in quarantine, which no reader minds, so that
//! no crash loses it. Its own name is then renamed into the leader's staging directory. That directory is made before
//! the fence is looked at, and a new leader sweeps it before it leads, so a stale leader's `rename(2)` finds no target.
//! One copy of each object is kept, for people to look at and for the repair to learn from. It is put back if no better
//! one can be had.
//!
//! A layer comes back only with everything that it refers to. Its packs are put back first. While one is missing, or
//! lacks a chunk because it was thinned meanwhile, or the index cannot be read, the layer stays in quarantine. A layer
//! that is missing is fetched by whoever pulls it next; one that is there but cannot be read would not be.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::crash::{CrashPoint, crash_point};
use crate::digest::{ContentDigest, Digest};
use crate::durable::{make_directory, make_parent, sync_dir, write_synced};
use crate::error::{Error, Result};
use crate::layer::{self, LayerIndex};
use crate::layout::Layout;
use crate::pack;
use crate::pack::thinned::Thinned;
use crate::publisher::{Hold, Publisher};
use crate::reserve::with_reserve;
use crate::version::Superblock;

/// An object that does not match its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Suspect {
    /// A manifest or config.
    Blob(Digest),
    /// A layer's index and recipe.
    Layer(Digest),
    /// A pack.
    Pack(ContentDigest),
    /// A generation of the catalogue.
    Generation(u64),
}

impl Suspect {
    /// Where the object lies, or should.
    pub fn path(&self, layout: &Layout) -> PathBuf {
        match self {
            Suspect::Blob(digest) => layout.blob(digest),
            Suspect::Layer(diff_id) => layout.layer(diff_id),
            Suspect::Pack(pack) => layout.pack(pack),
            Suspect::Generation(number) => layout.generation(*number),
        }
    }
}

/// Whether anything was moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moved {
    /// It is elsewhere now.
    Away,
    /// Nothing was moved: there was nothing to move, or something is in its place.
    Nothing,
}

fn remove(path: &Path) {
    let _ = fs::remove_dir_all(path).or_else(|_| fs::remove_file(path));
}

/// Makes a directory and those above it, private to coordinators.
fn make_own_all(path: &Path) -> Result<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|e| Error::io("create", path, e))
}

/// Gives the object at `live` the second name `kept`. A directory becomes a new directory with links to its files.
fn keep(live: &Path, kept: &Path) -> io::Result<()> {
    remove(kept);
    if !live.is_dir() {
        return fs::hard_link(live, kept);
    }
    // Hosts can read it, because it may be put back as it is.
    make_directory(kept)?;
    for entry in fs::read_dir(live)? {
        let entry = entry?;
        // No object has directories in it: what they hold belongs to none.
        if !entry.file_type()?.is_dir() {
            fs::hard_link(entry.path(), kept.join(entry.file_name()))?;
        }
    }
    fs::File::open(kept)?.sync_all()
}

impl Publisher {
    /// Moves a damaged object out of the readers' way.
    pub fn quarantine(&self, suspect: Suspect) -> Result<Moved> {
        let layout = self.store.layout();
        let (live, kept) = (suspect.path(layout), layout.quarantined(&suspect.path(layout)));
        let parent = kept.parent().unwrap_or(&kept);
        make_own_all(parent)?;
        let staging = self.stage()?;
        let held = staging.dir.join("suspect");
        self.check()?;
        if fs::symlink_metadata(&live).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            return Ok(Moved::Nothing);
        }
        keep(&live, &kept).map_err(|e| Error::io("keep", &kept, e))?;
        sync_dir(parent)?;
        crash_point(CrashPoint::SuspectKept);
        match fs::rename(&live, &held) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.check()?;
                return Ok(Moved::Nothing);
            }
            Err(error) => return Err(Error::io("move away", &live, error)),
        }
        sync_dir(live.parent().unwrap_or(&live))?;
        crash_point(CrashPoint::SuspectHeld);
        remove(&held);
        crash_point(CrashPoint::Quarantined);
        Ok(Moved::Away)
    }

    /// Puts an object back that was moved away, unless another one is in its place: a damaged object is better than
    /// none.
    ///
    /// A layer comes back together with those of its packs that are in quarantine. A layer of which a pack or a chunk
    /// is missing stays where it is ([`Error::Missing`]), and so does one whose index is damaged ([`Error::Corrupt`]):
    /// it would be of no use, and in the way of a better one.
    pub fn reinstate(&self, suspect: Suspect) -> Result<Moved> {
        let layout = self.store.layout();
        let live = suspect.path(layout);
        let kept = layout.quarantined(&live);
        if !kept.exists() || live.exists() {
            return Ok(Moved::Nothing);
        }
        // A collection that began before must not take what comes back for unneeded; see `holds`.
        let mut hold = self.hold([]);
        let _working = self.in_progress.begin();
        if let Suspect::Layer(diff_id) = suspect {
            self.reinstate_packs(&diff_id, &mut hold)?;
        }
        make_parent(&live)?;
        self.check()?;
        // A rename would replace a file that has appeared meanwhile, but not a directory.
        let put_back = if kept.is_dir() {
            fs::rename(&kept, &live)
        } else {
            fs::hard_link(&kept, &live).and_then(|()| {
                crash_point(CrashPoint::PutBackLinked);
                fs::remove_file(&kept)
            })
        };
        match put_back {
            Ok(()) => sync_dir(live.parent().unwrap_or(&live))?,
            Err(e) if matches!(e.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty) => {
                return Ok(Moved::Nothing);
            }
            Err(error) => return Err(Error::io("put back", &live, error)),
        }
        crash_point(CrashPoint::PutBack);
        if let Suspect::Layer(diff_id) = suspect {
            self.expect_index(&diff_id, self.index_digest(&diff_id)?)?;
        }
        Ok(Moved::Away)
    }

    /// Puts back the packs of a layer in quarantine, and makes sure that all chunks that it refers to are there.
    fn reinstate_packs(&self, diff_id: &Digest, hold: &mut Hold) -> Result<()> {
        let layout = self.store.layout();
        let path = layout.quarantined(&layout.index(diff_id));
        let sealed = fs::read(&path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::corrupt(format!("layer {diff_id}"), "its index is missing"),
            _ => Error::io("read", &path, e),
        })?;
        let index = LayerIndex::from_bytes(layer::unseal(&sealed, diff_id)?)?;
        let mut chunks: HashMap<ContentDigest, Vec<u64>> = HashMap::new();
        for number in 0..index.pack_count() {
            chunks.insert(index.pack(number)?, Vec::new());
        }
        for number in 0..index.chunk_count() {
            let chunk = index.chunk(number)?;
            chunks.entry(chunk.pack).or_default().push(chunk.offset);
        }
        hold.add([*diff_id]);
        hold.claim(chunks.keys().copied());
        for (pack, offsets) in &chunks {
            self.reinstate(Suspect::Pack(*pack))?;
            self.check_pack(pack, diff_id)?;
            let path = layout.pack(pack);
            // A pack that matches its name is whole, whatever the record says.
            if let Some(thinned) = Thinned::beside(&path)?
                && let Some(lost) = offsets.iter().find(|offset| thinned.live.binary_search(offset).is_err())
                && pack::digest_of(&path)? != *pack
            {
                let what = format!("the chunk at {lost} of pack {pack}, which layer {diff_id} shares,");
                return Err(Error::Missing { what });
            }
        }
        Ok(())
    }

    /// The index of a layer that was moved away, if it is whole.
    pub fn previous_index(&self, diff_id: &Digest) -> Option<LayerIndex> {
        let layout = self.store.layout();
        let sealed = fs::read(layout.quarantined(&layout.index(diff_id))).ok()?;
        LayerIndex::from_bytes(layer::unseal(&sealed, diff_id).ok()?).ok()
    }

    /// All objects in quarantine except generations; for each, whether another copy is in its place.
    pub fn quarantined(&self) -> Result<Vec<(Suspect, bool)>> {
        let layout = self.store.layout();
        let mut found = Vec::new();
        type Parse = fn(&str) -> Option<Suspect>;
        let kinds: [(PathBuf, Parse); 3] = [
            (layout.blobs(), |name| Digest::from_hex(name).map(Suspect::Blob)),
            (layout.layers(), |name| Digest::from_hex(name).map(Suspect::Layer)),
            (layout.packs(), |name| ContentDigest::from_hex(name).map(Suspect::Pack)),
        ];
        for (directory, parse) in kinds {
            let directory = layout.quarantined(&directory);
            let fans = match fs::read_dir(&directory) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                fans => fans.map_err(|e| Error::io("list", &directory, e))?,
            };
            for entry in fans.flatten().flat_map(|fan| fs::read_dir(fan.path()).into_iter().flatten().flatten()) {
                let Some(suspect) = entry.file_name().to_str().and_then(parse) else { continue };
                let path = suspect.path(layout);
                found.push((suspect, path.try_exists().map_err(|e| Error::io("look up", &path, e))?));
            }
        }
        Ok(found)
    }

    /// Removes what was moved away longer than `age` ago. Returns how many objects.
    pub fn forget_quarantined(&self, age: Duration) -> Result<u64> {
        self.check()?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let oldest = i64::try_from(now.saturating_sub(age).as_secs()).unwrap_or(i64::MAX);
        let mut removed = 0;
        let mut directories = vec![self.store.layout().quarantine()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                // The change time tells when it was moved. Only directories of objects have names of two digits.
                let is_object = entry.file_name().len() > 2 && directory != self.store.layout().quarantine();
                match entry.metadata() {
                    Ok(status) if is_object && status.ctime() < oldest => {
                        remove(&entry.path());
                        removed += 1;
                    }
                    Ok(status) if !is_object && status.is_dir() => directories.push(entry.path()),
                    _ => {}
                }
            }
        }
        Ok(removed)
    }

    /// Removes the note that images may be missing since the catalogue was salvaged.
    pub fn settle_salvage(&self) -> Result<()> {
        self.check()?;
        let path = self.store.layout().salvage_note();
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", &path, error)),
            _ => Ok(()),
        }
    }

    /// Keeps the newest handover log, which cannot be read whole, in quarantine before ours takes its place.
    pub fn keep_handover_log(&self) -> Result<()> {
        let layout = self.store.layout();
        let Some(epoch) = self.store.handover_log_epoch()? else { return Ok(()) };
        let path = layout.handover_log(epoch);
        let kept = layout.quarantined(&path);
        make_own_all(kept.parent().unwrap_or(&kept))?;
        keep(&path, &kept).map_err(|e| Error::io("keep", &kept, e))
    }

    /// Writes the superblock in one step: without it the directory is not a store.
    fn write_superblock(&self, path: &Path) -> Result<()> {
        let staging = self.stage()?;
        let written = staging.dir.join("superblock");
        with_reserve(self.store.layout(), || {
            let _ = fs::remove_file(&written);
            write_synced(&written, &self.store.superblock().encode())
        })?;
        self.check()?;
        fs::rename(&written, path).map_err(|e| Error::io("write", path, e))?;
        sync_dir(self.store.layout().root())
    }

    /// Restores the superblock and its copy, if what lies there is not the superblock that this coordinator started
    /// with.
    pub fn restore_superblock(&self) -> Result<Moved> {
        let layout = self.store.layout();
        let path = layout.superblock();
        let ours = self.store.superblock();
        if !Superblock::read_copy(layout).is_ok_and(|found| found == *ours) {
            self.write_superblock(&layout.superblock_copy())?;
        }
        if Superblock::read_first(layout).is_ok_and(|found| found == *ours) {
            return Ok(Moved::Nothing);
        }
        make_own_all(&layout.quarantine())?;
        let kept = layout.quarantined(&path);
        match keep(&path, &kept) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Error::io("keep", &kept, e)),
            _ => {}
        }
        self.write_superblock(&path)?;
        Ok(Moved::Away)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::Change;
    use crate::publisher::tests::{new_store, read_f, stage};
    use crate::publisher::{Object, Removal};
    use crate::reader::Store;

    #[test]
    fn a_damaged_blob_goes_away_and_comes_back_where_nothing_better_is() {
        let (_dir, publisher) = new_store();
        let digest = Digest::of(b"good");
        let suspect = Suspect::Blob(digest);
        assert_eq!(publisher.quarantine(suspect).unwrap(), Moved::Nothing);
        publisher.put_blob(&digest, b"good").unwrap();
        let path = suspect.path(publisher.store().layout());
        fs::write(&path, b"bad!").unwrap();
        assert_eq!(publisher.quarantine(suspect).unwrap(), Moved::Away);
        assert!(publisher.store().blob(&digest).unwrap_err().is_missing());
        assert_eq!(publisher.reinstate(suspect).unwrap(), Moved::Away);
        assert_eq!(fs::read(&path).unwrap(), b"bad!");
        assert_eq!(publisher.quarantine(suspect).unwrap(), Moved::Away);
        publisher.put_blob(&digest, b"good").unwrap();
        assert_eq!(publisher.reinstate(suspect).unwrap(), Moved::Nothing);
        assert_eq!(publisher.store().blob(&digest).unwrap(), b"good");
        assert_eq!(publisher.forget_quarantined(Duration::from_secs(3600)).unwrap(), 0);
        let kept = publisher.store().layout().quarantined(&path);
        assert!(kept.exists());
        let staging = publisher.store().layout().staging();
        assert_eq!(fs::read_dir(staging).unwrap().count(), 0, "nothing is left in staging");
    }

    #[test]
    fn a_stale_leader_moves_nothing() {
        let (_dir, publisher) = new_store();
        let digest = Digest::of(b"good");
        publisher.put_blob(&digest, b"good").unwrap();
        let successor = publisher.store().layout().leases().join(format!("{:016x}", publisher.epoch() + 1));
        fs::write(successor, b"{}").unwrap();
        for result in
            [publisher.quarantine(Suspect::Blob(digest)), publisher.reinstate(Suspect::Blob(Digest::of(b"x")))]
        {
            assert!(matches!(result, Err(Error::Fenced { .. }) | Ok(Moved::Nothing)), "{result:?}");
        }
        assert_eq!(publisher.store().blob(&digest).unwrap(), b"good");
    }

    /// Publishes a layer with a pack of its own.
    fn publish(publisher: &Publisher, content: &[u8]) -> (Digest, ContentDigest) {
        let (staging, diff_id, pack) = stage(publisher, content);
        publisher.publish_layer(staging, &diff_id, Some(&pack)).unwrap();
        (diff_id, pack)
    }

    #[test]
    fn a_layer_comes_back_with_its_packs_or_not_at_all() {
        let (dir, publisher) = new_store();
        let (diff_id, pack) = publish(&publisher, b"hello");
        let suspects = [Suspect::Layer(diff_id), Suspect::Pack(pack)];
        let away = || suspects.map(|suspect| publisher.quarantine(suspect).unwrap());
        assert_eq!(away(), [Moved::Away; 2]);
        assert_eq!(publisher.reinstate(Suspect::Layer(diff_id)).unwrap(), Moved::Away, "its pack comes with it");
        assert_eq!(read_f(&Store::open(dir.path()).unwrap(), &diff_id).unwrap(), b"hello");
        assert_eq!(away(), [Moved::Away; 2]);
        fs::remove_file(publisher.store().layout().quarantined(&publisher.store().layout().pack(&pack))).unwrap();
        let error = publisher.reinstate(Suspect::Layer(diff_id)).unwrap_err();
        assert!(error.is_missing() && error.to_string().contains(&pack.to_string()), "{error}");
        assert!(!publisher.store().has_layer(&diff_id).unwrap());
        assert!(publisher.previous_index(&diff_id).is_some(), "it stays in quarantine");
        // Once the pack is there again, the layer may come back.
        let (staging, _, _) = stage(&publisher, b"hello");
        publisher.publish_pack(&staging, &pack).unwrap();
        assert_eq!(publisher.reinstate(Suspect::Layer(diff_id)).unwrap(), Moved::Away);
        assert_eq!(read_f(&Store::open(dir.path()).unwrap(), &diff_id).unwrap(), b"hello");
    }

    #[test]
    fn a_layer_whose_chunks_were_thinned_away_stays_in_quarantine() {
        let (dir, publisher) = new_store();
        let (diff_id, pack) = publish(&publisher, b"hello");
        let chunk = publisher.store().index(&diff_id).unwrap().chunk(0).unwrap();
        publisher.quarantine(Suspect::Layer(diff_id)).unwrap();
        let path = publisher.store().layout().pack(&pack);
        let whole = fs::read(&path).unwrap();
        let collection = publisher.begin_collection().unwrap();
        assert_eq!(collection.thin(pack, &[]).unwrap(), Removal::Done);
        drop(collection);
        let error = publisher.reinstate(Suspect::Layer(diff_id)).unwrap_err();
        assert!(error.is_missing() && error.to_string().contains(&format!("chunk at {}", chunk.offset)), "{error}");
        assert!(!publisher.store().has_layer(&diff_id).unwrap());
        // As after a crash between a thinned pack's record and the pack itself: the pack is still whole.
        fs::write(&path, whole).unwrap();
        assert_eq!(publisher.reinstate(Suspect::Layer(diff_id)).unwrap(), Moved::Away);
        assert_eq!(read_f(&Store::open(dir.path()).unwrap(), &diff_id).unwrap(), b"hello");
    }

    #[test]
    fn a_layer_without_a_readable_index_stays_in_quarantine() {
        let (_dir, publisher) = new_store();
        let (diff_id, _) = publish(&publisher, b"hello");
        let path = publisher.store().layout().index(&diff_id);
        for damage in [true, false] {
            if damage {
                fs::write(&path, b"rubbish").unwrap()
            } else {
                fs::remove_file(&path).unwrap()
            }
            publisher.quarantine(Suspect::Layer(diff_id)).unwrap();
            let error = publisher.reinstate(Suspect::Layer(diff_id)).unwrap_err();
            assert!(matches!(error, Error::Corrupt { .. }), "{error}");
            assert!(!publisher.store().has_layer(&diff_id).unwrap());
            // Whoever pulls the layer again finds its place free.
            publish(&publisher, b"hello");
            assert!(publisher.store().has_layer(&diff_id).unwrap());
        }
    }

    #[test]
    fn no_collection_takes_the_packs_of_a_layer_that_comes_back_meanwhile() {
        let (dir, publisher) = new_store();
        let (diff_id, pack) = publish(&publisher, b"hello");
        publisher.quarantine(Suspect::Layer(diff_id)).unwrap();
        let collection = publisher.begin_collection().unwrap();
        // The collection has looked for layers by now, and found none.
        assert_eq!(publisher.reinstate(Suspect::Layer(diff_id)).unwrap(), Moved::Away);
        assert!(collection.wait_for_work(Duration::ZERO, &|| false));
        assert_eq!(collection.remove(&Object::Pack(pack), &|_| false).unwrap(), Removal::Needed);
        assert_eq!(read_f(&Store::open(dir.path()).unwrap(), &diff_id).unwrap(), b"hello");
    }

    fn remove(tag: &str) -> Change {
        Change::Remove { repository: "r/a".into(), tag: Some(tag.into()), target: Digest::of(b"t") }
    }

    #[test]
    fn a_whole_generation_makes_up_for_damaged_ones_before_it() {
        let (dir, publisher) = new_store();
        let damaged = publisher.commit(vec![remove("a")]).unwrap();
        let path = publisher.store().layout().generation(damaged);
        fs::write(&path, b"rubbish").unwrap();
        assert!(Store::open(dir.path()).unwrap().catalogue().is_err());
        publisher.commit_whole().unwrap();
        publisher.quarantine(Suspect::Generation(damaged)).unwrap();
        let read = Store::open(dir.path()).unwrap().catalogue().unwrap();
        assert_eq!(read.generation(), damaged + 1);
        publisher.commit(vec![remove("b")]).unwrap();
        assert_eq!(Store::open(dir.path()).unwrap().catalogue().unwrap().generation(), damaged + 2);
    }

    #[test]
    fn a_lost_superblock_is_written_again_as_it_was() {
        let (dir, publisher) = new_store();
        let path = publisher.store().layout().superblock();
        let before = fs::read(&path).unwrap();
        assert_eq!(publisher.restore_superblock().unwrap(), Moved::Nothing);
        fs::write(&path, b"rubbish").unwrap();
        assert_eq!(publisher.restore_superblock().unwrap(), Moved::Away);
        assert_eq!(fs::read(&path).unwrap(), before);
        assert_eq!(fs::read(publisher.store().layout().quarantined(&path)).unwrap(), b"rubbish");
        fs::remove_file(&path).unwrap();
        publisher.restore_superblock().unwrap();
        assert_eq!(Store::open(dir.path()).unwrap().identity(), publisher.store().identity());
    }
}
