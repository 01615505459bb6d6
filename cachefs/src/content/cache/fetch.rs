//! Fetches from the shared store into the cache: on demand, ahead of it, and in streams.
//!
//! Each chunk is fetched once, whoever asks first: a reader that wants a chunk that is being prefetched joins that
//! fetch. Chunks that follow each other in a pack come with one request ([`super::extents`]). A prefetch reserves its
//! fetches only when a thread is about to make the request. So a chunk that is still queued for prefetching blocks
//! nobody: a reader that wants it fetches it at once.
//!
//! Requests to the shared disk run in the remote pool. What they bring is verified and written in the local pool, with
//! two exceptions: a chunk that comes alone is verified where it was read, and with a full backlog a chunk is written
//! by the thread that has verified it.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use store::blocks::Blocks;
use store::chunk::{ChunkRef, Codec, RawChunk, VerifiedChunk};
use store::layer::{LayerIndex, Source};

use super::ahead::Advice;
use super::content::Content;
use super::extents::extents;
use super::pending_read::{Missing, PendingRead};
use super::request::{Batches, ChunkRequest, Fetch, Filling, Stream};
use super::startup::{NeededPiece, PackedPiece, Startup};
use super::state::{BACKLOG, Cache, Prefetch};
use super::walk::Walk;
use crate::os::pool::{PREFETCHING, Priority};
use crate::source::failure::{Failure, Result};
use crate::source::single_flight::{Guard, Joined};

/// Programs and libraries of at most this many pieces (8 MiB) are fetched whole.
const PROGRAM_PIECES: u32 = 32;

impl Cache {
    /// Fetches the pieces that a read lacks.
    pub(super) fn fetch_all<F>(self: &Arc<Self>, content: &Content, missing: &[Missing], pending: &Arc<PendingRead<F>>)
    where
        F: FnOnce(Result<&[u8]>) + Send + 'static,
    {
        let deadline = self.shared_store.deadline();
        let mut requests = Vec::with_capacity(missing.len());
        let mut elsewhere = None;
        for missing in missing {
            if !self.join_startup(content, missing, deadline, pending, &mut requests) {
                elsewhere = Some(*missing);
                self.join_layer(content, missing, deadline, pending, &mut requests);
            }
        }
        self.submit(requests);
        if let Some(missing) = elsewhere {
            self.read_ahead(content, &missing);
        }
    }

    /// The request of a fetch that has just begun, or nothing if the cache has its chunk by now: an earlier fetch may
    /// have brought it between the reader's look into the cache and its joining. Such a chunk is not requested again,
    /// because the shared disk may hang.
    pub(super) fn unless_cached(self: &Arc<Self>, request: ChunkRequest) -> Option<ChunkRequest> {
        if self.complete_if_cached(&request) { None } else { Some(request) }
    }

    pub(super) fn submit(self: &Arc<Self>, requests: Vec<ChunkRequest>) {
        for extent in extents(requests, |request| &request.chunk) {
            let this = Arc::clone(self);
            self.pools.remote.submit(Priority::Demand, move || this.fetch(extent));
        }
    }

    /// Waits for a piece's chunk from a startup pack; returns whether one that is in use holds the piece.
    fn join_startup<F>(
        self: &Arc<Self>,
        content: &Content,
        missing: &Missing,
        deadline: Instant,
        pending: &Arc<PendingRead<F>>,
        requests: &mut Vec<ChunkRequest>,
    ) -> bool
    where
        F: FnOnce(Result<&[u8]>) + Send + 'static,
    {
        let place = self.startups.find(&content.inode.content_digest(), missing.number, missing.needed);
        let Some(place) = place else { return false };
        let Some(chunk) = place.chunk().copied() else { return false };
        let (this, content, pending) = (Arc::clone(self), content.clone(), Arc::clone(pending));
        let (in_layer, in_pack) = (*missing, Missing { chunk, start: place.start, held: place.blocks, ..*missing });
        let (startup, until) = (Arc::clone(&place.startup), deadline.min(self.shared_store.hint_deadline()));
        let done = move |result: Result<Arc<VerifiedChunk>>| match result {
            // A startup pack is a hint: what it cannot give, or not in time, comes from the layer.
            Err(failure) => {
                if failure == Failure::TimedOut && startup.is_silent(this.shared_store.hint_wait()) {
                    this.startups.remove(&startup);
                }
                // The clock's thread has others to tell.
                let pool = this.pools.local.clone();
                pool.submit(Priority::Demand, move || {
                    let mut requests = Vec::new();
                    this.join_layer(&content, &in_layer, deadline, &pending, &mut requests);
                    this.submit(requests);
                });
            }
            result => pending.take(&in_pack, result),
        };
        if self.fetches.join(Fetch::Startup(chunk.digest), until, Box::new(done)) == Joined::First {
            requests.push(ChunkRequest {
                chunk,
                filling: Filling::Startup(place.startup, place.position),
                stream: None,
            });
        }
        true
    }

    /// Waits for a piece's chunk from its layer's packs.
    fn join_layer<F>(
        self: &Arc<Self>,
        content: &Content,
        missing: &Missing,
        deadline: Instant,
        pending: &Arc<PendingRead<F>>,
        requests: &mut Vec<ChunkRequest>,
    ) where
        F: FnOnce(Result<&[u8]>) + Send + 'static,
    {
        let unwritten = self.unwritten.lock().get(&missing.chunk.digest).cloned();
        if let Some(chunk) = unwritten {
            return pending.take(missing, Ok(chunk));
        }
        let (pending, own) = (Arc::clone(pending), *missing);
        let done = Box::new(move |result: Result<Arc<VerifiedChunk>>| pending.take(&own, result));
        if self.fetches.join(Fetch::Layer(missing.chunk.digest), deadline, done) == Joined::First {
            requests.extend(self.unless_cached(ChunkRequest::of_layer(content.clone(), *missing)));
        }
    }

    /// Fetches chunks that somebody waits for, with one request.
    pub(super) fn fetch(self: &Arc<Self>, mut extent: Vec<ChunkRequest>) {
        let _guard = self.guard(&extent);
        extent.retain(|request| !self.fetches.abandon(&request.fetch()) && !self.complete_if_cached(request));
        self.bring(extent, Priority::Demand);
    }

    /// Fetches chunks that nobody has asked for yet, unless they are in the cache or being fetched.
    pub(super) fn prefetch(self: &Arc<Self>, requests: Vec<ChunkRequest>) {
        let is_start = || requests.first().is_some_and(ChunkRequest::is_of_startup);
        let has_room = self.disk.accepts() && !self.disk.is_crowded() || is_start() && self.make_room_at_start();
        if !has_room {
            return;
        }
        let lacking = requests.into_iter().filter(|request| !self.mark_if_here(request)).collect();
        for extent in extents(lacking, |request: &ChunkRequest| &request.chunk) {
            let is_needed =
                |request: &ChunkRequest| !self.mark_if_here(request) && self.fetches.reserve(request.fetch());
            let reserved: Vec<_> = extent.into_iter().filter(is_needed).collect();
            let _guard = self.guard(&reserved);
            for part in extents(reserved, |request| &request.chunk) {
                self.metrics().chunks_prefetched.add(part.len() as u64);
                self.bring(part, Priority::Prefetch);
            }
        }
    }

    fn guard(&self, requests: &[ChunkRequest]) -> Guard<'_, Fetch, Arc<VerifiedChunk>> {
        self.fetches.guard(requests.iter().map(ChunkRequest::fetch).collect())
    }

    /// Makes one request for chunks whose fetches this thread has begun; ends each fetch or passes it on.
    fn bring(self: &Arc<Self>, requests: Vec<ChunkRequest>, priority: Priority) {
        let chunks: Vec<_> = requests.iter().map(|request| request.chunk).collect();
        if chunks.is_empty() {
            return;
        }
        let fetches: Vec<_> = requests.iter().map(ChunkRequest::fetch).collect();
        let wanted = || fetches.iter().any(|fetch| self.fetches.is_wanted(fetch));
        self.metrics().extents_fetched.one();
        if let [chunk] = chunks[..] {
            let read = self.shared_store.fetch(wanted, |store| store.read_chunk(&chunk));
            if let Some(request) = requests.into_iter().next() {
                self.take(request, read, priority);
            }
            return;
        }
        match self.shared_store.fetch(wanted, |store| store.read_extent(&chunks)) {
            Ok(raw) => {
                // The processors share the unpacking, while this thread goes on with the next request.
                for (request, raw) in requests.into_iter().zip(raw) {
                    let this = Arc::clone(self);
                    self.pools.local.submit(Priority::Unpack, move || this.unpack(request, raw, priority));
                }
            }
            Err(Failure::Damaged) => {
                requests.into_iter().for_each(|request| self.bring(vec![request], priority));
            }
            Err(failure) => requests.into_iter().for_each(|request| self.fail(request, failure.clone(), priority)),
        }
    }

    fn unpack(self: &Arc<Self>, request: ChunkRequest, raw: RawChunk, priority: Priority) {
        let _guard = self.fetches.guard(vec![request.fetch()]);
        match raw.verify() {
            Ok(chunk) => self.take(request, Ok(chunk), priority),
            // Perhaps damaged on its way: it is read once more, and then the error counts.
            Err(_) => {
                let this = Arc::clone(self);
                self.pools.remote.submit(priority, move || {
                    let _guard = this.fetches.guard(vec![request.fetch()]);
                    this.bring(vec![request], priority);
                });
            }
        }
    }

    fn take(self: &Arc<Self>, request: ChunkRequest, read: Result<VerifiedChunk>, priority: Priority) {
        match read.and_then(|chunk| checked(&request, chunk)) {
            Ok(chunk) => {
                if priority == Priority::Demand {
                    self.expect_program(&request, &chunk);
                }
                self.deliver(request, Arc::new(chunk));
            }
            Err(failure) => self.fail(request, failure, priority),
        }
    }

    /// Answers all who wait for a chunk, and has it written into the cache.
    fn deliver(self: &Arc<Self>, request: ChunkRequest, chunk: Arc<VerifiedChunk>) {
        let key = request.fetch();
        self.metrics().chunks_fetched.one();
        self.metrics().bytes_from_store.add(request.chunk.stored_len.into());
        if let Filling::Startup(startup, position) = &request.filling {
            startup.fetched(*position);
        }
        self.fetches.complete(&key, Ok(Arc::clone(&chunk)));
        let this = Arc::clone(self);
        let fill = move || {
            let _guard = this.fetches.guard(vec![key]);
            if !this.fill(&request, &chunk) {
                this.unwritten.lock().put(request.chunk.digest, chunk);
            }
            this.fetches.forget(&key);
        };
        if self.pools.local.backlog() < BACKLOG { self.pools.local.submit(Priority::Background, fill) } else { fill() }
    }

    /// Handles a chunk that could not be fetched: those who wait get the failure, or are served in another way.
    fn fail(self: &Arc<Self>, request: ChunkRequest, failure: Failure, priority: Priority) {
        // The layer's index refers to a pack that is gone: for the reader of a file that is damage, not absence.
        let failure = if failure == Failure::Absent { Failure::Damaged } else { failure };
        let key = request.fetch();
        match &request.filling {
            Filling::Startup(startup, position) => {
                startup.finish(*position);
                self.fetches.complete(&key, Err(failure));
            }
            // A prefetch gives up at once. If a reader has joined it meanwhile, the chunk is requested again on demand.
            Filling::Layer(..) if priority == Priority::Prefetch => {
                if !self.fetches.abandon(&key) {
                    self.submit(vec![request]);
                }
            }
            Filling::Layer(..) => self.fetches.complete(&key, Err(failure)),
        }
    }

    /// Completes a fetch from the cache, if an earlier fetch brought its chunk there after this reader's look; returns
    /// whether it did.
    fn complete_if_cached(&self, request: &ChunkRequest) -> bool {
        let Filling::Layer(wanted) = &request.filling else { return false };
        let (content, missing) = &**wanted;
        let Some(chunk) = self.arrived(content, missing) else { return false };
        self.fetches.complete(&request.fetch(), Ok(Arc::new(chunk)));
        self.fetches.forget(&request.fetch());
        true
    }

    fn arrived(&self, content: &Content, missing: &Missing) -> Option<VerifiedChunk> {
        let Missing { number, piece, chunk, start, .. } = missing;
        if content.inode.piece_count() == 1 {
            return self.cached_chunk(chunk);
        }
        if *start != 0 || piece.len != chunk.raw_len {
            return None;
        }
        let cache_file = self.cache_file(content).filter(|cache_file| cache_file.here(*number) == Blocks::ALL)?;
        let mut bytes = vec![0; piece.len as usize];
        cache_file.read(&mut bytes, piece.offset).ok()?;
        RawChunk::new(ChunkRef { codec: Codec::Plain, ..*chunk }, bytes).verify().ok()
    }

    /// Whether the local cache has all that a chunk would fill. If so, a startup pack's chunk counts as done from now
    /// on.
    fn mark_if_here(&self, request: &ChunkRequest) -> bool {
        let is_here = self.is_here(request);
        if is_here && let Filling::Startup(startup, position) = &request.filling {
            startup.finish(*position);
        }
        is_here
    }

    /// Whether the local cache has all that a chunk would fill.
    fn is_here(&self, request: &ChunkRequest) -> bool {
        match &request.filling {
            Filling::Layer(wanted) => self.has_piece(&wanted.0, wanted.1.number, Blocks::ALL, &request.chunk),
            Filling::Startup(startup, position) => {
                let held = startup.held_in(*position);
                let is_here = |PackedPiece { needed, .. }: &PackedPiece| {
                    let chunk = needed.piece.source.chunk();
                    chunk.is_some_and(|chunk| self.has_piece(&needed.content, needed.number, needed.blocks, &chunk))
                };
                startup.is_done(*position) || held.iter().all(is_here)
            }
        }
    }

    fn has_piece(&self, content: &Content, number: u32, blocks: Blocks, chunk: &ChunkRef) -> bool {
        match content.inode.piece_count() {
            1 => self.has_small(content, chunk),
            _ => self.cache_file(content).is_some_and(|cache_file| cache_file.here(number).contains(blocks)),
        }
    }

    /// Fetches some chunks behind a piece that the cache lacked.
    fn read_ahead(self: &Arc<Self>, content: &Content, missing: &Missing) {
        let Source::Chunk { number, .. } = missing.piece.source else { return };
        if self.prefetch == Prefetch::Off {
            return;
        }
        let layer = content.index.diff_id();
        // The lock is released here: a stream that ends at once takes it again.
        let advice = self.ahead.lock().missed(&layer, number, content.index.chunk_count());
        match advice {
            Advice::ReadAhead(range) if !range.is_empty() => {
                let (this, content, from) = (Arc::clone(self), content.clone(), missing.number + 1);
                self.pools.remote.submit(Priority::Prefetch, move || {
                    let requests = Walk::new(Arc::clone(&content.index), content.number.0, from).within(range);
                    this.prefetch(requests);
                });
            }
            Advice::Stream => {
                tracing::debug!("layer {layer} is streamed, for much of it is read");
                self.metrics().layers_streamed.one();
                let this = Arc::clone(self);
                let ended = move || this.ahead.lock().streamed(&layer);
                self.stream_layer(&content.index, Box::new(|_| {}), Box::new(ended));
            }
            Advice::ReadAhead(_) | Advice::Nothing => {}
        }
    }

    /// Prefetches the rest of a program or library whose beginning was just read, if it is not too large. It is about
    /// to be mapped, and then read at places that no earlier read foretells.
    fn expect_program(self: &Arc<Self>, request: &ChunkRequest, chunk: &VerifiedChunk) {
        let Filling::Layer(wanted) = &request.filling else { return };
        let (content, missing) = &**wanted;
        let is_beginning = missing.number == 0 && (2..=PROGRAM_PIECES).contains(&content.inode.piece_count());
        if self.prefetch == Prefetch::On && is_beginning && chunk.bytes().starts_with(b"\x7fELF") {
            let (this, content) = (Arc::clone(self), content.clone());
            self.pools.remote.submit(Priority::Prefetch, move || {
                let rest = Walk::new(Arc::clone(&content.index), content.number.0, 1).rest_of_file();
                this.prefetch(rest);
            });
        }
    }

    /// Fetches all of a layer into the cache, as far as there is room, while nobody waits for anything else. `step` is
    /// called with the number of chunks of each request when the request begins; `ended` is called when all are done
    /// and written.
    pub fn stream_layer(
        self: &Arc<Self>,
        index: &Arc<LayerIndex>,
        step: Box<dyn Fn(u64) + Send>,
        ended: Box<dyn FnOnce() + Send>,
    ) {
        let mut walk = Walk::new(Arc::clone(index), 0, 0);
        let batches = move || walk.next_extent().inspect(|requests| step(requests.len() as u64));
        self.stream(Box::new(batches), ended);
    }

    /// How many of a layer's chunks the cache lacks.
    pub fn lacking(&self, index: &Arc<LayerIndex>) -> u64 {
        let mut walk = Walk::new(Arc::clone(index), 0, 0);
        let requests = std::iter::from_fn(|| walk.next_extent()).flatten();
        let here = requests.filter(|request| self.is_here(request)).count();
        // What a damaged index does not lead to is lacking, too.
        u64::from(index.chunk_count()).saturating_sub(here as u64)
    }

    /// Fetches a startup pack into the cache from front to back, then what it only names from the layers; reads use it
    /// meanwhile. The first `claimed` chunks are being read already, and arrive through [`Cache::startup_arrived`].
    pub fn use_startup(self: &Arc<Self>, startup: &Arc<Startup>, claimed: u32) {
        self.metrics().startups_used.one();
        self.startups.add(startup);
        let mut requests: Vec<_> = (0..).map_while(|position| startup_request(startup, position)).collect();
        let rest = requests.split_off(requests.len().min(claimed as usize));
        let accepts = self.disk.accepts() || self.make_room_at_start();
        for (position, request) in (0..).zip(&requests) {
            if accepts && !self.mark_if_here(request) && self.fetches.reserve(request.fetch()) {
                startup.reserve(position);
            }
        }
        let named = Arc::clone(startup);
        let named =
            std::iter::from_fn(move || Some(layer_requests(named.next_named())).filter(|next| !next.is_empty()));
        let mut batches =
            std::iter::once(rest).chain(named).flat_map(|requests| extents(requests, |request| &request.chunk));
        let (this, startup) = (Arc::clone(self), Arc::clone(startup));
        let ended = move || this.startups.remove(&startup);
        self.stream(Box::new(move || batches.next()), Box::new(ended));
    }

    /// Takes one of the first chunks of a startup pack; `raw` is nothing if it could not be read.
    pub fn startup_arrived(self: &Arc<Self>, startup: &Arc<Startup>, position: u32, raw: Option<RawChunk>) {
        let Some(request) = startup_request(startup, position).filter(|_| startup.take_reservation(position)) else {
            return;
        };
        let Some(raw) = raw else { return self.fail(request, Failure::Unreachable, Priority::Prefetch) };
        self.metrics().chunks_prefetched.one();
        let this = Arc::clone(self);
        // This needs no shared disk, and the container wants it first of all.
        self.pools.local.submit(Priority::Unpack, move || this.unpack(request, raw, Priority::Prefetch));
    }

    fn stream(self: &Arc<Self>, batches: Batches, ended: Box<dyn FnOnce() + Send>) {
        let (batches, ended) = (Mutex::new(Some(batches)), Mutex::new(Some(ended)));
        let stream = Arc::new(Stream { batches, ended });
        for _ in 0..PREFETCHING {
            self.step(Arc::clone(&stream));
        }
    }

    /// Makes one request of a stream, then queues the next one behind other prefetching.
    fn step(self: &Arc<Self>, stream: Arc<Stream>) {
        let this = Arc::clone(self);
        self.pools.remote.submit(Priority::Prefetch, move || {
            let mut batches = stream.batches.lock();
            let next = batches.as_mut().and_then(|next| next());
            if next.is_none() {
                *batches = None;
            }
            drop(batches);
            if let Some(mut requests) = next {
                requests.iter_mut().for_each(|request| request.stream = Some(Arc::clone(&stream)));
                this.prefetch(requests);
                this.step(stream);
            }
        });
    }
}

/// Compares the content of a startup pack's chunk with the digests in the layers' indexes.
fn checked(request: &ChunkRequest, chunk: VerifiedChunk) -> Result<VerifiedChunk> {
    let Filling::Startup(startup, position) = &request.filling else { return Ok(chunk) };
    let good =
        startup.held_in(*position).iter().all(|PackedPiece { needed: NeededPiece { piece, blocks, .. }, start }| {
            let packed = chunk.piece(*start, blocks.packed_len(piece.len));
            packed.is_some_and(|packed| blocks.verify(packed, piece.len, &piece.digest))
        });
    if good {
        return Ok(chunk);
    }
    tracing::error!("the startup pack of chain {} does not hold what it says; its layers serve instead", startup.chain);
    Err(Failure::Damaged)
}

/// Requests for pieces as their layers have them, in the order of the packs: neighbours come with one request.
fn layer_requests(pieces: &[NeededPiece]) -> Vec<ChunkRequest> {
    let request = |needed: &NeededPiece| match needed.piece.source {
        Source::Hole => None,
        Source::Chunk { chunk, start, .. } => {
            let missing = Missing::in_layer(needed.number, needed.piece, Blocks::ALL, chunk, start);
            Some(ChunkRequest::of_layer(needed.content.clone(), missing))
        }
    };
    let mut requests: Vec<_> = pieces.iter().filter_map(request).collect();
    requests.sort_by_key(|request| (request.chunk.pack, request.chunk.offset));
    requests
}

fn startup_request(startup: &Arc<Startup>, position: u32) -> Option<ChunkRequest> {
    let chunk = *startup.chunks().get(position as usize)?;
    Some(ChunkRequest { chunk, filling: Filling::Startup(Arc::clone(startup), position), stream: None })
}
