//! Modes that let hosts read what they must, even where an older coordinator's umask had made it private.
//!
//! Objects get their modes before they get their names. A new leader looks at the directories down to those named by
//! two digits, and opens everything below one that is closed to hosts. A check of the store
//! ([`Publisher::closed_to_hosts`]) looks at each object. The mode of the store's own directory is the operator's
//! choice: users who are kept out there stay out.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::durable::open_to_all;
use crate::error::{Error, Result};
use crate::publisher::Publisher;

/// How deep objects lie: `layers/<2 hex>/<diffID hex>/index`.
const DEPTH: u32 = 3;

/// Whether some users cannot read a file, or look into a directory. False if it is gone.
fn is_closed(path: &Path) -> bool {
    let wanted = |directory: bool| if directory { 0o055 } else { 0o044 };
    fs::symlink_metadata(path)
        .is_ok_and(|status| !status.is_symlink() && status.mode() & wanted(status.is_dir()) != wanted(status.is_dir()))
}

fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// Calls `found` for everything below `path` and then for `path` itself: contents before their directory.
fn walk(path: &Path, depth: u32, found: &mut dyn FnMut(&Path)) {
    if depth > 0 {
        entries(path).for_each(|entry| walk(&entry, depth - 1, found));
    }
    found(path);
}

impl Publisher {
    /// The files and directories in the store's own directory that every host reads.
    fn read_by_hosts(&self) -> [PathBuf; 6] {
        let layout = self.store.layout();
        let (superblock, copy) = (layout.superblock(), layout.superblock_copy());
        [superblock, copy, layout.catalogue(), layout.blobs(), layout.layers(), layout.packs()]
    }

    /// Opens what is closed to hosts, as far as the directories show it. What another user owns cannot be opened, and
    /// is left for a check of the store to find.
    pub(super) fn open_to_hosts(&self) -> Result<()> {
        for path in self.read_by_hosts() {
            let closed: Vec<PathBuf> = entries(&path).filter(|fan| is_closed(fan)).collect();
            // The top goes last: while it is closed, the next leader begins again after a crash in between.
            for fan in closed.iter().chain(is_closed(&path).then_some(&path)) {
                walk(fan, DEPTH, &mut |path| _ = is_closed(path).then(|| open_to_all(path)));
            }
        }
        Ok(())
    }

    /// Everything that hosts must read and some users cannot, at most `most` paths.
    pub fn closed_to_hosts(&self, most: usize) -> Vec<PathBuf> {
        let mut closed = Vec::new();
        for path in self.read_by_hosts() {
            walk(&path, DEPTH, &mut |path| {
                if closed.len() < most && is_closed(path) {
                    closed.push(path.to_owned());
                }
            });
        }
        closed
    }

    /// Opens everything that hosts read.
    pub fn open_all_to_hosts(&self) -> Result<()> {
        self.check()?;
        let mut failed: Option<Error> = None;
        for path in self.read_by_hosts() {
            walk(&path, DEPTH, &mut |path| {
                if is_closed(path)
                    && let Err(error) = open_to_all(path)
                {
                    failed = Some(error);
                }
            });
        }
        failed.map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::publisher::tests::{new_store, stage};

    fn close(path: &Path) {
        let mode = if path.is_dir() { 0o700 } else { 0o600 };
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_store_that_an_umask_had_closed_is_opened_by_the_next_leader() {
        let (dir, publisher) = new_store();
        let (staging, diff_id, pack) = stage(&publisher, b"hello");
        close(&staging.index());
        close(&staging.pack());
        publisher.publish_layer(staging, &diff_id, Some(&pack)).unwrap();
        assert_eq!(publisher.closed_to_hosts(9), Vec::<PathBuf>::new(), "published as hosts need it");
        let index = publisher.store().layout().index(&diff_id);
        close(&index);
        assert_eq!(publisher.closed_to_hosts(9), std::slice::from_ref(&index));
        publisher.open_all_to_hosts().unwrap();
        assert_eq!(publisher.closed_to_hosts(9), Vec::<PathBuf>::new());
        walk(&dir.path().join("layers"), DEPTH, &mut close);
        walk(&dir.path().join("catalogue"), 1, &mut close);
        close(&dir.path().join("cachefs-store"));
        publisher.release().unwrap();
        let next = Publisher::open(dir.path(), "next").unwrap();
        assert_eq!(next.closed_to_hosts(9), Vec::<PathBuf>::new());
        let private = |name: &str| dir.path().join(name).metadata().unwrap().mode() & 0o077;
        assert_eq!(private(&format!("trash/{:016x}", next.epoch())), 0);
    }
}
