//! Look-ups in the catalogue tree: they may need a newer catalogue or layers' indexes, and so the shared store.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use store::Digest;
use store::layer::LayerIndex;

use super::Filesystem;
use super::catalogue_node::CatalogueNode;
use super::chain::Chain;
use super::layer::Layer;
use super::node::{Attributes, Found, Lifetime, Node};
use crate::source::catalogue::Refreshed;
use crate::source::failure::{Failure, Result};
use crate::source::layer_name::{LayerName, NoLayerName};

type Done = Box<dyn FnOnce(Result<Found>) + Send>;

/// Where a name is looked for: if the present catalogue does not have it, in a newer one.
enum Attempt {
    /// In the present catalogue.
    First,
    /// In the outcome of a refresh that had begun before this look-up asked for one, at that time. If that lacks the
    /// name too, there is another refresh.
    Again(Instant),
    /// In the newest one, or, if that cannot be read, in the newest that this host has.
    Last(Result<()>),
}

impl Filesystem {
    pub(super) fn lookup_control(self: &Arc<Self>, parent: Node, name: &[u8], done: Done) {
        let catalogue_node = match self.catalogue_nodes.get(parent) {
            Ok(catalogue_node) => catalogue_node,
            Err(failure) => return done(Err(failure)),
        };
        let Ok(name) = std::str::from_utf8(name) else { return done(Ok(Found::Absent(Lifetime::None))) };
        match catalogue_node {
            CatalogueNode::Root => done(Ok(self.lookup_root(name))),
            CatalogueNode::Layers => match name.parse() {
                Ok(name) => self.lookup_layer(name, done),
                Err(NoLayerName) => done(Ok(Found::Absent(Lifetime::None))),
            },
            CatalogueNode::Chains => match Digest::from_hex(name) {
                Some(chain) => self.lookup_chain_id(chain, Attempt::First, done),
                None => done(Ok(Found::Absent(Lifetime::None))),
            },
            CatalogueNode::Trees => match Digest::from_hex(name) {
                Some(chain) => self.lookup_tree(chain, done),
                None => done(Ok(Found::Absent(Lifetime::None))),
            },
            // No repository and no tag starts with a dot: shells and desktops look for such names everywhere.
            CatalogueNode::Images(_) if name.starts_with('.') => done(Ok(Found::Absent(Lifetime::None))),
            CatalogueNode::Images(path) => self.lookup_image(path, name.to_owned(), Attempt::First, done),
            CatalogueNode::Tag(..) | CatalogueNode::Tree(_) => done(Err(Failure::NotDirectory)),
        }
    }

    fn lookup_root(&self, name: &str) -> Found {
        let catalogue_node = match name {
            "layers" => CatalogueNode::Layers,
            "chains" => CatalogueNode::Chains,
            "trees" => CatalogueNode::Trees,
            "images" => CatalogueNode::Images("".into()),
            _ => return Found::Absent(Lifetime::Forever),
        };
        let node = self.catalogue_nodes.node(catalogue_node);
        Found::Entry(Attributes::directory(node, self.catalogue_mtime()), Lifetime::Forever)
    }

    /// Refreshes the catalogue, then looks again.
    fn look_again(self: &Arc<Self>, attempt: Attempt, look: impl FnOnce(&Arc<Self>, Attempt) + Send + 'static) {
        let asked = match attempt {
            Attempt::Again(asked) => asked,
            Attempt::First | Attempt::Last(_) => Instant::now(),
        };
        let this = Arc::clone(self);
        let refreshed = move |result: Result<Refreshed>| {
            let next = match result {
                Ok(refreshed) if refreshed.started < asked => Attempt::Again(asked),
                Ok(_) => Attempt::Last(Ok(())),
                Err(failure) => Attempt::Last(Err(failure)),
            };
            look(&this, next);
        };
        self.watcher.refresh(self.deadline(), Box::new(refreshed));
    }

    fn lookup_image(self: &Arc<Self>, path: Arc<str>, name: String, attempt: Attempt, done: Done) {
        let snapshot = self.watcher.snapshot();
        match snapshot.directory(&path).and_then(|entries| entries.get(&name)) {
            Some(entry) => {
                let attributes = self.image_attributes(&path, &name, entry);
                done(Ok(Found::Entry(attributes, Lifetime::Second)));
            }
            None if let Attempt::Last(result) = attempt => {
                if result.is_ok() && snapshot.is_repository(&path) {
                    self.misses.note(&format!("{path}:{name}"), Instant::now());
                }
                done(result.map(|()| Found::Absent(Lifetime::None)));
            }
            None => self.look_again(attempt, move |this, next| this.lookup_image(path, name, next, done)),
        }
    }

    fn lookup_layer(self: &Arc<Self>, name: LayerName, done: Done) {
        let LayerName { diff_id, copy } = name;
        if let Some(layer) = self.slots.layer(&name) {
            let root = Node::new(layer.slot, store::layer::ROOT.0);
            return self.answer(root, move |_| layer_root(&layer), done);
        }
        // A layer of an image is in the store by now, even if it was absent a moment ago.
        let is_named = self.watcher.snapshot().layers().contains(&diff_id);
        if !is_named && self.indexes.was_absent(&diff_id, Instant::now()) {
            return done(Ok(Found::Absent(Lifetime::None)));
        }
        let this = Arc::clone(self);
        let loaded = move |result: Result<Arc<LayerIndex>>| match result {
            Ok(index) => done(layer_root(&this.slots.add_layer(copy, index))),
            Err(Failure::Absent) => {
                this.indexes.note_absent(diff_id, Instant::now());
                done(Ok(Found::Absent(Lifetime::None)));
            }
            Err(failure) => done(Err(failure)),
        };
        self.indexes.load(diff_id, self.deadline(), Box::new(loaded));
    }

    fn lookup_chain_id(self: &Arc<Self>, id: Digest, attempt: Attempt, done: Done) {
        self.prefetcher.looked_into(&id);
        if let Some(chain) = self.slots.chain(&id) {
            return match chain.root() {
                Ok(root) => self.answer(root, move |_| chain_root(&chain), done),
                Err(failure) => done(Err(failure)),
            };
        }
        match self.watcher.snapshot().chain(&id) {
            Some(layers) => self.open_chain(id, layers, done),
            None if let Attempt::Last(result) = attempt => self.lookup_linked_chain(id, result, done),
            None => self.look_again(attempt, move |this, next| this.lookup_chain_id(id, next, done)),
        }
    }

    /// Looks a chain up for whoever will use its whole tree: has it mounted natively before the link to it is answered.
    fn lookup_tree(self: &Arc<Self>, chain: Digest, done: Done) {
        let this = Arc::clone(self);
        let looked = move |found: Result<Found>| match found {
            Ok(Found::Entry(..)) => {
                let link = Found::Entry(this.attributes_of(CatalogueNode::Tree(chain)), Lifetime::Second);
                match this.native() {
                    Some(native) => native.mount(chain, Box::new(move || done(Ok(link)))),
                    None => done(Ok(link)),
                }
            }
            other => done(other),
        };
        self.lookup_chain_id(chain, Attempt::First, Box::new(looked));
    }

    /// Opens a chain that the catalogue lacks, if an engine here has a link to it: its image may have been removed, or replaced
    /// under its tag, while the lease keeps the layers.
    fn lookup_linked_chain(self: &Arc<Self>, id: Digest, looked: Result<()>, done: Done) {
        let this = Arc::clone(self);
        self.linked.find(id, move |layers| match layers {
            Some(layers) => this.open_chain(id, layers, done),
            None => done(looked.map(|()| Found::Absent(Lifetime::None))),
        });
    }

    /// Loads the indexes of a chain's layers (base first) in parallel, then opens the chain.
    fn open_chain(self: &Arc<Self>, id: Digest, diff_ids: Vec<Digest>, done: Done) {
        let deadline = self.deadline();
        let opening = Arc::new(Opening {
            filesystem: Arc::clone(self),
            id,
            diff_ids: diff_ids.clone(),
            left: AtomicUsize::new(diff_ids.len()),
            done: Mutex::new(Some(done)),
        });
        for diff_id in diff_ids {
            let opening = Arc::clone(&opening);
            if self.slots.layer(&LayerName::first(diff_id)).is_some() {
                opening.one(Ok(()));
                continue;
            }
            let filesystem = Arc::clone(self);
            let loaded = move |result: Result<Arc<LayerIndex>>| {
                opening.one(result.map(|index| _ = filesystem.slots.add_layer(0, index)));
            };
            self.indexes.load(diff_id, deadline, Box::new(loaded));
        }
    }
}

/// A chain that waits for its layers' indexes.
struct Opening {
    filesystem: Arc<Filesystem>,
    id: Digest,
    diff_ids: Vec<Digest>,
    left: AtomicUsize,
    /// Guards the callback, which is called once.
    done: Mutex<Option<Done>>,
}

impl Opening {
    /// Takes the result for one layer: the last one opens the chain, the first failure answers.
    fn one(&self, result: Result<()>) {
        let is_last = self.left.fetch_sub(1, Ordering::AcqRel) == 1;
        let answer = match result {
            Ok(()) if !is_last => return,
            Ok(()) => self.open(),
            // A catalogue that has the chain and a store that lacks its layer do not belong together.
            Err(Failure::Absent) => Err(Failure::Damaged),
            Err(failure) => Err(failure),
        };
        let done = self.done.lock().take();
        if let Some(done) = done {
            if answer.is_err() {
                self.filesystem.prefetcher.not_opened(&self.id);
            }
            done(answer);
        }
    }

    fn open(&self) -> Result<Found> {
        let slots = &self.filesystem.slots;
        let chain = slots.reserve_chain(self.id, self.diff_ids.len());
        let layers = self.diff_ids.iter().rev().map(|diff_id| slots.reserve_layer(LayerName::first(*diff_id)));
        slots.open_chain(&chain, layers.collect())?;
        chain_root(&chain)
    }
}

fn layer_root(layer: &Layer) -> Result<Found> {
    let root = crate::source::failure::stored(layer.index()?.inode(store::layer::ROOT))?;
    let node = Node::new(layer.slot, store::layer::ROOT.0);
    Ok(Found::Entry(Attributes::of(node, &root), Lifetime::Forever))
}

fn chain_root(chain: &Chain) -> Result<Found> {
    let root = chain.root()?;
    let members = chain.members(root)?;
    Ok(Found::Entry(chain.attributes(root, &members)?, Lifetime::Forever))
}
