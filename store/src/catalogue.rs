//! The catalogue: which images the store has, in generations.
//!
//! Each change makes one new file `catalogue/<generation>`, created exclusively (`link(2)`): of two writers that both want
//! generation N, the file system lets one win, and the loser re-reads and finds out whether it still leads. This is
//! the point where a stale coordinator is stopped, whatever clocks and caches say. A file holds the changes since the one
//! before it, or, every [`SNAPSHOT_EVERY`] generations, the whole state, so that a commit costs as much as its change and a reader
//! reads at most that many small files. Generations older than the last two snapshots are removed.
//!
//! A startup pack belongs to a top chain, and is kept as long as some image has that chain.
//!
//! A **pin** is a person's hold on a name (a tag, or a digest without one), whatever the name points to now or later,
//! and whether or not the store has it yet. The name leaves the catalogue only if a person insists. When a pinned tag
//! moves, the pin stays with the name, and the image that the tag pointed to before follows the normal rules. A pinned
//! digest keeps its image under whatever name it has, and under the digest itself once the last name goes (`pinned`).
//! Pins and the number of collections have fields of their own beside the changes, so that software that does not know
//! them still reads the images.
//!
//! The catalogue also records which index each layer of an image has (`indexes`).
//!
//! A file is one line `cachefs-catalogue 1 <BLAKE3 of the rest>`, then JSON.

use std::sync::Arc;

use imbl::{OrdMap, OrdSet};
use serde::{Deserialize, Serialize};

use crate::digest::{ContentDigest, Digest};
use crate::error::{Error, Result};
use crate::image::{ImageRecord, ImageRef, familiar, read_repository};
use crate::profile::StartupRecord;

mod indexes;
mod layer_state;
mod pinned;
mod salvage;

pub use layer_state::IndexRecord;
use layer_state::LayerState;

/// A whole state is written at least once in this many generations.
pub const SNAPSHOT_EVERY: u64 = 64;
/// A tag's history keeps this many moves.
pub const HISTORY_MAX: usize = 50;
const MAGIC: &str = "cachefs-catalogue 1 ";

/// One move of a tag.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TagMove {
    /// The manifest that the tag pointed to from then on.
    pub manifest: Digest,
    /// Its config (image ID).
    pub config: Digest,
    /// When, seconds since 1970.
    pub at: u64,
}

/// A name that only a person removes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// Canonical repository.
    #[serde(deserialize_with = "read_repository")]
    pub repository: String,
    /// The tag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// The digest that names an image without a tag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Digest>,
    /// Since when, seconds since 1970.
    pub since: u64,
}

impl Pin {
    /// A pin on the name that `reference` means. A reference with both a tag and a digest is refused: the tag moves,
    /// the digest does not.
    pub fn of(reference: &ImageRef, since: u64) -> Result<Pin> {
        if let (Some(_), Some(_)) = (reference.tag(), reference.digest()) {
            let why = "pin the tag or the digest, not both";
            return Err(Error::Invalid { kind: "name to pin", what: reference.to_string(), why });
        }
        let (tag, target) = (reference.tag().map(str::to_owned), reference.digest().copied());
        Ok(Pin { repository: reference.canonical_repository(), tag, target, since })
    }

    /// The name as people write it.
    pub fn familiar_name(&self) -> String {
        let repository = familiar(&self.repository);
        match (&self.tag, &self.target) {
            (Some(tag), _) => format!("{repository}:{tag}"),
            (None, Some(target)) => format!("{repository}@{target}"),
            (None, None) => repository,
        }
    }

    fn key(&self) -> Key {
        (self.repository.clone(), self.tag.clone(), self.target)
    }
}

/// One tag: where it points and where it pointed, newest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TagState {
    /// The image.
    pub image: Arc<ImageRecord>,
    /// All moves, newest first; the first one is the present.
    pub history: Vec<TagMove>,
}

/// One change of the catalogue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// A tag (or a bare digest) now means this image.
    Set(Arc<ImageRecord>),
    /// A tag (or a bare digest) is gone.
    Remove {
        /// Canonical repository.
        #[serde(deserialize_with = "read_repository")]
        repository: String,
        /// The tag.
        tag: Option<String>,
        /// The target, which names an image without a tag.
        target: Digest,
    },
    /// The chain has this startup pack now. The writer has made sure that some image has the chain.
    Startup(Arc<StartupRecord>),
    /// A name is pinned.
    Pin(Pin),
    /// A name is no longer pinned; `since` does not matter.
    Unpin(Pin),
    /// A collection is about to remove or thin packs: a database that has not recorded this number must forget where
    /// pieces lie.
    Collected(u64),
}

impl Change {
    /// Whether the change concerns pins or collections rather than images.
    fn is_keeping(&self) -> bool {
        matches!(self, Change::Pin(_) | Change::Unpin(_) | Change::Collected(_))
    }
}

/// The contents of one generation's file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    /// Its number.
    pub generation: u64,
    /// The epoch of the coordinator that wrote it.
    pub epoch: u64,
    /// The newest generation, up to this one, that holds a whole state.
    pub snapshot: u64,
    /// The whole state, if this is a snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tags: Option<Vec<TagState>>,
    /// All startup packs, if this is a snapshot.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub startups: Vec<Arc<StartupRecord>>,
    /// What changed since the generation before, if this is not a snapshot.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<Change>,
    /// All pins, if this is a snapshot.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pins: Vec<Pin>,
    /// How many collections have removed or thinned packs, if this is a snapshot.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub collected: u64,
    /// What changed of pins and collections, if this is not a snapshot.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keeping: Vec<Change>,
    /// The indexes of layers: all, if this is a snapshot, else those that come or change.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub indexes: Vec<IndexRecord>,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Generation {
    /// The file's bytes.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let json = serde_json::to_vec(self).map_err(|e| Error::corrupt("the catalogue", e.to_string()))?;
        let mut out = format!("{MAGIC}{}\n", ContentDigest::of(&json)).into_bytes();
        out.extend(json);
        Ok(out)
    }

    /// Reads a file's bytes.
    pub fn decode(bytes: &[u8]) -> Result<Generation> {
        let damaged = |why: &str| Error::corrupt("a generation of the catalogue", why);
        let line = bytes.iter().position(|b| *b == b'\n').ok_or_else(|| damaged("it is too short"))?;
        let head = std::str::from_utf8(&bytes[..line]).map_err(|_| damaged("its first line is wrong"))?;
        let Some(digest) = head.strip_prefix(MAGIC) else {
            return Err(if head.starts_with("cachefs-catalogue ") {
                Error::Unsupported { what: "the catalogue".into(), why: format!("it starts with {head:?}") }
            } else {
                damaged("its first line is wrong")
            });
        };
        let json = &bytes[line + 1..];
        if ContentDigest::from_hex(digest) != Some(ContentDigest::of(json)) {
            return Err(damaged("its bytes do not match their digest"));
        }
        serde_json::from_slice(json).map_err(|e| damaged(&e.to_string()))
    }
}

/// The key of an image: its repository, and its tag or, without one, its target.
type Key = (String, Option<String>, Option<Digest>);

fn key(repository: &str, tag: Option<&str>, target: &Digest) -> Key {
    (repository.to_owned(), tag.map(str::to_owned), tag.is_none().then_some(*target))
}

/// One consistent state of all images and tags. A clone costs nothing, whatever the number of images: clones share what
/// they have in common.
#[derive(Debug, Clone, Default)]
pub struct Catalogue {
    generation: u64,
    epoch: u64,
    snapshot: u64,
    tags: OrdMap<Key, TagState>,
    /// The images with each top chain, so that they are found without a walk over all images.
    chains: OrdSet<(Digest, Key)>,
    /// The layers of all images, by diffID.
    layers: OrdMap<Digest, LayerState>,
    /// Startup packs by chain.
    startups: OrdMap<Digest, Arc<StartupRecord>>,
    pins: OrdMap<Key, Pin>,
    collected: u64,
}

impl Catalogue {
    /// The generation; 0 is the empty catalogue of a new store.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The epoch of the coordinator that wrote the last generation.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The newest generation that holds a whole state.
    pub fn snapshot(&self) -> u64 {
        self.snapshot
    }

    /// All images, by repository and tag.
    pub fn images(&self) -> impl Iterator<Item = &Arc<ImageRecord>> {
        self.tags.values().map(|state| &state.image)
    }

    /// All images with the history of their tags.
    pub fn tags(&self) -> impl Iterator<Item = &TagState> {
        self.tags.values()
    }

    /// The image that a reference means: by its digest if it has one, whatever its tag, else by its tag.
    pub fn find(&self, reference: &ImageRef) -> Option<&TagState> {
        let repository = reference.canonical_repository();
        let named = |state: &&TagState| {
            reference.digest().is_none_or(|d| state.image.target == *d || state.image.manifest == *d)
        };
        if let (Some(tag), None) = (reference.tag(), reference.digest()) {
            return self.tags.get(&(repository, Some(tag.to_owned()), None));
        }
        self.tags_in(&repository).find(named)
    }

    /// The images of a repository, by its canonical name, with the history of their tags.
    pub fn tags_in(&self, repository: &str) -> impl Iterator<Item = &TagState> {
        let from = (repository.to_owned(), None, None);
        self.tags.range(from..).take_while(move |(key, _)| key.0 == repository).map(|(_, state)| state)
    }

    /// The startup pack of the images whose top chain is `chain`.
    pub fn startup(&self, chain: &Digest) -> Option<&Arc<StartupRecord>> {
        self.startups.get(chain)
    }

    /// All startup packs.
    pub fn startups(&self) -> impl Iterator<Item = &Arc<StartupRecord>> {
        self.startups.values()
    }

    /// All pins, by repository and tag.
    pub fn pins(&self) -> impl Iterator<Item = &Pin> {
        self.pins.values()
    }

    /// The pin on an image's name.
    pub fn pin_of(&self, image: &ImageRecord) -> Option<&Pin> {
        self.pins.get(&key(&image.repository, image.tag.as_deref(), &image.target))
    }

    /// How many collections have removed or thinned packs.
    pub fn collected(&self) -> u64 {
        self.collected
    }

    /// An image whose top chain is `chain`: the first by name.
    pub fn image_of_chain(&self, chain: &Digest) -> Option<&Arc<ImageRecord>> {
        let least = (*chain, (String::new(), None, None));
        let (_, key) = self.chains.range(least..).next().filter(|(found, _)| found == chain)?;
        self.tags.get(key).map(|state| &state.image)
    }

    /// Inserts a name, or replaces the image under it; returns the previous state.
    fn insert(&mut self, key: Key, state: TagState) -> Option<TagState> {
        let chain = state.image.top_chain();
        self.refer(&state.image);
        let replaced = self.tags.insert(key.clone(), state);
        replaced.iter().for_each(|state| self.release(&state.image));
        self.forget_chain(&key, replaced.as_ref());
        if let Some(chain) = chain {
            self.chains.insert((chain, key));
        }
        replaced
    }

    /// Removes a name; returns its state.
    fn take(&mut self, key: &Key) -> Option<TagState> {
        let taken = self.tags.remove(key);
        taken.iter().for_each(|state| self.release(&state.image));
        self.forget_chain(key, taken.as_ref());
        taken
    }

    fn forget_chain(&mut self, key: &Key, gone: Option<&TagState>) {
        if let Some(chain) = gone.and_then(|state| state.image.top_chain()) {
            self.chains.remove(&(chain, key.clone()));
        }
    }

    /// Applies the next generation's file.
    pub fn apply(&mut self, next: Generation) -> Result<()> {
        match next.tags {
            Some(tags) => {
                (self.tags, self.chains, self.layers) = (OrdMap::new(), OrdSet::new(), OrdMap::new());
                for state in tags {
                    let image = &state.image;
                    let key = key(&image.repository, image.tag.as_deref(), &image.target);
                    let at = image.published_at;
                    // Older software took a registry's names for different registries. If two images now have one name,
                    // the newer counts.
                    if self.tags.get(&key).is_none_or(|other| other.image.published_at <= at) {
                        self.insert(key, state);
                    }
                }
                self.startups = next.startups.into_iter().map(|startup| (startup.chain, startup)).collect();
                self.pins = next.pins.into_iter().map(|pin| (pin.key(), pin)).collect();
                self.collected = next.collected;
            }
            None if next.generation == self.generation + 1 => {
                next.changes.into_iter().chain(next.keeping).for_each(|change| self.change(change));
            }
            None => {
                let why = format!("generation {} follows {}", next.generation, self.generation);
                return Err(Error::corrupt("the catalogue", why));
            }
        }
        self.set_indexes(next.indexes);
        (self.generation, self.epoch, self.snapshot) = (next.generation, next.epoch, next.snapshot);
        Ok(())
    }

    fn change(&mut self, change: Change) {
        match change {
            Change::Set(image) => {
                let entry = TagMove { manifest: image.manifest, config: image.config, at: image.published_at };
                let key = key(&image.repository, image.tag.as_deref(), &image.target);
                let mut history = self.tags.get(&key).map(|state| state.history.clone()).unwrap_or_default();
                if history.first().is_none_or(|last| last.manifest != entry.manifest) {
                    history.insert(0, entry);
                    history.truncate(HISTORY_MAX);
                }
                let replaced = self.insert(key, TagState { image, history });
                replaced.iter().for_each(|state| self.drop_startup_of(&state.image));
            }
            Change::Remove { repository, tag, target } => {
                let removed = self.take(&key(&repository, tag.as_deref(), &target));
                removed.iter().for_each(|state| self.drop_startup_of(&state.image));
            }
            Change::Startup(startup) => _ = self.startups.insert(startup.chain, startup),
            Change::Pin(pin) => _ = self.pins.insert(pin.key(), pin),
            Change::Unpin(pin) => _ = self.pins.remove(&pin.key()),
            Change::Collected(number) => self.collected = number,
        }
    }

    /// Drops the startup pack of an image that is gone, unless another image has the same layers.
    fn drop_startup_of(&mut self, gone: &ImageRecord) {
        if let Some(chain) = gone.top_chain().filter(|chain| self.image_of_chain(chain).is_none()) {
            self.startups.remove(&chain);
        }
    }

    /// The generation that commits `changes` on top of this state; it holds the whole state if that is due.
    pub fn next(&self, epoch: u64, changes: Vec<Change>) -> Generation {
        let generation = self.generation + 1;
        let is_due = generation % SNAPSHOT_EVERY == 1 || generation.saturating_sub(self.snapshot) >= SNAPSHOT_EVERY;
        if is_due { self.next_whole(epoch, changes) } else { self.next_change(epoch, changes) }
    }

    /// The generation that holds `changes` alone.
    pub(crate) fn next_change(&self, epoch: u64, changes: Vec<Change>) -> Generation {
        let (keeping, changes) = changes.into_iter().partition(Change::is_keeping);
        let (generation, snapshot) = (self.generation + 1, self.snapshot);
        Generation { generation, epoch, snapshot, changes, keeping, ..Generation::default() }
    }

    /// The generation that holds the whole state after `changes`.
    pub(crate) fn next_whole(&self, epoch: u64, changes: Vec<Change>) -> Generation {
        let mut state = self.clone();
        changes.into_iter().for_each(|change| state.change(change));
        Generation {
            generation: self.generation + 1,
            epoch,
            snapshot: self.generation + 1,
            indexes: state.indexes().collect(),
            tags: Some(state.tags.into_iter().map(|(_, tag)| tag).collect()),
            startups: state.startups.into_iter().map(|(_, startup)| startup).collect(),
            pins: state.pins.into_iter().map(|(_, pin)| pin).collect(),
            collected: state.collected,
            ..Generation::default()
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
