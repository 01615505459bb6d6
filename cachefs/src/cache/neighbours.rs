//! Small files that come in the same chunk: fetched for one of them, it fills the cache for all.
//!
//! An index says in which chunk a file lies, not which files lie in a chunk. But a chunk gathers files that follow each
//! other in the layer, so the others are found by looking at the next inode numbers in both directions.

use store::chunk::ChunkRef;
use store::layer::{Inode, InodeIndex, Source};

use super::Content;

/// Small files that are written into the cache because their chunk was fetched for another one.
const NEIGHBOURS: usize = 512;
/// How far around a file its chunk's other files are looked for, in inode numbers.
const NEIGHBOURHOOD: u32 = 2048;
/// Files of other chunks that are passed on the way.
const STRANGERS: usize = 16;

/// The small files around `content` whose only piece lies in `chunk`, with its start in it.
pub(super) fn neighbours(content: &Content, chunk: &ChunkRef) -> Vec<(Inode, u32)> {
    let around = content.number.0;
    let after = around + 1..around.saturating_add(NEIGHBOURHOOD).min(content.index.inode_count());
    let before = (around.saturating_sub(NEIGHBOURHOOD)..around).rev();
    let mut found = Vec::new();
    collect_neighbours(content, chunk, after, &mut found);
    collect_neighbours(content, chunk, before, &mut found);
    found
}

fn collect_neighbours(
    content: &Content,
    chunk: &ChunkRef,
    numbers: impl Iterator<Item = u32>,
    found: &mut Vec<(Inode, u32)>,
) {
    let mut strangers = 0;
    for number in numbers {
        let Ok(inode) = content.index.inode(InodeIndex(number)) else { return };
        if inode.piece_count() != 1 {
            continue;
        }
        match content.index.piece(&inode, 0).map(|piece| piece.source) {
            Ok(Source::Chunk { chunk: other, start, .. }) if other.digest == chunk.digest => found.push((inode, start)),
            _ => strangers += 1,
        }
        if strangers > STRANGERS || found.len() >= NEIGHBOURS {
            return;
        }
    }
}
