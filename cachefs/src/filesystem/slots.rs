//! Slots: which layer or chain a node number belongs to. They are given once and never given back.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use parking_lot::RwLock;
use store::Digest;
use store::layer::LayerIndex;

use super::chain::Chain;
use super::layer::Layer;
use super::node::Slot;
use crate::source::failure::{Failure, Result};
use crate::source::layer_name::LayerName;

/// What a slot holds.
#[derive(Debug, Clone)]
pub enum SlotContent {
    /// `/`, `layers`, `chains`, and everything below `images`.
    Catalogue,
    /// One layer, in overlayfs form. Every file that is not a directory has its node here, in `chains` too.
    Layer(Arc<Layer>),
    /// Directories of a chain: in its first slot those that several layers contribute to, then a slot for each layer.
    Chain(Arc<Chain>),
}

#[derive(Default)]
struct SlotTable {
    contents: Vec<SlotContent>,
    layers: HashMap<LayerName, Arc<Layer>>,
    chains: HashMap<Digest, Arc<Chain>>,
}

/// All slots.
pub struct Slots {
    /// Guards the table; reads are a bounds check and a reference count.
    table: RwLock<SlotTable>,
}

impl Default for Slots {
    fn default() -> Slots {
        Slots { table: RwLock::new(SlotTable { contents: vec![SlotContent::Catalogue], ..SlotTable::default() }) }
    }
}

impl Slots {
    /// What a slot holds.
    pub fn get(&self, slot: Slot) -> Result<SlotContent> {
        self.table.read().contents.get(slot.0 as usize).cloned().ok_or(Failure::UnknownNode)
    }

    /// The layer, if its index was loaded.
    pub fn layer(&self, name: &LayerName) -> Option<Arc<Layer>> {
        self.table.read().layers.get(name).filter(|layer| layer.index.get().is_some()).cloned()
    }

    /// The layer, which gets a slot if it has none yet.
    pub fn reserve_layer(&self, name: LayerName) -> Arc<Layer> {
        if let Some(layer) = self.table.read().layers.get(&name) {
            return Arc::clone(layer);
        }
        let mut guard = self.table.write();
        let table = &mut *guard;
        let slot = Slot(table.contents.len() as u32);
        let layer = table.layers.entry(name).or_insert_with(|| {
            let layer = Arc::new(Layer::new(name, slot));
            table.contents.push(SlotContent::Layer(Arc::clone(&layer)));
            layer
        });
        Arc::clone(layer)
    }

    /// Adds a layer's index; returns the layer.
    pub fn add_layer(&self, copy: u32, index: Arc<LayerIndex>) -> Arc<Layer> {
        let layer = self.reserve_layer(LayerName { diff_id: index.diff_id(), copy });
        let _ = layer.index.set(index);
        layer
    }

    /// The chain, if its layers' indexes were loaded.
    pub fn chain(&self, id: &Digest) -> Option<Arc<Chain>> {
        self.table.read().chains.get(id).filter(|chain| chain.is_open()).cloned()
    }

    /// The chain of `depth` layers, which gets slots if it has none yet: one for merged directories, one for each
    /// layer.
    pub fn reserve_chain(&self, id: Digest, depth: usize) -> Arc<Chain> {
        if let Some(chain) = self.table.read().chains.get(&id) {
            return Arc::clone(chain);
        }
        let mut guard = self.table.write();
        let table = &mut *guard;
        let first = Slot(table.contents.len() as u32);
        let chain = table.chains.entry(id).or_insert_with(|| {
            let chain = Arc::new(Chain::new(first, depth));
            table.contents.extend((0..=depth).map(|_| SlotContent::Chain(Arc::clone(&chain))));
            chain
        });
        Arc::clone(chain)
    }

    /// Notes that the kernel learns of `count` inodes of a slot or, if `count` is negative, forgets that many.
    pub fn known(&self, slot: Slot, count: i64) {
        match self.table.read().contents.get(slot.0 as usize) {
            Some(SlotContent::Layer(layer)) => layer.known.add(count),
            Some(SlotContent::Chain(chain)) => chain.known.add(count),
            Some(SlotContent::Catalogue) | None => {}
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
