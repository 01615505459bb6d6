//! How a host's daemon ends, and what does not end it.

use std::fs;
use std::process::Command;

use anyhow::Result;
use nix::sys::signal::Signal;
use serde_json::Value;
use tests::cluster::{Mount, binary};
use tests::hosts;
use tests::images::small;
use tests::mounts::{self, Overlay};
use tests::process::{Output, Process, TIMEOUT, run, wait_until};
use tests::site::Site;

fn cachefs(arguments: &[&str]) -> Result<Output> {
    run(Command::new(binary("cachefs")?).args(arguments))
}

/// Sends the signals that make other daemons reload or report their state. Each one must be logged as ignored.
fn pester(process: &mut Process) -> Result<()> {
    for signal in [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2] {
        process.signal(signal)?;
        let told = format!("{signal} is ignored");
        process.wait_ready(TIMEOUT, || Ok(true))?;
        wait_until(&told, TIMEOUT, || Ok(process.log().contains(&told)))?;
    }
    anyhow::ensure!(process.exited()?.is_none(), "it has ended: {}", process.log());
    Ok(())
}

/// Other daemons ended on `systemctl kill -s HUP`, logrotate or `sv hup`: OpenDMARC #322, laminar #166, logiops #84.
#[test]
fn signals_to_reload_end_neither_daemon() {
    let (mut site, image) = (Site::start().unwrap(), small().unwrap());
    hosts::load(&site, &image).unwrap();
    let mut mount = hosts::mount(&site, "one").unwrap();
    pester(mount.process()).unwrap();
    pester(site.coordinator().process()).unwrap();
    assert!(fs::read_dir(mount.layer(&image.layers[0].diff_id)).unwrap().count() > 0);
    assert_eq!(site.images().unwrap().len(), 1);
    assert!(mount.stop().unwrap().success());
    assert!(site.coordinator().stop().unwrap().success());
}

/// The entry of `cachefs status` for the daemon `pid`, if it is unmounted but still runs.
fn leftover(pid: u32) -> Result<Option<Value>> {
    let status: Value = serde_json::from_str(&cachefs(&["status", "--json"])?.stdout)?;
    let all = status["unmounted"].as_array().cloned().unwrap_or_default();
    Ok(all.into_iter().find(|daemon| daemon["pid"] == pid))
}

#[test]
fn an_unmount_under_a_container_says_that_the_daemon_goes_on() {
    let (site, image) = (Site::start().unwrap(), small().unwrap());
    hosts::load(&site, &image).unwrap();
    let spec = hosts::host(&site, "one").unwrap();
    let mut mount = Mount::start(spec.clone()).unwrap();
    let (pid, path) = (mount.process().pid(), mount.path().to_string_lossy().into_owned());
    let layers: Vec<_> = image.layers.iter().map(|layer| mount.layer(&layer.diff_id)).collect();

    let open = fs::File::open(layers[0].join("bin/busybox")).unwrap();
    let busy = cachefs(&["unmount", &path]).unwrap();
    assert!(busy.code == 1 && busy.stderr.contains("is in use: stop the containers"), "{busy:?}");
    assert_eq!(leftover(pid).unwrap(), None);
    drop(open);

    let overlay = Overlay::mount(&layers).unwrap();
    let in_use = cachefs(&["unmount", &path]).unwrap();
    let words = format!("still use it: daemon {pid} goes on until they end");
    assert!(in_use.code == 1 && in_use.stderr.contains(&words), "{in_use:?}");
    assert!(mounts::at(&spec.mountpoint).unwrap().is_none());
    assert!(fs::read(overlay.root().join("bin/busybox")).unwrap() == fs::read("/bin/busybox").unwrap());
    let daemon = leftover(pid).unwrap().expect("status shows it");
    assert_eq!((&daemon["mountpoint"], &daemon["unmounted"]), (&Value::from(path.as_str()), &Value::from(true)));
    let text = cachefs(&["status"]).unwrap().stdout;
    assert!(text.contains(&format!("{path}  unmounted, still in use  (pid {pid}, ")), "{text}");
    let again = run(&mut spec.command().unwrap()).unwrap();
    let words = format!("in use by another cachefs daemon, {pid}: {path} was unmounted");
    assert!(again.code == 1 && again.stderr.contains(&words), "{again:?}");

    drop(overlay);
    assert!(mount.process().wait(TIMEOUT).unwrap().success());
    assert_eq!(leftover(pid).unwrap(), None);
    let mut mount = Mount::start(spec.clone()).unwrap();
    let serving = run(&mut spec.command().unwrap()).unwrap();
    assert!(serving.code == 1 && serving.stderr.contains("a file system of type fuse.cachefs"), "{serving:?}");
    let other = hosts::host(&site, "two").unwrap().mountpoint;
    fs::create_dir_all(&other).unwrap();
    let mut elsewhere = spec.clone();
    elsewhere.mountpoint = other;
    let claimed = run(&mut elsewhere.command().unwrap()).unwrap();
    let words = format!("another cachefs daemon, {}, which serves {path}: unmount that", mount.process().pid());
    assert!(claimed.code == 1 && claimed.stderr.contains(&words), "{claimed:?}");
    // The same command under the name of umount(8).
    let done = cachefs(&["umount", &path]).unwrap();
    assert_eq!((done.code, done.stderr.as_str()), (0, ""));
    assert!(mount.process().wait(TIMEOUT).unwrap().success());
}
