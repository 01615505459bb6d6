//! What the starts of one image need: access traces merged into a profile.
//!
//! A profile belongs to a chain, so it serves every tag and image with the same content. Merging counts, for each piece of
//! a file, the starts that read it, and adds up its rank (its place among the start's first touches). What is
//! worth prefetching is what a good part of the starts read ([`WEIGHT_MIN`]), in the order of the mean rank.
//!
//! - `senders`: whose starts it stands for. `startup`: the startup pack, in which the selected pieces lie in the store.
//!
//! Invariants: the result does not depend on the order in which traces come (until counts are halved, see
//! [`STARTS_MAX`]); a trace that comes twice counts once; a profile is bounded whatever it is fed.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::digest::{ContentDigest, Digest};
use crate::error::{Error, Result};
use crate::layer::InodeIndex;
use crate::trace::{AccessTrace, Outcome};

mod senders;
mod startup;

use senders::{FLOOR, Senders, Verdict};

pub use startup::{
    CHUNK_RECORD_LEN, CHUNKS_MAX, CONTENT_MAX, HEADER_LEN, MAGIC, PIECE_RECORD_LEN, PIECES_MAX, STARTUP_LEVEL,
    StartupPiece, StartupRecord, StartupTable, VERSION,
};

/// All counts are halved when they stand for this many starts: what starts need changes with the software around them,
/// and what is not read any more fades within as many starts.
pub const STARTS_MAX: u32 = 64;
/// Pieces that a smaller share of the starts read are left out.
pub const WEIGHT_MIN: f64 = 0.25;
/// With fewer starts than this, all pieces are taken: a share of so few says nothing.
pub const STARTS_TO_JUDGE: u32 = 4;
/// A profile remembers no more pieces than this; those that the fewest starts read go first.
pub const ENTRIES_MAX: usize = 2 * AccessTrace::TOUCHES_MAX;
/// Precision and recall are those of so many last starts that had a startup pack.
pub const OUTCOMES_MAX: usize = 16;
/// Traces that are recognised when they come again.
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

/// How often and how early a piece was read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Reads {
    starts: u32,
    /// Sum of its ranks in those starts.
    ranks: u64,
}

impl Reads {
    fn mean_rank(self) -> f64 {
        self.ranks as f64 / f64::from(self.starts.max(1))
    }

    /// The part `part / whole` of them, rounded.
    fn scaled(self, part: u32, whole: u32) -> Reads {
        let starts = (self.starts * part + whole / 2) / whole;
        Reads { starts, ranks: self.ranks * u64::from(starts) / u64::from(self.starts.max(1)) }
    }

    fn halved(self) -> Reads {
        let starts = self.starts / 2;
        Reads { starts, ranks: self.ranks * u64::from(starts) / u64::from(self.starts.max(1)) }
    }
}

/// A piece that is worth prefetching.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Selected {
    /// The piece.
    pub key: PieceKey,
    /// The share of starts that read it, above 0 and at most 1.
    pub weight: f64,
    /// Its mean place among a start's first touches.
    pub rank: f64,
}

impl Selected {
    /// The weight as a startup table has it.
    pub fn weight_number(&self) -> u16 {
        (self.weight * f64::from(u16::MAX)).round() as u16
    }
}

/// Whether a trace told anything new.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Merged {
    /// It is one more start.
    New,
    /// It had come before.
    Again,
    /// It is left out: its sender would outweigh all others.
    Outweighs,
}

/// What is known of the starts of one chain.
#[derive(Debug, Clone, PartialEq)]
pub struct PrefetchProfile {
    chain: Digest,
    /// Starts ever merged.
    total: u64,
    /// Starts that the counts stand for.
    starts: u32,
    reads: HashMap<PieceKey, Reads>,
    /// When each start began, and its outcome; the last ones that had a startup pack, in the order of their beginnings.
    outcomes: Vec<(u64, Outcome)>,
    /// The traces that came last.
    remembered: Vec<u64>,
    senders: Senders,
}

/// Who sent a trace, and when, seconds since 1970.
#[derive(Debug, Clone, Copy)]
pub struct Sent<'a> {
    /// What tells senders apart: whoever can lie about it is one sender.
    pub by: &'a str,
    /// By the clock of whoever merges.
    pub at: u64,
}

impl PrefetchProfile {
    /// A profile of `chain` that knows of no start.
    pub fn new(chain: Digest) -> PrefetchProfile {
        let (reads, outcomes, remembered) = (HashMap::new(), Vec::new(), Vec::new());
        PrefetchProfile { chain, total: 0, starts: 0, reads, outcomes, remembered, senders: Senders::default() }
    }

    /// The chain.
    pub fn chain(&self) -> Digest {
        self.chain
    }

    /// How many starts were ever merged.
    pub fn starts(&self) -> u64 {
        self.total
    }

    /// Adds one start. The trace must be of this chain.
    pub fn merge(&mut self, trace: &AccessTrace) -> Result<Merged> {
        self.merge_checked(trace, None)
    }

    /// The same for a trace that somebody sent: nobody's outweigh those of all others.
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

    /// What was counted so far stands for this many starts at most.
    fn scale_to(&mut self, starts: u32) {
        if self.starts > starts {
            let all = self.starts;
            self.reads.values_mut().for_each(|reads| *reads = reads.scaled(starts, all));
            self.reads.retain(|_, reads| reads.starts > 0);
            self.starts = starts;
        }
    }

    fn count(&mut self, trace: &AccessTrace) {
        if self.starts >= STARTS_MAX {
            self.starts /= 2;
            self.senders.halve();
            self.reads.values_mut().for_each(|reads| *reads = reads.halved());
            self.reads.retain(|_, reads| reads.starts > 0);
        }
        (self.total, self.starts) = (self.total + 1, self.starts + 1);
        let mut ranks: HashMap<PieceKey, u64> = HashMap::with_capacity(trace.touches.len());
        for touch in &trace.touches {
            let next = ranks.len() as u64;
            ranks.entry(PieceKey { layer: touch.layer, inode: touch.inode, piece: touch.piece }).or_insert(next);
        }
        for (key, rank) in ranks {
            let reads = self.reads.entry(key).or_default();
            *reads = Reads { starts: reads.starts + 1, ranks: reads.ranks + rank };
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
            (weight >= least).then(|| Selected { key: *key, weight, rank: reads.mean_rank() })
        };
        let mut selected: Vec<_> = self.reads.iter().filter_map(select).collect();
        selected.sort_by(|a, b| a.rank.total_cmp(&b.rank).then(a.key.cmp(&b.key)));
        selected
    }

    /// The last outcomes of starts that had a startup pack, added up; nothing if there was none.
    pub fn outcome(&self) -> Option<Outcome> {
        let add = |sum: Outcome, (_, one): &(u64, Outcome)| Outcome {
            touched_bytes: sum.touched_bytes.saturating_add(one.touched_bytes),
            prefetched_bytes: sum.prefetched_bytes.saturating_add(one.prefetched_bytes),
            prefetched_used_bytes: sum.prefetched_used_bytes.saturating_add(one.prefetched_used_bytes),
            missed_bytes: sum.missed_bytes.saturating_add(one.missed_bytes),
        };
        (!self.outcomes.is_empty()).then(|| self.outcomes.iter().fold(Outcome::default(), add))
    }

    /// The share of prefetched bytes that starts read, of the last starts that had a startup pack.
    pub fn precision(&self) -> Option<f64> {
        self.outcome().and_then(|all| share(all.prefetched_used_bytes, all.prefetched_bytes))
    }

    /// The share of the bytes that starts read that had been prefetched, of the last starts that had a startup pack.
    pub fn recall(&self) -> Option<f64> {
        self.outcome().and_then(|all| share(all.prefetched_used_bytes, all.touched_bytes))
    }

    /// The profile's bytes, for a database: JSON, each piece an array of five numbers.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut pieces: Vec<_> = self.reads.iter().collect();
        pieces.sort_by_key(|(key, _)| **key);
        let row = |(key, reads): (&PieceKey, &Reads)| (key.layer, key.inode.0, key.piece, reads.starts, reads.ranks);
        let form = Form {
            version: FORM_VERSION,
            chain: self.chain,
            total: self.total,
            starts: self.starts,
            pieces: pieces.into_iter().map(row).collect(),
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
            (PieceKey { layer, inode: InodeIndex(inode), piece }, Reads { starts, ranks })
        };
        Ok(PrefetchProfile {
            chain: form.chain,
            total: form.total,
            starts: form.starts,
            reads: form.pieces.into_iter().map(read).collect(),
            outcomes: form.outcomes,
            remembered: form.remembered,
            senders: form.senders,
        })
    }
}

const FORM_VERSION: u32 = 1;

/// A profile as it is written down.
#[derive(Serialize, Deserialize)]
struct Form {
    version: u32,
    chain: Digest,
    total: u64,
    starts: u32,
    pieces: Vec<(u16, u32, u32, u32, u64)>,
    outcomes: Vec<(u64, Outcome)>,
    remembered: Vec<u64>,
    #[serde(default)]
    senders: Senders,
}

fn damaged(why: &str) -> Error {
    Error::corrupt("a profile", why)
}

/// By which a trace is recognised when it comes again.
fn mark(encoded: &[u8]) -> u64 {
    let digest = ContentDigest::of(encoded);
    digest.as_bytes().iter().take(8).fold(0, |mark, byte| mark << 8 | u64::from(*byte))
}

fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// The pieces that a startup pack has room for: those that most starts read, among equals the earliest, still in their
/// order. `len` gives a piece's bytes; pieces without any (holes) are left out.
pub fn within(selected: Vec<Selected>, len: impl Fn(&PieceKey) -> u64, content: u64, pieces: usize) -> Vec<Selected> {
    let mut heaviest: Vec<(usize, Selected, u64)> = Vec::with_capacity(selected.len());
    heaviest.extend(selected.into_iter().enumerate().map(|(at, one)| (at, one, len(&one.key))));
    heaviest.retain(|(_, _, len)| *len > 0);
    heaviest.sort_by(|a, b| b.1.weight.total_cmp(&a.1.weight).then(a.0.cmp(&b.0)));
    let mut left = content;
    heaviest.retain(|(_, _, len)| match left.checked_sub(*len) {
        Some(rest) => {
            left = rest;
            true
        }
        None => false,
    });
    heaviest.truncate(pieces);
    heaviest.sort_by_key(|(at, _, _)| *at);
    heaviest.into_iter().map(|(_, one, _)| one).collect()
}

#[cfg(test)]
mod tests;
