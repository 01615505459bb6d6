//! The first content of a startup pack, read in parts before the startup table says where its chunks are. Pure.

use store::chunk::{ChunkRef, RawChunk};

/// The length of every part but the last, bytes: the first chunks need not wait for all of it.
pub(super) const PART: u64 = 256 << 10;

/// A chunk's position in a startup pack, and its bytes if they came.
pub(super) type Arrived = (u32, Option<RawChunk>);

#[derive(Debug, Clone)]
enum Part {
    Coming,
    Came(Vec<u8>),
    Failed,
}

/// The parts, and the chunks that lie in them.
#[derive(Debug, Default)]
pub(super) struct Head {
    parts: Vec<Part>,
    /// Chunks, each with the place of its first byte in the head, in order; those that were given out are gone.
    chunks: Vec<(u32, u64, ChunkRef)>,
}

impl Head {
    /// A head of `len` bytes.
    pub(super) fn new(len: u64) -> Head {
        Head { parts: vec![Part::Coming; len.div_ceil(PART) as usize], chunks: Vec::new() }
    }

    /// The ranges of bytes to be read: where each begins, and its length.
    pub(super) fn ranges(len: u64) -> impl Iterator<Item = (usize, u64, u64)> {
        (0..).zip((0..len).step_by(PART as usize)).map(move |(part, start)| (part, start, PART.min(len - start)))
    }

    /// Notes which chunks lie in the head: the pack's first, back to back. Returns those that have come.
    pub(super) fn holds(&mut self, chunks: &[ChunkRef]) -> Vec<Arrived> {
        let mut place = 0;
        for (position, chunk) in (0..).zip(chunks) {
            self.chunks.push((position, place, *chunk));
            place += u64::from(chunk.stored_len);
        }
        self.settled()
    }

    /// Takes a part, or nothing if it cannot be read. Returns the chunks that have come by that.
    pub(super) fn came(&mut self, part: usize, bytes: Option<Vec<u8>>) -> Vec<Arrived> {
        if let Some(part) = self.parts.get_mut(part) {
            *part = bytes.map_or(Part::Failed, Part::Came);
        }
        self.settled()
    }

    /// Takes out the chunks of which nothing is coming any more.
    fn settled(&mut self) -> Vec<Arrived> {
        let Head { parts, chunks } = self;
        let of = |place: u64, chunk: &ChunkRef| {
            let last = (place + u64::from(chunk.stored_len).max(1) - 1) / PART;
            parts.get((place / PART) as usize..=last as usize).unwrap_or_default()
        };
        let settled = chunks
            .extract_if(.., |(_, place, chunk)| of(*place, chunk).iter().all(|part| !matches!(part, Part::Coming)));
        let cut = |(position, place, chunk): (u32, u64, ChunkRef)| {
            let mut bytes = Vec::with_capacity(chunk.stored_len as usize);
            let mut skip = (place % PART) as usize;
            for part in of(place, &chunk) {
                let Part::Came(part) = part else { return (position, None) };
                let rest = part.get(skip..).unwrap_or_default();
                bytes.extend_from_slice(&rest[..rest.len().min(chunk.stored_len as usize - bytes.len())]);
                skip = 0;
            }
            let is_whole = bytes.len() == chunk.stored_len as usize;
            (position, is_whole.then(|| RawChunk::new(chunk, bytes)))
        };
        settled.collect::<Vec<_>>().into_iter().map(cut).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use store::ContentDigest;
    use store::chunk::Codec;

    fn bytes(at: u64, len: u64) -> Vec<u8> {
        (at..at + len).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 11) as u8).collect()
    }

    proptest! {
        /// Whatever comes first, every chunk comes out once, with its own bytes unless a part of it has failed.
        #[test]
        fn each_chunk_comes_once_and_whole(
            lens in proptest::collection::vec(1..400_000u32, 0..8),
            failed in any::<Option<prop::sample::Index>>(), table_at in 0..9usize, backwards: bool
        ) {
            let total: u64 = lens.iter().map(|len| u64::from(*len)).sum();
            let mut place = 0;
            let chunks: Vec<_> = lens.iter().map(|len| {
                let digest = ContentDigest::of(&bytes(place, (*len).into()));
                let (pack, offset) = (ContentDigest::of(b"pack"), 100 + place);
                place += u64::from(*len);
                ChunkRef { pack, offset, stored_len: *len, raw_len: *len, codec: Codec::Plain, digest }
            }).collect();
            let mut ranges: Vec<_> = Head::ranges(total).collect();
            prop_assert_eq!(ranges.iter().map(|(_, _, len)| len).sum::<u64>(), total);
            let failed = failed.filter(|_| !ranges.is_empty()).map(|failed| failed.index(ranges.len()));
            if backwards {
                ranges.reverse();
            }
            let (mut head, mut out) = (Head::new(total), Vec::new());
            for (step, (part, start, len)) in ranges.iter().enumerate() {
                if step == table_at {
                    out.extend(head.holds(&chunks));
                }
                out.extend(head.came(*part, (failed != Some(*part)).then(|| bytes(*start, *len))));
            }
            if table_at >= ranges.len() {
                out.extend(head.holds(&chunks));
            }
            let mut positions: Vec<_> = out.iter().map(|(position, _)| *position).collect();
            positions.sort_unstable();
            prop_assert_eq!(positions, (0..chunks.len() as u32).collect::<Vec<_>>());
            for (position, raw) in out {
                let chunk = chunks[position as usize];
                let start = chunk.offset - 100;
                let parts = start / PART..=(start + u64::from(chunk.stored_len) - 1) / PART;
                let has_failed = failed.is_some_and(|failed| parts.contains(&(failed as u64)));
                prop_assert_eq!(raw.is_none(), has_failed);
                prop_assert!(raw.is_none_or(|raw| raw.verify().is_ok()));
            }
        }
    }
}
