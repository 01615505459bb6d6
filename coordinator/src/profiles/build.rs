//! From a profile to a startup pack: find what is known, select, compare with what is published, gather the bytes, publish.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::num::NonZeroUsize;

use jiff::Timestamp;
use lru::LruCache;
use store::blocks::Blocks;
use store::catalogue::Catalogue;
use store::chunk::{CHUNK_TARGET, ChunkRef, VerifiedChunk};
use store::image::ImageRecord;
use store::layer::{Piece, Source};
use store::profile::{PIECES_MAX, PieceKey, PrefetchProfile, STARTS_TO_JUDGE, Selected, heaviest};
use store::{ContentDigest, Digest};
use tokio_util::sync::CancellationToken;

use crate::profiles::built::{BuildError, Built};
use crate::profiles::{Guesses, Profiles};

/// A new pack is published if it differs from the present one by more than this share of the present one's bytes.
const CHANGE_MIN: f64 = 0.05;
/// Chunks that are kept decompressed: starts read small files in another order than the store has them in.
const CHUNKS_KEPT: NonZeroUsize = NonZeroUsize::new((16 << 20) / CHUNK_TARGET).expect("not zero");

/// Pieces of one chain, as its layers' indexes have them. Pieces that no index has are left out.
struct Chain {
    pieces: HashMap<PieceKey, Piece>,
    /// Those that are all of their file.
    small: HashSet<PieceKey>,
}

/// What a pack holds, or should hold, of each piece.
type Parts = HashMap<PieceKey, Blocks>;

impl Chain {
    fn piece(&self, key: &PieceKey) -> Result<&Piece, store::Error> {
        let missing =
            || store::Error::Missing { what: format!("a piece of a file in layer {} of the chain", key.layer) };
        self.pieces.get(key).ok_or_else(missing)
    }

    /// Bytes that a pack needs for blocks of a piece: none for a hole, or for a piece that does not exist.
    fn len(&self, key: &PieceKey, blocks: Blocks) -> u64 {
        match self.piece(key) {
            Ok(Piece { source: Source::Chunk { .. }, len, .. }) => blocks.content_len(*len).into(),
            _ => 0,
        }
    }

    /// The bytes that are in only one of `old` and `new`, as a share of the bytes of `old`.
    fn change(&self, old: &Parts, new: &Parts) -> f64 {
        let of = |parts: &Parts, key: &PieceKey| parts.get(key).copied().unwrap_or(Blocks::NONE);
        let keys: HashSet<&PieceKey> = old.keys().chain(new.keys()).collect();
        let changed: u64 = keys.into_iter().map(|key| self.len(key, of(old, key).differing(of(new, key)))).sum();
        let before: u64 = old.iter().map(|(key, blocks)| self.len(key, *blocks)).sum();
        changed as f64 / before.max(1) as f64
    }

    /// Small files are kept whole: hosts have one cache file for each.
    fn with_small_files_whole(&self, mut selection: Vec<Selected>) -> Vec<Selected> {
        selection.iter_mut().filter(|one| self.small.contains(&one.key)).for_each(|one| one.blocks = Blocks::ALL);
        selection
    }
}

impl Profiles {
    /// Publishes a startup pack for `chain` if the profile calls for another one than the present. Blocks.
    pub(super) fn build_now(&self, chain: &Digest, stop: &CancellationToken) -> Result<Built, BuildError> {
        let catalogue = self.publisher.catalogue();
        // The profile of an image that is gone stays until the next sweep: the image that follows may be about to inherit it.
        let Some(image) = catalogue.image_of_chain(chain) else { return Ok(Built::Unknown) };
        let profile = match self.state_db.profile(chain)? {
            Some(profile) => Some(profile),
            None => self.first_profile(image, chain, &catalogue)?,
        };
        let Some(profile) = profile else { return Ok(Built::Unknown) };
        let selection = profile.selection();
        let table = catalogue.startup(chain).map(|record| (record, self.publisher.store().startup_table(record)));
        let old: Parts = match &table {
            Some((_, Ok(table))) => table.pieces.iter().map(|piece| (piece.key, piece.blocks)).collect(),
            _ => Parts::new(),
        };
        let pieces = self.pieces(image, &selection, &old)?;
        let selection = pieces.with_small_files_whole(selection);
        let selection = heaviest(selection, |one| pieces.len(&one.key, one.blocks), PIECES_MAX);
        let layers = image.diff_ids();
        let is_wanted = !selection.is_empty()
            && match &table {
                None => true,
                // After the database was lost, one new start must not outweigh the many that the pack was made from.
                Some((record, _)) if profile.starts() < u64::from(record.starts.min(STARTS_TO_JUDGE)) => false,
                Some((record, Ok(_))) => {
                    let new = selection.iter().map(|one| (one.key, one.blocks)).collect();
                    pieces.change(&old, &new) > CHANGE_MIN
                        || !self.publisher.store().is_startup_current(record, &layers)?
                }
                Some((_, Err(error))) => {
                    tracing::warn!("the startup pack of chain {} is made anew: {error}", profile.chain());
                    true
                }
            };
        if is_wanted { self.publish(&profile, &layers, &pieces, &selection, stop) } else { Ok(Built::Unchanged) }
    }

    /// The profile of a chain that no start is known of. What the database has lost is not inherited over a published pack.
    fn first_profile(
        &self,
        image: &ImageRecord,
        chain: &Digest,
        catalogue: &Catalogue,
    ) -> Result<Option<PrefetchProfile>, BuildError> {
        if catalogue.startup(chain).is_some() {
            return Ok(None);
        }
        let profile = match self.inherited(image, catalogue)? {
            Some(profile) => Some(profile),
            None if self.guesses == Guesses::Made => self.guessed(image)?,
            None => None,
        };
        if let Some(profile) = &profile {
            self.state_db.put_profile(profile)?;
        }
        Ok(profile)
    }

    /// The pieces that a selection names, and those of the present pack that are in the same layers. Reads one index after the other.
    fn pieces(&self, image: &ImageRecord, selection: &[Selected], old: &Parts) -> Result<Chain, store::Error> {
        let mut of_layers: BTreeMap<u16, HashSet<PieceKey>> = BTreeMap::new();
        selection.iter().for_each(|one| _ = of_layers.entry(one.key.layer).or_default().insert(one.key));
        for key in old.keys() {
            of_layers.entry(key.layer).and_modify(|keys| _ = keys.insert(*key));
        }
        let (mut pieces, mut small) = (HashMap::new(), HashSet::new());
        for (position, keys) in of_layers {
            let Some(layer) = image.layers.get(usize::from(position)) else { continue };
            let index = self.indexes.get(&layer.diff_id)?;
            let found = keys.into_iter().filter_map(|key| {
                let inode = index.inode(key.inode).ok()?;
                if inode.piece_count() == 1 {
                    small.insert(key);
                }
                Some((key, index.piece(&inode, key.piece).ok()?))
            });
            pieces.extend(found);
        }
        Ok(Chain { pieces, small })
    }

    fn publish(
        &self,
        profile: &PrefetchProfile,
        layers: &[Digest],
        chain: &Chain,
        selection: &[Selected],
        stop: &CancellationToken,
    ) -> Result<Built, BuildError> {
        let mut writer = self.publisher.stage_startup(layers)?.with_content_max(self.pack_content);
        let mut chunks = Chunks::new(self);
        for one in selection {
            if stop.is_cancelled() {
                return Err(BuildError::Stopped);
            }
            let piece = chain.piece(&one.key)?;
            let Source::Chunk { chunk, start, .. } = &piece.source else { continue };
            let (key, blocks, weight) = (one.key, one.blocks, one.weight_number());
            let len = blocks.content_len(piece.len);
            if !writer.has_room(len) {
                writer.name(key, blocks, weight, len)?;
                continue;
            }
            let verified = chunks.get(chunk)?;
            // The chunk is verified. Whether the index points to the right part of it, only the piece's digest can tell.
            let bytes = verified.piece(*start, piece.len).filter(|bytes| ContentDigest::of(bytes) == piece.digest);
            let damaged = || store::Error::corrupt("a layer's index", "it points to other bytes than a file's");
            writer.add(key, blocks, weight, &piece.digest, bytes.ok_or_else(damaged)?)?;
        }
        let starts = u32::try_from(profile.starts()).unwrap_or(u32::MAX);
        let staged = writer.finish()?.learned_from(profile.origin());
        let now = u64::try_from(Timestamp::now().as_second()).unwrap_or(0);
        let record = self.publisher.publish_startup(staged, profile.chain(), starts, now)?;
        Ok(Built::Published { record, pieces: selection.len() })
    }
}

/// Reads chunks, and keeps the last ones.
pub(super) struct Chunks<'a> {
    profiles: &'a Profiles,
    kept: LruCache<(ContentDigest, u64), VerifiedChunk>,
}

impl<'a> Chunks<'a> {
    /// Reads chunks of the store of `profiles`.
    pub(super) fn new(profiles: &'a Profiles) -> Chunks<'a> {
        Chunks { profiles, kept: LruCache::new(CHUNKS_KEPT) }
    }

    /// A chunk, verified.
    pub(super) fn get(&mut self, chunk: &ChunkRef) -> Result<&VerifiedChunk, store::Error> {
        let store = self.profiles.publisher.store();
        self.kept.try_get_or_insert((chunk.pack, chunk.offset), || store.read_chunk(chunk))
    }
}
