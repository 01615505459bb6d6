//! Progress of a layer: counters that the fetching threads advance and the API reads.
//!
//! The size of a blob is what the manifest claims until the blob has arrived, and is measured then.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use coordinator_api::job::{LayerProgress, LayerState};
use parking_lot::Mutex;
use store::Digest;

use crate::registries::RemoteLayer;

/// The progress of one layer, shared by all jobs that want it.
///
/// The counters are independent and are only shown, so relaxed ordering suffices.
#[derive(Debug)]
pub struct LayerMeter {
    blob: Digest,
    diff_id: Digest,
    size: AtomicU64,
    received: AtomicU64,
    unpacked: AtomicU64,
    stage: AtomicU8,
}

/// Where a layer stands, in the order of its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// Not begun.
    Waiting,
    /// Bytes are arriving, and are unpacked as they do.
    Fetching,
    /// All bytes have arrived.
    Unpacking,
    /// In the store.
    Done,
    /// Was in the store already.
    Present,
    /// Given up.
    Failed,
}

impl LayerMeter {
    /// A meter at zero.
    pub fn new(layer: &RemoteLayer) -> LayerMeter {
        LayerMeter {
            blob: layer.blob,
            diff_id: layer.diff_id,
            size: AtomicU64::new(layer.claimed),
            received: AtomicU64::new(0),
            unpacked: AtomicU64::new(0),
            stage: AtomicU8::new(Stage::Waiting as u8),
        }
    }

    /// Moves to `stage`.
    pub fn enter(&self, stage: Stage) {
        self.stage.store(stage as u8, Ordering::Relaxed);
    }

    /// Adds received compressed bytes.
    pub fn add_received(&self, count: u64) {
        self.received.fetch_add(count, Ordering::Relaxed);
    }

    /// Adds unpacked tar bytes.
    pub fn add_unpacked(&self, count: u64) {
        self.unpacked.fetch_add(count, Ordering::Relaxed);
    }

    /// Sets the size of the blob, once it has arrived.
    pub fn measured(&self, size: u64) {
        self.size.store(size, Ordering::Relaxed);
    }

    /// The size of the blob, as far as it is known.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// The length of the tar, if it was unpacked to its end under this meter.
    pub fn unpacked_whole(&self) -> Option<u64> {
        let done = self.stage.load(Ordering::Relaxed) == Stage::Done as u8;
        done.then(|| self.unpacked.load(Ordering::Relaxed))
    }

    /// Whether the layer is no longer waiting.
    pub fn is_begun(&self) -> bool {
        self.stage.load(Ordering::Relaxed) != Stage::Waiting as u8
    }

    /// Compressed bytes that came over the network for this layer.
    pub fn fetched(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// The progress as the API shows it.
    pub fn view(&self) -> LayerProgress {
        let received = self.received.load(Ordering::Relaxed);
        let size = self.size().max(received);
        let stage = self.stage.load(Ordering::Relaxed);
        let (state, bytes_done) = match stage {
            s if s == Stage::Waiting as u8 => (LayerState::Waiting, 0),
            s if s == Stage::Done as u8 => (LayerState::Done, size),
            s if s == Stage::Present as u8 => (LayerState::Present, size),
            s if s == Stage::Failed as u8 => (LayerState::Failed, received),
            s if s == Stage::Unpacking as u8 => (LayerState::Unpacking, received),
            _ => (LayerState::Fetching, received),
        };
        LayerProgress {
            digest: self.blob.to_string(),
            diff_id: self.diff_id.to_string(),
            state,
            bytes_done,
            bytes_total: size,
            unpacked_bytes: self.unpacked.load(Ordering::Relaxed),
        }
    }
}

/// One layer of a job: its own meter, or that of the fetch it has joined.
///
/// The lock guards which meter that is, and whose.
#[derive(Debug)]
pub struct LayerCell(Mutex<(Arc<LayerMeter>, Whose)>);

/// For which job a layer is fetched in the first place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// For this one.
    Own,
    /// For another job that wanted it first. The bytes count for that job.
    Anothers,
}

impl LayerCell {
    /// A cell that shows a meter at zero.
    pub fn new(layer: &RemoteLayer) -> LayerCell {
        LayerCell(Mutex::new((Arc::new(LayerMeter::new(layer)), Whose::Own)))
    }

    /// The meter shown.
    pub fn meter(&self) -> Arc<LayerMeter> {
        Arc::clone(&self.0.lock().0)
    }

    /// Bytes that were fetched for this job. No byte counts for two jobs.
    pub fn fetched(&self) -> u64 {
        let (meter, whose) = &*self.0.lock();
        if *whose == Whose::Own { meter.fetched() } else { 0 }
    }

    /// Shows another meter from now on.
    pub fn show(&self, meter: Arc<LayerMeter>, whose: Whose) {
        *self.0.lock() = (meter, whose);
    }
}
