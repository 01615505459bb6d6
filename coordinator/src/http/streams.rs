//! Limits the memory of long answers while their clients read them.
//!
//! Every long answer first takes its weight out of a [`Quota`]: some megabytes for a reassembled tar, less for a file. A stream
//! holds no thread between two blocks: a bounded number of threads makes each block when the client has room for it. The index of
//! a layer is in memory once, however many streams use it, and counts for the caller who came first.
//!
//! `indexes` guards the table of indexes in use and is never held during I/O.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures::stream;
use http::HeaderValue;
use http::header::CONTENT_LENGTH;
use parking_lot::Mutex;
use store::Digest;
use store::layer::LayerIndex;
use store::reader::Store;
use tokio::sync::Semaphore;

use crate::http::error::ApiError;
use crate::http::quota::{Holder, Quota, Share, UsedUp};
use crate::unpack::LayerTar;

/// Memory for the long answers of all callers, and of one caller, in bytes.
const ALL: u64 = 256 << 20;
const OF_ONE: u64 = 128 << 20;
/// How long a request waits for memory.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How often a waiting request tries to get memory for an index.
const TRY_AGAIN: Duration = Duration::from_millis(500);
/// Weight of a tar being reassembled, in bytes: a decoder's window, a chunk, some blocks.
pub const TAR: u64 = 4 << 20;
/// Weight of a file, in bytes; it covers the descriptor, too.
pub const FILE: u64 = 1 << 20;
/// Weight of a document until its length is known, in bytes.
pub const DOCUMENT: u64 = 4 << 20;
/// Size of a block, in bytes.
pub const BLOCK: usize = 128 << 10;
/// Answers up to this length are not counted, in bytes.
const SHORT: u64 = 64 << 10;
/// The minimum number of threads that make blocks at the same time.
const WORKERS: usize = 4;

/// A source of blocks.
pub trait Blocks: Send + 'static {
    /// The next block, or nothing at the end. May block.
    fn next_block(&mut self) -> io::Result<Option<Bytes>>;
}

/// An index in use, with its share of the quota.
pub struct HeldIndex {
    /// The index.
    pub index: Arc<LayerIndex>,
    _share: Share,
}

/// Why an index cannot be had.
#[derive(Debug, thiserror::Error)]
enum NoIndex {
    #[error(transparent)]
    UsedUp(#[from] UsedUp),
    #[error(transparent)]
    Store(#[from] store::Error),
}

/// Memory and threads of streams to clients.
pub struct Streams {
    store: Store,
    quota: Quota,
    /// Indexes are read one after the other, because reading one takes its memory twice.
    opening: tokio::sync::Mutex<()>,
    indexes: Mutex<HashMap<Digest, Weak<HeldIndex>>>,
    workers: Arc<Semaphore>,
}

impl Streams {
    /// Streams that read from `store`.
    pub fn new(store: Store) -> Streams {
        let workers = std::thread::available_parallelism().map_or(WORKERS, |count| count.get().max(WORKERS));
        Streams {
            store,
            quota: Quota::new(ALL, OF_ONE, TIMEOUT),
            opening: tokio::sync::Mutex::new(()),
            indexes: Mutex::default(),
            workers: Arc::new(Semaphore::new(workers)),
        }
    }

    /// Takes a share of `weight` bytes; fails if none becomes free in time.
    pub async fn share(&self, holder: &Holder, weight: u64) -> Result<Share, UsedUp> {
        self.quota.take(holder, weight).await
    }

    fn known(&self, diff_id: &Digest) -> Option<Arc<HeldIndex>> {
        let mut indexes = self.indexes.lock();
        indexes.retain(|_, index| index.strong_count() > 0);
        indexes.get(diff_id).and_then(Weak::upgrade)
    }

    /// The index of a layer, for a caller who already has a share. Waits for memory for it.
    pub async fn index(&self, holder: &Holder, had: &Share, diff_id: &Digest) -> Result<Arc<HeldIndex>, ApiError> {
        let waiting = async {
            loop {
                match self.try_index(holder, had, diff_id).await {
                    Err(NoIndex::UsedUp(_)) => tokio::time::sleep(TRY_AGAIN).await,
                    Err(NoIndex::Store(error)) => return Err(error.into()),
                    Ok(index) => return Ok(index),
                }
            }
        };
        tokio::time::timeout(TIMEOUT, waiting).await.unwrap_or(Err(UsedUp.into()))
    }

    async fn try_index(&self, holder: &Holder, had: &Share, diff_id: &Digest) -> Result<Arc<HeldIndex>, NoIndex> {
        if let Some(known) = self.known(diff_id) {
            return Ok(known);
        }
        let _one_by_one = self.opening.lock().await;
        if let Some(known) = self.known(diff_id) {
            return Ok(known);
        }
        let (store, wanted) = (self.store.clone(), *diff_id);
        let crashed =
            |_| store::Error::corrupt(format!("layer {wanted}"), "a thread that read it crashed: see the log");
        let look = tokio::task::spawn_blocking(move || store.index_len(&wanted));
        let len = look.await.map_err(crashed)??;
        // Memory first: a caller who gets none tries again and again, and must not read anything.
        let share = self.quota.take_beside(holder, had, len)?;
        let store = self.store.clone();
        let index = tokio::task::spawn_blocking(move || store.index(&wanted)).await.map_err(crashed)??;
        if index.raw_len() as u64 > len {
            return Err(store::Error::corrupt(
                format!("the index of layer {wanted}"),
                "it has grown while it was read",
            )
            .into());
        }
        let held = Arc::new(HeldIndex { index: Arc::new(index), _share: share });
        self.indexes.lock().insert(*diff_id, Arc::downgrade(&held));
        Ok(held)
    }

    /// A body whose blocks are made as the client takes them.
    pub fn body(&self, blocks: impl Blocks) -> Body {
        let workers = Arc::clone(&self.workers);
        Body::from_stream(stream::unfold(Some(blocks), move |blocks| {
            let workers = Arc::clone(&workers);
            async move {
                let mut blocks = blocks?;
                let worker = workers.acquire_owned().await.ok()?;
                let made = tokio::task::spawn_blocking(move || {
                    let _worker = worker;
                    let block = blocks.next_block();
                    (blocks, block)
                });
                match made.await {
                    Ok((blocks, Ok(Some(block)))) => Some((Ok(block), Some(blocks))),
                    Ok((_, Ok(None))) => None,
                    // The connection is then cut, and the client sees an answer that is too short.
                    Ok((_, Err(error))) => {
                        tracing::warn!("an answer broke off: {error}");
                        Some((Err(error), None))
                    }
                    Err(_) => Some((Err(io::Error::other("a thread crashed: see the log")), None)),
                }
            }
        }))
    }

    /// A body of bytes in memory. They count towards `share` until all have been sent.
    pub fn document(bytes: Bytes, mut share: Share) -> Body {
        share.shrink(bytes.len() as u64);
        // Each part is a copy: otherwise the last part waiting for the client would keep all of the bytes in memory.
        Body::from_stream(stream::unfold((bytes, share), |(mut bytes, share)| async move {
            let part = bytes.split_to(bytes.len().min(BLOCK));
            (!part.is_empty()).then(|| (Ok::<_, io::Error>(Bytes::copy_from_slice(&part)), (bytes, share)))
        }))
    }

    /// Counts a whole answer if it is long. `share` is what was reserved for making it.
    pub async fn hold(&self, holder: &Holder, share: Option<Share>, response: Response) -> Result<Response, ApiError> {
        let Some(len) = hyper::body::Body::size_hint(response.body()).exact().filter(|len| *len > SHORT) else {
            return Ok(response);
        };
        let share = match share {
            Some(mut share) if len <= DOCUMENT => {
                share.shrink(len);
                share
            }
            Some(share) => {
                drop(share);
                self.share(holder, len).await?
            }
            None => self.share(holder, len).await?,
        };
        let (mut parts, body) = response.into_parts();
        let interrupted = |_| ApiError::internal("the answer was interrupted: see the coordinator's log");
        let bytes = axum::body::to_bytes(body, usize::MAX).await.map_err(interrupted)?;
        parts.headers.insert(CONTENT_LENGTH, HeaderValue::from(len));
        Ok(Response::from_parts(parts, Streams::document(bytes, share)))
    }
}

/// A part of a layer's tar. The whole tar is compared with its diffID; if it differs, the answer breaks off before its end.
pub struct TarPart {
    /// The tar.
    pub tar: LayerTar,
    /// Bytes to skip before the part.
    pub skip: u64,
    /// Bytes of the part that are left.
    pub left: u64,
    /// Kept for as long as the tar is read.
    pub index: Arc<HeldIndex>,
    /// Kept for as long as the tar is read.
    pub share: Share,
}

impl Blocks for TarPart {
    fn next_block(&mut self) -> io::Result<Option<Bytes>> {
        let failed = |error: crate::unpack::UnpackError| io::Error::other(error.to_string());
        while self.left > 0 {
            let mut block = Vec::with_capacity(BLOCK);
            let more = self.tar.fill(&mut block, BLOCK).map_err(failed)?;
            if !more && (block.len() as u64) < self.skip.saturating_add(self.left) {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let skipped = self.skip.min(block.len() as u64);
            self.skip -= skipped;
            let wanted = self.left.min(block.len() as u64 - skipped);
            self.left -= wanted;
            if wanted > 0 {
                let from = skipped as usize;
                return Ok(Some(Bytes::from(block).slice(from..from + wanted as usize)));
            }
        }
        Ok(None)
    }
}
