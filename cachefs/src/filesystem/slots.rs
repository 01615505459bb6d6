//! Slots: which layer or chain a node number belongs to. They are given once and never given back.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::RwLock;
use store::Digest;
use store::layer::LayerIndex;

use super::chain::Chain;
use super::node::Slot;
use crate::failure::{Failure, Result};
use crate::layer_name::LayerName;

/// One directory of a layer: its slot, and the layer's index once that was loaded.
#[derive(Debug)]
pub struct Layer {
    /// What it is called.
    pub name: LayerName,
    /// Its slot.
    pub slot: Slot,
    index: OnceLock<Arc<LayerIndex>>,
    known: Known,
}

/// How often the kernel was told of inodes of one layer or chain and has not forgotten them since. It may be told of one
/// on one thread and forget it on another: then the number is off for a moment.
#[derive(Debug, Default)]
pub(super) struct Known(AtomicI64);

impl Known {
    fn add(&self, count: i64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// Whether the kernel knows any.
    pub(super) fn is_any(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

impl Layer {
    /// The index. A listing gives out numbers of layers that nobody has looked up: using one gives
    /// [`Failure::UnknownNode`], at which the kernel looks the name up.
    pub fn index(&self) -> Result<&Arc<LayerIndex>> {
        self.index.get().ok_or(Failure::UnknownNode)
    }
}

/// What a slot holds.
#[derive(Debug, Clone)]
pub enum Place {
    /// `/`, `layers`, `chains`, and everything below `images`.
    Control,
    /// One layer, in overlayfs form. Every file that is not a directory has its node here, in `chains` too.
    Layer(Arc<Layer>),
    /// Directories of a chain: in its first slot those that several layers contribute to, then a slot for each layer.
    Chain(Arc<Chain>),
}

#[derive(Default)]
struct Table {
    places: Vec<Place>,
    layers: HashMap<LayerName, Arc<Layer>>,
    chains: HashMap<Digest, Arc<Chain>>,
}

/// All slots.
pub struct Slots {
    /// Guards the table; reads are a bounds check and a reference count.
    table: RwLock<Table>,
}

impl Default for Slots {
    fn default() -> Slots {
        Slots { table: RwLock::new(Table { places: vec![Place::Control], ..Table::default() }) }
    }
}

impl Slots {
    /// What a slot holds.
    pub fn get(&self, slot: Slot) -> Result<Place> {
        self.table.read().places.get(slot.0 as usize).cloned().ok_or(Failure::UnknownNode)
    }

    /// The layer, if its index was loaded.
    pub fn layer(&self, name: &LayerName) -> Option<Arc<Layer>> {
        self.table.read().layers.get(name).filter(|layer| layer.index.get().is_some()).cloned()
    }

    /// The layer, with a slot from now on.
    pub fn reserve_layer(&self, name: LayerName) -> Arc<Layer> {
        if let Some(layer) = self.table.read().layers.get(&name) {
            return Arc::clone(layer);
        }
        let mut guard = self.table.write();
        let table = &mut *guard;
        let slot = Slot(table.places.len() as u32);
        let layer = table.layers.entry(name).or_insert_with(|| {
            let layer = Arc::new(Layer { name, slot, index: OnceLock::new(), known: Known::default() });
            table.places.push(Place::Layer(Arc::clone(&layer)));
            layer
        });
        Arc::clone(layer)
    }

    /// The layer, with its index from now on.
    pub fn add_layer(&self, copy: u32, index: Arc<LayerIndex>) -> Arc<Layer> {
        let layer = self.reserve_layer(LayerName { diff_id: index.diff_id(), copy });
        let _ = layer.index.set(index);
        layer
    }

    /// The chain, if its layers' indexes were loaded.
    pub fn chain(&self, id: &Digest) -> Option<Arc<Chain>> {
        self.table.read().chains.get(id).filter(|chain| chain.is_open()).cloned()
    }

    /// The chain of `depth` layers, with slots from now on: one for merged directories, one for each layer.
    pub fn reserve_chain(&self, id: Digest, depth: usize) -> Arc<Chain> {
        if let Some(chain) = self.table.read().chains.get(&id) {
            return Arc::clone(chain);
        }
        let mut guard = self.table.write();
        let table = &mut *guard;
        let first = Slot(table.places.len() as u32);
        let chain = table.chains.entry(id).or_insert_with(|| {
            let chain = Arc::new(Chain::new(first, depth));
            table.places.extend((0..=depth).map(|_| Place::Chain(Arc::clone(&chain))));
            chain
        });
        Arc::clone(chain)
    }

    /// The kernel learns of (or, if `count` is negative, forgets) so many inodes of a slot.
    pub fn known(&self, slot: Slot, count: i64) {
        match self.table.read().places.get(slot.0 as usize) {
            Some(Place::Layer(layer)) => layer.known.add(count),
            Some(Place::Chain(chain)) => chain.known.add(count),
            Some(Place::Control) | None => {}
        }
    }

    /// The layers of which the kernel knows inodes, by themselves or in a chain.
    pub fn in_use(&self) -> BTreeSet<Digest> {
        let table = self.table.read();
        let layers = table.layers.values().filter(|layer| layer.index.get().is_some() && layer.known.is_any());
        let mut in_use: BTreeSet<_> = layers.map(|layer| layer.name.diff_id).collect();
        let chains = table.chains.values().filter(|chain| chain.known.is_any());
        in_use.extend(chains.flat_map(|chain| chain.diff_ids()));
        in_use
    }

    /// Number of layers and chains that have been opened.
    pub fn opened(&self) -> (usize, usize) {
        let table = self.table.read();
        let layers = table.layers.values().filter(|layer| layer.index.get().is_some()).count();
        (layers, table.chains.values().filter(|chain| chain.is_open()).count())
    }
}
