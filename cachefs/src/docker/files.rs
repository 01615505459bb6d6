//! Writing what engines read, so that a crash leaves the old state or the new one.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Why a file cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Its disk is full.
    #[error("the disk of {} is full: free space and run the command again", path.display())]
    Full {
        /// The file that was being written.
        path: PathBuf,
    },
    /// Somebody else's file has the name of a link.
    #[error("{} is not a symbolic link: move it away", path.display())]
    NoLink {
        /// The file.
        path: PathBuf,
    },
    /// Any other error of the operating system.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

type Result<T, E = FileError> = std::result::Result<T, E>;

impl FileError {
    /// Classifies an I/O error met while doing `action` to `path`.
    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> FileError {
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => FileError::Full { path },
            _ => FileError::Io { action, path, source },
        }
    }
}

/// The prefix of unfinished files; dockerd skips such names.
const PARTIAL: &str = ".tmp-cachefs-";

fn partial(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(PARTIAL);
    name.push(path.file_name().unwrap_or_default());
    path.with_file_name(name)
}

/// Makes a directory and its parents with exactly that mode, whatever the umask; those that exist stay as they are.
pub(super) fn make_dir(path: &Path, mode: u32) -> Result<()> {
    let lacking: Vec<_> =
        path.ancestors().take_while(|above| !above.as_os_str().is_empty() && !above.exists()).collect();
    for dir in lacking.into_iter().rev() {
        let made = match fs::DirBuilder::new().mode(mode).create(dir) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(e) => Err(e),
            Ok(()) => fs::set_permissions(dir, Permissions::from_mode(mode)),
        };
        made.map_err(|e| FileError::io("create", dir, e))?;
    }
    Ok(())
}

/// Writes `bytes` to `path`: whole or not at all, and durably.
pub(super) fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let temporary = partial(path);
    let write = || {
        let mut file = File::create(&temporary)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|e| FileError::io("write", path, e))?;
    sync_dir(path.parent().unwrap_or(path))
}

/// Writes `bytes` to `path` unless that is its content already. The caller makes it durable with [`sync_all`].
pub(super) fn ensure_file(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    if fs::read(path).is_ok_and(|present| present == bytes) {
        return Ok(());
    }
    let temporary = partial(path);
    let write = || {
        fs::write(&temporary, bytes)?;
        fs::set_permissions(&temporary, Permissions::from_mode(mode))?;
        fs::rename(&temporary, path)
    };
    write().map_err(|e| FileError::io("write", path, e))
}

/// Makes `path` a symbolic link to `target`; another link there is replaced in one step.
pub(super) fn ensure_link(path: &Path, target: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.is_symlink() => {
            return Err(FileError::NoLink { path: path.into() });
        }
        Ok(_) if fs::read_link(path).is_ok_and(|present| present == target) => return Ok(()),
        _ => {}
    }
    let temporary = partial(path);
    let write = || {
        remove_file(&temporary)?;
        std::os::unix::fs::symlink(target, &temporary)?;
        fs::rename(&temporary, path)
    };
    write().map_err(|e| FileError::io("write", path, e))
}

fn remove_file(path: &Path) -> io::Result<()> {
    absent_is_fine(fs::remove_file(path))
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Removes a file or link, if there is one.
pub(super) fn forget_file(path: &Path) -> Result<()> {
    remove_file(path).map_err(|e| FileError::io("remove", path, e))
}

/// Removes a directory and what it holds (links are not followed), if there is one.
pub(super) fn forget_tree(path: &Path) -> Result<()> {
    absent_is_fine(fs::remove_dir_all(path)).map_err(|e| FileError::io("remove", path, e))
}

/// Removes a directory, if there is one and it is empty.
pub(super) fn forget_empty(path: &Path) -> Result<()> {
    match fs::remove_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
        other => absent_is_fine(other).map_err(|e| FileError::io("remove", path, e)),
    }
}

/// Makes a directory's names durable.
pub(super) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| FileError::io("sync", dir, e))
}

/// Makes everything on the file system of `path` durable: once for a batch, instead of once a file.
pub(super) fn sync_all(path: &Path) -> Result<()> {
    let sync = || nix::unistd::syncfs(File::open(path)?).map_err(io::Error::from);
    sync().map_err(|e| FileError::io("sync", path, e))
}

/// A file's text without surrounding white space; nothing if there is no such file.
pub(super) fn read_text(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(FileError::io("read", path, e)),
    }
}

/// The names in a directory; none if there is no such directory.
pub(super) fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|e| FileError::io("read", dir, e))?,
    };
    let name = |entry: io::Result<fs::DirEntry>| entry.map(|e| e.file_name().to_string_lossy().into_owned());
    entries.map(name).collect::<io::Result<_>>().map_err(|e| FileError::io("read", dir, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_links_are_replaced_and_left_alone_when_right() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("f"), dir.path().join("l"));
        replace(&file, b"one", 0o600).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        ensure_file(&file, b"two", 0o644).unwrap();
        assert_eq!(read_text(&file).unwrap().as_deref(), Some("two"));
        ensure_link(&link, Path::new("a")).unwrap();
        ensure_link(&link, Path::new("b")).unwrap();
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("b"));
        assert!(ensure_link(&file, Path::new("b")).is_err(), "a file of somebody else is not replaced");
        let mut left = names(dir.path()).unwrap();
        left.sort();
        assert_eq!(left, ["f", "l"]);
        sync_all(dir.path()).unwrap();
    }
}
