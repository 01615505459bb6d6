//! The index against the tree it was made from.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn facts() -> LayerFacts {
    LayerFacts { diff_id: Digest::of(b"tar"), tar_size: 10240, recipe_len: 5, recipe_digest: ContentDigest::of(b"r") }
}

fn chunk(n: u8, raw_len: u32) -> ChunkRef {
    let pack = ContentDigest::of(&[n % 2]);
    ChunkRef {
        pack,
        offset: 16 * u64::from(n),
        stored_len: 9,
        raw_len,
        codec: Codec::Zstd,
        digest: ContentDigest::of(&[n]),
    }
}

fn directory() -> NodeKind {
    NodeKind::Directory
}

fn small_tree() -> (LayerTree, Vec<ChunkRef>) {
    let mut tree = LayerTree::new();
    let etc = tree.insert(ROOT, b"etc", Metadata { permissions: 0o755, ..Metadata::default() }, directory());
    let content = FileContent {
        digest: ContentDigest::of(b"hello"),
        size: 5,
        pieces: vec![PieceSource::Chunk { chunk: 1, start: 3 }],
    };
    let xattrs = BTreeMap::from([(b"user.k".to_vec(), b"v".to_vec())]);
    let file = tree.insert(
        etc,
        b"motd",
        Metadata { permissions: 0o4644, uid: 7, mtime: -1, mtime_nsec: 9, xattrs, ..Metadata::default() },
        NodeKind::File(content),
    );
    tree.link(ROOT, b"same", file);
    tree.insert(ROOT, b"gone", Metadata::default(), NodeKind::Special(S_IFCHR, 0, 0));
    tree.insert(ROOT, b"link", Metadata::default(), NodeKind::Symlink(b"etc/motd".to_vec()));
    let large = FileContent {
        digest: ContentDigest::of(b"large"),
        size: 2 * u64::from(crate::chunk::PIECE_SIZE) + 1,
        pieces: vec![
            PieceSource::Hole,
            PieceSource::Chunk { chunk: 0, start: 0 },
            PieceSource::Chunk { chunk: 2, start: 0 },
        ],
    };
    tree.insert(etc, b"large", Metadata::default(), NodeKind::File(large));
    (tree, vec![chunk(0, crate::chunk::PIECE_SIZE), chunk(1, 100), chunk(2, 1)])
}

#[test]
fn what_was_put_in_is_read_in_place() {
    let (tree, chunks) = small_tree();
    let raw = tree.encode(&facts(), &chunks).unwrap();
    let sealed = seal(&raw).unwrap();
    assert_eq!(unseal(&sealed, &facts().diff_id).unwrap(), raw);
    assert!(unseal(&sealed, &Digest::of(b"other")).is_err());
    let index = LayerIndex::from_bytes(raw).unwrap();
    let root = index.inode(ROOT).unwrap();
    let names: Vec<_> = index.entries(&root, 0).map(|e| e.unwrap().name.to_vec()).collect();
    assert_eq!(names, [&b"etc"[..], b"gone", b"link", b"same"]);
    assert_eq!((root.nlink, root.is_implicit()), (3, true));
    let motd = index.resolve(b"/etc/motd").unwrap().unwrap();
    assert_eq!(index.resolve(b"same").unwrap(), Some(motd));
    let inode = index.inode(motd).unwrap();
    assert_eq!((inode.mode, inode.uid, inode.nlink, inode.mtime, inode.mtime_nsec), (0o104644, 7, 2, -1, 9));
    assert_eq!(index.xattrs(&inode).collect::<Result<Vec<_>>>().unwrap(), [(b"user.k"[..].into(), b"v"[..].into())]);
    let piece = index.piece(&inode, 0).unwrap();
    assert_eq!((piece.offset, piece.len, piece.digest), (0, 5, ContentDigest::of(b"hello")));
    assert!(index.inode(index.resolve(b"gone").unwrap().unwrap()).unwrap().is_whiteout());
    let link = index.inode(index.resolve(b"link").unwrap().unwrap()).unwrap();
    assert_eq!(*index.link_target(&link).unwrap(), *b"etc/motd");
    let large = index.inode(index.resolve(b"etc/large").unwrap().unwrap()).unwrap();
    assert_eq!(index.piece(&large, 0).unwrap().source, Source::Hole);
    assert_eq!(index.piece(&large, 2).unwrap().len, 1);
    assert_eq!(index.piece(&large, 2).unwrap().digest, chunk(2, 1).digest);
    assert!(index.piece(&large, 3).is_err());
    assert_eq!(index.header().content_size, 5 + large.size);
}

#[test]
fn names_that_go_take_what_lies_below_them_and_are_not_counted() {
    let mut tree = LayerTree::new();
    let dir = tree.insert(ROOT, b"dir", Metadata::default(), directory());
    let file = tree.insert(dir, b"file", Metadata::default(), NodeKind::File(FileContent::empty()));
    tree.link(ROOT, b"other", file);
    tree.link(ROOT, b"third", file);
    tree.remove(ROOT, b"third");
    tree.remove(ROOT, b"absent");
    assert_eq!((tree.child(ROOT, b"third"), tree.child(ROOT, b"absent")), (None, None));
    tree.insert(ROOT, b"dir", Metadata::default(), NodeKind::Symlink(b"other".to_vec()));
    let index = LayerIndex::from_bytes(tree.encode(&facts(), &[]).unwrap()).unwrap();
    let root = index.inode(ROOT).unwrap();
    let names: Vec<_> = index.entries(&root, 0).map(|entry| entry.unwrap().name.to_vec()).collect();
    assert_eq!(names, [&b"dir"[..], b"other"]);
    assert_eq!((root.nlink, index.inode(file).unwrap().nlink, index.inode(dir).unwrap().nlink), (2, 1, 0));
}

#[test]
fn an_index_is_sealed_and_checked_without_being_whole_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("index");
    let (tree, chunks) = small_tree();
    let raw = small_tree().0.encode(&facts(), &chunks).unwrap();
    let index = tree.finish(&facts(), &chunks).unwrap();
    write_sealed(&path, |out| index.write(out)).unwrap();
    let sealed = std::fs::read(&path).unwrap();
    let unsealed = unseal(&sealed, &facts().diff_id).unwrap();
    assert_eq!(unsealed, raw);
    let (header, packs) = check_sealed(&sealed[..], &facts().diff_id).unwrap();
    let index = LayerIndex::from_bytes(raw).unwrap();
    assert_eq!(header, *index.header());
    assert_eq!(packs, (0..2).map(|n| index.pack(n).unwrap()).collect::<Vec<_>>());
    assert!(check_sealed(&sealed[..], &Digest::of(b"other")).is_err());
    assert!(write_sealed(&path, |_| Ok(())).is_err(), "what is there is not overwritten");
    for at in (0..sealed.len()).filter(|at| !(12..16).contains(at) && !(24..32).contains(at)) {
        let mut damaged = sealed.clone();
        damaged[at] ^= 0x10;
        // A bit that zstd ignores may flip; what comes out is then the same.
        if check_sealed(&damaged[..], &facts().diff_id).is_ok() {
            assert_eq!(unseal(&damaged, &facts().diff_id).unwrap(), unsealed, "byte {at}");
        }
        assert!(check_sealed(&sealed[..at], &facts().diff_id).is_err() || at > sealed.len() - 4, "cut at {at}");
    }
}

#[test]
fn equal_attributes_are_kept_once_and_the_length_is_known_before() {
    let mut tree = LayerTree::new();
    let value = vec![7; 60_000];
    let xattrs = BTreeMap::from([(b"user.a".to_vec(), value.clone()), (b"user.b".to_vec(), vec![8])]);
    let files: Vec<_> = (0..1000u32)
        .map(|n| {
            let metadata = Metadata { xattrs: xattrs.clone(), ..Metadata::default() };
            tree.insert(ROOT, &n.to_be_bytes().map(|b| b | 1), metadata, NodeKind::File(FileContent::empty()))
        })
        .collect();
    let dir = tree.insert(ROOT, b"d", Metadata { xattrs, ..Metadata::default() }, directory());
    tree.set_opaque(dir);
    tree.set_opaque(dir);
    assert!(tree.has_xattr(dir, b"user.a") && tree.has_xattr(dir, OPAQUE_XATTR) && !tree.has_xattr(dir, b"user"));
    tree.set_metadata(dir, Metadata { uid: 5, ..Metadata::default() });
    let expected = tree.encoded_len(0);
    let raw = tree.encode(&facts(), &[]).unwrap();
    assert_eq!(raw.len() as u64, expected);
    assert!(raw.len() < 300_000, "{} bytes for a thousand files that share an attribute", raw.len());
    let index = LayerIndex::from_bytes(raw).unwrap();
    let inode = index.inode(files[999]).unwrap();
    let found: Vec<_> = index.xattrs(&inode).map(Result::unwrap).collect();
    let found: Vec<(&[u8], &[u8])> = found.iter().map(|(name, value)| (name.as_ref(), value.as_ref())).collect();
    assert_eq!(found, [(&b"user.a"[..], &value[..]), (b"user.b", &[8][..])]);
    let dir = index.inode(dir).unwrap();
    assert!(index.is_opaque(&dir).unwrap() && dir.uid == 5, "a directory that was opaque stays so");
    assert_eq!(index.xattrs(&dir).count(), 1, "and loses what its last entry has not");
}

#[test]
fn wanted_inodes_are_named() {
    let (tree, chunks) = small_tree();
    let index = LayerIndex::from_bytes(tree.encode(&facts(), &chunks).unwrap()).unwrap();
    let of = |path: &[u8]| index.resolve(path).unwrap().unwrap();
    let wanted = [of(b"etc/large"), of(b"same"), of(b"link"), of(b"etc")].into();
    let mut names = index.paths(wanted).unwrap();
    let linked = names.remove(&of(b"same")).unwrap();
    assert!(linked == b"same" || linked == b"etc/motd", "either name of a hard link will do: {linked:?}");
    let expected = [(of(b"etc/large"), b"etc/large".to_vec()), (of(b"link"), b"link".to_vec())];
    assert_eq!(names, expected.into(), "files have names; directories are not files");
    assert!(index.paths([InodeIndex(u32::MAX)].into()).unwrap().is_empty(), "what has no name is left out");
}

#[test]
fn implied_directories_are_as_mkdir_makes_them() {
    let mut tree = LayerTree::new();
    let setgid = Metadata { permissions: 0o2770, gid: 5, ..Metadata::default() };
    let shared = tree.insert(ROOT, b"shared", setgid, directory());
    let inner = tree.make_implicit(shared, b"inner");
    tree.make_implicit(inner, b"innermost");
    tree.make_implicit(ROOT, b"plain");
    let index = LayerIndex::from_bytes(tree.encode(&facts(), &[]).unwrap()).unwrap();
    let mode = |path: &[u8]| index.inode(index.resolve(path).unwrap().unwrap()).unwrap().mode;
    assert_eq!((mode(b"shared/inner"), mode(b"shared/inner/innermost")), (0o042755, 0o042755));
    assert_eq!(mode(b"plain"), 0o040755);
}

#[test]
fn golden_header() {
    let (tree, chunks) = small_tree();
    let raw = tree.encode(&facts(), &chunks).unwrap();
    assert_eq!(&raw[..16], b"CFSLAYER\x01\0\0\0\0\0\x04\0");
    assert_eq!(&raw[40..72], facts().diff_id.as_bytes());
    assert_eq!(raw[72..80], 10240u64.to_le_bytes());
    let counts: Vec<_> = raw[128..156].chunks(4).map(|c| u32::from_le_bytes(c.try_into().unwrap())).collect();
    assert_eq!(counts[..6], [6, 6, 1, 4, 3, 2]);
    assert_eq!(raw.len(), HEADER_LEN + 6 * 96 + 6 * 12 + 16 + 4 * 16 + 3 * 56 + 2 * 32 + counts[6] as usize);
}

#[test]
fn a_replaced_file_keeps_its_bytes_for_the_recipe() {
    let mut tree = LayerTree::new();
    let content = |n: &[u8]| NodeKind::File(FileContent { digest: ContentDigest::of(n), size: 0, pieces: vec![] });
    let dir = tree.insert(ROOT, b"d", Metadata::default(), directory());
    let first = tree.insert(dir, b"f", Metadata::default(), content(b"1"));
    let second = tree.insert(ROOT, b"d", Metadata::default(), content(b"2"));
    let index = LayerIndex::from_bytes(tree.encode(&facts(), &[]).unwrap()).unwrap();
    assert_eq!(index.inode(first).unwrap().nlink, 0);
    assert_eq!(index.inode(first).unwrap().content_digest(), ContentDigest::of(b"1"));
    assert_eq!(index.resolve(b"d").unwrap(), Some(second));
}

/// Pages in memory; if the flag is set, all but the first cannot be read.
struct Given(Vec<u8>, bool);

impl Pages for Given {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn read(&self, offset: usize, len: usize, take: &mut dyn FnMut(&[u8])) -> std::io::Result<()> {
        if self.1 && offset > 0 {
            return Err(std::io::Error::other("bad block"));
        }
        take(&self.0[offset..offset + len]);
        Ok(())
    }
}

#[test]
fn an_index_that_is_read_in_blocks_says_the_same_and_a_bad_block_is_an_error() {
    let (tree, chunks) = small_tree();
    let raw = tree.encode(&facts(), &chunks).unwrap();
    let whole = LayerIndex::from_bytes(raw.clone()).unwrap();
    let paged = LayerIndex::paged(Arc::new(Given(raw.clone(), false))).unwrap();
    walk(&paged).unwrap();
    for number in 0..whole.inode_count() {
        let inode = whole.inode(InodeIndex(number)).unwrap();
        assert_eq!(paged.inode(InodeIndex(number)).unwrap(), inode);
        let entries = |index: &LayerIndex| -> Vec<_> {
            index.entries(&inode, 0).map(|entry| entry.map(|e| (e.name.to_vec(), e.inode)).unwrap()).collect()
        };
        assert_eq!(entries(&paged), entries(&whole));
        for (name, child) in entries(&whole) {
            assert_eq!(paged.lookup(&inode, &name).unwrap(), Some(child));
        }
    }
    let error = LayerIndex::paged(Arc::new(Given(raw, true))).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
}

#[test]
fn a_sealed_index_tells_its_length_and_is_unpacked_in_steps() {
    let (tree, chunks) = small_tree();
    let raw = tree.encode(&facts(), &chunks).unwrap();
    let sealed = seal(&raw).unwrap();
    let index = SealedIndex::new(sealed.clone(), facts().diff_id).unwrap();
    assert_eq!((index.raw_len(), index.digest()), (raw.len() as u64, ContentDigest::of(&raw)));
    let mut unpacked = Vec::new();
    index.unpack_into(&mut unpacked).unwrap().unwrap();
    assert_eq!(unpacked, raw);
    struct Full;
    impl std::io::Write for Full {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    assert!(index.unpack_into(&mut Full).unwrap().is_err(), "that is the sink's fault");
    let mut lies = sealed;
    lies[16] ^= 1;
    assert!(SealedIndex::new(lies, facts().diff_id).unwrap().unpack_into(&mut Vec::new()).is_err());
}

/// Touches everything an index holds.
fn walk(index: &LayerIndex) -> Result<()> {
    for number in 0..index.inode_count() {
        let inode = index.inode(InodeIndex(number))?;
        for entry in index.entries(&inode, 0) {
            entry?;
        }
        for xattr in index.xattrs(&inode) {
            xattr?;
        }
        if inode.is_symlink() {
            index.link_target(&inode)?;
        }
        for piece in 0..inode.piece_count().min(1000) {
            index.piece(&inode, piece)?;
        }
        index.lookup(&inode, b"motd")?;
    }
    Ok(())
}

proptest! {
    #[test]
    fn damage_is_an_error_and_never_a_panic(flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8), cut in any::<prop::sample::Index>()) {
        let (tree, chunks) = small_tree();
        let whole = tree.encode(&facts(), &chunks).unwrap();
        let mut raw = whole.clone();
        for (at, byte) in &flips {
            let at = at.index(raw.len());
            raw[at] = *byte;
        }
        // A wrong number of records may fit a cut by chance. The seal finds that; here it must only not lead to a
        // panic.
        for raw in [raw.clone(), raw[..cut.index(raw.len())].to_vec()] {
            if let Ok(index) = LayerIndex::from_bytes(raw) {
                let _ = walk(&index);
            }
        }
        prop_assert!(LayerIndex::from_bytes(whole[..cut.index(whole.len())].to_vec()).is_err());
    }

    #[test]
    fn every_name_is_found(names in proptest::collection::btree_set(proptest::collection::vec(1u8..=255, 1..20), 0..200)) {
        let mut tree = LayerTree::new();
        let numbers: Vec<_> = names.iter().map(|name| tree.insert(ROOT, name, Metadata::default(), directory())).collect();
        let index = LayerIndex::from_bytes(tree.encode(&facts(), &[]).unwrap()).unwrap();
        let root = index.inode(ROOT).unwrap();
        for (name, number) in names.iter().zip(numbers) {
            prop_assert_eq!(index.lookup(&root, name).unwrap(), Some(number));
        }
        prop_assert_eq!(index.lookup(&root, b"").unwrap(), None);
        prop_assert_eq!(root.nlink as usize, 2 + names.len());
    }
}
