//! Which chunks are fetched with one request: those that follow each other in a pack.
//!
//! A request to a shared disk costs its round trip, however much it brings. So neighbouring chunks are fetched
//! together, up to a length at which the next demand would wait longer behind them than a round trip takes. Pure.

use store::chunk::ChunkRef;

/// The longest request, bytes: some 5 ms at 100 MB/s.
pub(super) const EXTENT: u64 = 512 << 10;
/// The longest gap between two chunks that is read along with them rather than at the cost of another request, bytes.
const GAP: u64 = 64 << 10;

/// Whether `next` may come with the request that starts with `first` and ends with `last`.
fn follows(first: &ChunkRef, last: &ChunkRef, next: &ChunkRef) -> bool {
    let end = last.offset.saturating_add(last.stored_len.into());
    let total = next.offset.saturating_add(next.stored_len.into()).saturating_sub(first.offset);
    next.pack == last.pack && next.offset >= end && next.offset - end <= GAP && total <= EXTENT
}

/// Groups wanted chunks, given in the order of need, into requests.
pub fn extents<T>(wanted: Vec<T>, chunk: impl Fn(&T) -> &ChunkRef) -> Vec<Vec<T>> {
    let mut extents: Vec<Vec<T>> = Vec::new();
    for item in wanted {
        let fits = |extent: &&mut Vec<T>| match (extent.first(), extent.last()) {
            (Some(first), Some(last)) => follows(chunk(first), chunk(last), chunk(&item)),
            _ => false,
        };
        match extents.last_mut().filter(fits) {
            Some(extent) => extent.push(item),
            None => extents.push(vec![item]),
        }
    }
    extents
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use store::ContentDigest;
    use store::chunk::Codec;

    fn chunk(pack: u8, offset: u64, stored_len: u32) -> ChunkRef {
        let digest = ContentDigest::of(&offset.to_le_bytes());
        let pack = ContentDigest::of(&[pack]);
        ChunkRef { pack, offset, stored_len, raw_len: stored_len, codec: Codec::Plain, digest }
    }

    #[test]
    fn neighbours_travel_together_and_strangers_do_not() {
        let wanted = vec![
            chunk(1, 0, 1000),
            chunk(1, 1000, 1000),
            chunk(1, 2000 + GAP, 10),
            chunk(1, 2011 + 2 * GAP, 10),
            chunk(2, 2021 + 2 * GAP, 10),
            chunk(2, 0, 10),
        ];
        let lengths: Vec<_> = extents(wanted, |chunk| chunk).iter().map(Vec::len).collect();
        assert_eq!(lengths, [3, 1, 1, 1]);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_no_request_is_too_long(
            places in proptest::collection::vec((0u8..3, 0u64..3_000_000, 1u32..600_000), 0..60)
        ) {
            let wanted: Vec<_> = places.iter().map(|(pack, offset, len)| chunk(*pack, *offset, *len)).collect();
            let cut = extents(wanted.clone(), |chunk| chunk);
            for extent in &cut {
                let (first, last) = (extent[0], extent[extent.len() - 1]);
                prop_assert!(extent.len() == 1 || last.offset + u64::from(last.stored_len) - first.offset <= EXTENT);
                prop_assert!(extent.windows(2).all(|pair| pair[0].offset < pair[1].offset && pair[0].pack == pair[1].pack));
            }
            prop_assert_eq!(cut.concat(), wanted);
        }
    }
}
