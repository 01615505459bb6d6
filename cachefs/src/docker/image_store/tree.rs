//! The directory of an image store.
//!
//! ```text
//! overlay/<id>/diff                       link to MOUNT/trees/<chain>: the merged tree, so that there is no `lower`
//!              layers                     diffIDs of that tree, for the mount's daemon, see `lease::roots`
//!              empty/                     nothing: engines mount a layer on top of it
//!              link                       <short>
//! overlay/l/<short>                       link to ../<id>/diff
//! chains/<chain>                          link to ../overlay/<id>, for the mount's daemon
//! overlay-layers/<id>.tar-split.gz        what gives back the layer's tar byte for byte
//! overlay-layers/layers.json, layers.lock
//! overlay-images/<config>/<data>          manifests, indexes and config
//! overlay-images/images.json, images.lock
//! ```
//!
//! `<id>` is the engines' own id of a layer (`contents`), `<chain>` and `<config>` are the hex digits of its chainID and of a
//! config's digest. What the lists name is written before
//! them, layers before images; what they no longer name is removed after them, the other way round. A list is replaced in one
//! step, under its lock, and the lock's content is changed then: that is how long-lived engines notice.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use serde::Serialize;
use serde_json::Value;
use store::Digest;
use store::reader::Store;

use super::contents::{Contents, Image, Layer};
use super::documents::{ImageEntry, LayerEntry, data_file};
use super::error::Error;
use super::in_use::InUse;
use crate::docker::files::{self, FileError};
use crate::docker::short_name::short_name;
use crate::docker::tar_split;
use crate::docker::workers;
use crate::mount::mountpoint;
use crate::uplink::lease::roots;

/// The directory of images: it shows that a directory is an image store.
pub(super) const IMAGES: &str = "overlay-images";
const LAYERS: &str = "overlay-layers";
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
        for directory in [tree.overlay().join("l"), tree.of_layers(), tree.of_images(), tree.of_chains()] {
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

    fn of_chains(&self) -> PathBuf {
        self.root.join(roots::CHAINS)
    }

    fn tar_split(&self, id: &Digest) -> PathBuf {
        self.of_layers().join(format!("{}.tar-split.gz", id.hex()))
    }

    /// Brings the directory in line with what the store wants there.
    pub(super) fn update(&self, store: &Store, mut contents: Contents, graph_roots: &[PathBuf]) -> Result<Changes> {
        let before = self.present()?;
        self.write_layers(store, &mut contents)?;
        let images = self.write_images(store, &contents)?;
        files::sync_all(&self.root)?;
        let used = InUse::read(graph_roots)?;
        let images = self.listed(&self.of_images(), "images", &images, |id| contents.images.contains_key(id))?;
        let layers: Vec<LayerEntry> = contents.layers.iter().map(|(id, layer)| layer_entry(id, layer)).collect();
        let layers = self.listed(&self.of_layers(), "layers", &layers, |id| contents.layers.contains_key(id))?;
        let kept_images: Vec<Value> =
            images.gone.iter().filter(|image| is_in(image, &used.images)).map(unnamed).collect();
        let kept_layers = self.kept(&layers.gone, &used)?;
        // Whoever reads the lists one after the other finds the layers of every image: new ones come first, old ones go last.
        replace_list(&self.of_layers(), "layers", &[&layers.wanted[..], &layers.gone].concat())?;
        replace_list(&self.of_images(), "images", &[&images.wanted[..], &kept_images].concat())?;
        let stay: Vec<Value> = layers.gone.into_iter().filter(|layer| is_in(layer, &kept_layers)).collect();
        replace_list(&self.of_layers(), "layers", &[layers.wanted, stay].concat())?;
        let is_wanted = |id: &Digest| contents.images.contains_key(id) || used.images.contains(id);
        self.remove_images(is_wanted)?;
        self.remove_layers(|id| contents.layers.contains_key(id) || kept_layers.contains(id), &used)?;
        let after = self.present()?;
        let differ = |a: &BTreeSet<Digest>, b: &BTreeSet<Digest>| a.symmetric_difference(b).count();
        Ok(Changes { images: differ(&before.0, &after.0), layers: differ(&before.1, &after.1) })
    }

    /// A list as it is to be, and the entries of the present one that are wanted no more. A list that cannot be read is empty.
    fn listed<T: Serialize>(
        &self,
        directory: &Path,
        name: &str,
        wanted: &[T],
        is_wanted: impl Fn(&Digest) -> bool,
    ) -> Result<Listed> {
        let path = directory.join(format!("{name}.json"));
        let values = wanted.iter().map(serde_json::to_value).collect::<serde_json::Result<Vec<_>>>();
        let wanted = values.map_err(|e| FileError::io("write", &path, e.into()))?;
        let text = std::fs::read(&path).unwrap_or_default();
        let present: Vec<Value> = serde_json::from_slice(&text).unwrap_or_default();
        let gone = present.into_iter().filter(|entry| id(entry).is_some_and(|id| !is_wanted(&id))).collect();
        Ok(Listed { wanted, gone })
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
        let lacking: Vec<Digest> = contents.layers.keys().filter(|id| !self.tar_split(id).exists()).copied().collect();
        let mut failed = BTreeSet::new();
        let write = |id: &Digest| self.write_tar_split(store, &contents.layers[id].diff_id, id);
        let crashed = || Err(store::Error::corrupt("a layer", "writing its tar-split crashed").into());
        for (id, written) in lacking.iter().zip(workers::each(&lacking, write)) {
            match written.unwrap_or_else(crashed) {
                Ok(()) => {}
                Err(Error::Store(error)) => {
                    tracing::warn!("layer {} and the images on it are left out: {error}", contents.layers[id].diff_id);
                    failed.insert(*id);
                }
                Err(error) => return Err(error),
            }
        }
        contents.leave_out(&failed);
        contents.layers.keys().try_for_each(|id| self.write_layer(contents, id))
    }

    fn write_tar_split(&self, store: &Store, diff_id: &Digest, id: &Digest) -> Result<()> {
        let path = self.tar_split(id);
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

    fn write_layer(&self, contents: &Contents, id: &Digest) -> Result<()> {
        let (chain, id) = (&contents.layers[id].chain, id);
        let directory = self.overlay().join(id.hex());
        let list = roots::list(&contents.diff_ids(id));
        files::make_dir(&directory, 0o700)?;
        files::ensure_file(&directory.join(roots::LAYERS), list.as_bytes(), 0o600)?;
        files::ensure_link(&directory.join("diff"), &mountpoint::tree(&self.mountpoint, chain))?;
        // The second lower directory where an engine mounts the layer itself.
        files::make_dir(&directory.join("empty"), 0o700)?;
        files::ensure_link(&self.of_chains().join(chain.hex()), &Path::new("../overlay").join(id.hex()))?;
        let goal = Path::new("..").join(id.hex()).join("diff");
        let links = self.overlay().join("l");
        // 130 random bits: a name that is taken is another layer's only in theory.
        let is_free = |name: &String| std::fs::read_link(links.join(name)).map_or(true, |there| there == goal);
        let present = Some(self.short(id)?).filter(|short| !short.is_empty());
        let new = || (0..100).map(|attempt| short_name(&id.hex(), attempt)).find(is_free).unwrap_or_default();
        let short = present.unwrap_or_else(new);
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

    /// The layers among `gone` that are in use, and those below them.
    fn kept(&self, gone: &[Value], used: &InUse) -> Result<BTreeSet<Digest>> {
        let parents: BTreeMap<Digest, Option<Digest>> = gone
            .iter()
            .filter_map(|layer| Some((id(layer)?, layer["parent"].as_str().and_then(Digest::from_hex))))
            .collect();
        let mut kept = BTreeSet::new();
        for id in parents.keys() {
            if used.layers.contains(id) || used.links.contains(&self.short(id)?) {
                let mut at = Some(*id);
                while let Some(id) = at.filter(|id| kept.insert(*id)) {
                    at = parents.get(&id).copied().flatten();
                }
            }
        }
        Ok(kept)
    }

    /// The name of the link to a layer; empty if there is none.
    fn short(&self, id: &Digest) -> Result<String> {
        Ok(files::read_text(&self.overlay().join(id.hex()).join("link"))?.unwrap_or_default())
    }

    fn remove_images(&self, is_wanted: impl Fn(&Digest) -> bool) -> Result<()> {
        let (images, _) = self.present()?;
        let mut others = images.iter().filter(|id| !is_wanted(id));
        Ok(others.try_for_each(|id| files::forget_tree(&self.of_images().join(id.hex())))?)
    }

    fn remove_layers(&self, is_wanted: impl Fn(&Digest) -> bool, used: &InUse) -> Result<()> {
        let (_, layers) = self.present()?;
        for id in layers.iter().filter(|id| !is_wanted(id)) {
            let short = self.short(id)?;
            if used.links.contains(&short) || used.layers.contains(id) {
                // Not listed, because a list was lost: what stands on it still starts.
                continue;
            }
            files::forget_file(&self.tar_split(id))?;
            if !short.is_empty() {
                files::forget_file(&self.overlay().join("l").join(short))?;
            }
            let directory = self.overlay().join(id.hex());
            if let Some(chain) = std::fs::read_link(directory.join("diff")).ok().as_deref().and_then(Path::file_name) {
                files::forget_file(&self.of_chains().join(chain))?;
            }
            files::forget_tree(&directory)?;
        }
        Ok(())
    }
}

/// A list as it is to be, and what is to go from it.
struct Listed {
    wanted: Vec<Value>,
    gone: Vec<Value>,
}

fn layer_entry(id: &Digest, layer: &Layer) -> LayerEntry {
    LayerEntry {
        id: id.hex(),
        parent: layer.parent.map(|parent| parent.hex()),
        diff_digest: layer.diff_id,
        diff_size: layer.size,
        blob: layer.blob.clone(),
    }
}

/// The id of an element of a list.
fn id(entry: &Value) -> Option<Digest> {
    Digest::from_hex(entry["id"].as_str()?)
}

fn is_in(entry: &Value, ids: &BTreeSet<Digest>) -> bool {
    id(entry).is_some_and(|id| ids.contains(&id))
}

/// An image that the store has no more: whoever gave it a name of their own keeps that.
fn unnamed(image: &Value) -> Value {
    let mut image = image.clone();
    image["names"] = Value::Array(Vec::new());
    image
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

    /// The id that an engine gives the last of these layers.
    fn id_of(layers: &[Digest; 2]) -> Digest {
        Digest::of(format!("{}+{}", layers[0].hex(), layers[1].hex()).as_bytes())
    }

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
            self.tree.update(store, Contents::read(store).unwrap(), &[self.graph_root()]).unwrap()
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
        let (top, chain) = (id_of(&[a, b]), Digest::chain(Some(&a), &b));
        let directory = world.tree.overlay().join(top.hex());
        assert_eq!(std::fs::read_link(directory.join("diff")).unwrap(), Path::new("/m/trees").join(chain.hex()));
        assert!(world.tree.of_chains().join(chain.hex()).join("layers").is_file());
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
        assert_eq!(names(world.tree.of_chains()), 1);
    }

    #[test]
    fn an_image_that_has_another_name_in_an_engines_own_storage_stays_without_its_own() {
        let world = World::new();
        let image = samples::image(&world.publisher, "app", &world.layers);
        world.update();
        let local = world.graph_root().join("overlay-images");
        std::fs::create_dir_all(&local).unwrap();
        let tagged = format!(
            r#"[{{"id":"{}","names":["mine:1"],"layer":"{}"}}]"#,
            image.config.hex(),
            id_of(&world.layers).hex()
        );
        std::fs::write(local.join("images.json"), tagged).unwrap();
        world.remove(&image);
        assert_eq!(world.update(), Changes::default());
        assert_eq!((world.listed("images"), world.listed("layers").len()), (vec![image.config.hex()], 2));
        let list = std::fs::read_to_string(world.tree.of_images().join("images.json")).unwrap();
        assert!(list.contains(r#""names":[]"#), "{list}");
        std::fs::write(local.join("images.json"), "[{").unwrap();
        let store = world.publisher.store();
        let error = world.tree.update(store, Contents::read(store).unwrap(), &[world.graph_root()]).unwrap_err();
        assert!(error.to_string().contains("cannot understand"), "what may be in use is not removed: {error}");
        std::fs::write(local.join("images.json"), "").unwrap();
        assert_eq!(world.update(), Changes { images: 1, layers: 2 });
    }

    #[test]
    fn what_was_lost_of_the_links_comes_back() {
        let world = World::new();
        samples::image(&world.publisher, "app", &world.layers);
        world.update();
        let names = || files::names(&world.tree.overlay().join("l")).unwrap();
        let before = names();
        std::fs::remove_dir_all(world.tree.overlay().join("l")).unwrap();
        std::fs::remove_dir_all(world.tree.overlay().join(id_of(&world.layers).hex()).join("empty")).unwrap();
        std::fs::write(world.tree.of_images().join("images.json"), "").unwrap();
        std::fs::create_dir(world.tree.overlay().join("l")).unwrap();
        world.update();
        assert_eq!((names(), world.listed("images").len()), (before, 1));
    }

    #[test]
    fn what_local_containers_stand_on_stays_listed_or_not() {
        let world = World::new();
        let [a, b] = world.layers;
        let image = samples::image(&world.publisher, "app", &[a, b]);
        world.update();
        let top = id_of(&[a, b]);
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
