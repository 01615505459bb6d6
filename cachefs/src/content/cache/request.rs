//! Chunks that are to be fetched, and streams of them.

use std::sync::Arc;

use parking_lot::Mutex;
use store::ContentDigest;
use store::chunk::ChunkRef;

use super::content::Content;
use super::pending_read::Missing;
use super::startup::Startup;

/// What a chunk fills in the local cache.
#[derive(Clone)]
pub(super) enum Filling {
    /// A piece of a file and, where small files share the chunk, its neighbours.
    Layer(Box<(Content, Missing)>),
    /// What a startup pack holds in the chunk at this position.
    Startup(Arc<Startup>, u32),
}

/// A fetch by what it brings. A startup pack may have the same chunk as a layer; its fetch is one of its own all the same, because who waits
/// for a layer must not wait for a hint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Fetch {
    Layer(ContentDigest),
    Startup(ContentDigest),
}

/// A chunk that is to be fetched.
#[derive(Clone)]
pub(super) struct ChunkRequest {
    pub(super) chunk: ChunkRef,
    pub(super) filling: Filling,
    /// The stream that brings it, which lasts until the chunk is written.
    pub(super) stream: Option<Arc<Stream>>,
}

impl ChunkRequest {
    /// Whether a startup pack brings it.
    pub(super) fn is_of_startup(&self) -> bool {
        matches!(self.filling, Filling::Startup(..))
    }

    pub(super) fn fetch(&self) -> Fetch {
        match self.filling {
            Filling::Layer(_) => Fetch::Layer(self.chunk.digest),
            Filling::Startup(..) => Fetch::Startup(self.chunk.digest),
        }
    }

    pub(super) fn of_layer(content: Content, missing: Missing) -> ChunkRequest {
        ChunkRequest { chunk: missing.chunk, filling: Filling::Layer(Box::new((content, missing))), stream: None }
    }
}

/// Returns the chunks of a stream's next request, or nothing at its end.
pub(super) type Batches = Box<dyn FnMut() -> Option<Vec<ChunkRequest>> + Send>;

/// Requests that are made one after the other, a few at once, as long as nobody waits for something else. A stream ends
/// when the last job that works on it has ended, by a panic too, and when what it fetched is written: its requests keep
/// it alive.
pub(super) struct Stream {
    /// Guards the source of requests, which is empty after the last one. Held while a request is made, which may read
    /// an index from the local disk, but never during I/O with the shared one.
    pub(super) batches: Mutex<Option<Batches>>,
    /// Guards the callback that is called at the end.
    pub(super) ended: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(ended) = self.ended.get_mut().take() {
            ended();
        }
    }
}
