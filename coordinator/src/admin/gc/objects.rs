//! Which objects are needed, how much room they take, and which go when. Pure.
//!
//! The room that images need is an estimate where layers share parts of a pack: a pack counts with the sum of what its layers
//! use, and at most with its size.

use std::collections::{HashMap, HashSet};

use coordinator_api::retention::GarbageReason;
use store::image::ImageRecord;
use store::publisher::{Object, references};
use store::{ContentDigest, Digest};

use super::survey::StoreSizes;
use super::usage::Usage;

/// A pack is thinned only if that frees more than this many bytes.
pub(super) const WORTH_THINNING: u64 = 1 << 20;

/// What a set of images and leases needs, and how much room it takes.
#[derive(Debug, Clone, Default)]
pub(super) struct Needs {
    /// How many images, leases and pulls need each layer or blob.
    digests: HashMap<Digest, u32>,
    /// How many images have each chain that has a startup pack.
    chains: HashMap<Digest, u32>,
    /// Size of each layer or blob.
    sizes: HashMap<Digest, u64>,
    /// Size of each pack, and the bytes of it that needed layers use, summed over layers.
    packs: HashMap<ContentDigest, (u64, u64)>,
    /// The startup pack of each chain.
    startups: HashMap<Digest, ContentDigest>,
    usage: Usage,
    bytes: u64,
}

impl Needs {
    /// Nothing is needed yet, in a store that holds `survey` and has these startup packs by chain.
    pub(super) fn new(survey: &StoreSizes, usage: &Usage, startups: HashMap<Digest, ContentDigest>) -> Needs {
        let sizes = survey.layers.iter().chain(&survey.blobs).map(|(digest, size)| (*digest, *size)).collect();
        let packs = survey.packs.iter().map(|(pack, size)| (*pack, (*size, 0))).collect();
        Needs { sizes, packs, startups, usage: usage.clone(), ..Needs::default() }
    }

    /// Bytes that everything needed takes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether a layer or blob is needed.
    pub(super) fn needs(&self, digest: &Digest) -> bool {
        self.digests.contains_key(digest)
    }

    /// Whether a needed layer uses the pack.
    fn uses_pack(&self, pack: &ContentDigest) -> bool {
        self.packs.get(pack).is_some_and(|(_, used)| *used > 0)
    }

    /// The startup packs of the needed images.
    fn startup_packs(&self) -> HashSet<ContentDigest> {
        self.startups.iter().filter(|(chain, _)| self.chains.contains_key(chain)).map(|(_, pack)| *pack).collect()
    }

    /// Adds an image to what is needed.
    pub(super) fn require(&mut self, image: &ImageRecord) {
        distinct(image).iter().for_each(|digest| self.require_digest(digest));
        let Some(chain) = self.chain(image) else { return };
        let count = self.chains.entry(chain).or_default();
        *count += 1;
        if *count == 1 {
            self.bytes += self.startup_size(&chain);
        }
    }

    /// Adds a layer or blob to what is needed.
    pub(super) fn require_digest(&mut self, digest: &Digest) {
        let count = self.digests.entry(*digest).or_default();
        *count += 1;
        if *count == 1 {
            self.bytes += self.sizes.get(digest).copied().unwrap_or(0);
            self.use_packs(digest, |used, by| used + by);
        }
    }

    /// Removes an image from what is needed. Returns the bytes that nothing else needs.
    pub(super) fn release(&mut self, image: &ImageRecord) -> u64 {
        let before = self.bytes;
        for digest in distinct(image) {
            let Some(count) = self.digests.get_mut(&digest) else { continue };
            *count -= 1;
            if *count == 0 {
                self.digests.remove(&digest);
                self.bytes -= self.sizes.get(&digest).copied().unwrap_or(0);
                self.use_packs(&digest, |used, by| used.saturating_sub(by));
            }
        }
        if let Some(chain) = self.chain(image)
            && let Some(count) = self.chains.get_mut(&chain)
        {
            *count -= 1;
            if *count == 0 {
                self.chains.remove(&chain);
                self.bytes -= self.startup_size(&chain);
            }
        }
        before - self.bytes
    }

    fn chain(&self, image: &ImageRecord) -> Option<Digest> {
        if self.startups.is_empty() {
            return None;
        }
        image.top_chain().filter(|chain| self.startups.contains_key(chain))
    }

    fn startup_size(&self, chain: &Digest) -> u64 {
        self.startups.get(chain).and_then(|pack| self.packs.get(pack)).map_or(0, |(size, _)| *size)
    }

    /// Adds or subtracts a layer's use of its packs, as `change` says.
    fn use_packs(&mut self, layer: &Digest, change: impl Fn(u64, u64) -> u64) {
        for (pack, by) in self.usage.packs(layer) {
            let Some((size, used)) = self.packs.get_mut(pack) else { continue };
            let before = (*size).min(*used);
            *used = change(*used, (*by).max(1));
            self.bytes = self.bytes - before + (*size).min(*used);
        }
    }
}

/// An image's references, each once.
fn distinct(image: &ImageRecord) -> HashSet<Digest> {
    references(image).collect()
}

/// An object that is not needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unneeded {
    pub(super) object: Object,
    /// Bytes that it takes.
    pub(super) bytes: u64,
    /// Why it goes.
    pub(super) reason: GarbageReason,
    /// When it goes at the earliest, seconds since 1970.
    pub(super) due: u64,
}

/// Everything in the store that is not needed, in the order of removal: layers, blobs, packs. `marks` tell since when.
pub(super) fn unneeded(
    survey: &StoreSizes,
    needs: &Needs,
    usage: &Usage,
    marks: &HashMap<Object, u64>,
    now: u64,
    grace: u64,
) -> Vec<Unneeded> {
    let used: HashSet<ContentDigest> =
        survey.layers.keys().flat_map(|layer| usage.packs(layer).iter().map(|(pack, _)| *pack)).collect();
    let layers = survey.layers.iter().map(|(digest, bytes)| (Object::Layer(*digest), *bytes));
    let blobs = survey.blobs.iter().map(|(digest, bytes)| (Object::Blob(*digest), *bytes));
    let packs = survey.packs.iter().map(|(pack, bytes)| (Object::Pack(*pack), *bytes));
    let startups = needs.startup_packs();
    let is_needed = |object: &Object| match object {
        Object::Layer(digest) | Object::Blob(digest) => needs.needs(digest),
        Object::Pack(pack) => needs.uses_pack(pack) || startups.contains(pack),
    };
    let mut all: Vec<Unneeded> = layers
        .chain(blobs)
        .chain(packs)
        .filter(|(object, _)| !is_needed(object))
        .map(|(object, bytes)| {
            let reason = match object {
                Object::Pack(pack) if !used.contains(&pack) => GarbageReason::NoLayer,
                _ => GarbageReason::Unreferenced,
            };
            // A mark in the future was made by a clock that was wrong.
            let since = marks.get(&object).copied().unwrap_or(now).min(now);
            Unneeded { object, bytes, reason, due: since.saturating_add(grace) }
        })
        .collect();
    all.sort_by_key(|one| one.object);
    all
}

/// Packs that may be worth thinning, with an upper bound of the bytes in use: no layer in the store uses `below_percent` of the
/// pack or more. How much all layers use together, only their indexes tell.
pub(super) fn thinnable(
    survey: &StoreSizes,
    present: impl Iterator<Item = Digest>,
    usage: &Usage,
    below_percent: u8,
) -> HashMap<ContentDigest, u64> {
    let mut most: HashMap<ContentDigest, (u64, u64)> = HashMap::new();
    for layer in present {
        for (pack, bytes) in usage.packs(&layer) {
            let (largest, sum) = most.entry(*pack).or_default();
            (*largest, *sum) = ((*largest).max(*bytes), *sum + *bytes);
        }
    }
    let size = |pack: &ContentDigest| survey.packs.get(pack).copied().unwrap_or(0);
    let sparse = |pack: &ContentDigest, used: u64| is_sparse(size(pack), used, below_percent);
    most.into_iter().filter(|(pack, (largest, _))| sparse(pack, *largest)).map(|(pack, (_, sum))| (pack, sum)).collect()
}

/// Whether so little of a pack is in use that it is worth rewriting.
pub(super) fn is_sparse(size: u64, used: u64, below_percent: u8) -> bool {
    size.saturating_sub(used) > WORTH_THINNING && u128::from(used) * 100 < u128::from(size) * u128::from(below_percent)
}
