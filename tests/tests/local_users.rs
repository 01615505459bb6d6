//! Other users of a host can do nothing with its mount and its cache. (The tests of `data_root` check with dockerd that
//! containers on top of the mount lose nothing by this.)

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sys::statvfs::{FsFlags, statvfs};
use tests::cluster::{Mount, MountSpec};
use tests::hosts;
use tests::images::archive::{Archive, Header, Kind};
use tests::images::{Compression, ImageBuilder, ImageFiles, Pools};
use tests::process::{Output, run};
use tests::site::{Site, run_to_end};

const NOBODY: u32 = 65534;

/// An image in which everything is open to everybody: a setuid program, a program with capabilities, a device.
fn open_image(directory: &Path) -> Result<ImageFiles> {
    /// `cap_setuid,cap_dac_override=ep`, revision 2.
    const CAPABILITIES: [u8; 20] = [1, 0, 0, 2, 0x82, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let busybox = fs::read("/bin/busybox")?;
    let mut tar = Archive::new(Vec::new());
    for path in ["bin/", "dev/"] {
        tar.add(&Header::new(Kind::Directory, path).mode(0o777), "")?;
    }
    tar.add(&Header::new(Kind::File, "bin/busybox").mode(0o4755), &busybox)?;
    tar.add(&Header::new(Kind::File, "bin/cat").mode(0o755).xattr("security.capability", CAPABILITIES), &busybox)?;
    tar.add(&Header::new(Kind::CharDevice, "dev/zero").mode(0o666).device(1, 5), "")?;
    tar.add(&Header::new(Kind::File, "open").mode(0o666), "open to all\n")?;
    let pools = Pools::open(directory)?;
    let layer = pools.layer(&tar.finish()?, Compression::Gzip)?;
    ImageBuilder::new("open").layer(layer).build(&pools, &directory.join("image"))
}

fn as_nobody(program: &str, arguments: &[&Path]) -> Result<Output> {
    let mut command = Command::new("setpriv");
    command.args([&format!("--reuid={NOBODY}"), &format!("--regid={NOBODY}"), "--clear-groups", program]);
    run(command.args(arguments))
}

fn check_denied(output: &Output) -> Result<()> {
    let text = format!("{}{}", output.stdout, output.stderr);
    // The message of a shell's `cd` differs.
    let denied = text.contains("ermission denied") || text.contains("can't cd to");
    ensure!(output.code != 0 && denied, "{output:?}");
    Ok(())
}

/// Collects everything below a directory. Symbolic links are not followed.
fn walk(directory: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            walk(&entry.path(), found)?;
        }
        found.push(entry.path());
    }
    Ok(())
}

/// A daemon with this umask, below directories that everybody can reach.
fn mount_with_umask(site: &Site, umask: &str) -> Result<(Mount, MountSpec)> {
    let mut spec = hosts::host(site, &format!("umask-{umask}"))?;
    let above = spec.cache.parent().unwrap_or(&spec.cache).to_owned();
    for path in [site.path(), &above] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    }
    spec.first = Some(format!("umask {umask}"));
    // The cache directory has the mode that an earlier version gave it.
    fs::create_dir(&spec.cache)?;
    fs::set_permissions(&spec.cache, fs::Permissions::from_mode(0o755))?;
    Ok((Mount::start(spec.clone())?, spec))
}

/// SEMANTICS: "Root alone enters the mount, and nothing in it gives anybody more rights."
#[test]
fn a_local_user_can_enter_neither_the_mount_nor_the_cache() {
    let directory = tempfile::tempdir().unwrap();
    let image = open_image(directory.path()).unwrap();
    let site = Site::start().unwrap();
    hosts::load(&site, &image).unwrap();
    let (mount, spec) = mount_with_umask(&site, "0000").unwrap();
    let root = mount.chain(&image.chain_ids()[0]);
    // root sees everything, but the mount gives nobody additional rights.
    assert_eq!(fs::read(root.join("open")).unwrap(), b"open to all\n");
    assert_eq!(root.join("bin/busybox").metadata().unwrap().mode() & 0o7777, 0o4755);
    for path in [mount.path(), &root] {
        let flags = statvfs(path).unwrap().flags();
        assert!(flags.contains(FsFlags::ST_NOSUID | FsFlags::ST_NODEV | FsFlags::ST_RDONLY), "{flags:?}");
    }
    let top = mount.path().metadata().unwrap();
    assert_eq!((top.mode() & 0o7777, top.uid(), top.gid()), (0o700, 0, 0));

    let layer = mount.layer(&image.diff_ids()[0]);
    let inside =
        [mount.path().join("layers"), mount.path().join("images/open"), layer, root.clone(), root.join("open")];
    for path in &inside {
        check_denied(&as_nobody("stat", &[path]).unwrap()).unwrap();
        check_denied(&as_nobody("ls", &[path]).unwrap()).unwrap();
    }
    check_denied(&as_nobody("ls", &[mount.path()]).unwrap()).unwrap();
    check_denied(&as_nobody("cat", &[&root.join("open")]).unwrap()).unwrap();
    check_denied(&as_nobody("head", &[Path::new("-c1"), &root.join("dev/zero")]).unwrap()).unwrap();
    check_denied(&as_nobody("sh", &[Path::new("-c"), &root.join("bin/busybox")]).unwrap()).unwrap();
    check_denied(&as_nobody("sh", &[Path::new("-c"), &root.join("bin/cat")]).unwrap()).unwrap();
    let inside = as_nobody("sh", &[Path::new("-c"), Path::new("cd \"$0\""), mount.path()]).unwrap();
    assert!(!inside.succeeded() && inside.stderr.contains("can't cd"), "{inside:?}");

    check_denied(&as_nobody("ls", &[&spec.cache]).unwrap()).unwrap();
    check_denied(&as_nobody("stat", &[&spec.cache.join("control.sock")]).unwrap()).unwrap();
}

#[test]
fn what_a_daemon_makes_is_its_users_alone_whatever_the_umask() {
    let directory = tempfile::tempdir().unwrap();
    let image = open_image(directory.path()).unwrap();
    let site = Site::start().unwrap();
    hosts::load(&site, &image).unwrap();
    for umask in ["0000", "0022", "0077"] {
        let (mount, spec) = mount_with_umask(&site, umask).unwrap();
        assert_eq!(fs::read(mount.chain(&image.chain_ids()[0]).join("open")).unwrap(), b"open to all\n");
        let (cache, objects) = (spec.cache.clone(), spec.cache.join("objects"));
        let cached = || Ok(fs::read_dir(&objects)?.next().is_some() && cache.join("catalogue").exists());
        tests::process::wait_until("something in the cache", tests::process::TIMEOUT, cached).unwrap();
        let mut found = vec![spec.cache.clone()];
        walk(&spec.cache, &mut found).unwrap();
        let is_socket = |path: &PathBuf| path.symlink_metadata().is_ok_and(|meta| meta.file_type().is_socket());
        assert!(found.iter().any(is_socket), "{found:?}");
        for path in found {
            // A file that was being written may have been renamed by now.
            let Ok(meta) = path.symlink_metadata() else { continue };
            let expected = if meta.is_dir() { 0o700 } else { 0o600 };
            assert_eq!((meta.mode() & 0o7777, meta.uid()), (expected, 0), "umask {umask}: {}", path.display());
        }
    }
}

/// Checks that the daemon refuses its cache directory.
fn check_refused(spec: &MountSpec, words: &[&str]) -> Result<()> {
    let output = run_to_end("cachefs", &mut spec.command()?, Duration::from_secs(30))?;
    let path = spec.cache.display().to_string();
    let names = |word: &&str| output.stderr.contains(*word);
    ensure!(output.code == 1 && words.iter().all(names) && output.stderr.contains(&path), "{output:?}");
    Ok(())
}

#[test]
fn a_cache_directory_that_others_own_or_can_write_is_refused() {
    let site = Site::start().unwrap();
    let mut spec = MountSpec::new(&site.path().join("host"), &site.store());
    fs::create_dir_all(&spec.mountpoint).unwrap();
    let make = |name: &str, mode: u32| {
        let path = spec.cache.with_file_name(name);
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    };
    let (foreign, open, system) = (make("foreign", 0o700), make("open", 0o777), make("system", 0o755));
    chown(&foreign, Some(NOBODY), None).unwrap();
    fs::write(system.join("precious"), "x").unwrap();
    let cases = [
        (foreign.clone(), &["belongs to uid 65534"][..]),
        (foreign.join("below"), &["uid 65534 may change"]),
        (open.clone(), &["others may write to it", "chmod 700"]),
        (system.clone(), &["it holds files that are not of a cache"]),
    ];
    for (cache, words) in cases {
        spec.cache = cache;
        check_refused(&spec, words).unwrap();
    }
    // Their modes were not changed.
    let mode = |path: &Path| path.metadata().unwrap().mode() & 0o7777;
    assert_eq!((mode(&foreign), mode(&open), mode(&system)), (0o700, 0o777, 0o755));
    assert!(tests::mounts::at(&spec.mountpoint).unwrap().is_none());
}
