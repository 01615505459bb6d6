//! Requests that find an index's local copy gone: evicted, removed, or on a bad disk; or that find a layer not open, because the worker that
//! had opened it has died and this one has taken its mount over.
//!
//! The index is fetched from the store again, which may take as long as the shared disk does, and the request is tried
//! once more. So nobody notices as long as the store can be read, and nobody waits longer than the read timeout when it
//! cannot.

use std::sync::Arc;

use store::Digest;

use super::Filesystem;
use super::node::Node;
use super::slots::{SlotContent, Unopened};
use crate::source::failure::{Failure, Result};
use crate::source::layer_name::LayerName;

type Recovered = Box<dyn FnOnce(Result<()>) + Send>;

impl Filesystem {
    /// Tries a request that concerns `node`, and tries it once more if an index was gone; `done` is called now or
    /// later.
    pub fn answer<T, A, D>(self: &Arc<Self>, node: Node, mut attempt: A, done: D)
    where
        A: FnMut(&Filesystem) -> Result<T> + Send + 'static,
        D: FnOnce(Result<T>) + Send + 'static,
    {
        match attempt(self) {
            Ok(value) => done(Ok(value)),
            Err(failure) => {
                let this = Arc::clone(self);
                self.recover(node, failure, move |recovered| done(recovered.and_then(|()| attempt(&this))));
            }
        }
    }

    /// Handles a failed request that concerns `node`. If an index behind it was gone, `done` is called when the index
    /// is back, otherwise at once with the failure.
    pub fn recover(self: &Arc<Self>, node: Node, failure: Failure, done: impl FnOnce(Result<()>) + Send + 'static) {
        if let Some(unopened) = self.slots.unopened(node.slot()) {
            return self.reopen(unopened, Box::new(done));
        }
        let lost = self.lost(node);
        if lost.is_empty() { done(Err(failure)) } else { self.restore(lost, Box::new(done)) }
    }

    /// Opens what an earlier worker had opened: its layers one after the other, most of whose indexes are on this host.
    fn reopen(self: &Arc<Self>, unopened: Unopened, done: Recovered) {
        let (chain, layers) = match unopened {
            Unopened::Layer(layer) => (None, vec![layer]),
            Unopened::Chain(chain, layers) => (Some(chain), layers),
        };
        let next = layers.iter().find(|layer| layer.index().is_err()).map(|layer| layer.name);
        let Some(LayerName { diff_id, copy }) = next else {
            return done(chain.map_or(Ok(()), |chain| self.slots.open_chain(&chain, layers)));
        };
        let this = Arc::clone(self);
        let loaded = move |result: Result<_>| match result {
            Ok(index) => {
                this.slots.add_layer(copy, index);
                match chain {
                    Some(chain) => this.reopen(Unopened::Chain(chain, layers), done),
                    None => done(Ok(())),
                }
            }
            Err(failure) => done(Err(was_there(failure))),
        };
        self.indexes.load(diff_id, self.deadline(), Box::new(loaded));
    }

    /// The same for a failed request that concerns the whole tree of an open chain.
    pub fn recover_chain(
        self: &Arc<Self>,
        chain: &Digest,
        failure: Failure,
        done: impl FnOnce(Result<()>) + Send + 'static,
    ) {
        match self.slots.chain(chain).map(|chain| chain.root()) {
            Some(Ok(root)) => self.recover(root, failure, done),
            Some(Err(_)) | None => done(Err(failure)),
        }
    }

    /// The layers behind a node whose indexes are gone.
    fn lost(&self, node: Node) -> Vec<Digest> {
        let mut layers: Vec<Digest> = match self.slots.get(node.slot()) {
            Ok(SlotContent::Layer(layer)) => vec![layer.name.diff_id],
            Ok(SlotContent::Chain(chain)) => chain.diff_ids().collect(),
            Ok(SlotContent::Catalogue) | Err(_) => Vec::new(),
        };
        layers.retain(|layer| self.indexes.is_lost(layer));
        layers
    }

    /// Fetches these indexes again, one after the other.
    fn restore(self: &Arc<Self>, mut lost: Vec<Digest>, done: Recovered) {
        let Some(layer) = lost.pop() else { return done(Ok(())) };
        let this = Arc::clone(self);
        let restored = move |result: Result<_>| match result {
            Ok(_) => this.restore(lost, done),
            Err(failure) => done(Err(was_there(failure))),
        };
        self.indexes.load(layer, self.deadline(), Box::new(restored));
    }

    /// Has the cache keep the indexes of what the kernel knows, as long as it has room for them.
    pub fn hold_indexes(self: &Arc<Self>) {
        let this = Arc::downgrade(self);
        self.cache.ask_before_evicting(Box::new(move || {
            let Some(this) = this.upgrade() else { return Default::default() };
            let in_use = this.in_use();
            this.indexes.uses(|layer| in_use.contains(layer))
        }));
    }
}

/// What it means that the index of a layer that the kernel knows does not come.
fn was_there(failure: Failure) -> Failure {
    if failure == Failure::Absent { Failure::Damaged } else { failure }
}
