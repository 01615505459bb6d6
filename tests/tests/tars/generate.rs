//! Hundreds of odd archives, the same ones on every run. Each kind of oddity has its file below.
//!
//! If a reader may lose its position, the last entry `after` shows it: it is where the bytes before it end.

mod cuts;
mod extended;
mod fields;
mod files;

use crate::blocks::{Block, end};
use crate::random::Random;

/// An archive and a description of what is odd about it.
#[derive(Debug, Clone)]
pub(crate) struct Odd {
    pub(crate) what: String,
    pub(crate) tar: Vec<u8>,
}

/// A kind of oddity: its name, the number of archives, and the function that makes one.
pub(crate) type Oddity = (&'static str, u64, fn(&mut Random) -> Odd);

/// All kinds of oddities.
pub(crate) const KINDS: [Oddity; 6] = [
    ("fields", 150, fields::odd),
    ("extended", 180, extended::odd),
    ("sparse", 80, extended::sparse),
    ("attributes", 60, extended::attributes),
    ("files", 330, files::odd),
    ("cuts", 100, cuts::odd),
];

/// The archives of a kind. `CACHEFS_TARS_TIMES` multiplies their number for a longer search.
pub(crate) fn all((name, count, make): Oddity) -> impl Iterator<Item = Odd> {
    let times = std::env::var("CACHEFS_TARS_TIMES").ok().and_then(|times| times.parse::<u64>().ok()).unwrap_or(1);
    let seed = name.bytes().fold(0, |seed: u64, byte| seed.wrapping_mul(31).wrapping_add(byte.into()));
    (0..count * times).map(move |number| {
        let odd = make(&mut Random::new(seed.wrapping_mul(100_000).wrapping_add(number)));
        Odd { what: format!("{name} {number}: {}", odd.what), ..odd }
    })
}

/// The entries, followed by the entry `after` and the end of the archive.
fn closed(mut tar: Vec<u8>) -> Vec<u8> {
    tar.extend(Block::new(b'0', "after").with("after\n"));
    tar.extend(end());
    tar
}
