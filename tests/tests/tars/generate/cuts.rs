//! Archives that end too early, too late, or twice.

use super::{Odd, files};
use crate::blocks::{BLOCK, Block, end, pax};
use crate::random::Random;

pub(super) fn odd(random: &mut Random) -> Odd {
    let mut tar = if random.percent(50) { plain(random) } else { files::odd(random).tar };
    // Removes the end of the archive.
    tar.truncate(tar.len() - 2 * BLOCK);
    let blocks = tar.len() / BLOCK;
    let at = random.below(blocks + 1) * BLOCK;
    let what = match random.below(14) {
        0 => "without an end".to_owned(),
        1 => {
            tar.extend([0; BLOCK]);
            "one zero block at the end".to_owned()
        }
        2 => {
            tar.extend([0; BLOCK + 100]);
            "a zero block and a part of one".to_owned()
        }
        3 => {
            tar.extend([&[0; BLOCK][..], b"garbage"].concat());
            "a zero block and garbage".to_owned()
        }
        4 => {
            tar.extend([&end()[..], b"garbage"].concat());
            "garbage after the end".to_owned()
        }
        5 => {
            tar.extend([end(), Block::new(b'0', "second").with("second")].concat());
            tar.extend(end());
            "a second archive after the end".to_owned()
        }
        6 => {
            tar.extend([1; BLOCK]);
            "a block of ones".to_owned()
        }
        7 | 8 => {
            drop(tar.splice(at..at, [0; BLOCK]));
            tar.extend(end());
            format!("a zero block at {at}")
        }
        9 => {
            drop(tar.splice(at..at, [0; 2 * BLOCK]));
            tar.extend(end());
            format!("two zero blocks at {at}")
        }
        10 | 11 => {
            tar.truncate(at);
            format!("cut at {at}, a block's end")
        }
        _ => {
            let at = random.below(tar.len() + 1);
            tar.truncate(at);
            format!("cut at {at}")
        }
    };
    Odd { what, tar }
}

/// Files, some with extended headers, and two zero blocks at the end.
fn plain(random: &mut Random) -> Vec<u8> {
    let mut tar = Vec::new();
    for name in ["one", "two", "three"] {
        if random.percent(50) {
            tar.extend(pax(b'x', &[(b"path", format!("long-{name}").as_bytes()), (b"mtime", b"5.5")]));
        }
        let kind = random.one(b"0002");
        let content = vec![b'c'; if kind == b'0' { random.below(1200) } else { 0 }];
        tar.extend(Block::new(kind, name).link("target").with(content));
    }
    tar.extend(end());
    tar
}
