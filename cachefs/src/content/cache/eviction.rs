//! Which cache entries are evicted when there are too many: least recently used first, never one that is open.
//!
//! Pure: what is on the disk goes in, what to remove comes out.

use std::collections::HashMap;

use store::ContentDigest;

/// One cache entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// The digest that names it.
    pub digest: ContentDigest,
    /// The space that it takes on the disk, bytes.
    pub bytes: u64,
    /// When it was last used, nanoseconds since 1970.
    pub last_used: u64,
    /// Whether a file with this content is open.
    pub in_use: bool,
}

/// Returns the cache files that others than the cache itself use (the copies of layers' indexes), and how they use
/// them.
pub type Users = Box<dyn Fn() -> HashMap<ContentDigest, Use> + Send + Sync>;

/// How a cache file is used by others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// It is needed by what runs now.
    Held,
    /// It was read since the last call.
    Lately,
}

/// The entries to remove so that at least `excess` bytes become free, or all that may be removed.
pub fn victims(mut candidates: Vec<Candidate>, excess: u64) -> Vec<Candidate> {
    candidates.retain(|candidate| !candidate.in_use && candidate.bytes > 0);
    candidates.sort_unstable_by_key(|candidate| candidate.last_used);
    let mut freed = 0;
    let enough = candidates.iter().position(|candidate| {
        let done = freed >= excess;
        freed += candidate.bytes;
        done
    });
    candidates.truncate(enough.unwrap_or(candidates.len()));
    candidates
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_oldest_go_and_no_more_than_needed(entries in proptest::collection::vec((1u64..100, any::<u64>(), any::<bool>()), 0..40), excess in 0u64..2000) {
            let candidates: Vec<_> = entries.iter().enumerate().map(|(n, (bytes, last_used, in_use))| Candidate {
                digest: ContentDigest::of(&[n as u8]), bytes: *bytes, last_used: *last_used, in_use: *in_use,
            }).collect();
            let gone = victims(candidates.clone(), excess);
            prop_assert!(gone.iter().all(|c| !c.in_use));
            let freed: u64 = gone.iter().map(|c| c.bytes).sum();
            let free: u64 = candidates.iter().filter(|c| !c.in_use).map(|c| c.bytes).sum();
            prop_assert!(freed >= excess.min(free));
            prop_assert!(gone.last().is_none_or(|last| freed - last.bytes < excess));
            let newest_gone = gone.iter().map(|c| c.last_used).max().unwrap_or(0);
            let kept = candidates.iter().filter(|c| !c.in_use && !gone.contains(c));
            prop_assert!(kept.map(|c| c.last_used).min().is_none_or(|oldest| oldest >= newest_gone));
        }
    }
}
