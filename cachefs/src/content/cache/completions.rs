//! Files that are completed in the background: how many at once, and which.

use std::collections::HashSet;

use parking_lot::Mutex;
use store::ContentDigest;

/// How many files are completed at a time: each takes a thread of the pool and one chunk of the store's bandwidth.
const COMPLETIONS: usize = 2;

/// Files that are being completed in the background.
#[derive(Default)]
pub(super) struct Completions(
    /// Guards their digests.
    Mutex<HashSet<ContentDigest>>,
);

impl Completions {
    /// Begins the completion of a file; returns whether the caller may complete it.
    pub(super) fn begin(&self, digest: ContentDigest) -> bool {
        let mut running = self.0.lock();
        running.len() < COMPLETIONS && running.insert(digest)
    }

    /// Ends the completion of a file, whether it succeeded or not.
    pub(super) fn end(&self, digest: &ContentDigest) {
        self.0.lock().remove(digest);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }
}
