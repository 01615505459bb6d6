//! Names in a tar, made safe: a path is a list of names below the layer's root, and nothing else.

/// The kernel's limits: no host could look longer ones up.
const NAME_MAX: usize = 255;
const PATH_MAX: usize = 4095;

/// The names of a path from the root on. As Docker does, absolute paths are taken below the root and `..` is resolved within
/// the path; a relative path that climbs above the root is refused.
pub(super) fn split(path: &[u8]) -> Result<Vec<&[u8]>, &'static str> {
    if path.len() > PATH_MAX {
        return Err("has a path longer than 4095 bytes");
    }
    let absolute = path.first() == Some(&b'/');
    let mut names: Vec<&[u8]> = Vec::new();
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." if names.pop().is_some() || absolute => {}
            b".." => return Err("climbs out of the layer with \"..\""),
            name if name.len() > NAME_MAX => return Err("has a name longer than 255 bytes"),
            name if name.contains(&0) => return Err("has a name with a NUL byte"),
            name => names.push(name),
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_below_the_root() {
        let ok = |path: &str, names: &[&str]| {
            let names: Vec<_> = names.iter().map(|n| n.as_bytes()).collect();
            assert_eq!(split(path.as_bytes()).unwrap(), names, "{path}");
        };
        ok("a/b", &["a", "b"]);
        ok("./a//b/.", &["a", "b"]);
        ok("/etc/passwd", &["etc", "passwd"]);
        ok("a/../b", &["b"]);
        ok("/../../b", &["b"]);
        ok("", &[]);
        ok("...", &["..."]);
        for bad in ["..", "a/../../b", "../a"] {
            assert!(split(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(split(&[b'x'; 256]).is_err());
        assert!(split(b"a\0b").is_err());
        assert!(split(&b"ab/".repeat(2000)).is_err());
    }
}
