//! Counters of the daemon. Each is one relaxed atomic: they order nothing.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// One counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts one.
    pub fn one(&self) {
        self.add(1);
    }

    /// Counts `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The count so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! metrics {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// All counters.
        #[derive(Debug, Default)]
        pub struct Metrics { $($(#[$doc])* pub $name: Counter),* }

        /// All counters at one moment.
        #[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
        pub struct Snapshot { $($(#[$doc])* pub $name: u64),* }

        impl Metrics {
            /// All counts now.
            pub fn snapshot(&self) -> Snapshot {
                Snapshot { $($name: self.$name.get()),* }
            }
        }
    };
}

metrics! {
    /// Opens of files that reached the daemon.
    opens,
    /// Those after which the kernel reads the local cache's file itself.
    opens_passthrough,
    /// Reads of files that were answered from the local cache, or needed no bytes.
    reads_hit,
    /// Reads of files that had to wait for the shared store.
    reads_missed,
    /// Bytes read from local cache files.
    bytes_from_cache,
    /// Bytes read from the shared store's packs, as they are stored there.
    bytes_from_store,
    /// Chunks read from the shared store.
    chunks_fetched,
    /// Chunks read from the shared store before anybody asked for them.
    chunks_prefetched,
    /// Requests for chunks to the shared store: one brings as many as follow each other.
    extents_fetched,
    /// Startup packs that were put to use.
    startups_used,
    /// Layers that are streamed whole because much of them is read.
    layers_streamed,
    /// Layer indexes read from the shared store.
    indexes_fetched,
    /// Failed attempts to read from the shared store.
    store_errors,
    /// Requests that waited for the shared store until their time was up.
    store_timeouts,
    /// Objects of the shared store that did not match their digest.
    damaged_in_store,
    /// Local cache entries that did not match their digest and were dropped.
    damaged_in_cache,
    /// Failed attempts to write to the local cache.
    cache_write_errors,
    /// Local cache entries removed to make room.
    evicted_objects,
    /// Bytes removed to make room.
    evicted_bytes,
}
