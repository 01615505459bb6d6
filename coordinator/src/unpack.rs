//! Unpacks a layer's tar stream into a published layer, and writes the tar again byte for byte.
//!
//! ```text
//! reader ─> digest thread (SHA-256 of the stream) ─> this thread (tar, tree, recipe, pieces)
//!                                                         │ raw chunks, a few at a time
//!                                                         v
//!                                   compressing threads ─> packing thread (the pack, in order)
//! ```
//!
//! - `tar`: reads the stream as entries; every byte that is not file content goes into the recipe. `header`: the fields and dialects of a
//!   header. `pax`: extended headers. `sparse`: sparse files. `paths`: makes names safe.
//! - `apply`: applies entries to a [`store::layer::LayerTree`], as Docker's overlay2 driver would extract them. `attributes`: what the
//!   kernel makes of an entry's attributes; `acl`: of its access control lists.
//! - `content`: a file's bytes as pieces, deduplicated by digest. `pipeline`: chunks on their way into the pack.
//! - `bounds`: how much one layer may ask for.
//! - `layer_tar`: the tar stream from the store, block by block. [`previous_layout`]: unpacks a
//!   layer again exactly as before.
//!
//! Invariants: nothing is published before the stream has ended, its digest is the diffID and everything has been read back. Memory is
//! bounded whatever the stream holds (a few chunks, and the file tree without content): the recipe, the index and the pack go to the
//! staging directory piece by piece. Every loop ends soon after it is told to stop.

use std::collections::HashMap;
use std::io::{self, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use store::chunk::{ChunkRef, PieceLocation};
use store::crash::{CrashPoint, crash_point};
use store::digest::Sha256;
use store::layer::{LayerFacts, write_sealed};
use store::publisher::{DigestedFile, Published, Publisher, Staging};
use store::{ContentDigest, Digest};
use tokio_util::sync::CancellationToken;

mod acl;
mod apply;
mod attributes;
mod bounds;
mod chunk_locations;
mod content;
mod error;
#[cfg(test)]
pub(crate) mod fixture;
mod header;
mod layer_tar;
mod paths;
mod pax;
mod pipeline;
pub mod previous_layout;
mod sparse;
mod tar;
#[cfg(test)]
mod tests;

pub use chunk_locations::{ChunkLocations, NoLocations};
pub use error::UnpackError;
pub use layer_tar::{LayerTar, write_layer_tar};
pub(crate) use pax::{integer, pax_records};

/// The layer that the stream is expected to be.
#[derive(Debug, Clone, Copy)]
pub struct Expect {
    /// SHA-256 of the tar stream, as the image's config gives it.
    pub diff_id: Digest,
}

/// The result of unpacking a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnpackedLayer {
    /// Whether the layer is new to the store.
    pub published: Published,
    /// Length of the tar stream.
    pub tar_size: u64,
    /// Bytes of content that were not stored again, because the store or an earlier file of this layer had them.
    pub deduplicated: u64,
}

/// A block of the stream between two threads.
const BLOCK: usize = 256 << 10;
/// Blocks queued between the two threads.
const BLOCKS: usize = 8;

/// Digest and length of the whole stream.
struct StreamEnd {
    digest: Digest,
    size: u64,
}

/// Hashes what `reader` yields and passes it on in blocks. `None` if the stream broke off or was stopped.
fn digest_stream(
    mut reader: impl Read,
    blocks: &SyncSender<io::Result<Vec<u8>>>,
    stop: &CancellationToken,
) -> Option<StreamEnd> {
    let (mut hasher, mut size) = (Sha256::new(), 0);
    loop {
        if stop.is_cancelled() {
            let _ = blocks.send(Err(io::ErrorKind::ConnectionAborted.into()));
            return None;
        }
        let mut block = vec![0; BLOCK];
        let read = match reader.read(&mut block) {
            Ok(0) => return Some(StreamEnd { digest: hasher.finish(), size }),
            Ok(read) => read,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => {
                let _ = blocks.send(Err(e));
                return None;
            }
        };
        block.truncate(read);
        hasher.update(&block);
        size += read as u64;
        if blocks.send(Ok(block)).is_err() {
            return None;
        }
    }
}

/// Presents the blocks as a reader.
struct Blocks {
    receiver: Receiver<io::Result<Vec<u8>>>,
    block: Vec<u8>,
    at: usize,
}

impl Read for Blocks {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.at == self.block.len() {
            match self.receiver.recv() {
                Ok(block) => (self.block, self.at) = (block?, 0),
                Err(_) => return Ok(0),
            }
        }
        let n = out.len().min(self.block.len() - self.at);
        out[..n].copy_from_slice(&self.block[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

/// What unpacking produced besides the pack.
struct Unpacked {
    tree: store::layer::LayerTree,
    pieces: content::Pieces<'static>,
    recipe: DigestedFile,
    /// The permit for a large layer's memory, held until the layer is published.
    _place: Option<bounds::LargeLayerPermit>,
}

/// Unpacks the uncompressed tar stream `reader`, and publishes it if it is the expected one. Blocks; uses several threads.
pub fn unpack_layer(
    publisher: &Publisher,
    locations: &dyn ChunkLocations,
    reader: impl Read + Send,
    expect: &Expect,
) -> Result<UnpackedLayer, UnpackError> {
    unpack_verified(publisher, locations, reader, expect, &CancellationToken::new(), &|| {})
}

/// Like [`unpack_layer`], but ends when `stop` is cancelled because nobody wants the layer any more. Calls `verified` once the stream is
/// known to be the expected one, before the layer is published.
pub fn unpack_verified(
    publisher: &Publisher,
    locations: &dyn ChunkLocations,
    reader: impl Read + Send,
    expect: &Expect,
    stop: &CancellationToken,
    verified: &dyn Fn(),
) -> Result<UnpackedLayer, UnpackError> {
    let staging = publisher.stage()?.until({
        let stop = stop.clone();
        move || stop.is_cancelled()
    });
    let pack = pipeline::Pipeline::pack(&staging.pack())?;
    let recipe = DigestedFile::create(&staging.recipe())?;
    let (unpacked, packed, end) = std::thread::scope(|scope| {
        let (blocks, receiver) = sync_channel(BLOCKS);
        let digest = scope.spawn(move || digest_stream(reader, &blocks, stop));
        let (pipeline, packing) = pipeline::Pipeline::start(scope, pack);
        let known = content::Known::new(locations, publisher.store().layout());
        let blocks = Blocks { receiver, block: Vec::new(), at: 0 };
        let unpacked = unpack(blocks, content::Pieces::new(pipeline, known), recipe, stop);
        let packed = packing.join().unwrap_or_else(|_| Err(store::Error::corrupt("a pack", "its writer crashed")));
        (unpacked, packed, digest.join().unwrap_or(None))
    });
    // A full disk fails the packing thread first. The errors of the other threads are only a consequence, so its error is reported.
    let packed = packed?;
    crash_point(CrashPoint::PackWritten);
    let unpacked = unpacked?;
    let end = end.ok_or_else(|| UnpackError::Read(io::ErrorKind::UnexpectedEof.into()))?;
    if end.digest != expect.diff_id {
        return Err(UnpackError::DiffId { expected: expect.diff_id, found: end.digest });
    }
    verified();
    publish(publisher, staging, locations, unpacked, &packed, &end)
}

/// Reads the whole stream into a tree, pieces and a recipe.
fn unpack(
    blocks: Blocks,
    mut pieces: content::Pieces<'_>,
    recipe: DigestedFile,
    stop: &CancellationToken,
) -> Result<Unpacked, UnpackError> {
    let mut tar = tar::TarReader::new(blocks, recipe)?;
    let mut apply = apply::Apply::new(stop);
    while let Some(entry) = tar.next_entry()? {
        apply.entry(&entry, &mut tar, &mut pieces)?;
    }
    pieces.flush()?;
    let (tree, _place) = apply.into_tree();
    Ok(Unpacked { tree, pieces: pieces.detach(), recipe: tar.finish()?, _place })
}

/// Reads the stream to its end and checks that it is the expected one, without unpacking it. Blocks.
pub fn verify_layer(mut reader: impl Read, expect: &Expect) -> Result<(), UnpackError> {
    let mut hasher = Sha256::new();
    let mut block = vec![0; BLOCK];
    loop {
        match reader.read(&mut block) {
            Ok(0) => break,
            Ok(count) => hasher.update(&block[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(UnpackError::Read(error)),
        }
    }
    match hasher.finish() {
        found if found == expect.diff_id => Ok(()),
        found => Err(UnpackError::DiffId { expected: expect.diff_id, found }),
    }
}

fn publish(
    publisher: &Publisher,
    staging: Staging,
    locations: &dyn ChunkLocations,
    unpacked: Unpacked,
    packed: &pipeline::Packed,
    end: &StreamEnd,
) -> Result<UnpackedLayer, UnpackError> {
    let Unpacked { tree, pieces, recipe, _place } = unpacked;
    let chunks = pieces.references(packed);
    let (recipe_len, recipe_digest) = recipe.finish()?;
    let facts = LayerFacts { diff_id: end.digest, tar_size: end.size, recipe_len, recipe_digest };
    let index = tree.finish(&facts, &chunks)?;
    write_sealed(&staging.index(), |out| index.write(out))?;
    drop(index);
    crash_point(CrashPoint::IndexWritten);
    let pack = (!packed.is_empty()).then_some(packed.name);
    // Until the database knows where the new pieces lie, garbage collection must not remove the layer: it would believe them forgotten.
    let _working = staging.working();
    let published = publisher.publish_layer(staging, &end.digest, pack.as_ref())?;
    if published == Published::New {
        remember(locations, &pieces, &chunks);
        crash_point(CrashPoint::PiecesRemembered);
    }
    Ok(UnpackedLayer { published, tar_size: end.size, deduplicated: pieces.deduplicated() })
}

/// Tells the database where this layer's new pieces lie, for the layers that come next.
fn remember(locations: &dyn ChunkLocations, pieces: &content::Pieces<'_>, chunks: &[ChunkRef]) {
    let mut batch = Vec::new();
    for (digest, place) in pieces.new_places() {
        let Some(chunk) = chunks.get(place.chunk as usize) else { continue };
        batch.push((*digest, PieceLocation { chunk: *chunk, start: place.start, len: place.len }));
        if batch.len() == 4096 {
            locations.put(&batch);
            batch.clear();
        }
    }
    locations.put(&batch);
}

/// Piece locations in memory, for tests of the unpacker and of what builds on it.
#[derive(Debug, Default)]
pub struct MemoryLocations(parking_lot::Mutex<HashMap<ContentDigest, PieceLocation>>);

impl ChunkLocations for MemoryLocations {
    fn get(&self, piece: &ContentDigest) -> Option<PieceLocation> {
        self.0.lock().get(piece).copied()
    }
    fn put(&self, pieces: &[(ContentDigest, PieceLocation)]) {
        self.0.lock().extend(pieces.iter().copied());
    }
}
