//! Fetches what an image's earlier starts needed, before it is asked for.
//!
//! When an image is first looked into, its startup pack (what the coordinator has learned from traces) is read from
//! front to back while the container starts, and the recorder notes what this start reads. After [`AGAIN`] without a look
//! that happens once more, without the recorder: the cache may have lost what it had. A startup pack is a hint:
//! its failures fail no read, its bytes are verified like any others, and after its first 3 MiB it yields to whatever
//! somebody waits for.
//!
//! An image is known by its top chain. Docker's data-root looks into single layers: there the top layer tells which
//! image it is.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use store::Digest;
use store::chunk::{ChunkRef, RawChunk};
use store::layer::{LayerIndex, Source};
use store::profile::{StartupPiece, StartupRecord, StartupTable};

use crate::content::cache::extents::extents;
use crate::content::cache::startup::{PackedPiece, Startup};
use crate::content::cache::{Cache, Content, Prefetch};
use crate::content::indexes::Indexes;
use crate::os::pool::{Pools, Priority};
use crate::source::catalogue::CatalogueWatcher;
use crate::source::failure::{Failure, Result};
use crate::source::shared_store::SharedStore;
use crate::uplink::recorder::Recorder;

/// How much of a startup pack is read together with its table, bytes.
const HEAD: u32 = 256 << 10;
/// How much of a startup pack is read while the layers' indexes are being loaded, which takes some round trips; bytes
/// of the pack.
const EARLY: u64 = 3 << 20;

/// An image that nobody has looked into for this long may have been evicted: its startup pack is used again. What of it
/// is still in the cache is not fetched.
const AGAIN: Duration = Duration::from_secs(3600);

/// What a look into an image means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    /// The first one of this daemon's life.
    First,
    /// One after a long time.
    Again,
    /// One of many.
    Lately,
}

/// Puts startup packs to use.
pub struct Prefetcher {
    shared_store: Arc<SharedStore>,
    pools: Pools,
    watcher: Arc<CatalogueWatcher>,
    indexes: Arc<Indexes>,
    cache: Arc<Cache>,
    recorder: Arc<Recorder>,
    /// Guards when images, by their top chains, were last looked into in this daemon's life.
    looks: Mutex<HashMap<Digest, Instant>>,
}

/// A startup pack that waits for its table and its layers' indexes; the thread that brings the last of them goes on.
/// The first chunks are read meanwhile, so that the shared disk is not idle.
struct Gathering {
    record: Arc<StartupRecord>,
    /// Guards what has come so far; never held during I/O.
    gathered: Mutex<Gathered>,
}

/// A chunk's position in a startup pack, and its bytes if they came.
type Early = (u32, Option<RawChunk>);

#[derive(Default)]
struct Gathered {
    table: Option<StartupTable>,
    indexes: Vec<Option<Arc<LayerIndex>>>,
    /// Chunks that came before the indexes.
    early: Vec<Early>,
    /// How many chunks are read early.
    claimed: u32,
    /// The startup pack, once it is in use.
    startup: Option<Arc<Startup>>,
}

impl Gathered {
    fn all(&mut self) -> Option<(StartupTable, Vec<Arc<LayerIndex>>)> {
        let indexes = self.indexes.iter().cloned().collect::<Option<Vec<_>>>()?;
        Some((self.table.take()?, indexes))
    }
}

impl Prefetcher {
    /// Prefetches into `cache`.
    pub fn new(
        shared_store: Arc<SharedStore>,
        pools: Pools,
        watcher: Arc<CatalogueWatcher>,
        indexes: Arc<Indexes>,
        cache: Arc<Cache>,
        recorder: Arc<Recorder>,
    ) -> Prefetcher {
        Prefetcher { shared_store, pools, watcher, indexes, cache, recorder, looks: Mutex::default() }
    }

    /// Notes that somebody looks into a chain. The first look into the top chain of an image begins a start.
    ///
    /// A later one begins none. What the last start read used to be read into memory then: with a full local cache and an empty page
    /// cache Python started in 0.29 s instead of 0.21 on native trees, and in 0.25 instead of 0.23 on the mount's own (medians of 11).
    pub fn looked_into(self: &Arc<Self>, chain: &Digest) {
        self.looked_into_at(chain, Instant::now());
    }

    fn looked_into_at(self: &Arc<Self>, chain: &Digest, now: Instant) {
        if self.look(chain, now, false) == Look::Lately {
            return;
        }
        let snapshot = self.watcher.snapshot();
        let Some(layers) = snapshot.chain(chain).filter(|_| snapshot.is_image(chain)) else { return };
        match self.look(chain, now, true) {
            Look::First => self.recorder.begin(*chain, layers.clone()),
            // The page cache answers a part of its reads, so a trace would lack them.
            Look::Again => {}
            Look::Lately => return,
        }
        if let Some(record) = snapshot.catalogue().startup(chain)
            && self.cache.prefetching() == Prefetch::On
        {
            self.gather(Arc::clone(record), layers);
        }
    }

    /// What a look is; notes it if it is one of many or `counts`.
    fn look(&self, chain: &Digest, now: Instant, counts: bool) -> Look {
        let mut looks = self.looks.lock();
        let look = match looks.get(chain) {
            None => Look::First,
            Some(last) if now.saturating_duration_since(*last) >= AGAIN => Look::Again,
            Some(_) => Look::Lately,
        };
        if counts || look == Look::Lately {
            looks.insert(*chain, now);
        }
        look
    }

    /// Notes that somebody looks into a layer. If it is the top layer of images, that is a look into those images.
    pub fn looked_into_layer(self: &Arc<Self>, layer: &Digest) {
        for chain in self.watcher.snapshot().images_on(layer) {
            self.looked_into(chain);
        }
    }

    fn gather(self: &Arc<Self>, record: Arc<StartupRecord>, layers: Vec<Digest>) {
        let gathered = Mutex::new(Gathered { indexes: vec![None; layers.len()], ..Gathered::default() });
        let gathering = Arc::new(Gathering { record, gathered });
        let (this, own) = (Arc::clone(self), Arc::clone(&gathering));
        self.pools.remote.submit(Priority::Background, move || {
            match this.shared_store.fetch(|| false, |store| store.startup_head(&own.record, HEAD)) {
                Ok((table, head)) => this.table_came(&own, table, head),
                Err(failure) => tracing::warn!("chain {} starts without its startup pack: {failure}", own.record.chain),
            }
        });
        for (position, layer) in layers.into_iter().enumerate() {
            let (this, gathering) = (Arc::clone(self), Arc::clone(&gathering));
            let loaded = move |result: Result<Arc<LayerIndex>>| {
                if let Ok(index) = result {
                    this.came(&gathering, |gathered| gathered.indexes[position] = Some(index));
                }
            };
            self.indexes.load(layer, self.shared_store.deadline(), Box::new(loaded));
        }
    }

    /// Takes the table, which tells where the first chunks are, and starts reading these at once.
    fn table_came(self: &Arc<Self>, gathering: &Arc<Gathering>, table: StartupTable, head: Vec<RawChunk>) {
        let start = table.chunks.first().map_or(0, |chunk| chunk.offset);
        let claimed = table.chunks.partition_point(|chunk| chunk.offset + u64::from(chunk.stored_len) <= start + EARLY);
        let early: Vec<_> = (0..).zip(&table.chunks[..claimed]).map(|(position, chunk)| (position, *chunk)).collect();
        for extent in extents(early[head.len().min(claimed)..].to_vec(), |(_, chunk)| chunk) {
            let (this, gathering) = (Arc::clone(self), Arc::clone(gathering));
            // The container waits for these before anything else.
            self.pools.remote.submit(Priority::Demand, move || this.read_early(&gathering, &extent));
        }
        let head = (0..).zip(head.into_iter().take(claimed)).map(|(position, raw)| (position, Some(raw)));
        self.came(gathering, |gathered| {
            gathered.early.extend(head);
            gathered.claimed = claimed as u32;
            gathered.table = Some(table);
        });
    }

    fn read_early(&self, gathering: &Gathering, extent: &[(u32, ChunkRef)]) {
        let chunks: Vec<_> = extent.iter().map(|(_, chunk)| *chunk).collect();
        let read = self.shared_store.fetch(|| false, |store| store.read_extent(&chunks));
        let mut raw = read.unwrap_or_default().into_iter();
        let arrived = extent.iter().map(move |(position, _)| (*position, raw.next()));
        let mut gathered = gathering.gathered.lock();
        let startup = gathered.startup.clone();
        match startup {
            None => gathered.early.extend(arrived),
            Some(startup) => {
                drop(gathered);
                arrived.for_each(|(position, raw)| self.cache.startup_arrived(&startup, position, raw));
            }
        }
    }

    fn came(self: &Arc<Self>, gathering: &Gathering, put: impl FnOnce(&mut Gathered)) {
        let mut gathered = gathering.gathered.lock();
        put(&mut gathered);
        let all = gathered.all();
        let claimed = gathered.claimed;
        drop(gathered);
        let Some((table, indexes)) = all else { return };
        let startup = self.begin(&gathering.record, &table, claimed, &indexes);
        let mut gathered = gathering.gathered.lock();
        gathered.startup = Some(Arc::clone(&startup));
        let early = std::mem::take(&mut gathered.early);
        drop(gathered);
        early.into_iter().for_each(|(position, raw)| self.cache.startup_arrived(&startup, position, raw));
    }

    fn begin(
        &self,
        record: &StartupRecord,
        table: &StartupTable,
        claimed: u32,
        indexes: &[Arc<LayerIndex>],
    ) -> Arc<Startup> {
        let mut held: Vec<Vec<PackedPiece>> = table.chunks.iter().map(|_| Vec::new()).collect();
        for piece in &table.pieces {
            match (resolve(piece, indexes), held.get_mut(piece.chunk as usize)) {
                (Ok(piece_held), Some(chunk)) => chunk.push(piece_held),
                _ => tracing::warn!("the startup pack of chain {} names a piece that is not there", record.chain),
            }
        }
        let startup = Arc::new(Startup::new(record.chain, table.chunks.iter().copied().zip(held).collect()));
        let told = Arc::clone(&startup);
        self.recorder.uses(&record.chain, record.pack, Box::new(move || told.brought()));
        tracing::debug!("chain {} starts with a startup pack of {} bytes", record.chain, record.pack_len);
        self.cache.use_startup(&startup, claimed);
        startup
    }
}

/// Finds a startup pack's piece in its layer.
fn resolve(piece: &StartupPiece, indexes: &[Arc<LayerIndex>]) -> Result<PackedPiece> {
    let index = indexes.get(usize::from(piece.layer)).ok_or(Failure::Damaged)?;
    let inode = index.inode(piece.inode).map_err(|error| Failure::from(&error))?;
    let found = index.piece(&inode, piece.piece).map_err(|error| Failure::from(&error))?;
    if found.source == Source::Hole {
        return Err(Failure::Damaged);
    }
    let content = Content { index: Arc::clone(index), number: piece.inode, inode };
    Ok(PackedPiece { layer: piece.layer, content, number: piece.piece, piece: found, start: piece.start })
}

/// How far the prefetch of a whole image is.
pub struct Progress {
    /// Chunks of its layers.
    pub chunks: u64,
    done: AtomicU64,
    layers_left: AtomicUsize,
}

impl Progress {
    /// Chunks that have been requested, or were here already.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Whether all layers are done.
    pub fn is_over(&self) -> bool {
        self.layers_left.load(Ordering::Acquire) == 0
    }
}

impl Prefetcher {
    /// Begins to fetch all layers of a chain into the cache. `begun` is called with the progress to watch, or with the
    /// reason why nothing begins.
    pub fn whole(self: &Arc<Self>, chain: &Digest, begun: impl FnOnce(Result<Arc<Progress>>) + Send + 'static) {
        let Some(layers) = self.watcher.snapshot().chain(chain) else { return begun(Err(Failure::Absent)) };
        let begun = Arc::new(Mutex::new(Some(begun)));
        let indexes: Arc<Mutex<HashMap<Digest, Arc<LayerIndex>>>> = Arc::default();
        let all: HashSet<Digest> = layers.iter().copied().collect();
        let count = all.len();
        for layer in all {
            let (this, begun, indexes) = (Arc::clone(self), Arc::clone(&begun), Arc::clone(&indexes));
            let loaded = move |result: Result<Arc<LayerIndex>>| {
                let answer = match result {
                    Err(failure) => Err(failure),
                    Ok(index) => {
                        let mut indexes = indexes.lock();
                        indexes.insert(layer, index);
                        if indexes.len() < count {
                            return;
                        }
                        Ok(this.stream(indexes.values()))
                    }
                };
                let begun = begun.lock().take();
                if let Some(begun) = begun {
                    begun(answer);
                }
            };
            self.indexes.load(layer, self.shared_store.deadline(), Box::new(loaded));
        }
    }

    fn stream<'a>(&self, indexes: impl ExactSizeIterator<Item = &'a Arc<LayerIndex>> + Clone) -> Arc<Progress> {
        let progress = Arc::new(Progress {
            chunks: indexes.clone().map(|index| u64::from(index.chunk_count())).sum(),
            done: 0.into(),
            layers_left: indexes.len().into(),
        });
        for index in indexes {
            let (counted, ended) = (Arc::clone(&progress), Arc::clone(&progress));
            let step = move |chunks: u64| _ = counted.done.fetch_add(chunks, Ordering::Relaxed);
            let end = move || _ = ended.layers_left.fetch_sub(1, Ordering::Release);
            self.cache.stream_layer(index, Box::new(step), Box::new(end));
        }
        progress
    }
}

#[cfg(test)]
mod tests;
