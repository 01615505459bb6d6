//! The directory of an image store.
//!
//! ```text
//! overlay/<chain>/diff                    link to MOUNT/chains/<chain>: the merged tree, so that there is no `lower`
//!                 layers                  diffIDs of that tree, for the mount's daemon, see `lease::roots`
//!                 link                    <short>; written last: a directory without it is not complete
//! overlay/l/<short>                       link to ../<chain>/diff
//! overlay-layers/<chain>.tar-split.gz     what gives back the layer's tar byte for byte
//! overlay-layers/layers.json, layers.lock
//! overlay-images/<config>/<data>          manifests, indexes and config
//! overlay-images/images.json, images.lock
//! ```
//!
//! `<chain>` and `<config>` are the hex digits of a chainID and of a config's digest. What the lists name is written before
//! them, layers before images; what they no longer name is removed after them, the other way round. A list is replaced in one
//! step, under its lock, and the lock's content is changed then: that is how long-lived engines notice.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use serde::Serialize;
use serde_json::Value;
use store::Digest;
use store::reader::Store;

use super::contents::{Contents, Image};
use super::documents::{ImageEntry, LayerEntry, data_file};
use super::error::Error;
use crate::docker::files::{self, FileError};
use crate::docker::short_name::short_name;
use crate::docker::tar_split;
use crate::uplink::lease::roots;

/// The directory of images: it shows that a directory is an image store.
pub(super) const IMAGES: &str = "overlay-images";
const LAYERS: &str = "overlay-layers";
/// Threads that write tar-splits. There may be more of them than processors: they wait for the shared disk.
const THREADS: usize = 8;
/// How long a list's readers may keep us waiting. They hold the lock for as long as they read.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

type Result<T, E = Error> = std::result::Result<T, E>;

/// How much has come or gone.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Changes {
    pub(super) images: usize,
    pub(super) layers: usize,
}

/// An image store's directory.
#[derive(Debug)]
pub(super) struct Tree {
    root: PathBuf,
    mountpoint: PathBuf,
    /// Keeps other processes of this program out.
    _lock: File,
}

impl Tree {
    /// Takes a directory that this process may write to.
    pub(super) fn open(root: &Path, mountpoint: &Path) -> Result<Tree> {
        let lock = File::open(root).map_err(|e| FileError::io("open", root, e))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::Kept(root.into())),
            Err(TryLockError::Error(e)) => return Err(FileError::io("lock", root, e).into()),
        }
        let tree = Tree { root: root.to_owned(), mountpoint: mountpoint.to_owned(), _lock: lock };
        for directory in [tree.overlay().join("l"), tree.of_layers(), tree.of_images()] {
            files::make_dir(&directory, 0o700)?;
        }
        // Engines refuse a store without its locks and lists.
        for (directory, list) in [(tree.of_layers(), "layers"), (tree.of_images(), "images")] {
            for (name, content) in [(format!("{list}.lock"), &b""[..]), (format!("{list}.json"), b"[]")] {
                let path = directory.join(name);
                if !path.exists() {
                    files::replace(&path, content, 0o600)?;
                }
            }
        }
        Ok(tree)
    }

    fn overlay(&self) -> PathBuf {
        self.root.join("overlay")
    }

    fn of_layers(&self) -> PathBuf {
        self.root.join(LAYERS)
    }

    fn of_images(&self) -> PathBuf {
        self.root.join(IMAGES)
    }

    fn tar_split(&self, chain: &Digest) -> PathBuf {
        self.of_layers().join(format!("{}.tar-split.gz", chain.hex()))
    }

    /// Brings the directory in line with what the store wants there.
    pub(super) fn update(&self, store: &Store, mut contents: Contents, graph_root: &Path) -> Result<Changes> {
        let before = self.present()?;
        self.write_layers(store, &mut contents)?;
        let images = self.write_images(store, &contents)?;
        files::sync_all(&self.root)?;
        let layers: Vec<LayerEntry> = contents
            .layers
            .iter()
            .map(|(chain, layer)| LayerEntry {
                id: chain.hex(),
                parent: layer.parent.map(|parent| parent.hex()),
                diff_digest: layer.diff_id,
                diff_size: layer.size,
                blob: layer.blob.clone(),
            })
            .collect();
        let failed = |e: serde_json::Error| FileError::io("write", &self.of_layers(), e.into());
        let mut wanted = layers.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>().map_err(failed)?;
        let gone: Vec<Value> = self.listed_layers().into_iter().filter(|layer| !is_wanted(&contents, layer)).collect();
        let used = used(graph_root)?;
        let kept = self.kept(&gone, &used)?;
        // Whoever reads the lists one after the other finds the layers of every image: new ones come first, old ones go last.
        replace_list(&self.of_layers(), "layers", &[&wanted[..], &gone].concat())?;
        replace_list(&self.of_images(), "images", &images)?;
        wanted.extend(gone.into_iter().filter(|layer| id(layer).is_some_and(|id| kept.contains(&id))));
        replace_list(&self.of_layers(), "layers", &wanted)?;
        self.remove_others(&contents, &kept, &used)?;
        let after = self.present()?;
        let differ = |a: &BTreeSet<Digest>, b: &BTreeSet<Digest>| a.symmetric_difference(b).count();
        Ok(Changes { images: differ(&before.0, &after.0), layers: differ(&before.1, &after.1) })
    }

    /// The list of layers as it is. One that cannot be read is none: it is written anew.
    fn listed_layers(&self) -> Vec<Value> {
        let text = std::fs::read(self.of_layers().join("layers.json")).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// The images and the layers that have directories.
    fn present(&self) -> Result<(BTreeSet<Digest>, BTreeSet<Digest>)> {
        let digests = |directory: &Path| -> Result<BTreeSet<Digest>> {
            Ok(files::names(directory)?.iter().filter_map(|name| Digest::from_hex(name)).collect())
        };
        Ok((digests(&self.of_images())?, digests(&self.overlay())?))
    }

    /// Writes what layers lack. Those that cannot be read are left out, with their images.
    fn write_layers(&self, store: &Store, contents: &mut Contents) -> Result<()> {
        let lacking: Vec<Digest> =
            contents.layers.keys().filter(|chain| !self.tar_split(chain).exists()).copied().collect();
        let mut failed = BTreeSet::new();
        for (chain, written) in lacking.iter().zip(self.write_tar_splits(store, contents, &lacking)) {
            match written {
                Ok(()) => {}
                Err(Error::Store(error)) => {
                    tracing::warn!(
                        "layer {} and the images on it are left out: {error}",
                        contents.layers[chain].diff_id
                    );
                    failed.insert(*chain);
                }
                Err(error) => return Err(error),
            }
        }
        contents.leave_out(&failed);
        contents.layers.keys().try_for_each(|chain| self.write_layer(contents, chain))
    }

    /// Writes tar-splits, in parallel; returns the result of each.
    fn write_tar_splits(&self, store: &Store, contents: &Contents, chains: &[Digest]) -> Vec<Result<()>> {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            while let Some(position) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|next| *next < chains.len()) {
                let chain = &chains[position];
                done.push((position, self.write_tar_split(store, &contents.layers[chain].diff_id, chain)));
            }
            done
        };
        let mut results: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS.min(chains.len())).map(|_| scope.spawn(work)).collect();
            threads.into_iter().filter_map(|thread| thread.join().ok()).flatten().collect()
        });
        results.sort_by_key(|(position, _)| *position);
        results.into_iter().map(|(_, result)| result).collect()
    }

    fn write_tar_split(&self, store: &Store, diff_id: &Digest, chain: &Digest) -> Result<()> {
        let path = self.tar_split(chain);
        let partial = path.with_extension("partial");
        let written = tar_split::create(store, &store.index(diff_id)?, &partial);
        match written {
            Err(tar_split::TarSplitError::Store(error)) => {
                files::forget_file(&partial)?;
                Err(error.into())
            }
            Err(tar_split::TarSplitError::File(error)) => Err(error.into()),
            Ok(()) => Ok(std::fs::rename(&partial, &path).map_err(|e| FileError::io("write", &path, e))?),
        }
    }

    fn write_layer(&self, contents: &Contents, chain: &Digest) -> Result<()> {
        let id = chain.hex();
        let directory = self.overlay().join(&id);
        files::make_dir(&directory, 0o700)?;
        files::ensure_link(&directory.join("diff"), &self.mountpoint.join("chains").join(&id))?;
        if directory.join("link").exists() {
            return Ok(());
        }
        let list = roots::list(&contents.diff_ids(chain));
        files::ensure_file(&directory.join(roots::LAYERS), list.as_bytes(), 0o600)?;
        let goal = Path::new("..").join(&id).join("diff");
        let links = self.overlay().join("l");
        // 130 random bits: a name that is taken is another layer's only in theory.
        let is_free = |name: &String| std::fs::read_link(links.join(name)).map_or(true, |there| there == goal);
        let short = (0..100).map(|attempt| short_name(&id, attempt)).find(is_free).unwrap_or_default();
        files::ensure_link(&links.join(&short), &goal)?;
        Ok(files::ensure_file(&directory.join("link"), short.as_bytes(), 0o600)?)
    }

    /// Writes the documents of images and returns the list of them.
    fn write_images(&self, store: &Store, contents: &Contents) -> Result<Vec<ImageEntry>> {
        let mut entries = Vec::new();
        for (config, image) in &contents.images {
            match documents(store, config, image) {
                Ok(documents) => entries.push(self.write_image(config, image, &documents)?),
                Err(error) => tracing::warn!("image {} is left out: {error}", config.hex()),
            }
        }
        Ok(entries)
    }

    fn write_image(&self, config: &Digest, image: &Image, documents: &[(String, Vec<u8>)]) -> Result<ImageEntry> {
        let directory = self.of_images().join(config.hex());
        files::make_dir(&directory, 0o700)?;
        for (name, bytes) in documents {
            files::ensure_file(&directory.join(data_file(name)), bytes, 0o600)?;
        }
        let created = documents.last().and_then(|(_, config)| created(config));
        Ok(ImageEntry {
            id: config.hex(),
            digest: image.manifest,
            names: image.names.iter().cloned().collect(),
            layer: image.top.hex(),
            metadata: "{}",
            big_data_names: documents.iter().map(|(name, _)| name.clone()).collect(),
            big_data_sizes: documents.iter().map(|(name, bytes)| (name.clone(), bytes.len())).collect(),
            big_data_digests: documents.iter().map(|(name, bytes)| (name.clone(), Digest::of(bytes))).collect(),
            created,
        })
    }

    /// The layers among `gone` that containers and images of the engine's own storage stand on, and those below them.
    fn kept(&self, gone: &[Value], used: &BTreeSet<String>) -> Result<BTreeSet<Digest>> {
        let parents: BTreeMap<Digest, Option<Digest>> = gone
            .iter()
            .filter_map(|layer| Some((id(layer)?, layer["parent"].as_str().and_then(Digest::from_hex))))
            .collect();
        let mut kept = BTreeSet::new();
        for chain in parents.keys() {
            if used.contains(&self.short(chain)?) {
                let mut at = Some(*chain);
                while let Some(chain) = at.filter(|chain| kept.insert(*chain)) {
                    at = parents.get(&chain).copied().flatten();
                }
            }
        }
        Ok(kept)
    }

    /// The name of the link to a layer; empty if there is none.
    fn short(&self, chain: &Digest) -> Result<String> {
        Ok(files::read_text(&self.overlay().join(chain.hex()).join("link"))?.unwrap_or_default())
    }

    /// Removes what the lists do not name.
    fn remove_others(&self, contents: &Contents, kept: &BTreeSet<Digest>, used: &BTreeSet<String>) -> Result<()> {
        let (images, layers) = self.present()?;
        for id in images.iter().filter(|id| !contents.images.contains_key(*id)) {
            files::forget_tree(&self.of_images().join(id.hex()))?;
        }
        for chain in layers.iter().filter(|chain| !contents.layers.contains_key(*chain) && !kept.contains(*chain)) {
            let short = self.short(chain)?;
            if used.contains(&short) {
                // Not listed, because a list was lost: what stands on it still starts.
                continue;
            }
            files::forget_file(&self.tar_split(chain))?;
            if !short.is_empty() {
                files::forget_file(&self.overlay().join("l").join(short))?;
            }
            files::forget_tree(&self.overlay().join(chain.hex()))?;
        }
        Ok(())
    }
}

/// The chainID of an element of the list of layers.
fn id(layer: &Value) -> Option<Digest> {
    Digest::from_hex(layer["id"].as_str()?)
}

fn is_wanted(contents: &Contents, layer: &Value) -> bool {
    id(layer).is_none_or(|id| contents.layers.contains_key(&id))
}

/// What an image consists of, by the library's names; the config comes last.
fn documents(store: &Store, config: &Digest, image: &Image) -> Result<Vec<(String, Vec<u8>)>, store::Error> {
    let mut documents = vec![("manifest".to_owned(), store.blob(&image.manifest)?)];
    for target in &image.targets {
        documents.push((format!("manifest-{target}"), store.blob(target)?));
    }
    documents.push((config.to_string(), store.blob(config)?));
    Ok(documents)
}

/// When an image was made, if its config says so in a form that every reader of the list can read.
fn created(config: &[u8]) -> Option<jiff::Timestamp> {
    let config: Value = serde_json::from_slice(config).ok()?;
    config["created"].as_str()?.parse().ok()
}

/// The short names of the layers below the containers and images of an engine's own storage.
fn used(graph_root: &Path) -> Result<BTreeSet<String>> {
    let overlay = graph_root.join("overlay");
    let mut used = BTreeSet::new();
    for name in files::names(&overlay)? {
        // Beside layers there are files.
        let Ok(lower) = std::fs::read_to_string(overlay.join(name).join("lower")) else { continue };
        used.extend(lower.trim().split(':').filter_map(|link| Some(link.strip_prefix("l/")?.to_owned())));
    }
    Ok(used)
}

/// Replaces a list unless it is the same, under its lock, and changes the lock's content, which tells readers.
fn replace_list<T: Serialize>(directory: &Path, name: &str, entries: &[T]) -> Result<()> {
    let path = directory.join(format!("{name}.json"));
    let bytes = serde_json::to_vec(entries).map_err(|e| FileError::io("write", &path, e.into()))?;
    if std::fs::read(&path).is_ok_and(|present| present == bytes) {
        return Ok(());
    }
    let lock_path = directory.join(format!("{name}.lock"));
    let failed = |e| FileError::io("lock", &lock_path, e);
    let mut lock = File::options().write(true).open(&lock_path).map_err(failed)?;
    let whole = nix::libc::flock { l_type: nix::libc::F_WRLCK as _, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
    let deadline = Instant::now() + LOCK_TIMEOUT;
    // The library's own locks are of this kind. A reader that hangs must not stop us: a list is replaced in one step.
    while fcntl(&lock, FcntlArg::F_OFD_SETLK(&whole)).is_err() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    files::replace(&path, &bytes, 0o600)?;
    // As long as the library's own marks, and never the same twice.
    let mark = format!("{:64}", Digest::of(format!("{:?} {}", Instant::now(), std::process::id()).as_bytes()).hex());
    Ok(lock.write_all(mark.as_bytes()).map_err(failed)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::docker::samples::{self, Part};
    use store::image::ImageRecord;
    use store::publisher::Publisher;

    struct World {
        directory: tempfile::TempDir,
        publisher: Publisher,
        tree: Tree,
        layers: [Digest; 2],
    }

    impl World {
        fn new() -> World {
            let directory = tempfile::tempdir().unwrap();
            let publisher = samples::store(&directory.path().join("store"));
            let layer = |name| samples::layer(&publisher, &[Part::Literal(b"h"), Part::File(name, name)]).0;
            let layers = [layer("a"), layer("b")];
            let root = directory.path().join("root");
            std::fs::create_dir(&root).unwrap();
            let tree = Tree::open(&root, Path::new("/m")).unwrap();
            World { directory, publisher, tree, layers }
        }

        fn update(&self) -> Changes {
            let store = self.publisher.store();
            self.tree.update(store, Contents::read(store).unwrap(), &self.graph_root()).unwrap()
        }

        fn graph_root(&self) -> PathBuf {
            self.directory.path().join("graph")
        }

        /// The ids in a list.
        fn listed(&self, list: &str) -> Vec<String> {
            let text = std::fs::read(self.tree.root.join(format!("overlay-{list}/{list}.json"))).unwrap();
            let list: Vec<Value> = serde_json::from_slice(&text).unwrap();
            list.iter().map(|entry| entry["id"].as_str().unwrap().to_owned()).collect()
        }

        fn mark(&self, list: &str) -> Vec<u8> {
            std::fs::read(self.tree.root.join(format!("overlay-{list}/{list}.lock"))).unwrap()
        }

        fn remove(&self, image: &ImageRecord) {
            samples::remove(&self.publisher, image);
        }
    }

    #[test]
    fn images_come_and_go_and_readers_are_told() {
        let world = World::new();
        let [a, b] = world.layers;
        assert_eq!(world.update(), Changes::default());
        let first = samples::image(&world.publisher, "app", &[a, b]);
        assert_eq!(world.update(), Changes { images: 1, layers: 2 });
        assert_eq!(world.listed("images"), [first.config.hex()]);
        assert_eq!(world.listed("layers").len(), 2);
        let top = Digest::chain(Some(&a), &b);
        let directory = world.tree.overlay().join(top.hex());
        assert_eq!(std::fs::read_link(directory.join("diff")).unwrap(), Path::new("/m/chains").join(top.hex()));
        assert_eq!(std::fs::read_to_string(directory.join("layers")).unwrap(), format!("{a}\n{b}\n"));
        assert!(!directory.join("lower").exists());
        let (before, mark) = (world.listed("layers"), world.mark("images"));
        assert_eq!((mark.len(), world.update()), (64, Changes::default()));
        assert_eq!((world.listed("layers"), world.mark("images")), (before, mark.clone()), "nothing to tell");
        let second = samples::image(&world.publisher, "other", &[a]);
        world.remove(&first);
        assert_eq!(world.update(), Changes { images: 2, layers: 1 });
        assert_eq!(world.listed("images"), [second.config.hex()]);
        assert_eq!(world.listed("layers"), [a.hex()]);
        assert_ne!(world.mark("images"), mark);
        let names = |path: PathBuf| files::names(&path).unwrap().len();
        assert_eq!((names(world.tree.overlay().join("l")), names(world.tree.of_layers())), (1, 3));
    }

    #[test]
    fn what_local_containers_stand_on_stays_listed_or_not() {
        let world = World::new();
        let [a, b] = world.layers;
        let image = samples::image(&world.publisher, "app", &[a, b]);
        world.update();
        let top = Digest::chain(Some(&a), &b);
        let short = world.tree.short(&top).unwrap();
        let container = world.graph_root().join("overlay/container");
        std::fs::create_dir_all(&container).unwrap();
        std::fs::write(container.join("lower"), format!("l/{short}")).unwrap();
        std::fs::write(world.graph_root().join("overlay/.has-mount-program"), "false").unwrap();
        world.remove(&image);
        assert_eq!(world.update(), Changes { images: 1, layers: 0 });
        assert_eq!((world.listed("images").len(), world.listed("layers").len()), (0, 2));
        // Damage to a list costs the images' histories, and no container.
        std::fs::write(world.tree.of_layers().join("layers.json"), "[").unwrap();
        world.update();
        assert_eq!(world.listed("layers").len(), 0);
        assert!(world.tree.overlay().join(top.hex()).join("diff").is_symlink());
        std::fs::remove_dir_all(&container).unwrap();
        assert_eq!(world.update(), Changes { images: 0, layers: 1 });
    }

    #[test]
    fn a_layer_that_the_store_lost_costs_only_its_images() {
        let world = World::new();
        let [a, b] = world.layers;
        let whole = samples::image(&world.publisher, "whole", &[a]);
        samples::image(&world.publisher, "broken", &[a, b]);
        std::fs::remove_dir_all(world.publisher.store().layout().layer(&b)).unwrap();
        assert_eq!(world.update(), Changes { images: 1, layers: 1 });
        assert_eq!(world.listed("images"), [whole.config.hex()]);
        assert!(matches!(Tree::open(&world.tree.root, Path::new("/m")), Err(Error::Kept(_))));
    }
}
