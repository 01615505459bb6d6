//! What a new build inherits: the profile of the image that it follows.
//!
//! An image **follows** what its tag pointed to before or, with a new tag, the image of the same repository that was published last and has
//! a profile. A piece of the predecessor is found again by its file's path in the merged tree of the new image: a file in a shared layer is
//! the very same, and one that the build has replaced is most likely needed as before. Pieces whose file is gone are left out. Where less than
//! half of them is found again, as in a variant on another base, what a start will need by the look of the image comes before them.
//!
//! It is a hint like any profile, within one repository: whoever may teach a repository's starts may teach its next build's.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use store::Digest;
use store::blocks::Blocks;
use store::catalogue::{Catalogue, TagState};
use store::image::ImageRecord;
use store::layer::{Child, InodeIndex, LayerIndex, MergedTree};
use store::profile::{Origin, PieceKey, PrefetchProfile, StartupPiece};

use super::built::BuildError;
use super::{Guesses, Profiles};

/// How many earlier targets of a tag are looked at.
const MOVES_MAX: usize = 8;
/// How many other images of the repository are looked at.
const SIBLINGS_MAX: usize = 8;
/// An image whose indexes take more than this, bytes, inherits nothing: they are in memory together.
const INDEXES_MAX: u64 = 256 << 20;

/// The weight of what is guessed beside what is inherited: as much as half of the predecessor's starts.
const GUESS_WEIGHT: f64 = 0.5;

/// Blocks of a piece that starts of the predecessor needed, and the share of starts that read it.
type Needed = (PieceKey, Blocks, f64);

/// A file: the position of its layer in the chain, base first, and its inode there.
type Place = (u16, InodeIndex);

/// The image that another one follows.
struct Predecessor {
    chain: Digest,
    /// Its layers, base first.
    layers: Vec<Digest>,
    /// What its starts need, in order.
    needed: Vec<Needed>,
}

impl Profiles {
    /// What an image without a profile inherits; nothing if it follows none that has one. Blocks on the shared disk.
    pub(super) fn inherited(
        &self,
        image: &ImageRecord,
        catalogue: &Catalogue,
    ) -> Result<Option<PrefetchProfile>, BuildError> {
        let Some(chain) = image.top_chain() else { return Ok(None) };
        let Some(predecessor) = self.predecessor(image, &chain, catalogue)? else { return Ok(None) };
        let Some(tree) = self.merged_tree(image)? else { return Ok(None) };
        let renamed = self.found_again(&predecessor, &tree)?;
        let found = predecessor.needed.iter().filter_map(|(key, blocks, weight)| {
            let (layer, inode) = renamed.get(&(key.layer, key.inode))?;
            Some((PieceKey { layer: *layer, inode: *inode, piece: key.piece }, *blocks, *weight))
        });
        let found: Vec<Needed> = found.collect();
        let fits_little = !found.is_empty() && found.len() * 2 < predecessor.needed.len();
        let guess = if fits_little && self.guesses == Guesses::Made { self.guessed_pieces(image)? } else { Vec::new() };
        let guessed: HashSet<PieceKey> = guess.iter().map(|(key, _)| *key).collect();
        let beside = found.into_iter().filter(|(key, ..)| !guessed.contains(key));
        let needed = guess.into_iter().map(|(key, blocks)| (key, blocks, GUESS_WEIGHT)).chain(beside);
        let profile = PrefetchProfile::inherited(chain, predecessor.chain, needed);
        Ok((!profile.selection().is_empty()).then_some(profile))
    }

    /// The image that `image` follows, if starts of it are known.
    fn predecessor(
        &self,
        image: &ImageRecord,
        own: &Digest,
        catalogue: &Catalogue,
    ) -> Result<Option<Predecessor>, BuildError> {
        let mut siblings: Vec<&TagState> = catalogue.tags_in(&image.repository).collect();
        siblings.sort_by_key(|state| std::cmp::Reverse(state.image.published_at));
        let moved = siblings.iter().find(|state| state.image.tag.is_some() && state.image.tag == image.tag);
        let moves = moved.into_iter().flat_map(|state| &state.history).skip(1).take(MOVES_MAX);
        let before = moves.filter_map(|tag_move| self.layers_of(&tag_move.config));
        let diff_ids = |state: &&TagState| state.image.layers.iter().map(|layer| layer.diff_id).collect();
        let beside = siblings.iter().filter(|state| state.image.platform == image.platform).map(diff_ids);
        let mut seen = HashSet::from([*own]);
        for layers in before.chain(beside.take(SIBLINGS_MAX + 1)) {
            let Some(chain) = Digest::top_chain(&layers).filter(|chain| seen.insert(*chain)) else { continue };
            let needed = self.needed(&chain, catalogue)?;
            if !needed.is_empty() {
                return Ok(Some(Predecessor { chain, layers, needed }));
            }
        }
        Ok(None)
    }

    /// The chains that an image's tag pointed to before.
    pub(super) fn chains_before(&self, state: &TagState) -> Vec<Digest> {
        let moves = state.history.iter().skip(1).take(MOVES_MAX);
        moves.filter_map(|tag_move| Digest::top_chain(&self.layers_of(&tag_move.config)?)).collect()
    }

    /// The layers of an image whose config may be gone.
    fn layers_of(&self, config: &Digest) -> Option<Vec<Digest>> {
        let config = self.publisher.store().blob(config).ok()?;
        store::image_config::diff_ids(&config).ok()
    }

    /// What starts of a chain need, as far as starts taught it: by the database or, if it knows nothing, by the published pack. A guess is
    /// worth less than a new one.
    pub(super) fn needed(&self, chain: &Digest, catalogue: &Catalogue) -> Result<Vec<Needed>, BuildError> {
        if let Some(profile) = self.state_db.profile(chain)? {
            let taught = Some(profile).filter(|profile| profile.origin() != Origin::Guessed);
            let selected = taught.iter().flat_map(PrefetchProfile::selection);
            return Ok(selected.map(|one| (one.key, one.blocks, one.weight)).collect());
        }
        let Some(record) = catalogue.startup(chain).filter(|record| record.origin != Origin::Guessed) else {
            return Ok(Vec::new());
        };
        // A pack that cannot be read is no reason to fail: the image starts without one, as before.
        let table = self.publisher.store().startup_table(record).unwrap_or_default();
        let weight = |weight: u8| f64::from(weight) / f64::from(u8::MAX);
        let needed = |piece: &StartupPiece| (piece.key, piece.blocks, weight(piece.weight));
        Ok(table.pieces.iter().map(needed).collect())
    }

    /// The merged tree of an image, unless its indexes are too large.
    pub(super) fn merged_tree(&self, image: &ImageRecord) -> Result<Option<MergedTree>, BuildError> {
        let mut total = 0;
        for layer in &image.layers {
            total += self.publisher.store().index_len(&layer.diff_id)?;
        }
        if total > INDEXES_MAX {
            return Ok(None);
        }
        let topmost_first = image.layers.iter().rev().map(|layer| self.indexes.get(&layer.diff_id));
        Ok(Some(MergedTree::new(topmost_first.collect::<Result<Vec<Arc<LayerIndex>>, _>>()?)))
    }

    /// Where the predecessor's files are in the new tree.
    fn found_again(&self, predecessor: &Predecessor, tree: &MergedTree) -> Result<HashMap<Place, Place>, BuildError> {
        let mut wanted: BTreeMap<u16, HashSet<InodeIndex>> = BTreeMap::new();
        for (key, ..) in &predecessor.needed {
            wanted.entry(key.layer).or_default().insert(key.inode);
        }
        let mut found = HashMap::new();
        for (layer, inodes) in wanted {
            let Some(diff_id) = predecessor.layers.get(usize::from(layer)) else { continue };
            let index = match self.indexes.get(diff_id) {
                // It was collected, and the names of its files with it.
                Err(error) if error.is_missing() => continue,
                index => index?,
            };
            for (inode, path) in index.paths(inodes)? {
                let Some(Child::Other(member)) = tree.resolve(&path)?.map(|found| found.child) else { continue };
                let base_first = tree.layers().len() - 1 - usize::from(member.layer);
                found.insert((layer, inode), (base_first as u16, member.inode));
            }
        }
        Ok(found)
    }
}
