//! Traces of what containers read when they start.
//!
//! A start begins when an image is first looked into and ends when nothing new has been read for a while, and nobody waits for a read. Between
//! the look and the first read there may be minutes: engines look into an image when they create a container. In between,
//! the first touch of every piece is noted, in order, with the blocks that were read of it, and also how many bytes the local cache
//! lacked, and how long
//! readers waited for which files. Reads that the page cache answers are not seen, so only the first start of an image
//! in a daemon's life shows what a start needs; a later one leaves no trace. A finished trace lies in a file until the
//! coordinator has it ([`trace_upload`]); the last starts are kept in memory for `cachefs why`.
//!
//! While nothing is being recorded a read costs one atomic load here.

use std::collections::{HashMap, VecDeque};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use store::blocks::Blocks;
use store::layer::{Inode, InodeIndex, LayerIndex, Source};
use store::profile::PieceKey;
use store::trace::{AccessTrace, Outcome, Touch};
use store::{ContentDigest, Digest};

use crate::os::private_files;

pub mod spool;
pub mod trace_upload;

/// A start has ended when it has read nothing new for this long.
const QUIET: Duration = Duration::from_secs(3);
/// How long after the look the first read may come.
const UNREAD: Duration = Duration::from_secs(600);
/// The longest time for which a start is recorded.
const LONGEST: Duration = Duration::from_secs(120);
/// How many starts `cachefs why` can show.
const REMEMBERED: usize = 64;
/// The most files that are kept of those that a start waited for, for `cachefs why`.
const WAITS: usize = 20;
/// The most traces that wait for the coordinator; beyond that the oldest are removed.
const SPOOLED: usize = 256;
/// A start that reads more than this share of its layers, in quarters, and more than [`COPY_BYTES`] bytes, is a copy of
/// the image rather than a start.
const COPY_QUARTERS: u64 = 3;
const COPY_BYTES: u64 = 64 << 20;

/// Returns the pieces that a startup pack has brought so far: which blocks of each, and the whole piece's length in bytes.
pub type Brought = Box<dyn Fn() -> HashMap<PieceKey, (Blocks, u32)> + Send>;

/// A file that a start waited for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wait {
    /// Its path in the image.
    pub path: String,
    /// How long its reads waited in all, milliseconds.
    pub millis: u64,
    /// How many of its reads waited.
    pub reads: u64,
}

/// One start of an image on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerStart {
    /// The image's top chainID.
    pub chain: Digest,
    /// When it began, seconds since 1970.
    pub started_at: u64,
    /// The time from its beginning to the last first touch of a piece, milliseconds.
    pub millis: u64,
    /// Pieces of files that it read.
    pub pieces: usize,
    /// Bytes, by how they came.
    pub outcome: Outcome,
    /// The startup pack that was in use.
    pub profile: Option<ContentDigest>,
    /// How long its reads waited for the shared store in all, milliseconds.
    pub waited_millis: u64,
    /// The files that it waited for longest.
    pub waits: Vec<Wait>,
}

/// One start that is under way.
struct Session {
    chain: Digest,
    layers: Vec<Digest>,
    positions: HashMap<Digest, u16>,
    indexes: HashMap<u16, Arc<LayerIndex>>,
    began: Instant,
    began_at: SystemTime,
    /// When something was first read, and when something new was read last.
    first: Option<Instant>,
    last: Instant,
    /// When a read last ended that had waited for the shared store.
    answered: Instant,
    /// For each piece that was read, where it is in `touches`, and its length in bytes; holes are nowhere.
    seen: HashMap<PieceKey, Option<(usize, u32)>>,
    touches: Vec<Touch>,
    missed_bytes: u64,
    waits: HashMap<(u16, InodeIndex), (Duration, u64)>,
    startup: Option<(ContentDigest, Brought)>,
}

/// Records starts.
pub struct Recorder {
    spool: PathBuf,
    host: String,
    active: AtomicUsize,
    /// How many reads wait for the shared store.
    waiting: AtomicUsize,
    /// Guards the starts under way; held for short look-ups only.
    sessions: Mutex<Vec<Session>>,
    /// Guards the starts that have ended, the latest last.
    starts: Mutex<VecDeque<ContainerStart>>,
}

impl Recorder {
    /// A recorder whose traces lie in the directory `spool` until they are delivered.
    pub fn new(spool: PathBuf) -> Recorder {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
        let (active, waiting, sessions, starts) = Default::default();
        Recorder { spool, host, active, waiting, sessions, starts }
    }

    /// Where traces wait for the coordinator.
    pub fn spool(&self) -> &Path {
        &self.spool
    }

    /// Begins to record a start of the image with this top chainID; `layers` are its diffIDs, base first.
    pub fn begin(&self, chain: Digest, layers: Vec<Digest>) {
        let positions = (0..).zip(&layers).map(|(position, layer)| (*layer, position)).collect();
        let now = Instant::now();
        let session = Session {
            chain,
            layers,
            positions,
            indexes: HashMap::new(),
            began: now,
            began_at: SystemTime::now(),
            first: None,
            last: now,
            answered: now,
            seen: HashMap::new(),
            touches: Vec::new(),
            missed_bytes: 0,
            waits: HashMap::new(),
            startup: None,
        };
        let mut sessions = self.sessions.lock();
        match sessions.iter_mut().find(|known| known.chain == chain) {
            // It was looked into and not started.
            Some(known) if known.touches.is_empty() => *known = session,
            Some(_) => {}
            None => {
                sessions.push(session);
                self.active.fetch_add(1, Ordering::Release);
            }
        }
    }

    /// Notes that a start under way uses a startup pack; `brought` tells later what the pack has brought.
    pub fn uses(&self, chain: &Digest, pack: ContentDigest, brought: Brought) {
        if let Some(session) = self.sessions.lock().iter_mut().find(|session| session.chain == *chain) {
            session.startup = Some((pack, brought));
        }
    }

    /// Whether any start is under way.
    pub fn is_recording(&self) -> bool {
        self.active.load(Ordering::Acquire) > 0
    }

    /// Whether a start of an image is under way.
    pub fn is_recording_of(&self, chain: &Digest) -> bool {
        self.is_recording() && self.sessions.lock().iter().any(|session| session.chain == *chain)
    }

    /// Notes that blocks of pieces of a file are read, by the image with the top chainID `reader` if it is known which; the local cache
    /// lacks those of pieces that are `missed`.
    pub fn touched(
        &self,
        reader: Option<&Digest>,
        index: &Arc<LayerIndex>,
        number: InodeIndex,
        inode: &Inode,
        pieces: impl Iterator<Item = (u32, Blocks)> + Clone,
        missed: impl Fn(u32) -> bool,
    ) {
        let now = Instant::now();
        for session in self.sessions.lock().iter_mut() {
            let Some(layer) = session.position(reader, &index.diff_id(), now) else { continue };
            for (piece, blocks) in pieces.clone() {
                session.touch(PieceKey { layer, inode: number, piece }, blocks, index, inode, now, missed(piece));
            }
        }
    }

    /// Notes that a read begins to wait for the shared store; [`Recorder::waited`] has to follow.
    pub fn waits(&self) {
        self.waiting.fetch_add(1, Ordering::AcqRel);
    }

    /// Notes how long a read of a file has waited for the shared store.
    pub fn waited(&self, reader: Option<&Digest>, layer: &Digest, inode: InodeIndex, waited: Duration) {
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        let now = Instant::now();
        for session in self.sessions.lock().iter_mut() {
            let Some(position) = session.position(reader, layer, now) else { continue };
            session.answered = now;
            let entry = session.waits.entry((position, inode)).or_default();
            *entry = (entry.0 + waited, entry.1 + 1);
        }
    }

    /// Ends the starts that are over by `now`, and writes their traces into the spool.
    pub fn tick(&self, now: Instant) {
        if !self.is_recording() {
            return;
        }
        let is_waiting = self.waiting.load(Ordering::Acquire) > 0;
        self.end(|session| session.is_over(now, is_waiting));
    }

    /// Ends all starts, because the daemon ends.
    pub fn finish(&self) {
        self.end(|_| true);
    }

    fn end(&self, is_over: impl Fn(&Session) -> bool) {
        let ended: Vec<_> = self.sessions.lock().extract_if(.., |session| is_over(session)).collect();
        self.active.fetch_sub(ended.len(), Ordering::Release);
        for session in ended {
            if !session.touches.is_empty() {
                self.conclude(&session);
            }
        }
    }

    fn conclude(&self, session: &Session) {
        let start = session.start();
        if !session.is_copy(&start.outcome)
            && let Err(error) = self.keep(&session.trace(&self.host, &start))
        {
            tracing::warn!("the trace of a start is lost, because {} cannot be written: {error}", self.spool.display());
        }
        let mut starts = self.starts.lock();
        if starts.len() >= REMEMBERED {
            starts.pop_front();
        }
        starts.push_back(start);
    }

    fn keep(&self, trace: &AccessTrace) -> std::io::Result<()> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.spool)?;
        let waiting = spool::waiting(&self.spool);
        for old in waiting.iter().take((waiting.len() + 1).saturating_sub(SPOOLED)) {
            std::fs::remove_file(old)?;
        }
        let bytes = trace.encode().map_err(std::io::Error::other)?;
        let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
        let path = self.spool.join(format!("{nanos:020}.trace"));
        private_files::replace(&path, &bytes)
    }

    /// The last starts, the latest last.
    pub fn starts(&self) -> Vec<ContainerStart> {
        self.starts.lock().iter().cloned().collect()
    }
}

impl Session {
    fn touch(
        &mut self,
        key: PieceKey,
        blocks: Blocks,
        index: &Arc<LayerIndex>,
        inode: &Inode,
        now: Instant,
        missed: bool,
    ) {
        if self.is_idle(now) {
            (self.began, self.began_at) = (now, SystemTime::now());
        }
        let place = match self.seen.get(&key) {
            Some(place) => *place,
            None if self.touches.len() >= AccessTrace::TOUCHES_MAX => return,
            None => self.first_touch(key, index, inode, now),
        };
        let Some((touch, len)) = place.and_then(|(place, len)| Some((self.touches.get_mut(place)?, len))) else {
            return;
        };
        let new = blocks.without(touch.blocks);
        if new.is_empty() {
            return;
        }
        touch.blocks = touch.blocks.and(blocks).whole_if_all(len);
        self.last = now;
        self.first.get_or_insert(now);
        if missed {
            self.missed_bytes += u64::from(new.content_len(len));
        }
    }

    /// Notes a piece of which nothing was read before, unless it is a hole.
    fn first_touch(
        &mut self,
        key: PieceKey,
        index: &Arc<LayerIndex>,
        inode: &Inode,
        now: Instant,
    ) -> Option<(usize, u32)> {
        let piece = index.piece(inode, key.piece).ok().filter(|piece| piece.source != Source::Hole);
        let place = piece.map(|piece| (self.touches.len(), piece.len));
        if place.is_some() {
            self.indexes.entry(key.layer).or_insert_with(|| Arc::clone(index));
            let at_ms = u32::try_from(now.duration_since(self.began).as_millis()).unwrap_or(u32::MAX);
            let PieceKey { layer, inode, piece } = key;
            self.touches.push(Touch { layer, inode, piece, blocks: Blocks::NONE, at_ms });
        }
        self.seen.insert(key, place);
        place
    }

    /// The blocks of a piece that were read, and the piece's length in bytes.
    fn read(&self, key: &PieceKey) -> Option<(Blocks, u32)> {
        let (place, len) = (*self.seen.get(key)?)?;
        Some((self.touches.get(place)?.blocks, len))
    }

    /// The position of a layer, if the image `reader` may be this one. Long after the look, when nothing was read yet, somebody unknown who
    /// reads a layer below the topmost is rather another image on the same base.
    fn position(&self, reader: Option<&Digest>, layer: &Digest, now: Instant) -> Option<u16> {
        let is_own = match reader {
            Some(reader) => *reader == self.chain,
            None => !self.is_idle(now) || self.layers.last() == Some(layer),
        };
        is_own.then(|| self.positions.get(layer).copied())?
    }

    /// Whether it was looked into a while ago, and nothing was read since.
    fn is_idle(&self, now: Instant) -> bool {
        self.first.is_none() && now.saturating_duration_since(self.began) >= QUIET
    }

    fn is_over(&self, now: Instant, is_waiting: bool) -> bool {
        let Some(first) = self.first else { return now.duration_since(self.began) >= UNREAD };
        let is_quiet = !is_waiting && now.duration_since(self.last.max(self.answered)) >= QUIET;
        is_quiet || now.duration_since(first) >= LONGEST || self.touches.len() >= AccessTrace::TOUCHES_MAX
    }

    fn outcome(&self) -> Outcome {
        let brought = self.startup.as_ref().map(|(_, brought)| brought()).unwrap_or_default();
        let bytes = |(blocks, len): (Blocks, u32)| u64::from(blocks.content_len(len));
        let used = |(key, (brought, len)): (&PieceKey, &(Blocks, u32))| {
            self.read(key).map_or(0, |(read, _)| bytes((read.shared(*brought), *len)))
        };
        Outcome {
            touched_bytes: self.seen.keys().filter_map(|key| self.read(key)).map(bytes).sum(),
            prefetched_bytes: brought.values().copied().map(bytes).sum(),
            prefetched_used_bytes: brought.iter().map(used).sum(),
            missed_bytes: self.missed_bytes,
        }
    }

    /// Whether so much was read that it was a copy, not a start.
    fn is_copy(&self, outcome: &Outcome) -> bool {
        let whole: u64 = self.indexes.values().map(|index| index.header().content_size).sum();
        outcome.touched_bytes > COPY_BYTES && outcome.touched_bytes > whole / 4 * COPY_QUARTERS
    }

    fn start(&self) -> ContainerStart {
        let mut waits: Vec<_> = self.waits.iter().collect();
        waits.sort_unstable_by_key(|(_, (waited, _))| std::cmp::Reverse(*waited));
        let waited: Duration = waits.iter().map(|(_, (waited, _))| *waited).sum();
        waits.truncate(WAITS);
        let mut paths = HashMap::new();
        for (position, index) in &self.indexes {
            let wanted = waits.iter().filter(|((layer, _), _)| layer == position).map(|((_, inode), _)| *inode);
            for (inode, path) in index.paths(wanted.collect()).unwrap_or_default() {
                paths.insert((*position, inode), String::from_utf8_lossy(&path).into_owned());
            }
        }
        let wait = |((layer, inode), (waited, reads)): (&(u16, InodeIndex), &(Duration, u64))| Wait {
            path: paths.get(&(*layer, *inode)).map_or_else(|| "?".to_owned(), |path| format!("/{path}")),
            millis: waited.as_millis() as u64,
            reads: *reads,
        };
        ContainerStart {
            chain: self.chain,
            started_at: self.began_at.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            millis: self.last.duration_since(self.began).as_millis() as u64,
            pieces: self.touches.len(),
            outcome: self.outcome(),
            profile: self.startup.as_ref().map(|(pack, _)| *pack),
            waited_millis: waited.as_millis() as u64,
            waits: waits.into_iter().map(wait).collect(),
        }
    }

    fn trace(&self, host: &str, start: &ContainerStart) -> AccessTrace {
        AccessTrace {
            chain: self.chain,
            layers: self.layers.clone(),
            host: host.to_owned(),
            started_at: start.started_at,
            millis: start.millis,
            touches: self.touches.clone(),
            outcome: start.outcome,
            profile: start.profile,
        }
    }
}
