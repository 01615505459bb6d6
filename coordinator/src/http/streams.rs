//! Answers that take long to pass: what they hold while their clients read, or do not.
//!
//! Every long answer takes its weight out of a [`Quota`] before it begins: some megabytes for a tar that is put together,
//! less for a file. A stream holds no thread between two blocks: each is made when the client has room for it, by a bounded number
//! of threads. An index is in memory once, however many streams of its layer there are, and counts for whoever came first.
//!
//! `indexes` guards the table of those in use and is held for no I/O.

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

/// Memory for the long answers of all, and of one caller.
const ALL: u64 = 256 << 20;
const OF_ONE: u64 = 128 << 20;
/// How long a request waits for its turn.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it looks for room for an index.
const TRY_AGAIN: Duration = Duration::from_millis(500);
/// What a tar under construction counts for: a decoder's window, a chunk, some blocks.
pub const TAR: u64 = 4 << 20;
/// What a file counts for, and a descriptor.
pub const FILE: u64 = 1 << 20;
/// What a document counts for until its length is known.
pub const DOCUMENT: u64 = 4 << 20;
/// The size of a block.
pub const BLOCK: usize = 128 << 10;
/// Answers of this length are not counted.
const SHORT: u64 = 64 << 10;
/// Threads that make blocks at a time, at least.
const WORKERS: usize = 4;

/// Something that gives block after block.
pub trait Blocks: Send + 'static {
    /// The next block, or nothing at the end. May block.
    fn next_block(&mut self) -> io::Result<Option<Bytes>>;
}

/// An index that is in use, with its share.
pub struct HeldIndex {
    /// The index.
    pub index: Arc<LayerIndex>,
    _share: Share,
}

/// Why there is no index.
#[derive(Debug, thiserror::Error)]
enum NoIndex {
    #[error(transparent)]
    UsedUp(#[from] UsedUp),
    #[error(transparent)]
    Store(#[from] store::Error),
}

/// What streams to clients may hold.
pub struct Streams {
    store: Store,
    quota: Quota,
    /// Indexes are read one after the other: reading one takes its room twice.
    opening: tokio::sync::Mutex<()>,
    indexes: Mutex<HashMap<Digest, Weak<HeldIndex>>>,
    workers: Arc<Semaphore>,
}

impl Streams {
    /// Streams out of `store`.
    pub fn new(store: Store) -> Streams {
        let workers = std::thread::available_parallelism().map_or(WORKERS, |count| count.get().max(WORKERS));
        Streams {
            store,
            quota: Quota::new(ALL, OF_ONE, PATIENCE),
            opening: tokio::sync::Mutex::new(()),
            indexes: Mutex::default(),
            workers: Arc::new(Semaphore::new(workers)),
        }
    }

    /// A share of `weight` bytes; whoever finds none in time is told to come again.
    pub async fn share(&self, holder: &Holder, weight: u64) -> Result<Share, UsedUp> {
        self.quota.take(holder, weight).await
    }

    fn known(&self, diff_id: &Digest) -> Option<Arc<HeldIndex>> {
        let mut indexes = self.indexes.lock();
        indexes.retain(|_, index| index.strong_count() > 0);
        indexes.get(diff_id).and_then(Weak::upgrade)
    }

    /// The index of a layer, for a caller who has a share. Waits for room for it.
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
        tokio::time::timeout(PATIENCE, waiting).await.unwrap_or(Err(UsedUp.into()))
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
        // Room first: who finds none comes again and again, and reads nothing.
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

    /// A body of blocks that are made as the client takes them.
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
                    // The connection is then cut, which the client sees as an answer that is too short.
                    Ok((_, Err(error))) => {
                        tracing::warn!("an answer broke off: {error}");
                        Some((Err(error), None))
                    }
                    Err(_) => Some((Err(io::Error::other("a thread crashed: see the log")), None)),
                }
            }
        }))
    }

    /// A body of bytes that are in memory. They count for `share` until all are on their way.
    pub fn document(bytes: Bytes, mut share: Share) -> Body {
        share.shrink(bytes.len() as u64);
        // Each part is a copy: the last that waits for the client must not keep all of them.
        Body::from_stream(stream::unfold((bytes, share), |(mut bytes, share)| async move {
            let part = bytes.split_to(bytes.len().min(BLOCK));
            (!part.is_empty()).then(|| (Ok::<_, io::Error>(Bytes::copy_from_slice(&part)), (bytes, share)))
        }))
    }

    /// Counts a whole answer, if it is long. `share` is what its caller had for making it.
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

/// A part of a layer's tar. The whole is compared with its diffID; if it differs, the answer breaks off before its end.
pub struct TarPart {
    /// The tar.
    pub tar: LayerTar,
    /// Bytes before the part,
    pub skip: u64,
    /// and of it.
    pub left: u64,
    /// Kept as long as the tar is read, like the share.
    pub index: Arc<HeldIndex>,
    /// What it holds.
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
