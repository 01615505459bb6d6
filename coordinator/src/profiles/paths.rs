//! The names of the files that a startup pack holds or names.

use std::collections::{HashMap, HashSet};

use store::image::ImageRecord;
use store::layer::InodeIndex;
use store::profile::{PieceKey, StartupTable};
use store::reader::Store;

/// One file of which a startup pack holds or names pieces.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedFile {
    /// Position of its layer in the chain, base first.
    pub layer: u16,
    /// One of its names below the root, without a leading slash.
    pub path: Vec<u8>,
    /// How many of its pieces starts need.
    pub pieces: u64,
    /// Bytes that they need of those pieces.
    pub bytes: u64,
    /// The largest weight of those pieces, in 255ths.
    pub weight: u8,
}

/// The first `limit` files of a startup pack, in the order of their first pieces, and the number of all its files. Blocks on the shared
/// disk.
pub fn files(
    store: &Store,
    image: &ImageRecord,
    table: &StartupTable,
    limit: usize,
) -> Result<(Vec<NamedFile>, usize), store::Error> {
    let mut places: HashMap<(u16, InodeIndex), usize> = HashMap::new();
    for PieceKey { layer, inode, .. } in table.pieces.iter().map(|piece| piece.key) {
        let next = places.len();
        places.entry((layer, inode)).or_insert(next);
    }
    let total = places.len();
    places.retain(|_, place| *place < limit);
    let empty = NamedFile { layer: 0, path: Vec::new(), pieces: 0, bytes: 0, weight: 0 };
    let mut files = vec![empty; places.len()];
    for (position, layer) in (0..).zip(&image.layers) {
        let wanted: HashSet<InodeIndex> =
            places.keys().filter(|(layer, _)| *layer == position).map(|(_, inode)| *inode).collect();
        if wanted.is_empty() {
            continue;
        }
        let index = store.index(&layer.diff_id)?;
        for piece in table.pieces.iter().filter(|piece| piece.key.layer == position) {
            let Some(place) = places.get(&(position, piece.key.inode)) else { continue };
            let file = &mut files[*place];
            file.layer = position;
            file.pieces += 1;
            let len = index.piece(&index.inode(piece.key.inode)?, piece.key.piece)?.len;
            file.bytes += u64::from(piece.blocks.content_len(len));
            file.weight = file.weight.max(piece.weight);
        }
        for (inode, path) in index.paths(wanted)? {
            files[places[&(position, inode)]].path = path;
        }
    }
    Ok((files, total))
}
