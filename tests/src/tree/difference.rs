//! The differences of two trees, as one readable line each.

use std::collections::BTreeSet;
use std::fmt::Debug;

use super::{Entry, Kind, RelativePath, Tree};

/// What [`diff`] ignores. The default ignores only link counts of directories.
#[derive(Debug, Clone)]
pub struct Ignore {
    /// Link counts of directories: overlayfs always reports 1, ext4 counts subdirectories.
    pub directory_nlink: bool,
    /// Link counts of all entries: a merged overlay counts links that its upper layers hide.
    pub nlink: bool,
    /// Extended attributes whose names begin with one of these.
    pub xattrs: Vec<&'static str>,
    /// Times of these paths, such as directories that a tar implies but does not contain.
    pub mtime_of: BTreeSet<RelativePath>,
    /// Owner, mode and times of these paths, for the same reason.
    pub attributes_of: BTreeSet<RelativePath>,
    /// These paths and everything below them.
    pub subtrees: Vec<RelativePath>,
}

impl Default for Ignore {
    fn default() -> Self {
        Self {
            directory_nlink: true,
            nlink: false,
            xattrs: Vec::new(),
            mtime_of: BTreeSet::new(),
            attributes_of: BTreeSet::new(),
            subtrees: Vec::new(),
        }
    }
}

impl Ignore {
    fn skips(&self, path: &[u8]) -> bool {
        self.subtrees.iter().any(|top| {
            path.strip_prefix(top.as_slice()).is_some_and(|rest| rest.is_empty() || rest[0] == b'/' || top.is_empty())
        })
    }

    fn skips_xattr(&self, name: &[u8]) -> bool {
        self.xattrs.iter().any(|prefix| name.starts_with(prefix.as_bytes()))
    }
}

/// Every difference between `left` and `right` that `ignore` does not cover; empty when they are equal.
pub fn diff(left: &Tree, right: &Tree, ignore: &Ignore) -> Vec<String> {
    let paths: BTreeSet<&RelativePath> = left.keys().chain(right.keys()).collect();
    let mut found = Vec::new();
    for path in paths.into_iter().filter(|path| !ignore.skips(path)) {
        let mut lines = Vec::new();
        match (left.get(path), right.get(path)) {
            (Some(left), Some(right)) => compare(path, left, right, ignore, &mut lines),
            (Some(left), None) => lines.push(format!("{:?} only on the left", left.kind)),
            (None, Some(right)) => lines.push(format!("{:?} only on the right", right.kind)),
            (None, None) => {}
        }
        found.extend(lines.into_iter().map(|line| format!("/{}: {line}", path.escape_ascii())));
    }
    found
}

fn compare(path: &RelativePath, left: &Entry, right: &Entry, ignore: &Ignore, lines: &mut Vec<String>) {
    let mut field = |name: &str, left: &dyn Debug, right: &dyn Debug| {
        let (left, right) = (format!("{left:?}"), format!("{right:?}"));
        if left != right {
            lines.push(format!("{name} {left} != {right}"));
        }
    };
    field("type", &left.kind, &right.kind);
    if !ignore.attributes_of.contains(path) {
        field("mode", &Octal(left.mode), &Octal(right.mode));
        field("owner", &(left.uid, left.gid), &(right.uid, right.gid));
        if !ignore.mtime_of.contains(path) {
            field("mtime", &(left.mtime, left.mtime_nsec), &(right.mtime, right.mtime_nsec));
        }
    }
    field("size", &left.size, &right.size);
    field("rdev", &left.rdev, &right.rdev);
    field("content", &left.content, &right.content);
    field("target", &left.target.as_ref().map(Bytes), &right.target.as_ref().map(Bytes));
    if !(ignore.nlink || ignore.directory_nlink && left.kind == Kind::Directory) {
        field("nlink", &left.nlink, &right.nlink);
    }
    field("hard links", &visible_links(left, ignore), &visible_links(right, ignore));
    for (side, entry) in [("left", left), ("right", right)] {
        if entry.listed_kind.is_some_and(|listed| listed != entry.kind) {
            lines.push(format!("the {side} directory lists it as {:?}, it is {:?}", entry.listed_kind, entry.kind));
        }
    }
    compare_xattrs(left, right, ignore, lines);
}

fn visible_links<'a>(entry: &'a Entry, ignore: &Ignore) -> Vec<Bytes<'a>> {
    let links: Vec<_> = entry.hard_links.iter().filter(|path| !ignore.skips(path)).map(Bytes).collect();
    if links.len() > 1 { links } else { Vec::new() }
}

fn compare_xattrs(left: &Entry, right: &Entry, ignore: &Ignore, lines: &mut Vec<String>) {
    let names: BTreeSet<&Vec<u8>> = left.xattrs.keys().chain(right.xattrs.keys()).collect();
    for name in names.into_iter().filter(|name| !ignore.skips_xattr(name)) {
        let (one, other) = (left.xattrs.get(name), right.xattrs.get(name));
        if one != other {
            let show = |value: Option<&Vec<u8>>| value.map_or("absent".into(), |value| format!("{:?}", Bytes(value)));
            lines.push(format!("xattr {} {} != {}", name.escape_ascii(), show(one), show(other)));
        }
    }
}

struct Bytes<'a>(&'a Vec<u8>);

impl Debug for Bytes<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "\"{}\"", self.0.escape_ascii())
    }
}

struct Octal(u32);

impl Debug for Octal {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{:04o}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::Path;

    use super::super::snapshot;
    use super::*;

    fn make(root: &Path) {
        fs::create_dir(root.join("dir")).unwrap();
        fs::write(root.join("dir/file"), "content").unwrap();
        fs::hard_link(root.join("dir/file"), root.join("link")).unwrap();
        symlink("dir/file", root.join("symbolic")).unwrap();
        xattr::set(root.join("link"), "user.colour", b"red\0").unwrap();
        for path in ["dir/file", "dir", "."] {
            let status = std::process::Command::new("touch").args(["-d", "@7.5"]).arg(root.join(path)).status();
            assert!(status.unwrap().success());
        }
        assert!(
            std::process::Command::new("touch")
                .args(["-hd", "@7.5"])
                .arg(root.join("symbolic"))
                .status()
                .unwrap()
                .success()
        );
    }

    #[test]
    fn equal_trees_have_no_difference_and_every_change_is_named() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        make(one.path());
        make(other.path());
        let left = snapshot(one.path()).unwrap();
        assert_eq!(diff(&left, &snapshot(other.path()).unwrap(), &Ignore::default()), Vec::<String>::new());
        assert_eq!(left[b"link".as_slice()].hard_links, [b"dir/file".to_vec(), b"link".to_vec()]);

        let link = other.path().join("link");
        fs::write(&link, "different").unwrap();
        fs::set_permissions(&link, fs::Permissions::from_mode(0o4711)).unwrap();
        xattr::set(&link, "user.colour", b"blue").unwrap();
        fs::remove_file(other.path().join("dir/file")).unwrap();
        let found = diff(&left, &snapshot(other.path()).unwrap(), &Ignore::default()).join("\n");
        for expected in [
            "/dir/file: File only on the left",
            "/link: mode 0644 != 4711",
            "size 7 != 9",
            "content",
            "nlink 2 != 1",
            "hard links",
            "xattr user.colour \"red\\x00\" != \"blue\"",
            "/dir: mtime (7, 500000000)",
        ] {
            assert!(found.contains(expected), "{expected} is missing in:\n{found}");
        }
        let ignore = Ignore { subtrees: vec![b"link".to_vec(), b"dir".to_vec()], ..Ignore::default() };
        assert_eq!(diff(&left, &snapshot(other.path()).unwrap(), &ignore), Vec::<String>::new());
    }
}
