//! Files that appear whole and synced, or not at all.
//!
//! The few steps that publishing is made of, for everything that the store writes: a complete, synced file under another
//! name, then `link(2)` or `rename(2)`, then the directory. Nobody here knows what the files mean.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::crash::{CrashPoint, crash_point};
use crate::error::{Error, Result};

/// Writes a complete file, synced to disk, that must not exist yet.
pub fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let file = File::options().write(true).create_new(true).open(path);
    let mut file = file.map_err(|e| Error::io("create", path, e))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|e| Error::io("write", path, e))
}

/// Asks the system to forget its copy of a file's bytes, so that reading back reaches the disk. A hint.
pub(crate) fn drop_cached(path: &Path) {
    if let Ok(file) = File::open(path) {
        let _ = nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }
}

/// Makes a directory's entries durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| Error::io("sync", dir, e))
}

/// Makes the directory that `path` will lie in, if it is not there.
pub(crate) fn make_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    match fs::create_dir(parent) {
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

/// Creates `path` whole and synced, unless it exists: of several at once, exactly one is told `true`.
pub(crate) fn create_exclusive(path: &Path, bytes: &[u8]) -> Result<bool> {
    let temporary = temporary(path);
    let written = write_synced(&temporary, bytes).inspect(|()| crash_point(CrashPoint::FileWritten));
    let linked = written.and_then(|()| match fs::hard_link(&temporary, path) {
        Ok(()) => Ok(true),
        // An answer may be lost and the request repeated (NFS): two names mean that our link did happen.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            Ok(fs::metadata(&temporary).is_ok_and(|m| std::os::unix::fs::MetadataExt::nlink(&m) == 2))
        }
        Err(e) => Err(Error::io("create", path, e)),
    });
    crash_point(CrashPoint::FileLinked);
    let _ = fs::remove_file(&temporary);
    if linked.as_ref().is_ok_and(|won| *won) {
        sync_dir(path.parent().unwrap_or(path))?;
    }
    linked
}

/// Replaces `path` by a complete file that only its owner reads, synced together with its name.
pub(crate) fn replace_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = temporary(path);
    let written = File::options().write(true).create_new(true).mode(0o600).open(&temporary);
    let written = written.and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()));
    written.and_then(|()| fs::rename(&temporary, path)).map_err(|e| {
        let _ = fs::remove_file(&temporary);
        Error::io("write", path, e)
    })?;
    sync_dir(path.parent().unwrap_or(path))
}

/// Replaces `path` by a complete file, so that readers see the old or the new one.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = temporary(path);
    let replaced = fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, path));
    replaced.map_err(|e| {
        let _ = fs::remove_file(&temporary);
        Error::io("write", path, e)
    })
}
