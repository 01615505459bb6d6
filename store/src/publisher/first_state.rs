//! The catalogue that a new leader starts from.

use std::fs;

use crate::catalogue::Catalogue;
use crate::error::{Error, Result};
use crate::reader::{Salvaged, Store};

/// What a new leader does about a damaged catalogue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OnDamage {
    /// It gives up, with an error.
    Refuse,
    /// It starts from what is left.
    Salvage,
}

/// The state that a new leader of `epoch` starts from, and one sentence for each thing that is lost.
pub(super) fn first_state(store: &Store, epoch: u64, on_damage: OnDamage) -> Result<(Catalogue, Vec<String>)> {
    let error = match store.catalogue() {
        Ok(catalogue) if catalogue.generation() > 0 || !has_layers(store) => return Ok((catalogue, Vec::new())),
        Ok(_) => Error::corrupt("the catalogue", "it is empty, but the store has layers"),
        Err(error) => error,
    };
    if on_damage == OnDamage::Refuse {
        return Err(error);
    }
    let Salvaged { mut catalogue, lost } = store.salvage()?;
    if catalogue.generation() == 0 {
        // Hosts look for a number above the one that they have seen, which nobody knows any more: start far above.
        catalogue.apply_over_gap(Catalogue::default().whole(epoch << 32, epoch));
    }
    Ok((catalogue, lost))
}

fn has_layers(store: &Store) -> bool {
    let fans = fs::read_dir(store.layout().root().join("layers")).into_iter().flatten().flatten();
    fans.into_iter().any(|fan| fs::read_dir(fan.path()).is_ok_and(|mut layers| layers.next().is_some()))
}
