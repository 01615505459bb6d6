//! Directories of engines with links into the mount: an engine may start a container from any of their images at any time.
//!
//! `cachefs data-root`, `cachefs image-store` and `cachefs snapshotter` write the root's path into the cache directory of the mount; the daemon then
//! reads the links themselves, which always tell the truth. Beside a link to the tree of a chain lies a file with the layers
//! of that tree, because the catalogue forgets a chain with its image. A link to a layer, as people make them by hand and
//! as data-roots of the first version have them, names it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use store::Digest;

use crate::os::pool::{Pools, Priority};
use crate::os::private_files;
use crate::source::layer_name::LayerName;

/// The file in the cache directory: one path a line.
const FILE: &str = "data-roots";
/// Where links are in a root.
#[derive(Debug, Clone, Copy)]
struct Layout {
    /// The directory of directories.
    directory: &'static str,
    /// The link's name in each.
    link: &'static str,
    /// Where the directory of a chain is found by the chain's name.
    by_chain: Option<&'static str>,
}

/// Where an image store has its links to layers by chain.
pub const CHAINS: &str = "chains";

/// dockerd's, that of an image store, and the snapshotter's.
const LAYOUTS: [Layout; 3] = [
    Layout { directory: "overlay2", link: "diff", by_chain: Some("overlay2") },
    Layout { directory: "overlay", link: "diff", by_chain: Some(CHAINS) },
    Layout { directory: "snapshots", link: "fs", by_chain: None },
];
/// Held while the file is changed.
const LOCK: &str = "data-roots.lock";
/// The file beside a link to a chain's tree, see [`list`].
pub const LAYERS: &str = "layers";
/// A directory that changed longer ago than this is complete: links are made right after their directories.
const SETTLED: Duration = Duration::from_secs(10);

fn read(cache: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string(cache.join(FILE)).unwrap_or_default();
    text.lines().filter(|line| !line.is_empty()).map(PathBuf::from).collect()
}

/// The text of a list of layers: diffIDs, base first, one a line.
pub fn list(diff_ids: &[Digest]) -> String {
    diff_ids.iter().map(|diff_id| format!("{diff_id}\n")).collect()
}

/// The directory of links in a root, and what is known about it.
fn layout(root: &Path) -> Option<(PathBuf, Layout)> {
    let found = LAYOUTS.iter().map(|layout| (root.join(layout.directory), *layout));
    found.into_iter().find(|(directory, _)| directory.is_dir())
}

/// Notes that the root `root` has links into the mount whose cache directory is `cache`.
pub fn register(cache: &Path, root: &Path) -> io::Result<()> {
    if read(cache).iter().any(|known| known == root) {
        return Ok(());
    }
    let Some(text) = root.to_str().filter(|text| !text.contains('\n')) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "its path is no line of text"));
    };
    // A root that is not there now may come back with its disk, so none is forgotten.
    change(cache, |roots| {
        if !roots.iter().any(|known| known == root) {
            roots.push(PathBuf::from(text));
        }
    })
}

/// Notes that the root `root` has no links into the mount any more.
pub fn unregister(cache: &Path, root: &Path) -> io::Result<()> {
    change(cache, |roots| roots.retain(|known| known != root))
}

/// Changes the list of roots. Several engines may do so at once.
fn change(cache: &Path, edit: impl FnOnce(&mut Vec<PathBuf>)) -> io::Result<()> {
    let lock = File::options().create(true).truncate(false).write(true).mode(0o600).open(cache.join(LOCK))?;
    lock.lock()?;
    let before = read(cache);
    let mut roots = before.clone();
    edit(&mut roots);
    if roots == before {
        return Ok(());
    }
    let lines: String = roots.iter().filter_map(|root| Some(format!("{}\n", root.to_str()?))).collect();
    private_files::replace(&cache.join(FILE), lines.as_bytes())
}

/// Chains that engines have links to, whether or not the catalogue still has them.
pub struct LinkedChains {
    cache: PathBuf,
    pools: Pools,
}

impl LinkedChains {
    /// The chains of the roots that are noted in `cache`; they are looked for on `pools`.
    pub fn new(cache: &Path, pools: Pools) -> LinkedChains {
        LinkedChains { cache: cache.to_owned(), pools }
    }

    /// Calls `done` with the diffIDs of a chain, base first, or with nothing if no link leads to it.
    pub fn find(self: &Arc<Self>, chain: Digest, done: impl FnOnce(Option<Vec<Digest>>) + Send + 'static) {
        let this = Arc::clone(self);
        self.pools.local.submit(Priority::Demand, move || done(this.layers(&chain)));
    }

    /// The same at once. Reads the local disk.
    pub fn layers(&self, chain: &Digest) -> Option<Vec<Digest>> {
        read(&self.cache).iter().find_map(|root| {
            let (directory, layout) = layout(root)?;
            if let Some(by_chain) = layout.by_chain {
                return whole(&read_layers(&root.join(by_chain).join(chain.hex())).ok()?, chain);
            }
            let entries = fs::read_dir(directory).ok()?.flatten();
            entries.into_iter().find_map(|entry| whole(&read_layers(&entry.path()).ok()?, chain))
        })
    }
}

/// The layers up to the one that completes the chain, if there is one. The names say so themselves.
fn whole(layers: &[Digest], chain: &Digest) -> Option<Vec<Digest>> {
    let mut above = None;
    let last = layers.iter().position(|layer| {
        above = Some(Digest::chain(above.as_ref(), layer));
        above.as_ref() == Some(chain)
    })?;
    Some(layers[..=last].to_vec())
}

fn read_layers(directory: &Path) -> io::Result<Vec<Digest>> {
    let list = fs::read_to_string(directory.join(LAYERS))?;
    Ok(list.lines().filter_map(|line| line.parse().ok()).collect())
}

/// What was last seen of one root.
#[derive(Debug)]
struct Seen {
    changed: SystemTime,
    layers: BTreeSet<Digest>,
}

/// Reads roots again and again; one that has not changed costs one `stat`.
#[derive(Debug, Default)]
pub struct Roots {
    seen: BTreeMap<PathBuf, Seen>,
}

impl Roots {
    /// The layers that the roots noted in `cache` have links to, in the mount at `mountpoint`.
    pub fn layers(&mut self, cache: &Path, mountpoint: &Path, now: SystemTime) -> BTreeSet<Digest> {
        let mut all = BTreeSet::new();
        let mut seen = BTreeMap::new();
        for root in read(cache) {
            let before = self.seen.remove(&root);
            let Some((directory, layout)) = layout(&root) else { continue };
            let Ok(changed) = fs::metadata(&directory).and_then(|meta| meta.modified()) else { continue };
            let settled = now.duration_since(changed).is_ok_and(|age| age > SETTLED);
            let known = before.as_ref().is_some_and(|seen| settled && seen.changed == changed);
            let entry = match before {
                Some(seen) if known => seen,
                before => match linked(&directory, layout.link, mountpoint) {
                    // A directory that is read before it has settled is read again.
                    Ok(layers) => Seen { changed: if settled { changed } else { SystemTime::UNIX_EPOCH }, layers },
                    Err(error) => {
                        tracing::warn!("the links in {} cannot be read now: {error}", directory.display());
                        let layers = before.map(|seen| seen.layers).unwrap_or_default();
                        Seen { changed: SystemTime::UNIX_EPOCH, layers }
                    }
                },
            };
            all.extend(&entry.layers);
            seen.insert(root, entry);
        }
        self.seen = seen;
        all
    }
}

/// The layers that the links called `link` in the directories of `directory` need from the mount.
fn linked(directory: &Path, link: &str, mountpoint: &Path) -> io::Result<BTreeSet<Digest>> {
    let mut all = BTreeSet::new();
    for entry in fs::read_dir(directory)? {
        all.extend(needed(&entry?.path(), link, mountpoint)?);
    }
    Ok(all)
}

/// What one directory needs: the layers of its list, wherever its link leads, or the layer that its link names.
fn needed(directory: &Path, link: &str, mountpoint: &Path) -> io::Result<Vec<Digest>> {
    let absent = |error: &io::Error| matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory);
    match read_layers(directory) {
        Err(error) if absent(&error) => {}
        listed => return listed,
    }
    let target = match fs::read_link(directory.join(link)) {
        // An engine's own layer is a directory.
        Err(error) if absent(&error) || error.kind() == io::ErrorKind::InvalidInput => return Ok(Vec::new()),
        target => target?,
    };
    let name: Option<LayerName> =
        target.strip_prefix(mountpoint.join("layers")).ok().and_then(|name| name.to_str()?.parse().ok());
    Ok(name.into_iter().map(|name| name.diff_id).collect())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_into_the_mount_are_found_and_others_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let (cache, root, mount) = (directory.path().join("c"), directory.path().join("d"), directory.path().join("m"));
        fs::create_dir_all(&cache).unwrap();
        let add = |name: &str, target: &Path| {
            fs::create_dir_all(root.join("overlay2").join(name)).unwrap();
            symlink(target, root.join("overlay2").join(name).join("diff")).unwrap();
        };
        let (one, two) = (Digest::of(b"1"), Digest::of(b"2"));
        add("a", &mount.join("layers").join(one.hex()));
        add("b", &Path::new("/elsewhere/layers").join(two.hex()));
        fs::create_dir_all(root.join("overlay2/local/diff")).unwrap();
        let mut roots = Roots::default();
        let mut layers = |later: u64| roots.layers(&cache, &mount, SystemTime::now() + Duration::from_secs(later));
        assert_eq!(layers(0), BTreeSet::new(), "not registered");
        for _ in 0..2 {
            register(&cache, &root).unwrap();
        }
        assert_eq!(fs::read_to_string(cache.join(FILE)).unwrap(), format!("{}\n", root.display()));
        assert_eq!(layers(0), BTreeSet::from([one]));
        add("c", &mount.join("layers").join(format!("{}-1", two.hex())));
        for later in [0, 60, 60] {
            assert_eq!(layers(later), BTreeSet::from([one, two]));
        }
        // The snapshotter's, with the tree of a chain.
        let (snapshots, three) = (directory.path().join("s"), Digest::of(b"3"));
        fs::create_dir_all(snapshots.join("snapshots/1")).unwrap();
        register(&cache, &snapshots).unwrap();
        fs::write(snapshots.join("snapshots/1/layers"), format!("{three}\n{one}\n")).unwrap();
        assert_eq!(layers(0), BTreeSet::from([one, two, three]), "wherever its link will lead");
        // dockerd's, with the tree of a chain in the directory of the chain's name.
        let docker = Digest::chain(Some(&one), &two);
        add(&docker.hex(), &mount.join("chains").join(docker.hex()));
        fs::write(root.join("overlay2").join(docker.hex()).join(LAYERS), list(&[one, two])).unwrap();
        let chains = LinkedChains::new(&cache, Pools::new(1, 1));
        let (base, whole) = (Digest::chain(None, &three), Digest::chain(Some(&Digest::chain(None, &three)), &one));
        assert_eq!(chains.layers(&whole), Some(vec![three, one]));
        assert_eq!(chains.layers(&base), Some(vec![three]));
        assert_eq!(chains.layers(&docker), Some(vec![one, two]));
        assert_eq!(chains.layers(&two), None);
        fs::remove_dir_all(&snapshots).unwrap();
        for name in ["a", &docker.hex()] {
            fs::remove_dir_all(root.join("overlay2").join(name)).unwrap();
        }
        assert_eq!(layers(60), BTreeSet::from([two]), "a change is seen");
        unregister(&cache, &root).unwrap();
        assert_eq!(layers(60), BTreeSet::new());
        assert_eq!(fs::read_to_string(cache.join(FILE)).unwrap(), format!("{}\n", snapshots.display()));
    }
}
