//! Taking over, from the new epoch to leading: a new leader makes sure that nothing an old one still attempts can
//! succeed.
//!
//! ```text
//! take the epoch ─> make trash/<epoch> ─> remove older trash/ and staging/ ─> modes, superblock ─> commit the fence ─> lead
//! ```
//!
//! An old leader that is merely slow may be anywhere in its work. Whatever it publishes comes out of
//! `staging/<its epoch>-...`, and whatever it deletes goes into `trash/<its epoch>`, by one `rename(2)`. Once those
//! directories are removed, that rename fails. (They are removed rather than renamed, because a network file system's
//! client may hold on to a directory by its handle.) A staging directory that the old leader makes later does not help
//! it, because it looks for a higher epoch between staging and renaming; its trash is made only here. Before the
//! directories are removed, its rename may succeed, which is harmless: the fence is still to come, so nothing has been
//! committed since its own last commit. What it removed was not referred to, and what it published is whole.
//!
//! Only what belongs to lower epochs is removed: a candidate that was itself overtaken meanwhile must not harm its
//! successor. Its fence fails, because the successor's is there.

use std::fs;
use std::io;
use std::path::Path;

use crate::crash::{CrashPoint, crash_point};
use crate::durable::{make_own_directory, sync_dir};
use crate::error::{Error, Result};
use crate::layout::leading_number;
use crate::lease;
use crate::publisher::Publisher;
use crate::reserve::with_reserve;

/// Attempts to remove a directory. An old leader may write into it meanwhile, but not for long: it finds itself
/// replaced.
const ATTEMPTS: u32 = 1000;
/// Attempts to commit the fence. An old leader may still win one generation, for then it looks at the lease.
const FENCE_ATTEMPTS: u32 = 8;

impl Publisher {
    /// Makes this coordinator's trash, removes what leaders before it left, and commits the fence.
    pub(super) fn take_over(&self) -> Result<()> {
        self.make_trash()?;
        crash_point(CrashPoint::TrashMade);
        self.sweep()?;
        crash_point(CrashPoint::Swept);
        self.open_to_hosts()?;
        self.restore_superblock()?;
        self.fence()?;
        // From the start, even in a store that has none. If there is no room, it is made later.
        self.keep_reserve().map(drop)
    }

    fn make_trash(&self) -> Result<()> {
        let layout = self.store.layout();
        for dir in [layout.trash(), layout.trash_of(self.epoch)] {
            with_reserve(layout, || match make_own_directory(&dir) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(Error::io("create", &dir, e)),
                _ => sync_dir(dir.parent().unwrap_or(&dir)),
            })?;
        }
        Ok(())
    }

    /// Removes the trash and the staging directories of leaders before this one.
    fn sweep(&self) -> Result<()> {
        let layout = self.store.layout();
        for dir in [layout.trash(), layout.staging()] {
            for entry in fs::read_dir(&dir).map_err(|e| Error::io("list", &dir, e))?.flatten() {
                if is_older(&entry.file_name().to_string_lossy(), self.epoch) {
                    remove_or_set_aside(&entry.path(), &layout.trash_of(self.epoch))?;
                }
            }
            sync_dir(&dir)?;
        }
        Ok(())
    }

    /// Commits the first generation of the epoch. A stale leader that was about to commit this number loses.
    fn fence(&self) -> Result<()> {
        for _ in 0..FENCE_ATTEMPTS {
            match self.commit(Vec::new()) {
                Err(Error::Corrupt { .. }) => {}
                result => return result.map(drop),
            }
            // The old leader won the number just before. This fails if a higher epoch was taken meanwhile.
            lease::check(self.store.layout(), self.epoch)?;
            let newest = self.store.catalogue()?;
            *super::lock(&self.catalogue) = newest;
        }
        self.commit(Vec::new()).map(drop)
    }
}

/// Whether an entry of `trash/` or `staging/` belongs to an epoch before `epoch`, or to none.
fn is_older(name: &str, epoch: u64) -> bool {
    let own = leading_number(name);
    own.is_none_or(|own| own < epoch)
}

/// Removes a file or directory even if somebody may still write into it.
pub(super) fn remove_completely(path: &Path) -> Result<()> {
    let mut last = None;
    for _ in 0..ATTEMPTS {
        let removed = match fs::symlink_metadata(path) {
            Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
            Ok(_) => fs::remove_file(path),
            Err(e) => Err(e),
        };
        match removed {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound && !path.exists() => return Ok(()),
            Err(e) if matches!(e.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotFound) => last = Some(e),
            Err(e) => return Err(Error::io("remove", path, e)),
        }
    }
    Err(Error::io("remove", path, last.unwrap_or_else(|| io::ErrorKind::DirectoryNotEmpty.into())))
}

/// Whether a removal failed because a client of a network file system has a file open: there the file stays under
/// another name (`.nfs...`) until it is closed.
pub(super) fn is_in_use(error: &Error) -> bool {
    let Error::Io { source, .. } = error else { return false };
    matches!(source.kind(), io::ErrorKind::ResourceBusy | io::ErrorKind::DirectoryNotEmpty)
}

/// Removes a file or directory. Files that are still in use are moved into the directory `aside`, which is emptied
/// later.
fn remove_or_set_aside(path: &Path, aside: &Path) -> Result<()> {
    match remove_completely(path) {
        Err(error) if is_in_use(&error) => {
            set_aside(path, aside, &|file| fs::remove_file(file)).map_err(|e| Error::io("remove", path, e))?;
            remove_completely(path)
        }
        other => other,
    }
}

/// Removes files with `unlink`, and moves those that it calls busy into the directory `aside`.
fn set_aside(path: &Path, aside: &Path, unlink: &dyn Fn(&Path) -> io::Result<()>) -> io::Result<()> {
    if fs::symlink_metadata(path)?.is_dir() {
        return fs::read_dir(path)?.try_for_each(|entry| set_aside(&entry?.path(), aside, unlink));
    }
    match unlink(path) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
            fs::rename(path, aside.join(format!("in-use-{:016x}", rand::random::<u64>())))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_in_use_are_set_aside_so_that_their_directory_can_go() {
        let dir = tempfile::tempdir().unwrap();
        let (old, aside) = (dir.path().join("old"), dir.path().join("aside"));
        fs::create_dir_all(old.join("layer")).unwrap();
        fs::create_dir(&aside).unwrap();
        for name in ["pack", "layer/index", "layer/.nfs0001"] {
            fs::write(old.join(name), name).unwrap();
        }
        let unlink = |file: &Path| {
            if file.ends_with(".nfs0001") { Err(io::ErrorKind::ResourceBusy.into()) } else { fs::remove_file(file) }
        };
        set_aside(&old, &aside, &unlink).unwrap();
        remove_completely(&old).unwrap();
        let kept: Vec<_> = fs::read_dir(&aside).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(kept.len(), 1);
        assert_eq!(fs::read_to_string(&kept[0]).unwrap(), "layer/.nfs0001");
    }

    #[test]
    fn only_older_epochs_are_swept() {
        for (name, older) in [
            ("0000000000000002", true),
            ("0000000000000003", false),
            ("0000000000000004", false),
            ("0000000000000002-00000000000000ff", true),
            ("0000000000000009-00000000000000ff", false),
            ("probe-00000000000000ff", true),
            ("x", true),
        ] {
            assert_eq!(is_older(name, 3), older, "{name}");
        }
    }

    #[test]
    fn a_directory_that_is_written_to_is_removed_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("0000000000000001-1");
        fs::create_dir(&victim).unwrap();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut written = 0u32;
                while fs::write(victim.join(format!("f{written}")), b"x").is_ok() {
                    written += 1;
                }
                written
            });
            remove_completely(&victim).unwrap();
            writer.join().unwrap();
        });
        assert!(!victim.exists());
        remove_completely(&victim).unwrap();
    }
}
