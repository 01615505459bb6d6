//! The numbers of images and layers in the catalogue, counted once per generation.

use std::collections::HashMap;

use parking_lot::Mutex;
use store::Digest;
use store::catalogue::Catalogue;

/// The numbers of one generation of the catalogue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counted {
    pub(super) generation: u64,
    pub(super) images: u64,
    pub(super) layers: u64,
    pub(super) layer_bytes: u64,
}

/// The numbers that were counted last. All layers are walked once per generation, not once per request.
///
/// The lock guards the numbers and is not held while they are counted.
#[derive(Debug, Default)]
pub struct Counts(Mutex<Counted>);

impl Counts {
    /// The numbers for this catalogue.
    pub(super) fn of(&self, catalogue: &Catalogue) -> Counted {
        let known = *self.0.lock();
        if known.generation == catalogue.generation() {
            return known;
        }
        let layers = catalogue.images().flat_map(|image| image.layers.iter().map(|layer| (layer.diff_id, layer.size)));
        let layers: HashMap<Digest, u64> = layers.collect();
        let counted = Counted {
            generation: catalogue.generation(),
            images: catalogue.images().count() as u64,
            layers: layers.len() as u64,
            layer_bytes: layers.values().sum(),
        };
        let mut known = self.0.lock();
        if known.generation < counted.generation {
            *known = counted;
        }
        counted
    }
}
