//! Entries of all kinds in any order with few names, so that they affect each other: duplicates, replacements, links to
//! everything, whiteouts everywhere, and the root.

use super::Odd;
use crate::blocks::{Block, GID, MODE, MTIME, UID, end, pax};
use crate::random::Random;

const NAMES: &[&[u8]] = &[
    b"a",
    b"b",
    b"c",
    b"l",
    b"a/",
    b"b/",
    b"a/x",
    b"a/y",
    b"b/x",
    b"a/x/z",
    b"c/d/e",
    b"l/x",
    b"l/n/x",
    b"a/l",
    b"a/l/q",
    b"./a",
    b"./b/x",
    b"/a",
    b"/b",
    b"/a/x",
    b"a//y",
    b"a/./y",
    b"b/../a",
    b"x/../../b",
    b"../a",
    b".",
    b"./",
    b"/",
    b"",
    b"..",
    b"/..",
    b"\xff",
    b"a/\xc3\x28",
];
const WHITEOUTS: &[&[u8]] = &[
    b".wh.a",
    b".wh.b",
    b".wh.l",
    b".wh.none",
    b"a/.wh.x",
    b"a/.wh.gone",
    b"l/.wh.x",
    b"/.wh.b",
    b"n/.wh.m",
    b".wh..wh..opq",
    b"a/.wh..wh..opq",
    b"l/.wh..wh..opq",
    b"n/.wh..wh..opq",
    b".wh.",
    b".wh..",
    b".wh...",
    b".wh....",
    b".wh..wh.plnk",
    b".wh..wh.plnk/1.2",
    b".wh..wh.aufs",
    b".wh..wh..opq.x",
    b"a/.wh..wh.orph",
    b".wh.d/x",
    b".wh.d",
    b".wh.a/b",
    b"\xff/.wh.\xff",
];
const TARGETS: &[&[u8]] = &[
    b"a", b"b", b"c", b"/a", b"a/x", b"b/x", b"l", b"../a", b"/", b"missing", b"a/", b"./b", b"../../b", b"l/x", b"",
    b".", b".wh.a", b"b/..", b"a/../b", b"..", b"/a/x", b"none",
];

/// An archive of one to eight entries.
pub(super) fn odd(random: &mut Random) -> Odd {
    let (mut what, mut tar) = (Vec::new(), Vec::new());
    let mut used: Vec<&[u8]> = Vec::new();
    for number in 0..=random.below(8) {
        let name = name(random);
        // The same name twice is refused, and tests little.
        if used.contains(&name) && !random.percent(3) {
            continue;
        }
        used.push(name);
        let (said, bytes) = entry(random, name, number);
        what.push(said);
        tar.extend(bytes);
    }
    tar.extend(end());
    Odd { what: what.join(", "), tar }
}

fn name(random: &mut Random) -> &'static [u8] {
    // The plain names come first in the list.
    match random.below(10) {
        0..5 => random.one(&NAMES[..15]),
        5..7 => random.one(NAMES),
        _ => random.one(WHITEOUTS),
    }
}

/// An entry whose attributes identify it.
fn entry(random: &mut Random, name: &[u8], number: usize) -> (String, Vec<u8>) {
    let is_mark = name.split(|byte| *byte == b'/').next_back().is_some_and(|last| last.starts_with(b".wh."));
    let kind = if is_mark && random.percent(80) {
        b'0'
    } else if name.ends_with(b"/") && random.percent(70) {
        b'5'
    } else {
        random.one(b"\x0000005555511122223467")
    };
    let target = if matches!(kind, b'1' | b'2') { random.one(TARGETS) } else { b"" };
    let mode = random.one(&[0o644, 0o755, 0o4755, 0o2750, 0o1777, 0, 0o100_640]);
    let owner = random.below(3) as u64 * 1000;
    let time = 1_100_000_000 + number as u64;
    let block = Block::new(kind, name).link(target).number(MODE, mode).number(UID, owner).number(GID, owner + 1);
    let block = block.number(MTIME, time);
    let content = if matches!(kind, 0 | b'0' | b'7') { format!("content {number}") } else { String::new() };
    let mut bytes = Vec::new();
    let mut said = format!("{:?} {} {mode:o}", char::from(kind), name.escape_ascii());
    if random.percent(15) {
        let key = random.one(&[&b"SCHILY.xattr.user.n"[..], b"SCHILY.xattr.user.m", b"SCHILY.xattr.trusted.t"]);
        said.push_str(" +xattr");
        bytes.extend(pax(b'x', &[(key, number.to_string().as_bytes())]));
    }
    if !target.is_empty() {
        said.push_str(&format!(" -> {}", target.escape_ascii()));
    }
    bytes.extend(block.with(content));
    (said, bytes)
}
