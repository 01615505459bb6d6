//! Directories and files of this host's own, which nobody but the daemon's user may enter, read or change.
//!
//! The local cache holds private images, and what its indexes say is shown to containers as it stands. So every
//! directory here has mode 0700 and every file 0600, whatever the umask, and a directory that somebody else could have
//! filled is refused. A directory that is this user's alone but that others can read, as earlier versions and `mkdir`
//! make them, is closed to them.

use std::fs::{self, DirBuilder, File, Metadata, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use coordinator_api::replaceable::{OpenAncestor, open_ancestor};
use nix::sys::stat::Mode;

/// Mode of directories.
const DIRECTORY: u32 = 0o700;
/// Mode of files and sockets.
const FILE: u32 = 0o600;
/// The write permissions of group and others.
const OTHERS_WRITE: u32 = 0o022;
/// A directory that some file systems have in their root. A directory that holds nothing else counts as empty.
const LOST_AND_FOUND: &str = "lost+found";

/// Why a directory is refused.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Somebody else owns it.
    #[error(
        "it belongs to uid {0}, not to the user that runs cachefs; chown it if all in it may be trusted, or choose another one"
    )]
    Foreign(u32),
    /// Others may have put things into it.
    #[error(
        "others may write to it (mode {0:04o}); make sure that nothing in it is theirs and chmod 700 it, or choose another one"
    )]
    Writable(u32),
    /// Somebody else could put another one in its place.
    #[error("it lies in {}, which uid {uid} may change (mode {mode:04o}); choose a directory that only root can replace", path.display())]
    Replaceable {
        /// The directory above it.
        path: PathBuf,
        /// Its owner.
        uid: u32,
        /// Its mode.
        mode: u32,
    },
    /// It holds something else, which would be closed to others.
    #[error("others may read it (mode {0:04o}) and it holds files that are not of a cache; choose an empty directory")]
    Occupied(u32),
    /// The operating system's error.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Sets the umask: from now on, whatever this process makes is for its user alone.
pub fn close_umask() {
    nix::sys::stat::umask(Mode::from_bits_truncate(0o077));
}

/// Creates the directory and the missing ones above it, or takes an existing one if that is safe. An entry of the name
/// `is_ours` shows that it has been a daemon's before. Returns its path without links.
pub fn claim(path: &Path, is_ours: &str) -> Result<PathBuf, Refusal> {
    DirBuilder::new().recursive(true).mode(DIRECTORY).create(path)?;
    let path = path.canonicalize()?;
    if let Some(OpenAncestor { path, uid, mode }) = open_ancestor(&path, nix::unistd::geteuid().as_raw())? {
        return Err(Refusal::Replaceable { path, uid, mode });
    }
    let meta = fs::metadata(&path)?;
    let is_open = meta.mode() & 0o077 != 0;
    // A mistyped path must not close /var to everybody.
    if is_open && is_own(&meta) && !is_empty(&path)? && !path.join(is_ours).exists() {
        return Err(Refusal::Occupied(meta.mode() & 0o7777));
    }
    close(&path, &meta)?;
    Ok(path)
}

/// Creates a directory in a claimed one, or closes an existing one to others.
pub fn directory(path: &Path) -> Result<(), Refusal> {
    match DirBuilder::new().mode(DIRECTORY).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
        _ => {}
    }
    let meta = fs::symlink_metadata(path)?;
    if !meta.is_dir() {
        return Err(io::Error::from(io::ErrorKind::NotADirectory).into());
    }
    close(path, &meta)
}

fn is_own(meta: &Metadata) -> bool {
    meta.uid() == nix::unistd::geteuid().as_raw()
}

fn is_empty(path: &Path) -> io::Result<bool> {
    let mut names = fs::read_dir(path)?.map(|entry| entry.map(|entry| entry.file_name()));
    names.try_fold(true, |empty, name| Ok(empty && name? == LOST_AND_FOUND))
}

fn close(path: &Path, meta: &Metadata) -> Result<(), Refusal> {
    let mode = meta.mode() & 0o7777;
    match mode {
        _ if !is_own(meta) => Err(Refusal::Foreign(meta.uid())),
        _ if mode & OTHERS_WRITE != 0 => Err(Refusal::Writable(mode)),
        DIRECTORY => Ok(()),
        _ => Ok(fs::set_permissions(path, Permissions::from_mode(DIRECTORY))?),
    }
}

/// Closes to others the files of a claimed directory that an earlier version has left readable.
pub fn close_files(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        if meta.is_file() && meta.mode() & 0o7777 != FILE {
            close_file(&entry.path())?;
        }
    }
    Ok(())
}

/// Closes a file or socket to others.
pub fn close_file(path: &Path) -> io::Result<()> {
    fs::set_permissions(path, Permissions::from_mode(FILE))
}

/// Writes `bytes` to `path`, whole or not at all, and durably: a crash leaves the old file or the new one.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = File::options().write(true).create(true).truncate(true).mode(FILE).open(&temporary)?;
    file.set_permissions(Permissions::from_mode(FILE))?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(path.parent().unwrap_or(path))?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::chown;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    fn made(above: &Path, name: &str, mode: u32) -> PathBuf {
        let path = above.join(name);
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn a_directory_of_our_own_is_made_or_closed() {
        let dir = tempfile::tempdir().unwrap();
        let new = dir.path().join("a/b");
        assert_eq!(claim(&new, "objects").unwrap(), new.canonicalize().unwrap());
        assert_eq!((mode(&new), mode(&dir.path().join("a"))), (0o700, 0o700));
        let empty = made(dir.path(), "empty", 0o755);
        made(&empty, LOST_AND_FOUND, 0o700);
        claim(&empty, "objects").unwrap();
        let earlier = made(dir.path(), "earlier", 0o755);
        directory(&made(&earlier, "objects", 0o755)).unwrap();
        fs::write(earlier.join("catalogue"), "x").unwrap();
        close_file(&earlier.join("catalogue")).unwrap();
        fs::set_permissions(earlier.join("catalogue"), Permissions::from_mode(0o644)).unwrap();
        claim(&earlier, "objects").unwrap();
        close_files(&earlier).unwrap();
        let modes = [&empty, &earlier, &earlier.join("objects"), &earlier.join("catalogue")].map(|path| mode(path));
        assert_eq!(modes, [0o700, 0o700, 0o700, 0o600]);
    }

    #[test]
    fn a_directory_that_others_own_or_write_or_use_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        for open in [0o775, 0o777, 0o1777, 0o707] {
            let path = made(dir.path(), &format!("{open:o}"), open);
            let refused = claim(&path, "objects").unwrap_err();
            assert!(matches!(refused, Refusal::Writable(found) if found == open), "{refused}");
            assert_eq!(mode(&path), open);
        }
        let system = made(dir.path(), "var", 0o755);
        fs::write(system.join("precious"), "x").unwrap();
        assert!(matches!(claim(&system, "objects"), Err(Refusal::Occupied(0o755))));
        assert_eq!(mode(&system), 0o755);
        let open = made(dir.path(), "open", 0o777);
        assert!(matches!(claim(&open.join("below"), "objects"), Err(Refusal::Replaceable { mode: 0o777, .. })));
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let foreign = made(dir.path(), "foreign", 0o700);
        chown(&foreign, Some(65534), None).unwrap();
        assert!(matches!(claim(&foreign, "objects"), Err(Refusal::Foreign(65534))));
        assert!(matches!(directory(&foreign), Err(Refusal::Foreign(65534))));
        assert!(matches!(claim(&foreign.join("below"), "objects"), Err(Refusal::Replaceable { uid: 65534, .. })));
    }

    #[test]
    fn a_replaced_file_is_its_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(path.with_extension("tmp"), "left by a crash, and open to all").unwrap();
        replace(&path, b"new").unwrap();
        assert_eq!((fs::read(&path).unwrap().as_slice(), mode(&path)), (&b"new"[..], 0o600));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
