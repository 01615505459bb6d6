//! Writes an image's startup pack and publishes it.
//!
//! The table is the pack's first chunk and says how long the others are, so these are first compressed into a file of
//! their own. Memory holds one chunk and the table, whatever the pack's size. A piece that comes twice (the same bytes
//! in two files) is stored once.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;

use crate::catalogue::Change;
use crate::chunk::{CHUNK_TARGET, StoredChunk, compress_at};
use crate::crash::{CrashPoint, crash_point};
use crate::digest::{ContentDigest, Digest};
use crate::durable::drop_cached;
use crate::error::{Error, Result};
use crate::pack::{self, PackWriter, Placed};
use crate::profile::{
    CONTENT_MAX, Origin, PIECES_MAX, PieceKey, STARTUP_LEVEL, StartupPiece, StartupRecord, StartupTable,
};
use crate::publisher::{Publisher, Staging};

/// Gathers pieces, in the order in which starts need them.
#[derive(Debug)]
pub struct StartupWriter {
    staging: Staging,
    path: PathBuf,
    file: BufWriter<File>,
    /// Bytes of the chunk that is being gathered.
    open: Vec<u8>,
    /// The closed chunks; their offsets are those in the file of chunks.
    chunks: Vec<Placed>,
    /// Where the bytes of each piece are: chunk and first byte.
    places: HashMap<ContentDigest, (u32, u32)>,
    pieces: Vec<StartupPiece>,
    content: u64,
}

/// A complete startup pack that is not published yet. Dropping it removes it.
#[derive(Debug)]
pub struct StagedStartup {
    staging: Staging,
    pack: ContentDigest,
    pack_len: u64,
    table: Placed,
    content: u64,
    origin: Origin,
}

impl StagedStartup {
    /// Notes where what the pack holds was learned; if nobody says, from traces.
    pub fn learned_from(self, origin: Origin) -> StagedStartup {
        StagedStartup { origin, ..self }
    }
}

impl Publisher {
    /// Starts a startup pack.
    pub fn stage_startup(&self) -> Result<StartupWriter> {
        let staging = self.stage()?;
        let path = staging.dir.join("chunks");
        let file = File::options().read(true).write(true).create_new(true).open(&path);
        let file = BufWriter::with_capacity(1 << 20, file.map_err(|e| Error::io("create", &path, e))?);
        crash_point(CrashPoint::StartupStaged);
        let (open, chunks, places) = (Vec::with_capacity(2 * CHUNK_TARGET), Vec::new(), HashMap::new());
        Ok(StartupWriter { staging, path, file, open, chunks, places, pieces: Vec::new(), content: 0 })
    }

    /// Publishes a startup pack for `chain`: verifies it by reading it back, renames it into place, commits it. Refused
    /// as [`Error::Missing`] if no image has the chain (any more). `starts` is the number of starts that it was made
    /// from, `now` is in seconds since 1970.
    pub fn publish_startup(
        &self,
        staged: StagedStartup,
        chain: Digest,
        starts: u32,
        now: u64,
    ) -> Result<Arc<StartupRecord>> {
        let StagedStartup { staging, pack, pack_len, table, content, origin } = staged;
        drop_cached(&staging.pack());
        pack::verify(&staging.pack(), &pack)?;
        self.check()?;
        let missing = || Error::Missing { what: format!("an image with chain {chain}") };
        self.catalogue().image_of_chain(&chain).ok_or_else(missing)?;
        crash_point(CrashPoint::StartupVerified);
        // A collection that found this very pack unused must not remove it now.
        let mut hold = self.hold([]);
        hold.claim([pack]);
        self.publish_pack(&staging, &pack)?;
        crash_point(CrashPoint::StartupRenamed);
        let (content_bytes, published_at) = (content, now);
        let record = StartupRecord { chain, pack, pack_len, table, starts, origin, content_bytes, published_at };
        let record = Arc::new(record);
        let change = Change::Startup(Arc::clone(&record));
        self.commit_with(|catalogue| match catalogue.image_of_chain(&chain) {
            Some(_) => Ok(vec![change]),
            None => Err(missing()),
        })?;
        crash_point(CrashPoint::StartupCommitted);
        Ok(record)
    }
}

impl StartupWriter {
    /// Adds a piece of a file: its verified bytes, their digest, and its weight (see [`StartupPiece::weight`]).
    pub fn add(&mut self, key: PieceKey, weight: u16, digest: &ContentDigest, bytes: &[u8]) -> Result<()> {
        let PieceKey { layer, inode, piece } = key;
        if self.pieces.len() >= PIECES_MAX || self.content + bytes.len() as u64 > CONTENT_MAX {
            return Err(Error::corrupt("a startup pack", "it is larger than a startup pack may be"));
        }
        let (chunk, start) = match self.places.get(digest) {
            Some(place) => *place,
            None => {
                let place = (self.chunks.len() as u32, self.open.len() as u32);
                self.places.insert(*digest, place);
                self.open.extend_from_slice(bytes);
                if self.open.len() >= CHUNK_TARGET {
                    self.close_chunk()?;
                }
                place
            }
        };
        self.content += bytes.len() as u64;
        self.pieces.push(StartupPiece { layer, inode, piece, chunk, start, weight });
        Ok(())
    }

    fn close_chunk(&mut self) -> Result<()> {
        if self.open.is_empty() {
            return Ok(());
        }
        let StoredChunk { bytes, raw_len, codec, digest } = compress_at(&self.open, STARTUP_LEVEL)?;
        self.open.clear();
        let offset = self.chunks.last().map_or(0, |last| last.offset + u64::from(last.stored_len));
        self.chunks.push(Placed { offset, stored_len: bytes.len() as u32, raw_len, codec, digest });
        self.file.write_all(&bytes).map_err(|e| Error::io("write", &self.path, e))
    }

    /// Puts table and chunks into one pack, synced to disk.
    pub fn finish(mut self) -> Result<StagedStartup> {
        self.close_chunk()?;
        crash_point(CrashPoint::StartupGathered);
        let nameless = ContentDigest::from_bytes([0; 32]);
        self.pieces.sort_by_key(|piece| (piece.chunk, piece.start));
        let chunks = self.chunks.iter().map(|chunk| chunk.in_pack(nameless)).collect();
        let table = StartupTable { chunks, pieces: self.pieces }.encode()?;
        let mut pack = PackWriter::create(&self.staging.pack())?;
        let table = pack.append(&compress_at(&table, STARTUP_LEVEL)?)?;
        let failed = |e| Error::io("read back", &self.path, e);
        let mut file = self.file.into_inner().map_err(|e| failed(e.into_error()))?;
        std::io::Seek::rewind(&mut file).map_err(failed)?;
        let mut file = BufReader::with_capacity(1 << 20, file);
        for Placed { stored_len, raw_len, codec, digest, .. } in self.chunks {
            let mut bytes = vec![0; stored_len as usize];
            file.read_exact(&mut bytes).map_err(failed)?;
            pack.append(&StoredChunk { bytes, raw_len, codec, digest })?;
        }
        let name = pack.finish()?;
        crash_point(CrashPoint::StartupWritten);
        let path = self.staging.pack();
        let pack_len = std::fs::metadata(&path).map_err(|e| Error::io("read back", &path, e))?.len();
        let (staging, content, origin) = (self.staging, self.content, Origin::Traced);
        Ok(StagedStartup { staging, pack: name, pack_len, table, content, origin })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::tests::image;
    use crate::layer::InodeIndex;
    use crate::publisher::tests::{furnish, new_store};
    use crate::reader::Store;

    /// A piece's bytes: neither all the same nor incompressible.
    fn bytes(number: u32, len: usize) -> Vec<u8> {
        (0..len as u32).map(|at| (at.wrapping_mul(number + 3) >> 9) as u8 ^ number as u8).collect()
    }

    fn write(publisher: &Publisher, lens: &[usize]) -> StagedStartup {
        let mut writer = publisher.stage_startup().unwrap();
        for (number, len) in (0..).zip(lens) {
            let bytes = bytes(number, *len);
            let key = PieceKey { layer: 0, inode: InodeIndex(number), piece: 0 };
            writer.add(key, 9, &ContentDigest::of(&bytes), &bytes).unwrap();
            let twin = PieceKey { layer: 1, ..key };
            writer.add(twin, 8, &ContentDigest::of(&bytes), &bytes).unwrap();
        }
        writer.finish().unwrap()
    }

    #[test]
    fn every_piece_of_a_published_startup_pack_is_read_back() {
        let (dir, publisher) = new_store();
        let image = image("r/a", Some("t"), 1);
        let chain = image.top_chain().unwrap();
        publisher.commit(vec![Change::Set(furnish(&publisher, &image))]).unwrap();
        let lens = [100, 262_144, 5, 200_000, 262_144, 1];
        let record = publisher.publish_startup(write(&publisher, &lens), chain, 3, 77).unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.catalogue().unwrap().startup(&chain), Some(&record));
        assert_eq!(record.content_bytes, 2 * lens.iter().sum::<usize>() as u64);
        let path = store.layout().pack(&record.pack);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), record.pack_len);
        let table = store.startup_table(&record).unwrap();
        let listed = pack::chunks(&path, record.pack).unwrap();
        assert_eq!(listed[0], record.table_chunk());
        assert_eq!(listed[1..], table.chunks);
        assert_eq!(table.chunks.iter().map(|chunk| chunk.raw_len).collect::<Vec<_>>(), [262_244, 462_149, 1]);
        assert_eq!(table.pieces.len(), 2 * lens.len());
        for piece in &table.pieces {
            let (number, chunk) = (piece.inode.0, &table.chunks[piece.chunk as usize]);
            let len = lens[number as usize];
            let found = store.read_chunk(chunk).unwrap().piece(piece.start, len as u32).unwrap().to_vec();
            assert!(found == bytes(number, len), "piece {number}");
        }
        assert_eq!(std::fs::read_dir(store.layout().staging()).unwrap().count(), 0, "nothing is left in staging");
    }

    #[test]
    fn the_head_is_the_table_and_the_chunks_that_came_whole() {
        let (dir, publisher) = new_store();
        let image = image("r/a", Some("t"), 1);
        let chain = image.top_chain().unwrap();
        publisher.commit(vec![Change::Set(furnish(&publisher, &image))]).unwrap();
        let staged = write(&publisher, &[262_144, 262_144, 262_144, 262_144]);
        let record = publisher.publish_startup(staged, chain, 1, 1).unwrap();
        let store = Store::open(dir.path()).unwrap();
        let table = store.startup_table(&record).unwrap();
        let head = |len: u64| {
            let (read, chunks) = store.startup_head(&record, len as u32).unwrap();
            assert_eq!(read, table);
            let came = chunks.len();
            for (raw, expected) in chunks.into_iter().zip(&table.chunks) {
                assert_eq!(raw.verify().unwrap().bytes(), store.read_chunk(expected).unwrap().bytes());
            }
            came
        };
        let begin = record.table_chunk().offset;
        let second = table.chunks[1];
        let upto_second = second.offset + u64::from(second.stored_len) - begin;
        assert_eq!(head(0), 0, "a request is never shorter than the table");
        assert_eq!((head(upto_second - 1), head(upto_second)), (1, 2), "a part of a chunk is no chunk");
        assert_eq!(head(u32::MAX.into()), table.chunks.len(), "a request ends with the pack");
    }

    #[test]
    fn a_store_that_was_mounted_anew_is_read_through_its_path() {
        let (dir, publisher) = new_store();
        let image = image("r/a", Some("t"), 1);
        let chain = image.top_chain().unwrap();
        publisher.commit(vec![Change::Set(furnish(&publisher, &image))]).unwrap();
        let store = Store::open(dir.path()).unwrap();
        let first = publisher.publish_startup(write(&publisher, &[100]), chain, 1, 1).unwrap();
        assert!(store.startup_table(&first).is_ok());
        // The directory that the reader holds open is no longer the store's.
        let packs = store.layout().root().join("packs");
        std::fs::rename(&packs, packs.with_extension("before")).unwrap();
        std::fs::create_dir(&packs).unwrap();
        let second = publisher.publish_startup(write(&publisher, &[200]), chain, 2, 2).unwrap();
        assert_eq!(store.startup_table(&second).unwrap().chunks[0].raw_len, 200);
        let missing = StartupRecord { pack: ContentDigest::of(b"another"), ..(*first).clone() };
        let error = store.startup_table(&missing).unwrap_err();
        assert!(error.to_string().contains(&missing.pack.to_string()), "{error}");
    }

    #[test]
    fn no_image_no_startup_pack() {
        let (dir, publisher) = new_store();
        let staged = write(&publisher, &[10]);
        let pack = staged.pack;
        let error = publisher.publish_startup(staged, Digest::of(b"chain"), 1, 1).unwrap_err();
        assert!(error.is_missing(), "{error}");
        let store = Store::open(dir.path()).unwrap();
        assert!(!store.layout().pack(&pack).exists());
        assert_eq!(store.catalogue().unwrap().startups().count(), 0);
    }

    #[test]
    fn what_reads_back_differently_or_comes_from_a_stale_leader_is_not_published() {
        let (dir, publisher) = new_store();
        let image = image("r/a", Some("t"), 1);
        let chain = image.top_chain().unwrap();
        publisher.commit(vec![Change::Set(furnish(&publisher, &image))]).unwrap();
        let staged = write(&publisher, &[1000]);
        let mut file = std::fs::read(staged.staging.pack()).unwrap();
        let last = file.len() - 60;
        file[last] ^= 1;
        std::fs::write(staged.staging.pack(), file).unwrap();
        assert!(publisher.publish_startup(staged, chain, 1, 1).is_err());
        let staged = write(&publisher, &[1000]);
        let successor = publisher.store.layout().leases().join(format!("{:016x}", publisher.epoch() + 1));
        std::fs::write(successor, b"{}").unwrap();
        let error = publisher.publish_startup(staged, chain, 1, 1).unwrap_err();
        assert!(matches!(error, Error::Fenced { .. }), "{error}");
        assert_eq!(Store::open(dir.path()).unwrap().catalogue().unwrap().startups().count(), 0);
    }
}
