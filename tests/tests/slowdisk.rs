//! The slow shared disk: it is as slow as it promises, and a host above it keeps serving what it can during faults.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use tempfile::TempDir;
use tests::cluster::{Mount, MountSpec};
use tests::images::archive::{Archive, Header, Kind};
use tests::images::{Compression, ImageBuilder, ImageFiles, Pools, oddities::noise, small};
use tests::process::{TIMEOUT, wait_until};
use tests::site::Site;
use tests::slowdisk::{DiskFault, SlowDisk};
use tests::{hosts, mounts};

/// How long a killed process may take to end.
const KILLED: Duration = Duration::from_secs(10);
/// The size of the pieces in which large files are fetched.
const PIECE: usize = 256 << 10;

/// A directory with a few files, shown as a slow disk.
struct Behind {
    disk: SlowDisk,
    directory: TempDir,
}

impl Behind {
    fn start(latency: Duration, bandwidth: Option<u64>) -> Result<Behind> {
        let directory = tempfile::tempdir()?;
        let source = directory.path().join("source");
        fs::create_dir(&source)?;
        for number in 0..8 {
            fs::write(source.join(format!("file{number}")), noise(number, 1 << 20))?;
        }
        let disk = SlowDisk::start(&source, &directory.path().join("mnt"), latency, bandwidth)?;
        Ok(Behind { disk, directory })
    }

    fn source(&self) -> PathBuf {
        self.directory.path().join("source")
    }

    fn file(&self, number: usize) -> PathBuf {
        self.disk.path().join(format!("file{number}"))
    }
}

fn errno<T>(result: std::io::Result<T>) -> Option<Errno> {
    result.err().and_then(|error| error.raw_os_error()).map(Errno::from_raw)
}

#[test]
fn each_request_waits_and_requests_wait_side_by_side() {
    let latency = Duration::from_millis(200);
    let behind = Behind::start(latency, None).unwrap();
    let start = Instant::now();
    let one = File::open(behind.file(0)).unwrap();
    assert!(start.elapsed() >= 2 * latency, "a lookup and an open took {:?}", start.elapsed());
    let start = Instant::now();
    one.read_exact_at(&mut [0; 100], 0).unwrap();
    assert!(start.elapsed() >= latency, "a read took {:?}", start.elapsed());

    let start = Instant::now();
    std::thread::scope(|scope| {
        for number in 0..8 {
            let file = behind.file(number);
            scope.spawn(move || assert!(fs::read(file).unwrap() == noise(number as u64, 1 << 20)));
        }
    });
    // In sequence this would take 8 times a lookup, an open and a read.
    assert!(start.elapsed() < 8 * 2 * latency, "8 readers took {:?}", start.elapsed());
    let stats = behind.disk.stats().unwrap();
    assert_eq!(stats.bytes_read, 8 << 20, "pages are kept across opens");
    assert!(stats.operations["open"].as_u64() >= Some(9), "{stats:?}");
    behind.disk.reset().unwrap();
    assert_eq!(behind.disk.stats().unwrap().requests, 0);
}

#[test]
fn all_bytes_take_their_turn_on_one_wire() {
    let behind = Behind::start(Duration::from_millis(1), Some(8 << 20)).unwrap();
    let start = Instant::now();
    std::thread::scope(|scope| {
        for number in 0..4 {
            let file = behind.file(number);
            scope.spawn(move || fs::read(file).unwrap());
        }
    });
    let least = Duration::from_millis(500).mul_f64(0.8);
    assert!(start.elapsed() >= least, "4 MiB at 8 MiB a second took {:?}", start.elapsed());
    behind.disk.set_bandwidth(None).unwrap();
    behind.disk.set_latency(Duration::from_millis(300)).unwrap();
    let start = Instant::now();
    fs::read(behind.file(4)).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(600), "the new latency counts");
}

#[test]
fn what_is_written_arrives_behind_the_disk_with_its_attributes() {
    let behind = Behind::start(Duration::ZERO, None).unwrap();
    let (here, there) = (behind.disk.path(), behind.source());
    fs::create_dir(here.join("dir")).unwrap();
    let mut file = File::create(here.join("dir/new")).unwrap();
    file.write_all(b"written").unwrap();
    file.sync_all().unwrap();
    File::open(here.join("dir")).unwrap().sync_all().unwrap();
    std::os::unix::fs::chown(here.join("dir/new"), Some(7), Some(8)).unwrap();
    fs::set_permissions(here.join("dir/new"), fs::Permissions::from_mode(0o4710)).unwrap();
    fs::rename(here.join("dir/new"), here.join("renamed")).unwrap();
    file.set_len(4).unwrap();
    std::os::unix::fs::symlink("renamed", here.join("link")).unwrap();
    fs::hard_link(here.join("renamed"), here.join("hard")).unwrap();
    fs::remove_dir(here.join("dir")).unwrap();
    fs::remove_file(here.join("file7")).unwrap();
    for place in [here, &there] {
        assert_eq!(fs::read(place.join("link")).unwrap(), b"writ");
        let status = place.join("hard").metadata().unwrap();
        assert_eq!((status.mode() & 0o7777, status.uid(), status.gid()), (0o4710, 7, 8));
        let mut names: Vec<_> = fs::read_dir(place).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        let expected = ["file0", "file1", "file2", "file3", "file4", "file5", "file6", "hard", "link", "renamed"];
        assert_eq!(names, expected);
    }
    assert_eq!(behind.disk.stats().unwrap().bytes_written, 7);
}

#[test]
fn every_fault_has_its_errno_and_ends() {
    let behind = Behind::start(Duration::ZERO, None).unwrap();
    let open = File::options().read(true).write(true).open(behind.file(0)).unwrap();
    let read_first = |number: usize| File::open(behind.file(number))?.read_exact_at(&mut [0; 10], 0);
    for (fault, expected, number) in [(DiskFault::Eio, Errno::EIO, 1), (DiskFault::Estale, Errno::ESTALE, 2)] {
        behind.disk.fault(fault).unwrap();
        assert_eq!(errno(read_first(number)), Some(expected), "{fault:?}");
        assert_eq!(errno(File::create(behind.disk.path().join("new"))), Some(expected), "{fault:?}");
        behind.disk.recover().unwrap();
        read_first(number).unwrap();
    }
    for (fault, expected) in [(DiskFault::ReadOnly, Errno::EROFS), (DiskFault::Enospc, Errno::ENOSPC)] {
        behind.disk.fault(fault).unwrap();
        assert_eq!(errno(File::create(behind.disk.path().join("new"))), Some(expected), "{fault:?}");
        assert_eq!(errno(fs::create_dir(behind.disk.path().join("dir"))), Some(expected), "{fault:?}");
        assert_eq!(errno(open.write_all_at(b"x", 0)), Some(expected), "{fault:?}");
        read_first(3).unwrap();
        behind.disk.recover().unwrap();
        open.write_all_at(b"x", 0).unwrap();
    }
    behind.disk.fault(DiskFault::Hang).unwrap();
    let file = behind.file(4);
    let reader = std::thread::spawn(move || fs::read(file).unwrap());
    let asked = || Ok(behind.disk.stats()?.requests > 0);
    behind.disk.reset().unwrap();
    let file = behind.file(5);
    let second = std::thread::spawn(move || fs::read(file).unwrap());
    wait_until("a request that hangs", TIMEOUT, asked).unwrap();
    assert!(!reader.is_finished() && !second.is_finished());
    behind.disk.recover().unwrap();
    assert!(reader.join().unwrap() == noise(4, 1 << 20));
    assert!(second.join().unwrap() == noise(5, 1 << 20));
}

#[test]
fn a_hanging_disk_can_be_taken_away() {
    let behind = Behind::start(Duration::ZERO, None).unwrap();
    behind.disk.fault(DiskFault::Hang).unwrap();
    behind.disk.reset().unwrap();
    let file = behind.file(0);
    let reader = std::thread::spawn(move || fs::read(file).map(drop));
    wait_until("a request that hangs", TIMEOUT, || Ok(behind.disk.stats()?.requests > 0)).unwrap();
    let path = behind.disk.path().to_owned();
    drop(behind);
    assert!(mounts::at(&path).unwrap().is_none());
    // The read may have been answered just before the disk went away.
    let _ = reader.join().unwrap();
}

/// The kinds of trees that containers run from.
const KINDS: [&str; 2] = ["fuse", "native"];

/// The image `small` in a store that one host sees through a slow disk.
struct Shared {
    /// Dropped first, because a daemon that waits for a hanging disk cannot end.
    disk: SlowDisk,
    mount: Mount,
    host: MountSpec,
    image: ImageFiles,
    site: Site,
}

impl Shared {
    fn start(read_timeout: &str, kind: &str) -> Result<Shared> {
        let (site, image) = (Site::start()?, small()?);
        hosts::load(&site, &image)?;
        let disk = SlowDisk::start(&site.store(), &site.path().join("share"), Duration::from_millis(1), None)?;
        let mut host = hosts::host(&site, "one")?;
        host.store = disk.path().to_owned();
        host.arguments = ["--read-timeout", read_timeout, "--tree", kind].map(String::from).into();
        let mount = Mount::start(host.clone())?;
        Ok(Shared { disk, mount, host, image, site })
    }

    fn file(&self, path: &str) -> PathBuf {
        self.mount.tree(self.image.chain_ids().last().map_or("", String::as_str)).join(path)
    }

    /// Reads the file `data/noise` and waits until the local cache has it.
    fn warm(&self) -> Result<()> {
        let content = noise(9, 1 << 20);
        anyhow::ensure!(fs::read(self.file("data/noise"))? == content, "wrong bytes");
        let hex = blake3::hash(&content).to_hex();
        let entry = self.host.cache.join("objects").join(&hex[..2]).join(hex.as_str());
        wait_until("the file in the local cache", TIMEOUT, || Ok(entry.is_file()))
    }
}

/// Drops the kernel's pages of the files below a directory, so that reads reach the server of the file system.
fn forget_pages(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            forget_pages(&entry.path())?;
        } else if entry.file_type()?.is_file() {
            posix_fadvise(File::open(entry.path())?, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        }
    }
    Ok(())
}

fn is_busybox(path: &Path) -> Result<bool> {
    Ok(fs::read(path)? == fs::read("/bin/busybox")?)
}

#[test]
fn a_failing_disk_fails_uncached_reads_only_and_recovers_without_restart() {
    let faults = [DiskFault::Eio, DiskFault::Estale, DiskFault::Hang];
    for (fault, kind) in faults.into_iter().flat_map(|fault| KINDS.map(|kind| (fault, kind))) {
        let shared = Shared::start("1s", kind).unwrap();
        shared.warm().unwrap();
        let busybox = File::open(shared.file("bin/busybox")).unwrap();
        forget_pages(shared.disk.path()).unwrap();
        shared.disk.fault(fault).unwrap();
        let start = Instant::now();
        assert_eq!(errno(busybox.read_exact_at(&mut [0; 4096], 0)), Some(Errno::EIO), "{fault:?}, {kind}");
        assert!(start.elapsed() < TIMEOUT / 2, "{fault:?}, {kind}: failing took {:?}", start.elapsed());
        forget_pages(&shared.file("data")).unwrap();
        assert!(fs::read(shared.file("data/noise")).unwrap() == noise(9, 1 << 20), "{fault:?}, {kind}: what is cached");
        shared.disk.recover().unwrap();
        let back = || Ok(busybox.read_exact_at(&mut [0; 4096], 0).is_ok());
        wait_until("reading with the disk back", TIMEOUT, back).unwrap();
        assert!(is_busybox(&shared.file("bin/busybox")).unwrap(), "{fault:?}, {kind}");
    }
}

#[test]
fn a_restarted_daemon_serves_its_cache_over_a_hanging_disk() {
    for kind in KINDS {
        let mut shared = Shared::start("1s", kind).unwrap();
        shared.warm().unwrap();
        shared.mount.stop().unwrap();
        shared.disk.fault(DiskFault::Hang).unwrap();
        shared.mount.restart().unwrap();
        assert!(fs::read(shared.file("data/noise")).unwrap() == noise(9, 1 << 20));
        assert_eq!(errno(fs::read(shared.file("bin/busybox"))), Some(Errno::EIO));
        shared.disk.recover().unwrap();
        let busybox = shared.file("bin/busybox");
        wait_until("reading with the disk back", TIMEOUT, || Ok(fs::read(&busybox).is_ok())).unwrap();
        assert!(is_busybox(&busybox).unwrap());
    }
}

/// An image of one file, each of whose pieces takes a request of its own.
fn pieces(count: usize, directory: &Path) -> Result<ImageFiles> {
    let mut tar = Archive::new(Vec::new());
    tar.add(&Header::new(Kind::File, "pieces"), noise(3, count * PIECE))?;
    let pools = Pools::open(directory)?;
    let layer = pools.layer(&tar.finish()?, Compression::None)?;
    ImageBuilder::new("pieces").layer(layer).build(&pools, &directory.join("image"))
}

#[test]
fn cached_images_are_opened_and_read_while_two_hundred_reads_hang() {
    const READERS: usize = 200;
    for kind in KINDS {
        let mut shared = Shared::start("120s", kind).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let pieces = pieces(READERS, directory.path()).unwrap();
        hosts::load(&shared.site, &pieces).unwrap();
        let big = shared.mount.tree(&pieces.chain_ids()[0]).join("pieces");
        // The slow disk may show its old listing of the catalogue for a moment.
        wait_until("the image on the host", TIMEOUT, || Ok(big.metadata().is_ok())).unwrap();
        shared.warm().unwrap();
        let known = fs::read("/bin/busybox").unwrap();
        let is_cached = || {
            forget_pages(&shared.file(""))?;
            let before = hosts::counter(&shared.host, "reads_missed")?;
            anyhow::ensure!(fs::read(shared.file("bin/busybox"))? == known);
            Ok(hosts::counter(&shared.host, "reads_missed")? == before)
        };
        wait_until("busybox in the local cache", TIMEOUT, is_cached).unwrap();
        // Restarts the daemon, so that the indexes are not open either.
        shared.mount.stop().unwrap();
        shared.mount.restart().unwrap();
        let open = File::open(&big).unwrap();
        forget_pages(shared.disk.path()).unwrap();
        shared.disk.fault(DiskFault::Hang).unwrap();
        shared.disk.reset().unwrap();
        std::thread::scope(|scope| {
            let read = |number: usize| {
                let mut bytes = vec![0; 4096];
                open.read_exact_at(&mut bytes, (number * PIECE) as u64).map(|()| bytes)
            };
            let readers: Vec<_> = (0..READERS).map(|number| scope.spawn(move || read(number))).collect();
            let hang = || Ok(shared.disk.stats()?.requests >= 16);
            wait_until("requests that hang", TIMEOUT, hang).unwrap();
            let start = Instant::now();
            assert!(fs::read(shared.file("data/noise")).unwrap() == noise(9, 1 << 20));
            assert!(is_busybox(&shared.file("bin/busybox")).unwrap());
            assert!(start.elapsed() < TIMEOUT / 2, "what is cached took {:?}", start.elapsed());
            assert!(readers.iter().all(|reader| !reader.is_finished()), "the others wait");
            shared.disk.recover().unwrap();
            let content = noise(3, READERS * PIECE);
            for (number, reader) in readers.into_iter().enumerate() {
                assert!(reader.join().unwrap().unwrap() == content[number * PIECE..][..4096], "{number}");
            }
        });
    }
}

/// SEMANTICS: "A reader that waits can be killed."
#[test]
fn whoever_waits_for_a_hanging_disk_can_be_killed() {
    let map =
        "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); m[500000]";
    for kind in KINDS {
        let shared = Shared::start("120s", kind).unwrap();
        let paths = ["data/noise", "bin/busybox"].map(|path| shared.file(path));
        paths.iter().for_each(|path| drop(File::open(path).unwrap()));
        forget_pages(shared.disk.path()).unwrap();
        shared.disk.fault(DiskFault::Hang).unwrap();
        for (command, path) in [(&["cat"][..], &paths[0]), (&["python3", "-c", map], &paths[1])] {
            let missed = || hosts::counter(&shared.host, "reads_missed");
            let before = missed().unwrap();
            let mut reader = Command::new(command[0]);
            let mut reader = reader.args(&command[1..]).arg(path).stdout(Stdio::null()).spawn().unwrap();
            wait_until("a read that waits", TIMEOUT, || Ok(missed()? > before)).unwrap();
            reader.kill().unwrap();
            let ended = wait_until("the end of a killed reader", KILLED, || Ok(reader.try_wait()?.is_some()));
            ended.with_context(|| format!("{command:?} on {kind}")).unwrap();
        }
        shared.disk.recover().unwrap();
        assert!(is_busybox(&paths[1]).unwrap(), "no page was left half read");
        assert!(fs::read(&paths[0]).unwrap() == noise(9, 1 << 20));
    }
}

#[test]
fn a_disk_that_hangs_shorter_than_readers_wait_delays_them_only() {
    let shared = Shared::start("30s", "native").unwrap();
    shared.disk.fault(DiskFault::Hang).unwrap();
    shared.disk.reset().unwrap();
    let file = shared.file("data/noise");
    let reader = std::thread::spawn(move || fs::read(file));
    wait_until("a request that hangs", TIMEOUT, || Ok(shared.disk.stats()?.requests > 0)).unwrap();
    shared.disk.recover().unwrap();
    assert!(reader.join().unwrap().unwrap() == noise(9, 1 << 20));
}

#[test]
fn a_read_only_or_full_shared_disk_is_nothing_to_a_host() {
    for fault in [DiskFault::ReadOnly, DiskFault::Enospc] {
        let shared = Shared::start("1s", "native").unwrap();
        shared.disk.fault(fault).unwrap();
        shared.warm().unwrap();
        assert!(is_busybox(&shared.file("bin/busybox")).unwrap(), "{fault:?}");
        let missing = fs::read(shared.file("data/nothing")).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound, "{fault:?}");
    }
}

#[test]
fn a_coordinator_on_a_full_or_read_only_disk_fails_the_job_and_goes_on_when_there_is_room() {
    for fault in [DiskFault::ReadOnly, DiskFault::Enospc] {
        let directory = tempfile::Builder::new().prefix("site-").tempdir().unwrap();
        let behind = directory.path().join("behind");
        fs::create_dir(&behind).unwrap();
        // Declared first, so that its directory is removed after the disk in it.
        let site;
        let disk = SlowDisk::start(&behind, &directory.path().join("store"), Duration::ZERO, None).unwrap();
        site = Site::start_in(directory, &tests::site::SiteSpec::default()).unwrap();
        let image = small().unwrap();
        disk.fault(fault).unwrap();
        let refused = site.ctl().run(&["load", &image.docker_archive().unwrap().to_string_lossy()]).unwrap();
        assert!(!refused.succeeded(), "{fault:?}: {refused:?}");
        disk.recover().unwrap();
        hosts::load(&site, &image).unwrap();
        let mount = hosts::mount(&site, "one").unwrap();
        let top = image.chain_ids().pop().unwrap();
        assert!(fs::read(mount.chain(&top).join("data/noise")).unwrap() == noise(9, 1 << 20), "{fault:?}");
    }
}
