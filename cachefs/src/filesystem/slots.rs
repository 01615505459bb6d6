//! Slots: which layer or chain a node number belongs to. They are given once in a mount's life and never given back: a worker that
//! takes the mount over gives out those that follow.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use parking_lot::RwLock;
use store::Digest;
use store::layer::LayerIndex;

use super::chain::{Chain, SLOTS_OF_LAYER};
use super::kernel_state::{KernelState, Record};
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
    /// Directories of a chain, which has some slots for each of its layers.
    Chain(Arc<Chain>),
}

struct SlotTable {
    contents: Vec<SlotContent>,
    layers: HashMap<LayerName, Arc<Layer>>,
    chains: HashMap<Digest, Arc<Chain>>,
}

impl Default for SlotTable {
    fn default() -> SlotTable {
        let (layers, chains) = Default::default();
        SlotTable { contents: vec![SlotContent::Catalogue], layers, chains }
    }
}

impl SlotTable {
    /// The slot that is given next.
    fn next(&self) -> Slot {
        Slot(self.contents.len() as u32)
    }

    fn add_layer(&mut self, layer: Layer) -> Arc<Layer> {
        let layer = Arc::new(layer);
        self.contents.push(SlotContent::Layer(Arc::clone(&layer)));
        self.layers.insert(layer.name, Arc::clone(&layer));
        layer
    }

    fn add_chain(&mut self, id: Digest, chain: Chain) -> Arc<Chain> {
        let chain = Arc::new(chain);
        let slots = SLOTS_OF_LAYER * chain.depth();
        self.contents.extend((0..slots).map(|_| SlotContent::Chain(Arc::clone(&chain))));
        self.chains.insert(id, Arc::clone(&chain));
        chain
    }

    /// The layers of these slots, if all of them are layers.
    fn layers_of(&self, slots: &[u32]) -> Option<Vec<Arc<Layer>>> {
        let layer = |slot: &u32| match self.contents.get(*slot as usize) {
            Some(SlotContent::Layer(layer)) => Some(Arc::clone(layer)),
            _ => None,
        };
        slots.iter().map(layer).collect()
    }

    /// The layers of a chain that was opened by this worker or an earlier one.
    fn diff_ids(&self, chain: &Chain) -> Vec<Digest> {
        let unopened = chain.unopened().and_then(|slots| self.layers_of(slots));
        let unopened = unopened.into_iter().flatten().map(|layer| layer.name.diff_id);
        chain.diff_ids().chain(unopened).collect()
    }
}

/// All slots.
#[derive(Default)]
pub struct Slots {
    /// Guards the table; reads are a bounds check and a reference count. Taken before the records' lock.
    table: RwLock<SlotTable>,
    state: Arc<KernelState>,
}

/// A layer or chain that an earlier worker had opened, and this one has not.
#[derive(Debug, Clone)]
pub(super) enum Unopened {
    /// A layer.
    Layer(Arc<Layer>),
    /// A chain with its layers, topmost first.
    Chain(Arc<Chain>, Vec<Arc<Layer>>),
}

impl Slots {
    /// The slots that were given in this state, and those that follow.
    pub(super) fn resume(state: Arc<KernelState>) -> Slots {
        let mut table = SlotTable::default();
        // The last that is said of a chain comes when it has its slots.
        let opened = state.earlier.iter().filter_map(|record| match record {
            Record::LayerOpened(slot) => Some((*slot, &[][..])),
            Record::ChainOpened(slot, layers) => Some((*slot, &layers[..])),
            _ => None,
        });
        let opened: HashMap<u32, &[u32]> = opened.collect();
        for record in &state.earlier {
            let slot = table.next();
            let opened = opened.get(&slot.0);
            match record {
                Record::Layer(name) => {
                    table.add_layer(Layer::new(*name, slot, state.references(slot), opened.is_some()));
                }
                Record::Chain(id, depth) => {
                    let layers = opened.map(|layers| layers.to_vec());
                    table.add_chain(*id, Chain::new(slot, *depth, state.references(slot), layers));
                }
                _ => {}
            }
        }
        Slots { table: RwLock::new(table), state }
    }

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
        let mut table = self.table.write();
        if let Some(layer) = table.layers.get(&name) {
            return Arc::clone(layer);
        }
        let slot = table.next();
        self.state.record(&Record::Layer(name));
        table.add_layer(Layer::new(name, slot, self.state.references(slot), false))
    }

    /// Adds a layer's index; returns the layer.
    pub fn add_layer(&self, copy: u32, index: Arc<LayerIndex>) -> Arc<Layer> {
        let layer = self.reserve_layer(LayerName { diff_id: index.diff_id(), copy });
        if layer.index.get().is_none() {
            self.state.record(&Record::LayerOpened(layer.slot.0));
            let _ = layer.index.set(index);
        }
        layer
    }

    /// The chain, if its layers' indexes were loaded.
    pub fn chain(&self, id: &Digest) -> Option<Arc<Chain>> {
        self.table.read().chains.get(id).filter(|chain| chain.is_open()).cloned()
    }

    /// The chain, if it has slots, be it open or not.
    pub(super) fn known_chain(&self, id: &Digest) -> Option<Arc<Chain>> {
        self.table.read().chains.get(id).cloned()
    }

    /// The layers of a chain that was opened by this worker or an earlier one.
    pub(super) fn layers_of(&self, id: &Digest) -> Vec<Digest> {
        let table = self.table.read();
        table.chains.get(id).map(|chain| table.diff_ids(chain)).unwrap_or_default()
    }

    /// The chain of `depth` layers, which gets slots if it has none yet.
    pub fn reserve_chain(&self, id: Digest, depth: usize) -> Arc<Chain> {
        if let Some(chain) = self.table.read().chains.get(&id) {
            return Arc::clone(chain);
        }
        let mut table = self.table.write();
        if let Some(chain) = table.chains.get(&id) {
            return Arc::clone(chain);
        }
        let first = table.next();
        self.state.record(&Record::Chain(id, depth));
        table.add_chain(id, Chain::new(first, depth, self.state.references(first), None))
    }

    /// Opens a chain with its layers, topmost first, whose indexes were loaded.
    pub fn open_chain(&self, chain: &Chain, layers: Vec<Arc<Layer>>) -> Result<()> {
        if !chain.is_open() {
            let slots = layers.iter().map(|layer| layer.slot.0).collect();
            self.state.record(&Record::ChainOpened(chain.first_slot().0, slots));
        }
        chain.open(layers)
    }

    /// What holds a slot, if an earlier worker had opened that and this one has not.
    pub(super) fn unopened(&self, slot: Slot) -> Option<Unopened> {
        match self.get(slot).ok()? {
            SlotContent::Catalogue => None,
            SlotContent::Layer(layer) => layer.is_unopened().then_some(Unopened::Layer(layer)),
            SlotContent::Chain(chain) => {
                let layers = chain.unopened().and_then(|slots| self.table.read().layers_of(slots))?;
                Some(Unopened::Chain(chain, layers))
            }
        }
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
        let is_opened = |layer: &&Arc<Layer>| layer.index.get().is_some() || layer.is_unopened();
        let layers = table.layers.values().filter(is_opened).filter(|layer| layer.known.is_any());
        let mut in_use: BTreeSet<_> = layers.map(|layer| layer.name.diff_id).collect();
        let chains = table.chains.values().filter(|chain| chain.known.is_any());
        in_use.extend(chains.flat_map(|chain| table.diff_ids(chain)));
        in_use
    }

    /// Number of layers and chains that have been opened.
    pub fn opened(&self) -> (usize, usize) {
        let table = self.table.read();
        let layers = table.layers.values().filter(|layer| layer.index.get().is_some()).count();
        (layers, table.chains.values().filter(|chain| chain.is_open()).count())
    }
}
