//! What an image's earlier starts needed, brought before it is asked for.
//!
//! When an image is first looked into, its startup pack (what the coordinator has learned from traces) is read from front to
//! back while the container starts, and the recorder notes what this start reads. A startup pack is a hint: it fails nothing,
//! is trusted as little as any bytes, and makes way for whatever somebody waits for.
//!
//! `images` are known by their top chain. Docker's data-root looks into single layers: the top one tells the image.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;
use store::Digest;
use store::chunk::RawChunk;
use store::layer::{LayerIndex, Source};
use store::profile::{StartupPiece, StartupRecord, StartupTable};

use crate::cache::startup::{Held, Startup};
use crate::cache::{Cache, Content, Prefetch};
use crate::catalogue::Follower;
use crate::failure::{Failure, Result};
use crate::indexes::Indexes;
use crate::origin::Origin;
use crate::pool::{Pool, Priority};
use crate::recorder::Recorder;

/// What is read of a startup pack while the layers' indexes are under way, bytes.
const HEAD: u32 = 1 << 20;

/// Puts startup packs to use.
pub struct Prefetcher {
    origin: Arc<Origin>,
    pool: Pool,
    follower: Arc<Follower>,
    indexes: Arc<Indexes>,
    cache: Arc<Cache>,
    recorder: Arc<Recorder>,
    /// Guards the chains that were looked into in this daemon's life.
    begun: Mutex<HashSet<Digest>>,
}

/// A startup pack that waits for its beginning and its layers' indexes; whoever brings the last of them goes on.
struct Gathering {
    record: Arc<StartupRecord>,
    /// Guards what has come so far.
    parts: Mutex<Parts>,
}

/// A startup pack's table, and the first of its chunks.
type Head = (StartupTable, Vec<RawChunk>);

struct Parts {
    head: Option<Head>,
    indexes: Vec<Option<Arc<LayerIndex>>>,
}

impl Parts {
    fn all(&mut self) -> Option<(Head, Vec<Arc<LayerIndex>>)> {
        let indexes = self.indexes.iter().cloned().collect::<Option<Vec<_>>>()?;
        Some((self.head.take()?, indexes))
    }
}

impl Prefetcher {
    /// Prefetches into `cache`.
    pub fn new(
        origin: Arc<Origin>,
        pool: Pool,
        follower: Arc<Follower>,
        indexes: Arc<Indexes>,
        cache: Arc<Cache>,
        recorder: Arc<Recorder>,
    ) -> Prefetcher {
        Prefetcher { origin, pool, follower, indexes, cache, recorder, begun: Mutex::default() }
    }

    /// Somebody looks into a chain: if it is an image's and this is the first time, a start begins.
    pub fn looked_into(self: &Arc<Self>, chain: &Digest) {
        if self.begun.lock().contains(chain) {
            return;
        }
        let view = self.follower.view();
        let Some(layers) = view.chain(chain).filter(|_| view.is_image(chain)) else { return };
        if !self.begun.lock().insert(*chain) {
            return;
        }
        self.recorder.begin(*chain, layers.clone());
        if let Some(record) = view.catalogue().startup(chain)
            && self.cache.prefetching() == Prefetch::On
        {
            self.gather(Arc::clone(record), layers);
        }
    }

    /// Somebody looks into a layer: if it is the top one of an image, that is looked into.
    pub fn looked_into_layer(self: &Arc<Self>, layer: &Digest) {
        for chain in self.follower.view().images_on(layer) {
            self.looked_into(chain);
        }
    }

    fn gather(self: &Arc<Self>, record: Arc<StartupRecord>, layers: Vec<Digest>) {
        let parts = Mutex::new(Parts { head: None, indexes: vec![None; layers.len()] });
        let gathering = Arc::new(Gathering { record, parts });
        let (this, own) = (Arc::clone(self), Arc::clone(&gathering));
        self.pool.submit(Priority::Background, move || {
            match this.origin.fetch(|| false, |store| store.startup_head(&own.record, HEAD)) {
                Ok(head) => this.came(&own, |parts| parts.head = Some(head)),
                Err(failure) => tracing::warn!("chain {} starts without its startup pack: {failure}", own.record.chain),
            }
        });
        for (position, layer) in layers.into_iter().enumerate() {
            let (this, gathering) = (Arc::clone(self), Arc::clone(&gathering));
            let loaded = move |result: Result<Arc<LayerIndex>>| {
                if let Ok(index) = result {
                    this.came(&gathering, |parts| parts.indexes[position] = Some(index));
                }
            };
            self.indexes.load(layer, self.origin.deadline(), Box::new(loaded));
        }
    }

    fn came(self: &Arc<Self>, gathering: &Gathering, put: impl FnOnce(&mut Parts)) {
        let mut parts = gathering.parts.lock();
        put(&mut parts);
        let all = parts.all();
        drop(parts);
        if let Some(((table, head), indexes)) = all {
            self.begin(&gathering.record, &table, head, &indexes);
        }
    }

    fn begin(&self, record: &StartupRecord, table: &StartupTable, head: Vec<RawChunk>, indexes: &[Arc<LayerIndex>]) {
        let mut held: Vec<Vec<Held>> = table.chunks.iter().map(|_| Vec::new()).collect();
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
        self.cache.use_startup(startup, head);
    }
}

/// Finds a startup pack's piece in its layer.
fn resolve(piece: &StartupPiece, indexes: &[Arc<LayerIndex>]) -> Result<Held> {
    let index = indexes.get(usize::from(piece.layer)).ok_or(Failure::Damaged)?;
    let inode = index.inode(piece.inode).map_err(|error| Failure::from(&error))?;
    let found = index.piece(&inode, piece.piece).map_err(|error| Failure::from(&error))?;
    if found.source == Source::Hole {
        return Err(Failure::Damaged);
    }
    let content = Content { index: Arc::clone(index), number: piece.inode, inode };
    Ok(Held { layer: piece.layer, content, number: piece.piece, piece: found, start: piece.start })
}

/// How far a whole image has come.
pub struct Progress {
    /// Chunks of its layers.
    pub chunks: u64,
    done: AtomicU64,
    layers_left: AtomicUsize,
}

impl Progress {
    /// Chunks that have been seen to.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Whether all layers have been seen to.
    pub fn is_over(&self) -> bool {
        self.layers_left.load(Ordering::Acquire) == 0
    }
}

impl Prefetcher {
    /// Begins to bring all layers of a chain into the cache; `begun` is called with what tells how far it is, or why not.
    pub fn whole(self: &Arc<Self>, chain: &Digest, begun: impl FnOnce(Result<Arc<Progress>>) + Send + 'static) {
        let Some(layers) = self.follower.view().chain(chain) else { return begun(Err(Failure::Absent)) };
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
            self.indexes.load(layer, self.origin.deadline(), Box::new(loaded));
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
