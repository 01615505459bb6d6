//! Reads startup packs: the front (table and indexes) and the head (the first content) can be asked for at the same time, because the
//! catalogue says how long both are.

use crate::chunk::RawChunk;
use crate::digest::{ContentDigest, Digest};
use crate::error::{Error, Result};
use crate::layer::SealedIndex;
use crate::profile::{INDEXES_LEN_MAX, StartupRecord, StartupTable};
use crate::reader::{EXTENT_MAX, Store};

/// Length of the names of the directories that packs lie in.
const FAN_OUT: usize = 2;

/// What lies before a startup pack's content.
#[derive(Debug)]
pub struct StartupFront {
    /// The table, verified.
    pub table: StartupTable,
    /// Indexes, each with its layer's position in the chain: those that are the ones that the catalogue names.
    pub indexes: Vec<(u16, SealedIndex)>,
}

impl Store {
    /// A startup pack's table and indexes, read with one request. `layers` are the chain's, base first.
    pub fn startup_front(&self, record: &StartupRecord, layers: &[Digest]) -> Result<StartupFront> {
        self.read_anew(&record.pack, || self.read_front(record, layers))
    }

    fn read_front(&self, record: &StartupRecord, layers: &[Digest]) -> Result<StartupFront> {
        let place = record.table_chunk();
        let len = u64::from(place.stored_len) + record.indexes_len.min(INDEXES_LEN_MAX);
        let bytes = self.read_pack(&record.pack, place.offset, len as usize)?;
        let (own, indexes) = bytes.split_at_checked(place.stored_len as usize).ok_or_else(|| short(record))?;
        let table = StartupTable::decode(RawChunk::new(place, own.to_vec()).verify()?.bytes(), &place)?;
        let (mut rest, mut found) = (indexes, Vec::with_capacity(table.indexes.len()));
        for index in &table.indexes {
            let (sealed, others) = rest.split_at_checked(index.len as usize).ok_or_else(|| short(record))?;
            rest = others;
            let Some(layer) = layers.get(usize::from(index.layer)) else { continue };
            // A repair may have replaced it since: then the layer's own place has the right one.
            if self.check_index(layer, &ContentDigest::of(sealed)).is_ok()
                && let Ok(sealed) = SealedIndex::new(sealed.to_vec(), *layer)
            {
                found.push((index.layer, sealed));
            }
        }
        Ok(StartupFront { table, indexes: found })
    }

    /// Opens a pack, for reads that follow.
    pub fn open_pack(&self, pack: &ContentDigest) -> Result<()> {
        let path = self.layout.pack(pack);
        self.disk.open(&path).map_err(|e| Error::io("open", &path, e))
    }

    /// A startup pack's table, verified.
    pub fn startup_table(&self, record: &StartupRecord) -> Result<StartupTable> {
        let table = record.table_chunk();
        StartupTable::decode(self.read_chunk(&table)?.bytes(), &table)
    }

    /// `len` bytes of a startup pack's content from `start` on, as they are stored and not verified.
    pub fn startup_content(&self, record: &StartupRecord, start: u64, len: u64) -> Result<Vec<u8>> {
        let offset = record.content_offset().checked_add(start).ok_or_else(|| short(record))?;
        self.read_pack(&record.pack, offset, len.min(EXTENT_MAX) as usize)
    }

    /// Whether a startup pack has the indexes of its layers, as far as they fit, and they are those that the catalogue names now.
    pub fn is_startup_current(&self, record: &StartupRecord, layers: &[Digest]) -> Result<bool> {
        let front = self.startup_front(record, layers)?;
        Ok(!front.table.indexes.is_empty() && front.indexes.len() == front.table.indexes.len())
    }

    /// Opens the directories that packs lie in, so that a start need not. Each costs a request to the disk.
    pub fn open_pack_directories(&self) -> Result<()> {
        let dir = self.layout.packs();
        let names = self.disk.list(&dir).map_err(|e| Error::io("list", &dir, e))?;
        names.iter().filter(|name| name.len() == FAN_OUT).for_each(|name| self.disk.prepare(&dir.join(name)));
        Ok(())
    }
}

fn short(record: &StartupRecord) -> Error {
    Error::corrupt(format!("pack {}", record.pack), "it is shorter than its startup table says")
}
