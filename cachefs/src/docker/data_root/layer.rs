//! One shared layer as dockerd expects it: a directory of the graph driver and an entry of the layer database.
//!
//! ```text
//! overlay2/<cache-id>/diff        link to MOUNT/trees/<hex of the chainID>: the merged tree of the layer and all below it
//!                     layers      diffIDs of that tree, base first, one a line: for the mount's daemon, see `lease::roots`
//!                     link        <short>: 26 letters and digits
//!                     committed   empty: dockerd mounts the layer read-only
//! overlay2/l/<short>              link to ../<cache-id>/diff
//! image/overlay2/layerdb/sha256/<chainID>/{cache-id,diff,size,tar-split.json.gz}, and parent (not for a base layer)
//! ```
//!
//! There is no `lower`: dockerd takes the layer for a base and gives its containers one lower directory, however many
//! layers the image has. The layer database still says what lies below, so that images share layers as ever. `docker
//! save` and push read a layer's files by the names in its tar-split, and the merged tree has them all.
//!
//! Our cache-id is the chainID in hex. dockerd draws random ones, so ours can be told from them. Nothing refers to a
//! graph driver directory before the layer database does. So the directory is written in place, and the entry of the
//! layer database is renamed into place.

use std::path::{Path, PathBuf};

use store::Digest;
use store::layer::{InodeIndex, LayerIndex};
use store::reader::Store;

use super::desired::{DesiredLayer, DesiredState};
use super::error::{Error, Result};
use super::root::Root;
use crate::docker::files;
use crate::docker::short_name::{SHORT_LEN, short_name};
use crate::docker::tar_split;
use crate::mount::mountpoint;
use crate::uplink::lease::roots;

/// The cache-id of a layer that we add.
pub(super) fn cache_id(chain: &Digest) -> String {
    chain.hex()
}

/// The name of the short link to a directory of ours: the present one, or a free one.
fn short_link(root: &Root, cache_id: &str) -> Result<String> {
    let present = files::read_text(&root.overlay_layer(cache_id).join("link"))?;
    let fits = |name: &String| name.len() == SHORT_LEN && name.bytes().all(|b| b.is_ascii_alphanumeric());
    if let Some(name) = present.filter(fits) {
        return Ok(name);
    }
    let goal = link_goal(cache_id);
    let is_free = |name: &String| match std::fs::read_link(root.links().join(name)) {
        Ok(there) => there == goal,
        Err(e) => e.kind() == std::io::ErrorKind::NotFound,
    };
    let damaged = || Error::Damaged { path: root.links(), why: "no short name is free".into() };
    (0..100).map(|attempt| short_name(cache_id, attempt)).find(is_free).ok_or_else(damaged)
}

fn link_goal(cache_id: &str) -> PathBuf {
    Path::new("..").join(cache_id).join("diff")
}

/// Creates or repairs the graph driver's directory of a layer.
pub(super) fn ensure_overlay(root: &Root, mount: &Path, chain: &Digest, wanted: &DesiredState) -> Result<()> {
    let id = cache_id(chain);
    let dir = root.overlay_layer(&id);
    let short = short_link(root, &id)?;
    files::make_dir(&dir, 0o710)?;
    // The list first: the mount's daemon reads it beside any link, and holds the layers in the store.
    files::ensure_file(&dir.join(roots::LAYERS), roots::list(&wanted.diff_ids(chain)).as_bytes(), 0o644)?;
    files::ensure_link(&dir.join("diff"), &mountpoint::tree(mount, chain))?;
    files::ensure_link(&root.links().join(&short), &link_goal(&id))?;
    files::ensure_file(&dir.join("link"), short.as_bytes(), 0o644)?;
    Ok(files::ensure_file(&dir.join("committed"), b"", 0o600)?)
}

/// Whether the graph driver's directory of a layer of ours is complete and links into `mount`.
pub(super) fn is_intact(root: &Root, mount: &Path, chain: &Digest) -> bool {
    let id = cache_id(chain);
    let dir = root.overlay_layer(&id);
    let leads = std::fs::read_link(dir.join("diff")).is_ok_and(|there| there == mountpoint::tree(mount, chain));
    let short = std::fs::read_to_string(dir.join("link")).unwrap_or_default();
    let linked = std::fs::read_link(root.links().join(&short)).is_ok_and(|there| there == link_goal(&id));
    leads && linked && dir.join("committed").is_file() && dir.join(roots::LAYERS).is_file()
}

/// Writes a layer's database entry under the staging directory.
pub(super) fn stage_entry(root: &Root, store: &Store, chain: &Digest, layer: &DesiredLayer) -> Result<()> {
    let index = store.index(&layer.diff_id)?;
    let dir = root.staging().join(chain.hex());
    files::forget_tree(&dir)?;
    files::make_dir(&dir, 0o700)?;
    files::ensure_file(&dir.join("cache-id"), cache_id(chain).as_bytes(), 0o644)?;
    files::ensure_file(&dir.join("diff"), layer.diff_id.to_string().as_bytes(), 0o644)?;
    files::ensure_file(&dir.join("size"), size(&index)?.to_string().as_bytes(), 0o644)?;
    if let Some(parent) = layer.parent {
        files::ensure_file(&dir.join("parent"), parent.to_string().as_bytes(), 0o644)?;
    }
    Ok(tar_split::create(store, &index, &dir.join("tar-split.json.gz"))?)
}

/// Renames a staged entry into place. Whatever has the name already is removed: it is no entry that dockerd could read.
pub(super) fn publish_entry(root: &Root, chain: &Digest) -> Result<()> {
    let entry = root.layer_entry(chain);
    files::forget_tree(&entry)?;
    std::fs::rename(root.staging().join(chain.hex()), &entry).map_err(|e| Error::io("write", &entry, e))
}

/// A layer's size as dockerd counts it, bytes: files and symbolic links, each inode once, without directories.
fn size(index: &LayerIndex) -> Result<u64> {
    let mut size = 0;
    for number in 0..index.inode_count() {
        let inode = index.inode(InodeIndex(number))?;
        if inode.nlink > 0 && (inode.is_file() || inode.is_symlink()) {
            size += inode.size;
        }
    }
    Ok(size)
}

/// Removes a layer of ours. The entry is first renamed as dockerd itself renames a layer that is being removed, so that
/// dockerd cleans up after a crash.
pub(super) fn remove(root: &Root, chain: &Digest) -> Result<()> {
    let entry = root.layer_entry(chain);
    let removing = entry.with_file_name(format!("{}-cachefs-removing", chain.hex()));
    files::forget_tree(&removing)?;
    std::fs::rename(&entry, &removing).map_err(|e| Error::io("remove", &entry, e))?;
    remove_overlay(root, chain)?;
    Ok(files::forget_tree(&removing)?)
}

/// Removes the graph driver's directory of a layer of ours, if there is one.
pub(super) fn remove_overlay(root: &Root, chain: &Digest) -> Result<()> {
    let dir = root.overlay_layer(&cache_id(chain));
    if let Some(short) = files::read_text(&dir.join("link"))?.filter(|short| short.len() == SHORT_LEN) {
        files::forget_file(&root.links().join(short))?;
    }
    Ok(files::forget_tree(&dir)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_the_graph_driver() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        root.make_directories().unwrap();
        let mount = Path::new("/m");
        let diff_ids = [Digest::of(b"1"), Digest::of(b"2"), Digest::of(b"3")];
        let mut wanted = DesiredState::default();
        let mut parent = None;
        for diff_id in diff_ids {
            let chain = Digest::chain(parent.as_ref(), &diff_id);
            wanted.layers.insert(chain, DesiredLayer { parent, diff_id });
            parent = Some(chain);
            for _ in 0..2 {
                ensure_overlay(&root, mount, &chain, &wanted).unwrap();
            }
            assert!(is_intact(&root, mount, &chain));
            assert!(!is_intact(&root, Path::new("/elsewhere"), &chain));
        }
        let top = parent.unwrap();
        let read = |path: &str| std::fs::read_to_string(root.overlay_layer(&top.hex()).join(path)).unwrap();
        let short = read("link");
        assert_eq!(short.len(), 26);
        assert_eq!(
            std::fs::read_link(root.links().join(&short)).unwrap(),
            Path::new("..").join(top.hex()).join("diff")
        );
        assert_eq!(read("layers"), format!("{}\n{}\n{}\n", diff_ids[0], diff_ids[1], diff_ids[2]));
        assert!(!root.overlay_layer(&top.hex()).join("lower").exists(), "one lower directory");
        let diff = root.overlay_layer(&top.hex()).join("diff");
        assert_eq!(std::fs::read_link(diff).unwrap(), Path::new("/m/trees").join(top.hex()));
        std::fs::remove_file(root.overlay_layer(&top.hex()).join("layers")).unwrap();
        assert!(!is_intact(&root, mount, &top), "its layers would not be held");
    }

    #[test]
    fn a_taken_short_name_is_not_taken_away() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        root.make_directories().unwrap();
        let first = short_name("id", 0);
        std::os::unix::fs::symlink("../other/diff", root.links().join(&first)).unwrap();
        assert_eq!(short_link(&root, "id").unwrap(), short_name("id", 1));
        assert!(first.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit()));
    }
}
