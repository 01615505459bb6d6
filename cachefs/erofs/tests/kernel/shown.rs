//! What is written is what is shown.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

use erofs::{Device, Inode, Node, WriteError, write};
use proptest::prelude::*;

use crate::memory::{Kind, Memory, PLAIN, Xattrs};
use crate::mounted::{Mounted, compare};

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

/// Blocks with content and without, and a part of a block.
fn sparse() -> impl Strategy<Value = Vec<u8>> {
    let stretch = (prop::sample::select(vec![0, 0, 1, 255u8]), prop::sample::select(vec![1, 2, 4, 8, 13usize]));
    (prop::collection::vec(stretch, 1..6), 0..4096usize).prop_map(|(stretches, cut)| {
        let mut content: Vec<u8> =
            stretches.into_iter().flat_map(|(byte, blocks)| std::iter::repeat_n(byte, blocks * 4096)).collect();
        content.truncate(content.len() - cut);
        content
    })
}

fn kinds() -> impl Strategy<Value = Kind> {
    let content = prop_oneof![
        Just(Vec::new()),
        prop::collection::vec(any::<u8>(), 1..100),
        (4_000..14_000usize, any::<u8>()).prop_map(|(len, byte)| vec![byte; len]),
        sparse(),
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
fn xattr_sets() -> impl Strategy<Value = Xattrs> {
    let name = prop_oneof!["trusted[.][a-z]{1,20}", "trusted[.][a-z]{200,240}", "security[.][a-z]{1,8}"];
    let value = prop_oneof![prop::collection::vec(any::<u8>(), 0..40), prop::collection::vec(any::<u8>(), 3000..9000)];
    let some = prop::collection::btree_map(name.prop_map(String::into_bytes), value, 0..4);
    prop_oneof![3 => Just(BTreeMap::new()), 1 => some]
}

/// Trees: each node hangs in one of the directories before it, and files may hang in a second one.
fn trees() -> impl Strategy<Value = Memory> {
    let node = (
        attributes(),
        kinds(),
        xattr_sets(),
        names(),
        any::<prop::sample::Index>(),
        any::<prop::sample::Index>(),
        0..6u8,
    );
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

/// fsck.erofs reads what follows an inode, also the last one.
#[test]
fn an_inode_at_the_end_of_a_block_may_be_the_last() {
    for number in 1..=160 {
        let mut tree = Memory::default();
        let root = tree.add(PLAIN, directory(), BTreeMap::new());
        for name in 0..number {
            let node = tree.add(PLAIN, Kind::Special(0o010_000, (0, 0)), BTreeMap::new());
            tree.name(root, format!("{name:03}").as_bytes(), node);
        }
        compare(&Mounted::new(&mut tree).root(), 0, &tree, &mut BTreeMap::new());
    }
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
        write(&tree, &devices, b"name", &File::create_new(&path).unwrap(), u64::MAX).unwrap();
        fs::read(path).unwrap()
    };
    assert_eq!(image("one"), image("two"));
}

/// An overlay's upper directory refers to files below it by UUID and inode number: one file must not be taken for another.
#[test]
fn another_image_has_another_uuid() {
    let uuid = |names: &[&str], name: &[u8]| {
        let mut tree = Memory::default();
        let root = tree.add(PLAIN, directory(), BTreeMap::new());
        for name in names {
            let below = tree.add(PLAIN, directory(), BTreeMap::new());
            tree.name(root, name.as_bytes(), below);
        }
        let image = tempfile::NamedTempFile::new().unwrap();
        write(&tree, &[], name, image.as_file(), u64::MAX).unwrap();
        fs::read(image.path()).unwrap()[1024 + 48..1024 + 64].to_vec()
    };
    let first = uuid(&["a", "b"], b"name");
    assert_eq!(first, uuid(&["a", "b"], b"name"));
    assert!(first != [0; 16] && first != uuid(&["a", "c"], b"name") && first != uuid(&["a", "b"], b"other"));
}

/// openzfs/zfs#7937: the kernel refuses 32-bit programs what they cannot hold, except that nothing is known.
#[test]
fn a_32_bit_program_can_ask_for_free_inodes() {
    let mut tree = Memory::default();
    tree.add(PLAIN, directory(), BTreeMap::new());
    let found = nix::sys::statfs::statfs(&Mounted::new(&mut tree).root()).unwrap();
    assert_eq!((found.files(), found.files_free()), (u64::MAX, u64::MAX));
}

#[test]
fn what_is_not_a_tree_is_refused() {
    let refused = |tree: &Memory| {
        let file = tempfile::tempfile().unwrap();
        write(tree, &[Device { blocks: 1 }], b"", &file, u64::MAX).unwrap_err().to_string()
    };
    let mut looped = Memory::default();
    let root = looped.add(PLAIN, directory(), BTreeMap::new());
    let below = looped.add(PLAIN, directory(), BTreeMap::new());
    looped.name(root, b"a", below);
    looped.name(below, b"b", below);
    assert_eq!(refused(&looped), "the tree is malformed: a directory has two names");
    for (name, why) in [
        (&b"a/b"[..], "a name that no file can have"),
        (b"..", "a name that no file can have"),
        (&[b'n'; 256], "a name that no file can have"),
    ] {
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
    let error = write(&odd, &[], b"", &file, u64::MAX).unwrap_err();
    assert!(matches!(error, WriteError::Inexpressible(_)), "{error}");
    assert_eq!(error.to_string(), "EROFS has no place for the extended attribute odd.name of 1 bytes");
    let mut long = Memory::default();
    let root = long.add(PLAIN, directory(), BTreeMap::new());
    for number in 0..1000 {
        let file = long.add(PLAIN, Kind::File(Vec::new()), BTreeMap::new());
        long.name(root, number.to_string().as_bytes(), file);
    }
    let error = |most: u64| write(&long, &[], b"", &tempfile::tempfile().unwrap(), most).map(|written| written.len);
    let len = error(u64::MAX).unwrap();
    assert!(matches!(error(len / 2), Err(WriteError::TooLong(most)) if most == len / 2));
}
