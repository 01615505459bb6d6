//! Whole files for the kernel to read by itself.
//!
//! A file that is passed through is read past the daemon, so all its pieces must be here and verified beforehand. A
//! file of one piece is brought to that state while its open waits, fetched if need be. A larger one is not worth the
//! wait: it is opened as it is, and if much of it is here already, the rest is verified and fetched in the background, so
//! that a later open finds it whole.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use parking_lot::Mutex;
use store::ContentDigest;
use store::chunk::VerifiedChunk;
use store::layer::{Piece, Source};

use super::body::{CacheFile, PieceState};
use super::disk::Form;
use super::fetch::Order;
use super::gather::Missing;
use super::{Cache, Content};
use crate::failure::Result;
use crate::pool::Priority;
use crate::single_flight::Boarding;

/// Larger files are completed by their readers alone: verifying one means reading all of it.
const COMPLETE_MAX: u64 = 256 << 20;
/// Files that are completed at the same time: each takes a thread of the pool and one chunk of the store's bandwidth.
const COMPLETIONS: usize = 2;

/// A cache file that has all its bytes, each of them compared with its digest. It stays readable when it is removed.
pub struct WholeFile(Arc<CacheFile>);

impl AsFd for WholeFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.file().as_fd()
    }
}

/// Files that are being completed in the background.
#[derive(Default)]
pub(super) struct Completions(
    /// Guards their digests.
    Mutex<HashSet<ContentDigest>>,
);

impl Completions {
    /// Whether the caller may complete this one.
    fn begin(&self, digest: ContentDigest) -> bool {
        let mut running = self.0.lock();
        running.len() < COMPLETIONS && running.insert(digest)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }
}

/// A file that is being completed until this goes, however that comes about.
struct Completion {
    cache: Arc<Cache>,
    digest: ContentDigest,
}

impl Drop for Completion {
    fn drop(&mut self) {
        self.cache.completions.0.lock().remove(&self.digest);
    }
}

impl Cache {
    /// Calls `done` with the file as a whole, or with nothing if it is not here as a whole. A file of one piece is
    /// fetched if it lacks; a failure to do that is a failure of the read timeout or the store.
    pub fn whole_file<F>(self: &Arc<Self>, content: Content, done: F)
    where
        F: FnOnce(Result<Option<WholeFile>>) + Send + 'static,
    {
        // What is passed through is read unseen: its open stands for a read of all of it.
        let (this, opened) = (Arc::clone(self), content.clone());
        let done = move |whole: Result<Option<WholeFile>>| {
            if let Ok(Some(_)) = &whole {
                this.record(&opened, 0, opened.inode.size, &[]);
            }
            done(whole);
        };
        match content.inode.piece_count() {
            0 => done(Ok(None)),
            1 => self.small_file(content, done),
            _ => {
                let whole = self.verified_file(&content);
                if whole.is_none() {
                    self.complete_later(content);
                }
                done(Ok(whole));
            }
        }
    }

    /// The file, if all of it is here and verified.
    fn verified_file(&self, content: &Content) -> Option<WholeFile> {
        let last = content.inode.piece_count().checked_sub(1)?;
        let body = self.body(content)?;
        (body.form() == Form::Whole && body.all_verified(0, last)).then_some(WholeFile(body))
    }

    fn small_file<F>(self: &Arc<Self>, content: Content, done: F)
    where
        F: FnOnce(Result<Option<WholeFile>>) + Send + 'static,
    {
        let piece = match content.piece(0) {
            Ok(piece) => piece,
            Err(failure) => return done(Err(failure)),
        };
        // A hole needs no cache file.
        let Source::Chunk { chunk, start, .. } = piece.source else { return done(Ok(None)) };
        if let Some(whole) = self.verified_small(&content, &piece) {
            return done(Ok(Some(whole)));
        }
        if !self.disk.accepts() {
            return done(Ok(None));
        }
        let missing = Missing { number: 0, piece, chunk, start };
        let (this, wanted) = (Arc::clone(self), content.clone());
        let arrived = move |result: Result<Arc<VerifiedChunk>>| match result {
            // Whoever tells of the chunk has others to tell: the disk is somebody else's work.
            Ok(chunk) => {
                let pool = this.pools.local.clone();
                pool.submit(Priority::Demand, move || done(Ok(this.keep_small(&wanted, &missing, &chunk))));
            }
            Err(failure) => done(Err(failure)),
        };
        if self.flights.board(chunk.digest, self.origin.deadline(), Box::new(arrived)) == Boarding::First {
            self.order(Order::of_layer(content, missing)).into_iter().for_each(|order| self.submit(vec![order]));
        }
    }

    /// A file of one piece, verified now if that was not done yet.
    fn verified_small(&self, content: &Content, piece: &Piece) -> Option<WholeFile> {
        let body = self.body(content)?;
        let good = body.form() == Form::Whole && self.verify(content, &body, 0, piece);
        good.then_some(WholeFile(body))
    }

    /// Compares a piece that is here with its digest, unless that was done; damage is dropped.
    fn verify(&self, content: &Content, body: &Arc<CacheFile>, number: u32, piece: &Piece) -> bool {
        match piece.source {
            Source::Chunk { .. } => self.read_piece(content, body, number, piece, piece.offset, &mut []),
            Source::Hole if body.state(number) == PieceState::Verified => true,
            Source::Hole => {
                let mut bytes = vec![0; piece.len as usize];
                let good = body.read(&mut bytes, piece.offset).is_ok() && bytes.iter().all(|byte| *byte == 0);
                match good {
                    true => body.verified(number),
                    false => self.drop_damaged(content, body, number),
                }
                good
            }
        }
    }

    /// Writes a small file that has just come, unless that has been done, and gives it.
    fn keep_small(&self, content: &Content, missing: &Missing, chunk: &VerifiedChunk) -> Option<WholeFile> {
        if !self.disk.has(&content.inode.content_digest())
            && let Err(error) = self.write_small(&content.inode, missing.start, chunk)
        {
            self.metrics().cache_write_errors.one();
            self.disk.failed(&error);
            return None;
        }
        self.verified_small(content, &missing.piece)
    }

    /// Has a large file verified and its missing pieces fetched, if at least half of it is here.
    fn complete_later(self: &Arc<Self>, content: Content) {
        let digest = content.inode.content_digest();
        if content.inode.size > COMPLETE_MAX || !self.disk.accepts() || !self.completions.begin(digest) {
            return;
        }
        let this = Arc::clone(self);
        self.pools.local.submit(Priority::Background, move || {
            let completion = Completion { cache: Arc::clone(&this), digest };
            match this.absent_pieces(&content) {
                Ok(absent) if absent.is_empty() => {}
                // What is missing is the smaller part, so the store is asked for less than readers have asked it for already.
                Ok(absent) => this.pools.remote.clone().submit(Priority::Background, move || {
                    let _completion = completion;
                    if let Err(failure) = absent.into_iter().try_for_each(|missing| this.fetch_now(&content, missing)) {
                        tracing::debug!("{} is not completed: {failure}", digest.hex());
                    }
                }),
                Err(failure) => tracing::debug!("{} is not completed: {failure}", digest.hex()),
            }
        });
    }

    /// Verifies the pieces of a large file that are here; gives those that are not, if they are the smaller part.
    fn absent_pieces(self: &Arc<Self>, content: &Content) -> Result<Vec<Missing>> {
        let Some(body) = self.body(content) else { return Ok(Vec::new()) };
        let mut absent = Vec::new();
        let count = content.inode.piece_count();
        for number in 0..count {
            let piece = content.piece(number)?;
            match (piece.source, body.state(number)) {
                (Source::Chunk { chunk, start, .. }, PieceState::Absent) => {
                    absent.push(Missing { number, piece, chunk, start });
                }
                // The cache file of a partial file has its holes where the file has them.
                (Source::Hole, PieceState::Absent) => {}
                // After damage the whole file is fetched by its readers, a partial one by its next open.
                _ if !self.verify(content, &body, number, &piece) => return Ok(Vec::new()),
                _ => {}
            }
        }
        if absent.len() as u32 > count / 2 {
            absent.clear();
        }
        Ok(absent)
    }

    /// Fetches a piece on this thread, unless somebody is fetching it.
    fn fetch_now(self: &Arc<Self>, content: &Content, missing: Missing) -> Result<()> {
        let result = Arc::new(Mutex::new(Ok(())));
        let told = Arc::clone(&result);
        let done = Box::new(move |fetched: Result<Arc<VerifiedChunk>>| *told.lock() = fetched.map(drop));
        if self.flights.board(missing.chunk.digest, self.origin.deadline(), done) == Boarding::First {
            self.fetch(vec![Order::of_layer(content.clone(), missing)]);
        }
        result.lock().clone()
    }
}

#[cfg(test)]
mod tests;
