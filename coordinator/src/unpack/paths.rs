//! Names in a tar, made safe: a path is a list of names below the layer's root, and nothing else.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};

use super::bounds::ENTRIES_MAX;

/// The kernel's limits: a host could not look up anything longer. A path counts from the root, its first slash included.
const NAME_MAX: usize = 255;
const PATH_MAX: usize = 4095;

/// A path without `.`, `..` and empty names. They are removed by text alone, as Docker does before it looks at any file.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Cleaned<'a> {
    /// Whether it began with a slash.
    pub(super) rooted: bool,
    /// How many levels it climbs first.
    climbs: usize,
    /// The names that follow.
    pub(super) names: Vec<&'a [u8]>,
}

impl<'a> Cleaned<'a> {
    pub(super) fn new(path: &'a [u8]) -> Cleaned<'a> {
        let mut cleaned = Cleaned { rooted: path.first() == Some(&b'/'), climbs: 0, names: Vec::new() };
        for name in path.split(|byte| *byte == b'/') {
            match name {
                b"" | b"." => {}
                b".." if cleaned.names.pop().is_some() || cleaned.rooted => {}
                b".." => cleaned.climbs += 1,
                name => cleaned.names.push(name),
            }
        }
        cleaned
    }

    /// Like [`Cleaned::new`], for a link's target. Docker joins the target to the root, so that even one that climbs stays inside.
    pub(super) fn below_root(path: &'a [u8]) -> Cleaned<'a> {
        Cleaned { rooted: true, climbs: 0, ..Cleaned::new(path) }
    }

    /// Whether it is the root itself, written without a slash: `.`, `./`, or nothing at all.
    pub(super) fn is_dot(&self) -> bool {
        !self.rooted && self.climbs == 0 && self.names.is_empty()
    }

    /// Checks that a file can have this path. Absolute paths count from the layer's root; a relative path that climbs above it is refused.
    pub(super) fn check(&self) -> Result<(), &'static str> {
        let len: usize = self.names.iter().map(|name| 1 + name.len()).sum();
        if self.climbs > 0 {
            return Err("climbs out of the layer with \"..\"");
        }
        if len > PATH_MAX {
            return Err("has a path longer than 4095 bytes");
        }
        if self.names.iter().any(|name| name.len() > NAME_MAX) {
            return Err("has a name longer than 255 bytes");
        }
        if self.names.iter().any(|name| name.contains(&0)) { Err("has a name with a NUL byte") } else { Ok(()) }
    }
}

/// The paths that the archive has named so far. Docker accepts no path twice, so a reader that shows the same files must not either.
#[derive(Default)]
pub(super) struct Named {
    /// A 64-bit hash of each path under a random key. Two of a million paths collide once in ten million layers, and the next attempt has
    /// another key.
    hashes: HashSet<u64>,
    hasher: RandomState,
}

impl Named {
    /// Adds a path. The error completes the sentence "its entry ...".
    pub(super) fn add(&mut self, path: &Cleaned<'_>) -> Result<(), String> {
        if self.hashes.len() >= ENTRIES_MAX {
            return Err(format!("is one too many: a layer can have {ENTRIES_MAX} entries"));
        }
        let new = self.hashes.insert(self.hasher.hash_one(path));
        if new { Ok(()) } else { Err("is named a second time, which Docker refuses".to_owned()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_below_the_root() {
        let ok = |path: &str, names: &[&str]| {
            let names: Vec<_> = names.iter().map(|n| n.as_bytes()).collect();
            let cleaned = Cleaned::new(path.as_bytes());
            assert_eq!((cleaned.check(), &cleaned.names), (Ok(()), &names), "{path}");
        };
        ok("a/b", &["a", "b"]);
        ok("./a//b/.", &["a", "b"]);
        ok("/etc/passwd", &["etc", "passwd"]);
        ok("a/../b", &["b"]);
        ok("/../../b", &["b"]);
        ok("", &[]);
        ok("...", &["..."]);
        ok(&format!("{}f", "./".repeat(5000)), &["f"]);
        for bad in ["..", "a/../../b", "../a"] {
            assert!(Cleaned::new(bad.as_bytes()).check().is_err(), "{bad}");
            assert!(Cleaned::below_root(bad.as_bytes()).check().is_ok(), "{bad}");
        }
        assert!(Cleaned::new(&[b'x'; 256]).check().is_err());
        assert!(Cleaned::new(b"a\0b").check().is_err());
        assert!(Cleaned::new(&b"a/".repeat(2047)).check().is_ok());
        assert!(Cleaned::new(&b"a/".repeat(2048)).check().is_err());
    }

    #[test]
    fn the_root_has_two_names() {
        let is_dot = |path: &str| Cleaned::new(path.as_bytes()).is_dot();
        assert!(["", ".", "./", "a/..", ".//."].into_iter().all(is_dot));
        assert!(!["/", "/.", "..", "a", "/.."].into_iter().any(is_dot));
    }

    #[test]
    fn a_path_is_named_once_however_it_is_spelled() {
        let mut named = Named::default();
        let mut add = |path: &str| named.add(&Cleaned::new(path.as_bytes())).is_ok();
        assert!(add("a/b") && add("/a/b") && add("../a/b") && add("a") && add("."));
        assert!(!add("./a//b") && !add("/x/../a/b") && !add("a/") && !add("") && !add("../c/../a/b"));
    }
}
