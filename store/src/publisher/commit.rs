//! Committing: one generation of the catalogue after the other.
//!
//! Before it adds a generation, a leader lists those that are there, and so learns two things. (1) Whether all
//! generations are there that a host without any needs: the newest whole state and what follows it. If not, the leader
//! writes a whole state, so that "published" holds for hosts that come later, too. (2) Whether there is a generation of
//! its own that it does not know of, because it wrote the file but the answer was lost (a network file system's
//! timeout). Then that commit did happen, and is applied.
//!
//! On a full disk a whole state that is due is postponed: a change takes less room, and readers still start from the
//! last whole state.

use std::collections::HashSet;
use std::fs;

use crate::catalogue::{Catalogue, Change, Generation, SNAPSHOT_EVERY};
use crate::crash::{CrashPoint, crash_point};
use crate::durable::create_exclusive;
use crate::error::{Error, Result};
use crate::image::ImageRecord;
use crate::layout;
use crate::publisher::Publisher;
use crate::publisher::holds::lock;
use crate::reserve::with_reserve;

/// Whether all generations are there that a new reader needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GenerationLog {
    Complete,
    Gap,
}

impl Publisher {
    /// The present state of the catalogue.
    pub fn catalogue(&self) -> Catalogue {
        lock(&self.catalogue).clone()
    }

    /// Commits `changes` as one new generation. Refused as [`Error::Missing`] if an image lacks a layer, its manifest or its
    /// config.
    pub fn commit(&self, changes: Vec<Change>) -> Result<u64> {
        self.commit_with(|_| Ok(changes))
    }

    /// Commits what `changes` makes of the present state, which cannot change in between. An image whose pinned digest
    /// would lose its last name is kept under the digest.
    pub fn commit_with(&self, changes: impl FnOnce(&Catalogue) -> Result<Vec<Change>>) -> Result<u64> {
        let mut catalogue = lock(&self.catalogue);
        self.check()?;
        let chain = self.look_at_chain(&mut catalogue)?;
        let changes = changes(&catalogue)?;
        for change in &changes {
            if let Change::Set(image) = change {
                self.check_complete(image)?;
            }
        }
        let changes = catalogue.keeping_pinned(changes);
        let indexes = self.indexes_of(&catalogue, &changes)?;
        let mut next = match chain {
            GenerationLog::Complete => catalogue.next(self.epoch, changes.clone()),
            GenerationLog::Gap => catalogue.next_whole(self.epoch, changes.clone()),
        };
        next.indexes.extend(indexes.iter().cloned());
        let is_whole = next.tags.is_some();
        let written = match self.write(&mut catalogue, next) {
            Err(Error::Full { .. }) if is_whole && chain == GenerationLog::Complete && catalogue.generation() > 0 => {
                let next = catalogue.next_change(self.epoch, changes);
                self.write(&mut catalogue, Generation { indexes: indexes.clone(), ..next })
            }
            written => written,
        };
        self.forget_indexes(&indexes);
        written
    }

    /// Commits the whole state under the next number, or above `floor` if that is higher.
    pub(super) fn commit_whole_at(&self, catalogue: &mut Catalogue, floor: u64) -> Result<u64> {
        self.check()?;
        self.look_at_chain(catalogue)?;
        let next = catalogue.whole(catalogue.generation().max(floor) + 1, self.epoch);
        self.write(catalogue, next)
    }

    /// Commits a whole state above `generation`, unless the catalogue is above it already. Hosts may have seen that
    /// generation although the store, restored from a backup, does not know it.
    pub fn go_on_above(&self, generation: u64) -> Result<u64> {
        let mut catalogue = lock(&self.catalogue);
        match catalogue.generation() {
            present if present > generation => Ok(present),
            _ => self.commit_whole_at(&mut catalogue, generation),
        }
    }

    /// Reads the catalogue as a host does that knows none of it. If its files do not allow that, commits the whole
    /// state and returns why it could not be read. Other errors are the disk's, or those of the commit.
    pub fn heal_catalogue(&self) -> Result<Option<String>> {
        let fresh = || match self.store.afresh().catalogue() {
            Ok(_) => Ok(None),
            Err(error) if error.is_of_object() => Ok(Some(error.to_string())),
            Err(error) => Err(error),
        };
        // Without the lock, generations may be removed while others are committed. So a failure is checked again under
        // the lock.
        if fresh()?.is_none() {
            return Ok(None);
        }
        let mut catalogue = lock(&self.catalogue);
        let Some(why) = fresh()? else { return Ok(None) };
        self.commit_whole_at(&mut catalogue, 0)?;
        Ok(Some(why))
    }

    /// Looks which generations are there. Applies those of our own that are there although their write seemed to fail.
    pub(super) fn look_at_chain(&self, catalogue: &mut Catalogue) -> Result<GenerationLog> {
        let mut numbers: HashSet<u64> = self.store.generation_numbers()?.into_iter().collect();
        while numbers.contains(&(catalogue.generation() + 1)) {
            let number = catalogue.generation() + 1;
            let written = self.store.afresh().generation_file(number)?;
            if written.epoch != self.epoch {
                self.check()?;
                return Err(written_by_another(number));
            }
            catalogue.apply(written)?;
            numbers = self.store.generation_numbers()?.into_iter().collect();
        }
        let mut needed = catalogue.snapshot().max(1)..=catalogue.generation();
        Ok(if needed.all(|number| numbers.contains(&number)) { GenerationLog::Complete } else { GenerationLog::Gap })
    }

    /// Writes a generation's file and makes it the present state.
    pub(super) fn write(&self, catalogue: &mut Catalogue, next: Generation) -> Result<u64> {
        let number = next.generation;
        let (path, bytes) = (self.store.layout().generation(number), next.encode()?);
        if !with_reserve(self.store.layout(), || create_exclusive(&path, &bytes))? {
            self.check()?;
            return Err(written_by_another(number));
        }
        crash_point(CrashPoint::Committed);
        // Checked after the commit: a leader that took over meanwhile started from a state with our generation, or
        // without it.
        self.check()?;
        let is_snapshot = next.tags.is_some();
        catalogue.apply_over_gap(next);
        if is_snapshot {
            self.forget_generations_before(number.saturating_sub(SNAPSHOT_EVERY));
        }
        Ok(number)
    }

    /// Fails with [`Error::Missing`] unless everything that an image refers to is in the store.
    fn check_complete(&self, image: &ImageRecord) -> Result<()> {
        let layout = self.store.layout();
        let blobs = [("manifest", image.manifest), ("config", image.config)];
        let blobs = blobs.map(|(kind, digest)| (kind, digest, layout.blob(&digest)));
        let layers = image.layers.iter().map(|layer| ("layer", layer.diff_id, layout.index(&layer.diff_id)));
        for (kind, digest, path) in blobs.into_iter().chain(layers) {
            if !path.try_exists().map_err(|e| Error::io("look up", &path, e))? {
                return Err(Error::Missing { what: format!("{kind} {digest} of {}", image.familiar_name()) });
            }
        }
        Ok(())
    }

    fn forget_generations_before(&self, oldest: u64) {
        let dir = self.store.layout().catalogue();
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let number = name.to_str().and_then(layout::number);
            if number.is_some_and(|n| n < oldest) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

fn written_by_another(number: u64) -> Error {
    Error::corrupt("the catalogue", format!("generation {number} was written by somebody else"))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::sync::Arc;

    use super::*;
    use crate::catalogue::tests::image;
    use crate::publisher::tests::{furnish, new_store};
    use crate::publisher::{Candidacy, Candidate, Object, Removal, create};
    use crate::reader::Store;
    use crate::reserve::RESERVE_BYTES;

    fn set(publisher: &Publisher, tag: &str, n: u8) -> Change {
        Change::Set(furnish(publisher, &image("r/a", Some(tag), n)))
    }

    fn fresh(publisher: &Publisher) -> Result<Vec<String>> {
        let catalogue = Store::open(publisher.store().layout().root())?.catalogue()?;
        Ok(catalogue.images().map(|image| image.tag.clone().unwrap_or_default()).collect())
    }

    #[test]
    fn what_is_published_over_a_missing_generation_can_be_read_by_new_hosts() {
        let (_dir, publisher) = new_store();
        for n in 0..4 {
            publisher.commit(vec![set(&publisher, &format!("t{n}"), n)]).unwrap();
        }
        for newest in [true, false] {
            let catalogue = publisher.catalogue();
            let victim = if newest { catalogue.generation() } else { catalogue.snapshot() };
            fs::remove_file(publisher.store().layout().generation(victim)).unwrap();
            assert!(newest || fresh(&publisher).is_err());
            publisher.commit(vec![set(&publisher, "new", 9)]).unwrap();
            publisher.commit(Vec::new()).unwrap();
            assert_eq!(fresh(&publisher).unwrap(), ["new", "t0", "t1", "t2", "t3"]);
        }
        publisher.release().unwrap();
        Publisher::open(publisher.store().layout().root(), "next").unwrap();
    }

    #[test]
    fn a_damaged_generation_is_made_up_for_before_a_new_host_needs_it() {
        let (_dir, publisher) = new_store();
        for n in 0..4 {
            publisher.commit(vec![set(&publisher, &format!("t{n}"), n)]).unwrap();
        }
        assert_eq!(publisher.heal_catalogue().unwrap(), None);
        for damage in [&b""[..], b"rubbish"] {
            fs::write(publisher.store().layout().generation(publisher.catalogue().generation()), damage).unwrap();
            assert!(fresh(&publisher).is_err());
            assert!(publisher.heal_catalogue().unwrap().unwrap().contains("catalogue"));
            assert_eq!(fresh(&publisher).unwrap().len(), 4);
        }
    }

    #[test]
    fn a_commit_whose_answer_was_lost_did_happen() {
        let (_dir, publisher) = new_store();
        let lost = publisher.catalogue().next(publisher.epoch(), vec![set(&publisher, "lost", 1)]);
        create_exclusive(&publisher.store().layout().generation(lost.generation), &lost.encode().unwrap()).unwrap();
        let number = publisher.commit(vec![set(&publisher, "next", 2)]).unwrap();
        assert_eq!(number, lost.generation + 1, "the leader goes on");
        assert_eq!(fresh(&publisher).unwrap(), ["lost", "next"]);
        let foreign = Generation { epoch: 77, ..publisher.catalogue().next(1, Vec::new()) };
        create_exclusive(&publisher.store().layout().generation(foreign.generation), &foreign.encode().unwrap())
            .unwrap();
        assert!(publisher.commit(Vec::new()).unwrap_err().to_string().contains("somebody else"));
    }

    #[test]
    fn a_store_from_a_backup_goes_on_above_what_hosts_have_seen() {
        let (dir, publisher) = new_store();
        publisher.commit(vec![set(&publisher, "old", 1)]).unwrap();
        let mut host = Store::open(dir.path()).unwrap().catalogue().unwrap();
        assert_eq!(publisher.go_on_above(1).unwrap(), publisher.catalogue().generation(), "nothing was forgotten");
        // The host has seen 40 generations more, of which the backup knows nothing.
        for _ in 0..40 {
            let next = host.next(
                1,
                vec![Change::Remove { repository: "r/a".into(), tag: None, target: image("r/a", None, 9).target }],
            );
            host.apply(next).unwrap();
        }
        publisher.go_on_above(host.generation()).unwrap();
        assert!(Store::open(dir.path()).unwrap().refresh(&mut host).unwrap());
        publisher.commit(vec![set(&publisher, "new", 2)]).unwrap();
        assert!(Store::open(dir.path()).unwrap().refresh(&mut host).unwrap());
        assert_eq!(host.images().count(), 2);
        publisher.release().unwrap();
        let next = Candidate::new(dir.path(), "next").unwrap().above(90).attempt().unwrap();
        let Candidacy::Leading(next) = next else { panic!("the lease was released") };
        assert_eq!(next.epoch(), 91);
    }

    #[test]
    fn leases_that_are_gone_do_not_make_two_leaders() {
        let (dir, publisher) = new_store();
        publisher.commit(Vec::new()).unwrap();
        fs::remove_dir_all(publisher.store().layout().leases()).unwrap();
        let second = Publisher::open(dir.path(), "second").unwrap();
        assert!(second.epoch() > publisher.epoch());
        assert!(matches!(publisher.commit(Vec::new()), Err(Error::Fenced { .. })));
        second.commit(Vec::new()).unwrap();
    }

    /// A small file system of its own, unmounted when dropped.
    struct SmallDisk(tempfile::TempDir);

    impl SmallDisk {
        fn new() -> SmallDisk {
            let dir = tempfile::tempdir().unwrap();
            let flags = nix::mount::MsFlags::empty();
            nix::mount::mount(Some("tmpfs"), dir.path(), Some("tmpfs"), flags, Some("size=16m")).unwrap();
            SmallDisk(dir)
        }

        /// Writes until nothing more can be written.
        fn fill(&self) {
            let name = self.0.path().join(format!("others-{:x}", rand::random::<u64>()));
            let mut file = File::create(name).unwrap();
            for len in [1 << 16, 1 << 12, 1] {
                while file.write_all(&vec![7; len]).is_ok() {}
            }
        }
    }

    impl Drop for SmallDisk {
        fn drop(&mut self) {
            let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
        }
    }

    #[test]
    fn a_full_disk_can_be_emptied_and_its_store_be_led() {
        let disk = SmallDisk::new();
        let root = disk.0.path();
        create(root).unwrap();
        assert_eq!(fs::metadata(root.join("reserve")).unwrap().len(), RESERVE_BYTES);
        let publisher = Publisher::open(root, "first").unwrap();
        let blob = crate::digest::Digest::of(b"big");
        publisher.commit(vec![set(&publisher, "t", 1)]).unwrap();
        fs::create_dir_all(publisher.store().layout().blob(&blob).parent().unwrap()).unwrap();
        fs::write(publisher.store().layout().blob(&blob), vec![1; 1 << 20]).unwrap();
        disk.fill();
        assert!(matches!(publisher.put_blob(&crate::digest::Digest::of(b"x"), b"x"), Err(Error::Full { .. })));
        let gone = image("r/a", Some("t"), 1);
        let removal =
            Change::Remove { repository: gone.repository.clone(), tag: gone.tag.clone(), target: gone.target };
        publisher.commit(vec![removal]).unwrap();
        assert_eq!(fresh(&publisher).unwrap(), Vec::<String>::new());
        disk.fill();
        assert!(!publisher.keep_reserve().unwrap(), "there is no room to keep");
        drop(publisher);
        // Somebody makes room, and the disk fills up once more.
        let file = File::options().write(true).open(largest_of_others(root)).unwrap();
        file.set_len(file.metadata().unwrap().len() - RESERVE_BYTES * 4 - (1 << 16)).unwrap();
        drop(file);
        let next = lead(root);
        assert!(next.keep_reserve().unwrap() || root.join("reserve").exists());
        disk.fill();
        drop(next);
        let next = lead(root);
        let collection = next.begin_collection().unwrap();
        assert_eq!(collection.remove(&Object::Blob(blob), &|_| false).unwrap(), Removal::Done);
        collection.announce().unwrap();
        collection.empty_trash().unwrap();
        drop(collection);
        fs::remove_file(largest_of_others(root)).unwrap();
        assert!(next.keep_reserve().unwrap(), "and is kept again once there is room");
    }

    fn largest_of_others(root: &std::path::Path) -> std::path::PathBuf {
        let others = fs::read_dir(root).unwrap().flatten().map(|entry| entry.path());
        let len = |path: &std::path::PathBuf| fs::metadata(path).unwrap().len();
        others.filter(|path| path.to_string_lossy().contains("others-")).max_by_key(len).unwrap()
    }

    /// Takes over from a leader that died. Its process is this one and lives, so its lease is released first.
    fn lead(root: &std::path::Path) -> Box<Publisher> {
        let layout = crate::layout::Layout::new(root);
        let epoch = crate::lease::highest(&layout).unwrap();
        File::create(layout.leases().join(format!("{epoch:016x}.released"))).unwrap();
        match Candidate::new(root, "next").unwrap().attempt().unwrap() {
            Candidacy::Leading(publisher) => publisher,
            Candidacy::Standby { holder, .. } => panic!("led by {holder}"),
        }
    }

    #[test]
    fn a_whole_state_that_is_due_on_a_full_disk_is_put_off() {
        let (_dir, publisher) = new_store();
        while publisher.catalogue().generation() < SNAPSHOT_EVERY {
            publisher.commit(Vec::new()).unwrap();
        }
        let catalogue = publisher.catalogue();
        assert!(catalogue.next(1, Vec::new()).tags.is_some());
        let put_off = catalogue.next_change(1, vec![Change::Collected(1)]);
        assert_eq!(put_off.snapshot, 1);
        let mut reader = catalogue.clone();
        reader.apply(put_off).unwrap();
        assert!(reader.next(1, Vec::new()).tags.is_some(), "and is due again at the next commit");
        assert_eq!(Arc::new(reader).collected(), 1);
    }
}
