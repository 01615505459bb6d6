//! A mount that hangs, a full disk, death at any moment.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::mount::{MsFlags, mount};
use nix::sys::signal::Signal;
use tests::containerd::{Containerd, Snapshotter};
use tests::mounts;
use tests::process::{Output, TIMEOUT, wait_until};
use tests::site::Site;
use tests::{hosts, images};

use super::engine::Fleet;

/// `ctr snapshots` of our snapshotter.
fn snapshots(containerd: &Containerd, arguments: &[&str]) -> Result<Output> {
    containerd.run(&[&["snapshots", "--snapshotter", "cachefs"], arguments].concat())
}

/// containerd holds a lock while it asks for a snapshot: whoever does not answer would stop every start on the node.
#[test]
fn a_mount_that_hangs_holds_nobody_up_for_long() {
    let fleet = Fleet::start().unwrap();
    let image = images::small().unwrap();
    let reference = fleet.publish(&image, "small").unwrap();
    let local = fleet.push(&images::image("bash").unwrap(), "local").unwrap();
    fleet.cri.pull(&local).unwrap();
    let pod = fleet.cri.pod("one").unwrap();
    fleet.mount.signal_worker(Signal::SIGSTOP).unwrap();
    let begin = Instant::now();
    let before = fleet.fetches(&image);
    fleet.cri.pull(&reference).unwrap();
    let fetched = fleet.fetches(&image).iter().sum::<usize>() - before.iter().sum::<usize>();
    assert_eq!(fetched, image.layers.len(), "containerd fetches for itself");
    for (name, image) in [("a", &local), ("b", &reference)] {
        let container = fleet.cri.run(&pod, name, image, &["/bin/sleep", "1000000"]).unwrap();
        assert_eq!(fleet.cri.exec(&container, &["/bin/echo", "runs"]).unwrap().0, 0);
    }
    assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", begin.elapsed());
    fleet.mount.signal_worker(Signal::SIGCONT).unwrap();
    fleet.cri.remove_pod(&pod).unwrap();
}

#[test]
fn on_a_full_disk_nothing_is_lost_and_it_goes_on_once_there_is_room() {
    let site = Site::start().unwrap();
    let store = hosts::mount(&site, "one").unwrap();
    let directory = site.path().join("small-disk");
    std::fs::create_dir(&directory).unwrap();
    mount(Some("tmpfs"), &directory, Some("tmpfs"), MsFlags::empty(), Some("size=4m,nr_inodes=400")).unwrap();
    let mut snapshotter = Snapshotter::start(&directory, store.path()).unwrap();
    let containerd = Containerd::start(&snapshotter, "none").unwrap();
    let prepare = |number: usize| snapshots(&containerd, &["prepare", &format!("n{number}")]).unwrap();
    prepare(0).ok().unwrap();
    let ballast = directory.join("ballast");
    let fill =
        std::process::Command::new("dd").arg("if=/dev/zero").arg(format!("of={}", ballast.display())).output().unwrap();
    assert!(String::from_utf8_lossy(&fill.stderr).contains("No space left"), "{fill:?}");
    let mut refused = None;
    for number in 1..500 {
        let output = prepare(number);
        if !output.succeeded() {
            refused = Some((number, output.stderr));
            break;
        }
    }
    let (number, why) = refused.expect("the disk was full");
    let words = ["No space left", "os error 28", "unavailable", "error reading from server", "EOF"];
    assert!(words.iter().any(|words| why.contains(words)), "{why}");
    std::fs::remove_file(&ballast).unwrap();
    // Where its database takes nothing any more it ends, for its service to start it again.
    wait_until("a snapshot once there is room", TIMEOUT, || {
        if snapshotter.process().exited()?.is_some() {
            snapshotter.restart()?;
        }
        Ok(prepare(number).succeeded())
    })
    .unwrap();
    let listed = snapshots(&containerd, &["list"]).unwrap().ok().unwrap();
    for number in 0..=number {
        assert!(listed.contains(&format!("n{number} ")), "n{number} is lost: {listed}");
    }
    drop(containerd);
    drop(snapshotter);
    mounts::detach_below(&directory);
}

#[test]
fn killed_at_any_moment_it_lists_what_it_has_and_has_what_it_lists() {
    let site = Site::start().unwrap();
    let store = hosts::mount(&site, "one").unwrap();
    // On a socket that systemd holds: else containerd would wait for seconds before it connects again.
    let mut snapshotter = Snapshotter::start_held(&site.path().join("host-one"), store.path()).unwrap();
    let containerd = Containerd::start(&snapshotter, "none").unwrap();
    let mut pause = Duration::from_millis(5);
    for round in 0..15 {
        std::thread::scope(|scope| {
            let containerd = &containerd;
            scope.spawn(move || {
                for step in 0..4 {
                    let name = |kind: &str| format!("{kind}-{round}-{step}");
                    // Each may fail: the snapshotter is being killed.
                    let _ = snapshots(containerd, &["prepare", &name("key")]);
                    let _ = snapshots(containerd, &["commit", &name("base"), &name("key")]);
                    let _ = snapshots(containerd, &["prepare", &name("top"), &name("base")]);
                    let _ = snapshots(containerd, &["prepare", &name("gone"), &name("base")]);
                    let _ = snapshots(containerd, &["rm", &name("gone")]);
                }
            });
            std::thread::sleep(pause);
            snapshotter.restart().unwrap();
        });
        pause += Duration::from_millis(9);
    }
    wait_until("containerd to find the snapshotter", TIMEOUT, || Ok(snapshots(&containerd, &["list"])?.succeeded()))
        .unwrap();
    let listed = snapshots(&containerd, &["list"]).unwrap().ok().unwrap();
    let tops: BTreeSet<&str> = listed
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| name.starts_with("top"))
        .collect();
    assert!(tops.len() > 20, "{listed}");
    for top in &tops {
        let mounts = snapshots(&containerd, &["mounts", "/nowhere", top]).unwrap().ok().unwrap();
        let upper = mounts.split(['=', ',', ' ', ':']).find(|word| word.ends_with("/fs")).unwrap();
        assert!(std::path::Path::new(upper).is_dir(), "{top}: {mounts}");
    }
    // Whatever containerd knows can be removed, and then nothing is left on the disk.
    for kind in ["top", "gone", "key", "base"] {
        for name in
            listed.lines().filter_map(|line| line.split_whitespace().next()).filter(|name| name.starts_with(kind))
        {
            let _ = snapshots(&containerd, &["rm", name]);
        }
    }
    // What only the snapshotter knows, because it died in the middle of an answer, goes with a later collection: each removal
    // causes one.
    wait_until("an empty disk", TIMEOUT, || {
        snapshots(&containerd, &["prepare", "last"])?.ok()?;
        snapshots(&containerd, &["rm", "last"])?.ok()?;
        std::thread::sleep(Duration::from_millis(200));
        Ok(snapshotter.directories()? == 0)
    })
    .unwrap();
}
