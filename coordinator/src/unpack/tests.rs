//! The unpacker against the `tar` crate's writer, and against hostile streams.

use std::io::Read;

use proptest::prelude::*;
use store::layer::{Inode, LayerIndex};
use store::publisher::create;
use store::reader::Store;

use super::*;

fn new_store() -> (tempfile::TempDir, Publisher) {
    let dir = tempfile::tempdir().unwrap();
    create(dir.path()).unwrap();
    let publisher = Publisher::open(dir.path(), "test").unwrap();
    (dir, publisher)
}

fn unpack_bytes(
    publisher: &Publisher,
    locations: &dyn ChunkLocations,
    tar: &[u8],
) -> Result<UnpackedLayer, UnpackError> {
    unpack_layer(publisher, locations, tar, &Expect { diff_id: Digest::of(tar) })
}

fn round_trip(tar: &[u8]) -> (tempfile::TempDir, Store, LayerIndex) {
    let (dir, publisher) = new_store();
    unpack_bytes(&publisher, &NoLocations, tar).unwrap();
    let store = publisher.store().clone();
    let mut back = Vec::new();
    write_layer_tar(&store, &Digest::of(tar), &mut back).unwrap();
    assert!(back == tar, "the tar stream comes back byte for byte");
    let index = store.index(&Digest::of(tar)).unwrap();
    (dir, store, index)
}

fn at(index: &LayerIndex, path: &str) -> Inode {
    let number = index.resolve(path.as_bytes()).unwrap().unwrap_or_else(|| panic!("{path} is missing"));
    index.inode(number).unwrap()
}

fn header(kind: ::tar::EntryType, size: u64) -> ::tar::Header {
    let mut header = ::tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(0o4755);
    header.set_uid(3);
    header.set_gid(4);
    header.set_mtime(1_000_000_000);
    header.set_size(size);
    header
}

use ::tar::EntryType as T;

/// A file capability in the kernel's form, with a line feed in it.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// A tar of (type, name, link target or content).
fn tar_of(entries: &[(T, &str, &[u8])]) -> Vec<u8> {
    let mut builder = ::tar::Builder::new(Vec::new());
    for (kind, name, data) in entries {
        let is_link = matches!(kind, T::Link | T::Symlink);
        let mut header = header(*kind, if is_link { 0 } else { data.len() as u64 });
        if is_link {
            header.set_link_name_literal(data).unwrap();
        }
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        builder.append(&header, if is_link { &[][..] } else { data }).unwrap();
    }
    builder.into_inner().unwrap()
}

#[test]
fn entries_become_overlayfs_inodes() {
    let tar = tar_of(&[
        (T::Directory, "etc/", b""),
        (T::Regular, "etc/hosts", b"localhost"),
        (T::Link, "same", b"etc/hosts"),
        (T::Symlink, "link", b"/etc"),
        (T::Regular, "link/new", b"through the link"),
        (T::Regular, "deep/er/f", b""),
        (T::Regular, ".wh.gone", b""),
        (T::Regular, "etc/.wh..wh..opq", b""),
        (T::Fifo, "fifo", b""),
        (T::Regular, "/abs/olute", b"x"),
    ]);
    let (_dir, _store, index) = round_trip(&tar);
    let hosts = at(&index, "etc/hosts");
    assert_eq!((hosts.mode, hosts.uid, hosts.gid, hosts.nlink, hosts.size), (0o104755, 3, 4, 2, 9));
    assert_eq!(hosts.mtime, 1_000_000_000);
    assert_eq!(at(&index, "link").mode, 0o120777);
    assert_eq!(at(&index, "etc/new").size, 16, "a path through a link ends where a chroot would");
    assert!(at(&index, "deep/er").is_implicit() && !at(&index, "etc").is_implicit());
    assert!(at(&index, "gone").is_whiteout());
    assert!(index.is_opaque(&at(&index, "etc")).unwrap());
    assert!(index.resolve(b".wh.gone").unwrap().is_none());
    assert_eq!(at(&index, "abs/olute").size, 1);
}

#[test]
fn pax_and_gnu_extensions_are_understood() {
    let long = format!("{}/{}", "d".repeat(200), "é".repeat(120));
    let mut builder = ::tar::Builder::new(Vec::new());
    builder
        .append_pax_extensions([
            ("path", long.as_bytes()),
            ("mtime", &b"5.25"[..]),
            ("uid", &b"70000"[..]),
            ("SCHILY.xattr.security.capability", &CAPABILITY[..]),
            ("SCHILY.xattr.trusted.overlay.redirect", &b"/etc"[..]),
        ])
        .unwrap();
    builder
        .append(
            &{
                let mut h = header(T::Regular, 3);
                h.set_path("short").unwrap();
                h.set_cksum();
                h
            },
            &b"abc"[..],
        )
        .unwrap();
    let mut gnu = header(T::Regular, 0);
    builder.append_data(&mut gnu, "g/".repeat(120) + "f", &b""[..]).unwrap();
    let (_dir, _store, index) = round_trip(&builder.into_inner().unwrap());
    let file = at(&index, &long);
    assert_eq!((file.mtime, file.mtime_nsec, file.uid, file.size), (5, 250_000_000, 70000, 3));
    let xattrs: Vec<_> = index.xattrs(&file).map(|x| x.unwrap()).collect();
    assert_eq!(xattrs, [(b"security.capability"[..].into(), CAPABILITY[..].into())]);
    assert!(at(&index, &("g/".repeat(120) + "f")).is_file());
}

#[test]
fn large_and_sparse_content_is_cut_deduplicated_and_given_back() {
    let mut large = vec![0; 600 << 10];
    large[400 << 10..].iter_mut().enumerate().for_each(|(i, b)| *b = ((i * i) >> 3) as u8);
    let tar = tar_of(&[
        (T::Regular, "a", &large),
        (T::Regular, "b", &large),
        (T::Regular, "s", b"small"),
        (T::Regular, "t", b"small"),
    ]);
    let (dir, publisher) = new_store();
    let locations = MemoryLocations::default();
    let first = unpack_bytes(&publisher, &locations, &tar).unwrap();
    assert_eq!(first.published, Published::New);
    assert_eq!(first.deduplicated, (600 << 10) - (256 << 10) + 5);
    let index = publisher.store().index(&Digest::of(&tar)).unwrap();
    assert_eq!(index.piece(&at(&index, "a"), 0).unwrap().source, store::layer::Source::Hole);
    let again = tar_of(&[(T::Regular, "other", &large), (T::Regular, "s", b"small")]);
    let second = unpack_bytes(&publisher, &locations, &again).unwrap();
    assert_eq!(second.deduplicated, (600 << 10) - (256 << 10) + 5);
    let packs = walk_files(&dir.path().join("packs"));
    assert_eq!(packs, 1, "a layer that brings nothing new has no pack");
    let mut back = Vec::new();
    write_layer_tar(publisher.store(), &Digest::of(&again), &mut back).unwrap();
    assert_eq!(back, again);
    assert_eq!(unpack_bytes(&publisher, &locations, &tar).unwrap().published, Published::AlreadyPresent);
}

fn walk_files(dir: &std::path::Path) -> usize {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    entries.map(|e| if e.file_type().unwrap().is_dir() { walk_files(&e.path()) } else { 1 }).sum()
}

/// A sparse file of a megabyte with five bytes of data, at 4096 and at 900000, in one of PAX's three forms.
fn sparse(records: &[(&str, &str)], map: &[u8]) -> Vec<u8> {
    let mut builder = ::tar::Builder::new(Vec::new());
    builder.append_pax_extensions(records.iter().map(|(key, value)| (*key, value.as_bytes()))).unwrap();
    let content = [map, b"abcde"].concat();
    let mut header = header(T::Regular, content.len() as u64);
    header.set_path("GNUSparseFile.0/s").unwrap();
    header.set_cksum();
    builder.append(&header, &content[..]).unwrap();
    builder.into_inner().unwrap()
}

#[test]
fn sparse_files_are_expanded_in_each_of_three_ways() {
    let (name, size) = (("GNU.sparse.name", "s"), ("GNU.sparse.size", "1048576"));
    let one = [("GNU.sparse.offset", "4096"), ("GNU.sparse.numbytes", "3")];
    let other = [("GNU.sparse.offset", "900000"), ("GNU.sparse.numbytes", "2")];
    let single = [[name, size, ("GNU.sparse.numblocks", "2")].as_slice(), &one, &other].concat();
    let list = [name, size, ("GNU.sparse.numblocks", "2"), ("GNU.sparse.map", "4096,3,900000,2")];
    let before = [name, ("GNU.sparse.realsize", "1048576"), ("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0")];
    let mut map = b"2\n4096\n3\n900000\n2\n".to_vec();
    map.resize(512, 0);
    for tar in [sparse(&single, b""), sparse(&list, b""), sparse(&before, &map)] {
        let (_dir, _store, index) = round_trip(&tar);
        let file = at(&index, "s");
        let mut expected = vec![0; 1 << 20];
        expected[4096..4099].copy_from_slice(b"abc");
        expected[900_000..900_002].copy_from_slice(b"de");
        assert_eq!((file.size, file.content_digest()), (1 << 20, ContentDigest::of(&expected)));
    }
}

#[test]
fn a_tar_may_end_with_the_content_of_its_last_file() {
    let whole = tar_of(&[(T::Regular, "f", &[7; 600])]);
    for end in [512 + 600, 512 + 600 + 100, 512 + 1024, 512 + 1024 + 512] {
        let (_dir, _store, index) = round_trip(&whole[..end]);
        assert_eq!(at(&index, "f").size, 600, "cut at {end}");
    }
}

#[test]
fn hostile_streams_are_refused_with_the_entrys_name() {
    let (_dir, publisher) = new_store();
    let fails = |tar: &[u8], part: &str| {
        let error = unpack_bytes(&publisher, &NoLocations, tar).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        assert!(!publisher.store().has_layer(&Digest::of(tar)).unwrap());
    };
    fails(&tar_of(&[(T::Regular, "../../etc/passwd", b"x")]), r#""../../etc/passwd" climbs out"#);
    fails(&tar_of(&[(T::Link, "l", b"none")]), "hard link to a file that the layer does not have");
    fails(
        &tar_of(&[(T::Symlink, "a", b"b"), (T::Symlink, "b", b"a"), (T::Regular, "a/f", b"")]),
        "loop of symbolic links",
    );
    fails(&tar_of(&[(T::Regular, "f", b""), (T::Regular, "f/g", b"")]), "not a directory");
    fails(&tar_of(&[(T::Regular, ".wh...", b"")]), "whiteout of nothing");
    fails(&tar_of(&[(T::Regular, "f", b""), (T::Regular, ".wh.f", b"")]), "whiteout of what the layer itself has");
    fails(&tar_of(&[(T::Regular, ".wh.d", b""), (T::Regular, "d/f", b"")]), "not a directory");
    fails(&tar_of(&[(T::Symlink, "l", b"none"), (T::Regular, "l/f", b"")]), "behind a symbolic link to nothing");
    fails(&tar_of(&[(T::Regular, "f", b""), (T::Regular, "./f", b"")]), "named a second time");
    fails(&tar_of(&[(T::Continuous, "f", b"")]), "a type that Docker refuses");
    fails(&tar_of(&[(T::GNUSparse, "f", b"")]), "the old way of GNU tar");
    fails(&tar_of(&[(T::Regular, "f", &[7; 600])])[..800], "in the middle of an entry");
    fails(b"not a tar at all", "in the middle of a header");
    fails(&[b'x'; 512], "checksum");
    let mut huge = header(T::XHeader, 1 << 40);
    huge.set_cksum();
    fails(huge.as_bytes(), "longer than 1 MiB");
}

#[test]
fn a_wrong_diff_id_or_a_broken_stream_publishes_nothing() {
    struct Breaks(Vec<u8>);
    impl Read for Breaks {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            if self.0.is_empty() {
                Err(io::Error::other("the wire was cut"))
            } else {
                let n = out.len().min(self.0.len()).min(700);
                out[..n].copy_from_slice(&self.0.drain(..n).collect::<Vec<_>>());
                Ok(n)
            }
        }
    }
    let (dir, publisher) = new_store();
    let tar = tar_of(&[(T::Regular, "f", &[7; 5000])]);
    let other = Digest::of(b"other");
    let error = unpack_layer(&publisher, &NoLocations, &tar[..], &Expect { diff_id: other }).unwrap_err();
    assert!(matches!(error, UnpackError::DiffId { expected, .. } if expected == other));
    let expect = Expect { diff_id: Digest::of(&tar) };
    let error = unpack_layer(&publisher, &NoLocations, Breaks(tar), &expect).unwrap_err();
    assert!(matches!(error, UnpackError::Read(_)), "{error}");
    assert_eq!(walk_files(&dir.path().join("layers")) + walk_files(&dir.path().join("packs")), 0);
    assert_eq!(std::fs::read_dir(dir.path().join("staging")).unwrap().count(), 0);
}

/// Yields `bytes`, then zeros without end; cancels `stop` once `after` bytes have been read.
struct Endless<'a> {
    bytes: &'a [u8],
    read: usize,
    after: usize,
    stop: &'a CancellationToken,
}

impl Read for Endless<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.read >= self.after {
            self.stop.cancel();
        }
        let n = if self.bytes.is_empty() { out.len() } else { self.bytes.read(out)? };
        self.read += n;
        Ok(n)
    }
}

#[test]
fn nobody_works_on_what_nobody_wants() {
    let (dir, publisher) = new_store();
    let mut endless = header(T::Regular, 400 << 30);
    endless.set_path("f").unwrap();
    endless.set_cksum();
    let holes = [("GNU.sparse.size", "16000000000"), ("GNU.sparse.numblocks", "1"), ("GNU.sparse.map", "0,5")];
    for (bytes, after) in [(endless.as_bytes().to_vec(), 20 << 20), (sparse(&holes, b""), 1)] {
        let stop = CancellationToken::new();
        let reader = Endless { bytes: &bytes, read: 0, after, stop: &stop };
        let expect = Expect { diff_id: Digest::of(b"whatever") };
        let error = unpack_verified(&publisher, &NoLocations, reader, &expect, &stop, &|| {}).unwrap_err();
        assert!(matches!(error, UnpackError::Stopped | UnpackError::Read(_)), "{error}");
        assert_eq!(std::fs::read_dir(dir.path().join("staging")).unwrap().count(), 0);
    }
}

/// A name, and the PAX records before it.
type PaxEntry<'a> = (&'a str, &'a [(&'a str, &'a [u8])]);

#[test]
fn what_one_entry_may_ask_for_is_bounded() {
    let (_dir, publisher) = new_store();
    let fails = |entries: &[PaxEntry<'_>], part: &str| {
        let mut builder = ::tar::Builder::new(Vec::new());
        for (name, records) in entries {
            // Where there are two records, each has a header of its own: only their sum is too long.
            let each = if records.len() == 2 { 1 } else { 600 };
            records.chunks(each).for_each(|part| builder.append_pax_extensions(part.iter().copied()).unwrap());
            let mut header = header(T::Regular, 0);
            header.set_path(name).unwrap();
            header.set_cksum();
            builder.append(&header, io::empty()).unwrap();
        }
        let error = unpack_bytes(&publisher, &NoLocations, &builder.into_inner().unwrap()).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    let half = vec![b'v'; 600 << 10];
    fails(&[("a", &[("x", &half), ("y", &half)])], "extended headers longer than 1 MiB");
    fails(
        &[("a", &[("SCHILY.xattr.user.a", &half)])],
        r#""a" has an extended attribute longer than the kernel allows"#,
    );
    let value = vec![b'v'; 60 << 10];
    let three: Vec<_> = ["a", "b", "c"].map(|name| (format!("SCHILY.xattr.user.{name}"), value.clone())).into();
    let three: Vec<(&str, &[u8])> = three.iter().map(|(name, value)| (name.as_str(), &value[..])).collect();
    fails(&[("fine", &three[..2]), ("b", &three)], r#""b" has more than 512 extended attributes or 128 KiB"#);
    let names: Vec<String> = (0..513).map(|number| format!("SCHILY.xattr.user.{number}")).collect();
    let many: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b"v"[..])).collect();
    fails(&[("c", &many)], r#""c" has more than 512"#);
    fails(&[("d", &[("path", &b"x/".repeat(4000))])], "has a path longer than 4095 bytes");
}

fn any_entry() -> impl Strategy<Value = (T, String, Vec<u8>)> {
    let name = proptest::collection::vec("[a-c]|\\.wh\\.a|\\.wh\\.\\.wh\\.\\.opq|\\.\\.", 1..4)
        .prop_map(|names| names.join("/"));
    let kind = prop_oneof![
        Just(T::Regular),
        Just(T::Directory),
        Just(T::Symlink),
        Just(T::Link),
        Just(T::Fifo),
        Just(T::Char)
    ];
    (kind, name, proptest::collection::vec(97u8..100, 1..90))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever is accepted comes back byte for byte, and nothing panics.
    #[test]
    fn random_tars(entries in proptest::collection::vec(any_entry(), 0..12), flip in proptest::option::of((any::<prop::sample::Index>(), any::<u8>()))) {
        let entries: Vec<_> = entries.iter().map(|(kind, name, data)| (*kind, &name[..], match kind {
            T::Regular | T::Symlink | T::Link => &data[..],
            _ => &[],
        })).collect();
        let mut tar = tar_of(&entries);
        if let Some((at, byte)) = flip {
            let at = at.index(tar.len());
            tar[at] = byte;
        }
        let (_dir, publisher) = new_store();
        if unpack_bytes(&publisher, &NoLocations, &tar).is_ok() {
            let mut back = Vec::new();
            write_layer_tar(publisher.store(), &Digest::of(&tar), &mut back).unwrap();
            prop_assert!(back == tar);
        }
    }
}
