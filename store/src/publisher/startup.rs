//! Writes an image's startup pack and publishes it.
//!
//! The table is the pack's first chunk and says how long the others are, so these are first compressed into a file of
//! their own. Memory holds one chunk and the table, whatever the pack's size. A piece that comes twice (the same bytes
//! in two files) is stored once. Pieces for which there is no room are named.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;

use crate::blocks::Blocks;
use crate::catalogue::Change;
use crate::chunk::{CHUNK_TARGET, Codec, StoredChunk, compress_at};
use crate::crash::{CrashPoint, crash_point};
use crate::digest::{ContentDigest, Digest};
use crate::durable::drop_cached;
use crate::error::{Error, Result};
use crate::pack::{self, PackWriter, Placed};
use crate::profile::{
    CONTENT_MAX, HEAD_MAX, INDEXES_LEN_MAX, INDEXES_MAX, Origin, PIECES_MAX, PieceKey, PlaceInPack, STARTUP_LEVEL,
    StartupIndex, StartupPiece, StartupRecord, StartupTable,
};
use crate::publisher::{Publisher, Staging};

/// Gathers pieces, in the order in which starts need them.
#[derive(Debug)]
pub struct StartupWriter {
    staging: Staging,
    /// The sealed indexes of the chain's layers, by the layer's position, topmost first: what is new is on top.
    indexes: Vec<(u16, Vec<u8>)>,
    path: PathBuf,
    file: BufWriter<File>,
    /// Bytes of the chunk that is being gathered.
    open: Vec<u8>,
    /// The closed chunks; their offsets are those in the file of chunks.
    chunks: Vec<Placed>,
    /// Where the bytes of each piece are.
    places: HashMap<(ContentDigest, Blocks), PlaceInPack>,
    pieces: Vec<StartupPiece>,
    /// Bytes of content that the pieces cover, those of them that the pack holds, and the most that it may hold.
    content: u64,
    held: u64,
    content_max: u64,
}

/// A complete startup pack that is not published yet. Dropping it removes it.
#[derive(Debug)]
pub struct StagedStartup {
    staging: Staging,
    pack: ContentDigest,
    pack_len: u64,
    table: Placed,
    indexes_len: u64,
    head_len: u64,
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
    /// Starts a startup pack for the chain of these layers, base first. It gets their indexes as they are now.
    pub fn stage_startup(&self, layers: &[Digest]) -> Result<StartupWriter> {
        let staging = self.stage()?;
        let indexes = self.sealed_indexes(layers)?;
        let path = staging.dir.join("chunks");
        let file = File::options().read(true).write(true).create_new(true).open(&path);
        let file = BufWriter::with_capacity(1 << 20, file.map_err(|e| Error::io("create", &path, e))?);
        crash_point(CrashPoint::StartupStaged);
        let (open, chunks, places) = (Vec::with_capacity(2 * CHUNK_TARGET), Vec::new(), HashMap::new());
        let (pieces, content, held, content_max) = (Vec::new(), 0, 0, CONTENT_MAX);
        Ok(StartupWriter { staging, indexes, path, file, open, chunks, places, pieces, content, held, content_max })
    }

    /// The indexes that fit into a startup pack, topmost first.
    fn sealed_indexes(&self, layers: &[Digest]) -> Result<Vec<(u16, Vec<u8>)>> {
        let (mut indexes, mut room) = (Vec::new(), INDEXES_LEN_MAX);
        for (position, layer) in layers.iter().enumerate().rev() {
            let path = self.store.layout().index(layer);
            let len = std::fs::metadata(&path).map_err(|e| Error::io("read", &path, e))?.len();
            if len > room || indexes.len() >= INDEXES_MAX {
                continue;
            }
            let sealed = self.store.read_index(layer)?;
            room = room.saturating_sub(sealed.len() as u64);
            indexes.push((position as u16, sealed));
        }
        Ok(indexes)
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
        let StagedStartup { staging, pack, pack_len, table, indexes_len, head_len, content, origin } = staged;
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
        let record = StartupRecord {
            chain,
            pack,
            pack_len,
            table,
            indexes_len,
            head_len,
            starts,
            origin,
            content_bytes,
            published_at,
        };
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
    /// Lets the pack hold at most so many bytes of content, instead of [`CONTENT_MAX`], which is the most.
    pub fn with_content_max(self, bytes: u64) -> StartupWriter {
        StartupWriter { content_max: bytes.min(CONTENT_MAX), ..self }
    }

    /// Whether there is room for `len` more bytes of content. Pieces without room are named.
    pub fn has_room(&self, len: u32) -> bool {
        self.held + u64::from(len) <= self.content_max
    }

    /// Adds blocks of a piece of a file: all of its verified bytes, their digest, and its weight (see
    /// [`StartupPiece::weight`]).
    pub fn add(
        &mut self,
        key: PieceKey,
        blocks: Blocks,
        weight: u8,
        digest: &ContentDigest,
        bytes: &[u8],
    ) -> Result<()> {
        let len = blocks.content_len(bytes.len() as u32);
        if !self.has_room(len) {
            return Err(too_large());
        }
        let place = match self.places.get(&(*digest, blocks)) {
            Some(place) => *place,
            None => {
                let place = PlaceInPack { chunk: self.chunks.len() as u32, start: self.open.len() as u32 };
                self.places.insert((*digest, blocks), place);
                self.open.extend(blocks.pack(bytes));
                if self.open.len() >= CHUNK_TARGET {
                    self.close_chunk()?;
                }
                place
            }
        };
        self.held += u64::from(len);
        self.push(StartupPiece { key, blocks, weight, place: Some(place) }, len)
    }

    /// Names blocks of a piece of a file, `len` bytes, without the bytes: hosts read it from its layer's packs.
    pub fn name(&mut self, key: PieceKey, blocks: Blocks, weight: u8, len: u32) -> Result<()> {
        self.push(StartupPiece { key, blocks, weight, place: None }, len)
    }

    fn push(&mut self, piece: StartupPiece, len: u32) -> Result<()> {
        if self.pieces.len() >= PIECES_MAX {
            return Err(too_large());
        }
        self.content += u64::from(len);
        self.pieces.push(piece);
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

    /// Puts table, indexes and chunks into one pack, synced to disk.
    pub fn finish(mut self) -> Result<StagedStartup> {
        self.close_chunk()?;
        crash_point(CrashPoint::StartupGathered);
        let nameless = ContentDigest::from_bytes([0; 32]);
        self.pieces.sort_by_key(StartupPiece::order);
        let chunks = self.chunks.iter().map(|chunk| chunk.in_pack(nameless)).collect();
        let index = |(layer, sealed): &(u16, Vec<u8>)| StartupIndex { layer: *layer, len: sealed.len() as u32 };
        let indexes: Vec<_> = self.indexes.iter().map(index).collect();
        let indexes_len = indexes.iter().map(|index| u64::from(index.len)).sum();
        let head_len = head_len(&self.chunks);
        let table = StartupTable { indexes, chunks, pieces: self.pieces }.encode()?;
        let mut pack = PackWriter::create(&self.staging.pack())?;
        let table = pack.append(&compress_at(&table, STARTUP_LEVEL)?)?;
        for (_, sealed) in &self.indexes {
            for part in sealed.chunks(CHUNK_TARGET) {
                let (raw_len, digest) = (part.len() as u32, ContentDigest::of(part));
                pack.append(&StoredChunk { bytes: part.to_vec(), raw_len, codec: Codec::Plain, digest })?;
            }
        }
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
        Ok(StagedStartup { staging, pack: name, pack_len, table, indexes_len, head_len, content, origin })
    }
}

fn too_large() -> Error {
    Error::corrupt("a startup pack", "it is larger than a startup pack may be")
}

/// The length of the first chunks that are read before anything is known of them.
fn head_len(chunks: &[Placed]) -> u64 {
    let ends = chunks.iter().map(|chunk| chunk.offset + u64::from(chunk.stored_len));
    ends.take_while(|end| *end <= HEAD_MAX).last().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::BLOCK;
    use crate::catalogue::tests::image;
    use crate::chunk::{PIECE_SIZE, RawChunk};
    use crate::image::LayerRecord;
    use crate::layer::InodeIndex;
    use crate::publisher::tests::{furnish, new_store, stage};
    use crate::reader::Store;

    /// A piece's bytes: neither all the same nor incompressible.
    fn bytes(number: u32, len: usize) -> Vec<u8> {
        (0..len as u32).map(|at| (at.wrapping_mul(number + 3) >> 9) as u8 ^ number as u8).collect()
    }

    fn write(publisher: &Publisher, lens: &[usize]) -> StagedStartup {
        let catalogue = publisher.catalogue();
        let layers = catalogue.images().next().map(|image| image.diff_ids());
        let mut writer = publisher.stage_startup(&layers.unwrap_or_default()).unwrap();
        for (number, len) in (0..).zip(lens) {
            let bytes = bytes(number, *len);
            let key = PieceKey { layer: 0, inode: InodeIndex(number), piece: 0 };
            writer.add(key, Blocks::ALL, 9, &ContentDigest::of(&bytes), &bytes).unwrap();
            let twin = PieceKey { layer: 1, ..key };
            writer.add(twin, Blocks::ALL, 8, &ContentDigest::of(&bytes), &bytes).unwrap();
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
        assert_eq!(listed[1 + table.indexes.len()..], table.chunks);
        assert_eq!(table.chunks.iter().map(|chunk| chunk.raw_len).collect::<Vec<_>>(), [262_244, 462_149, 1]);
        assert_eq!(table.pieces.len(), 2 * lens.len());
        for piece in &table.pieces {
            let (number, place) = (piece.key.inode.0, piece.place.unwrap());
            let (len, chunk) = (lens[number as usize], &table.chunks[place.chunk as usize]);
            let found = store.read_chunk(chunk).unwrap().piece(place.start, len as u32).unwrap().to_vec();
            assert!(found == bytes(number, len), "piece {number}");
        }
        assert_eq!(std::fs::read_dir(store.layout().staging()).unwrap().count(), 0, "nothing is left in staging");
    }

    #[test]
    fn pieces_without_room_are_named() {
        let (dir, publisher) = new_store();
        let image = image("r/a", Some("t"), 1);
        publisher.commit(vec![Change::Set(furnish(&publisher, &image))]).unwrap();
        let mut writer = publisher.stage_startup(&[]).unwrap().with_content_max(150);
        for (number, len) in [(0u32, 100u32), (1, 60), (2, 50)] {
            let bytes = bytes(number, len as usize);
            let key = PieceKey { layer: 0, inode: InodeIndex(number), piece: 0 };
            let added = writer.add(key, Blocks::ALL, 9, &ContentDigest::of(&bytes), &bytes);
            assert_eq!(added.is_ok(), writer.has_room(0) && number != 1, "{number}");
            if added.is_err() {
                writer.name(key, Blocks::ALL, 9, len).unwrap();
            }
        }
        assert!(!writer.has_room(1));
        let record = publisher.publish_startup(writer.finish().unwrap(), image.top_chain().unwrap(), 1, 1).unwrap();
        assert_eq!(record.content_bytes, 210);
        let pieces = Store::open(dir.path()).unwrap().startup_table(&record).unwrap().pieces;
        let shown: Vec<_> = pieces.iter().map(|piece| (piece.key.inode.0, piece.place.is_some())).collect();
        assert_eq!(shown, [(0, true), (2, true), (1, false)]);
    }

    #[test]
    fn the_front_has_the_indexes_and_the_head_the_first_chunks() {
        let (dir, publisher) = new_store();
        let mut image = (*furnish(&publisher, &image("r/a", Some("t"), 1))).clone();
        let [base, top] = [b"base", b"head"].map(|content| {
            let (staged, diff_id, pack) = stage(&publisher, content);
            publisher.publish_layer(staged, &diff_id, Some(&pack)).unwrap();
            diff_id
        });
        let layers = [base, Digest::of(b"not here"), top];
        assert!(publisher.stage_startup(&layers).is_err(), "an image without all of its layers has no startup pack");
        let layers = [base, top];
        let record = image.layers[0].clone();
        image.layers = layers.map(|diff_id| LayerRecord { diff_id, ..record.clone() }).into();
        let chain = image.top_chain().unwrap();
        publisher.commit(vec![Change::Set(image.into())]).unwrap();
        let lens = [262_144, 262_144, 700_000, 262_144, 262_144, 262_144];
        let mut writer = publisher.stage_startup(&layers).unwrap();
        for (number, len) in (0..).zip(lens) {
            // Incompressible, so that the head does not hold all of it.
            let bytes: Vec<u8> = (0..len).map(|_| rand::random()).take(PIECE_SIZE as usize).collect();
            let key = PieceKey { layer: 0, inode: InodeIndex(number), piece: 0 };
            let blocks = if number == 2 { Blocks::from_bits(0b10) } else { Blocks::ALL };
            writer.add(key, blocks, 9, &ContentDigest::of(&bytes), &bytes).unwrap();
        }
        let record = publisher.publish_startup(writer.finish().unwrap(), chain, 1, 1).unwrap();
        assert_eq!(record.content_bytes, 5 * 262_144 + u64::from(BLOCK));
        let store = Store::open(dir.path()).unwrap();
        let front = store.startup_front(&record, &layers).unwrap();
        assert_eq!(front.table, store.startup_table(&record).unwrap());
        let positions: Vec<_> = front.indexes.iter().map(|(position, _)| *position).collect();
        assert_eq!(positions, [1, 0], "the topmost comes first");
        for (position, sealed) in &front.indexes {
            let mut raw = Vec::new();
            sealed.unpack_into(&mut raw).unwrap().unwrap();
            assert_eq!(raw, store.raw_index(&layers[usize::from(*position)]).unwrap());
        }
        assert_eq!(front.table.chunks[0].offset, record.content_offset());
        let head = store.startup_content(&record, 0, record.head_len).unwrap();
        assert!(head.len() as u64 <= HEAD_MAX && head.len() as u64 > HEAD_MAX / 2, "{}", head.len());
        let ends: Vec<_> = front.table.chunks.iter().map(|c| c.offset + u64::from(c.stored_len)).collect();
        assert!(ends.contains(&(record.content_offset() + record.head_len)), "the head ends with a chunk");
        let first = front.table.chunks[0];
        let came = RawChunk::new(first, head[..first.stored_len as usize].to_vec()).verify().unwrap();
        assert_eq!(came.bytes(), store.read_chunk(&first).unwrap().bytes());
        assert!(store.is_startup_current(&record, &layers).unwrap());
        assert!(!store.is_startup_current(&record, &[top, base]).unwrap(), "an index of another layer is not taken");
        let longer = StartupRecord { indexes_len: 1 << 40, ..(*record).clone() };
        assert!(store.startup_front(&longer, &layers).is_err());
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
