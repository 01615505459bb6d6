//! A read that waits for pieces: each is copied into its place as it comes, and the last one answers.

use std::sync::Arc;

use parking_lot::Mutex;
use store::blocks::Blocks;
use store::chunk::{ChunkRef, VerifiedChunk};
use store::layer::Piece;

use crate::source::failure::{Failure, Result};

/// A piece of which the local cache does not have all that is needed.
#[derive(Clone, Copy)]
pub(super) struct Missing {
    pub(super) number: u32,
    pub(super) piece: Piece,
    /// The blocks that are needed.
    pub(super) needed: Blocks,
    /// The chunk that brings them, where the packed piece lies in it, and what it holds of the piece.
    pub(super) chunk: ChunkRef,
    pub(super) start: u32,
    pub(super) held: Blocks,
}

impl Missing {
    /// A piece, as its layer's chunk has it.
    pub(super) fn in_layer(number: u32, piece: Piece, needed: Blocks, chunk: ChunkRef, start: u32) -> Missing {
        Missing { number, piece, needed, chunk, start, held: Blocks::ALL }
    }
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
            let Missing { piece, start, held, .. } = missing;
            let packed = chunk.piece(*start, held.packed_len(piece.len)).ok_or(Failure::Damaged)?;
            let (skip, target) = part(piece, self.offset, &mut state.buffer);
            let end = skip + target.len();
            let at = held.position(skip as u32, end as u32, piece.len);
            let bytes = at.and_then(|at| packed.get(at..at + target.len())).ok_or(Failure::Damaged)?;
            target.copy_from_slice(bytes);
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
