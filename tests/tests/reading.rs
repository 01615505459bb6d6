//! Reads through a mount: what is fetched and how often, what the local cache provides, and what a reader sees when a
//! disk returns wrong bytes or is gone, or when a process dies.
//!
//! The cache is inspected through `cachefs status --json` and, where a test damages it, through its documented
//! directories (`cachefs/src/lib.rs`). A cold file is one on a new host: neither the kernel nor the cache has a byte of
//! it.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Barrier;

use anyhow::{Context, Result};
use nix::errno::Errno;
use tests::cluster::{Mount, MountSpec};
use tests::images::archive::{Archive, Header, Kind};
use tests::images::{Compression, ImageBuilder, ImageFiles, Pools, all_images, image, oddities::noise, small};
use tests::process::{TIMEOUT, resident, run, wait_until};
use tests::site::Site;
use tests::{hosts, mounts};

/// The file of the image `small` that the tests read: 1 MiB that does not compress.
const NOISE: &str = "data/noise";
/// Bytes of a piece, the unit in which large files are fetched (store/FORMAT.md).
const PIECE: usize = 256 << 10;
/// The number of pieces of [`NOISE`].
const PIECES: usize = (1 << 20) / PIECE;

/// A store with the image `small` and the content of [`NOISE`].
fn site() -> Result<(Site, ImageFiles, Vec<u8>)> {
    let (site, image) = (Site::start()?, small()?);
    hosts::load(&site, &image)?;
    Ok((site, image, noise(9, 1 << 20)))
}

/// The image's merged root under a mount.
fn root(mount: &Mount, image: &ImageFiles) -> PathBuf {
    mount.chain(image.chain_ids().last().map_or("", String::as_str))
}

#[test]
fn many_readers_of_a_cold_file_fetch_each_chunk_once() {
    let (site, image, content) = site().unwrap();
    let host = hosts::host(&site, "one").unwrap();
    let mount = Mount::start(host.clone()).unwrap();
    let file = root(&mount, &image).join(NOISE);
    assert_eq!(file.metadata().unwrap().len(), content.len() as u64);
    let before = hosts::counter(&host, "chunks_fetched").unwrap();
    let barrier = Barrier::new(16);
    std::thread::scope(|scope| {
        for reader in 0..16 {
            let (file, content, barrier) = (&file, &content, &barrier);
            scope.spawn(move || {
                let open = File::open(file).unwrap();
                barrier.wait();
                // Each reader starts at another piece, so that they also meet in the middle of the file.
                for step in 0..PIECES {
                    let at = (reader + step) % PIECES * PIECE;
                    let mut bytes = vec![0; PIECE];
                    open.read_exact_at(&mut bytes, at as u64).unwrap();
                    assert!(bytes == content[at..at + PIECE], "wrong bytes at {at}");
                }
            });
        }
    });
    let fetched = hosts::counter(&host, "chunks_fetched").unwrap() - before;
    assert_eq!(fetched, PIECES as u64, "chunks of {NOISE}");
}

#[test]
fn a_restarted_daemon_reads_cached_files_with_the_shared_disk_away() {
    let (site, image, content) = site().unwrap();
    let mut host = hosts::host(&site, "one").unwrap();
    host.arguments = vec!["--read-timeout".into(), "1s".into()];
    let mut mount = Mount::start(host.clone()).unwrap();
    assert!(fs::read(root(&mount, &image).join(NOISE)).unwrap() == content);
    wait_for_cached(&host, &content).unwrap();
    assert_eq!(mount.stop().unwrap().code(), Some(0));

    let away = site.path().join("away");
    fs::rename(site.store(), &away).unwrap();
    mount.restart().unwrap();
    let root = root(&mount, &image);
    assert!(fs::read(root.join(NOISE)).unwrap() == content);
    assert_eq!(fs::read_dir(root.join("data")).unwrap().count(), 2, "directories are listed too");
    assert_eq!(hosts::counter(&host, "bytes_from_store").unwrap(), 0);

    // Reads of uncached content fail with EIO, and work again without a restart when the disk is back.
    let busybox = root.join("bin/busybox");
    assert_eq!(fs::read(&busybox).unwrap_err().raw_os_error(), Some(Errno::EIO as i32));
    fs::rename(&away, site.store()).unwrap();
    wait_until("reading with the disk back", TIMEOUT, || Ok(fs::read(&busybox).is_ok())).unwrap();
    assert!(fs::read(&busybox).unwrap() == fs::read("/bin/busybox").unwrap());
}

#[test]
fn a_second_reading_after_a_restart_fetches_nothing() {
    let (site, image, content) = site().unwrap();
    let host = hosts::host(&site, "one").unwrap();
    let mut mount = Mount::start(host.clone()).unwrap();
    assert!(fs::read(root(&mount, &image).join(NOISE)).unwrap() == content);
    wait_for_cached(&host, &content).unwrap();
    mount.stop().unwrap();
    mount.restart().unwrap();
    assert!(fs::read(root(&mount, &image).join(NOISE)).unwrap() == content);
    assert_eq!(hosts::counter(&host, "chunks_fetched").unwrap(), 0);
}

#[test]
fn damaged_cache_entries_are_dropped_and_fetched_again() {
    let (site, image, content) = site().unwrap();
    let host = hosts::host(&site, "one").unwrap();
    let mut mount = Mount::start(host.clone()).unwrap();
    assert!(fs::read(root(&mount, &image).join(NOISE)).unwrap() == content);
    wait_for_cached(&host, &content).unwrap();
    mount.stop().unwrap();

    let entry = cache_entry(&host, &content);
    let byte = 2 * PIECE + 77;
    flip(&entry, byte as u64).unwrap();
    mount.restart().unwrap();
    assert!(fs::read(root(&mount, &image).join(NOISE)).unwrap() == content);
    // The kernel may read the same damage twice.
    assert!(hosts::counter(&host, "damaged_in_cache").unwrap() >= 1);

    // A truncated entry, an empty one, and a directory in its place: in each case readers get the correct bytes.
    for damage in [cut, empty, replace] {
        // Without this restart the kernel might answer from its pages, and the daemon might not be asked for the whole file.
        mount.restart().unwrap();
        assert!(fs::read(root(&mount, &image).join(NOISE)).unwrap() == content);
        wait_for_cached(&host, &content).unwrap();
        assert!(fs::read(&entry).unwrap() == content, "the entry is good again");
        mount.stop().unwrap();
        damage(&entry).unwrap();
        mount.restart().unwrap();
        assert!(fs::read(root(&mount, &image).join(NOISE)).unwrap() == content);
        mount.stop().unwrap();
    }
}

#[test]
fn a_cache_that_vanishes_while_in_use_is_no_loss() {
    let (site, image, content) = site().unwrap();
    let host = hosts::host(&site, "one").unwrap();
    let mount = Mount::start(host.clone()).unwrap();
    let root = root(&mount, &image);
    let open = File::open(root.join(NOISE)).unwrap();
    let mut first = vec![0; 4096];
    open.read_exact_at(&mut first, 0).unwrap();
    // The removal may fail because the daemon writes there at the same time.
    wait_until("the cache to vanish", TIMEOUT, || Ok(fs::remove_dir_all(host.cache.join("objects")).is_ok())).unwrap();
    let mut all = Vec::new();
    (&open).read_to_end(&mut all).unwrap();
    assert!(all == content);
    assert!(fs::read(root.join("bin/busybox")).unwrap() == fs::read("/bin/busybox").unwrap());
}

#[test]
fn a_damaged_pack_gives_errors_and_never_wrong_bytes() {
    let (site, image, content) = site().unwrap();
    let host = hosts::host(&site, "one").unwrap();
    let bad = 2;
    let (pack, at) = find_in_packs(&site.store(), &content[bad * PIECE..bad * PIECE + 64]).unwrap();
    flip(&pack, at + 1000).unwrap();

    let mount = Mount::start(host.clone()).unwrap();
    let file = File::open(root(&mount, &image).join(NOISE)).unwrap();
    let read = |piece: usize| {
        let mut bytes = vec![0; PIECE];
        file.read_exact_at(&mut bytes, (piece * PIECE) as u64).map(|()| bytes)
    };
    for piece in 0..PIECES {
        match read(piece) {
            Ok(bytes) => assert!(piece != bad && bytes == content[piece * PIECE..][..PIECE], "piece {piece}"),
            Err(error) => assert_eq!((piece, error.raw_os_error()), (bad, Some(Errno::EIO as i32))),
        }
    }
    assert!(hosts::counter(&host, "damaged_in_store").unwrap() >= 1);

    // When the pack is repaired, the file is readable again: nothing wrong was kept.
    flip(&pack, at + 1000).unwrap();
    wait_until("reading the mended piece", TIMEOUT, || Ok(read(bad).is_ok())).unwrap();
    assert!(read(bad).unwrap() == content[bad * PIECE..][..PIECE]);
}

#[test]
fn the_cache_keeps_to_its_size_and_what_it_lost_is_fetched_again() {
    const LIMIT: u64 = 4 << 20;
    let (site, image) = (Site::start().unwrap(), image("python3").unwrap());
    hosts::load(&site, &image).unwrap();
    let mut host = hosts::host(&site, "one").unwrap();
    host.cache_size = Some("4M".into());
    let mut mount = Mount::start(host.clone()).unwrap();
    let library = |mount: &Mount| root(mount, &image).join("usr/lib");
    let read_all = |directory: &Path| {
        let mut digests = Vec::new();
        read_tree(directory, &mut digests).unwrap();
        digests
    };
    let first = read_all(&library(&mount));
    assert!(first.iter().map(|(_, size, _)| size).sum::<u64>() > 10 * LIMIT, "there is more to read than room");
    let fits = || Ok(disk_use(&host.cache.join("objects"))? <= LIMIT);
    wait_until("the cache within its size", TIMEOUT, fits).unwrap();
    assert!(hosts::counter(&host, "evicted_objects").unwrap() > 0);
    mount.stop().unwrap();
    mount.restart().unwrap();
    assert!(read_all(&library(&mount)) == first, "the second reading gives other bytes");
    wait_until("the cache within its size", TIMEOUT, fits).unwrap();
}

#[test]
fn mounting_and_reading_need_no_coordinator() {
    let (mut site, image, content) = site().unwrap();
    let host = hosts::host(&site, "one").unwrap();
    site.coordinator().stop().unwrap();
    let mount = Mount::start(host).unwrap();
    assert!(fs::read(root(&mount, &image).join(NOISE)).unwrap() == content);
    let link = mount.path().join("images/small/latest");
    assert_eq!(fs::canonicalize(link).unwrap(), root(&mount, &image));
}

#[test]
fn an_image_is_there_when_its_load_ends_and_the_one_that_was_asked_for_in_vain_too() {
    let (site, image) = (Site::start().unwrap(), small().unwrap());
    let mount = hosts::mount(&site, "one").unwrap();
    let root = root(&mount, &image);
    // The kernel may cache that these names do not exist.
    assert_eq!(root.metadata().unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(mount.path().join("images/small").metadata().unwrap_err().kind(), ErrorKind::NotFound);
    hosts::load(&site, &image).unwrap();
    assert_eq!(fs::read(root.join("data/greeting")).unwrap(), b"hello again\n");
    assert!(mount.path().join("images/small/latest/data").is_dir());
}

#[test]
fn a_mount_point_whose_daemon_was_killed_is_recovered() {
    let (site, image, content) = site().unwrap();
    let mut mount = hosts::mount(&site, "one").unwrap();
    let file = root(&mount, &image).join(NOISE);
    assert!(fs::read(&file).unwrap() == content);
    mount.kill9().unwrap();
    assert_eq!(mount.path().metadata().unwrap_err().raw_os_error(), Some(Errno::ENOTCONN as i32));
    mount.restart().unwrap();
    assert!(fs::read(&file).unwrap() == content);
    let here = mounts::list().unwrap().into_iter().filter(|other| other.path == mount.path());
    assert_eq!(here.count(), 1, "the dead mount is gone, not covered");
}

#[test]
fn sigterm_unmounts_cleanly_even_while_a_file_is_open() {
    let (site, image, content) = site().unwrap();
    let mut mount = hosts::mount(&site, "one").unwrap();
    let path = mount.path().to_owned();
    assert!(fs::read(root(&mount, &image).join(NOISE)).unwrap() == content);
    assert_eq!(mount.stop().unwrap().code(), Some(0));
    assert!(mounts::at(&path).unwrap().is_none());
    assert_eq!(fs::read_dir(&path).unwrap().count(), 0);

    mount.restart().unwrap();
    let open = File::open(root(&mount, &image).join(NOISE)).unwrap();
    assert_eq!(mount.stop().unwrap().code(), Some(0));
    assert!(mounts::at(&path).unwrap().is_none());
    drop(open);
}

#[test]
fn nothing_can_be_written() {
    let (site, image, _) = site().unwrap();
    let mount = hosts::mount(&site, "one").unwrap();
    let root = root(&mount, &image);
    let read_only = |result: std::io::Result<()>| result.unwrap_err().raw_os_error() == Some(Errno::EROFS as i32);
    assert!(read_only(File::create(root.join("data/new")).map(drop)));
    assert!(read_only(File::options().append(true).open(root.join(NOISE)).map(drop)));
    assert!(read_only(fs::remove_file(root.join(NOISE))));
    assert!(read_only(fs::create_dir(mount.path().join("layers/x"))));
    assert!(read_only(fs::rename(root.join(NOISE), root.join("data/other"))));
    assert!(read_only(std::os::unix::fs::symlink("x", root.join("link"))));
}

/// The bytes of an ACL (`linux/posix_acl_xattr.h`): the owner may read and write, user `reader` may read, and nobody else may do anything.
fn acl(reader: u32) -> Vec<u8> {
    let entries = [(1u16, 6u16, u32::MAX), (2, 4, reader), (4, 0, u32::MAX), (0x10, 4, u32::MAX), (0x20, 0, u32::MAX)];
    let bytes = |(tag, rights, id): (u16, u16, u32)| {
        [tag.to_le_bytes().as_slice(), &rights.to_le_bytes(), &id.to_le_bytes()].concat()
    };
    [2u32.to_le_bytes().to_vec()].into_iter().chain(entries.map(bytes)).flatten().collect()
}

/// SEMANTICS: "POSIX ACLs of a layer count as on a local disk,"
#[test]
fn access_control_lists_let_in_whom_they_name() -> Result<()> {
    const NAMED: u32 = 1234;
    let site = Site::start()?;
    let mut tar = Archive::new(Vec::new());
    let listed = Header::new(Kind::File, "listed").mode(0o640).xattr("system.posix_acl_access", acl(NAMED));
    tar.add(&listed, "for some\n")?;
    tar.add(&Header::new(Kind::File, "plain").mode(0o640), "for root\n")?;
    let directory = tempfile::tempdir()?;
    let pools = Pools::open(directory.path())?;
    let layer = pools.layer(&tar.finish()?, Compression::Gzip)?;
    let image = ImageBuilder::new("listed").layer(layer).build(&pools, &directory.path().join("image"))?;
    hosts::load(&site, &image)?;
    let mount = hosts::mount(&site, "one")?;
    // Users other than root read through an overlay on top, as in a container. The mount itself does not let them in.
    let overlay = mounts::Overlay::mount(&[root(&mount, &image)])?;
    let root = overlay.root();
    fs::set_permissions(root.parent().unwrap_or(&root), fs::Permissions::from_mode(0o755))?;
    let reads = |user: u32, name: &str| -> Result<bool> {
        let mut command = Command::new("setpriv");
        command.args([&format!("--reuid={user}"), &format!("--regid={user}"), "--clear-groups", "cat"]);
        Ok(run(command.arg(root.join(name)))?.code == 0)
    };
    assert!(reads(NAMED, "listed")?, "the list names this user");
    assert!(!reads(NAMED, "plain")?);
    assert!(!reads(NAMED + 1, "listed")?, "the list does not name this user");
    assert_eq!(xattr::get(root.join("listed"), "system.posix_acl_access")?, Some(acl(NAMED)));
    assert_eq!(xattr::get(root.join("plain"), "system.posix_acl_access")?, None);
    Ok(())
}

/// All images of the test suite are mounted and walked twice. The project promises 100 MiB for 20 images.
#[test]
fn the_daemon_stays_small_with_many_images_walked() {
    const MEGABYTES: u64 = 100;
    let site = Site::start().unwrap();
    let images: Vec<_> = all_images().into_iter().map(|name| image(name).unwrap()).collect();
    for image in &images {
        hosts::load(&site, image).unwrap();
    }
    let host = hosts::host(&site, "one").unwrap();
    let mount = Mount::start(host).unwrap();
    for _ in 0..2 {
        let mut seen = 0;
        for image in &images {
            seen += walk(&root(&mount, image)).unwrap();
            for diff_id in image.diff_ids() {
                seen += walk(&mount.layer(&diff_id)).unwrap();
            }
        }
        assert!(seen > 50_000, "only {seen} entries were seen");
    }
    let taken = resident(mount.worker().unwrap()).unwrap() >> 20;
    assert!(taken < MEGABYTES, "the daemon has {taken} MiB resident");
}

/// The path in the local cache for a file with this content.
fn cache_entry(host: &MountSpec, content: &[u8]) -> PathBuf {
    let hex = blake3::hash(content).to_hex();
    host.cache.join("objects").join(&hex[..2]).join(hex.as_str())
}

/// Waits until the cache holds the whole of a file that was read. Readers do not wait for that.
fn wait_for_cached(host: &MountSpec, content: &[u8]) -> Result<()> {
    let entry = cache_entry(host, content);
    wait_until("the file in the local cache", TIMEOUT, || Ok(entry.is_file()))
}

/// Inverts one byte of a file.
fn flip(path: &Path, offset: u64) -> Result<()> {
    let file = File::options().read(true).write(true).open(path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    file.write_all_at(&[!byte[0]], offset)?;
    Ok(())
}

fn cut(entry: &Path) -> Result<()> {
    Ok(File::options().write(true).open(entry)?.set_len(1000)?)
}

fn empty(entry: &Path) -> Result<()> {
    Ok(File::options().write(true).open(entry)?.set_len(0)?)
}

fn replace(entry: &Path) -> Result<()> {
    let _ = fs::remove_file(entry);
    Ok(fs::create_dir(entry)?)
}

/// The pack and the offset where the store has these bytes. Content that does not compress is stored as it is.
fn find_in_packs(store: &Path, bytes: &[u8]) -> Result<(PathBuf, u64)> {
    for fan in fs::read_dir(store.join("packs"))? {
        for pack in fs::read_dir(fan?.path())? {
            let path = pack?.path();
            let content = fs::read(&path)?;
            if let Some(at) = content.windows(bytes.len()).position(|window| window == bytes) {
                return Ok((path, at as u64));
            }
        }
    }
    anyhow::bail!("no pack holds these bytes as they are")
}

/// Path, size and digest of each regular file below a directory.
fn read_tree(directory: &Path, found: &mut Vec<(PathBuf, u64, blake3::Hash)>) -> Result<()> {
    let mut entries = fs::read_dir(directory)?.collect::<std::io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let kind = entry.file_type()?;
        if kind.is_dir() {
            read_tree(&path, found)?;
        } else if kind.is_file() {
            let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            found.push((path, bytes.len() as u64, blake3::hash(&bytes)));
        }
    }
    Ok(())
}

/// Bytes that the files below a directory occupy on the disk.
fn disk_use(directory: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut total = 0;
    for entry in fs::read_dir(directory)?.flatten() {
        // Files may disappear while the daemon works.
        let Ok(status) = entry.path().symlink_metadata() else { continue };
        total += if status.is_dir() { disk_use(&entry.path())? } else { status.blocks() * 512 };
    }
    Ok(total)
}

/// Visits every entry below a directory and reads its attributes, and the names of extended attributes of files.
fn walk(directory: &Path) -> Result<u64> {
    let mut seen = 0;
    let entries = fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        // The deepest paths of the images exceed the limits of some systems, but not that of this one.
        let status = path.symlink_metadata().with_context(|| format!("cannot stat {}", path.display()))?;
        seen += 1;
        if status.is_dir() {
            seen += walk(&path)?;
        } else if status.is_file() {
            xattr::list(&path)?.count();
        }
    }
    Ok(seen)
}
