//! Chunks on their way into the pack: compressed by one thread per processor (at most eight), appended in order by one thread.
//!
//! The order makes the pack's bytes, and so its name, a function of the layer alone. Every queue holds a few chunks: a slow disk slows the
//! reader down instead of filling memory. The threads end when the pipeline is dropped.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Scope, ScopedJoinHandle};

use parking_lot::Mutex;
use store::ContentDigest;
use store::chunk::{StoredChunk, compress};
use store::pack::{PackWriter, Placed};

/// Chunks that wait for a compressing thread.
const QUEUE: usize = 4;

/// One raw chunk and its number within this pack.
type Job = (u32, Vec<u8>);
type Done = (u32, Result<StoredChunk, store::Error>);

/// The sending end: takes raw chunks.
pub(super) struct Pipeline {
    jobs: SyncSender<Job>,
    next: u32,
}

/// The finished pack.
pub(super) struct Packed {
    pub(super) name: ContentDigest,
    /// Where each chunk lies, by number.
    pub(super) placed: Vec<Placed>,
}

impl Packed {
    /// Whether the layer added no chunk.
    pub(super) fn is_empty(&self) -> bool {
        self.placed.is_empty()
    }
}

/// The packing thread has ended; its own error says why.
#[derive(Debug)]
pub(super) struct PackingStopped;

impl Pipeline {
    /// Creates the pack's file.
    pub(super) fn pack(path: &Path) -> Result<PackWriter, store::Error> {
        PackWriter::create(path)
    }

    /// Starts the threads.
    pub(super) fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        pack: PackWriter,
    ) -> (Pipeline, ScopedJoinHandle<'scope, Result<Packed, store::Error>>) {
        let (jobs, waiting) = sync_channel::<Job>(QUEUE);
        let (done, finished) = sync_channel::<Done>(QUEUE);
        let waiting = Arc::new(Mutex::new(waiting));
        let threads = std::thread::available_parallelism().map_or(2, usize::from).min(8);
        for _ in 0..threads {
            let (waiting, done) = (Arc::clone(&waiting), done.clone());
            scope.spawn(move || compress_all(&waiting, &done));
        }
        drop(done);
        let packing = scope.spawn(move || append_all(pack, &finished));
        (Pipeline { jobs, next: 0 }, packing)
    }

    /// Queues a raw chunk and returns its number.
    pub(super) fn push(&mut self, raw: Vec<u8>) -> Result<u32, PackingStopped> {
        let number = self.next;
        self.jobs.send((number, raw)).map_err(|_| PackingStopped)?;
        self.next += 1;
        Ok(number)
    }
}

/// Compresses chunks until the queue ends. One thread holds the lock and waits for the next job; the others wait for the lock.
fn compress_all(waiting: &Mutex<Receiver<Job>>, done: &SyncSender<Done>) {
    loop {
        let job = waiting.lock().recv();
        let Ok((number, raw)) = job else { return };
        if done.send((number, compress(&raw))).is_err() {
            return;
        }
    }
}

fn append_all(mut pack: PackWriter, finished: &Receiver<Done>) -> Result<Packed, store::Error> {
    let mut placed = Vec::new();
    let mut early = BTreeMap::new();
    for (number, chunk) in finished {
        early.insert(number, chunk?);
        while let Some(chunk) = early.remove(&(placed.len() as u32)) {
            placed.push(pack.append(&chunk)?);
        }
    }
    Ok(Packed { name: pack.finish()?, placed })
}
