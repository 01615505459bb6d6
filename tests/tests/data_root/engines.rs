//! Newer versions of Docker with the overlay2 driver, from Debian's suites: what users do, once through.

use nix::sys::signal::Signal;
use serde_json::json;
use tests::engine_tree::EngineTree;
use tests::images::image;
use tests::process::{TIMEOUT, wait_until};
use tests::registry::Registry;
use tests::workloads::{compose, swarm};

use super::host::Host;
use super::images::{assert_saved, build};

/// Goes through what users do with the dockerd of a suite, or with this machine's, on trees of one kind.
fn works(suite: Option<&str>, version: &str, trees: &str) {
    let tree = suite.map(EngineTree::of).transpose().unwrap();
    let registry = Registry::start().unwrap();
    let mut host = Host::prepare_on(&["small", "torture-zstd"], trees).unwrap();
    host.start_docker_of(tree).unwrap();
    host.docker_mut().forward(&registry.address()).unwrap();
    let running = host.docker().ok(&["version", "--format", "{{.Server.Version}}"]).unwrap();
    assert!(running.starts_with(version), "{running}");
    assert_eq!(host.docker().ok(&["info", "--format", "{{.Driver}}"]).unwrap(), "overlay2");
    containers(&host);
    build(&host, "0");
    build(&host, "1");
    assert_saved(host.docker(), &["small", "torture-zstd"]);
    pushed_and_pulled(&host, &registry);
    compose("small", &host.docker().environment()).unwrap();
    // A swarm and live-restore exclude each other.
    host.docker_mut().set_live_restore(false).unwrap();
    swarm("small", |arguments| host.docker().ok(arguments)).unwrap();
    host.docker_mut().set_live_restore(true).unwrap();
    restarts(&mut host);
    prunes(&mut host);
}

/// Two images with a shared base, several containers at once.
fn containers(host: &Host) {
    std::thread::scope(|scope| {
        for (image, number) in [("small", 0), ("torture-zstd", 1), ("small", 2), ("torture-zstd", 3)] {
            scope.spawn(move || {
                let said = host.shell(image, &format!("echo {number} > /number && rm /bin/ls && cat /number")).unwrap();
                assert_eq!(said, number.to_string());
            });
        }
    });
    let docker = host.docker();
    docker.ok(&["run", "--detach", "--name", "long", "--network", "none", "small", "sleep", "1000000"]).unwrap();
    docker.ok(&["exec", "long", "sh", "-c", "echo changed > /data/greeting; rm /data/noise"]).unwrap();
    let diff = docker.ok(&["diff", "long"]).unwrap();
    assert!(diff.contains("C /data/greeting") && diff.contains("D /data/noise"), "{diff}");
    let below = docker.ok(&["inspect", "--format", "{{.GraphDriver.Data.LowerDir}}", "long"]).unwrap();
    let below: Vec<_> = below.split(':').collect();
    assert!(below.len() == 2 && below[0].contains("-init"), "the init layer and one more: {below:?}");
    docker.ok(&["commit", "long", "derived:1"]).unwrap();
    assert_eq!(host.shell("derived:1", "cat /data/greeting; ls /data").unwrap(), "changed\ngreeting");
    assert_saved(docker, &["derived:1"]);
}

/// A layer on top of the store's is all that goes to a registry that has these, and all that comes back.
fn pushed_and_pulled(host: &Host, registry: &Registry) {
    registry.push(&image("small").unwrap(), "team/small", "v1").unwrap();
    let (docker, name) = (host.docker(), registry.reference("team/derived", "v1"));
    docker.ok(&["tag", "derived:1", &name]).unwrap();
    docker.ok(&["push", &name]).unwrap();
    docker.ok(&["rmi", &name, "derived:1"]).unwrap();
    docker.ok(&["pull", "--quiet", &name]).unwrap();
    assert_eq!(host.shell(&name, "cat /data/greeting; ls /data").unwrap(), "changed\ngreeting");
    docker.ok(&["rmi", &name]).unwrap();
}

/// What serves the mount dies again and again. A container that looks at its image all the while goes on, and others start.
fn worker_dies(host: &Host) {
    const LOOK: &str = "for i in $(seq 60); do ls -lR /bin /data >/dev/null && cat /data/* /bin/busybox >/dev/null && \
         /bin/busybox true && ! /bin/busybox stat /absent 2>/dev/null || exit 1; done; echo whole";
    host.docker().ok(&["start", "long"]).unwrap();
    std::thread::scope(|scope| {
        let looks = scope.spawn(|| host.docker().ok(&["exec", "long", "sh", "-c", LOOK]).unwrap());
        for _ in 0..5 {
            let before = host.mount.worker().unwrap();
            host.mount.signal_worker(Signal::SIGKILL).unwrap();
            // So that the container's looks are requests.
            host.mount.forget().unwrap();
            wait_until("another worker", TIMEOUT, || Ok(host.mount.worker().is_ok_and(|now| now != before))).unwrap();
            assert_eq!(host.shell("small", "cat /data/greeting").unwrap(), "hello again");
        }
        assert_eq!(looks.join().unwrap(), "whole");
    });
}

/// dockerd and the mount's daemon may die; containers go on, or start again.
fn restarts(host: &mut Host) {
    worker_dies(host);
    mount_comes_back(host);
    let pid = |host: &Host| host.docker().ok(&["inspect", "--format", "{{.State.Pid}}", "long"]).unwrap();
    let before = pid(host);
    host.docker_mut().kill9().unwrap();
    host.docker_mut().restart().unwrap();
    assert_eq!(pid(host), before, "live-restore");
    assert_eq!(host.docker().ok(&["exec", "long", "cat", "/data/greeting"]).unwrap(), "changed");
    host.docker().ok(&["restart", "--time", "0", "long"]).unwrap();
    mount_comes_back(host);
}

/// `docker restart` would keep the container's root file system mounted, and with it the dead mount.
fn mount_comes_back(host: &mut Host) {
    host.mount.kill9().unwrap();
    host.mount.restart().unwrap();
    assert_eq!(host.shell("torture-zstd", "echo up").unwrap(), "up");
    host.docker().ok(&["stop", "--time", "0", "long"]).unwrap();
    host.docker().ok(&["start", "long"]).unwrap();
    assert_eq!(host.docker().ok(&["exec", "long", "cat", "/data/greeting"]).unwrap(), "changed");
}

/// Everything goes, and a sync brings it back.
fn prunes(host: &mut Host) {
    host.docker().ok(&["rm", "--force", "long"]).unwrap();
    host.docker().ok(&["system", "prune", "--all", "--force"]).unwrap();
    assert_eq!(host.listed().unwrap(), [""; 0]);
    assert!(host.mount.layer(&image("small").unwrap().diff_ids()[0]).is_dir());
    host.docker_mut().stop().unwrap();
    assert_eq!(host.sync(&[]).unwrap()["images_added"], 2);
    host.docker_mut().restart().unwrap();
    assert_eq!(host.shell("small", "cat /data/greeting").unwrap(), "hello again");
    assert_eq!(host.status().unwrap()["in_sync"], json!(true));
}

#[test]
fn docker_20() {
    works(None, "20.10", "native");
}

#[test]
fn docker_26() {
    works(Some("trixie"), "26.1", "fuse");
}

#[test]
fn docker_28() {
    works(Some("sid"), "28.", "native");
}
