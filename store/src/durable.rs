//! Files that appear whole and synced, or not at all.
//!
//! Everything that the store writes is published in the same few steps: write and sync a complete file under another
//! name, then `link(2)` or `rename(2)`, then sync the directory. This module does not know what the files mean.
//!
//! Hosts need not run as the coordinator's user, so what they read has fixed modes ([`FOR_ALL`],
//! [`DIRECTORY_FOR_ALL`]), whatever the coordinator's umask.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::crash::{CrashPoint, crash_point};
use crate::error::{Error, Result};

/// The mode of files that hosts read.
pub(crate) const FOR_ALL: u32 = 0o644;
/// The mode of directories that hosts read.
pub(crate) const DIRECTORY_FOR_ALL: u32 = 0o755;
/// The mode of files that are private to the coordinator.
const OWN: u32 = 0o600;
/// The mode of directories that are private to the coordinator.
const DIRECTORY_OWN: u32 = 0o700;

/// Creates a file that hosts can read once it has its name.
fn create_new(path: &Path) -> io::Result<File> {
    let file = File::options().write(true).create_new(true).open(path)?;
    file.set_permissions(Permissions::from_mode(FOR_ALL))?;
    Ok(file)
}

/// Writes a complete file, synced to disk. The file must not exist yet.
pub fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = create_new(path).map_err(|e| Error::io("create", path, e))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|e| Error::io("write", path, e))
}

/// Lets everybody read a file or look into a directory that is about to get its name.
pub(crate) fn open_to_all(path: &Path) -> Result<()> {
    let status = fs::metadata(path).map_err(|e| Error::io("look up", path, e))?;
    let mode = if status.is_dir() { DIRECTORY_FOR_ALL } else { FOR_ALL };
    if status.mode() & 0o777 == mode {
        return Ok(());
    }
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(|e| Error::io("change the mode of", path, e))
}

/// Asks the system to drop a file's bytes from its cache, so that reading back reaches the disk. A hint only.
pub(crate) fn drop_cached(path: &Path) {
    if let Ok(file) = File::open(path) {
        let _ = nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }
}

/// Makes a directory's entries durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| Error::io("sync", dir, e))
}

/// Makes a directory that hosts read.
pub(crate) fn make_directory(dir: &Path) -> io::Result<()> {
    fs::create_dir(dir)?;
    fs::set_permissions(dir, Permissions::from_mode(DIRECTORY_FOR_ALL))
}

/// Makes a directory that is private to the coordinator.
pub(crate) fn make_own_directory(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(DIRECTORY_OWN).create(dir)
}

/// Makes the directory that `path` will lie in, if it is missing. The mode is set on an existing one as well: somebody
/// else may have made it a moment ago and not set its mode yet, or may never do so.
pub(crate) fn make_parent(path: &Path) -> Result<()> {
    make_parent_by(path, make_directory)?;
    // A directory of another user stays as it is; a check of the store finds it.
    let _ = open_to_all(path.parent().unwrap_or(path));
    Ok(())
}

/// Like [`make_parent`], for a directory that is private to the coordinator.
pub(crate) fn make_own_parent(path: &Path) -> Result<()> {
    make_parent_by(path, make_own_directory)
}

fn make_parent_by(path: &Path, make: fn(&Path) -> io::Result<()>) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    match make(parent) {
        Ok(()) => sync_dir(parent.parent().unwrap_or(parent)),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(Error::io("create", parent, e)),
    }
}

/// A name beside `path` that nobody else uses.
fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{:016x}.tmp", rand::random::<u64>()));
    name.into()
}

/// Whether two names belong to one file. Both are opened: a network file system's client may remember attributes, but
/// asks its server about a file that it opens.
fn is_same_file(one: &Path, other: &Path) -> bool {
    let identity =
        |path: &Path| File::open(path).and_then(|file| file.metadata()).map(|status| (status.dev(), status.ino()));
    matches!((identity(one), identity(other)), (Ok(one), Ok(other)) if one == other)
}

/// Links a complete file to its real name. Returns false if another file has that name.
fn link_exclusive(complete: &Path, path: &Path) -> Result<bool> {
    let error = match fs::hard_link(complete, path) {
        Ok(()) => return Ok(true),
        Err(error) => error,
    };
    // The answer may have been lost, and the request repeated (NFS) or given up. Whose file has the name shows whether
    // the link was made.
    if is_same_file(complete, path) {
        return Ok(true);
    }
    match error.kind() {
        io::ErrorKind::AlreadyExists => Ok(false),
        _ => Err(Error::io("create", path, error)),
    }
}

/// Creates `path` whole and synced, unless it exists. Of several callers at once, exactly one gets `true`.
pub(crate) fn create_exclusive(path: &Path, bytes: &[u8]) -> Result<bool> {
    let temporary = temporary(path);
    let written = write_synced(&temporary, bytes).inspect(|()| crash_point(CrashPoint::FileWritten));
    let linked = written.and_then(|()| link_exclusive(&temporary, path));
    crash_point(CrashPoint::FileLinked);
    let _ = fs::remove_file(&temporary);
    if linked.as_ref().is_ok_and(|won| *won) {
        sync_dir(path.parent().unwrap_or(path))?;
    }
    linked
}

/// Replaces `path` by a complete file that only its owner can read; syncs the file and its directory.
pub(crate) fn replace_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = temporary(path);
    let written = File::options().write(true).create_new(true).mode(OWN).open(&temporary);
    let written = written.and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()));
    written.and_then(|()| fs::rename(&temporary, path)).map_err(|e| {
        let _ = fs::remove_file(&temporary);
        Error::io("write", path, e)
    })?;
    sync_dir(path.parent().unwrap_or(path))
}

/// Replaces `path` by a complete file, so that readers see the old or the new one. Nothing is synced.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = temporary(path);
    let written = create_new(&temporary).and_then(|mut file| file.write_all(bytes));
    written.and_then(|()| fs::rename(&temporary, path)).map_err(|e| {
        let _ = fs::remove_file(&temporary);
        Error::io("write", path, e)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_reply_of_link_is_not_taken_for_somebody_elses_file() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, name) = (dir.path().join("ours"), dir.path().join("name"));
        write_synced(&ours, b"ours").unwrap();
        // The server made the link and the answer was lost; the client asks again and is told that the name exists.
        fs::hard_link(&ours, &name).unwrap();
        fs::hard_link(&ours, dir.path().join("a third name, as a backup by links makes it")).unwrap();
        assert!(link_exclusive(&ours, &name).unwrap());
        let theirs = dir.path().join("theirs");
        write_synced(&theirs, b"ours").unwrap();
        assert!(!link_exclusive(&theirs, &name).unwrap(), "the same bytes are not the same file");
        assert!(link_exclusive(&dir.path().join("gone"), &dir.path().join("new")).is_err());
    }

    #[test]
    fn modes_do_not_depend_on_the_umask() {
        let dir = tempfile::tempdir().unwrap();
        let mode = |path: &Path| path.metadata().unwrap().mode() & 0o777;
        let made = dir.path().join("made/file");
        make_parent(&made).unwrap();
        assert!(create_exclusive(&made, b"x").unwrap());
        assert_eq!((mode(made.parent().unwrap()), mode(&made)), (0o755, 0o644));
        // As if another thread had made the directory and not set its mode yet.
        fs::set_permissions(made.parent().unwrap(), Permissions::from_mode(0o700)).unwrap();
        make_parent(&made).unwrap();
        assert_eq!(mode(made.parent().unwrap()), 0o755);
        replace(&made, b"y").unwrap();
        assert_eq!(mode(&made), 0o644);
        replace_synced(&made, b"z").unwrap();
        assert_eq!(mode(&made), 0o600);
        open_to_all(&made).unwrap();
        assert_eq!(mode(&made), 0o644);
        let own = dir.path().join("own/file");
        make_own_parent(&own).unwrap();
        assert_eq!(mode(own.parent().unwrap()), 0o700);
    }
}
