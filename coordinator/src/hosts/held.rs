//! Which layers live leases hold, and until when.
//!
//! A collection asks this under the lock that removals take, once for each layer that it is about to remove; the answer costs the
//! same however many hosts there are and whatever they hold. For each layer the ends of the leases on it are counted: it is held
//! as long as the last of them is to come. Whether a lease is over is for the caller's time to say, not for when somebody
//! noticed, so nothing here changes when a lease ends by itself.
//!
//! Invariant: what is counted is what the records of live hosts list; see `super::Kept`.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use jiff::Timestamp;
use store::Digest;

/// The layers that leases hold.
#[derive(Debug, Default)]
pub(super) struct HeldLayers {
    /// For each layer the ends of the leases on it, and how many end then.
    ends: HashMap<Digest, BTreeMap<Timestamp, u32>>,
}

impl HeldLayers {
    /// A lease that ends at `end` begins to hold these.
    pub(super) fn add(&mut self, layers: impl Iterator<Item = Digest>, end: Timestamp) {
        for layer in layers {
            *self.ends.entry(layer).or_default().entry(end).or_default() += 1;
        }
    }

    /// A lease that was to end at `end` holds these no longer.
    pub(super) fn remove(&mut self, layers: impl Iterator<Item = Digest>, end: Timestamp) {
        for layer in layers {
            let Some(ends) = self.ends.get_mut(&layer) else { continue };
            if let Entry::Occupied(mut count) = ends.entry(end) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                }
            }
            if ends.is_empty() {
                self.ends.remove(&layer);
            }
        }
    }

    /// Whether a lease on the layer is not over at the time `now`.
    pub(super) fn holds(&self, layer: &Digest, now: Timestamp) -> bool {
        self.ends.get(layer).and_then(BTreeMap::last_key_value).is_some_and(|(end, _)| now < *end)
    }

    /// All layers of which that is so.
    pub(super) fn at(&self, now: Timestamp) -> BTreeSet<Digest> {
        self.ends.keys().filter(|layer| self.holds(layer, now)).copied().collect()
    }

    /// How many layers any lease is counted for, over or not.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }
}
