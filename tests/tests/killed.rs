//! Workers that are killed: the keeper starts another one, which takes the mount over, and nobody notices but by waiting.
//!
//! The kernel sends unanswered requests once more since Linux 6.9; the tests need that.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{DirEntryExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::cluster::{Mount, MountSpec};
use tests::hosts;
use tests::images::{ImageFiles, image, small};
use tests::mounts::{self, Overlay};
use tests::process::{TIMEOUT, wait_until};
use tests::site::{Site, SiteSpec};
use tests::slowdisk::{DiskFault, SlowDisk};

/// The process that serves a mount, as it says itself.
fn worker(spec: &MountSpec) -> Result<u32> {
    let worker = hosts::status(spec)?["worker"].as_u64().context("status names no worker")?;
    Ok(u32::try_from(worker)?)
}

fn signal(pid: u32, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(i32::try_from(pid)?), signal).with_context(|| format!("cannot send {signal} to {pid}"))
}

/// Kills the worker, and waits for the next one.
fn kill_worker(spec: &MountSpec) -> Result<u32> {
    let before = worker(spec)?;
    signal(before, Signal::SIGKILL)?;
    let mut after = before;
    wait_until("another worker", TIMEOUT, || {
        after = worker(spec).unwrap_or(before);
        Ok(after != before)
    })?;
    Ok(after)
}

/// A file, a directory or a link of a tree, as it must look.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    mode: u32,
    size: u64,
    number: u64,
    content: Vec<u8>,
}

fn see(path: &Path) -> Result<Seen> {
    let meta = fs::symlink_metadata(path)?;
    let names = |path: &Path| -> Result<Vec<_>> {
        let names = fs::read_dir(path)?.map(|entry| entry.map(|entry| (entry.file_name(), entry.ino())));
        let mut names = names.collect::<Result<Vec<_>, _>>()?;
        names.sort();
        Ok(names)
    };
    let content = if meta.is_file() {
        let mut content = Vec::new();
        File::open(path)?.read_to_end(&mut content)?;
        content
    } else if meta.is_symlink() {
        fs::read_link(path)?.into_os_string().into_encoded_bytes()
    } else if meta.is_dir() {
        format!("{:?}", names(path)?).into_bytes()
    } else {
        Vec::new()
    };
    Ok(Seen { mode: meta.mode(), size: meta.size(), number: meta.ino(), content })
}

/// Everything below a directory.
fn everything(root: &Path) -> Result<BTreeMap<PathBuf, Seen>> {
    let (mut seen, mut stack) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(path) = stack.pop() {
        let one = see(&path)?;
        if one.mode & 0o170_000 == 0o040_000 {
            stack.extend(
                fs::read_dir(&path)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>()?,
            );
        }
        seen.insert(path, one);
    }
    Ok(seen)
}

/// Makes the kernel forget the content of a file, so that the next read of it is a request.
fn drop_pages(path: &Path) -> Result<()> {
    let file = File::open(path)?;
    Ok(posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?)
}

/// Looks at everything again and again until told to stop; notes each difference, and the longest that one look took.
struct Readers {
    is_over: AtomicBool,
    looks: AtomicU64,
    longest: AtomicU64,
    wrong: Mutex<Vec<String>>,
}

impl Readers {
    fn new() -> Readers {
        Readers {
            is_over: AtomicBool::new(false),
            looks: AtomicU64::new(0),
            longest: AtomicU64::new(0),
            wrong: Mutex::default(),
        }
    }

    /// Looks at things in an order that `seed` gives.
    fn look(&self, expected: &[(&PathBuf, &Seen)], seed: u64) {
        let mut state = seed;
        while !self.is_over.load(Ordering::SeqCst) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (path, seen) = expected[(state >> 33) as usize % expected.len()];
            let begun = Instant::now();
            let now = see(path).and_then(|now| {
                ensure!(
                    now == *seen,
                    "it differs: {:?} instead of {:?}",
                    (now.mode, now.size, now.number),
                    (seen.mode, seen.size, seen.number)
                );
                ensure!(fs::symlink_metadata(path.join("absent-name")).is_err());
                if now.mode & 0o170_000 == 0o100_000 { drop_pages(path) } else { Ok(()) }
            });
            self.longest.fetch_max(begun.elapsed().as_millis() as u64, Ordering::SeqCst);
            self.looks.fetch_add(1, Ordering::SeqCst);
            if let Err(error) = now {
                let words = format!("{}: {error:#}", path.display());
                self.wrong.lock().unwrap_or_else(PoisonError::into_inner).push(words);
            }
        }
    }

    /// Runs `action` while `count` readers look at `expected`.
    fn during(expected: &BTreeMap<PathBuf, Seen>, count: u64, action: impl FnOnce() -> Result<()>) -> Result<Readers> {
        let (readers, expected): (_, Vec<_>) = (Readers::new(), expected.iter().collect());
        let done = std::thread::scope(|scope| {
            for seed in 0..count {
                let (readers, expected) = (&readers, &expected);
                scope.spawn(move || readers.look(expected, seed));
            }
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(action));
            readers.is_over.store(true, Ordering::SeqCst);
            done
        });
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(readers)
    }
}

/// A store with an image, and a host.
fn world(name: &str, tree: &str) -> Result<(Site, ImageFiles, MountSpec)> {
    let (site, image) = (Site::start()?, image(name)?);
    hosts::load(&site, &image)?;
    let spec = hosts::host_trees(&site, "one", tree)?;
    Ok((site, image, spec))
}

fn top(image: &ImageFiles) -> String {
    image.chain_ids().pop().unwrap_or_default()
}

/// SEMANTICS: "Killing what serves a mount costs time, and nothing else."
fn readers_notice_nothing(tree: &str) -> Result<()> {
    let (_site, image, spec) = world("python3", tree)?;
    let mut mount = Mount::start(spec.clone())?;
    let root = fs::canonicalize(mount.tree(&top(&image)))?;
    let mut expected = everything(&root)?;
    expected.extend(everything(&mount.layer(&image.layers[0].diff_id))?);
    assert!(expected.len() > 1000);
    let readers = Readers::during(&expected, 4, || {
        for round in 0..15u64 {
            std::thread::sleep(Duration::from_millis(round * 137 % 400));
            kill_worker(&spec)?;
        }
        Ok(())
    });
    let readers = readers?;
    let wrong = readers.wrong.lock().unwrap_or_else(PoisonError::into_inner);
    assert!(wrong.is_empty(), "{} of {:?} looks: {:#?}", wrong.len(), readers.looks, &wrong[..wrong.len().min(10)]);
    println!("{tree}: {:?} looks, the longest took {:?} ms", readers.looks, readers.longest);
    assert_eq!(fs::canonicalize(mount.tree(&top(&image)))?, root);
    assert!(everything(&root)?.iter().all(|(path, seen)| expected.get(path) == Some(seen)));
    assert!(mount.stop()?.success());
    assert_eq!(mounts::at(&spec.mountpoint)?, None);
    Ok(())
}

#[test]
fn readers_of_a_native_tree_notice_nothing() {
    readers_notice_nothing("native").unwrap();
}

#[test]
fn readers_of_the_mounts_own_tree_notice_nothing() {
    readers_notice_nothing("fuse").unwrap();
}

/// Reads that wait for the shared disk when the worker is killed get their bytes from the next one; so do opens and look-ups.
#[test]
fn requests_on_the_way_are_answered_by_the_next_worker() {
    let (site, image) = (Site::start().unwrap(), small().unwrap());
    hosts::load(&site, &image).unwrap();
    let disk = SlowDisk::start(&site.store(), &site.path().join("slow"), Duration::ZERO, None).unwrap();
    for tree in ["native", "fuse"] {
        let mut spec = hosts::host_trees(&site, tree, tree).unwrap();
        spec.store = disk.path().to_owned();
        let mount = Mount::start(spec.clone()).unwrap();
        let root = fs::canonicalize(mount.tree(&top(&image))).unwrap();
        let open = File::open(root.join("bin/busybox")).unwrap();
        disk.fault(DiskFault::Hang).unwrap();
        let read = std::thread::spawn(move || {
            let mut bytes = vec![0; 1 << 20];
            open.read_exact_at(&mut bytes, 0).map(|()| bytes)
        });
        let other = root.join("data/noise");
        let reads = std::thread::spawn(move || fs::read(other));
        // Both wait now, or will in a moment: either is right.
        std::thread::sleep(Duration::from_millis(200));
        kill_worker(&spec).unwrap();
        assert!(!read.is_finished() && !reads.is_finished());
        disk.recover().unwrap();
        let busybox = fs::read("/bin/busybox").unwrap();
        assert!(read.join().unwrap().unwrap() == busybox[..1 << 20]);
        assert_eq!(reads.join().unwrap().unwrap().len(), 1 << 20);
    }
}

/// The shared disk is away when the worker is killed: what is cached goes on.
#[test]
fn the_next_worker_needs_no_shared_disk_for_what_is_cached() {
    let (site, image) = (Site::start().unwrap(), small().unwrap());
    hosts::load(&site, &image).unwrap();
    let disk = SlowDisk::start(&site.store(), &site.path().join("slow"), Duration::ZERO, None).unwrap();
    for (tree, fault) in [
        ("native", DiskFault::Hang),
        ("fuse", DiskFault::Hang),
        ("native", DiskFault::Estale),
        ("fuse", DiskFault::Eio),
    ] {
        let name = format!("{tree}-{fault:?}").to_lowercase();
        let mut spec = hosts::host_trees(&site, &name, tree).unwrap();
        spec.store = disk.path().to_owned();
        let mount = Mount::start(spec.clone()).unwrap();
        let root = fs::canonicalize(mount.tree(&top(&image))).unwrap();
        let expected = everything(&root).unwrap();
        disk.fault(fault).unwrap();
        kill_worker(&spec).unwrap();
        for path in expected.keys().filter(|path| path.is_file()) {
            drop_pages(path).unwrap();
        }
        assert!(everything(&root).unwrap() == expected, "{name}");
        disk.recover().unwrap();
    }
}

/// What the kernel knows stays in use, so that no collection takes it away, and is let go of when the kernel forgets it.
#[test]
fn the_lease_names_what_an_earlier_worker_has_shown() {
    let (site, image) = (
        Site::start_with(&SiteSpec { settings: "host_lease = '5s'\n".into(), ..SiteSpec::default() }).unwrap(),
        small().unwrap(),
    );
    hosts::load(&site, &image).unwrap();
    for tree in ["native", "fuse"] {
        let spec = hosts::host_trees(&site, tree, tree).unwrap();
        let mount = Mount::start(spec.clone()).unwrap();
        let overlay = Overlay::mount(&[fs::canonicalize(mount.tree(&top(&image))).unwrap()]).unwrap();
        assert!(overlay.root().join("bin/busybox").is_file());
        kill_worker(&spec).unwrap();
        let host = || site.ctl().json(&["hosts"]).map(|hosts| hosts.to_string());
        wait_until("the lease of the next worker", TIMEOUT, || Ok(host()?.contains(tree))).unwrap();
        site.ctl().ok(&["remove", "small:latest"]).unwrap();
        wait_until("a collection", TIMEOUT, || Ok(site.ctl().run(&["gc", "--grace", "0s"])?.succeeded())).unwrap();
        assert!(fs::read(overlay.root().join("bin/busybox")).unwrap() == fs::read("/bin/busybox").unwrap());
        drop(overlay);
        hosts::load(&site, &image).unwrap();
    }
}

/// A worker that dies while it starts, or again and again, is followed by another one; the mount is not given up.
#[test]
fn workers_that_die_young_are_followed_by_others() {
    let (_site, image, spec) = world("small", "native").unwrap();
    let mut mount = Mount::start(spec.clone()).unwrap();
    let root = fs::canonicalize(mount.tree(&top(&image))).unwrap();
    let keeper = mount.process().pid();
    let children = format!("/proc/{keeper}/task/{keeper}/children");
    let mut last = String::new();
    for _ in 0..5 {
        wait_until("a worker that was just born", TIMEOUT, || {
            let now = fs::read_to_string(&children)?;
            let young: Vec<u32> =
                now.split_whitespace().filter(|pid| !last.contains(*pid)).map(str::parse).collect::<Result<_, _>>()?;
            let is_born = !young.is_empty();
            last = now;
            young.into_iter().try_for_each(|pid| signal(pid, Signal::SIGKILL))?;
            Ok(is_born)
        })
        .unwrap();
    }
    drop_pages(&root.join("bin/busybox")).unwrap();
    assert!(fs::read(root.join("bin/busybox")).unwrap() == fs::read("/bin/busybox").unwrap());
    assert!(mount.process().log().contains("the worker died"));
    assert!(hosts::status(&spec).unwrap()["restarts"].as_u64() >= Some(1));
    assert!(mount.stop().unwrap().success());
}

/// Killing the keeper ends the mount, as it ends any FUSE mount whose server dies; the next one begins anew.
#[test]
fn the_death_of_the_keeper_is_the_mounts_end() {
    let (_site, image, spec) = world("small", "native").unwrap();
    let mut mount = Mount::start(spec.clone()).unwrap();
    mount.kill9().unwrap();
    let error = fs::read_dir(&spec.mountpoint).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::errno::Errno::ENOTCONN as i32));
    mount.restart().unwrap();
    assert!(mount.tree(&top(&image)).join("bin/busybox").is_file());
}

/// The keeper stays small, and has nothing to do.
#[test]
fn the_keeper_is_small_and_idle() {
    let (_site, image, spec) = world("small", "native").unwrap();
    let mut mount = Mount::start(spec.clone()).unwrap();
    let keeper = mount.process().pid();
    let switches = || -> Result<u64> {
        let text = fs::read_to_string(format!("/proc/{keeper}/status"))?;
        let counts = text.lines().filter(|line| line.contains("ctxt_switches"));
        Ok(counts.filter_map(|line| line.split_whitespace().last()?.parse::<u64>().ok()).sum())
    };
    for _ in 0..3 {
        kill_worker(&spec).unwrap();
    }
    let before = switches().unwrap();
    everything(&mount.chain(&top(&image))).unwrap();
    std::thread::sleep(Duration::from_secs(2));
    assert!(switches().unwrap() - before < 5, "it wakes without a reason");
    assert_eq!(fs::read_dir(format!("/proc/{keeper}/task")).unwrap().count(), 1);
    let text = fs::read_to_string(format!("/proc/{keeper}/status")).unwrap();
    let anonymous = text
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .and_then(|kib| kib.split_whitespace().next()?.parse::<u64>().ok());
    assert!(anonymous.unwrap() < 4096, "{text}");
    // The dead are not left behind.
    let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).unwrap();
    assert_eq!(children.split_whitespace().count(), 1, "{children}");
}
