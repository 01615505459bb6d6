//! Leading a store whose catalogue is damaged, with what is left of it.
//!
//! A leader refuses a damaged catalogue, and an empty one where there are layers: going on would silently make the loss
//! final. A leader that is told to salvage starts from what can be read. It commits that as a whole state, so that no
//! reader needs a damaged file, and leaves a note of what was lost until somebody has made up for it.

use crate::durable::{replace, sync_dir};
use crate::error::Result;
use crate::publisher::{Publisher, lock};
use crate::reserve::with_reserve;

impl Publisher {
    /// Notes what is lost, and commits the salvaged state as a whole one. Does nothing if nothing is lost.
    pub(super) fn declare_lost(&self, lost: &[String]) -> Result<()> {
        if lost.is_empty() {
            return Ok(());
        }
        let path = self.store.layout().salvage_note();
        with_reserve(self.store.layout(), || replace(&path, lost.join("\n").as_bytes()))?;
        sync_dir(&self.store.layout().catalogue())?;
        self.commit_whole().map(drop)
    }

    /// Commits the whole state as one generation, so that readers need none of those before it.
    pub fn commit_whole(&self) -> Result<u64> {
        let mut catalogue = lock(&self.catalogue);
        self.commit_whole_at(&mut catalogue, 0)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::catalogue::Change;
    use crate::catalogue::tests::image;
    use crate::publisher::tests::furnish;
    use crate::publisher::{Candidacy, Candidate, create};
    use crate::reader::Store;

    /// A store with `count` images, each committed by a generation of its own, and no leader.
    fn store_with(count: u8) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        create(dir.path()).unwrap();
        let publisher = Publisher::open(dir.path(), "test").unwrap();
        for n in 0..count {
            let image = furnish(&publisher, &image("r/a", Some(&format!("t{n}")), n));
            publisher.commit(vec![Change::Set(image)]).unwrap();
        }
        publisher.release().unwrap();
        dir
    }

    fn lead(dir: &tempfile::TempDir) -> Result<Box<Publisher>> {
        match Candidate::new(dir.path(), "salvager")?.salvaging().attempt()? {
            Candidacy::Leading(publisher) => Ok(publisher),
            Candidacy::Standby { holder, .. } => panic!("led by {holder}"),
        }
    }

    #[test]
    fn of_a_damaged_catalogue_the_rest_is_salvaged_and_the_loss_is_noted() {
        let dir = store_with(100);
        let store = Store::open(dir.path()).unwrap();
        let numbers = store.generation_numbers().unwrap();
        // The newest whole state, and one change after it.
        let (snapshot, change) = (65, numbers[numbers.len() - 3]);
        fs::write(store.layout().generation(snapshot), b"rubbish").unwrap();
        fs::remove_file(store.layout().generation(change)).unwrap();
        assert!(store.catalogue().is_err());
        assert!(Publisher::open(dir.path(), "normal").is_err(), "nobody goes on in silence");
        let publisher = lead(&dir).unwrap();
        let note = store.salvage_note().unwrap().unwrap();
        assert!(note.contains("generation 65 cannot be read") && note.contains("missing"), "{note}");
        let read = Store::open(dir.path()).unwrap().catalogue().unwrap();
        assert_eq!(read.images().count(), 98);
        assert!(read.generation() > *numbers.last().unwrap());
        publisher.settle_salvage().unwrap();
        assert_eq!(store.salvage_note().unwrap(), None);
    }

    #[test]
    fn a_catalogue_that_is_gone_altogether_is_not_taken_for_a_new_store() {
        let dir = store_with(3);
        let store = Store::open(dir.path()).unwrap();
        for number in store.generation_numbers().unwrap() {
            fs::remove_file(store.layout().generation(number)).unwrap();
        }
        let error = Publisher::open(dir.path(), "normal").unwrap_err().to_string();
        assert!(error.contains("it is empty, but the store has layers"), "{error}");
        let publisher = lead(&dir).unwrap();
        assert!(publisher.catalogue().generation() > 1 << 32);
        assert!(store.salvage_note().unwrap().is_some());
        assert_eq!(Store::open(dir.path()).unwrap().catalogue().unwrap().images().count(), 0);
    }
}
