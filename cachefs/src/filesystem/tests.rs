//! The tree over published stores: layers as they were made, chains as a small model of overlayfs has them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;
use store::Digest;
use store::layer::{Metadata, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG};

use super::Seek;
use super::node::{Attributes, Found, Lifetime, Node};
use crate::content::cache::disk::Limit;
use crate::fixture::{Entries, Health, Host, TIMEOUT, TestStore, TreeEntry, file, noise, plain};
use crate::source::failure::Failure;

const LIMIT: Limit = Limit::Bytes(1 << 30);

pub(crate) fn host(store: &TestStore, cache: &tempfile::TempDir) -> Host {
    Host::start(store.dir.path(), cache.path(), LIMIT, Duration::from_secs(30))
}

/// A store with an image `app:v1` of these layers, base first; a cache directory; the chain's path in the mount; the
/// diffIDs.
pub(crate) fn image(layers: &[Entries]) -> (TestStore, tempfile::TempDir, String, Vec<Digest>) {
    let store = TestStore::new();
    let diff_ids: Vec<_> = layers.iter().map(|entries| store.layer(entries)).collect();
    let chain = store.image("app:v1", &diff_ids);
    (store, tempfile::tempdir().unwrap(), format!("chains/{}", chain.hex()), diff_ids)
}

/// All that can be seen of one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) mtime: (i64, u32),
    pub(crate) rdev: (u32, u32),
    pub(crate) size: u64,
    pub(crate) nlink: u32,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(crate) content: Vec<u8>,
}

fn see(host: &Host, attributes: &Attributes) -> Seen {
    let filesystem = &host.filesystem;
    let node = attributes.node;
    assert_eq!((filesystem.attributes(node).unwrap(), attributes.lifetime()), (*attributes, Lifetime::Forever));
    assert_eq!(attributes.blocks, attributes.size.div_ceil(512));
    let names = filesystem.xattr_names(node).unwrap();
    let names = names.split(|b| *b == 0).filter(|name| !name.is_empty());
    let content = match attributes.mode & S_IFMT {
        S_IFREG => host.read(node, 0, attributes.size as usize).unwrap(),
        S_IFLNK => filesystem.link_target(node).unwrap(),
        _ => Vec::new(),
    };
    Seen {
        mode: attributes.mode,
        owner: (attributes.uid, attributes.gid),
        mtime: attributes.mtime,
        rdev: attributes.rdev,
        size: attributes.size,
        nlink: attributes.nlink,
        xattrs: names.map(|name| (name.to_vec(), filesystem.xattr(node, name).unwrap())).collect(),
        content,
    }
}

/// Walks a tree by listing, and looks every name up as well. All answers may be kept for ever, as SEMANTICS says:
/// "Nothing below `layers/` and `chains/` ever changes."
pub(crate) fn walk(host: &Host, path: &str) -> BTreeMap<String, Seen> {
    let root = host.find(path).unwrap();
    let mut seen = BTreeMap::from([(String::new(), see(host, &root))]);
    let mut stack = vec![(String::new(), root.node)];
    while let Some((path, directory)) = stack.pop() {
        let listed = host.list_by(directory, 3).unwrap();
        assert_eq!((listed[0].1, listed[0].2), (directory, S_IFDIR));
        for (name, node, file_type) in &listed[2..] {
            let Found::Entry(attributes, Lifetime::Forever) = host.lookup(directory, name).unwrap() else {
                panic!("listed, but not found")
            };
            assert_eq!((attributes.node, attributes.mode & S_IFMT), (*node, *file_type));
            let below = format!("{path}/{}", String::from_utf8_lossy(name));
            if *file_type == S_IFDIR {
                let listing = host.list_by(*node, 2).unwrap();
                assert_eq!(listing[1].1, directory, "the parent of {below}");
                stack.push((below.clone(), *node));
            }
            assert!(seen.insert(below, see(host, &attributes)).is_none(), "listed twice");
        }
    }
    seen
}

/// What a layer's entries should look like.
fn expected(entries: &Entries) -> BTreeMap<String, Seen> {
    let mut seen = BTreeMap::new();
    for (path, metadata, entry) in entries {
        let path = if path.is_empty() { String::new() } else { format!("/{path}") };
        if let TreeEntry::Hardlink(target) = entry {
            let target: &mut Seen = seen.get_mut(&format!("/{target}")).unwrap();
            target.nlink += 1;
            continue;
        }
        seen.insert(path, expected_one(metadata, entry));
    }
    for (path, _, entry) in entries {
        if let TreeEntry::Hardlink(target) = entry {
            seen.insert(format!("/{path}"), seen[&format!("/{target}")].clone());
        }
    }
    let directories: Vec<_> =
        seen.iter().filter(|(_, s)| s.mode & S_IFMT == S_IFDIR).map(|(path, _)| path.clone()).collect();
    for path in directories.iter().filter(|path| !path.is_empty()) {
        let parent = path.rsplit_once('/').unwrap().0;
        seen.get_mut(parent).unwrap().nlink += 1;
    }
    seen
}

fn expected_one(metadata: &Metadata, entry: &TreeEntry) -> Seen {
    let (file_type, size, rdev, content) = match entry {
        TreeEntry::Directory | TreeEntry::Opaque => (S_IFDIR, 4096, (0, 0), Vec::new()),
        TreeEntry::File(bytes) => (S_IFREG, bytes.len() as u64, (0, 0), bytes.clone()),
        TreeEntry::Symlink(target) => (S_IFLNK, target.len() as u64, (0, 0), target.clone()),
        TreeEntry::Whiteout => (S_IFCHR, 0, (0, 0), Vec::new()),
        TreeEntry::Special(bits, major, minor) => (*bits, 0, (*major, *minor), Vec::new()),
        TreeEntry::Hardlink(_) => unreachable!("handled by the caller"),
    };
    let mut xattrs = metadata.xattrs.clone();
    xattrs.retain(|name, _| !name.starts_with(b"trusted.overlay."));
    if *entry == TreeEntry::Opaque {
        xattrs.insert(b"trusted.overlay.opaque".to_vec(), b"y".to_vec());
    }
    Seen {
        mode: file_type | metadata.permissions,
        owner: (metadata.uid, metadata.gid),
        mtime: (metadata.mtime, metadata.mtime_nsec),
        rdev,
        size,
        nlink: if file_type == S_IFDIR { 2 } else { 1 },
        xattrs,
        content,
    }
}

/// What overlayfs makes of layers, base first: each one's entries go over what is there.
fn merged(layers: &[Entries]) -> BTreeMap<String, Seen> {
    let mut tree: BTreeMap<String, Seen> = BTreeMap::new();
    for (depth, entries) in layers.iter().enumerate() {
        let layer = expected(entries);
        let is_dir = |seen: &Seen| seen.mode & S_IFMT == S_IFDIR;
        // What this layer hides goes first, so that its own entries below an opaque directory stay.
        for (path, seen) in &layer {
            // The opaque mark counts only on directories that are looked up, and a layer's root is not.
            let opaque = !path.is_empty() && seen.xattrs.contains_key(&b"trusted.overlay.opaque"[..]);
            let replaces = !is_dir(seen) || tree.get(path).is_some_and(|below| !is_dir(below));
            if opaque || replaces {
                tree.retain(|other, _| other != path && !other.starts_with(&format!("{path}/")));
            }
        }
        for (path, mut seen) in layer {
            if seen.mode & S_IFMT == S_IFCHR && seen.rdev == (0, 0) {
                continue;
            }
            seen.xattrs.retain(|name, _| !name.starts_with(b"trusted.overlay."));
            if depth > 0 && is_dir(&seen) && tree.contains_key(&path) {
                seen.nlink = 1;
            }
            tree.insert(path, seen);
        }
    }
    tree
}

fn metadata() -> impl Strategy<Value = Metadata> {
    let xattr =
        prop_oneof![Just("user.a"), Just("security.capability"), Just("trusted.overlay.redirect"), Just("trusted.x")];
    let xattrs = proptest::collection::btree_map(
        xattr.prop_map(|n| n.as_bytes().to_vec()),
        proptest::collection::vec(any::<u8>(), 0..9),
        0..3,
    );
    (0u32..0o10000, any::<(u32, u32, i64)>(), 0u32..1_000_000_000, xattrs).prop_map(
        |(permissions, (uid, gid, mtime), mtime_nsec, xattrs)| Metadata {
            permissions,
            uid,
            gid,
            mtime,
            mtime_nsec,
            xattrs,
        },
    )
}

fn entry() -> impl Strategy<Value = TreeEntry> {
    prop_oneof![
        4 => Just(TreeEntry::Directory),
        1 => Just(TreeEntry::Opaque),
        3 => (0usize..3000, any::<u8>()).prop_map(|(len, seed)| TreeEntry::File(noise(len, seed))),
        1 => proptest::collection::vec(1u8..=255, 1..40).prop_map(TreeEntry::Symlink),
        2 => Just(TreeEntry::Whiteout),
        1 => prop_oneof![Just(S_IFCHR), Just(S_IFBLK)].prop_flat_map(|bits| (1u32..4096, any::<u32>()).prop_map(move |(a, b)| TreeEntry::Special(bits, a, b >> 12))),
        1 => Just(TreeEntry::Special(S_IFIFO, 0, 0)),
    ]
}

/// A layer: each step goes into a directory made before, under one of a few names, so that layers overlap.
pub(crate) fn entries() -> impl Strategy<Value = Entries> {
    let step = (any::<prop::sample::Index>(), 0u8..4, metadata(), entry(), any::<Option<prop::sample::Index>>());
    (metadata(), any::<bool>(), proptest::collection::vec(step, 0..25)).prop_map(|(root, opaque, steps)| {
        let mut made: Entries =
            vec![(String::new(), root, if opaque { TreeEntry::Opaque } else { TreeEntry::Directory })];
        for (parent, name, metadata, entry, link) in steps {
            let directories: Vec<_> = made
                .iter()
                .filter(|(.., e)| matches!(e, TreeEntry::Directory | TreeEntry::Opaque))
                .map(|(p, ..)| p.clone())
                .collect();
            let path = format!("{}/{}", parent.get(&directories), char::from(b'a' + name));
            let path = path.trim_start_matches('/').to_owned();
            let files: Vec<_> =
                made.iter().filter(|(.., e)| matches!(e, TreeEntry::File(_))).map(|(p, ..)| p.clone()).collect();
            if made.iter().any(|(p, ..)| *p == path) {
                continue;
            }
            let entry = match link {
                Some(link) if !files.is_empty() && matches!(entry, TreeEntry::File(_)) => {
                    TreeEntry::Hardlink(link.get(&files).clone())
                }
                _ => entry,
            };
            made.push((path, metadata, entry));
        }
        made
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// SEMANTICS: "A layer shows exactly what its tar holds."
    #[test]
    fn a_layer_shows_exactly_what_its_tar_holds(entries in entries()) {
        let (store, cache, _, diff_ids) = image(std::slice::from_ref(&entries));
        let host = host(&store, &cache);
        prop_assert_eq!(walk(&host, &format!("layers/{}", diff_ids[0].hex())), expected(&entries));
    }

    /// SEMANTICS: "A chain shows what the kernel's overlayfs would make of its layers."
    #[test]
    fn a_chain_shows_what_overlayfs_would(layers in proptest::collection::vec(entries(), 1..5)) {
        let (store, cache, chain, _) = image(&layers);
        let host = host(&store, &cache);
        let (seen, model) = (walk(&host, &chain), merged(&layers));
        // Directories' link counts: overlayfs shows 1 for merged ones; the model's others differ where layers hide children.
        for (path, seen) in &seen {
            let same = Seen { nlink: 0, ..seen.clone() } == model.get(path).map(|m| Seen { nlink: 0, ..m.clone() }).unwrap_or_else(|| panic!("{path} should be hidden"));
            prop_assert!(same, "{}: {:?} is not {:?}", path, seen, model.get(path));
        }
        prop_assert_eq!(seen.keys().collect::<Vec<_>>(), model.keys().collect::<Vec<_>>());
    }

    #[test]
    fn listings_go_on_where_they_stopped(layers in proptest::collection::vec(entries(), 1..4), room in 1usize..5) {
        let (store, cache, chain, _) = image(&layers);
        let host = host(&store, &cache);
        let root = host.node(&chain);
        prop_assert_eq!(host.list_by(root, room).unwrap(), host.list_by(root, usize::MAX).unwrap());
    }
}

/// SEMANTICS: "A directory that several layers contribute to has a link count of 1."
#[test]
fn merged_directories_have_one_link_and_one_number() {
    let base = plain(&[
        ("d", TreeEntry::Directory),
        ("d/sub", TreeEntry::Directory),
        ("only", TreeEntry::Directory),
        ("only/x", TreeEntry::Directory),
    ]);
    let top = plain(&[("d", TreeEntry::Directory), ("d/f", file(b"1"))]);
    let (store, cache, chain, _) = image(&[base, top]);
    let host = host(&store, &cache);
    let merged = host.find(&format!("{chain}/d")).unwrap();
    assert_eq!((merged.nlink, host.find(&format!("{chain}/only")).unwrap().nlink), (1, 3));
    assert_eq!(host.find(&format!("{chain}/d")).unwrap(), merged);
    assert_eq!(host.names(&format!("{chain}/d")), ["f", "sub"]);
}

/// SEMANTICS: "Names of one file are one inode, and a file is the same inode in every chain."
#[test]
fn files_are_shared_between_chains_and_directories_are_not() {
    let base = plain(&[("d", TreeEntry::Directory), ("d/f", file(b"1")), ("g", TreeEntry::Hardlink("d/f".into()))]);
    let (store, cache, chain, diff_ids) = image(&[base.clone(), plain(&[("other", file(b"2"))])]);
    let second = store.image("second:v1", &[diff_ids[0], store.layer(&plain(&[("third", file(b"3"))]))]);
    let host = host(&store, &cache);
    let second = format!("chains/{}", second.hex());
    let layer = format!("layers/{}", diff_ids[0].hex());
    let number = host.node(&format!("{layer}/d/f"));
    for path in [format!("{layer}/g"), format!("{chain}/g"), format!("{chain}/d/f"), format!("{second}/d/f")] {
        assert_eq!(host.node(&path), number, "{path}");
    }
    let directories = [&layer, &chain, &second].map(|tree| host.node(&format!("{tree}/d")));
    assert!(directories[0] != directories[1] && directories[1] != directories[2]);
    assert_eq!(host.find(&format!("{layer}/g")).unwrap().nlink, 2);
}

/// SEMANTICS: "overlayfs' own attributes are shown where overlayfs needs them, and nowhere else."
#[test]
fn overlayfs_own_attributes() {
    let mut entries = plain(&[("d", TreeEntry::Opaque), ("f", file(b"1"))]);
    for (_, metadata, _) in &mut entries {
        metadata.xattrs.insert(b"trusted.overlay.redirect".to_vec(), b"/etc".to_vec());
        metadata.xattrs.insert(b"user.mine".to_vec(), b"1".to_vec());
    }
    let (store, cache, chain, diff_ids) = image(&[entries]);
    let host = host(&store, &cache);
    let names = |path: String| String::from_utf8(host.filesystem.xattr_names(host.node(&path)).unwrap()).unwrap();
    let layer = format!("layers/{}", diff_ids[0].hex());
    assert_eq!(names(format!("{layer}/d")), "trusted.overlay.opaque\0user.mine\0");
    assert_eq!(names(format!("{layer}/f")), "user.mine\0");
    assert_eq!(names(format!("{chain}/d")), "user.mine\0");
    let hidden = host.filesystem.xattr(host.node(&format!("{chain}/d")), b"trusted.overlay.opaque");
    assert_eq!(hidden, Err(Failure::NoAttribute));
}

/// SEMANTICS: "`images/<repository>/<tag>` is a link to the chain that the tag means now."
#[test]
fn tags_are_links_and_move() {
    let (store, cache, _, diff_ids) = image(&[plain(&[("f", file(b"1"))])]);
    store.image("127.0.0.1:5000/team/app:v2", &diff_ids);
    let host = host(&store, &cache);
    assert_eq!(BTreeSet::from_iter(host.names("images")), BTreeSet::from(["127.0.0.1:5000", "app"].map(String::from)));
    assert_eq!(host.names("images/127.0.0.1:5000/team/app"), ["v2"]);
    let target = |path: &str| String::from_utf8(host.filesystem.link_target(host.node(path)).unwrap()).unwrap();
    assert_eq!(target("images/app/v1"), format!("../../trees/{}", diff_ids[0].hex()));
    assert!(target("images/127.0.0.1:5000/team/app/v2").starts_with("../../../../trees/"));
    let before = host.node("images/app/v1");
    let listing = host.find("images/app").unwrap();
    assert_eq!(listing.lifetime(), Lifetime::None, "or the kernel would not see that the listing is another one");
    let moved = store.image("app:v1", &[store.layer(&plain(&[("f", file(b"2"))]))]);
    let _ = host.find("images/app/other");
    assert_eq!(target("images/app/v1"), format!("../../trees/{}", moved.hex()));
    assert!(host.find("images/app").unwrap().mtime > listing.mtime);
    assert_ne!(host.node("images/app/v1"), before, "the kernel may have kept the old link's target");
}

#[test]
fn a_listing_of_images_that_changes_meanwhile_skips_and_repeats_no_name() {
    let (store, cache, _, diff_ids) = image(&[plain(&[("f", file(b"1"))])]);
    for number in 0..20 {
        store.image(&format!("a{number}:1"), &diff_ids);
    }
    let host = host(&store, &cache);
    let (directory, mut seen, mut offset) = (host.node("images"), Vec::new(), 0);
    for round in 0.. {
        let (before, from) = (seen.len(), offset);
        let give = &mut |entry: super::node::Listed<'_>| {
            if seen.len() >= before + 3 {
                return super::node::ReplyRoom::Full;
            }
            offset = entry.offset;
            seen.push(String::from_utf8(entry.name.to_vec()).unwrap());
            super::node::ReplyRoom::Left
        };
        host.filesystem.list(directory, from, super::node::Detail::Names, give).unwrap();
        if seen.len() == before {
            break;
        }
        // Names before and behind those that were given come between two calls.
        store.image(&format!("0-{round}:1"), &diff_ids);
        store.image(&format!("z-{round}:1"), &diff_ids);
        host.refresh_catalogue().unwrap();
    }
    let all = seen.len();
    let seen = BTreeSet::from_iter(seen);
    assert_eq!(seen.len(), all, "no name twice");
    assert!((0..20).all(|number| seen.contains(&format!("a{number}"))) && seen.contains("app"), "{seen:?}");
}

/// SEMANTICS: "An image can be used on every host the moment its pull has ended."
#[test]
fn what_was_published_a_moment_ago_is_found() {
    let store = TestStore::new();
    let cache = tempfile::tempdir().unwrap();
    let host = host(&store, &cache);
    assert_eq!(host.find("images/app").unwrap_err(), Failure::Absent);
    let layer = store.layer(&plain(&[("f", file(b"1"))]));
    assert_eq!(host.content(&format!("layers/{}/f", layer.hex())).unwrap(), b"1", "in the store, if in no image yet");
    let chain = store.image("app:v1", &[layer]);
    assert_eq!(host.content(&format!("chains/{}/f", chain.hex())).unwrap(), b"1");
    assert!(host.find("images/app/v1").is_ok());
    for absent in [
        format!("layers/{}", Digest::of(b"?").hex()),
        format!("chains/{}", Digest::of(b"?").hex()),
        "layers/x".into(),
        "images/.x".into(),
        "x".into(),
    ] {
        assert_eq!(host.find(&absent).unwrap_err(), Failure::Absent, "{absent}");
    }
}

/// SEMANTICS: "With the shared disk away, a host mounts, lists, and reads what it has read before."
#[test]
fn a_host_starts_without_the_shared_disk() {
    let (store, cache, chain, _) = image(&[plain(&[("f", file(b"1"))]), plain(&[("g", file(b"2"))])]);
    let first = host(&store, &cache);
    assert_eq!(first.content(&format!("{chain}/f")).unwrap(), b"1");
    first.settle();
    drop((first, store));
    let second = Host::start(std::path::Path::new("/nowhere"), cache.path(), LIMIT, TIMEOUT);
    assert_eq!(second.names("images/app"), ["v1"]);
    assert_eq!(second.names(&chain), ["f", "g"]);
    assert_eq!(second.content(&format!("{chain}/f")).unwrap(), b"1");
    assert_eq!(second.content(&format!("{chain}/g")), Err(Failure::TimedOut));
}

#[test]
fn a_damaged_index_copy_is_fetched_again() {
    let (store, cache, chain, _) = image(&[plain(&[("f", file(b"1"))])]);
    host(&store, &cache).node(&chain);
    let copies = crate::fixture::files(&cache.path().join("objects"));
    let mut bytes = std::fs::read(&copies[0]).unwrap();
    bytes[300] ^= 1;
    std::fs::write(&copies[0], bytes).unwrap();
    let host = host(&store, &cache);
    assert_eq!(host.names(&chain), ["f"]);
    assert_eq!((host.metrics.damaged_in_cache.get(), host.metrics.indexes_fetched.get()), (1, 1));
}

#[test]
fn a_hung_disk_holds_up_new_layers_only_so_long() {
    let (store, cache, chain, _) = image(&[plain(&[("f", file(b"1"))])]);
    let host = Host::start(store.dir.path(), cache.path(), LIMIT, TIMEOUT);
    host.disk.set(Health::Hanging);
    assert_eq!(host.find(&chain), Err(Failure::TimedOut));
    assert_eq!(host.find("images/other"), Err(Failure::TimedOut), "whether it is there cannot be said");
    assert!(host.find("images/app/v1").is_ok());
    host.disk.set(Health::Good);
    assert_eq!(host.names(&chain), ["f"]);
}

#[test]
fn seeks_find_data_and_holes() {
    let piece = store::chunk::PIECE_SIZE as usize;
    let mut content = vec![0; 4 * piece];
    content[piece..2 * piece].copy_from_slice(&noise(piece, 1));
    let (store, cache, chain, _) = image(&[plain(&[("f", file(&content))])]);
    let host = host(&store, &cache);
    let node = host.node(&format!("{chain}/f"));
    let seek = |offset: usize, aim| host.filesystem.seek(node, offset as u64, aim);
    let piece = piece as u64;
    assert_eq!(seek(0, Seek::Data), Ok(piece));
    assert_eq!(seek(piece as usize + 5, Seek::Data), Ok(piece + 5));
    assert_eq!(seek(piece as usize, Seek::Hole), Ok(2 * piece));
    assert_eq!(seek(3, Seek::Hole), Ok(3));
    assert_eq!(seek(2 * piece as usize, Seek::Data), Err(Failure::NoData));
    assert_eq!(seek(4 * piece as usize, Seek::Hole), Err(Failure::NoData));
}

#[test]
fn wrong_kinds_and_foreign_numbers_are_errors() {
    let (store, cache, chain, diff_ids) =
        image(&[plain(&[("f", file(b"1")), ("l", TreeEntry::Symlink(b"f".to_vec()))])]);
    let host = host(&store, &cache);
    let [f, l, root] = ["f", "l", ""].map(|name| host.node(&format!("{chain}/{name}")));
    assert_eq!(host.lookup(f, b"x"), Err(Failure::NotDirectory));
    assert_eq!(host.list_by(f, 1), Err(Failure::NotDirectory));
    assert_eq!(host.read(root, 0, 1), Err(Failure::IsDirectory));
    assert_eq!(host.read(l, 0, 1), Err(Failure::WrongKind));
    assert_eq!(host.filesystem.link_target(f), Err(Failure::WrongKind));
    for number in [0, 99, 7 << 32, (1 << 32) | 99, u64::MAX, 1 << 32] {
        let node = Node::from_number(number);
        assert!(host.filesystem.attributes(node).is_err(), "{number:#x}");
        assert!(host.read(node, 0, 1).is_err() && host.list_by(node, 1).is_err() && host.lookup(node, b"f").is_err());
    }
    let unseen = host
        .list_by(host.node("layers"), 9)
        .unwrap()
        .into_iter()
        .find(|(name, ..)| *name == diff_ids[0].hex().as_bytes());
    assert_eq!(host.filesystem.attributes(unseen.unwrap().1).map(|a| a.size), Ok(4096));
}

/// SEMANTICS: the table of errors.
#[test]
fn the_errno_table_is_the_one_in_the_book() {
    let book = include_str!("../../SEMANTICS.md");
    let rows: BTreeMap<_, _> = book
        .lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix("| `")?.split('|');
            Some((cells.next()?.trim().trim_end_matches('`').to_owned(), cells.next()?.trim().to_owned()))
        })
        .collect();
    let all = [
        Failure::Absent,
        Failure::UnknownNode,
        Failure::NotDirectory,
        Failure::IsDirectory,
        Failure::WrongKind,
        Failure::NoAttribute,
        Failure::TooSmall,
        Failure::NoData,
        Failure::TimedOut,
        Failure::Unreachable,
        Failure::Damaged,
        Failure::NoRoom,
    ];
    assert_eq!(rows.len(), all.len());
    for failure in all {
        let errno = format!("{:?}", nix::errno::Errno::from_raw(failure.errno()));
        assert_eq!(rows[&format!("{failure:?}")], errno);
    }
}

#[test]
fn every_statement_of_the_book_is_quoted_by_a_test() {
    let tests = [
        include_str!("tests.rs"),
        include_str!("io_mode.rs"),
        include_str!("../content/cache/tests.rs"),
        include_str!("../source/catalogue/tests.rs"),
        include_str!("../content/indexes/tests.rs"),
        include_str!("../../../tests/tests/local_users.rs"),
        include_str!("../content/cache/whole/tests.rs"),
        include_str!("../content/prefetch/tests.rs"),
        include_str!("kernel_state/tests.rs"),
        include_str!("../mount/native_trees.rs"),
        include_str!("../../../tests/tests/killed.rs"),
        include_str!("../../../tests/tests/native_trees.rs"),
        include_str!("../../../tests/tests/open_modes.rs"),
        include_str!("../../../tests/tests/prefetch.rs"),
        include_str!("../../../tests/tests/programs32.rs"),
        include_str!("../../../tests/tests/reading.rs"),
        include_str!("../../../tests/tests/slowdisk.rs"),
    ]
    .concat();
    let statements: Vec<_> = include_str!("../../SEMANTICS.md")
        .lines()
        .filter_map(|line| line.strip_prefix("**")?.split("**").next())
        .collect();
    assert!(statements.len() > 10);
    for statement in statements {
        assert!(tests.contains(&format!("\"{statement}\"")), "no test quotes: {statement}");
    }
}
