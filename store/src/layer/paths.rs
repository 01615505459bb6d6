//! Names of inodes. An index knows the parents of directories only, so finding the path of a file walks the tree.

use std::collections::{HashMap, HashSet};

use super::{InodeIndex, LayerIndex, ROOT, S_IFDIR};
use crate::error::Result;

impl LayerIndex {
    /// One path for each of the `wanted` files, below the root and without a leading slash. Walks the tree once, until
    /// all are found; a file without a name is not in the result.
    pub fn paths(&self, mut wanted: HashSet<InodeIndex>) -> Result<HashMap<InodeIndex, Vec<u8>>> {
        let mut found = HashMap::with_capacity(wanted.len());
        let mut directories = vec![(ROOT, Vec::new())];
        while let Some((directory, prefix)) = directories.pop() {
            if wanted.is_empty() {
                break;
            }
            let directory = self.inode(directory)?;
            for entry in self.entries(&directory, 0) {
                let entry = entry?;
                let is_directory = entry.file_type == S_IFDIR;
                if !is_directory && !wanted.remove(&entry.inode) {
                    continue;
                }
                let separator: &[u8] = if prefix.is_empty() { b"" } else { b"/" };
                let path = [prefix.as_slice(), separator, &*entry.name].concat();
                if is_directory { directories.push((entry.inode, path)) } else { _ = found.insert(entry.inode, path) }
            }
        }
        Ok(found)
    }
}
