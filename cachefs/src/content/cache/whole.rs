//! Whole files, which the kernel reads by itself.
//!
//! With passthrough, the kernel reads a file past the daemon, so all its pieces must be here and verified beforehand. A
//! file of one piece is brought to that state while its open waits, fetched if need be. A larger one is not worth the
//! wait: it is opened as it is. If at least half of it is here, the pieces here are verified and the rest is fetched in
//! the background, so that a later open finds it whole.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use parking_lot::Mutex;
use store::ContentDigest;
use store::blocks::Blocks;
use store::chunk::VerifiedChunk;
use store::layer::{Piece, Source};

use super::cache_file::Form;
use super::cache_file::{CacheFile, PieceState};
use super::content::Content;
use super::pending_read::Missing;
use super::request::{ChunkRequest, Fetch};
use super::state::Cache;
use crate::os::pool::Priority;
use crate::source::failure::Result;
use crate::source::single_flight::Joined;

/// Larger files (bytes) are completed by their readers alone: verifying one means reading all of it.
const COMPLETE_MAX: u64 = 256 << 20;

/// A cache file that has all its bytes, each of them compared with its digest. It stays readable when it is removed.
pub struct WholeFile(Arc<CacheFile>);

impl AsFd for WholeFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.file().as_fd()
    }
}

/// Marks a file as being completed. Dropping this ends the completion, after a panic too.
struct Completion {
    cache: Arc<Cache>,
    digest: ContentDigest,
}

impl Drop for Completion {
    fn drop(&mut self) {
        self.cache.completions.end(&self.digest);
    }
}

impl Cache {
    /// Calls `done` with the whole file, or with nothing if not all of it is here. A missing file of one piece is
    /// fetched, which may fail with the read timeout or an error of the store.
    pub fn whole_file<F>(self: &Arc<Self>, content: Content, done: F)
    where
        F: FnOnce(Result<Option<WholeFile>>) + Send + 'static,
    {
        // The daemon does not see reads that are passed through: the open stands for a read of the whole file.
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
        let cache_file = self.cache_file(content)?;
        let is_verified = cache_file.form() == Form::Whole
            && (0..content.inode.piece_count())
                .all(|number| cache_file.state(number, Blocks::ALL) == PieceState::Verified);
        is_verified.then_some(WholeFile(cache_file))
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
        let missing = Missing::in_layer(0, piece, Blocks::ALL, chunk, start);
        let (this, wanted) = (Arc::clone(self), content.clone());
        let arrived = move |result: Result<Arc<VerifiedChunk>>| match result {
            // The thread that delivers the chunk has other waiters to answer: another one writes to the disk.
            Ok(chunk) => {
                let pool = this.pools.local.clone();
                pool.submit(Priority::Demand, move || done(Ok(this.keep_small(&wanted, &missing, &chunk))));
            }
            Err(failure) => done(Err(failure)),
        };
        if self.fetches.join(Fetch::Layer(chunk.digest), self.shared_store.deadline(), Box::new(arrived))
            == Joined::First
        {
            self.unless_cached(ChunkRequest::of_layer(content, missing))
                .into_iter()
                .for_each(|request| self.submit(vec![request]));
        }
    }

    /// A file of one piece, verified now if that was not done yet.
    fn verified_small(&self, content: &Content, piece: &Piece) -> Option<WholeFile> {
        let cache_file = self.cache_file(content)?;
        let good = cache_file.form() == Form::Whole && self.verify(content, &cache_file, 0, piece);
        good.then_some(WholeFile(cache_file))
    }

    /// Compares a piece that is here with its digest, unless that was done before. A damaged piece is dropped.
    fn verify(&self, content: &Content, cache_file: &Arc<CacheFile>, number: u32, piece: &Piece) -> bool {
        match piece.source {
            Source::Chunk { .. } => self.read_piece(content, cache_file, number, piece, piece.offset, &mut []),
            Source::Hole if cache_file.state(number, Blocks::ALL) == PieceState::Verified => true,
            Source::Hole => {
                let mut bytes = vec![0; piece.len as usize];
                let good = cache_file.read(&mut bytes, piece.offset).is_ok() && bytes.iter().all(|byte| *byte == 0);
                if good {
                    cache_file.verified(number, Blocks::ALL, piece.len)
                } else {
                    self.drop_damaged(content, cache_file, number)
                }
                good
            }
        }
    }

    /// Writes a small file that was just fetched, unless it is in the cache, and returns it.
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
                // The missing part is the smaller one, so the store is asked for less than readers have asked it for
                // already.
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

    /// Verifies the pieces of a large file that are here; returns the missing ones, if they are the smaller part.
    fn absent_pieces(self: &Arc<Self>, content: &Content) -> Result<Vec<Missing>> {
        let Some(cache_file) = self.cache_file(content) else { return Ok(Vec::new()) };
        let mut absent = Vec::new();
        let count = content.inode.piece_count();
        for number in 0..count {
            let piece = content.piece(number)?;
            match (piece.source, cache_file.state(number, Blocks::ALL)) {
                (Source::Chunk { chunk, start, .. }, PieceState::Absent) => {
                    absent.push(Missing::in_layer(number, piece, Blocks::ALL, chunk, start));
                }
                // A hole of the file is a hole in its partial cache file, too: nothing is missing.
                (Source::Hole, PieceState::Absent) => {}
                // After damage, readers fetch a whole file again; a partial one is completed after its next open.
                _ if !self.verify(content, &cache_file, number, &piece) => return Ok(Vec::new()),
                _ => {}
            }
        }
        if absent.len() as u32 > count / 2 {
            absent.clear();
        }
        Ok(absent)
    }

    /// Fetches a piece on this thread, unless somebody else is fetching it.
    fn fetch_now(self: &Arc<Self>, content: &Content, missing: Missing) -> Result<()> {
        let result = Arc::new(Mutex::new(Ok(())));
        let told = Arc::clone(&result);
        let done = Box::new(move |fetched: Result<Arc<VerifiedChunk>>| *told.lock() = fetched.map(drop));
        if self.fetches.join(Fetch::Layer(missing.chunk.digest), self.shared_store.deadline(), done) == Joined::First {
            self.fetch(vec![ChunkRequest::of_layer(content.clone(), missing)]);
        }
        result.lock().clone()
    }
}

#[cfg(test)]
mod tests;
