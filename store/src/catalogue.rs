//! The catalogue: which images the store has, in generations.
//!
//! Each change makes one new file `catalogue/<generation>`, created exclusively (`link(2)`): of two writers that both want
//! generation N, the file system lets one win, and the loser re-reads and finds out whether it still leads. This is
//! the point where a stale coordinator is stopped, whatever clocks and caches say. A file holds the changes since the one
//! before it, or, every [`SNAPSHOT_EVERY`] generations, the whole state, so that a commit costs as much as its change and a reader
//! reads at most that many small files. Generations older than the last two snapshots are removed.
//!
//! An image's startup pack is known by the image's top chain, and for as long as some image has that chain.
//!
//! A file is one line `cachefs-catalogue 1 <BLAKE3 of the rest>`, then JSON.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::digest::{ContentDigest, Digest};
use crate::error::{Error, Result};
use crate::image::{ImageRecord, ImageRef};
use crate::profile::StartupRecord;

mod salvage;

/// A whole state is written every so many generations.
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
        repository: String,
        /// The tag.
        tag: Option<String>,
        /// The target, which names an image without a tag.
        target: Digest,
    },
    /// The chain has this startup pack now. The writer has seen to it that some image has the chain.
    Startup(Arc<StartupRecord>),
}

/// The contents of one generation's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
    /// What changed since the generation before, if this is not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<Change>,
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
            return Err(match head.starts_with("cachefs-catalogue ") {
                true => Error::Unsupported { what: "the catalogue".into(), why: format!("it starts with {head:?}") },
                false => damaged("its first line is wrong"),
            });
        };
        let json = &bytes[line + 1..];
        if ContentDigest::from_hex(digest) != Some(ContentDigest::of(json)) {
            return Err(damaged("its bytes do not match their digest"));
        }
        serde_json::from_slice(json).map_err(|e| damaged(&e.to_string()))
    }
}

/// The key of an image without a tag is its target; one with a tag, the tag.
type Key = (String, Option<String>, Option<Digest>);

fn key(repository: &str, tag: Option<&str>, target: &Digest) -> Key {
    (repository.to_owned(), tag.map(str::to_owned), tag.is_none().then_some(*target))
}

/// One consistent state of all images and tags.
#[derive(Debug, Clone, Default)]
pub struct Catalogue {
    generation: u64,
    epoch: u64,
    snapshot: u64,
    tags: BTreeMap<Key, TagState>,
    /// By chain.
    startups: BTreeMap<Digest, Arc<StartupRecord>>,
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

    /// The image that a reference means: by its tag, by its digest, or by both if they agree.
    pub fn find(&self, reference: &ImageRef) -> Option<&TagState> {
        let repository = reference.canonical_repository();
        let named = |state: &&TagState| {
            reference.digest().is_none_or(|d| state.image.target == *d || state.image.manifest == *d)
        };
        if let Some(tag) = reference.tag() {
            return self.tags.get(&(repository, Some(tag.to_owned()), None)).filter(named);
        }
        let from = (repository.clone(), None, None);
        self.tags.range(from..).take_while(|(key, _)| key.0 == repository).map(|(_, state)| state).find(named)
    }

    /// The startup pack of the images whose top chain is `chain`.
    pub fn startup(&self, chain: &Digest) -> Option<&Arc<StartupRecord>> {
        self.startups.get(chain)
    }

    /// All startup packs.
    pub fn startups(&self) -> impl Iterator<Item = &Arc<StartupRecord>> {
        self.startups.values()
    }

    /// An image whose top chain is `chain`. Costs a few digests for every image of the catalogue.
    pub fn image_of_chain(&self, chain: &Digest) -> Option<&Arc<ImageRecord>> {
        self.images().find(|image| image.top_chain().as_ref() == Some(chain))
    }

    /// Applies the next generation's file.
    pub fn apply(&mut self, next: Generation) -> Result<()> {
        match next.tags {
            Some(tags) => {
                self.tags = tags
                    .into_iter()
                    .map(|s| (key(&s.image.repository, s.image.tag.as_deref(), &s.image.target), s))
                    .collect();
                self.startups = next.startups.into_iter().map(|startup| (startup.chain, startup)).collect();
            }
            None if next.generation == self.generation + 1 => {
                next.changes.into_iter().for_each(|change| self.change(change));
            }
            None => {
                let why = format!("generation {} follows {}", next.generation, self.generation);
                return Err(Error::corrupt("the catalogue", why));
            }
        }
        (self.generation, self.epoch, self.snapshot) = (next.generation, next.epoch, next.snapshot);
        Ok(())
    }

    fn change(&mut self, change: Change) {
        match change {
            Change::Set(image) => {
                let entry = TagMove { manifest: image.manifest, config: image.config, at: image.published_at };
                let key = key(&image.repository, image.tag.as_deref(), &image.target);
                let (replaced, history) = self.tags.remove(&key).map(|state| (state.image, state.history)).unzip();
                let mut history = history.unwrap_or_default();
                if history.first().is_none_or(|last| last.manifest != entry.manifest) {
                    history.insert(0, entry);
                    history.truncate(HISTORY_MAX);
                }
                self.tags.insert(key, TagState { image, history });
                replaced.iter().for_each(|image| self.drop_startup_of(image));
            }
            Change::Remove { repository, tag, target } => {
                let removed = self.tags.remove(&key(&repository, tag.as_deref(), &target));
                removed.iter().for_each(|state| self.drop_startup_of(&state.image));
            }
            Change::Startup(startup) => _ = self.startups.insert(startup.chain, startup),
        }
    }

    /// Drops the startup pack of an image that is gone, unless another image has the same layers.
    fn drop_startup_of(&mut self, gone: &ImageRecord) {
        let Some(chain) = gone.top_chain().filter(|chain| self.startups.contains_key(chain)) else { return };
        let diff_ids = |image: &ImageRecord| image.layers.iter().map(|layer| layer.diff_id).collect::<Vec<_>>();
        let layers = diff_ids(gone);
        if !self.images().any(|image| image.layers.len() == layers.len() && diff_ids(image) == layers) {
            self.startups.remove(&chain);
        }
    }

    /// The file that commits `changes` on top of this state.
    pub fn next(&self, epoch: u64, changes: Vec<Change>) -> Generation {
        let generation = self.generation + 1;
        if generation % SNAPSHOT_EVERY != 1 {
            return Generation {
                generation,
                epoch,
                snapshot: self.snapshot,
                tags: None,
                startups: Vec::new(),
                changes,
            };
        }
        let mut state = self.clone();
        changes.into_iter().for_each(|change| state.change(change));
        let tags = Some(state.tags.into_values().collect());
        let startups = state.startups.into_values().collect();
        Generation { generation, epoch, snapshot: generation, tags, startups, changes: Vec::new() }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::chunk::Codec;
    use crate::image::{LayerRecord, Platform};
    use crate::pack::Placed;

    pub(crate) fn image(repository: &str, tag: Option<&str>, n: u8) -> Arc<ImageRecord> {
        let digest = Digest::of(&[n]);
        Arc::new(ImageRecord {
            repository: repository.into(),
            tag: tag.map(str::to_owned),
            target: digest,
            manifest: digest,
            media_type: "application/vnd.oci.image.manifest.v1+json".into(),
            config: Digest::of(&[n, n]),
            platform: Platform::host(),
            layers: vec![LayerRecord { diff_id: digest, size: 1, blob: digest, blob_size: 1, media_type: "t".into() }],
            published_at: u64::from(n),
        })
    }

    #[test]
    fn generations_replay_to_the_same_state() {
        let mut writer = Catalogue::default();
        let mut files = Vec::new();
        for n in 0..200u8 {
            let change = match n % 5 {
                4 => Change::Remove {
                    repository: "r/a".into(),
                    tag: Some(format!("t{}", n % 7)),
                    target: Digest::of(&[n]),
                },
                3 => startup(image("r/a", None, n - 1).top_chain().unwrap(), u64::from(n)),
                _ => Change::Set(image("r/a", Some(&format!("t{}", n % 7)), n)),
            };
            let file = writer.next(3, vec![change]);
            files.push(file.encode().unwrap());
            writer.apply(file).unwrap();
        }
        let start = files.iter().rposition(|f| Generation::decode(f).unwrap().tags.is_some()).unwrap();
        assert_eq!(start as u64 % SNAPSHOT_EVERY, 0);
        let mut reader = Catalogue::default();
        for file in &files[start..] {
            reader.apply(Generation::decode(file).unwrap()).unwrap();
        }
        assert_eq!(reader.generation(), 200);
        assert_eq!(reader.tags().collect::<Vec<_>>(), writer.tags().collect::<Vec<_>>());
        assert_eq!(reader.startups().collect::<Vec<_>>(), writer.startups().collect::<Vec<_>>());
        assert!((1..=7).contains(&writer.startups().count()), "no more than there are images");
        assert!(reader.clone().apply(Generation::decode(&files[3]).unwrap()).is_err());
    }

    fn startup(chain: Digest, published_at: u64) -> Change {
        let digest = ContentDigest::of(&published_at.to_le_bytes());
        let table = Placed { offset: 16, stored_len: 1, raw_len: 1, codec: Codec::Plain, digest };
        let record =
            StartupRecord { chain, pack: digest, pack_len: 99, table, starts: 1, content_bytes: 5, published_at };
        Change::Startup(Arc::new(record))
    }

    #[test]
    fn a_startup_pack_stays_as_long_as_some_image_has_its_chain() {
        let mut writer = Catalogue::default();
        let mut apply = |change: Change| -> Catalogue {
            let file = Generation::decode(&writer.next(1, vec![change]).encode().unwrap()).unwrap();
            writer.apply(file).unwrap();
            writer.clone()
        };
        let set = |tag: &str, n: u8| Change::Set(image("r/a", Some(tag), n));
        let remove = |tag: &str| {
            let target = Digest::of(&[0]);
            Change::Remove { repository: "r/a".into(), tag: Some(tag.into()), target }
        };
        let chain = image("r/a", None, 1).top_chain().unwrap();
        apply(set("one", 1));
        apply(set("two", 1));
        assert_eq!(apply(set("other", 2)).startup(&chain), None);
        assert_eq!(apply(startup(chain, 7)).startup(&chain).unwrap().published_at, 7);
        assert_eq!(apply(startup(chain, 8)).startup(&chain).unwrap().published_at, 8);
        assert!(apply(remove("one")).startup(&chain).is_some(), "two has the same layers");
        assert!(apply(set("two", 1)).startup(&chain).is_some(), "published once more");
        let image = apply(remove("other")).image_of_chain(&chain).cloned();
        assert_eq!(image.unwrap().tag.as_deref(), Some("two"));
        assert_eq!(apply(set("two", 3)).startups().count(), 0, "the tag moved away");
        apply(set("one", 1));
        apply(startup(chain, 9));
        assert_eq!(apply(remove("one")).startups().count(), 0);
    }

    #[test]
    fn snapshots_keep_startup_packs_and_old_files_have_none() {
        let mut writer = Catalogue::default();
        let chain = image("r/a", None, 1).top_chain().unwrap();
        for change in [Change::Set(image("r/a", Some("t"), 1)), startup(chain, 7)] {
            let file = writer.next(1, vec![change]);
            writer.apply(file).unwrap();
        }
        let mut snapshots = 0;
        while writer.generation() < 2 * SNAPSHOT_EVERY + 2 {
            let file = Generation::decode(&writer.next(1, Vec::new()).encode().unwrap()).unwrap();
            snapshots += usize::from(file.tags.is_some());
            let mut reader = Catalogue::default();
            if file.tags.is_some() {
                reader.apply(file.clone()).unwrap();
                assert_eq!(reader.startup(&chain), writer.startup(&chain));
            }
            writer.apply(file).unwrap();
        }
        assert_eq!(snapshots, 2);
        let old = r#"{"generation":1,"epoch":1,"snapshot":1,"tags":[]}"#;
        assert_eq!(serde_json::from_str::<Generation>(old).unwrap().startups, []);
    }

    #[test]
    fn references_find_images_and_history_remembers() {
        let mut catalogue = Catalogue::default();
        for change in [
            image("docker.io/library/a", Some("v1"), 1),
            image("docker.io/library/a", Some("v1"), 2),
            image("docker.io/library/a", None, 9),
        ] {
            let file = catalogue.next(1, vec![Change::Set(change)]);
            catalogue.apply(file).unwrap();
        }
        let find = |text: &str| catalogue.find(&text.parse().unwrap()).map(|s| s.image.published_at);
        assert_eq!(find("a:v1"), Some(2));
        assert_eq!(find("a"), None);
        assert_eq!(find(&format!("a@{}", Digest::of(&[9]))), Some(9));
        assert_eq!(find(&format!("a@{}", Digest::of(&[2]))), Some(2));
        assert_eq!(find(&format!("a:v1@{}", Digest::of(&[9]))), None);
        let state = catalogue.find(&"a:v1".parse().unwrap()).unwrap();
        assert_eq!(state.history.iter().map(|m| m.at).collect::<Vec<_>>(), [2, 1]);
    }

    #[test]
    fn any_damage_is_refused() {
        let bytes = Catalogue::default().next(1, vec![Change::Set(image("r/a", None, 1))]).encode().unwrap();
        assert!(bytes.starts_with(b"cachefs-catalogue 1 "));
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x20;
            assert!(Generation::decode(&bad).is_err(), "byte {at}");
            assert!(Generation::decode(&bytes[..at]).is_err());
        }
    }
}
