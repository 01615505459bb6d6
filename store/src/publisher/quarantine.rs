//! What is damaged, out of the way: moved below `quarantine/`, where no reader looks.
//!
//! Moving is fenced like publishing. The object goes through the leader's own staging directory: that is made before the
//! fence is looked at, and a new leader sweeps it before it leads, so that a stale leader's `rename(2)` finds no place to go
//! to. One copy of each object is kept, for people to look at and for the repair to learn from; it is put back where no better
//! one can be had.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::crash::{CrashPoint, crash_point};
use crate::digest::{ContentDigest, Digest};
use crate::durable::{create_exclusive, make_parent, sync_dir};
use crate::error::{Error, Result};
use crate::layer::{self, LayerIndex};
use crate::layout::Layout;
use crate::publisher::Publisher;
use crate::version::{Access, Superblock};

/// An object that is not what its name says.
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
    /// There was nothing to move, or something in its place.
    Nothing,
}

fn remove(path: &Path) {
    let _ = fs::remove_dir_all(path).or_else(|_| fs::remove_file(path));
}

impl Publisher {
    /// Takes a damaged object out of the readers' way.
    pub fn quarantine(&self, suspect: Suspect) -> Result<Moved> {
        let layout = self.store.layout();
        let (live, kept) = (suspect.path(layout), layout.quarantined(&suspect.path(layout)));
        let parent = kept.parent().unwrap_or(&kept);
        fs::create_dir_all(parent).map_err(|e| Error::io("create", parent, e))?;
        let staging = self.stage()?;
        let held = staging.dir.join("suspect");
        self.check()?;
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
        remove(&kept);
        fs::rename(&held, &kept).map_err(|e| Error::io("move", &kept, e))?;
        crash_point(CrashPoint::Quarantined);
        Ok(Moved::Away)
    }

    /// Puts an object back that was moved away, unless there is another one in its place: damaged, it is better than none.
    pub fn reinstate(&self, suspect: Suspect) -> Result<Moved> {
        let layout = self.store.layout();
        let live = suspect.path(layout);
        let kept = layout.quarantined(&live);
        if !kept.exists() || live.exists() {
            return Ok(Moved::Nothing);
        }
        make_parent(&live)?;
        self.check()?;
        // A file must not replace one that has appeared meanwhile; a directory does not.
        let put_back = match kept.is_dir() {
            true => fs::rename(&kept, &live),
            false => fs::hard_link(&kept, &live).and_then(|()| fs::remove_file(&kept)),
        };
        match put_back {
            Ok(()) => sync_dir(live.parent().unwrap_or(&live)).map(|()| Moved::Away),
            Err(e) if matches!(e.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty) => {
                Ok(Moved::Nothing)
            }
            Err(error) => Err(Error::io("put back", &live, error)),
        }
    }

    /// The index of a layer that was moved away, if it is whole.
    pub fn former_index(&self, diff_id: &Digest) -> Option<LayerIndex> {
        let layout = self.store.layout();
        let sealed = fs::read(layout.quarantined(&layout.index(diff_id))).ok()?;
        LayerIndex::from_bytes(layer::unseal(&sealed, diff_id).ok()?).ok()
    }

    /// Removes what was moved away longer than `age` ago.
    pub fn forget_quarantined(&self, age: Duration) -> Result<u64> {
        self.check()?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let oldest = i64::try_from(now.saturating_sub(age).as_secs()).unwrap_or(i64::MAX);
        let mut removed = 0;
        let mut directories = vec![self.store.layout().quarantine()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                // The change time tells when it was moved; a name of 64 digits is an object, not a directory of them.
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

    /// Forgets that images may be missing since the catalogue was salvaged.
    pub fn settle_salvage(&self) -> Result<()> {
        self.check()?;
        let path = self.store.layout().salvage_note();
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", &path, error)),
            _ => Ok(()),
        }
    }

    /// Writes the superblock again, if what lies there is not the one that this coordinator started with.
    pub fn restore_superblock(&self) -> Result<Moved> {
        let layout = self.store.layout();
        let path = layout.superblock();
        if Superblock::read(layout, Access::Write).is_ok_and(|found| found == *self.store.superblock()) {
            return Ok(Moved::Nothing);
        }
        self.check()?;
        let kept = layout.quarantined(&path);
        fs::create_dir_all(layout.quarantine()).map_err(|e| Error::io("create", &layout.quarantine(), e))?;
        let _ = fs::rename(&path, &kept);
        create_exclusive(&path, &self.store.superblock().encode())?;
        Ok(Moved::Away)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::Change;
    use crate::publisher::tests::new_store;
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
        fs::remove_file(&path).unwrap();
        publisher.restore_superblock().unwrap();
        assert_eq!(Store::open(dir.path()).unwrap().identity(), publisher.store().identity());
    }
}
