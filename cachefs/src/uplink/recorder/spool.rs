//! Files of traces that wait for the coordinator.

use std::path::{Path, PathBuf};

/// The traces in a spool, oldest first.
pub(super) fn waiting(spool: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(spool).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "trace"));
    paths.sort_unstable();
    paths
}
