//! How much to read ahead of the demand, and when to stream a whole layer.
//!
//! Chunks of a layer are numbered in the order of its tar, so files that lie together in the tree have neighbouring
//! chunk numbers. A miss right behind what was read ahead for an earlier miss continues that stream, and the window
//! doubles. Any other miss starts a stream with a small window, which costs less than the round trip that it may save.
//! Once a large part of a layer was missed, the rest is worth streaming: then reading on demand is never slower than
//! copying the whole layer. Pure: misses go in, chunk numbers come out.

use std::num::NonZeroUsize;
use std::ops::Range;

use lru::LruCache;
use store::Digest;

/// How many chunks are read ahead after a lone miss; each is 256 KiB of content, some 100 KiB on the shared disk.
const FIRST_WINDOW: u32 = 2;
/// The most chunks that are read ahead in a stream: enough for a disk with a latency of 50 ms.
const LAST_WINDOW: u32 = 32;
/// How many chunks outside a stream's last window a miss may lie and still belong to the stream.
const SLACK: u32 = 2;
/// How many streams are followed in one layer, for concurrent readers.
const STREAMS: usize = 8;
/// In how many layers streams are followed.
const LAYERS: NonZeroUsize = NonZeroUsize::new(64).expect("not zero");
/// A layer is streamed once one in this many of its chunks was missed, and [`BULK_MISSES`] chunks at least.
const BULK_SHARE: u32 = 4;
/// The fewest missed chunks for which a layer is streamed.
const BULK_MISSES: u32 = 32;

/// One reader's progress through a layer.
#[derive(Debug, Clone, Copy)]
struct Stream {
    /// The first chunk that was not read ahead.
    next: u32,
    window: u32,
}

#[derive(Debug, Default)]
struct Layer {
    /// The most recently continued last.
    streams: Vec<Stream>,
    misses: u32,
    is_streamed: bool,
}

/// What to do about a miss, besides fetching it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Advice {
    /// Fetch these chunks too.
    ReadAhead(Range<u32>),
    /// Stream the whole layer.
    Stream,
    /// It is being streamed already.
    Nothing,
}

/// Recent misses, by layer.
pub(super) struct Ahead(LruCache<Digest, Layer>);

impl Default for Ahead {
    fn default() -> Ahead {
        Ahead(LruCache::new(LAYERS))
    }
}

impl Ahead {
    /// Notes that the local cache lacked chunk `missed` of a layer of `chunks` chunks, and advises what else to fetch.
    pub(super) fn missed(&mut self, layer: &Digest, missed: u32, chunks: u32) -> Advice {
        let layer = self.0.get_or_insert_mut(*layer, Layer::default);
        if layer.is_streamed {
            return Advice::Nothing;
        }
        layer.misses += 1;
        if layer.misses >= BULK_MISSES && layer.misses >= chunks / BULK_SHARE {
            layer.is_streamed = true;
            return Advice::Stream;
        }
        let near = |stream: &Stream| {
            missed + stream.window + SLACK >= stream.next && missed <= stream.next.saturating_add(SLACK)
        };
        let (start, window) = match layer.streams.iter().position(near) {
            Some(found) => {
                let stream = layer.streams.remove(found);
                (stream.next.max(missed + 1), (stream.window * 2).min(LAST_WINDOW))
            }
            None => (missed + 1, FIRST_WINDOW),
        };
        let end = start.saturating_add(window).min(chunks);
        if layer.streams.len() >= STREAMS {
            layer.streams.remove(0);
        }
        layer.streams.push(Stream { next: end, window });
        Advice::ReadAhead(start.min(end)..end)
    }

    /// Notes that the streaming of a layer has ended. If much of it is missed again, say after an eviction, it may be
    /// streamed again.
    pub(super) fn streamed(&mut self, layer: &Digest) {
        self.0.pop(layer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn digest() -> Digest {
        Digest::of(b"layer")
    }

    #[test]
    fn a_lone_miss_reads_little_ahead_and_a_stream_ever_more() {
        let mut ahead = Ahead::default();
        assert_eq!(ahead.missed(&digest(), 100, 10_000), Advice::ReadAhead(101..103));
        assert_eq!(ahead.missed(&digest(), 5000, 10_000), Advice::ReadAhead(5001..5003));
        assert_eq!(ahead.missed(&digest(), 103, 10_000), Advice::ReadAhead(104..108));
        assert_eq!(ahead.missed(&digest(), 5003, 10_000), Advice::ReadAhead(5004..5008));
        assert_eq!(ahead.missed(&digest(), 108, 10_000), Advice::ReadAhead(109..117));
        assert_eq!(ahead.missed(&digest(), 9_999, 10_000), Advice::ReadAhead(10_000..10_000));
    }

    #[test]
    fn a_layer_of_which_much_is_missed_is_streamed_once() {
        let mut ahead = Ahead::default();
        let advice: Vec<_> = (0..60).map(|n| ahead.missed(&digest(), n * 3, 200)).collect();
        assert_eq!(advice.iter().position(|advice| *advice == Advice::Stream), Some(49));
        assert!(advice[50..].iter().all(|advice| *advice == Advice::Nothing));
        ahead.streamed(&digest());
        assert_eq!(ahead.missed(&digest(), 7, 200), Advice::ReadAhead(8..10));
    }

    proptest! {
        #[test]
        fn advice_stays_within_the_layer(misses in proptest::collection::vec(0u32..500, 0..200)) {
            let mut ahead = Ahead::default();
            for missed in misses {
                if let Advice::ReadAhead(range) = ahead.missed(&digest(), missed, 500) {
                    prop_assert!(range.end <= 500 && range.len() <= LAST_WINDOW as usize);
                    prop_assert!(range.is_empty() || range.start > missed || range.start + LAST_WINDOW > missed);
                }
            }
        }
    }
}
