//! Whether somebody else could put another directory in the place of one that a program keeps secrets in.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A directory above another one, in which somebody else may rename things.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenAncestor {
    /// The directory.
    pub path: PathBuf,
    /// Its owner.
    pub uid: u32,
    /// Its permissions.
    pub mode: u32,
}

/// The nearest directory above `path`, which has no links, in which others than root and the user `own` may rename things: one that
/// belongs to somebody else, or that everybody may write to without the sticky bit.
pub fn open_ancestor(path: &Path, own: u32) -> io::Result<Option<OpenAncestor>> {
    for above in path.ancestors().skip(1) {
        let meta = above.metadata()?;
        let (uid, mode) = (meta.uid(), meta.mode() & 0o7777);
        let is_open = mode & 0o002 != 0 && mode & 0o1000 == 0;
        if is_open || (uid != 0 && uid != own) {
            return Ok(Some(OpenAncestor { path: above.to_owned(), uid, mode }));
        }
    }
    Ok(None)
}
