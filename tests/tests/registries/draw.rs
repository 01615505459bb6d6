//! The behaviours to try: each value alone, then several together, so that as many pairs of values as possible occur.

use std::collections::BTreeSet;

use tests::registry::{Behaviour, DIMENSIONS};

type Value = (&'static str, &'static str);

/// A random number generator (SplitMix64) that yields the same numbers for the same seed.
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end as u64) as usize
    }
}

/// All values except the first one of each dimension.
fn others() -> Vec<Value> {
    DIMENSIONS.iter().flat_map(|(name, values)| values[1..].iter().map(|value| (*name, *value))).collect()
}

fn behaviour(values: &[Value]) -> Behaviour {
    values.iter().fold(Behaviour::good(), |behaviour, (name, value)| behaviour.with(name, value))
}

/// The value, together with another one without which it has no effect.
fn supported(value: Value) -> Vec<Value> {
    match value {
        ("range", _) => vec![value, ("framing", "cut")],
        ("redirected", _) => vec![value, ("redirect", "307")],
        ("redirect", "downgrade") => vec![value, ("channel", "tls")],
        _ => vec![value],
    }
}

/// The well-behaved registry, and one behaviour for each other value.
pub(crate) fn singles() -> Vec<Behaviour> {
    let each = others().into_iter().map(|value| behaviour(&supported(value)));
    std::iter::once(Behaviour::good()).chain(each).collect()
}

/// `count` behaviours, each with two to four values that are not the first.
pub(crate) fn combinations(seed: u64, count: usize) -> Vec<Behaviour> {
    let (mut numbers, values) = (Numbers::new(seed), others());
    let mut met: BTreeSet<(Value, Value)> = BTreeSet::new();
    let mut drawn = Vec::new();
    while drawn.len() < count {
        // Of eight candidates the one with the most new pairs is taken.
        let candidates = (0..8).map(|_| {
            let size = 2 + numbers.below(3);
            (0..size).flat_map(|_| supported(values[numbers.below(values.len())])).collect::<Vec<_>>()
        });
        let best = candidates
            .map(|chosen| behaviour(&chosen))
            .max_by_key(|candidate| pairs(candidate).filter(|pair| !met.contains(pair)).count());
        if let Some(best) = best {
            met.extend(pairs(&best).collect::<Vec<_>>());
            drawn.push(best);
        }
    }
    drawn
}

fn pairs(behaviour: &Behaviour) -> impl Iterator<Item = (Value, Value)> {
    let values = behaviour.others().to_vec();
    let pair =
        move |(at, one): (usize, Value)| values[at + 1..].iter().map(move |other| (one, *other)).collect::<Vec<_>>();
    behaviour.others().to_vec().into_iter().enumerate().flat_map(pair)
}
