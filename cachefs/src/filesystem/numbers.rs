//! The node numbers that the kernel and `stat` see: numbers that a 32-bit program can take, as long as there are enough
//! of them.
//!
//! A [`Node`] has its slot in the high half, so it is above 2^32 in every layer, and `stat` and `getdents` of 32-bit
//! programs without large-file support fail on such a number. So nodes are shown under other numbers, which are given
//! to blocks of [`BLOCK`] nodes in the order in which the blocks are first shown. A node's number is small as long as
//! there are blocks below 2^31, that is for two billion files. Nodes beyond that are shown under their own number,
//! which is above 2^32. A number is given once in a mount's life, like a slot.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::RwLock;

use super::kernel_state::{KernelState, Record};
use super::node::Node;

/// How many nodes are numbered together: a power of two. Layers have some thousands of inodes, so few blocks are half
/// empty.
const BLOCK: u64 = 1 << 12;
/// Small numbers are below this, so that they are positive even in programs that take them for signed.
const END: u64 = 1 << 31;

#[derive(Debug)]
struct Blocks {
    small: HashMap<u64, u32>,
    blocks: Vec<u64>,
}

impl Blocks {
    /// Gives a block the next number.
    fn push(&mut self, block: u64) -> u32 {
        let small = self.blocks.len() as u32;
        self.blocks.push(block);
        self.small.insert(block, small);
        small
    }
}

/// The numbers that were given.
#[derive(Debug)]
pub struct Numbers {
    /// Guards the table, which grows with every [`BLOCK`] nodes that are shown for the first time. Taken before the records' lock.
    blocks: RwLock<Blocks>,
    most: usize,
    state: Arc<KernelState>,
}

impl Default for Numbers {
    fn default() -> Numbers {
        Numbers::with((END / BLOCK) as usize)
    }
}

impl Numbers {
    fn with(most: usize) -> Numbers {
        // The first block is the root's, which is 1 in FUSE.
        let blocks = Blocks { small: HashMap::from([(0, 0)]), blocks: vec![0] };
        Numbers { blocks: RwLock::new(blocks), most, state: Arc::default() }
    }

    /// The numbers that were given in this state, and those that follow.
    pub(super) fn resume(state: Arc<KernelState>) -> Numbers {
        let mut numbers = Numbers::default();
        for record in &state.earlier {
            if let Record::Block(block) = record {
                numbers.blocks.get_mut().push(*block);
            }
        }
        Numbers { state, ..numbers }
    }

    /// The number under which a node is shown.
    pub fn of(&self, node: Node) -> u64 {
        let (block, within) = (node.number() / BLOCK, node.number() % BLOCK);
        let known = self.blocks.read().small.get(&block).copied();
        let small = known.or_else(|| self.give(block));
        small.map_or(node.number(), |small| u64::from(small) * BLOCK + within)
    }

    fn give(&self, block: u64) -> Option<u32> {
        let mut guard = self.blocks.write();
        let table = &mut *guard;
        if let Some(small) = table.small.get(&block) {
            return Some(*small);
        }
        // The catalogue tree's own numbers are small, and would be mistaken for given ones if they were shown
        // unchanged.
        let is_control = block < END / BLOCK;
        if table.blocks.len() >= self.most && !is_control {
            return None;
        }
        self.state.record(&Record::Block(block));
        Some(table.push(block))
    }

    /// The node that a number was given to. For a number that was never given: a node that does not exist.
    pub fn node(&self, number: u64) -> Node {
        let (small, within) = (number / BLOCK, number % BLOCK);
        let block = self.blocks.read().blocks.get(small as usize).copied();
        Node::from_number(block.map_or(number, |block| block * BLOCK + within))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::filesystem::node::{CATALOGUE, Slot};

    #[test]
    fn numbers_are_small_different_and_lead_back() {
        let numbers = Numbers::default();
        assert_eq!((numbers.of(Node::ROOT), numbers.node(1)), (1, Node::ROOT));
        let mut seen = HashSet::new();
        for slot in [CATALOGUE, Slot(1), Slot(7), Slot(1_000_000)] {
            for position in [0, 1, 4094, 4095, 4096, 100_000, u32::MAX - 1] {
                let node = Node::new(slot, position);
                let number = numbers.of(node);
                assert!(number < END && seen.insert(number), "{node:?}: {number}");
                assert_eq!((numbers.node(number), numbers.of(node)), (node, number));
            }
        }
    }

    #[test]
    fn when_there_are_no_more_numbers_nodes_are_shown_as_they_are() {
        let numbers = Numbers::with(3);
        let nodes: Vec<Node> = (0..10).flat_map(|slot| [5, 5000].map(|at| Node::new(Slot(slot), at))).collect();
        let given: Vec<u64> = nodes.iter().map(|node| numbers.of(*node)).collect();
        assert_eq!(given.iter().collect::<HashSet<_>>().len(), nodes.len());
        assert!(given.iter().filter(|number| **number >= 1 << 32).count() >= nodes.len() - 4, "{given:?}");
        assert!(nodes.iter().zip(&given).all(|(node, number)| numbers.node(*number) == *node));
    }
}
