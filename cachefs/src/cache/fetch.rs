//! From the shared store into the cache: on demand, ahead of it, and in streams.
//!
//! Whatever brings a chunk, its flight is one: a reader that wants what is being prefetched joins it. Chunks that follow
//! each other in a pack come with one request ([`super::extents`]). A prefetch reserves flights for one request, when a thread is
//! about to make it, so what merely waits its turn stands in nobody's way: a reader that wants it fetches it at once.
//!
//! Whatever asks the shared disk runs in the remote pool; verifying and writing what came from it, in the local one.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use store::ContentDigest;
use store::chunk::{ChunkRef, Codec, RawChunk, VerifiedChunk};
use store::layer::{InodeIndex, LayerIndex, Source};

use super::ahead::Advice;
use super::body::PieceState;
use super::extents::extents;
use super::gather::{Missing, PendingRead};
use super::startup::{Held, Startup};
use super::walk::Walk;
use super::{BACKLOG, Cache, Content, Prefetch};
use crate::failure::{Failure, Result};
use crate::pool::{PREFETCHING, Priority};
use crate::single_flight::{Boarding, Guard};

/// Programs and libraries of at most so many pieces are brought whole: 8 MiB.
const PROGRAM_PIECES: u32 = 32;

/// What of the local cache a chunk fills.
#[derive(Clone)]
pub(super) enum Filling {
    /// A piece of a file and, where small files share the chunk, its neighbours.
    Layer(Box<(Content, Missing)>),
    /// What a startup pack holds in the chunk at this position.
    Startup(Arc<Startup>, u32),
}

/// A chunk that is to be brought.
#[derive(Clone)]
pub(super) struct Order {
    pub(super) chunk: ChunkRef,
    pub(super) filling: Filling,
    /// The stream that brings it, which lasts until the chunk is written.
    stream: Option<Arc<Stream>>,
}

impl Order {
    pub(super) fn of_layer(content: Content, missing: Missing) -> Order {
        Order { chunk: missing.chunk, filling: Filling::Layer(Box::new((content, missing))), stream: None }
    }
}

/// Gives the next request of a stream, or nothing at its end.
type Requests = Box<dyn FnMut() -> Option<Vec<Order>> + Send>;

/// Requests that are made one after the other, a few at once, as long as nobody waits for something else. It ends when the last
/// job that works on it has ended, by a panic too, and what it brought is written: its orders hold it.
struct Stream {
    /// Guards where the next request comes from; holds nothing after the last. Never held during I/O.
    requests: Mutex<Option<Requests>>,
    /// Guards who is told of the end.
    ended: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(ended) = self.ended.get_mut().take() {
            ended();
        }
    }
}

impl Cache {
    /// Fetches what a read lacks.
    pub(super) fn fetch_all<F>(self: &Arc<Self>, content: &Content, missing: &[Missing], gather: &Arc<PendingRead<F>>)
    where
        F: FnOnce(Result<&[u8]>) + Send + 'static,
    {
        let deadline = self.origin.deadline();
        let mut orders = Vec::with_capacity(missing.len());
        let mut elsewhere = None;
        for missing in missing {
            if !self.board_startup(content, missing, deadline, gather, &mut orders) {
                elsewhere = Some(*missing);
                self.board_layer(content, missing, deadline, gather, &mut orders);
            }
        }
        self.submit(orders);
        if let Some(missing) = elsewhere {
            self.read_ahead(content, &missing);
        }
    }

    /// The order of a flight that has just begun, unless an earlier one brought its chunk between the reader's look into the cache
    /// and the boarding: what is here needs no shared disk, which may hang.
    pub(super) fn order(self: &Arc<Self>, order: Order) -> Option<Order> {
        if self.has_arrived(&order) { None } else { Some(order) }
    }

    pub(super) fn submit(self: &Arc<Self>, orders: Vec<Order>) {
        for extent in extents(orders, |order| &order.chunk) {
            let this = Arc::clone(self);
            self.pools.remote.submit(Priority::Demand, move || this.fetch(extent));
        }
    }

    /// Waits for a piece's chunk in a startup pack, if one that is in use holds it; tells whether it does.
    fn board_startup<F>(
        self: &Arc<Self>,
        content: &Content,
        missing: &Missing,
        deadline: Instant,
        gather: &Arc<PendingRead<F>>,
        orders: &mut Vec<Order>,
    ) -> bool
    where
        F: FnOnce(Result<&[u8]>) + Send + 'static,
    {
        let Some(place) = self.startups.find(&content.inode.content_digest(), missing.number) else { return false };
        let Some(chunk) = place.chunk().copied() else { return false };
        let (this, content, gather) = (Arc::clone(self), content.clone(), Arc::clone(gather));
        let (in_layer, in_pack) = (*missing, Missing { chunk, start: place.start, ..*missing });
        let done = move |result: Result<Arc<VerifiedChunk>>| match result {
            // A startup pack is a hint: what it cannot give, the layer does.
            Err(failure) if failure != Failure::TimedOut => {
                let mut orders = Vec::new();
                this.board_layer(&content, &in_layer, deadline, &gather, &mut orders);
                this.submit(orders);
            }
            result => gather.take(&in_pack, result),
        };
        if self.flights.board(chunk.digest, deadline, Box::new(done)) == Boarding::First {
            orders.push(Order { chunk, filling: Filling::Startup(place.startup, place.position), stream: None });
        }
        true
    }

    /// Waits for a piece's chunk in its layer's packs.
    fn board_layer<F>(
        self: &Arc<Self>,
        content: &Content,
        missing: &Missing,
        deadline: Instant,
        gather: &Arc<PendingRead<F>>,
        orders: &mut Vec<Order>,
    ) where
        F: FnOnce(Result<&[u8]>) + Send + 'static,
    {
        let unwritten = self.unwritten.lock().get(&missing.chunk.digest).cloned();
        if let Some(chunk) = unwritten {
            return gather.take(missing, Ok(chunk));
        }
        let (gather, own) = (Arc::clone(gather), *missing);
        let done = Box::new(move |result: Result<Arc<VerifiedChunk>>| gather.take(&own, result));
        if self.flights.board(missing.chunk.digest, deadline, done) == Boarding::First {
            orders.extend(self.order(Order::of_layer(content.clone(), *missing)));
        }
    }

    /// Brings what somebody waits for, with one request.
    pub(super) fn fetch(self: &Arc<Self>, mut extent: Vec<Order>) {
        let _guard = self.guard(&extent);
        extent.retain(|order| !self.flights.abandon(&order.chunk.digest) && !self.has_arrived(order));
        self.bring(extent, Priority::Demand);
    }

    /// Brings what nobody asked for yet, unless it is here or on its way.
    pub(super) fn prefetch(self: &Arc<Self>, orders: Vec<Order>) {
        if !self.disk.accepts() || self.disk.is_crowded() {
            return;
        }
        let lacking = orders.into_iter().filter(|order| !self.is_here(order)).collect();
        for extent in extents(lacking, |order: &Order| &order.chunk) {
            let is_needed = |order: &Order| !self.is_here(order) && self.flights.reserve(order.chunk.digest);
            let reserved: Vec<_> = extent.into_iter().filter(is_needed).collect();
            let _guard = self.guard(&reserved);
            for part in extents(reserved, |order| &order.chunk) {
                self.metrics().chunks_prefetched.add(part.len() as u64);
                self.bring(part, Priority::Prefetch);
            }
        }
    }

    fn guard(&self, orders: &[Order]) -> Guard<'_, ContentDigest, Arc<VerifiedChunk>> {
        self.flights.guard(orders.iter().map(|order| order.chunk.digest).collect())
    }

    /// One request for chunks whose flights are ours; each ends or is handed on.
    fn bring(self: &Arc<Self>, orders: Vec<Order>, priority: Priority) {
        let chunks: Vec<_> = orders.iter().map(|order| order.chunk).collect();
        if chunks.is_empty() {
            return;
        }
        let wanted = || chunks.iter().any(|chunk| self.flights.is_wanted(&chunk.digest));
        self.metrics().extents_fetched.one();
        if let [chunk] = chunks[..] {
            let read = self.origin.fetch(wanted, |store| store.read_chunk(&chunk));
            if let Some(order) = orders.into_iter().next() {
                self.take(order, read, priority);
            }
            return;
        }
        match self.origin.fetch(wanted, |store| store.read_extent(&chunks)) {
            Ok(raw) => {
                // The processors share the unpacking, and this thread goes on with the next request meanwhile.
                for (order, raw) in orders.into_iter().zip(raw) {
                    let this = Arc::clone(self);
                    self.pools.local.submit(Priority::Unpack, move || this.unpack(order, raw, priority));
                }
            }
            Err(Failure::Damaged) => {
                orders.into_iter().for_each(|order| self.bring(vec![order], priority));
            }
            Err(failure) => orders.into_iter().for_each(|order| self.fail(order, failure.clone(), priority)),
        }
    }

    fn unpack(self: &Arc<Self>, order: Order, raw: RawChunk, priority: Priority) {
        let _guard = self.flights.guard(vec![order.chunk.digest]);
        match raw.verify() {
            Ok(chunk) => self.take(order, Ok(chunk), priority),
            // Perhaps damaged on its way: once more, and then it counts.
            Err(_) => {
                let this = Arc::clone(self);
                self.pools.remote.submit(priority, move || {
                    let _guard = this.flights.guard(vec![order.chunk.digest]);
                    this.bring(vec![order], priority);
                });
            }
        }
    }

    fn take(self: &Arc<Self>, order: Order, read: Result<VerifiedChunk>, priority: Priority) {
        match read.and_then(|chunk| checked(&order, chunk)) {
            Ok(chunk) => {
                if priority == Priority::Demand {
                    self.expect_program(&order, &chunk);
                }
                self.land(order, Arc::new(chunk));
            }
            Err(failure) => self.fail(order, failure, priority),
        }
    }

    /// Tells all who wait for a chunk, and has it written into the cache.
    fn land(self: &Arc<Self>, order: Order, chunk: Arc<VerifiedChunk>) {
        let key = order.chunk.digest;
        self.metrics().chunks_fetched.one();
        self.metrics().bytes_from_store.add(order.chunk.stored_len.into());
        if let Filling::Startup(startup, position) = &order.filling {
            startup.fetched(*position);
        }
        self.flights.land(&key, Ok(Arc::clone(&chunk)));
        let this = Arc::clone(self);
        let fill = move || {
            let _guard = this.flights.guard(vec![key]);
            if !this.fill(&order, &chunk) {
                this.unwritten.lock().put(key, chunk);
            }
            this.flights.finish(&key);
        };
        match self.pools.local.backlog() < BACKLOG {
            true => self.pools.local.submit(Priority::Background, fill),
            false => fill(),
        }
    }

    /// A chunk could not be brought: whoever waits is told, or served in another way.
    fn fail(self: &Arc<Self>, order: Order, failure: Failure, priority: Priority) {
        // The layer's index refers to a pack that is gone: for the reader of a file that is damage, not absence.
        let failure = if failure == Failure::Absent { Failure::Damaged } else { failure };
        let key = order.chunk.digest;
        match &order.filling {
            Filling::Startup(startup, position) => {
                startup.finish(*position);
                self.flights.land(&key, Err(failure));
            }
            // Prefetching gives up at once; a reader that joined it meanwhile does not.
            Filling::Layer(..) if priority == Priority::Prefetch => {
                if !self.flights.abandon(&key) {
                    self.submit(vec![order]);
                }
            }
            Filling::Layer(..) => self.flights.land(&key, Err(failure)),
        }
    }

    /// Lands a chunk that an earlier flight has brought into the cache between this reader's look there and its boarding;
    /// tells whether that was so.
    fn has_arrived(&self, order: &Order) -> bool {
        let Filling::Layer(wanted) = &order.filling else { return false };
        let (content, missing) = &**wanted;
        let Some(chunk) = self.arrived(content, missing) else { return false };
        self.flights.land(&order.chunk.digest, Ok(Arc::new(chunk)));
        self.flights.finish(&order.chunk.digest);
        true
    }

    fn arrived(&self, content: &Content, missing: &Missing) -> Option<VerifiedChunk> {
        let Missing { number, piece, chunk, start } = missing;
        if content.inode.piece_count() == 1 {
            return self.cached_chunk(chunk);
        }
        if *start != 0 || piece.len != chunk.raw_len {
            return None;
        }
        let body = self.body(content).filter(|body| !matches!(body.state(*number), PieceState::Absent))?;
        let mut bytes = vec![0; piece.len as usize];
        body.read(&mut bytes, piece.offset).ok()?;
        RawChunk::new(ChunkRef { codec: Codec::Plain, ..*chunk }, bytes).verify().ok()
    }

    /// Whether the local cache has what a chunk would fill.
    fn is_here(&self, order: &Order) -> bool {
        match &order.filling {
            Filling::Layer(wanted) => self.has_piece(&wanted.0, wanted.1.number, &order.chunk),
            Filling::Startup(startup, position) => {
                let held = startup.held_in(*position);
                let is_here = |held: &Held| {
                    let chunk = held.piece.source.chunk();
                    chunk.is_some_and(|chunk| self.has_piece(&held.content, held.number, &chunk))
                };
                let here = startup.is_done(*position) || held.iter().all(is_here);
                if here {
                    startup.finish(*position);
                }
                here
            }
        }
    }

    fn has_piece(&self, content: &Content, number: u32, chunk: &ChunkRef) -> bool {
        match content.inode.piece_count() {
            1 => self.has_small(content, chunk),
            _ => self.body(content).is_some_and(|body| body.state(number) != PieceState::Absent),
        }
    }

    /// Fetches some of what lies behind a piece that was not at hand.
    fn read_ahead(self: &Arc<Self>, content: &Content, missing: &Missing) {
        let Source::Chunk { number, .. } = missing.piece.source else { return };
        if self.prefetch == Prefetch::Off {
            return;
        }
        let layer = content.index.diff_id();
        // The lock is let go of here: a stream that ends at once takes it again.
        let advice = self.ahead.lock().missed(&layer, number, content.index.chunk_count());
        match advice {
            Advice::ReadAhead(range) if !range.is_empty() => {
                let (this, content, from) = (Arc::clone(self), content.clone(), missing.number + 1);
                self.pools.remote.submit(Priority::Prefetch, move || {
                    let orders = Walk::new(Arc::clone(&content.index), content.number.0, from).within(range);
                    this.prefetch(orders);
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

    /// A program or library whose beginning is asked for is about to be mapped, and then read at places that follow no order:
    /// the rest of it comes along, if it is not too large.
    fn expect_program(self: &Arc<Self>, order: &Order, chunk: &VerifiedChunk) {
        let Filling::Layer(wanted) = &order.filling else { return };
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

    /// Brings all of a layer into the cache, as far as there is room, while nobody waits for anything else. `step` is told
    /// how many chunks more have been seen to, `ended` when all have.
    pub fn stream_layer(
        self: &Arc<Self>,
        index: &Arc<LayerIndex>,
        step: Box<dyn Fn(u64) + Send>,
        ended: Box<dyn FnOnce() + Send>,
    ) {
        let mut walk = Walk::new(Arc::clone(index), 0, 0);
        let requests = move || walk.next_extent().inspect(|orders| step(orders.len() as u64));
        self.stream(Box::new(requests), ended);
    }

    /// Brings a startup pack into the cache, first things first; reads use it meanwhile. The first `claimed` chunks are being
    /// read already and come by [`Cache::startup_arrived`].
    pub fn use_startup(self: &Arc<Self>, startup: &Arc<Startup>, claimed: u32) {
        self.metrics().startups_used.one();
        self.startups.add(startup);
        let mut orders: Vec<_> = (0..).map_while(|position| startup_order(startup, position)).collect();
        let rest = orders.split_off(orders.len().min(claimed as usize));
        for (position, order) in (0..).zip(&orders) {
            if self.disk.accepts() && !self.is_here(order) && self.flights.reserve(order.chunk.digest) {
                startup.reserve(position);
            }
        }
        let mut requests = extents(rest, |order: &Order| &order.chunk).into_iter();
        let (this, startup) = (Arc::clone(self), Arc::clone(startup));
        let ended = move || this.startups.remove(&startup);
        self.stream(Box::new(move || requests.next()), Box::new(ended));
    }

    /// One of the first chunks of a startup pack has come, or will not.
    pub fn startup_arrived(self: &Arc<Self>, startup: &Arc<Startup>, position: u32, raw: Option<RawChunk>) {
        let Some(order) = startup_order(startup, position).filter(|_| startup.is_reserved(position)) else { return };
        let Some(raw) = raw else { return self.fail(order, Failure::Unreachable, Priority::Prefetch) };
        self.metrics().chunks_prefetched.one();
        let this = Arc::clone(self);
        // Nothing is asked of the shared disk, and the container wants it first of all.
        self.pools.local.submit(Priority::Unpack, move || this.unpack(order, raw, Priority::Prefetch));
    }

    /// Has the system read a piece of the local cache into memory.
    pub fn warm(&self, index: &Arc<LayerIndex>, number: InodeIndex, piece: u32) {
        let Ok(inode) = index.inode(number) else { return };
        let content = Content { index: Arc::clone(index), number, inode };
        let Ok(piece) = content.piece(piece) else { return };
        let Some(chunk) = piece.source.chunk() else { return };
        let found = match inode.piece_count() {
            1 => self.chunk_body(&chunk).map(|body| (body, 0, u64::from(chunk.raw_len))),
            _ => None,
        };
        let own = || self.body(&content).map(|body| (body, piece.offset, u64::from(piece.len)));
        if let Some((body, offset, len)) = found.or_else(own) {
            body.will_need(offset, len);
        }
    }

    fn stream(self: &Arc<Self>, requests: Requests, ended: Box<dyn FnOnce() + Send>) {
        let (requests, ended) = (Mutex::new(Some(requests)), Mutex::new(Some(ended)));
        let stream = Arc::new(Stream { requests, ended });
        for _ in 0..PREFETCHING {
            self.step(Arc::clone(&stream));
        }
    }

    /// One request of a stream, and the next one in turn behind others' prefetching.
    fn step(self: &Arc<Self>, stream: Arc<Stream>) {
        let this = Arc::clone(self);
        self.pools.remote.submit(Priority::Prefetch, move || {
            let mut requests = stream.requests.lock();
            let next = requests.as_mut().and_then(|next| next());
            if next.is_none() {
                *requests = None;
            }
            drop(requests);
            if let Some(mut orders) = next {
                orders.iter_mut().for_each(|order| order.stream = Some(Arc::clone(&stream)));
                this.prefetch(orders);
                this.step(stream);
            }
        });
    }
}

/// What a startup pack's chunk holds is compared with the digests that the layers' indexes have.
fn checked(order: &Order, chunk: VerifiedChunk) -> Result<VerifiedChunk> {
    let Filling::Startup(startup, position) = &order.filling else { return Ok(chunk) };
    let good = startup.held_in(*position).iter().all(|held| {
        chunk.piece(held.start, held.piece.len).is_some_and(|bytes| ContentDigest::of(bytes) == held.piece.digest)
    });
    if good {
        return Ok(chunk);
    }
    tracing::error!("the startup pack of chain {} does not hold what it says; its layers serve instead", startup.chain);
    Err(Failure::Damaged)
}

fn startup_order(startup: &Arc<Startup>, position: u32) -> Option<Order> {
    let chunk = *startup.chunks().get(position as usize)?;
    Some(Order { chunk, filling: Filling::Startup(Arc::clone(startup), position), stream: None })
}
