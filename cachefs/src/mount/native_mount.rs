//! Mounts native trees.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use erofs::WriteError;
use rustix::fs::CWD;
use rustix::mount::{self, FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags};
use store::Digest;

use crate::filesystem::Filesystem;
use crate::filesystem::native_tree::NativeTree;
use crate::mount::data_files::DataFiles;
use crate::source::failure::Failure;

/// Why a native tree cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its metadata cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError<Failure>),
    /// A layer's index cannot be read.
    #[error(transparent)]
    Layer(#[from] Failure),
    /// The kernel does not mount it.
    #[error("the kernel does not mount it: {0}")]
    Mount(#[from] io::Error),
}

/// Mounts the native tree of an open chain on a directory. The metadata lies in a file without a name in `directory`.
pub fn mount(
    filesystem: &Filesystem,
    data_files: &DataFiles,
    chain: &Digest,
    directory: &Path,
    path: &Path,
) -> Result<NativeTree, Error> {
    let metadata = tempfile_in(directory)?;
    let tree = filesystem.write_native_tree(chain, &metadata)?;
    let mut added = Vec::new();
    let mounted = mount_on(data_files, &tree, &metadata, path, &mut added);
    if mounted.is_err() {
        added.into_iter().for_each(|number| data_files.remove_unopened(number));
    }
    mounted.map(|()| tree)
}

/// A file without a name.
fn tempfile_in(directory: &Path) -> io::Result<File> {
    use rustix::fs::{Mode, OFlags, open};
    Ok(File::from(open(directory, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)?))
}

fn mount_on(
    data_files: &DataFiles,
    tree: &NativeTree,
    metadata: &File,
    path: &Path,
    added: &mut Vec<u64>,
) -> Result<(), Error> {
    let context = mount::fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(io::Error::from)?;
    let set = |key: &str, value: &Path| mount::fsconfig_set_string(&context, key, value).map_err(io::Error::from);
    set("source", Path::new(&format!("/proc/self/fd/{}", metadata.as_raw_fd())))?;
    for layer in &tree.devices {
        let (number, device) = data_files.add(Arc::clone(layer))?;
        added.push(number);
        set("device", &device)?;
    }
    mount::fsconfig_create(&context).map_err(io::Error::from)?;
    let flags =
        MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    let mounted = mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags).map_err(io::Error::from)?;
    let moved = mount::move_mount(&mounted, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH);
    Ok(moved.map_err(io::Error::from)?)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use nix::mount::{MntFlags, umount2};

    use super::*;
    use crate::filesystem::native_tree::tests::{contents, served, shown};
    use crate::filesystem::tests::{host, image};
    use crate::fixture::TIMEOUT;

    #[test]
    fn the_kernel_reads_a_native_tree_through_data_files() {
        let (store, cache, chain, diff_ids) = image(&contents());
        let host = host(&store, &cache);
        let expected = served(&host, &chain);
        let data_files = DataFiles::serve(Arc::clone(&host.filesystem), 2).unwrap();
        let root = tempfile::tempdir().unwrap();
        let id: Digest = format!("sha256:{}", chain.strip_prefix("chains/").unwrap()).parse().unwrap();
        let tree = mount(&host.filesystem, &data_files, &id, cache.path(), root.path()).unwrap();
        // The first reads come from a user who could not open a data file: what is checked is the tree's own permission.
        let mut cat = std::process::Command::new("setpriv");
        cat.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "cat"]).arg(root.path().join("large"));
        let read = cat.output();
        let seen = std::panic::catch_unwind(|| shown(root.path()));
        // What is open holds its layer, also when the tree is mounted nowhere any more.
        let file = File::open(root.path().join("large"));
        umount2(root.path(), MntFlags::MNT_DETACH).unwrap();
        assert_eq!(read.unwrap().stdout, expected["/large"].content);
        assert_eq!(seen.unwrap(), expected);
        assert_eq!(tree.devices.len(), 2);
        assert_eq!(data_files.in_use(), diff_ids.into_iter().collect());
        drop(file.unwrap());
        let asked = Instant::now();
        while !data_files.in_use().is_empty() {
            assert!(asked.elapsed() < TIMEOUT * 100, "what nothing uses any more is closed");
        }
    }
}
