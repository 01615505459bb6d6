//! What live hosts need, as seen by a collection.

use store::Digest;

use crate::identity::hosts::{Hosts, LayersInUse};
use crate::state::clock;

/// Access to the leases of live hosts.
pub trait Holds: Send + Sync {
    /// The layers that hosts need now.
    fn layers_in_use(&self) -> LayersInUse;

    /// Whether a host needs the layer now. Called under the lock that removals take, so it must neither block nor do I/O.
    fn holds(&self, layer: &Digest) -> bool {
        match self.layers_in_use() {
            LayersInUse::NotYetKnown { .. } => true,
            LayersInUse::Layers(layers) => layers.contains(layer),
        }
    }
}

impl Holds for Hosts {
    fn layers_in_use(&self) -> LayersInUse {
        self.layers_in_use(clock::steady())
    }

    fn holds(&self, layer: &Digest) -> bool {
        self.holds(layer, clock::steady())
    }
}
