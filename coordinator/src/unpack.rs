//! A layer's tar stream in, a published layer out; and the way back, byte for byte.
//!
//! ```text
//! reader ─> digest thread (SHA-256 of the stream) ─> this thread (tar, tree, recipe, pieces)
//!                                                         │ raw chunks, a few at a time
//!                                                         v
//!                                   compressing threads ─> packing thread (the pack, in order)
//! ```
//!
//! - `tar`: the stream as entries; every byte that is not a file's content goes into the recipe. `header`: a header's fields and dialects.
//!   `pax`: extended headers. `sparse`: sparse files. `paths`: names made safe.
//! - `apply`: entries onto a [`store::layer::LayerTree`], as Docker's overlay2 driver would extract them. `attributes`: what the kernel
//!   would make of theirs, `acl` of their access lists.
//! - `content`: a file's bytes as pieces, deduplicated by digest. `pipeline`: chunks on their way into the pack.
//! - `bounds`: how much one layer may ask for.
//! - `layer_tar`: the tar stream from the store, block by block. `tar_out`: the same, written out. [`former`]: unpacking a layer once more exactly as before.
//!
//! Invariants: nothing is published before the stream has ended, its digest is the diffID and everything reads back; memory is
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
mod content;
#[cfg(test)]
pub(crate) mod fixture;
pub mod former;
mod header;
mod layer_tar;
mod paths;
mod pax;
mod pipeline;
mod sparse;
mod tar;
mod tar_out;
#[cfg(test)]
mod tests;

pub use layer_tar::LayerTar;
pub(crate) use pax::{integer, pax_records};
pub use tar_out::write_layer_tar;

/// Where the pieces lie that the store already has, by digest. A cache: losing it costs space, never correctness.
pub trait ChunkLocations: Send + Sync {
    /// Where a piece with this digest lies.
    fn get(&self, piece: &ContentDigest) -> Option<PieceLocation>;
    /// Remembers where pieces of a published layer lie.
    fn put(&self, pieces: &[(ContentDigest, PieceLocation)]);
}

/// Remembers nothing: every layer stores all of its own content.
#[derive(Debug, Default)]
pub struct NoLocations;

impl ChunkLocations for NoLocations {
    fn get(&self, _: &ContentDigest) -> Option<PieceLocation> {
        None
    }
    fn put(&self, _: &[(ContentDigest, PieceLocation)]) {}
}

/// What the stream must turn out to be.
#[derive(Debug, Clone, Copy)]
pub struct Expect {
    /// SHA-256 of the tar stream, as the image's config has it.
    pub diff_id: Digest,
}

/// What came of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnpackedLayer {
    /// Whether it is new to the store.
    pub published: Published,
    /// Length of the tar stream.
    pub tar_size: u64,
    /// Bytes of content that the store already had.
    pub deduplicated: u64,
}

/// Why a layer was not published.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The store refused or failed.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The stream broke off; whoever feeds it knows why.
    #[error("its tar stream could not be read: {0}")]
    Read(#[source] io::Error),
    /// Nobody wants it any more.
    #[error("cancelled")]
    Stopped,
    /// The stream is no tar that Docker would accept.
    #[error("its tar is not valid at byte {at}: {why}")]
    Tar {
        /// Where in the stream.
        at: u64,
        /// The rule that it breaks.
        why: String,
    },
    /// One entry breaks a rule.
    #[error("its entry {name:?} {why}")]
    Entry {
        /// The entry's name.
        name: String,
        /// The rule that it breaks.
        why: String,
    },
    /// The stream is another one than the image's config names.
    #[error("its content is {found}, but the image's config says diffID {expected}")]
    DiffId {
        /// What the config says.
        expected: Digest,
        /// What came.
        found: Digest,
    },
}

/// A block of the stream between two threads.
const BLOCK: usize = 256 << 10;
/// Blocks in flight.
const BLOCKS: usize = 8;

/// The stream's end, as the digest thread saw it.
struct StreamEnd {
    digest: Digest,
    size: u64,
}

/// Hashes `reader` and hands it on in blocks.
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

/// The blocks as a reader again.
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

/// What unpacking left in the staging directory, besides the pack.
struct Unpacked {
    tree: store::layer::LayerTree,
    pieces: content::Pieces<'static>,
    recipe: DigestedFile,
    /// The right to so much memory.
    _place: Option<bounds::LargePlace>,
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

/// The same, until `stop` is cancelled because nobody wants the layer any more. `verified` is called when the stream was found to be
/// the expected one, before the layer is published.
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
    // A full disk shows itself in the packing thread first; what the others then see is only a consequence.
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

/// Reads the whole stream.
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

/// Reads the stream to its end to see whether it is the expected one; nothing is unpacked. Blocks.
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
    // Until the database knows where the new pieces lie, no collection may remove the layer and believe them forgotten.
    let _working = staging.working();
    let published = publisher.publish_layer(staging, &end.digest, pack.as_ref())?;
    if published == Published::New {
        remember(locations, &pieces, &chunks);
        crash_point(CrashPoint::PiecesRemembered);
    }
    Ok(UnpackedLayer { published, tar_size: end.size, deduplicated: pieces.deduplicated() })
}

/// Tells the next layers where this one's new pieces lie.
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

/// Names by digest, for tests of the unpacker and of what builds on it.
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
