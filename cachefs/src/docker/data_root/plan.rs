//! What to do to a data-root: a pure function of what is wanted, what is there, and what we put there.
//!
//! Rules: what is there but not among the owned entries is somebody else's and stays as it is. A name that we gave
//! follows the store, unless somebody has given it to another image since. What we added is removed when the store no
//! longer has it, unless a container, a name, a local child image, a layer on top or BuildKit's cache still uses it.
//! Nothing is added or removed under a running dockerd. It has its database in memory: an image that is removed would still
//! be there, and every pull, load or build of an image that shares a layer with an added one would fail, for dockerd would
//! find a layer on the disk that it does not know.

use std::collections::{BTreeMap, BTreeSet};

use store::Digest;

use super::actual::ActualState;
use super::desired::DesiredState;
use super::layer;
use super::owned_entries::OwnedEntries;

/// What a data-root lacks, and what is to be removed from it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Layers to add, parents first.
    pub(super) add_layers: Vec<Digest>,
    /// Layers of ours, there already, whose graph driver files are to be checked, parents first.
    pub(super) check_layers: Vec<Digest>,
    /// Images to add.
    pub(super) add_images: BTreeSet<Digest>,
    /// Names to give.
    pub(super) set_references: BTreeMap<String, Digest>,
    /// Names that somebody has given to another image than the store says.
    pub(super) kept_references: BTreeSet<String>,
    /// Names to take away.
    pub(super) remove_references: BTreeSet<String>,
    /// Images to remove.
    pub(super) remove_images: BTreeSet<Digest>,
    /// Layers to remove, children first.
    pub(super) remove_layers: Vec<Digest>,
    /// Layers and images among the owned entries that are not there any more, or not ours any more.
    pub(super) forget: BTreeSet<Digest>,
}

/// Whether this program added the layer that is there. One that dockerd has pulled since under the same name is
/// dockerd's.
pub(super) fn is_ours(present: &ActualState, owned: &OwnedEntries, chain: &Digest) -> bool {
    let cache_id = present.layers.get(chain).map(|layer| &layer.cache_id);
    owned.layers.contains(chain) && cache_id == Some(&layer::cache_id(chain))
}

/// Whether this program added the image that is there.
pub(super) fn is_our_image(present: &ActualState, owned: &OwnedEntries, id: &Digest) -> bool {
    let top = present.images.get(id).map(|image| image.top);
    owned.images.contains(id) && top.is_some_and(|top| top.is_none_or(|top| is_ours(present, owned, &top)))
}

impl Plan {
    /// Compares what is wanted with what is there.
    pub(super) fn new(wanted: &DesiredState, present: &ActualState, owned: &OwnedEntries) -> Plan {
        let mut plan = Plan::default();
        for chain in &wanted.order {
            match present.layers.contains_key(chain) {
                false => plan.add_layers.push(*chain),
                true if is_ours(present, owned, chain) => plan.check_layers.push(*chain),
                true => {}
            }
        }
        plan.add_images = wanted.images.keys().filter(|id| !present.images.contains_key(*id)).copied().collect();
        plan.references(wanted, present, owned);
        plan.removals(wanted, present, owned);
        let layers = owned.layers.iter().filter(|chain| !is_ours(present, owned, chain));
        plan.forget.extend(layers.filter(|chain| !plan.add_layers.contains(chain)));
        let images = owned.images.iter().filter(|id| !is_our_image(present, owned, id));
        plan.forget.extend(images.filter(|id| !plan.add_images.contains(id)));
        plan
    }

    fn references(&mut self, wanted: &DesiredState, present: &ActualState, owned: &OwnedEntries) {
        for (name, image) in &wanted.references {
            match present.references.get(name) {
                Some(there) if there == *image => {}
                Some(there) if !owned.gave(name, &there) => {
                    self.kept_references.insert(name.clone());
                }
                _ => {
                    self.set_references.insert(name.clone(), *image);
                }
            }
        }
        for name in owned.references.keys() {
            let there = present.references.get(name);
            let is_unusable = there.is_some_and(|id| wanted.unusable.contains(&id));
            let stays = wanted.untouchable.references.contains(name) && !is_unusable;
            let ours = |id: Digest| owned.gave(name, &id) && is_our_image(present, owned, &id);
            if !wanted.references.contains_key(name) && !stays && there.is_some_and(ours) {
                self.remove_references.insert(name.clone());
            }
        }
    }

    fn removals(&mut self, wanted: &DesiredState, present: &ActualState, owned: &OwnedEntries) {
        let mut named: BTreeSet<Digest> = self.set_references.values().copied().collect();
        let stays = |name: &&str| !self.remove_references.contains(*name) && !self.set_references.contains_key(*name);
        named.extend(present.references.iter().filter(|(name, _)| stays(name)).map(|(_, image)| image));
        let parents: BTreeSet<_> = present.images.values().filter_map(|image| image.parent).collect();
        let used = |id: &Digest| {
            wanted.images.contains_key(id)
                || wanted.untouchable.images.contains(id)
                || named.contains(id)
                || parents.contains(id)
                || present.container_images.contains_key(id)
        };
        let ours = owned.images.iter().filter(|id| is_our_image(present, owned, id));
        self.remove_images = ours.filter(|id| !used(id)).copied().collect();
        self.removed_layers(wanted, present, owned);
    }

    fn removed_layers(&mut self, wanted: &DesiredState, present: &ActualState, owned: &OwnedEntries) {
        let images = present.images.iter().filter(|(id, _)| !self.remove_images.contains(*id));
        let mut roots: BTreeSet<Digest> = images.filter_map(|(_, image)| image.top).collect();
        roots.extend(wanted.layers.keys().chain(&wanted.untouchable.layers));
        roots.extend(present.container_layers.iter().chain(&present.build_cache));
        roots.extend(present.layers.keys().filter(|chain| !is_ours(present, owned, chain)));
        let mut used = BTreeSet::new();
        for root in roots {
            let mut at = Some(root);
            while let Some(chain) = at.filter(|chain| used.insert(*chain)) {
                at = present.layers.get(&chain).and_then(|layer| layer.parent);
            }
        }
        let depth = |chain: &Digest| present.chain(*chain).len();
        let ours = owned.layers.iter().filter(|chain| is_ours(present, owned, chain));
        self.remove_layers = ours.filter(|chain| !used.contains(*chain)).copied().collect();
        self.remove_layers.sort_by_key(|chain| std::cmp::Reverse(depth(chain)));
    }

    /// Whether there is something to remove.
    pub(super) fn removes(&self) -> bool {
        !(self.remove_references.is_empty() && self.remove_images.is_empty() && self.remove_layers.is_empty())
    }

    /// Whether there is something to add.
    pub(super) fn adds(&self) -> bool {
        !(self.add_layers.is_empty() && self.add_images.is_empty() && self.set_references.is_empty())
    }

    /// Takes out of the plan, and returns, what a running dockerd must not meet: everything but the repair of layers that it
    /// knows.
    pub(super) fn hold_back(&mut self) -> Plan {
        let check_layers = std::mem::take(&mut self.check_layers);
        std::mem::replace(self, Plan { check_layers, ..Plan::default() })
    }
}

#[cfg(test)]
mod tests;
