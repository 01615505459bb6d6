//! Images are given to the kernel and to `fsck.erofs`: what is seen through a mount is the tree that was written.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use erofs::{BLOCK, Device, Inode, Node, Tree, WriteError, Xattr, write};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use proptest::prelude::*;
use tempfile::TempDir;

/// What one inode is, besides its attributes.
#[derive(Debug, Clone, PartialEq)]
enum Kind {
    Directory(BTreeMap<Vec<u8>, Node>),
    File(Vec<u8>),
    Link(Vec<u8>),
    Special(u32, (u32, u32)),
}

/// A tree in memory. Node 0 is the root.
#[derive(Debug, Clone, Default)]
struct Memory {
    nodes: Vec<(Inode, Kind, BTreeMap<Vec<u8>, Vec<u8>>)>,
}

const PLAIN: Inode =
    Inode { mode: 0, uid: 0, gid: 0, nlink: 1, size: 0, mtime: 0, mtime_nsec: 0, rdev: (0, 0), content: (0, 0) };

impl Memory {
    fn add(&mut self, inode: Inode, kind: Kind, xattrs: BTreeMap<Vec<u8>, Vec<u8>>) -> Node {
        let bits = match &kind {
            Kind::Directory(_) => 0o040_000,
            Kind::File(_) => 0o100_000,
            Kind::Link(_) => 0o120_000,
            Kind::Special(bits, _) => *bits,
        };
        let mut inode = Inode { mode: bits | inode.mode & 0o7777, ..inode };
        if let Kind::Special(_, rdev) = &kind {
            inode.rdev = *rdev;
        }
        self.nodes.push((inode, kind, xattrs));
        self.nodes.len() as Node - 1
    }

    fn name(&mut self, directory: Node, name: &[u8], node: Node) {
        if let Kind::Directory(entries) = &mut self.nodes[directory as usize].1 {
            entries.insert(name.to_vec(), node);
        }
    }

    /// Gives every file its place on one of two devices, and link counts.
    fn finish(&mut self, directory: &Path) -> (Vec<Device>, Vec<PathBuf>) {
        let paths = vec![directory.join("first"), directory.join("second")];
        let files: Vec<File> = paths.iter().map(|path| File::create(path).unwrap()).collect();
        let mut next = [0, 0];
        let mut links = vec![0; self.nodes.len()];
        for (_, kind, _) in &self.nodes {
            if let Kind::Directory(entries) = kind {
                entries.values().for_each(|node| links[*node as usize] += 1);
            }
        }
        for (number, (inode, kind, _)) in self.nodes.iter_mut().enumerate() {
            inode.nlink = links[number].max(1);
            if let Kind::File(content) = kind {
                let device = number % 2;
                inode.size = content.len() as u64;
                inode.content = (device as u16, next[device]);
                files[device].write_all_at(content, next[device] * BLOCK).unwrap();
                next[device] += inode.size.div_ceil(BLOCK);
            }
        }
        for (file, blocks) in files.iter().zip(next) {
            file.set_len(blocks.max(1) * BLOCK).unwrap();
        }
        (next.iter().map(|blocks| Device { blocks: (*blocks).max(1) }).collect(), paths)
    }
}

impl Tree for Memory {
    type Error = Infallible;

    fn root(&self) -> Node {
        0
    }

    fn inode(&self, node: Node) -> Result<Inode, Infallible> {
        Ok(self.nodes[node as usize].0)
    }

    fn entries(&self, directory: Node, give: &mut dyn FnMut(&[u8], Node)) -> Result<(), Infallible> {
        if let Kind::Directory(entries) = &self.nodes[directory as usize].1 {
            entries.iter().for_each(|(name, node)| give(name, *node));
        }
        Ok(())
    }

    fn xattrs(&self, node: Node, give: &mut dyn FnMut(Xattr<'_>)) -> Result<(), Infallible> {
        self.nodes[node as usize].2.iter().for_each(|(name, value)| give((name, value)));
        Ok(())
    }

    fn target(&self, link: Node) -> Result<Vec<u8>, Infallible> {
        match &self.nodes[link as usize].1 {
            Kind::Link(target) => Ok(target.clone()),
            _ => Ok(Vec::new()),
        }
    }
}

/// A mounted image. Unmounted when dropped.
struct Mounted {
    directory: TempDir,
}

impl Mounted {
    fn new(tree: &mut Memory) -> Mounted {
        let mounted = Mounted { directory: tempfile::Builder::new().prefix("erofs-").tempdir().unwrap() };
        let at = mounted.directory.path();
        let (devices, paths) = tree.finish(at);
        let image = at.join("image");
        let summary = write(tree, &devices, [7; 16], &File::create(&image).unwrap()).unwrap();
        assert_eq!(summary.len, fs::metadata(&image).unwrap().len());
        let mut options = Vec::new();
        let mut check = Command::new("fsck.erofs");
        for path in &paths {
            options.push(format!("device={}", path.display()));
            check.arg(format!("--device={}", path.display()));
        }
        let checked = check.arg(&image).output().expect("erofs-utils is installed");
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
        fs::create_dir(mounted.root()).unwrap();
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some(&image), &mounted.root(), Some("erofs"), flags, Some(options.join(",").as_str())).unwrap();
        mounted
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.root(), MntFlags::MNT_DETACH);
    }
}

/// Checks a path and everything below against a node. `seen` are inode numbers of nodes.
fn compare(path: &Path, node: Node, tree: &Memory, seen: &mut BTreeMap<Node, u64>) {
    let (inode, kind, xattrs) = &tree.nodes[node as usize];
    let found = fs::symlink_metadata(path).unwrap();
    let shown = |inode: &Inode| (inode.mode, inode.uid, inode.gid, inode.nlink, inode.mtime, inode.mtime_nsec);
    let real = Inode {
        mode: found.mode(),
        uid: found.uid(),
        gid: found.gid(),
        nlink: found.nlink() as u32,
        mtime: found.mtime(),
        mtime_nsec: found.mtime_nsec() as u32,
        ..*inode
    };
    assert_eq!(shown(&real), shown(inode), "{}", path.display());
    assert_eq!(*seen.entry(node).or_insert(found.ino()), found.ino(), "{} is one inode", path.display());
    assert!(found.ino() < 1 << 32);
    assert_eq!(listed_xattrs(path), xattrs.clone(), "{}", path.display());
    match kind {
        Kind::Directory(entries) => {
            let names: Vec<Vec<u8>> =
                fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_vec()).collect();
            assert_eq!(names, entries.keys().cloned().collect::<Vec<_>>(), "{}", path.display());
            for (name, child) in entries {
                compare(&path.join(std::ffi::OsStr::from_bytes(name)), *child, tree, seen);
            }
            assert!(fs::symlink_metadata(path.join("there is no such name")).is_err());
        }
        Kind::File(content) => assert_eq!(&fs::read(path).unwrap(), content, "{}", path.display()),
        Kind::Link(target) => assert_eq!(fs::read_link(path).unwrap().as_os_str().as_bytes(), target),
        Kind::Special(0o020_000 | 0o060_000, (major, minor)) => {
            assert_eq!((nix::sys::stat::major(found.rdev()), nix::sys::stat::minor(found.rdev())), ((*major).into(), (*minor).into()));
        }
        Kind::Special(..) => assert!(found.file_type().is_fifo()),
    }
}

/// The extended attributes of a path, without following a link.
fn listed_xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let output = Command::new("getfattr")
        .args(["--no-dereference", "--absolute-names", "--dump", "--match=-", "--encoding=hex"])
        .arg(path)
        .output()
        .expect("attr is installed");
    let mut found = BTreeMap::new();
    for line in output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.starts_with(b"#") && !line.is_empty()) {
        let line = String::from_utf8(line.to_vec()).unwrap();
        let (name, value) = line.split_once('=').unwrap_or((&line, ""));
        let digits = value.strip_prefix("0x").unwrap_or_default();
        let byte = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).unwrap();
        found.insert(name.as_bytes().to_vec(), (0..digits.len()).step_by(2).map(byte).collect());
    }
    found
}

fn attributes() -> impl Strategy<Value = Inode> {
    (0..0o10_000u32, any::<u32>(), any::<u32>(), -(1i64 << 40)..1 << 40, 0..1_000_000_000u32)
        .prop_map(|(mode, uid, gid, mtime, mtime_nsec)| Inode { mode, uid, gid, mtime, mtime_nsec, ..PLAIN })
}

fn names() -> impl Strategy<Value = Vec<u8>> {
    let byte = (1..=255u8).prop_filter("a name's byte", |byte| *byte != b'/');
    prop_oneof![
        3 => prop::collection::vec(byte, 1..=255),
        3 => "[-.a-c]{1,3}".prop_map(String::into_bytes),
        1 => "[a-z]{200,255}".prop_map(String::into_bytes),
    ]
    .prop_filter("a name", |name| name != b"." && name != b"..")
}

fn kinds() -> impl Strategy<Value = Kind> {
    let content = prop_oneof![
        Just(Vec::new()),
        prop::collection::vec(any::<u8>(), 1..100),
        (4_000..14_000usize, any::<u8>()).prop_map(|(len, byte)| vec![byte; len]),
    ];
    prop_oneof![
        3 => content.prop_map(Kind::File),
        3 => Just(Kind::Directory(BTreeMap::new())),
        1 => prop_oneof!["[a-z/.]{1,40}", "[a-z]{2000,4095}"].prop_map(|target| Kind::Link(target.into_bytes())),
        1 => (0..4096u32, 0..1u32 << 20).prop_map(|rdev| Kind::Special(0o020_000, rdev)),
        1 => (0..4096u32, 0..1u32 << 20).prop_map(|rdev| Kind::Special(0o060_000, rdev)),
        1 => Just(Kind::Special(0o010_000, (0, 0))),
    ]
}

/// Attributes that the kernel shows for every type of inode, long ones among them.
fn xattr_sets() -> impl Strategy<Value = BTreeMap<Vec<u8>, Vec<u8>>> {
    let name = prop_oneof!["trusted[.][a-z]{1,20}", "trusted[.][a-z]{200,240}", "security[.][a-z]{1,8}"];
    let value = prop_oneof![prop::collection::vec(any::<u8>(), 0..40), prop::collection::vec(any::<u8>(), 3000..9000)];
    let some = prop::collection::btree_map(name.prop_map(String::into_bytes), value, 0..4);
    prop_oneof![3 => Just(BTreeMap::new()), 1 => some]
}

/// Trees: each node hangs in one of the directories before it, and files may hang in a second one.
fn trees() -> impl Strategy<Value = Memory> {
    let node = (attributes(), kinds(), xattr_sets(), names(), any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0..6u8);
    (attributes(), prop::collection::vec(node, 0..120)).prop_map(|(root, nodes)| {
        let mut tree = Memory::default();
        let mut directories = vec![tree.add(root, Kind::Directory(BTreeMap::new()), BTreeMap::new())];
        for (inode, kind, xattrs, name, parent, second, twice) in nodes {
            let is_directory = matches!(kind, Kind::Directory(_));
            let (parent, second) = (*parent.get(&directories), *second.get(&directories));
            let taken = |tree: &Memory, directory: Node| match &tree.nodes[directory as usize].1 {
                Kind::Directory(entries) => entries.contains_key(&name),
                _ => true,
            };
            if taken(&tree, parent) {
                continue;
            }
            let node = tree.add(inode, kind, xattrs);
            tree.name(parent, &name, node);
            if is_directory {
                directories.push(node);
            } else if twice == 0 && !taken(&tree, second) {
                tree.name(second, &name, node);
            }
        }
        tree
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, max_shrink_iters: 400, ..ProptestConfig::default() })]

    #[test]
    fn the_kernel_shows_the_tree_that_was_written(mut tree in trees()) {
        let mounted = Mounted::new(&mut tree);
        compare(&mounted.root(), 0, &tree, &mut BTreeMap::new());
    }
}

fn directory() -> Kind {
    Kind::Directory(BTreeMap::new())
}

#[test]
fn large_directories_are_found_and_listed() {
    let mut tree = Memory::default();
    let root = tree.add(PLAIN, directory(), BTreeMap::new());
    // 100,000 names in the root, whose inode's number has 16 bits only, and again below.
    let below = tree.add(PLAIN, directory(), BTreeMap::new());
    tree.name(root, b"below", below);
    let file = tree.add(Inode { mtime: -1, ..PLAIN }, Kind::File(b"content".to_vec()), BTreeMap::new());
    for number in 0..100_000 {
        for directory in [root, below] {
            tree.name(directory, format!("file {number} of many").as_bytes(), file);
        }
    }
    let mounted = Mounted::new(&mut tree);
    assert_eq!(fs::read_dir(mounted.root()).unwrap().count(), 100_001);
    for number in [0, 1, 4_711, 99_999] {
        for directory in [mounted.root(), mounted.root().join("below")] {
            assert_eq!(fs::read(directory.join(format!("file {number} of many"))).unwrap(), b"content");
        }
    }
    assert_eq!(fs::metadata(mounted.root().join("file 0 of many")).unwrap().nlink(), 200_000);
}

#[test]
fn the_same_tree_gives_the_same_bytes() {
    let mut tree = Memory::default();
    let root = tree.add(PLAIN, directory(), BTreeMap::new());
    for number in 0..5_000u32 {
        let below = tree.add(PLAIN, directory(), BTreeMap::from([(b"user.n".to_vec(), number.to_le_bytes().to_vec())]));
        tree.name(root, number.to_string().as_bytes(), below);
    }
    let directory = tempfile::tempdir().unwrap();
    let (devices, _) = tree.finish(directory.path());
    let image = |name: &str| {
        let path = directory.path().join(name);
        write(&tree, &devices, [1; 16], &File::create(&path).unwrap()).unwrap();
        fs::read(path).unwrap()
    };
    assert_eq!(image("one"), image("two"));
}

#[test]
fn what_is_not_a_tree_is_refused() {
    let refused = |tree: &Memory| {
        let file = tempfile::tempfile().unwrap();
        write(tree, &[Device { blocks: 1 }], [0; 16], &file).unwrap_err().to_string()
    };
    let mut looped = Memory::default();
    let root = looped.add(PLAIN, directory(), BTreeMap::new());
    let below = looped.add(PLAIN, directory(), BTreeMap::new());
    looped.name(root, b"a", below);
    looped.name(below, b"b", below);
    assert_eq!(refused(&looped), "the tree is malformed: a directory has two names");
    for (name, why) in [(&b"a/b"[..], "a name that no file can have"), (b"..", "a name that no file can have"), (&[b'n'; 256], "a name that no file can have")] {
        let mut named = Memory::default();
        let root = named.add(PLAIN, directory(), BTreeMap::new());
        let file = named.add(PLAIN, Kind::File(Vec::new()), BTreeMap::new());
        named.name(root, name, file);
        assert_eq!(refused(&named), format!("the tree is malformed: {why}"));
    }
    let mut outside = Memory::default();
    let root = outside.add(PLAIN, directory(), BTreeMap::new());
    let file = outside.add(Inode { size: 1, content: (0, 1), ..PLAIN }, Kind::File(vec![1]), BTreeMap::new());
    outside.name(root, b"file", file);
    assert_eq!(refused(&outside), "the tree is malformed: a file lies past the end of its device");
    let mut odd = Memory::default();
    odd.add(PLAIN, directory(), BTreeMap::from([(b"odd.name".to_vec(), b"x".to_vec())]));
    let file = tempfile::tempfile().unwrap();
    let error = write(&odd, &[], [0; 16], &file).unwrap_err();
    assert!(matches!(error, WriteError::Inexpressible(_)), "{error}");
    assert_eq!(error.to_string(), "EROFS has no place for the extended attribute odd.name of 1 bytes");
}
