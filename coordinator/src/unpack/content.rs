//! A file's bytes as pieces: zeros become holes, known pieces become references, new ones go into chunks.

use std::collections::HashMap;

use store::ContentDigest;
use store::chunk::{CHUNK_TARGET, ChunkRef, PIECE_SIZE, PieceLocation};
use store::layer::{FileContent, PieceSource};
use store::layout::Layout;

use tokio_util::sync::CancellationToken;

use super::bounds::PIECES_MAX;
use super::chunk_locations::ChunkLocations;
use super::error::UnpackError;
use super::pipeline::{Packed, PackingStopped, Pipeline};

/// Where a piece lies; the chunk is numbered within this layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) chunk: u32,
    /// First byte within the chunk.
    pub(super) start: u32,
    /// Length in bytes.
    pub(super) len: u32,
    /// Whether the piece is the whole chunk, as pieces of large files must be.
    whole: bool,
    /// Whether this layer added it to the store.
    new: bool,
}

/// A chunk in this layer's numbering.
#[derive(Clone, Copy)]
enum Chunk {
    /// In the pack that is being written: its number there.
    New(u32),
    /// In a pack of the store: its position in `known_references`.
    Known(u32),
}

/// The pieces that the store already has.
pub(super) struct Known<'a> {
    locations: &'a dyn ChunkLocations,
    layout: &'a Layout,
    packs: HashMap<ContentDigest, bool>,
}

impl<'a> Known<'a> {
    /// Uses the pieces that `locations` remembers, if their packs really exist.
    pub(super) fn new(locations: &'a dyn ChunkLocations, layout: &'a Layout) -> Known<'a> {
        Known { locations, layout, packs: HashMap::new() }
    }

    fn find(&mut self, digest: &ContentDigest, len: usize) -> Option<PieceLocation> {
        let found = self.locations.get(digest).filter(|found| found.len as usize == len)?;
        let (layout, pack) = (self.layout, found.chunk.pack);
        self.packs.entry(pack).or_insert_with(|| layout.pack(&pack).exists()).then_some(found)
    }
}

/// All pieces of one layer.
pub(super) struct Pieces<'a> {
    pipeline: Option<Pipeline>,
    known: Option<Known<'a>>,
    places: HashMap<ContentDigest, Place>,
    chunks: Vec<Chunk>,
    known_references: Vec<ChunkRef>,
    known_chunks: HashMap<(ContentDigest, u64), u32>,
    open: Vec<u8>,
    open_chunk: Option<u32>,
    deduplicated: u64,
    count: u64,
}

impl<'a> Pieces<'a> {
    /// Starts without pieces; new chunks go into `pipeline`.
    pub(super) fn new(pipeline: Pipeline, known: Known<'a>) -> Pieces<'a> {
        Pieces {
            pipeline: Some(pipeline),
            known: Some(known),
            places: HashMap::new(),
            chunks: Vec::new(),
            known_references: Vec::new(),
            known_chunks: HashMap::new(),
            open: Vec::with_capacity(2 * CHUNK_TARGET),
            open_chunk: None,
            deduplicated: 0,
            count: 0,
        }
    }

    /// Stores `piece` unless it is known, and returns where it lies. `alone` says that it is the whole content of a small file.
    fn place(&mut self, piece: &[u8], digest: &ContentDigest, alone: bool) -> Result<PieceSource, UnpackError> {
        let fits = |place: &Place| alone || place.whole;
        let known = match self.places.get(digest).copied().filter(fits) {
            Some(place) => Some(place),
            None => self.find_known(digest, piece.len()).filter(fits),
        };
        let place = match known {
            Some(place) => {
                self.deduplicated += u64::from(place.len);
                place
            }
            None => self.store(piece, alone)?,
        };
        // A whole chunk serves small and large files alike, so it takes precedence.
        let entry = self.places.entry(*digest).or_insert(place);
        if place.whole {
            *entry = place;
        }
        Ok(PieceSource::Chunk { chunk: place.chunk, start: place.start })
    }

    fn find_known(&mut self, digest: &ContentDigest, len: usize) -> Option<Place> {
        let found = self.known.as_mut()?.find(digest, len)?;
        let next = self.chunks.len() as u32;
        let chunk = *self.known_chunks.entry((found.chunk.pack, found.chunk.offset)).or_insert(next);
        if chunk == next {
            self.chunks.push(Chunk::Known(self.known_references.len() as u32));
            self.known_references.push(found.chunk);
        }
        let whole = found.start == 0 && found.len == found.chunk.raw_len;
        Some(Place { chunk, start: found.start, len: found.len, whole, new: false })
    }

    fn store(&mut self, piece: &[u8], alone: bool) -> Result<Place, UnpackError> {
        let len = piece.len() as u32;
        if !alone {
            let chunk = self.push(piece.to_vec())?;
            return Ok(Place { chunk, start: 0, len, whole: true, new: true });
        }
        let chunk = match self.open_chunk {
            Some(chunk) => chunk,
            None => {
                let chunk = self.chunks.len() as u32;
                // It gets its number in the pack when it is closed.
                self.chunks.push(Chunk::New(u32::MAX));
                *self.open_chunk.insert(chunk)
            }
        };
        let start = self.open.len() as u32;
        self.open.extend_from_slice(piece);
        if self.open.len() >= CHUNK_TARGET {
            self.flush()?;
        }
        Ok(Place { chunk, start, len, whole: false, new: true })
    }

    fn send(&mut self, raw: Vec<u8>) -> Result<u32, UnpackError> {
        let stopped = |PackingStopped| UnpackError::Read(std::io::ErrorKind::BrokenPipe.into());
        match &mut self.pipeline {
            Some(pipeline) => pipeline.push(raw).map_err(stopped),
            None => Err(stopped(PackingStopped)),
        }
    }

    fn push(&mut self, raw: Vec<u8>) -> Result<u32, UnpackError> {
        let in_pack = self.send(raw)?;
        self.chunks.push(Chunk::New(in_pack));
        Ok(self.chunks.len() as u32 - 1)
    }

    /// Closes the chunk that gathers small files.
    pub(super) fn flush(&mut self) -> Result<(), UnpackError> {
        let Some(chunk) = self.open_chunk.take() else { return Ok(()) };
        let raw = std::mem::replace(&mut self.open, Vec::with_capacity(2 * CHUNK_TARGET));
        self.chunks[chunk as usize] = Chunk::New(self.send(raw)?);
        Ok(())
    }

    /// Drops the pipeline, which ends its threads, and the store's pieces.
    pub(super) fn detach<'b>(self) -> Pieces<'b> {
        Pieces {
            pipeline: None,
            known: None,
            places: self.places,
            chunks: self.chunks,
            known_references: self.known_references,
            known_chunks: self.known_chunks,
            open: self.open,
            open_chunk: None,
            deduplicated: self.deduplicated,
            count: self.count,
        }
    }

    /// The references of all chunks, in this layer's numbering.
    pub(super) fn references(&self, packed: &Packed) -> Vec<ChunkRef> {
        let reference = |chunk: &Chunk| match chunk {
            Chunk::Known(number) => self.known_references.get(*number as usize).copied(),
            Chunk::New(number) => packed.placed.get(*number as usize).map(|placed| placed.in_pack(packed.name)),
        };
        self.chunks.iter().filter_map(reference).collect()
    }

    /// Number of chunks so far.
    pub(super) fn chunk_count(&self) -> usize {
        self.chunks.len()
    }

    /// The pieces that this layer added to the store.
    pub(super) fn new_places(&self) -> impl Iterator<Item = (&ContentDigest, &Place)> {
        self.places.iter().filter(|(_, place)| place.new)
    }

    /// Bytes that were not stored again.
    pub(super) fn deduplicated(&self) -> u64 {
        self.deduplicated
    }

    fn count(&mut self, size: u64) -> Result<(), &'static str> {
        self.count += size.div_ceil(PIECE_SIZE.into());
        if self.count > PIECES_MAX { Err("makes the layer larger than 512 GiB, which no image needs") } else { Ok(()) }
    }
}

/// One file's content while it is read.
pub(super) struct FileWriter<'p, 'a> {
    pieces: &'p mut Pieces<'a>,
    size: u64,
    written: u64,
    whole: blake3::Hasher,
    piece: Vec<u8>,
    sources: Vec<PieceSource>,
}

impl<'p, 'a> FileWriter<'p, 'a> {
    /// Starts a file of `size` bytes. The error says what is wrong with it.
    pub(super) fn new(pieces: &'p mut Pieces<'a>, size: u64) -> Result<FileWriter<'p, 'a>, &'static str> {
        pieces.count(size)?;
        Ok(FileWriter {
            pieces,
            size,
            written: 0,
            whole: blake3::Hasher::new(),
            piece: Vec::new(),
            sources: Vec::new(),
        })
    }

    /// Bytes until the current piece is full.
    fn room(&self) -> usize {
        PIECE_SIZE as usize - self.piece.len()
    }

    /// Appends bytes.
    pub(super) fn write(&mut self, mut bytes: &[u8]) -> Result<(), UnpackError> {
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(self.room()));
            self.whole.update(now);
            self.piece.extend_from_slice(now);
            self.written += now.len() as u64;
            bytes = rest;
            if self.room() == 0 {
                self.close_piece()?;
            }
        }
        Ok(())
    }

    /// Appends zeros up to `offset`; fails if `stop` is cancelled. A piece of zeros is only hashed.
    pub(super) fn zeros_to(&mut self, offset: u64, stop: &CancellationToken) -> Result<(), UnpackError> {
        static ZEROS: [u8; PIECE_SIZE as usize] = [0; PIECE_SIZE as usize];
        while self.written < offset {
            if stop.is_cancelled() {
                return Err(UnpackError::Stopped);
            }
            let left = offset - self.written;
            if self.piece.is_empty() && left >= PIECE_SIZE.into() {
                self.whole.update(&ZEROS);
                self.written += u64::from(PIECE_SIZE);
                self.sources.push(PieceSource::Hole);
                continue;
            }
            let n = left.min(self.room() as u64) as usize;
            self.write(&ZEROS[..n])?;
        }
        Ok(())
    }

    fn close_piece(&mut self) -> Result<(), UnpackError> {
        let piece = std::mem::take(&mut self.piece);
        let alone = self.size <= PIECE_SIZE.into();
        let source = if piece.iter().all(|byte| *byte == 0) {
            PieceSource::Hole
        } else {
            self.pieces.place(&piece, &ContentDigest::of(&piece), alone)?
        };
        self.sources.push(source);
        self.piece = piece;
        self.piece.clear();
        Ok(())
    }

    /// The file's content; all of its bytes must have been written.
    pub(super) fn finish(mut self) -> Result<FileContent, UnpackError> {
        if !self.piece.is_empty() {
            self.close_piece()?;
        }
        let digest = ContentDigest::from_bytes(*self.whole.finalize().as_bytes());
        Ok(FileContent { digest, size: self.size, pieces: self.sources })
    }
}
