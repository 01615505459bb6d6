//! Directories that only the coordinator may access: its database, uploads, and layers as registries sent them.
//!
//! They hold the content of private images, and tokens' digests. So they are created with mode 0700, and an existing directory is
//! used only if nobody else can have put anything into it. A directory of another user, or one that others may write to, is
//! refused, and so is one that others could replace; one that others may only read is closed. The process's umask ([`keep_to_ourselves`]) protects the files in them.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use coordinator_api::replaceable::{OpenAncestor, open_ancestor};
use nix::sys::stat::{Mode, umask};
use nix::unistd::Uid;

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PrivateError {
    /// It cannot be created or examined.
    #[error("cannot create directory {}: {source}; create it or choose another one", path.display())]
    Unusable {
        /// The directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// It belongs to another user.
    #[error("directory {} belongs to user {owner}, and this coordinator runs as user {own}: chown it, or choose another one", path.display())]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// The user that owns it.
        owner: u32,
        /// The user that this process runs as.
        own: u32,
    },
    /// Others may write to it.
    #[error("others may write to directory {} (mode {mode:o}), so what is in it cannot be trusted: look at it, then chmod 700 it, or choose another one", path.display())]
    Writable {
        /// The directory.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Somebody else could put another directory in its place.
    #[error("directory {} lies in {}, which user {owner} may change (mode {mode:o}): choose a directory that only root can replace", path.display(), above.display())]
    Replaceable {
        /// The directory.
        path: PathBuf,
        /// The directory above it.
        above: PathBuf,
        /// Who owns that one.
        owner: u32,
        /// Its permissions.
        mode: u32,
    },
}

/// Sets the umask so that files of this process are private to its user unless opened explicitly. Must be called before there are
/// threads.
pub fn keep_to_ourselves() {
    umask(Mode::from_bits_truncate(0o077));
}

/// Creates a directory, or checks an existing one.
pub fn make(path: &Path) -> Result<(), PrivateError> {
    let unusable = |source| PrivateError::Unusable { path: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        make_public(parent).map_err(unusable)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(unusable(error)),
        _ => {}
    }
    let status = fs::metadata(path).map_err(unusable)?;
    let (own, mode) = (Uid::effective().as_raw(), status.mode() & 0o7777);
    if status.uid() != own {
        return Err(PrivateError::Foreign { path: path.to_owned(), owner: status.uid(), own });
    }
    if mode & 0o022 != 0 {
        return Err(PrivateError::Writable { path: path.to_owned(), mode });
    }
    if mode & 0o077 != 0 {
        tracing::info!("directory {} was open to others (mode {mode:o}): closed", path.display());
        fs::set_permissions(path, Permissions::from_mode(0o700)).map_err(unusable)?;
    }
    let open = path.canonicalize().and_then(|path| open_ancestor(&path, own)).map_err(unusable)?;
    open.map_or(Ok(()), |OpenAncestor { path: above, uid: owner, mode }| {
        Err(PrivateError::Replaceable { path: path.to_owned(), above, owner, mode })
    })
}

/// Creates a directory that others may read (the store, the socket's) and its parents, whatever the umask.
pub fn make_public(path: &Path) -> io::Result<()> {
    if path.as_os_str().is_empty() || path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        make_public(parent)?;
    }
    match fs::create_dir(path) {
        Ok(()) => fs::set_permissions(path, Permissions::from_mode(0o755)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        path.metadata().unwrap().mode() & 0o777
    }

    #[test]
    fn a_private_directory_is_made_closed_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("parent/state");
        make(&path).unwrap();
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o700, 0o755));
        let set = |mode| fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        set(0o755);
        make(&path).unwrap();
        assert_eq!(mode(&path), 0o700, "ours, and too open");
        for open in [0o770, 0o702, 0o1777] {
            set(open);
            assert!(make(&path).unwrap_err().to_string().contains("cannot be trusted"), "{open:o}");
        }
        set(0o700);
        if Uid::effective().is_root() {
            std::os::unix::fs::chown(&path, Some(65534), None).unwrap();
            assert!(make(&path).unwrap_err().to_string().contains("belongs to user 65534"));
        }
        let above = dir.path().join("open");
        fs::create_dir(&above).unwrap();
        for (mode, is_refused) in [(0o777, true), (0o1777, false), (0o775, false)] {
            fs::set_permissions(&above, Permissions::from_mode(mode)).unwrap();
            let made = make(&above.join("state")).map_err(|error| error.to_string());
            assert_eq!(made.is_err_and(|error| error.contains("only root can replace")), is_refused, "{mode:o}");
        }
        if Uid::effective().is_root() {
            std::os::unix::fs::chown(&above, Some(65534), None).unwrap();
            assert!(make(&above.join("state")).unwrap_err().to_string().contains("user 65534 may change"));
        }
        fs::write(dir.path().join("file"), b"").unwrap();
        assert!(make(&dir.path().join("file")).is_err() || !dir.path().join("file").is_dir());
        assert!(make(&dir.path().join("file/below")).is_err());
    }
}
