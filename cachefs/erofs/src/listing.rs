//! The entries of one directory, and the blocks that they take.

use crate::format::{self, BLOCK, ENTRY_LEN};
use crate::tree::Node;

/// Entries of a directory with `.` and `..`, in byte order.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    names: Vec<u8>,
    /// End of the name, and what it names.
    pub(crate) entries: Vec<(u32, Named)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Named {
    This,
    Parent,
    Child(Node),
}

impl Listing {
    /// What it takes in memory, bytes.
    pub(crate) fn size(&self) -> usize {
        self.names.capacity() + self.entries.capacity() * size_of::<(u32, Named)>()
    }

    pub(crate) fn push(&mut self, name: &[u8], named: Named) {
        self.names.extend_from_slice(name);
        self.entries.push((self.names.len() as u32, named));
    }

    pub(crate) fn name(&self, position: usize) -> &[u8] {
        let start = position.checked_sub(1).map_or(0, |before| self.entries[before].0);
        &self.names[start as usize..self.entries[position].0 as usize]
    }

    /// The number of entries in each block, and the length of them all.
    pub(crate) fn blocks(&self) -> (Vec<usize>, u64) {
        let (mut blocks, mut count, mut used) = (Vec::new(), 0, 0);
        for position in 0..self.entries.len() {
            let len = ENTRY_LEN + self.name(position).len();
            if used + len > BLOCK as usize {
                blocks.push(count);
                (count, used) = (0, 0);
            }
            count += 1;
            used += len;
        }
        let len = blocks.len() as u64 * BLOCK + used as u64;
        blocks.push(count);
        (blocks, len)
    }

    /// One block of entries.
    pub(crate) fn encode(&self, targets: &[(u64, u8)], first: usize, count: usize) -> Vec<u8> {
        let (mut block, mut names) = (Vec::with_capacity(BLOCK as usize), Vec::new());
        for (position, (nid, file_type)) in targets.iter().enumerate().skip(first).take(count) {
            block.extend_from_slice(&format::entry(*nid, count * ENTRY_LEN + names.len(), *file_type));
            names.extend_from_slice(self.name(position));
        }
        block.append(&mut names);
        block
    }
}
