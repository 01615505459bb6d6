//! What the starts of one image need: access traces merged into a profile.
//!
//! A profile belongs to a chain, so it serves every tag and image with the same content. For each piece of a file,
//! merging counts the starts that read it and adds up its ranks (its places among the starts' first touches). A piece
//! is worth prefetching if a large enough share of the starts reads it ([`WEIGHT_MIN`]), and of the piece those blocks
//! of which the same is true. Selected pieces are ordered by mean rank.
//!
//! A profile may begin with what another image's starts have taught, or with a guess ([`Origin`]), so that no image
//! starts blind. Its own starts outweigh that soon.
//!
//! - `senders`: who sent the traces, so that nobody outweighs all others. `startup`: the startup pack, which holds the
//!   selected pieces in the store. `origin`: where a profile's first knowledge comes from.
//!
//! Invariants: the result does not depend on the order in which traces arrive (until counts are halved, see
//! [`STARTS_MAX`]); a trace that arrives twice counts once (the last 64 are remembered); a profile is bounded whatever
//! it is fed.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::blocks::{BLOCKS, Blocks};
use crate::digest::{ContentDigest, Digest};
use crate::error::{Error, Result};
use crate::layer::InodeIndex;
use crate::trace::{AccessTrace, Outcome};

mod origin;
mod senders;
mod startup;

pub use origin::Origin;
use senders::{FLOOR, Senders, Verdict};

pub use startup::{
    CHUNK_RECORD_LEN, CHUNKS_MAX, CONTENT_MAX, HEAD_MAX, HEADER_LEN, INDEX_RECORD_LEN, INDEXES_LEN_MAX, INDEXES_MAX,
    MAGIC, PIECE_RECORD_LEN, PIECES_MAX, PlaceInPack, STARTUP_LEVEL, StartupIndex, StartupPiece, StartupRecord,
    StartupTable, VERSION,
};

/// All counts are halved when they represent this many starts. What starts need changes with the software around them;
/// a piece that is no longer read drops out after about as many starts.
pub const STARTS_MAX: u32 = 64;
/// Pieces that a smaller share of the starts reads are left out.
pub const WEIGHT_MIN: f64 = 0.25;
/// With fewer starts than this, all pieces are selected: a share of so few says nothing.
pub const STARTS_TO_JUDGE: u32 = 4;
/// The most pieces that a profile remembers; those that the fewest starts read are dropped first.
pub const ENTRIES_MAX: usize = 2 * AccessTrace::TOUCHES_MAX;
/// Precision and recall cover this many of the latest starts that had a startup pack.
pub const OUTCOMES_MAX: usize = 16;
/// As many starts weighs what a profile inherits.
const INHERITED_STARTS: u32 = 2;
/// After as many starts of its own, no piece is selected because of what was inherited alone.
const OWN_STARTS: u64 = (INHERITED_STARTS as f64 / WEIGHT_MIN) as u64 - INHERITED_STARTS as u64 + 1;
/// The number of latest traces that are remembered, to recognise one that arrives again.
const REMEMBERED: usize = 64;

/// One piece of a file of one layer of the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PieceKey {
    /// Position of the layer in the chain, base first.
    pub layer: u16,
    /// The file's inode in that layer.
    pub inode: InodeIndex,
    /// The piece's number in the file.
    pub piece: u32,
}

/// How many starts have read each block of a piece.
type Counts = [u8; BLOCKS as usize];

/// How often and how early a piece was read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Reads {
    starts: u32,
    /// Sum of its ranks in those starts.
    ranks: u64,
    blocks: Counts,
}

impl Reads {
    /// What `starts` starts have read of a piece, with the sum of its ranks.
    fn new(starts: u32, ranks: u64, blocks: Blocks) -> Reads {
        let mut reads = Reads { starts, ranks, ..Reads::default() };
        (0..)
            .zip(&mut reads.blocks)
            .filter(|(block, _)| blocks.has(*block))
            .for_each(|(_, count)| *count = starts as u8);
        reads
    }

    fn mean_rank(self) -> f64 {
        self.ranks as f64 / f64::from(self.starts.max(1))
    }

    fn add(&mut self, rank: u64, blocks: Blocks) {
        (self.starts, self.ranks) = (self.starts + 1, self.ranks + rank);
        (0..).zip(&mut self.blocks).filter(|(block, _)| blocks.has(*block)).for_each(|(_, count)| *count += 1);
    }

    /// These reads as if of each count only what `scale` makes of it had been.
    fn changed(self, scale: impl Fn(u32) -> u32) -> Reads {
        let starts = scale(self.starts);
        let ranks = self.ranks * u64::from(starts) / u64::from(self.starts.max(1));
        Reads { starts, ranks, blocks: self.blocks.map(|count| scale(count.into()) as u8) }
    }

    /// These reads scaled by `part / whole`, with the counts rounded.
    fn scaled(self, part: u32, whole: u32) -> Reads {
        self.changed(|count| (count * part + whole / 2) / whole)
    }

    fn halved(self) -> Reads {
        self.changed(|count| count / 2)
    }

    /// The blocks that at least `least` of `starts` starts have read. If these are none, because starts differ, all that any has read.
    fn blocks(self, starts: f64, least: f64) -> Blocks {
        let of = |is_taken: &dyn Fn(u8) -> bool| {
            let taken = (0..).zip(self.blocks).filter(|(_, count)| is_taken(*count));
            Blocks::from_bits(taken.fold(0, |bits, (block, _)| bits | 1u8 << block))
        };
        let often = of(&|count| count > 0 && f64::from(count) / starts >= least);
        [often, of(&|count| count > 0)].into_iter().find(|blocks| !blocks.is_empty()).unwrap_or(Blocks::ALL)
    }
}

/// A piece that is worth prefetching.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Selected {
    /// The piece.
    pub key: PieceKey,
    /// The blocks of it.
    pub blocks: Blocks,
    /// The share of starts that read it, above 0 and at most 1.
    pub weight: f64,
    /// Its mean place among a start's first touches.
    pub rank: f64,
}

impl Selected {
    /// The weight as a startup table holds it, in 255ths.
    pub fn weight_number(&self) -> u8 {
        (self.weight * f64::from(u8::MAX)).round() as u8
    }
}

/// What merging a trace did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Merged {
    /// The trace counts as one more start.
    New,
    /// The trace was merged before.
    Again,
    /// The trace is left out: its sender would outweigh all others.
    Outweighs,
}

/// What is known of the starts of one chain.
#[derive(Debug, Clone, PartialEq)]
pub struct PrefetchProfile {
    chain: Digest,
    origin: Origin,
    /// Starts ever merged.
    total: u64,
    /// Starts that the counts represent, after halving and scaling; with those that it began with.
    starts: u32,
    reads: HashMap<PieceKey, Reads>,
    /// The latest starts that had a startup pack, ordered by when they began: that time, and the outcome.
    outcomes: Vec<(u64, Outcome)>,
    /// Marks of the latest traces.
    remembered: Vec<u64>,
    senders: Senders,
}

/// Who sent a trace, and when.
#[derive(Debug, Clone, Copy)]
pub struct Sent<'a> {
    /// Identifies the sender. It must be something that one sender cannot vary: whoever can lie about it is one sender.
    pub by: &'a str,
    /// When the trace arrived, by the clock of the merging side, seconds since 1970.
    pub at: u64,
}

impl PrefetchProfile {
    /// An empty profile of `chain`.
    pub fn new(chain: Digest) -> PrefetchProfile {
        let (reads, outcomes, remembered) = (HashMap::new(), Vec::new(), Vec::new());
        let (origin, senders) = (Origin::Traced, Senders::default());
        PrefetchProfile { chain, origin, total: 0, starts: 0, reads, outcomes, remembered, senders }
    }

    /// A profile of `chain` that begins with what starts of the chain `from` needed: its selected pieces, in order, as
    /// they are called in `chain`, each with its blocks and its weight.
    pub fn inherited(
        chain: Digest,
        from: Digest,
        pieces: impl IntoIterator<Item = (PieceKey, Blocks, f64)>,
    ) -> PrefetchProfile {
        let starts = INHERITED_STARTS;
        let count = |weight: f64| ((weight * f64::from(starts)).round() as u32).clamp(1, starts);
        let pieces = pieces.into_iter().take(ENTRIES_MAX).enumerate();
        let reads = pieces.map(|(rank, (key, blocks, weight))| {
            let starts = count(weight);
            (key, Reads::new(starts, rank as u64 * u64::from(starts), blocks))
        });
        let (origin, reads) = (Origin::Inherited { from }, reads.collect());
        PrefetchProfile { origin, starts, reads, ..PrefetchProfile::new(chain) }
    }

    /// The chain that the profile belongs to.
    pub fn chain(&self) -> Digest {
        self.chain
    }

    /// A profile of `chain` that begins with what its first start will need by the look of the image, in order. The first
    /// trace replaces it.
    pub fn guessed(chain: Digest, pieces: impl IntoIterator<Item = (PieceKey, Blocks)>) -> PrefetchProfile {
        let pieces = pieces.into_iter().take(ENTRIES_MAX).enumerate();
        let reads = pieces.map(|(rank, (key, blocks))| (key, Reads::new(1, rank as u64, blocks))).collect();
        PrefetchProfile { origin: Origin::Guessed, starts: 1, reads, ..PrefetchProfile::new(chain) }
    }

    /// Where its first knowledge comes from.
    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// The number of starts ever merged.
    pub fn starts(&self) -> u64 {
        self.total
    }

    /// Adds one start. The trace must be of this chain.
    pub fn merge(&mut self, trace: &AccessTrace) -> Result<Merged> {
        self.merge_checked(trace, None)
    }

    /// Like [`PrefetchProfile::merge`], for a trace that somebody sent: it is left out if its sender would outweigh all
    /// others.
    pub fn merge_sent(&mut self, trace: &AccessTrace, sent: Sent<'_>) -> Result<Merged> {
        self.merge_checked(trace, Some(sent))
    }

    fn merge_checked(&mut self, trace: &AccessTrace, sent: Option<Sent<'_>>) -> Result<Merged> {
        if trace.chain != self.chain {
            let why = format!("it is of chain {} and the profile of {}", trace.chain, self.chain);
            return Err(Error::corrupt("an access trace", why));
        }
        let mark = mark(&trace.encode()?);
        if self.remembered.contains(&mark) {
            return Ok(Merged::Again);
        }
        match sent.map(|Sent { by, at }| self.senders.admit(self::mark(by.as_bytes()), at)) {
            None | Some(Verdict::Counts) => {}
            Some(Verdict::CountsAfterScaling) => self.scale_to(FLOOR),
            Some(Verdict::Outweighs) => return Ok(Merged::Outweighs),
        }
        self.remembered.push(mark);
        let forgotten = self.remembered.len().saturating_sub(REMEMBERED);
        self.remembered.drain(..forgotten);
        self.count(trace);
        if trace.profile.is_some() {
            let at = self.outcomes.partition_point(|(began, _)| *began <= trace.started_at);
            self.outcomes.insert(at, (trace.started_at, trace.outcome));
            let old = self.outcomes.len().saturating_sub(OUTCOMES_MAX);
            self.outcomes.drain(..old);
        }
        Ok(Merged::New)
    }

    /// Scales the counts down so that they represent at most `starts` starts.
    fn scale_to(&mut self, starts: u32) {
        if self.starts > starts {
            let all = self.starts;
            self.reads.values_mut().for_each(|reads| *reads = reads.scaled(starts, all));
            self.reads.retain(|_, reads| reads.starts > 0);
            self.starts = starts;
        }
    }

    fn count(&mut self, trace: &AccessTrace) {
        if self.origin == Origin::Guessed {
            self.reads.clear();
            (self.origin, self.starts) = (Origin::Traced, 0);
        }
        if self.starts >= STARTS_MAX {
            self.starts /= 2;
            self.senders.halve();
            self.reads.values_mut().for_each(|reads| *reads = reads.halved());
            self.reads.retain(|_, reads| reads.starts > 0);
        }
        (self.total, self.starts) = (self.total + 1, self.starts + 1);
        if self.total >= OWN_STARTS {
            self.origin = Origin::Traced;
        }
        let mut first: HashMap<PieceKey, (u64, Blocks)> = HashMap::with_capacity(trace.touches.len());
        for touch in &trace.touches {
            let next = first.len() as u64;
            let key = PieceKey { layer: touch.layer, inode: touch.inode, piece: touch.piece };
            let (_, blocks) = first.entry(key).or_insert((next, Blocks::NONE));
            *blocks = blocks.and(touch.blocks);
        }
        for (key, (rank, blocks)) in first {
            self.reads.entry(key).or_default().add(rank, blocks);
        }
        if self.reads.len() > ENTRIES_MAX {
            let mut entries: Vec<_> = self.reads.drain().collect();
            entries.sort_by(|a, b| {
                let earlier = a.1.mean_rank().total_cmp(&b.1.mean_rank());
                b.1.starts.cmp(&a.1.starts).then(earlier).then(a.0.cmp(&b.0))
            });
            self.reads = entries.into_iter().take(ENTRIES_MAX).collect();
        }
    }

    /// The pieces worth prefetching, in the order in which starts need them.
    pub fn selection(&self) -> Vec<Selected> {
        let starts = f64::from(self.starts.max(1));
        let least = if self.starts < STARTS_TO_JUDGE { 0.0 } else { WEIGHT_MIN };
        let select = |(key, reads): (&PieceKey, &Reads)| {
            let weight = f64::from(reads.starts) / starts;
            let blocks = reads.blocks(starts, least);
            (weight >= least).then(|| Selected { key: *key, blocks, weight, rank: reads.mean_rank() })
        };
        let mut selected: Vec<_> = self.reads.iter().filter_map(select).collect();
        selected.sort_by(|a, b| a.rank.total_cmp(&b.rank).then(a.key.cmp(&b.key)));
        selected
    }

    /// The latest starts that had a startup pack, the oldest first: when each began, seconds since 1970, and its outcome.
    pub fn outcomes(&self) -> &[(u64, Outcome)] {
        &self.outcomes
    }

    /// The sum of the outcomes of the latest starts that had a startup pack; `None` if there were none.
    pub fn outcome(&self) -> Option<Outcome> {
        let add = |sum: Outcome, (_, one): &(u64, Outcome)| Outcome {
            touched_bytes: sum.touched_bytes.saturating_add(one.touched_bytes),
            prefetched_bytes: sum.prefetched_bytes.saturating_add(one.prefetched_bytes),
            prefetched_used_bytes: sum.prefetched_used_bytes.saturating_add(one.prefetched_used_bytes),
            missed_bytes: sum.missed_bytes.saturating_add(one.missed_bytes),
        };
        (!self.outcomes.is_empty()).then(|| self.outcomes.iter().fold(Outcome::default(), add))
    }

    /// The share of the prefetched bytes that was read, over the latest starts that had a startup pack.
    pub fn precision(&self) -> Option<f64> {
        self.outcome().and_then(|all| all.precision())
    }

    /// The share of the bytes read that had been prefetched, over the latest starts that had a startup pack.
    pub fn recall(&self) -> Option<f64> {
        self.outcome().and_then(|all| all.recall())
    }

    /// The profile's bytes, for a database: JSON, each piece an array of five numbers. Where not all starts that read a
    /// piece have read all of it, the piece's place among the others and the counts of its blocks follow.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut pieces: Vec<_> = self.reads.iter().collect();
        pieces.sort_by_key(|(key, _)| **key);
        let is_partial = |reads: &Reads| reads.blocks.iter().any(|count| u32::from(*count) != reads.starts);
        let partial = (0..).zip(&pieces).filter(|(_, (_, reads))| is_partial(reads));
        let blocks = partial.map(|(at, (_, reads))| (at, reads.blocks)).collect();
        let row = |(key, reads): (&PieceKey, &Reads)| (key.layer, key.inode.0, key.piece, reads.starts, reads.ranks);
        let form = Form {
            version: FORM_VERSION,
            chain: self.chain,
            origin: self.origin,
            total: self.total,
            starts: self.starts,
            pieces: pieces.into_iter().map(row).collect(),
            blocks,
            outcomes: self.outcomes.clone(),
            remembered: self.remembered.clone(),
            senders: self.senders.clone(),
        };
        serde_json::to_vec(&form).map_err(|e| damaged(&e.to_string()))
    }

    /// Reads a profile's bytes.
    pub fn decode(bytes: &[u8]) -> Result<PrefetchProfile> {
        let form: Form = serde_json::from_slice(bytes).map_err(|e| damaged(&e.to_string()))?;
        if form.version != FORM_VERSION {
            let why = format!("it has version {}", form.version);
            return Err(Error::Unsupported { what: "a profile".into(), why });
        }
        let bounded = form.pieces.len() <= ENTRIES_MAX
            && form.outcomes.len() <= OUTCOMES_MAX
            && form.remembered.len() <= REMEMBERED
            && form.senders.is_bounded()
            && form.starts <= STARTS_MAX
            && form.pieces.iter().all(|piece| (1..=form.starts).contains(&piece.3));
        if !bounded {
            return Err(damaged("it is larger than a profile may be"));
        }
        let read = |(layer, inode, piece, starts, ranks): (u16, u32, u32, u32, u64)| {
            (PieceKey { layer, inode: InodeIndex(inode), piece }, Reads::new(starts, ranks, Blocks::ALL))
        };
        let mut reads: Vec<_> = form.pieces.into_iter().map(read).collect();
        for (at, counts) in form.blocks {
            let reads = reads.get_mut(at as usize).map(|(_, reads)| reads);
            let reads = reads.filter(|reads| counts.iter().all(|count| u32::from(*count) <= reads.starts));
            reads.ok_or_else(|| damaged("it counts blocks of a piece that it does not name"))?.blocks = counts;
        }
        Ok(PrefetchProfile {
            chain: form.chain,
            origin: form.origin,
            total: form.total,
            starts: form.starts,
            reads: reads.into_iter().collect(),
            outcomes: form.outcomes,
            remembered: form.remembered,
            senders: form.senders,
        })
    }
}

const FORM_VERSION: u32 = 1;

/// The JSON form of a profile.
#[derive(Serialize, Deserialize)]
struct Form {
    version: u32,
    chain: Digest,
    #[serde(default, skip_serializing_if = "Origin::is_traced")]
    origin: Origin,
    total: u64,
    starts: u32,
    pieces: Vec<(u16, u32, u32, u32, u64)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    blocks: Vec<(u32, Counts)>,
    outcomes: Vec<(u64, Outcome)>,
    remembered: Vec<u64>,
    #[serde(default)]
    senders: Senders,
}

fn damaged(why: &str) -> Error {
    Error::corrupt("a profile", why)
}

/// Identifies a trace or a sender: the first eight bytes of its BLAKE3 digest.
fn mark(encoded: &[u8]) -> u64 {
    let digest = ContentDigest::of(encoded);
    digest.as_bytes().iter().take(8).fold(0, |mark, byte| mark << 8 | u64::from(*byte))
}

/// Selects at most `most` pieces: those that most starts read, among equals the earliest. They keep their order.
/// Those of which starts need nothing that is stored (holes) are left out; `len` gives the bytes of a piece's blocks.
pub fn heaviest(selected: Vec<Selected>, len: impl Fn(&Selected) -> u64, most: usize) -> Vec<Selected> {
    let mut heaviest: Vec<(usize, Selected)> = selected.into_iter().enumerate().collect();
    heaviest.retain(|(_, one)| len(one) > 0);
    heaviest.sort_by(|a, b| b.1.weight.total_cmp(&a.1.weight).then(a.0.cmp(&b.0)));
    heaviest.truncate(most);
    heaviest.sort_by_key(|(at, _)| *at);
    heaviest.into_iter().map(|(_, one)| one).collect()
}

#[cfg(test)]
mod tests;
