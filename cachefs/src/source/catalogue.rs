//! The images of the store, followed from generation to generation.
//!
//! The newest state is kept in memory as one immutable [`CatalogueSnapshot`] and as a file in the cache directory, so that a mount
//! starts, lists and reads what is cached with the shared disk down. It is brought up to date every few seconds, and
//! whenever somebody looks up a name that it does not have: an image can be used the moment its pull has ended.
//!
//! A store that was restored from an older copy has fewer generations than this host has seen, or others under the same
//! numbers. The digest of the newest generation's file that was seen, the witness, shows that; the host then starts
//! again from the store's own whole state. A listing that lacks the newest generation may also be an old one that the
//! shared disk has kept, so a host goes back only when it has seen nothing else for [`CERTAIN`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::{Mutex, RwLock};
use store::catalogue::{Catalogue, Generation};
use store::image::{ImageRecord, familiar};
use store::reader::Store;
use store::{ContentDigest, Digest, Error};

use crate::os::pool::{Pools, Priority};
use crate::os::private_files;
use crate::source::shared_store::SharedStore;
use crate::source::single_flight::{Done, Joined, SingleFlight};

/// How long a store must show fewer generations before a host goes back. Shared disks keep directory listings for some
/// seconds, NFS for a minute at most.
const CERTAIN: Duration = Duration::from_secs(75);

/// One consistent state of the catalogue, prepared for look-ups.
#[derive(Debug, Clone)]
pub struct CatalogueSnapshot {
    catalogue: Catalogue,
    identity: [u8; 16],
    /// Digest of the file of its generation in the store, if it is known.
    witness: Option<ContentDigest>,
    changed_at: SystemTime,
    layers: BTreeSet<Digest>,
    chains: BTreeMap<Digest, (Arc<ImageRecord>, usize)>,
    /// The repositories of images, by their top chains.
    tops: BTreeMap<Digest, BTreeSet<String>>,
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

impl Default for CatalogueSnapshot {
    fn default() -> CatalogueSnapshot {
        CatalogueSnapshot::new(Catalogue::default(), [0; 16], None)
    }
}

impl CatalogueSnapshot {
    fn new(catalogue: Catalogue, identity: [u8; 16], witness: Option<ContentDigest>) -> CatalogueSnapshot {
        let (layers, chains) = (BTreeSet::new(), BTreeMap::new());
        let directories = BTreeMap::from([(String::new(), BTreeMap::new())]);
        let tops = BTreeMap::new();
        let changed_at = SystemTime::now();
        let mut snapshot =
            CatalogueSnapshot { catalogue, identity, witness, changed_at, layers, chains, tops, directories };
        let images: Vec<_> = snapshot.catalogue.images().cloned().collect();
        images.iter().for_each(|image| snapshot.add(image));
        // A directory wins over a tag of the same name: `a/b:c` stays reachable beside `a:b`.
        for path in snapshot.directories.keys().cloned().collect::<Vec<_>>() {
            if let Some((parent, name)) = split(&path) {
                let siblings = snapshot.directories.entry(parent.to_owned()).or_default();
                siblings.insert(name.to_owned(), ImageEntry::Directory);
            }
        }
        snapshot
    }

    fn add(&mut self, image: &Arc<ImageRecord>) {
        self.layers.extend(image.layers.iter().map(|layer| layer.diff_id));
        let chains = image.chain_ids();
        for (depth, chain) in chains.iter().enumerate() {
            self.chains.entry(*chain).or_insert_with(|| (Arc::clone(image), depth + 1));
        }
        if let Some(chain) = chains.last() {
            self.tops.entry(*chain).or_default().insert(image.repository.clone());
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

    /// The images whose top chain this is, under each of their names.
    pub fn names(&self, chain: &Digest) -> impl Iterator<Item = &Arc<ImageRecord>> {
        self.catalogue.images().filter(move |image| image.chain_ids().last() == Some(chain))
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
        self.tops.contains_key(chain)
    }

    /// The repositories of images whose top chain this is.
    pub fn repositories_of(&self, chain: &Digest) -> impl Iterator<Item = &String> {
        self.tops.get(chain).into_iter().flatten()
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
pub struct CatalogueWatcher {
    shared_store: Arc<SharedStore>,
    pools: Pools,
    copy: PathBuf,
    /// Guards the pointer to the present snapshot.
    snapshot: RwLock<Arc<CatalogueSnapshot>>,
    fetches: SingleFlight<(), Refreshed>,
    /// Whether the store's history was compared with what this host knows, since the daemon started.
    compared: AtomicBool,
    /// Guards the time since when the store has had fewer generations than this host has seen.
    behind: Mutex<Option<Instant>>,
}

/// The outcome of a refresh.
#[derive(Debug, Clone)]
pub struct Refreshed {
    /// The newest state.
    pub snapshot: Arc<CatalogueSnapshot>,
    /// When the store was asked: everything that was published before then is in the snapshot.
    pub started: Instant,
}

impl CatalogueWatcher {
    /// Starts from the copy in the file `copy`, or from nothing.
    pub fn new(shared_store: Arc<SharedStore>, pools: Pools, copy: PathBuf) -> CatalogueWatcher {
        let snapshot = read_copy(&copy).unwrap_or_default();
        CatalogueWatcher {
            shared_store,
            pools,
            copy,
            snapshot: RwLock::new(Arc::new(snapshot)),
            fetches: SingleFlight::default(),
            compared: AtomicBool::new(false),
            behind: Mutex::default(),
        }
    }

    /// Whether a store has been seen through this cache directory before.
    pub fn has_state(&self) -> bool {
        self.snapshot().identity != [0; 16]
    }

    /// The present snapshot.
    pub fn snapshot(&self) -> Arc<CatalogueSnapshot> {
        Arc::clone(&self.snapshot.read())
    }

    /// Looks for a newer generation, then calls `done` with the newest snapshot.
    pub fn refresh(self: &Arc<Self>, deadline: Instant, done: Done<Refreshed>) {
        if self.fetches.join((), deadline, done) == Joined::First {
            let this = Arc::clone(self);
            self.pools.remote.submit(Priority::Demand, move || {
                let _guard = this.fetches.guard(vec![()]);
                let started = Instant::now();
                // One attempt: what is in the present snapshot needs no refresh, and for the rest a quick error is best.
                let result = this.shared_store.fetch(|| false, |store| this.update(store));
                this.fetches.end(&(), result.map(|snapshot| Refreshed { snapshot, started }));
            });
        }
    }

    /// Fails the waiters whose deadline has passed; returns their number.
    pub fn expire(&self, now: Instant) -> usize {
        self.fetches.expire(now)
    }

    /// Brings the snapshot up to date: one directory listing when nothing is new. May hang as long as the disk does.
    pub fn update(&self, store: &Store) -> store::error::Result<Arc<CatalogueSnapshot>> {
        self.update_at(store, Instant::now())
    }

    fn update_at(&self, store: &Store, now: Instant) -> store::error::Result<Arc<CatalogueSnapshot>> {
        let present = self.snapshot();
        if present.identity != store.identity() {
            return self.adopt(store, store.generation()?, Catalogue::default());
        }
        let (newest, known) = (store.generation()?, present.catalogue.generation());
        if newest < known {
            return self.behind(store, &present, newest, now);
        }
        *self.behind.lock() = None;
        let is_compared = self.compared.load(Ordering::Acquire);
        if newest == known && is_compared {
            return Ok(present);
        }
        let found = store.generation_digest(known)?;
        if let (Some(seen), Some(found)) = (present.witness, found)
            && seen != found
        {
            let root = self.shared_store.root().display();
            tracing::error!(
                "store {root} has another generation {known} than this host has seen; it was restored from an older copy, \
                 perhaps, and is followed from now on"
            );
            return self.adopt(store, newest, Catalogue::default());
        }
        if newest == known {
            self.compared.store(true, Ordering::Release);
            return Ok(present);
        }
        self.adopt(store, newest, present.catalogue.clone())
    }

    /// Handles a store that has fewer generations than this host has seen. A store without any generation is damaged
    /// rather than restored: the known state is still shown.
    fn behind(
        &self,
        store: &Store,
        present: &Arc<CatalogueSnapshot>,
        newest: u64,
        now: Instant,
    ) -> store::error::Result<Arc<CatalogueSnapshot>> {
        let (root, known) = (self.shared_store.root().display(), present.catalogue.generation());
        let mut behind = self.behind.lock();
        if behind.is_none() {
            tracing::warn!("store {root} shows generation {newest}, and this host has seen {known}: looking again");
        }
        let since = *behind.get_or_insert(now);
        drop(behind);
        let is_certain = newest > 0 && now.duration_since(since) >= CERTAIN;
        if !is_certain || store.generation_digest(known)?.is_some() {
            return Ok(Arc::clone(present));
        }
        tracing::error!(
            "store {root} has gone back from generation {known} to {newest}; it was restored from an older copy, perhaps, and is \
             followed from now on"
        );
        self.adopt(store, newest, Catalogue::default())
    }

    /// Takes over what the store has up to generation `newest`, on top of `catalogue`.
    fn adopt(
        &self,
        store: &Store,
        newest: u64,
        mut catalogue: Catalogue,
    ) -> store::error::Result<Arc<CatalogueSnapshot>> {
        store.refresh_to(newest, &mut catalogue)?;
        let witness = store.generation_digest(catalogue.generation())?;
        let snapshot = Arc::new(CatalogueSnapshot::new(catalogue, store.identity(), witness));
        if let Err(error) = write_copy(&self.copy, &snapshot) {
            tracing::warn!(
                "cannot keep a copy of the catalogue, so a mount will not start without the shared disk: {error}"
            );
        }
        *self.behind.lock() = None;
        self.compared.store(true, Ordering::Release);
        *self.snapshot.write() = Arc::clone(&snapshot);
        Ok(snapshot)
    }
}

/// The file beside the copy that holds the witness of its generation, in hex.
fn witness_path(copy: &Path) -> PathBuf {
    copy.with_extension("witness")
}

/// Writes the copy: the store's identity, then the state in the form of a generation's file in the store.
fn write_copy(path: &Path, snapshot: &CatalogueSnapshot) -> store::error::Result<()> {
    let catalogue = &snapshot.catalogue;
    let generation = Generation {
        generation: catalogue.generation(),
        epoch: catalogue.epoch(),
        snapshot: catalogue.snapshot(),
        tags: Some(catalogue.tags().cloned().collect()),
        startups: catalogue.startups().cloned().collect(),
        indexes: catalogue.indexes().collect(),
        // Hosts need no pins and no collections.
        ..Generation::default()
    };
    let mut bytes = snapshot.identity.to_vec();
    bytes.extend(generation.encode()?);
    // In this order: a witness of another generation than the copy's is ignored.
    let witness = snapshot.witness.map(|witness| format!("{:016x} {}", generation.generation, witness.hex()));
    let written = private_files::replace(path, &bytes)
        .and_then(|()| private_files::replace(&witness_path(path), witness.unwrap_or_default().as_bytes()));
    written.map_err(|e| Error::io("write", path, e))
}

/// Reads the copy; nothing if it is missing or damaged.
fn read_copy(path: &Path) -> Option<CatalogueSnapshot> {
    let bytes = std::fs::read(path).ok()?;
    let (identity, file) = bytes.split_first_chunk::<16>()?;
    let mut catalogue = Catalogue::default();
    catalogue.apply(Generation::decode(file).ok()?).ok()?;
    let witness = std::fs::read_to_string(witness_path(path)).unwrap_or_default();
    let witness = witness.split_once(' ').filter(|(number, _)| *number == format!("{:016x}", catalogue.generation()));
    let witness = witness.and_then(|(_, digest)| ContentDigest::from_hex(digest));
    Some(CatalogueSnapshot::new(catalogue, *identity, witness))
}

#[cfg(test)]
mod tests;
