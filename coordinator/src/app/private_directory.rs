//! Directories that are the coordinator's alone: its database, uploads, and what registries sent.
//!
//! They hold what private images are made of, and tokens' digests. So they are made with mode 0700, and a directory that is there is
//! used only if nobody else can have put anything into it: another user's, or one that others may write to, is refused; one that
//! others may only read is closed. The process's umask ([`keep_to_ourselves`]) sees to the files in them.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, umask};
use nix::unistd::Uid;

/// A directory that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PrivateError {
    /// It cannot be made or looked at.
    #[error("cannot create directory {}: {source}; create it or choose another one", path.display())]
    Unusable {
        /// The directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Another user's.
    #[error("directory {} belongs to user {owner}, and this coordinator runs as user {own}: chown it, or choose another one", path.display())]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who we are.
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
}

/// From now on, what this process makes is its user's alone unless it says otherwise. To be called before there are threads.
pub fn keep_to_ourselves() {
    umask(Mode::from_bits_truncate(0o077));
}

/// Makes a directory, or checks the one that is there.
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
    Ok(())
}

/// Makes a directory that others look into (the store, the socket's), and those above it, whatever the umask.
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
        fs::write(dir.path().join("file"), b"").unwrap();
        assert!(make(&dir.path().join("file")).is_err() || !dir.path().join("file").is_dir());
        assert!(make(&dir.path().join("file/below")).is_err());
    }
}
