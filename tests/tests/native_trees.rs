//! Native trees: what engines are given as an image's tree is an EROFS file system that the kernel reads by itself, mounted on demand
//! over the mount's own tree of the same chain.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;
use tests::cluster::{Mount, MountSpec, binary};
use tests::hosts;
use tests::images::{ImageFiles, small};
use tests::mounts::{self, Overlay};
use tests::process::{Output, TIMEOUT, run};
use tests::site::Site;
use tests::tree::{Ignore, diff, snapshot};

fn cachefs(arguments: &[&str]) -> Result<Output> {
    run(Command::new(binary("cachefs")?).args(arguments))
}

/// A store with the image `small`.
fn site() -> Result<(Site, ImageFiles)> {
    let (site, image) = (Site::start()?, small()?);
    hosts::load(&site, &image)?;
    Ok((site, image))
}

fn top(image: &ImageFiles) -> String {
    image.chain_ids().pop().unwrap_or_default()
}

/// Where native trees are mounted on a host.
fn native(spec: &MountSpec) -> Result<Vec<PathBuf>> {
    let chains = spec.mountpoint.join("chains");
    let all = mounts::list()?.into_iter();
    Ok(all.filter(|mount| mount.kind == "erofs" && mount.path.starts_with(&chains)).map(|mount| mount.path).collect())
}

/// The options of the mount at a path.
fn options(path: &Path) -> Result<String> {
    let table = fs::read_to_string("/proc/self/mounts")?;
    let line = table.lines().find(|line| line.split(' ').nth(1).map(Path::new) == Some(path));
    line.and_then(|line| line.split(' ').nth(3)).map(str::to_owned).context("nothing is mounted there")
}

fn trees(spec: &MountSpec) -> Result<Value> {
    Ok(hosts::status(spec)?["tree"].clone())
}

/// SEMANTICS: "A native tree shows what the chain shows."
#[test]
fn a_look_up_mounts_a_native_tree_which_shows_what_the_chain_shows() {
    let (site, image) = site().unwrap();
    let spec = hosts::host_trees(&site, "one", "native").unwrap();
    let mount = Mount::start(spec.clone()).unwrap();
    let (chain, tree) = (mount.chain(&top(&image)), mount.tree(&top(&image)));
    let expected = snapshot(&chain).unwrap();
    let inside = fs::metadata(chain.join("bin")).unwrap().dev();

    assert_eq!(fs::read_dir(mount.path().join("trees")).unwrap().count(), 0, "looking around mounts nothing");
    assert_eq!(fs::read_dir(mount.path().join("images/small")).unwrap().count(), 1);
    assert_eq!((native(&spec).unwrap(), trees(&spec).unwrap()["mounted"].clone()), (Vec::new(), Value::from(0)));
    assert!(fs::symlink_metadata(mount.tree(&"0".repeat(64))).is_err(), "no such chain");

    // All at once: it is mounted once.
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert!(tree.join("bin/busybox").is_file()));
        }
    });
    let there = fs::canonicalize(&tree).unwrap();
    assert_eq!(native(&spec).unwrap(), std::slice::from_ref(&chain));
    assert_eq!(there, chain);
    assert_eq!(trees(&spec).unwrap(), serde_json::json!({ "kind": "native", "why": null, "mounted": 1 }));
    assert_ne!(fs::metadata(tree.join("bin")).unwrap().dev(), inside);
    let seen = snapshot(&fs::canonicalize(mount.path().join("images/small/latest")).unwrap()).unwrap();
    let differences = diff(&seen, &expected, &Ignore::default());
    assert!(differences.is_empty(), "left is the native tree:\n{}", differences.join("\n"));
    let shown = options(&chain).unwrap();
    assert!(["ro", "nosuid", "nodev"].iter().all(|wanted| shown.split(',').any(|option| option == *wanted)), "{shown}");

    let mut cat = Command::new("setpriv");
    cat.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "cat"]).arg(tree.join("bin/busybox"));
    assert!(run(&mut cat).unwrap().stderr.contains("Permission denied"), "root alone enters the mount");
    let text = cachefs(&["status", "--mount", spec.mountpoint.to_str().unwrap()]).unwrap().stdout;
    assert!(text.contains("trees        native, 1 mounted"), "{text}");
}

#[test]
fn a_container_goes_on_after_the_unmount_and_ends_the_daemon_with_itself() {
    let (site, image) = site().unwrap();
    let spec = hosts::host_trees(&site, "one", "native").unwrap();
    let mut mount = Mount::start(spec.clone()).unwrap();
    let path = spec.mountpoint.to_str().unwrap();
    let overlay = Overlay::mount(&[mount.tree(&top(&image))]).unwrap();
    let inside = fs::File::open(mount.tree(&top(&image)).join("bin")).unwrap();
    let busy = cachefs(&["unmount", path]).unwrap();
    assert!(busy.code == 1 && busy.stderr.contains("is in use: stop the containers"), "{busy:?}");
    drop(inside);

    let in_use = cachefs(&["unmount", path]).unwrap();
    let words = format!("still use it: daemon {} goes on until they end", mount.process().pid());
    assert!(in_use.code == 1 && in_use.stderr.contains(&words), "{in_use:?}");
    assert_eq!((native(&spec).unwrap(), mounts::at(&spec.mountpoint).unwrap()), (Vec::new(), None));
    assert!(
        fs::read(overlay.root().join("bin/busybox")).unwrap() == fs::read("/bin/busybox").unwrap(),
        "never read before"
    );
    assert!(mount.process().exited().unwrap().is_none());
    drop(overlay);
    assert!(mount.process().wait(TIMEOUT).unwrap().success());
}

#[test]
fn a_tree_that_went_away_comes_back_at_the_next_look_up() {
    let (site, image) = site().unwrap();
    let spec = hosts::host_trees(&site, "one", "native").unwrap();
    let mut mount = Mount::start(spec.clone()).unwrap();
    let tree = mount.tree(&top(&image));
    let busybox = fs::read("/bin/busybox").unwrap();
    let read = || assert!(fs::read(tree.join("bin/busybox")).unwrap() == busybox);
    read();
    nix::mount::umount(&native(&spec).unwrap()[0]).unwrap();
    assert_eq!(native(&spec).unwrap().len(), 0, "an operator did that");
    // The kernel keeps a link for a second.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    read();
    assert_eq!(native(&spec).unwrap().len(), 1);
    mount.restart().unwrap();
    assert_eq!(native(&spec).unwrap().len(), 0, "it went with the mount of the daemon that was killed");
    read();
    assert_eq!(native(&spec).unwrap().len(), 1);
    let done = cachefs(&["unmount", spec.mountpoint.to_str().unwrap()]).unwrap();
    assert_eq!((done.code, done.stderr.as_str()), (0, ""));
    assert!(mount.process().wait(TIMEOUT).unwrap().success());
}

/// Where no native tree can be mounted, the mount's own serves under the same name.
#[test]
fn without_native_trees_the_mounts_own_are_there() {
    let (site, image) = site().unwrap();
    let (chosen, broken) =
        (hosts::host_trees(&site, "one", "fuse").unwrap(), hosts::host_trees(&site, "two", "native").unwrap());
    for spec in [&chosen, &broken] {
        let mut mount = Mount::start(spec.clone()).unwrap();
        if spec.mountpoint == broken.mountpoint {
            fs::remove_dir_all(spec.cache.join("trees")).unwrap();
            fs::write(spec.cache.join("trees"), "in the way").unwrap();
        }
        let tree = mount.tree(&top(&image));
        assert!(fs::read(tree.join("bin/busybox")).unwrap() == fs::read("/bin/busybox").unwrap());
        assert_eq!(fs::canonicalize(&tree).unwrap(), mount.chain(&top(&image)));
        assert_eq!(native(spec).unwrap(), Vec::<PathBuf>::new());
        if spec.mountpoint == chosen.mountpoint {
            assert_eq!(
                trees(spec).unwrap(),
                serde_json::json!({ "kind": "fuse", "why": "the configuration says so", "mounted": 0 })
            );
        }
        let told = mount.process().log().matches("has no native tree for now").count();
        assert_eq!(told, usize::from(spec.mountpoint == broken.mountpoint), "said once");
    }
}

/// util-linux/util-linux#2287: the kernel takes no source of more than 255 bytes. hanwen/go-fuse#465: it compares the group of who opens
/// a file, too.
#[test]
fn native_trees_need_no_short_path_and_no_group() {
    let (site, image) = site().unwrap();
    let mut spec = hosts::host_trees(&site, "one", "native").unwrap();
    spec.cache = spec.cache.with_file_name(["c"; 190].concat());
    let program = spec.cache.with_file_name("cachefs");
    let cachefs = binary("cachefs").unwrap();
    let script = format!("#!/bin/sh\nexec setpriv --regid 1 --clear-groups {} \"$@\"\n", cachefs.display());
    fs::create_dir_all(spec.cache.parent().unwrap()).unwrap();
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    spec.program = Some(program);
    let mount = Mount::start(spec.clone()).unwrap();
    assert!(fs::read(mount.tree(&top(&image)).join("bin/busybox")).unwrap() == fs::read("/bin/busybox").unwrap());
    assert_eq!(native(&spec).unwrap(), [mount.chain(&top(&image))]);
}

/// Loop devices whose files lie below a directory: the path of the file, and whether reads go past its pages in memory.
fn loops(below: &Path) -> Result<Vec<(PathBuf, bool)>> {
    let said =
        run(Command::new("losetup").args(["--list", "--noheadings", "--raw", "--output", "DIO,BACK-FILE"]))?.stdout;
    let all = said.lines().filter_map(|line| line.split_once(' '));
    let all = all.map(|(direct, file)| (PathBuf::from(file), direct == "1"));
    Ok(all.filter(|(file, _)| file.starts_with(below)).collect())
}

/// Kernels before 6.12 mount EROFS from block devices alone. This one takes both.
#[test]
fn native_trees_on_loop_devices_are_the_same_and_leave_no_device() {
    let (site, image) = site().unwrap();
    let spec = hosts::host_trees(&site, "one", "loop").unwrap();
    let mut mount = Mount::start(spec.clone()).unwrap();
    let (chain, tree) = (mount.chain(&top(&image)), mount.tree(&top(&image)));
    let expected = snapshot(&chain).unwrap();
    let seen = snapshot(&fs::canonicalize(&tree).unwrap()).unwrap();
    let differences = diff(&seen, &expected, &Ignore::default());
    assert!(differences.is_empty(), "left is the native tree:\n{}", differences.join("\n"));
    assert_eq!(native(&spec).unwrap(), std::slice::from_ref(&chain));
    assert_eq!(trees(&spec).unwrap(), serde_json::json!({ "kind": "loop", "why": null, "mounted": 1 }));
    let path = spec.mountpoint.to_str().unwrap();
    let text = cachefs(&["status", "--mount", path]).unwrap().stdout;
    assert!(text.contains("trees        native on loop devices, 1 mounted"), "{text}");
    let metadata = spec.cache.join("trees").join(top(&image).trim_start_matches("sha256:"));
    assert_eq!(loops(&spec.cache).unwrap(), [(metadata, true)]);

    // A container that goes on after the unmount has what it has not read yet.
    let overlay = Overlay::mount(&[tree]).unwrap();
    let in_use = cachefs(&["unmount", path]).unwrap();
    assert!(in_use.code == 1 && in_use.stderr.contains("goes on until they end"), "{in_use:?}");
    assert!(fs::read(overlay.root().join("bin/busybox")).unwrap() == fs::read("/bin/busybox").unwrap());
    assert!(mount.process().exited().unwrap().is_none());
    drop(overlay);
    assert!(mount.process().wait(TIMEOUT).unwrap().success(), "no device holds the data file");
    assert_eq!(loops(&spec.cache).unwrap(), []);
}

/// The device and inode number of every name below a directory.
fn numbers(root: &Path) -> Result<BTreeMap<PathBuf, (u64, u64)>> {
    let (mut numbers, mut stack) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(path) = stack.pop() {
        let found = fs::symlink_metadata(&path)?;
        if found.is_dir() {
            stack.extend(fs::read_dir(&path)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?);
        }
        numbers.insert(path.strip_prefix(root)?.to_owned(), (found.dev(), found.ino()));
    }
    Ok(numbers)
}

/// What `du` counts below a directory, bytes.
fn du(options: &str, root: &Path) -> Result<u64> {
    let said = run(Command::new("du").args([options, "--apparent-size", "--block-size=1"]).arg(root))?.stdout;
    said.split_whitespace().next().context("du says nothing")?.parse().context("du says no number")
}

/// What tar saves since the last call with the same list, directories aside.
fn saved_since(list: &Path, root: &Path) -> Result<Vec<String>> {
    let mut tar = Command::new("tar");
    tar.args(["--create", "--file=/dev/null", "--verbose", "--no-check-device", "--listed-incremental"]);
    // The root itself is each overlay's own directory, with a number of the local disk.
    let said = run(tar.arg(list).arg("--directory").arg(root).args(["bin", "data", "etc"]))?;
    Ok(said.stdout.lines().filter(|name| !name.ends_with('/')).map(str::to_owned).collect())
}

/// SEMANTICS: "With `xino` a container has one device number,"
#[test]
fn with_xino_there_is_one_device_and_numbers_stay() {
    let (site, image) = site().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let list = directory.path().join("list");
    let mut shown = Vec::new();
    for name in ["one", "two"] {
        let mount = Mount::start(hosts::host_trees(&site, name, "native").unwrap()).unwrap();
        let tree = fs::canonicalize(mount.tree(&top(&image))).unwrap();

        let apart = Overlay::writable(&tree, "xino=off").unwrap();
        let devices: BTreeSet<_> = numbers(&apart.root()).unwrap().into_values().map(|(device, _)| device).collect();
        assert!(devices.len() > 1, "this is why the statement is made");
        assert!(du("-sx", &apart.root()).unwrap() < du("-s", &apart.root()).unwrap() - 1_000_000);

        let overlay = Overlay::writable(&tree, "xino=auto").unwrap();
        let root = overlay.root();
        let before = numbers(&root).unwrap();
        let device = fs::metadata(&root).unwrap().dev();
        assert!(before.values().all(|(found, _)| *found == device));
        assert_eq!(du("-sx", &root).unwrap(), du("-s", &root).unwrap());
        let saved = saved_since(&list, &root).unwrap();
        assert_eq!(saved.is_empty(), !shown.is_empty(), "all at first, nothing on the other host: {saved:?}");

        // What the container changes keeps its number and its links. Of a file with several names overlayfs copies each by itself.
        let is_only =
            |path: &&PathBuf| fs::symlink_metadata(root.join(path)).is_ok_and(|it| it.is_file() && it.nlink() == 1);
        let name = before.keys().find(is_only).unwrap();
        let (file, link) = (root.join(name), root.join("bin/linked"));
        fs::hard_link(&file, &link).unwrap();
        let (one, other) = (fs::metadata(&file).unwrap(), fs::metadata(&link).unwrap());
        assert_eq!((one.dev(), one.ino(), one.nlink()), (other.dev(), other.ino(), other.nlink()));
        assert_eq!((one.dev(), one.ino()), before[name]);
        assert_eq!(fs::metadata(root.join("bin")).unwrap().ino(), before[Path::new("bin")].1);
        fs::write(root.join("new"), "new").unwrap();
        assert_eq!(fs::metadata(root.join("new")).unwrap().dev(), device);

        let below = before.into_iter().filter(|(path, _)| path.components().count() > 0);
        shown.push(below.map(|(path, (_, number))| (path, number)).collect::<Vec<_>>());
    }
    assert!(shown[0].len() > 10 && shown[0] == shown[1], "the same numbers on every host");
}
