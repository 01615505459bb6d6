//! Writes Docker's `tar-split.json.gz` from a layer's recipe: with it dockerd can give back a layer's tar stream byte
//! for byte.
//!
//! The file is a gzip of JSON lines, each an entry with its `position`. Type 2 is a segment: `payload` holds bytes of
//! the stream in base64. Type 1 is a file: dockerd opens `name` (or `name_raw`, base64, where the name is not UTF-8) in
//! the layer's tree, puts the whole file into the stream and compares its CRC-64 (ISO, big-endian) with `payload`.
//! dockerd refuses a second file entry of one name.
//!
//! A recipe can say more than that (parts of sparse files, content that a later entry replaced, names that lead
//! elsewhere); there the bytes themselves become segments.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::collections::HashSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde::Serialize;
use store::layer::{InodeIndex, LayerIndex, Source};
use store::reader::Store;
use store::recipe::Segment;

use super::files::FileError;

/// Why a tar-split cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum TarSplitError {
    /// The layer cannot be read.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The file cannot be written.
    #[error(transparent)]
    File(#[from] FileError),
}

type Result<T, E = TarSplitError> = std::result::Result<T, E>;

/// One line of the file.
#[derive(Serialize)]
struct Line {
    #[serde(rename = "type")]
    kind: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name_raw: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    payload: String,
    position: u64,
}

const FILE: u8 = 1;
const SEGMENT: u8 = 2;

/// Writes lines into `W`, numbering them.
struct Writer<W: Write> {
    out: W,
    position: u64,
}

impl<W: Write> Writer<W> {
    fn line(&mut self, line: Line) -> std::io::Result<()> {
        serde_json::to_writer(&mut self.out, &Line { position: self.position, ..line })?;
        self.position += 1;
        self.out.write_all(b"\n")
    }

    fn segment(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let payload = STANDARD.encode(bytes);
        self.line(Line { kind: SEGMENT, name: None, name_raw: None, size: None, payload, position: 0 })
    }

    fn file(&mut self, name: &[u8], size: u64, crc: u64) -> std::io::Result<()> {
        let text = std::str::from_utf8(name).ok().map(str::to_owned);
        let name_raw = text.is_none().then(|| STANDARD.encode(name));
        let payload = STANDARD.encode(crc.to_be_bytes());
        self.line(Line { kind: FILE, name: text, name_raw, size: Some(size), payload, position: 0 })
    }
}

/// Writes the tar-split of a layer to a new file.
pub(super) fn create(store: &Store, index: &LayerIndex, path: &Path) -> Result<()> {
    let failed = |e| FileError::io("write", path, e);
    let file = BufWriter::with_capacity(256 << 10, File::create(path).map_err(failed)?);
    let mut gzip = GzEncoder::new(file, Compression::default());
    write(store, index, &mut gzip)?;
    let file = gzip.finish().map_err(failed)?;
    file.into_inner().map_err(|e| failed(e.into_error()))?;
    Ok(())
}

/// Writes the lines of one layer, uncompressed, into `out`.
fn write(store: &Store, index: &LayerIndex, out: impl Write) -> Result<()> {
    let failed = |e| FileError::io("write", Path::new("tar-split.json.gz"), e);
    let mut writer = Writer { out, position: 0 };
    let mut seen = HashSet::new();
    for segment in store.recipe(index)? {
        match segment? {
            Segment::Literal(bytes) => writer.segment(&bytes).map_err(failed)?,
            Segment::Content { len: 0, .. } => {}
            Segment::Content { inode, offset, len, crc, name } => {
                if is_whole_file(index, inode, (offset, len), &name)? && seen.insert(cleaned(&name)) {
                    writer.file(&name, len, crc).map_err(failed)?;
                } else {
                    content(store, index, inode, (offset, len), |bytes| Ok(writer.segment(bytes).map_err(failed)?))?;
                }
            }
        }
    }
    Ok(writer.out.flush().map_err(failed)?)
}

/// The name as dockerd compares names: without empty and `.` parts.
fn cleaned(name: &[u8]) -> Vec<u8> {
    let parts: Vec<_> = name.split(|b| *b == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    parts.join(&b'/')
}

/// Whether dockerd, opening `name` in the layer's tree, reads exactly this range.
fn is_whole_file(index: &LayerIndex, inode: InodeIndex, (offset, len): (u64, u64), name: &[u8]) -> Result<bool> {
    let is_plain = name.split(|b| *b == b'/').all(|part| part != b"..") && !name.contains(&0);
    let file = index.inode(inode)?;
    Ok(is_plain && offset == 0 && len == file.size && index.resolve(name)? == Some(inode))
}

/// Hands the bytes of a range of a file to `give`, piece by piece, verified.
fn content(
    store: &Store,
    index: &LayerIndex,
    inode: InodeIndex,
    (offset, len): (u64, u64),
    mut give: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let damaged = |why| store::Error::corrupt(format!("layer {}", index.diff_id()), why);
    let file = index.inode(inode)?;
    let piece_size = u64::from(index.header().piece_size);
    let end = offset.checked_add(len).filter(|end| *end <= file.size);
    let end = end.ok_or_else(|| damaged("its tar recipe refers to bytes past a file's end"))?;
    let mut at = offset;
    while at < end {
        let number = u32::try_from(at / piece_size).map_err(|_| damaged("a file is too long"))?;
        let piece = index.piece(&file, number)?;
        let from = (at - piece.offset) as usize;
        let to = (end - piece.offset).min(piece.len.into()) as usize;
        match piece.source {
            Source::Hole => give(&vec![0; to - from])?,
            Source::Chunk { chunk, start, .. } => {
                let chunk = store.read_chunk(&chunk)?;
                let bytes = chunk.piece(start, piece.len).ok_or_else(|| damaged("a piece lies outside its chunk"))?;
                if store::ContentDigest::of(bytes) != piece.digest {
                    return Err(damaged("a piece does not match its digest").into());
                }
                give(&bytes[from..to])?;
            }
        }
        at = piece.offset + to as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
