//! A read that waits for pieces: each is copied into its place as it comes, and the last one answers.

use std::sync::Arc;

use parking_lot::Mutex;
use store::chunk::{ChunkRef, VerifiedChunk};
use store::layer::Piece;

use crate::source::failure::{Failure, Result};

/// A piece that the local cache does not have.
#[derive(Clone, Copy)]
pub(super) struct Missing {
    pub(super) number: u32,
    pub(super) piece: Piece,
    pub(super) chunk: ChunkRef,
    pub(super) start: u32,
}

/// The overlap of a piece and a read of `out` from `offset` on: its first byte within the piece, and its place in
/// `out`.
pub(super) fn part<'a>(piece: &Piece, offset: u64, out: &'a mut [u8]) -> (usize, &'a mut [u8]) {
    let end = (piece.offset + u64::from(piece.len)).min(offset + out.len() as u64);
    let begin = piece.offset.max(offset);
    let place = &mut out[(begin - offset) as usize..(end - offset) as usize];
    ((begin - piece.offset) as usize, place)
}

pub(super) struct PendingRead<F> {
    offset: u64,
    /// Guards the buffer while pieces are copied into it; `done` is taken out before it is called.
    state: Mutex<State<F>>,
}

struct State<F> {
    buffer: Vec<u8>,
    left: usize,
    done: Option<F>,
}

impl<F: FnOnce(Result<&[u8]>)> PendingRead<F> {
    /// A read into `buffer` from `offset` on, which lacks `left` pieces.
    pub(super) fn new(buffer: Vec<u8>, offset: u64, left: usize, done: F) -> Arc<PendingRead<F>> {
        Arc::new(PendingRead { offset, state: Mutex::new(State { buffer, left, done: Some(done) }) })
    }

    /// Takes a piece, or the failure to fetch it; the first failure answers the read at once.
    pub(super) fn take(&self, missing: &Missing, result: Result<Arc<VerifiedChunk>>) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let copied = result.and_then(|chunk| {
            let bytes = chunk.piece(missing.start, missing.piece.len).ok_or(Failure::Damaged)?;
            let (skip, target) = part(&missing.piece, self.offset, &mut state.buffer);
            target.copy_from_slice(&bytes[skip..skip + target.len()]);
            Ok(())
        });
        state.left -= 1;
        if state.left > 0 && copied.is_ok() {
            return;
        }
        let (done, buffer) = (state.done.take(), std::mem::take(&mut state.buffer));
        // Later pieces of a failed read are still copied, into a buffer that nobody reads, and answer nobody.
        state.buffer = if state.left > 0 { vec![0; buffer.len()] } else { Vec::new() };
        drop(guard);
        if let Some(done) = done {
            done(copied.map(|()| &buffer[..]));
        }
    }
}
