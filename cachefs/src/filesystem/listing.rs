//! Walking several sorted directories as one.
//!
//! A listing can stop anywhere and go on in a later call that knows nothing but an offset. The offset names the last
//! entry that was given (directory and position); going on means finding the first greater name in every directory, so
//! nothing is kept between calls and no entry is given twice or left out.

use store::layer::{DirectoryEntry, Inode, LayerIndex};

use super::node::FIRST_OFFSET;
use crate::source::failure::{Result, stored};

/// The offset after entry `position` of directory number `directory`, one of `count`: small, for the sake of 32-bit programs.
pub(super) fn offset_after(directory: usize, position: u32, count: usize) -> u64 {
    FIRST_OFFSET + u64::from(position) * count as u64 + directory as u64
}

/// Directories that are read side by side, in byte order of their names.
pub(super) struct Heads<'a> {
    directories: Vec<Head<'a>>,
    /// The entries that were given last: each has left its directory's head.
    entries: Vec<(usize, DirectoryEntry<'a>)>,
}

/// A directory as far as it was read.
struct Head<'a> {
    index: &'a LayerIndex,
    directory: Inode,
    /// The position of `entry`.
    position: u32,
    entry: Option<DirectoryEntry<'a>>,
}

/// Entries of one name, in the order of their directories.
pub(super) struct Group<'g, 'a> {
    pub(super) entries: &'g [(usize, DirectoryEntry<'a>)],
    /// The first one's position in its directory.
    pub(super) position: u32,
}

impl<'a> Head<'a> {
    fn read(index: &'a LayerIndex, directory: Inode, position: u32) -> Result<Head<'a>> {
        Ok(Head { index, directory, position, entry: stored(index.entry(&directory, position))? })
    }
}

impl<'a> Heads<'a> {
    /// Starts after the entry that `offset` names.
    pub(super) fn new(directories: Vec<(&'a LayerIndex, Inode)>, offset: u64) -> Result<Heads<'a>> {
        let mut positions = vec![0; directories.len()];
        if let Some(last) = offset.checked_sub(FIRST_OFFSET) {
            let count = directories.len().max(1) as u64;
            let (at, position) = ((last % count) as usize, u32::try_from(last / count).unwrap_or(u32::MAX));
            let given = match directories.get(at) {
                Some((index, directory)) => stored(index.entry(directory, position))?,
                None => None,
            };
            for (start, (index, directory)) in positions.iter_mut().zip(&directories) {
                *start = match &given {
                    Some(entry) => first_after(index, directory, &entry.name)?,
                    None => directory.entry_count(),
                };
            }
        }
        let heads = directories.into_iter().zip(positions);
        let heads = heads.map(|((index, directory), position)| Head::read(index, directory, position));
        Ok(Heads { directories: heads.collect::<Result<_>>()?, entries: Vec::new() })
    }

    /// The next name's entries.
    pub(super) fn next(&mut self) -> Result<Option<Group<'_, 'a>>> {
        for (n, _) in self.entries.drain(..) {
            let head = &mut self.directories[n];
            *head = Head::read(head.index, head.directory, head.position + 1)?;
        }
        let heads = self.directories.iter().enumerate();
        let names = heads.filter_map(|(n, head)| Some((&head.entry.as_ref()?.name, n)));
        // Of equal names that of the first directory.
        let Some((_, first)) = names.min() else { return Ok(None) };
        for (n, head) in self.directories.iter_mut().enumerate().skip(first) {
            let is_equal =
                |entry: &mut DirectoryEntry<'_>| self.entries.first().is_none_or(|(_, first)| first.name == entry.name);
            if let Some(entry) = head.entry.take_if(is_equal) {
                self.entries.push((n, entry));
            }
        }
        Ok(Some(Group { entries: &self.entries, position: self.directories[first].position }))
    }
}

/// The position of the first entry whose name is greater than `name`.
fn first_after(index: &LayerIndex, directory: &Inode, name: &[u8]) -> Result<u32> {
    let (mut low, mut high) = (0, directory.entry_count());
    while low < high {
        let middle = low + (high - low) / 2;
        match stored(index.entry(directory, middle))? {
            Some(entry) if *entry.name <= *name => low = middle + 1,
            _ => high = middle,
        }
    }
    Ok(low)
}
