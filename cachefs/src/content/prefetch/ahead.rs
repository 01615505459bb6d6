//! What is fetched of new images before they start.
//!
//! A host that uses an image of a repository will most likely be asked to start the next one. When the catalogue shows it, its indexes are
//! fetched, and once it has a startup pack the table is, too, which also leaves the pack open: then a start begins with content.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lru::LruCache;
use parking_lot::Mutex;
use store::profile::StartupTable;
use store::{ContentDigest, Digest};

use crate::source::catalogue::CatalogueSnapshot;

/// How many repositories are watched: those that were used last.
const REPOSITORIES: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");
/// How many tables are kept, each of at most half a megabyte: those that were fetched last.
const TABLES: NonZeroUsize = NonZeroUsize::new(16).expect("not zero");
/// How many new images of a repository are looked at in one generation: more are an import, not a deployment.
const NEW_MAX: usize = 8;

/// What is known of one repository.
#[derive(Debug, Default)]
struct Repository {
    /// Its images, by their top chains.
    seen: HashMap<Digest, Seen>,
}

/// What an image of a repository is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// It was there when the repository was first used, or came with too many others.
    Old,
    /// It came afterwards, and was looked at with this startup pack, if it had one.
    New(Option<ContentDigest>),
}

/// Repositories in use, and tables that were fetched.
pub(super) struct Ahead {
    state: Mutex<State>,
    /// Whether the directories of packs were opened.
    prepared: AtomicBool,
}

/// Guarded by one lock, which is never held during I/O.
struct State {
    generation: u64,
    repositories: LruCache<String, Repository>,
    tables: LruCache<ContentDigest, Arc<StartupTable>>,
}

impl Default for Ahead {
    fn default() -> Ahead {
        let (repositories, tables) = (LruCache::new(REPOSITORIES), LruCache::new(TABLES));
        Ahead { state: Mutex::new(State { generation: 0, repositories, tables }), prepared: AtomicBool::new(false) }
    }
}

/// The top chains of a repository's images, and their startup packs.
fn chains(snapshot: &CatalogueSnapshot, repository: &str) -> HashMap<Digest, Option<ContentDigest>> {
    let catalogue = snapshot.catalogue();
    let tops: HashSet<Digest> = catalogue.tags_in(repository).filter_map(|state| state.image.top_chain()).collect();
    tops.into_iter().map(|chain| (chain, catalogue.startup(&chain).map(|record| record.pack))).collect()
}

impl Ahead {
    /// Notes that an image of some repository is used. What the repository has now is not new.
    pub(super) fn uses(&self, chain: &Digest, snapshot: &CatalogueSnapshot) {
        for repository in snapshot.repositories_of(chain) {
            if self.state.lock().repositories.get(repository).is_none() {
                let seen = chains(snapshot, repository).into_keys().map(|chain| (chain, Seen::Old)).collect();
                self.state.lock().repositories.put(repository.clone(), Repository { seen });
            }
        }
    }

    /// Whether the directories of packs are still to be opened; the caller does it.
    pub(super) fn prepare(&self) -> bool {
        !self.prepared.swap(true, Ordering::AcqRel)
    }

    /// Notes that opening them has failed: somebody else has to try.
    pub(super) fn not_prepared(&self) {
        self.prepared.store(false, Ordering::Release);
    }

    /// Keeps a table that was fetched ahead.
    pub(super) fn keep(&self, pack: ContentDigest, table: Arc<StartupTable>) {
        self.state.lock().tables.put(pack, table);
    }

    /// The table of a startup pack, if it was fetched ahead.
    pub(super) fn table(&self, pack: &ContentDigest) -> Option<Arc<StartupTable>> {
        self.state.lock().tables.get(pack).cloned()
    }

    /// The images that are new in repositories in use, and new ones that have another startup pack than before. Packs of old images are
    /// made anew time and again.
    pub(super) fn news(&self, snapshot: &CatalogueSnapshot) -> Vec<Digest> {
        let mut state = self.state.lock();
        let generation = snapshot.catalogue().generation();
        if std::mem::replace(&mut state.generation, generation) == generation {
            return Vec::new();
        }
        let mut news = Vec::new();
        for (name, repository) in &mut state.repositories {
            let now = chains(snapshot, name);
            let mut left = NEW_MAX;
            let mut look = |(chain, pack): (Digest, Option<ContentDigest>)| {
                let before = repository.seen.get(&chain).copied();
                let is_news = before.is_none_or(|before| before != Seen::Old && before != Seen::New(pack));
                if !is_news || left == 0 {
                    return (chain, before.unwrap_or(Seen::Old));
                }
                left -= 1;
                if !news.contains(&chain) {
                    news.push(chain);
                }
                (chain, Seen::New(pack))
            };
            let seen = now.into_iter().map(&mut look).collect();
            repository.seen = seen;
        }
        news
    }
}
