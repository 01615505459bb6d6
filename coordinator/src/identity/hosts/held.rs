//! Which layers live leases hold, and until when.
//!
//! A collection asks this under the lock that removals take, once for each layer that it is about to remove. The answer costs the same
//! however many hosts there are and whatever they hold. For each layer, the ends of its leases are counted: the layer is held until the
//! last of them. Whether a lease is over depends on the time that the caller gives, not on when somebody noticed, so nothing here changes
//! when a lease ends by itself.
//!
//! Invariant: the counts match what the records of live hosts list; see `super::Kept`.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use jiff::Timestamp;
use store::Digest;

/// When the leases on a layer end, and how many end then. Most layers are held by one host, or by hosts that renewed at different times:
/// the first end is stored in place, the others, if any, elsewhere.
#[derive(Debug, Default)]
struct Ends {
    first: Option<(Timestamp, u32)>,
    #[expect(clippy::box_collection, reason = "there are very many of these, and nearly all have none")]
    others: Option<Box<BTreeMap<Timestamp, u32>>>,
}

impl Ends {
    fn add(&mut self, end: Timestamp) {
        match &mut self.first {
            Some((first, count)) if *first == end => *count += 1,
            None => self.first = Some((end, 1)),
            Some(_) => *self.others.get_or_insert_default().entry(end).or_default() += 1,
        }
    }

    fn remove(&mut self, end: Timestamp) {
        if let Some((_, count)) = self.first.as_mut().filter(|(first, _)| *first == end) {
            *count -= 1;
            if *count == 0 {
                self.first = self.others.as_mut().and_then(|others| others.pop_last());
            }
        } else if let Some(others) = &mut self.others
            && let Entry::Occupied(mut count) = others.entry(end)
        {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
        self.others = self.others.take().filter(|others| !others.is_empty());
    }

    fn last(&self) -> Option<Timestamp> {
        let others = self.others.as_ref().and_then(|others| others.last_key_value()).map(|(end, _)| *end);
        self.first.map(|(end, _)| end).max(others)
    }
}

/// The layers that leases hold.
#[derive(Debug, Default)]
pub(super) struct HeldLayers {
    ends: HashMap<Digest, Ends>,
}

impl HeldLayers {
    /// Adds a lease on these layers that ends at `end`.
    pub(super) fn add(&mut self, layers: &[Digest], end: Timestamp) {
        for layer in layers {
            self.ends.entry(*layer).or_default().add(end);
        }
    }

    /// Removes a lease on these layers that was to end at `end`.
    pub(super) fn remove(&mut self, layers: &[Digest], end: Timestamp) {
        for layer in layers {
            let Some(ends) = self.ends.get_mut(layer) else { continue };
            ends.remove(end);
            if ends.first.is_none() {
                self.ends.remove(layer);
            }
        }
        // Gives back memory that was needed only for a while.
        if self.ends.len() < self.ends.capacity() / 4 {
            self.ends.shrink_to_fit();
        }
    }

    /// Whether a lease on the layer is still running at the time `now`.
    pub(super) fn holds(&self, layer: &Digest, now: Timestamp) -> bool {
        self.ends.get(layer).and_then(Ends::last).is_some_and(|end| now < end)
    }

    /// All layers with a lease that is still running at the time `now`.
    pub(super) fn at(&self, now: Timestamp) -> BTreeSet<Digest> {
        self.ends.keys().filter(|layer| self.holds(layer, now)).copied().collect()
    }

    /// How many layers have a counted lease, over or not.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }
}
