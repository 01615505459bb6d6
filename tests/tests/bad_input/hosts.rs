//! Hosts that cannot mount, because of the cache directory, the mount point or the FUSE device.

use super::*;

/// A site without images, and the mount of a host with an existing mount point.
fn site_and_host() -> Result<(Site, MountSpec)> {
    let site = Site::start()?;
    let spec = MountSpec::new(&site.path().join("host"), &site.store());
    std::fs::create_dir_all(&spec.mountpoint)?;
    Ok((site, spec))
}

/// Checks that the daemon refuses to start, in the foreground and in the background.
fn check_mount(spec: &MountSpec, words: &[&str]) -> Result<()> {
    let mounted =
        || Ok::<_, anyhow::Error>(mounts::list()?.iter().filter(|mount| mount.path == spec.mountpoint).count());
    let before = mounted()?;
    let foreground = spec.command()?;
    let mut background = Command::new(foreground.get_program());
    background.args(foreground.get_args().filter(|argument| *argument != "--foreground"));
    for mut command in [foreground, background] {
        let output = run_to_end("cachefs", &mut command, Duration::from_secs(30))?;
        check_refusal(&output, "cachefs", words)?;
    }
    ensure!(mounted()? == before, "{} is mounted all the same", spec.mountpoint.display());
    Ok(())
}

#[test]
fn cache_directories_that_cannot_be_used_are_named() {
    let (_site, good) = site_and_host().unwrap();
    let mut spec = good.clone();
    spec.cache = good.cache.with_file_name("file");
    std::fs::write(&spec.cache, "a file").unwrap();
    check_mount(&spec, &["cache directory", spec.cache.to_str().unwrap(), "not a directory"]).unwrap();
    spec.cache = spec.cache.join("below");
    check_mount(&spec, &["cache directory", spec.cache.to_str().unwrap()]).unwrap();

    spec.cache = good.cache.with_file_name("read-only");
    std::fs::create_dir(&spec.cache).unwrap();
    let path = spec.cache.to_str().unwrap();
    run(Command::new("mount").args(["-t", "tmpfs", "-o", "ro", "tmpfs", path])).unwrap().ok().unwrap();
    let refused = check_mount(&spec, &["cache directory", path, "read-only"]);
    mounts::detach_below(&spec.cache);
    refused.unwrap();

    let _first = Mount::start(good.clone()).unwrap();
    let mut second = good.clone();
    second.mountpoint = good.mountpoint.with_file_name("second");
    std::fs::create_dir(&second.mountpoint).unwrap();
    check_mount(&second, &["cache directory", good.cache.to_str().unwrap(), "in use by another cachefs"]).unwrap();
    assert!(mounts::at(&second.mountpoint).unwrap().is_none());
}

#[test]
fn mount_points_that_cannot_be_used_are_named() {
    let (_site, good) = site_and_host().unwrap();
    let place = |name: &str| good.mountpoint.with_file_name(name);
    let at = |path: &Path| MountSpec { mountpoint: path.to_owned(), ..good.clone() };
    let absent = place("absent");
    check_mount(&at(&absent), &["mount point", absent.to_str().unwrap(), "does not exist"]).unwrap();
    assert!(!absent.exists());
    let file = place("file");
    std::fs::write(&file, "a file").unwrap();
    check_mount(&at(&file), &["mount point", file.to_str().unwrap(), "not a directory"]).unwrap();
    let full = place("full");
    std::fs::create_dir(&full).unwrap();
    std::fs::write(full.join("precious"), "x").unwrap();
    check_mount(&at(&full), &["mount point", full.to_str().unwrap(), "not empty"]).unwrap();
    assert!(full.join("precious").exists());

    let first = Mount::start(good.clone()).unwrap();
    let second = MountSpec { cache: place("second-cache"), ..good.clone() };
    check_mount(&second, &["mount point", good.mountpoint.to_str().unwrap(), "busy", "fuse.cachefs"]).unwrap();
    assert!(first.path().join("layers").is_dir(), "the first one goes on");
}

#[test]
fn a_machine_without_fuse_is_told_so() {
    let (_site, spec) = site_and_host().unwrap();
    std::fs::create_dir_all(&spec.cache).unwrap();
    // In separate mount namespaces: no device, and a device that is not FUSE's.
    let hide = "mount -t tmpfs tmpfs /dev";
    let replace = "mount --bind /dev/null /dev/fuse";
    for (script, words) in [(hide, &["/dev/fuse", "load"][..]), (replace, &["/dev/fuse"])] {
        let mount = spec.command().unwrap();
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &format!(r#"{script} && exec "$@""#), "sh"]);
        command.arg(mount.get_program()).args(mount.get_args());
        let output = run_to_end("cachefs", &mut command, Duration::from_secs(30)).unwrap();
        check_refusal(&output, "cachefs", words).unwrap();
    }
    assert!(mounts::at(&spec.mountpoint).unwrap().is_none());
    // With the device, the same command works.
    drop(Mount::start(spec).unwrap());
}

#[test]
fn unmounting_what_is_not_mounted_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    for path in [directory.path().to_owned(), directory.path().join("absent")] {
        let mut command = Command::new(binary("cachefs").unwrap());
        let output = run(command.arg("unmount").arg(&path)).unwrap();
        check_refusal(&output, "cachefs", &[path.to_str().unwrap()]).unwrap();
    }
}
