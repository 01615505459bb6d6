//! Native trees are mounted, with data files that are filled through the daemon, and compared with the mount's own tree.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;

use erofs::BLOCK;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use proptest::prelude::*;
use store::Digest;
use store::layer::{InodeIndex, S_IFDIR, S_IFMT};

use crate::filesystem::flat::FlatLayout;
use crate::filesystem::native_tree::ChainContent;
use crate::filesystem::tests::{Seen, entries, host, image, walk};
use crate::fixture::{Entries, Host, file, noise, plain};
use crate::source::failure::Result;

/// A mounted native tree. Unmounted when dropped.
struct Mounted {
    directory: tempfile::TempDir,
}

impl Mounted {
    fn new(host: &Host, chain: &str) -> Mounted {
        let mounted = Mounted { directory: tempfile::tempdir().unwrap() };
        let at = mounted.directory.path();
        let image = at.join("image");
        let tree = host.filesystem.write_native_tree(&id(chain), &File::create_new(&image).unwrap(), u64::MAX).unwrap();
        let (device, len) = (at.join("device"), tree.content.blocks() * BLOCK);
        // In steps that fit neither files nor blocks.
        let device_file = File::create(&device).unwrap();
        let mut offset = 0;
        while offset < len {
            let part = data(host, &tree.content, offset, 70_001).unwrap();
            assert_eq!(part.len() as u64, 70_001.min(len - offset));
            device_file.write_all_at(&part, offset).unwrap();
            offset += part.len() as u64;
        }
        assert_eq!(data(host, &tree.content, len, 10).unwrap(), b"", "the end");
        let options = if len == 0 { String::new() } else { format!("device={}", device.display()) };
        fs::create_dir(mounted.root()).unwrap();
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some(&image), &mounted.root(), Some("erofs"), flags, Some(options.as_str())).unwrap();
        mounted
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }
}

/// The ChainID in a chain's path.
fn id(chain: &str) -> Digest {
    format!("sha256:{}", chain.strip_prefix("chains/").unwrap()).parse().unwrap()
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.root(), MntFlags::MNT_DETACH);
    }
}

/// Reads a part of a data file.
fn data(host: &Host, content: &Arc<ChainContent>, offset: u64, len: usize) -> Result<Vec<u8>> {
    let (send, receive) = channel();
    let done = move |read: Result<&[u8]>| send.send(read.map(<[u8]>::to_vec)).unwrap();
    host.filesystem.read_data(content, offset, len, done);
    receive.recv().unwrap()
}

/// What the kernel shows at a path and everywhere below it. Directories' sizes are the file system's own business.
pub(crate) fn shown(root: &Path) -> BTreeMap<String, Seen> {
    let mut seen = BTreeMap::new();
    let mut stack = vec![(String::new(), root.to_owned())];
    while let Some((name, path)) = stack.pop() {
        let found = fs::symlink_metadata(&path).unwrap();
        let kind = found.file_type();
        let content = match () {
            () if kind.is_file() => fs::read(&path).unwrap(),
            () if kind.is_symlink() => fs::read_link(&path).unwrap().into_os_string().into_vec(),
            () => Vec::new(),
        };
        let device = kind.is_char_device() || kind.is_block_device();
        let number = |part: fn(u64) -> u64| if device { part(found.rdev()) as u32 } else { 0 };
        // Of what is neither a file nor a directory, the kernel lists attributes in users' names, but does not give them.
        let given = |name: OsString| Some((name.as_bytes().to_vec(), xattr::get(&path, &name).unwrap()?));
        seen.insert(
            name.clone(),
            Seen {
                mode: found.mode(),
                owner: (found.uid(), found.gid()),
                mtime: (found.mtime(), found.mtime_nsec() as u32),
                rdev: (number(nix::sys::stat::major), number(nix::sys::stat::minor)),
                size: if kind.is_dir() { 4096 } else { found.size() },
                nlink: found.nlink() as u32,
                xattrs: xattr::list(&path).unwrap().filter(|name| name != CAPABILITY).filter_map(given).collect(),
                content,
            },
        );
        if kind.is_dir() {
            for entry in fs::read_dir(&path).unwrap() {
                let entry = entry.unwrap();
                stack.push((format!("{name}/{}", entry.file_name().to_string_lossy()), entry.path()));
            }
        }
    }
    seen
}

/// The kernel looks into the value of this one before it gives it, and the trees have random ones.
const CAPABILITY: &str = "security.capability";

/// The mount's own tree, as far as the kernel would show it.
pub(crate) fn served(host: &Host, chain: &str) -> BTreeMap<String, Seen> {
    let mut seen = walk(host, chain);
    for one in seen.values_mut() {
        one.xattrs.remove(CAPABILITY.as_bytes());
        if !matches!(one.mode & S_IFMT, S_IFDIR | store::layer::S_IFREG) {
            one.xattrs.retain(|name, _| !name.starts_with(b"user."));
        }
    }
    seen
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_native_tree_shows_what_the_mount_shows(layers in proptest::collection::vec(entries(), 1..5)) {
        let (store, cache, chain, _) = image(&layers);
        let host = host(&store, &cache);
        let served = served(&host, &chain);
        let mounted = Mounted::new(&host, &chain);
        prop_assert_eq!(shown(&mounted.root()), served);
    }
}

/// Two layers with small files, large ones, empty ones, holes, and many without content between them.
pub(crate) fn contents() -> Vec<Entries> {
    let mut lower =
        plain(&[("large", file(&noise(700_000, 1))), ("hole", file(&vec![0; 600_000])), ("empty", file(b""))]);
    for number in 0..300 {
        let content = if number % 100 == 0 { noise(5_000, 2) } else { Vec::new() };
        lower.extend(plain(&[(&format!("file {number}"), file(&content))]));
    }
    vec![lower, plain(&[("other", file(&noise(4_096, 3))), ("last", file(b"x"))])]
}

#[test]
fn content_of_all_sizes_is_where_the_image_says() {
    let (store, cache, chain, _) = image(&contents());
    let host = host(&store, &cache);
    let served = served(&host, &chain);
    let mounted = Mounted::new(&host, &chain);
    assert_eq!(shown(&mounted.root()), served);
}

#[test]
fn every_block_belongs_to_one_file() {
    let (store, cache, _, diff_ids) = image(&contents());
    let host = host(&store, &cache);
    let root = host.node(&format!("layers/{}", diff_ids[0].hex()));
    let layer = host.filesystem.layer_of(root).unwrap();
    let (flat, index) = (layer.flat().unwrap(), layer.index().unwrap());
    let mut block = 0;
    let (whole, firsts) = FlatLayout::with_firsts(index).unwrap();
    assert_eq!(format!("{whole:?}"), format!("{flat:?}"), "laid out either way");
    for number in (0..index.inode_count()).map(InodeIndex) {
        let inode = index.inode(number).unwrap();
        assert_eq!(firsts[number.0 as usize], block);
        for _ in 0..if inode.is_file() { inode.size.div_ceil(BLOCK) } else { 0 } {
            let found = flat.file_at(index, block).unwrap().unwrap();
            assert!(found.number == number && found.first <= block && block < found.end());
            block += 1;
        }
    }
    assert_eq!(flat.blocks(), block);
    assert!(flat.file_at(index, block).unwrap().is_none());
}

/// The kernel asks nobody for names above a native tree, so nothing else would bring the index back.
#[test]
fn a_data_file_is_read_after_its_layers_index_was_lost() {
    let (store, cache, chain, _) = image(&contents());
    let host = host(&store, &cache);
    let expected = walk(&host, &chain);
    let layer = host.filesystem.layer_of(host.node(&format!("{chain}/large"))).unwrap();
    let image = tempfile::tempfile().unwrap();
    let content = host.filesystem.write_native_tree(&id(&chain), &image, u64::MAX).unwrap().content;
    // What was read is still being written into the cache.
    host.settle();
    fs::remove_dir_all(cache.path().join("objects")).unwrap();
    host.indexes.drop_blocks();
    let first = FlatLayout::of(layer.index().unwrap());
    assert!(first.is_err(), "the index is lost");
    let whole = data(&host, &content, 0, content.blocks() as usize * BLOCK as usize).unwrap();
    let large = &expected["/large"].content;
    assert!(whole.windows(1000).any(|part| part == &large[..1000]));
}
