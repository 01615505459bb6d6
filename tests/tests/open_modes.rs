//! The ways in which a mount answers opens (`--open`), below an overlay as containers have it: the bytes are the same
//! in each mode, and each mode keeps its own promises.
//!
//! A kernel without passthrough (before Linux 6.9) falls back. The tests then report this and try the other modes.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Barrier;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use tests::cluster::{Mount, MountSpec, binary};
use tests::hosts;
use tests::images::{ImageFiles, oddities::noise, small};
use tests::mounts::{self, Overlay};
use tests::process::{TIMEOUT, run, wait_until};
use tests::site::Site;

const MODES: [&str; 3] = ["no-open", "passthrough", "cached"];
/// Four pieces (store/FORMAT.md) that do not compress.
const LARGE: &str = "data/noise";
const LARGE_SIZE: usize = 1 << 20;
/// One piece.
const SMALL: &str = "data/greeting";
const SMALL_CONTENT: &[u8] = b"hello again\n";
const BUSYBOX: &str = "bin/busybox";

/// A store with the image `small`, and one host for each mode.
struct World {
    site: Site,
    image: ImageFiles,
    large: Vec<u8>,
    busybox: Vec<u8>,
}

/// A mount in one mode and a container's root on top of it.
struct Host {
    mode: &'static str,
    spec: MountSpec,
    /// Declared before the mount, because fields are dropped in this order and the overlay uses the mount.
    overlay: Option<Overlay>,
    mount: Mount,
}

impl World {
    fn new() -> Result<World> {
        let (site, image) = (Site::start()?, small()?);
        hosts::load(&site, &image)?;
        Ok(World { site, image, large: noise(9, LARGE_SIZE), busybox: fs::read("/bin/busybox")? })
    }

    fn host(&self, mode: &'static str) -> Result<Host> {
        let mut spec = hosts::host(&self.site, mode)?;
        spec.arguments = vec!["--open".into(), mode.into()];
        let mount = Mount::start(spec.clone())?;
        let mut host = Host { mode, spec, overlay: None, mount };
        host.overlay = Some(Overlay::mount(&[self.lower(&host)])?);
        Ok(host)
    }

    fn lower(&self, host: &Host) -> PathBuf {
        host.mount.chain(self.image.chain_ids().last().map_or("", String::as_str))
    }

    /// Calls `test` with a fresh host for each mode that this kernel supports.
    fn in_every_mode(&self, test: impl Fn(&mut Host)) -> Result<()> {
        for mode in MODES {
            let mut host = self.host(mode)?;
            let used = hosts::status(&host.spec)?["open"].as_str().context("status tells no mode")?.to_owned();
            if used != mode {
                ensure!((mode, used.as_str()) == ("passthrough", "cached"), "{used} is used instead of {mode}");
                eprintln!("passthrough is not tried: this kernel has none (it needs Linux 6.9)");
                continue;
            }
            eprintln!("mode {mode}");
            test(&mut host);
        }
        Ok(())
    }

    /// Ends the daemon cleanly, calls `between`, and starts the daemon again.
    fn restart(&self, host: &mut Host, between: impl FnOnce()) -> Result<()> {
        host.overlay = None;
        ensure!(host.mount.stop()?.success());
        between();
        host.mount.restart()?;
        host.overlay = Some(Overlay::mount(&[self.lower(host)])?);
        Ok(())
    }

    fn expected(&self, file: &str) -> Vec<u8> {
        match file {
            LARGE => self.large.clone(),
            SMALL => SMALL_CONTENT.to_vec(),
            _ => self.busybox.clone(),
        }
    }

    /// Reads files and waits until the local cache holds all of them.
    fn fill(&self, host: &Host, files: &[&str]) -> Result<()> {
        for file in files {
            ensure!(fs::read(host.path(file))? == self.expected(file), "{file} differs");
            let entry = cache_entry(&host.spec, &self.expected(file));
            wait_until("the file in the local cache", TIMEOUT, || Ok(entry.is_file()))?;
        }
        Ok(())
    }
}

impl Host {
    /// The path of a file in the container's root.
    fn path(&self, file: &str) -> PathBuf {
        self.overlay.as_ref().expect("the container's root is mounted").root().join(file)
    }

    fn counter(&self, name: &str) -> u64 {
        hosts::counter(&self.spec, name).expect("the daemon tells its counters")
    }

    fn reads(&self) -> u64 {
        self.counter("reads_hit") + self.counter("reads_missed")
    }

    /// In passthrough mode, opens a file repeatedly until the kernel reads it by itself. In other modes, opens it once.
    fn open_through(&self, file: &str) -> Result<File> {
        let mut open = File::open(self.path(file))?;
        if self.mode == "passthrough" {
            let passed = wait_until("an open that passes through", TIMEOUT, || {
                let before = self.counter("opens_passthrough");
                // Open files keep their mode, so the former one is closed first.
                drop(std::mem::replace(&mut open, File::open("/dev/null")?));
                open = File::open(self.path(file))?;
                Ok(self.counter("opens_passthrough") > before)
            });
            passed.with_context(|| format!("{file}; the daemon says {:?}", hosts::status(&self.spec)))?;
        }
        Ok(open)
    }
}

/// The path in the local cache for a file with this content.
fn cache_entry(host: &MountSpec, content: &[u8]) -> PathBuf {
    let hex = blake3::hash(content).to_hex();
    host.cache.join("objects").join(&hex[..2]).join(hex.as_str())
}

fn read_whole(file: &File, len: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Inverts one byte of a file.
fn flip(path: &Path, offset: u64) -> Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    Ok(file.write_all_at(&[!byte[0]], offset)?)
}

/// Reads a file with O_DIRECT, without the page cache.
fn read_direct(path: &Path) -> Result<Vec<u8>> {
    let mut dd = Command::new("dd");
    let output = dd.arg(format!("if={}", path.display())).args(["iflag=direct", "bs=64k", "status=none"]).output()?;
    ensure!(output.status.success(), "dd: {}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

#[test]
fn every_mode_shows_the_same_bytes_to_every_kind_of_reader() {
    let world = World::new().unwrap();
    let digest = run(Command::new("sha256sum").stdin(std::process::Stdio::null()).arg("/bin/busybox")).unwrap();
    let digest = digest.ok().unwrap().split(' ').next().unwrap().to_owned();
    let check = |host: &mut Host| {
        // First cold, then from the cache, where passthrough may begin, then once more.
        for _ in 0..3 {
            // Execution maps the program, and its result depends on every page of another file.
            let mut container = Command::new("chroot");
            container.arg(host.path("")).args(["/bin/sha256sum", "/bin/busybox"]);
            assert!(run(&mut container).unwrap().ok().unwrap().starts_with(&digest));
            for file in [SMALL, LARGE, BUSYBOX] {
                assert!(read_direct(&host.path(file)).unwrap() == world.expected(file), "{file} by O_DIRECT");
            }
            world.fill(host, &[SMALL, LARGE, BUSYBOX]).unwrap();
            let mut fio = Command::new("fio");
            fio.args(["--name=map", "--readonly", "--ioengine=mmap", "--rw=randread", "--bs=4k", "--size=1M"]);
            run(fio.arg(format!("--filename={}", host.path(LARGE).display()))).unwrap().ok().unwrap();
            let open = File::open(host.path(LARGE)).unwrap();
            assert_eq!(lseek(&open, 5, Whence::SeekData), Ok(5));
            assert_eq!(lseek(&open, 5, Whence::SeekHole), Ok(LARGE_SIZE as i64));
        }
        let passed = host.counter("opens_passthrough");
        assert_eq!(passed > 0, host.mode == "passthrough", "{passed} opens passed through");
    };
    world.in_every_mode(check).unwrap();
}

/// SEMANTICS: "A warm read costs no request."
#[test]
fn warm_reads_do_not_reach_the_daemon() {
    let world = World::new().unwrap();
    let check = |host: &mut Host| {
        let files = [SMALL, LARGE, BUSYBOX];
        world.fill(host, &files).unwrap();
        files.iter().for_each(|file| drop(host.open_through(file).unwrap()));
        // Pages may be dropped at any time, by memory pressure or by other tests, so the test waits for a round without reads.
        let round = || {
            let names = ["opens", "opens_passthrough"];
            let before = (host.reads(), names.map(|name| host.counter(name)));
            for file in files {
                ensure!(fs::read(host.path(file))? == world.expected(file), "{file} differs");
            }
            let after = (host.reads(), names.map(|name| host.counter(name)));
            let [opens, passed] = [0, 1].map(|name: usize| after.1[name] - before.1[name]);
            match host.mode {
                "no-open" => ensure!((opens, passed) == (0, 0), "{opens} opens although there are none"),
                "passthrough" => ensure!((opens, passed) == (3, 3), "{passed} of {opens} opens passed through"),
                _ => ensure!((opens, passed) == (3, 0), "{opens} opens, {passed} passed through"),
            }
            Ok(after.0 == before.0)
        };
        wait_until("a round without a read request", TIMEOUT, round).unwrap();
    };
    world.in_every_mode(check).unwrap();
}

/// The kernel answers EIO if an open of a file uses another mode than other opens of the same file.
#[test]
fn opens_at_once_of_files_that_are_being_completed_all_work() {
    let world = World::new().unwrap();
    let check = |host: &mut Host| {
        let (barrier, host) = (Barrier::new(12), &*host);
        std::thread::scope(|scope| {
            for reader in 0..12usize {
                let (world, barrier) = (&world, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    for step in 0..40 {
                        let file = [LARGE, SMALL, BUSYBOX][(reader + step) % 3];
                        let expected = world.expected(file);
                        let open = File::open(host.path(file)).unwrap();
                        let at = (reader * 7 + step * 3) * 65_536 % expected.len();
                        let mut bytes = vec![0; 65_536.min(expected.len() - at)];
                        open.read_exact_at(&mut bytes, at as u64).unwrap();
                        assert!(bytes == expected[at..at + bytes.len()], "wrong bytes of {file} at {at}");
                        // Some files stay open while others are opened and closed.
                        let second = File::open(host.path(file)).unwrap();
                        drop(open);
                        second.read_exact_at(&mut bytes, at as u64).unwrap();
                    }
                });
            }
        });
        for file in [LARGE, SMALL, BUSYBOX] {
            let open = host.open_through(file).unwrap();
            let expected = world.expected(file);
            assert!(read_whole(&open, expected.len()).unwrap() == expected);
        }
    };
    world.in_every_mode(check).unwrap();
}

#[test]
fn a_cleared_cache_harms_no_open_file() {
    let world = World::new().unwrap();
    let check = |host: &mut Host| {
        world.fill(host, &[SMALL, LARGE]).unwrap();
        // Pages in the kernel would hide where bytes come from.
        world.restart(host, || {}).unwrap();
        let [small, large] = [SMALL, LARGE].map(|file| host.open_through(file).unwrap());
        let mut clear = Command::new(binary("cachefs").unwrap());
        run(clear.args(["cache", "clear", "--cache"]).arg(&host.spec.cache)).unwrap().ok().unwrap();
        assert!(!cache_entry(&host.spec, &world.large).exists());
        assert_eq!(read_whole(&small, SMALL_CONTENT.len()).unwrap(), SMALL_CONTENT);
        assert!(read_whole(&large, LARGE_SIZE).unwrap() == world.large);
        assert!(fs::read(host.path(LARGE)).unwrap() == world.large);
    };
    world.in_every_mode(check).unwrap();
}

#[test]
fn a_killed_daemon_leaves_readable_what_was_passed_through() {
    let world = World::new().unwrap();
    let check = |host: &mut Host| {
        world.fill(host, &[SMALL]).unwrap();
        world.restart(host, || {}).unwrap();
        let open = host.open_through(SMALL).unwrap();
        host.mount.kill9().unwrap();
        match (host.mode, read_whole(&open, SMALL_CONTENT.len())) {
            ("passthrough", read) => assert_eq!(read.unwrap(), SMALL_CONTENT),
            (_, read) => assert_eq!(read.unwrap_err().raw_os_error(), Some(Errno::ENOTCONN as i32)),
        }
        assert!(fs::read(host.path(BUSYBOX)).is_err(), "what was not open cannot be opened");
        drop(open);
        host.overlay = None;
        host.mount.restart().unwrap();
        assert_eq!(fs::read(world.lower(host).join(SMALL)).unwrap(), SMALL_CONTENT);
    };
    world.in_every_mode(check).unwrap();
}

#[test]
fn damage_in_the_local_cache_is_found_in_every_mode() {
    let world = World::new().unwrap();
    let check = |host: &mut Host| {
        world.fill(host, &[SMALL, LARGE]).unwrap();
        let spec = host.spec.clone();
        let damage = || {
            flip(&cache_entry(&spec, SMALL_CONTENT), 3).unwrap();
            flip(&cache_entry(&spec, &world.large), LARGE_SIZE as u64 - 1).unwrap();
        };
        world.restart(host, damage).unwrap();
        for file in [SMALL, LARGE, SMALL, LARGE] {
            assert!(fs::read(host.path(file)).unwrap() == world.expected(file), "{file} differs");
        }
        assert!(host.counter("damaged_in_cache") >= 2);
        // The kernel keeps pages from before the damage was found. Only after a restart is the daemon asked for them.
        world.restart(host, || {}).unwrap();
        world.fill(host, &[SMALL, LARGE]).unwrap();
        assert_eq!(fs::read(cache_entry(&host.spec, SMALL_CONTENT)).unwrap(), SMALL_CONTENT, "it was mended");
        let open = host.open_through(LARGE).unwrap();
        assert!(read_whole(&open, LARGE_SIZE).unwrap() == world.large);
    };
    world.in_every_mode(check).unwrap();
}

/// A file system below the cache for which the kernel has no passthrough; unmounted when dropped.
struct Stacked(tempfile::TempDir);

impl Stacked {
    fn mount() -> Result<Stacked> {
        let directory = tempfile::Builder::new().prefix("stacked-").tempdir()?;
        let lower = directory.path().join("lower");
        fs::create_dir(&lower)?;
        Stacked::above(&lower, directory)
    }

    /// A writable overlay over `lower`, with all its parts in `directory`.
    fn above(lower: &Path, directory: tempfile::TempDir) -> Result<Stacked> {
        let stacked = Stacked(directory);
        let [upper, work, root] = ["upper", "work", "root"].map(|name| stacked.0.path().join(name));
        for directory in [&upper, &work, &root] {
            fs::create_dir(directory)?;
        }
        let options = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
        run(Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options]).arg(&root))?.ok()?;
        Ok(stacked)
    }
}

impl Drop for Stacked {
    fn drop(&mut self) {
        mounts::detach_below(self.0.path());
    }
}

#[test]
fn a_cache_on_a_stacked_file_system_falls_back_and_says_so_once() {
    let (world, stacked) = (World::new().unwrap(), Stacked::mount().unwrap());
    let mut spec = hosts::host(&world.site, "stacked").unwrap();
    let file = world.site.path().join("mount.toml");
    fs::write(&file, "open = 'passthrough'\n").unwrap();
    spec.arguments = vec!["--config".into(), file.display().to_string()];
    spec.cache = stacked.0.path().join("root/cache");
    let mut mount = Mount::start(spec.clone()).unwrap();
    let root = mount.chain(world.image.chain_ids().last().unwrap());
    for _ in 0..3 {
        assert_eq!(fs::read(root.join(SMALL)).unwrap(), SMALL_CONTENT);
        assert!(fs::read(root.join(LARGE)).unwrap() == world.large);
    }
    assert_eq!(hosts::status(&spec).unwrap()["open"], "cached");
    assert_eq!(hosts::counter(&spec, "opens_passthrough").unwrap(), 0);
    let log = mount.process().log();
    assert_eq!(log.matches("passthrough cannot be used here").count(), 1, "{log}");
}

/// SEMANTICS: "A hard link that a container makes to a file of its image is another file.";
/// "Files of an image have another device number than their directories".
///
/// When this test fails, the kernel has improved, and SEMANTICS.md can be corrected.
#[test]
fn overlayfs_cannot_find_the_origin_of_a_copy_above_fuse() {
    let world = World::new().unwrap();
    let mount = hosts::mount(&world.site, "links").unwrap();
    let chain = mount.chain(world.image.chain_ids().last().unwrap());
    let container = Stacked::above(&chain, tempfile::Builder::new().prefix("stacked-").tempdir().unwrap()).unwrap();
    let root = container.0.path().join("root");
    let [file, link, own, other] = [SMALL, "link", "own", "other"].map(|name| root.join(name));
    assert_ne!(fs::metadata(&file).unwrap().dev(), fs::metadata(&root).unwrap().dev());
    fs::hard_link(&file, &link).unwrap();
    assert_ne!(fs::metadata(&file).unwrap().ino(), fs::metadata(&link).unwrap().ino(), "two files");
    assert_eq!(fs::read(&file).unwrap(), fs::read(&link).unwrap());
    fs::write(&own, "of the container").unwrap();
    fs::hard_link(&own, &other).unwrap();
    assert_eq!(fs::metadata(&own).unwrap().ino(), fs::metadata(&other).unwrap().ino(), "what it made itself is one");
}

#[test]
fn the_mode_is_a_flag_with_a_default() {
    let world = World::new().unwrap();
    let mount = hosts::mount(&world.site, "default").unwrap();
    let spec = hosts::host(&world.site, "default").unwrap();
    assert_eq!(hosts::status(&spec).unwrap()["open"], "no-open", "auto");
    drop(mount);
    let mut command = Command::new(binary("cachefs").unwrap());
    command.arg("mount").arg(&spec.mountpoint).args(["--store", "/s", "--cache", "/c", "--open", "sometimes"]);
    let refused = run(&mut command).unwrap();
    assert_eq!(refused.code, 2);
    assert!(refused.stderr.contains("no-open, passthrough, cached"), "{}", refused.stderr);
}
