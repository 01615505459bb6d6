//! A startup pack that is about to be used: it waits for its table and its layers' indexes.
//!
//! ```text
//!   at once          front: table, and the indexes that this host lacks      head: the first content, in parts
//!   with the table   the content up to EARLY
//!   with the indexes the pack is in use; the rest is streamed
//! ```
//!
//! Where all indexes are here the image has probably been here before, and so may be its content. Then nothing is read early: what is in the
//! cache is not fetched again.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use store::Digest;
use store::blocks::Blocks;
use store::chunk::ChunkRef;
use store::layer::{LayerIndex, Source};
use store::profile::{PieceKey, StartupPiece, StartupRecord, StartupTable};
use store::reader::StartupFront;

use super::head::{Arrived, Head};
use super::{Look, Prefetcher};
use crate::content::cache::Content;
use crate::content::cache::extents::extents;
use crate::content::cache::startup::{NeededPiece, PackedPiece, Startup};
use crate::content::indexes::Expected;
use crate::os::pool::Priority;
use crate::source::failure::{Failure, Result};

/// How long after the front the head is asked for: a start needs all indexes before any content, so these must be first on the wire, and a
/// disk serves requests in the order in which they come.
const BEHIND: Duration = Duration::from_millis(1);
/// How much of a startup pack is read while the layers' indexes are being loaded, bytes of the pack.
const EARLY: u64 = 3 << 20;

/// The thread that brings the last of what is waited for goes on.
struct Gathering {
    record: Arc<StartupRecord>,
    layers: Vec<Digest>,
    /// Whether content is read before it is known what of it is here.
    is_early: bool,
    /// Guards what has come so far; never held during I/O.
    gathered: Mutex<Gathered>,
}

#[derive(Default)]
struct Gathered {
    table: Option<Arc<StartupTable>>,
    indexes: Vec<Option<Arc<LayerIndex>>>,
    head: Head,
    /// Chunks that came before the indexes.
    early: Vec<Arrived>,
    /// How many chunks are read early.
    claimed: u32,
    /// The startup pack, once it is in use.
    startup: Option<Arc<Startup>>,
}

impl Gathered {
    fn all(&mut self) -> Option<(Arc<StartupTable>, Vec<Arc<LayerIndex>>)> {
        let indexes = self.indexes.iter().cloned().collect::<Option<Vec<_>>>()?;
        Some((self.table.take()?, indexes))
    }
}

impl Prefetcher {
    /// Puts a startup pack to use.
    pub(super) fn gather(self: &Arc<Self>, record: Arc<StartupRecord>, layers: Vec<Digest>, look: Look) {
        let expected = self.indexes.expect(&layers);
        let table = self.ahead.table(&record.pack);
        let is_early = look == Look::First && !expected.is_empty();
        let head_len = if is_early { record.head_len.min(store::profile::HEAD_MAX) } else { 0 };
        let (head, indexes) = (Head::new(head_len), vec![None; layers.len()]);
        let gathered = Mutex::new(Gathered { head, indexes, ..Gathered::default() });
        let gathering = Arc::new(Gathering { record, layers, is_early, gathered });
        // The container waits for these before anything else.
        match table {
            Some(table) if expected.is_empty() => self.table_came(&gathering, table),
            _ => {
                let (this, gathering) = (Arc::clone(self), Arc::clone(&gathering));
                self.pools.remote.submit(Priority::Demand, move || this.read(&gathering, head_len, expected));
            }
        }
        for (position, layer) in gathering.layers.iter().enumerate() {
            let (this, gathering) = (Arc::clone(self), Arc::clone(&gathering));
            let loaded = move |result: Result<Arc<LayerIndex>>| {
                if let Ok(index) = result {
                    this.came(&gathering, |gathered| gathered.indexes[position] = Some(index));
                }
            };
            self.indexes.load(*layer, self.shared_store.deadline(), Box::new(loaded));
        }
    }

    /// Reads the front here and the head on other threads. May hang as long as the disk does.
    fn read(self: &Arc<Self>, gathering: &Arc<Gathering>, head_len: u64, expected: Expected) {
        // Once for all of them.
        let opened = self.shared_store.fetch(|| false, |store| store.open_pack(&gathering.record.pack));
        let front = opened.and_then(|()| {
            for (part, start, len) in Head::ranges(head_len) {
                let (this, gathering) = (Arc::clone(self), Arc::clone(gathering));
                self.pools.remote.submit(Priority::Demand, move || this.read_head(&gathering, part, start, len));
            }
            self.front(&gathering.record, &gathering.layers, &expected)
        });
        // What has not come is fetched from its own place now.
        drop(expected);
        match front {
            Ok(table) => self.table_came(gathering, table),
            Err(failure) => {
                tracing::warn!("chain {} starts without its startup pack: {failure}", gathering.record.chain);
            }
        }
    }

    /// Reads a startup pack's table, and the indexes that are expected. May hang as long as the disk does.
    pub(super) fn front(
        &self,
        record: &StartupRecord,
        layers: &[Digest],
        expected: &Expected,
    ) -> Result<Arc<StartupTable>> {
        if expected.is_empty() {
            return self.shared_store.fetch(|| false, |store| store.startup_table(record)).map(Arc::new);
        }
        let StartupFront { table, indexes } =
            self.shared_store.fetch(|| false, |store| store.startup_front(record, layers))?;
        for (position, sealed) in indexes {
            if let Some(layer) = layers.get(usize::from(position)) {
                expected.deliver(layer, sealed);
            }
        }
        Ok(Arc::new(table))
    }

    fn read_head(self: &Arc<Self>, gathering: &Gathering, part: usize, start: u64, len: u64) {
        std::thread::sleep(BEHIND);
        let read = self.shared_store.fetch(|| false, |store| store.startup_content(&gathering.record, start, len));
        let arrived = gathering.gathered.lock().head.came(part, read.ok());
        self.arrived(gathering, arrived);
    }

    /// Takes the table, which tells where the first chunks are, and has those read that are not coming with the head.
    fn table_came(self: &Arc<Self>, gathering: &Arc<Gathering>, table: Arc<StartupTable>) {
        let (begin, record) = (gathering.record.content_offset(), &gathering.record);
        let upto = |len: u64| {
            let end = begin.saturating_add(len);
            table.chunks.partition_point(|chunk| chunk.offset + u64::from(chunk.stored_len) <= end)
        };
        let (in_head, claimed) = if gathering.is_early { (upto(record.head_len), upto(EARLY)) } else { (0, 0) };
        let rest: Vec<_> =
            (0..).zip(&table.chunks[..claimed]).map(|(position, chunk)| (position, *chunk)).skip(in_head).collect();
        for extent in extents(rest, |(_, chunk)| chunk) {
            let (this, gathering) = (Arc::clone(self), Arc::clone(gathering));
            self.pools.remote.submit(Priority::Demand, move || this.read_early(&gathering, &extent));
        }
        let held = table.chunks[..in_head].to_vec();
        self.came(gathering, |gathered| {
            let arrived = gathered.head.holds(&held);
            gathered.early.extend(arrived);
            gathered.claimed = claimed as u32;
            gathered.table = Some(table);
        });
    }

    fn read_early(self: &Arc<Self>, gathering: &Gathering, extent: &[(u32, ChunkRef)]) {
        let chunks: Vec<_> = extent.iter().map(|(_, chunk)| *chunk).collect();
        let read = self.shared_store.fetch(|| false, |store| store.read_extent(&chunks));
        let mut raw = read.unwrap_or_default().into_iter();
        self.arrived(gathering, extent.iter().map(|(position, _)| (*position, raw.next())).collect());
    }

    /// Passes chunks on that came early, now or once the pack is in use.
    fn arrived(&self, gathering: &Gathering, arrived: Vec<Arrived>) {
        let mut gathered = gathering.gathered.lock();
        let startup = gathered.startup.clone();
        match startup {
            None => gathered.early.extend(arrived),
            Some(startup) => {
                drop(gathered);
                arrived.into_iter().for_each(|(position, raw)| self.cache.startup_arrived(&startup, position, raw));
            }
        }
    }

    fn came(&self, gathering: &Gathering, put: impl FnOnce(&mut Gathered)) {
        let mut gathered = gathering.gathered.lock();
        put(&mut gathered);
        let all = gathered.all();
        let claimed = gathered.claimed;
        drop(gathered);
        let Some((table, indexes)) = all else { return };
        let startup = self.begin(&gathering.record, &table, claimed, &indexes);
        let mut gathered = gathering.gathered.lock();
        gathered.startup = Some(startup);
        let early = std::mem::take(&mut gathered.early);
        drop(gathered);
        self.arrived(gathering, early);
    }

    fn begin(
        &self,
        record: &StartupRecord,
        table: &StartupTable,
        claimed: u32,
        indexes: &[Arc<LayerIndex>],
    ) -> Arc<Startup> {
        let mut held: Vec<Vec<PackedPiece>> = table.chunks.iter().map(|_| Vec::new()).collect();
        let mut named = Vec::new();
        for piece in &table.pieces {
            let Ok(needed) = resolve(piece, indexes) else {
                tracing::warn!("the startup pack of chain {} names a piece that is not there", record.chain);
                continue;
            };
            match piece.place.map(|place| (held.get_mut(place.chunk as usize), place.start)) {
                Some((Some(chunk), start)) => chunk.push(PackedPiece { needed, start }),
                _ => named.push(needed),
            }
        }
        let chunks = table.chunks.iter().copied().zip(held).collect();
        let startup = Arc::new(Startup::new(record.chain, chunks, named));
        let told = Arc::clone(&startup);
        self.recorder.uses(&record.chain, record.pack, Box::new(move || told.brought()));
        tracing::debug!("chain {} starts with a startup pack of {} bytes", record.chain, record.pack_len);
        self.cache.use_startup(&startup, claimed);
        startup
    }
}

/// Finds a startup pack's piece in its layer.
fn resolve(piece: &StartupPiece, indexes: &[Arc<LayerIndex>]) -> Result<NeededPiece> {
    let PieceKey { layer, inode: number, piece: in_file } = piece.key;
    let index = indexes.get(usize::from(layer)).ok_or(Failure::Damaged)?;
    let inode = index.inode(number).map_err(|error| Failure::from(&error))?;
    let found = index.piece(&inode, in_file).map_err(|error| Failure::from(&error))?;
    let blocks = piece.blocks.whole_if_all(found.len);
    // A small file has a cache file of its own, which is whole.
    if found.source == Source::Hole || (inode.piece_count() == 1 && blocks != Blocks::ALL) {
        return Err(Failure::Damaged);
    }
    let content = Content { index: Arc::clone(index), number, inode, reader: None };
    Ok(NeededPiece { layer, content, number: in_file, piece: found, blocks })
}
