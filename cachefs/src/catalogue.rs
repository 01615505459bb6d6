//! The images of the store, followed from generation to generation.
//!
//! The newest state is kept in memory as one immutable [`View`] and as a file in the cache directory, so that a mount
//! starts, lists and reads what is cached with the shared disk down. It is brought up to date every few seconds, and
//! whenever somebody looks up a name that it does not have: an image can be used the moment its pull has ended.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use parking_lot::RwLock;
use store::catalogue::{Catalogue, Generation};
use store::image::{ImageRecord, familiar};
use store::reader::Store;
use store::{Digest, Error};

use crate::origin::Origin;
use crate::pool::{Pool, Priority};
use crate::single_flight::{Boarding, Done, Flights};

/// One consistent state of the catalogue, prepared for look-ups.
#[derive(Debug, Clone)]
pub struct View {
    catalogue: Catalogue,
    identity: [u8; 16],
    changed_at: SystemTime,
    layers: BTreeSet<Digest>,
    chains: BTreeMap<Digest, (Arc<ImageRecord>, usize)>,
    /// The top chains of images, by their top layer.
    tops: BTreeMap<Digest, BTreeSet<Digest>>,
    directories: BTreeMap<String, BTreeMap<String, ImageEntry>>,
}

/// One name below `images/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageEntry {
    /// A part of repositories' names.
    Directory,
    /// A tag, which means this chain.
    Tag(Digest),
}

impl Default for View {
    fn default() -> View {
        View::new(Catalogue::default(), [0; 16])
    }
}

impl View {
    fn new(catalogue: Catalogue, identity: [u8; 16]) -> View {
        let (layers, chains) = (BTreeSet::new(), BTreeMap::new());
        let directories = BTreeMap::from([(String::new(), BTreeMap::new())]);
        let tops = BTreeMap::new();
        let mut view = View { catalogue, identity, changed_at: SystemTime::now(), layers, chains, tops, directories };
        let images: Vec<_> = view.catalogue.images().cloned().collect();
        images.iter().for_each(|image| view.add(image));
        // A directory wins over a tag of the same name: `a/b:c` stays reachable beside `a:b`.
        for path in view.directories.keys().cloned().collect::<Vec<_>>() {
            if let Some((parent, name)) = split(&path) {
                let siblings = view.directories.entry(parent.to_owned()).or_default();
                siblings.insert(name.to_owned(), ImageEntry::Directory);
            }
        }
        view
    }

    fn add(&mut self, image: &Arc<ImageRecord>) {
        self.layers.extend(image.layers.iter().map(|layer| layer.diff_id));
        let chains = image.chain_ids();
        for (depth, chain) in chains.iter().enumerate() {
            self.chains.entry(*chain).or_insert_with(|| (Arc::clone(image), depth + 1));
        }
        if let (Some(top), Some(chain)) = (image.layers.last(), chains.last()) {
            self.tops.entry(top.diff_id).or_default().insert(*chain);
        }
        if let (Some(tag), Some(chain)) = (&image.tag, chains.last()) {
            let repository = familiar(&image.repository);
            let mut path = repository.as_str();
            self.directories.entry(repository.clone()).or_default().insert(tag.clone(), ImageEntry::Tag(*chain));
            while let Some((parent, _)) = split(path) {
                self.directories.entry(parent.to_owned()).or_default();
                path = parent;
            }
        }
    }

    /// The catalogue itself.
    pub fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// When this host first saw this state.
    pub fn changed_at(&self) -> SystemTime {
        self.changed_at
    }

    /// The diffIDs of all images' layers.
    pub fn layers(&self) -> &BTreeSet<Digest> {
        &self.layers
    }

    /// The chainIDs of all images' layers.
    pub fn chains(&self) -> impl Iterator<Item = &Digest> {
        self.chains.keys()
    }

    /// The diffIDs of a chain, base first.
    pub fn chain(&self, chain: &Digest) -> Option<Vec<Digest>> {
        let (image, depth) = self.chains.get(chain)?;
        Some(image.layers[..*depth].iter().map(|layer| layer.diff_id).collect())
    }

    /// The images, by any of their names, that are this chain.
    pub fn names(&self, chain: &Digest) -> impl Iterator<Item = &Arc<ImageRecord>> {
        self.catalogue.images().filter(move |image| image.chain_ids().last() == Some(chain))
    }

    /// The top chains of the images whose top layer this is.
    pub fn images_on(&self, layer: &Digest) -> impl Iterator<Item = &Digest> {
        self.tops.get(layer).into_iter().flatten()
    }

    /// The images all of whose layers are among `layers`, by name; of images on top of each other only the topmost.
    pub fn images_of(&self, layers: &BTreeSet<Digest>) -> Vec<String> {
        let diff_ids = |image: &Arc<ImageRecord>| image.layers.iter().map(|layer| layer.diff_id).collect::<Vec<_>>();
        let whole = self.catalogue.images().map(|image| (image, diff_ids(image)));
        let whole = whole.filter(|(_, own)| !own.is_empty() && own.iter().all(|layer| layers.contains(layer)));
        let whole: Vec<_> = whole.collect();
        let is_below =
            |own: &[Digest]| whole.iter().any(|(_, other)| other.len() > own.len() && other.starts_with(own));
        whole.iter().filter(|(_, own)| !is_below(own)).map(|(image, _)| image.familiar_name()).collect()
    }

    /// Whether a chain is all of an image.
    pub fn is_image(&self, chain: &Digest) -> bool {
        let top = self.chains.get(chain).and_then(|(image, depth)| image.layers.get(depth - 1));
        top.and_then(|top| self.tops.get(&top.diff_id)).is_some_and(|chains| chains.contains(chain))
    }

    /// Whether `images/<path>` holds tags.
    pub fn is_repository(&self, path: &str) -> bool {
        let entries = self.directories.get(path);
        entries.is_some_and(|entries| entries.values().any(|entry| matches!(entry, ImageEntry::Tag(_))))
    }

    /// What lies in `images/<path>`; the path of `images` itself is empty.
    pub fn directory(&self, path: &str) -> Option<&BTreeMap<String, ImageEntry>> {
        self.directories.get(path)
    }
}

/// `a/b/c` -> (`a/b`, `c`); `a` -> (``, `a`); the empty path has no parent.
pub fn split(path: &str) -> Option<(&str, &str)> {
    match path.rsplit_once('/') {
        Some(parts) => Some(parts),
        None if path.is_empty() => None,
        None => Some(("", path)),
    }
}

/// Follows the catalogue.
pub struct Follower {
    origin: Arc<Origin>,
    pool: Pool,
    copy: PathBuf,
    /// Guards the pointer to the present view.
    view: RwLock<Arc<View>>,
    flights: Flights<(), Refreshed>,
}

/// The outcome of a refresh.
#[derive(Debug, Clone)]
pub struct Refreshed {
    /// The newest state.
    pub view: Arc<View>,
    /// When the store was asked: everything that was published before then is in the view.
    pub started: Instant,
}

impl Follower {
    /// Starts from the copy in the file `copy`, or from nothing.
    pub fn new(origin: Arc<Origin>, pool: Pool, copy: PathBuf) -> Follower {
        let view = read_copy(&copy).unwrap_or_default();
        Follower { origin, pool, copy, view: RwLock::new(Arc::new(view)), flights: Flights::default() }
    }

    /// Whether a store has been seen through this cache directory before.
    pub fn has_state(&self) -> bool {
        self.view().identity != [0; 16]
    }

    /// The present view.
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.read())
    }

    /// Looks for a newer generation, then calls `done` with the newest view.
    pub fn refresh(self: &Arc<Self>, deadline: Instant, done: Done<Refreshed>) {
        if self.flights.board((), deadline, done) == Boarding::First {
            let this = Arc::clone(self);
            self.pool.submit(Priority::Demand, move || {
                let started = Instant::now();
                // One attempt: what is in the present view needs no refresh, and for the rest a quick error is best.
                let result = this.origin.fetch(|| false, |store| this.update(store));
                this.flights.end(&(), result.map(|view| Refreshed { view, started }));
            });
        }
    }

    /// Tells those who waited too long.
    pub fn expire(&self, now: Instant) -> usize {
        self.flights.expire(now)
    }

    /// Brings the view up to date: one directory listing when nothing is new. May hang as long as the disk does.
    pub fn update(&self, store: &Store) -> store::error::Result<Arc<View>> {
        let present = self.view();
        let same_store = present.identity == store.identity();
        if same_store && store.generation()? <= present.catalogue.generation() {
            return Ok(present);
        }
        let mut catalogue = match same_store {
            true => present.catalogue.clone(),
            false => Catalogue::default(),
        };
        store.refresh(&mut catalogue)?;
        let view = Arc::new(View::new(catalogue, store.identity()));
        if let Err(error) = write_copy(&self.copy, &view) {
            tracing::warn!(
                "cannot keep a copy of the catalogue, so a mount will not start without the shared disk: {error}"
            );
        }
        *self.view.write() = Arc::clone(&view);
        Ok(view)
    }
}

/// The copy's file: the store's identity, then the state as a generation's file of the store.
fn write_copy(path: &Path, view: &View) -> store::error::Result<()> {
    let catalogue = &view.catalogue;
    let generation = Generation {
        generation: catalogue.generation(),
        epoch: catalogue.epoch(),
        snapshot: catalogue.snapshot(),
        tags: Some(catalogue.tags().cloned().collect()),
        startups: catalogue.startups().cloned().collect(),
        indexes: catalogue.indexes().collect(),
        // Pins and collections are no business of hosts.
        ..Generation::default()
    };
    let mut bytes = view.identity.to_vec();
    bytes.extend(generation.encode()?);
    let temporary = path.with_extension("tmp");
    let written = std::fs::write(&temporary, bytes).and_then(|()| std::fs::rename(&temporary, path));
    written.map_err(|e| Error::io("write", path, e))
}

/// Reads the copy; one that is missing or damaged is as good as none.
fn read_copy(path: &Path) -> Option<View> {
    let bytes = std::fs::read(path).ok()?;
    let (identity, file) = bytes.split_first_chunk::<16>()?;
    let mut catalogue = Catalogue::default();
    catalogue.apply(Generation::decode(file).ok()?).ok()?;
    Some(View::new(catalogue, *identity))
}
