//! Salvage: the state that can still be read of a damaged catalogue.
//!
//! Generations are replayed from the oldest file on, skipping those that are lost. A later whole state makes up for all
//! before it; what only a lost file said is not known. Normal readers never do this: they refuse a damaged catalogue,
//! because half a list looks like a whole one.

use std::fs;
use std::io;

use crate::catalogue::{Catalogue, Generation};
use crate::error::{Error, Result};
use crate::reader::Store;

/// A state rebuilt from the files that are left.
#[derive(Debug)]
pub struct Salvaged {
    /// The state; its generation is the newest number that any file has, readable or not.
    pub catalogue: Catalogue,
    /// One sentence for each thing that is lost.
    pub lost: Vec<String>,
}

impl Store {
    /// The numbers of all generations that have a file, ascending.
    pub fn generation_numbers(&self) -> Result<Vec<u64>> {
        let mut numbers = self.generations()?;
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// One generation's file, verified.
    pub fn generation_file(&self, number: u64) -> Result<Generation> {
        self.read_generation(number)
    }

    /// Rebuilds the newest state that the remaining files give.
    pub fn salvage(&self) -> Result<Salvaged> {
        let numbers = self.generation_numbers()?;
        let mut catalogue = Catalogue::default();
        let mut lost = Vec::new();
        let mut whole = false;
        for (position, number) in numbers.iter().enumerate() {
            let before = position.checked_sub(1).and_then(|before| numbers.get(before));
            if let Some(before) = before.filter(|before| *before + 1 != *number) {
                lost.push(format!("the generations between {before} and {number} are missing"));
            }
            match self.read_generation(*number) {
                Ok(generation) => {
                    whole |= generation.tags.is_some();
                    catalogue.apply_over_gap(generation);
                }
                Err(error) => lost.push(format!("generation {number} cannot be read: {error}")),
            }
        }
        if !whole {
            lost.push("no generation with a whole state can be read".to_owned());
        }
        if let Some(newest) = numbers.last().filter(|newest| **newest != catalogue.generation()) {
            let state = catalogue.whole(*newest, catalogue.epoch());
            catalogue.apply_over_gap(state);
        }
        Ok(Salvaged { catalogue, lost })
    }

    /// What the last salvage could not read; `None` if there was no loss, or if it was settled since.
    pub fn salvage_note(&self) -> Result<Option<String>> {
        let path = self.layout().salvage_note();
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", &path, error)),
        }
    }
}
