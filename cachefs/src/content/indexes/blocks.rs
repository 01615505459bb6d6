//! Blocks of indexes in memory: as many as fit into [`MEMORY`], whatever the number and the size of the indexes.

use std::num::NonZeroUsize;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

/// Length of a block, bytes: small enough that a lone look-up reads little, and that its digest is checked in 15
/// microseconds.
pub(super) const BLOCK: usize = 64 << 10;
/// The most that all blocks take, bytes.
pub(super) const MEMORY: usize = 32 << 20;
/// Locks among which the blocks are divided: enough that FUSE threads rarely contend.
const SHARDS: usize = 8;
const PER_SHARD: NonZeroUsize = NonZeroUsize::new(MEMORY / BLOCK / SHARDS).expect("not zero");

/// A copy's serial number, and the block's number in it.
pub(super) type Key = (u64, u32);

/// A block's bytes, verified.
pub(super) type Block = Arc<Vec<u8>>;

/// The blocks in memory; the least recently used ones are dropped first.
pub(super) struct Blocks {
    /// Each guards a part of them; never held during I/O.
    shards: [Mutex<LruCache<Key, Block>>; SHARDS],
}

impl Default for Blocks {
    fn default() -> Blocks {
        Blocks { shards: std::array::from_fn(|_| Mutex::new(LruCache::new(PER_SHARD))) }
    }
}

impl Blocks {
    fn shard(&self, key: &Key) -> &Mutex<LruCache<Key, Block>> {
        &self.shards[(key.0 as usize ^ key.1 as usize) % SHARDS]
    }

    pub(super) fn get(&self, key: &Key) -> Option<Block> {
        self.shard(key).lock().get(key).cloned()
    }

    pub(super) fn put(&self, key: Key, block: Block) {
        let replaced = self.shard(&key).lock().push(key, block);
        drop(replaced);
    }

    /// Forgets all of them.
    #[cfg(test)]
    pub(super) fn clear(&self) {
        self.shards.iter().for_each(|shard| shard.lock().clear());
    }

    /// How much memory the blocks take now, bytes.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        let sum =
            |shard: &Mutex<LruCache<Key, Block>>| shard.lock().iter().map(|(_, block)| block.len()).sum::<usize>();
        self.shards.iter().map(sum).sum()
    }
}
