//! Which chain's startup pack is checked next: chains with new traces, each at most once in [`PACE`].

use std::collections::HashMap;
use std::time::{Duration, Instant};

use store::Digest;

/// The least time between two checks of one chain: a hundred hosts that start one image at once are one change.
pub(super) const PACE: Duration = Duration::from_secs(60);

/// What the builder does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Build this chain's pack.
    Build(Digest),
    /// Wait this long, until something is due.
    Wait(Duration),
    /// Nothing is due.
    Nothing,
}

/// The chains with new traces. Callers give the time.
#[derive(Debug, Default)]
pub(super) struct BuildQueue {
    /// Since when a chain has new traces.
    due: HashMap<Digest, Instant>,
    /// When a chain was last checked; entries older than [`PACE`] are removed.
    looked: HashMap<Digest, Instant>,
}

impl BuildQueue {
    /// Notes a new trace of `chain`.
    pub(super) fn add(&mut self, chain: Digest, now: Instant) {
        self.due.entry(chain).or_insert(now);
    }

    /// Takes the chain that has waited longest of those that may be built now.
    pub(super) fn next(&mut self, now: Instant) -> Next {
        self.looked.retain(|_, looked| now.duration_since(*looked) < PACE);
        let opens = |chain: &Digest| self.looked.get(chain).map_or(now, |looked| *looked + PACE);
        let first = self.due.iter().map(|(chain, since)| (opens(chain), *since, *chain)).min();
        match first {
            None => Next::Nothing,
            Some((opens, _, _)) if opens > now => Next::Wait(opens - now),
            Some((_, _, chain)) => {
                self.due.remove(&chain);
                Next::Build(chain)
            }
        }
    }

    /// Notes that `chain` was checked.
    pub(super) fn built(&mut self, chain: Digest, now: Instant) {
        self.looked.insert(chain, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_trace_at_once_then_one_look_a_minute() {
        let (a, b, start) = (Digest::of(b"a"), Digest::of(b"b"), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut build_queue = BuildQueue::default();
        assert_eq!(build_queue.next(at(0)), Next::Nothing);
        build_queue.add(a, at(0));
        build_queue.add(a, at(1));
        build_queue.add(b, at(1));
        assert_eq!(build_queue.next(at(1)), Next::Build(a));
        build_queue.built(a, at(2));
        build_queue.add(a, at(3));
        assert_eq!(build_queue.next(at(3)), Next::Build(b), "b need not wait for a");
        build_queue.built(b, at(4));
        assert_eq!(build_queue.next(at(12)), Next::Wait(Duration::from_secs(50)));
        assert_eq!(build_queue.next(at(62)), Next::Build(a));
        build_queue.built(a, at(62));
        assert_eq!(build_queue.next(at(63)), Next::Nothing);
        assert_eq!(build_queue.looked.len(), 2);
        assert_eq!(build_queue.next(at(200)), Next::Nothing);
        assert_eq!(build_queue.looked.len(), 0, "nothing is remembered for ever");
    }
}
