//! Changes in the store, with dockerd stopped, running and restarted.

use std::path::{Path, PathBuf};

use serde_json::json;
use tests::docker::Docker;
use tests::hosts;
use tests::images::image;
use tests::process::{Process, TIMEOUT, wait_until};
use tests::registry::Registry;

use super::host::{Host, data_root};

#[test]
fn what_rmi_removed_comes_back_with_sync_and_a_restart() {
    let mut host = Host::start(&["small"]).unwrap();
    host.docker().ok(&["rmi", "small"]).unwrap();
    assert_eq!(host.listed().unwrap(), [""; 0]);
    assert!(host.mount.layer(&image("small").unwrap().diff_ids()[0]).is_dir(), "rmi removes the link only");
    let status = host.status().unwrap();
    assert_eq!((&status["in_sync"], &status["layers"]["present"]), (&json!(false), &json!(0)));
    assert_eq!(status["names"]["missing"].as_array().unwrap().len(), 2);
    let done = host.sync(&[]).unwrap();
    assert_eq!((&done["layers_added"], &done["restart_needed"]), (&json!(0), &json!(true)));
    assert_eq!(done["waiting"], json!({"images": 1, "layers": 3, "names": 2}));
    assert_eq!(host.status().unwrap()["restart_needed"], true);
    host.docker_mut().stop().unwrap();
    let done = host.sync(&[]).unwrap();
    assert_eq!((&done["layers_added"], &done["restart_needed"]), (&json!(3), &json!(false)));
    host.docker_mut().restart().unwrap();
    let status = host.status().unwrap();
    assert_eq!((&status["in_sync"], &status["restart_needed"]), (&json!(true), &json!(false)));
    assert_eq!(host.shell("small", "cat /data/greeting").unwrap(), "hello again");
}

#[test]
fn a_new_image_appears_at_a_restart_that_a_running_container_survives() {
    let mut host = Host::start(&["small"]).unwrap();
    let script = "while :; do cat /data/greeting /data/noise | wc -c > /count; sha256sum /bin/busybox > /sum; done";
    host.docker().ok(&["run", "--detach", "--name", "long", "--network", "none", "small", "sh", "-c", script]).unwrap();
    let pid = host.docker().ok(&["inspect", "--format", "{{.State.Pid}}", "long"]).unwrap();
    hosts::load(&host.site, &image("torture-zstd").unwrap()).unwrap();
    let control = Control::new(host.site.path());
    let mut sync = data_root("sync", &host.data).unwrap();
    sync.arg("--restart-command").arg(control.command());
    let mut sync = Process::spawn("sync", &mut sync, &host.site.path().join("sync.log")).unwrap();
    control.obey("stop", || host.docker_mut().stop().unwrap());
    control.obey("start", || host.docker_mut().restart().unwrap());
    assert!(sync.wait(TIMEOUT).unwrap().success(), "{}", sync.log());
    assert!(sync.log().contains("1 image, 4 layers and 2 names added"), "{}", sync.log());
    assert_eq!(host.listed().unwrap(), ["small:latest", "torture-zstd:latest"]);
    assert_eq!(host.docker().ok(&["inspect", "--format", "{{.State.Pid}}", "long"]).unwrap(), pid);
    host.docker().ok(&["exec", "long", "rm", "/count"]).unwrap();
    let count = || Ok(host.docker().run(&["exec", "long", "cat", "/count"])?.stdout.trim() == "1048588");
    wait_until("a count of the container", TIMEOUT, count).unwrap();
    host.docker().ok(&["kill", "long"]).unwrap();
    let again = host.sync(&["--restart"]).unwrap();
    assert_eq!(again["restart_needed"], false, "nothing to do, so systemd is not asked");
}

/// Replaces systemd: `COMMAND stop` and `COMMAND start` wait until the test has done it.
struct Control {
    directory: PathBuf,
}

impl Control {
    fn new(directory: &Path) -> Self {
        let script = "#!/bin/sh\ncd $(dirname $0) && touch $1.asked && while [ ! -e $1.done ]; do sleep 0.02; done\n";
        let path = directory.join("control");
        std::fs::write(&path, script).unwrap();
        Self { directory: directory.to_owned() }
    }

    fn command(&self) -> String {
        format!("sh {}", self.directory.join("control").display())
    }

    fn obey(&self, word: &str, action: impl FnOnce()) {
        let asked = self.directory.join(format!("{word}.asked"));
        wait_until(&format!("the command {word}"), TIMEOUT, || Ok(asked.exists())).unwrap();
        action();
        std::fs::write(self.directory.join(format!("{word}.done")), "").unwrap();
    }
}

#[test]
fn a_tag_that_moves_and_one_that_goes() {
    let registry = Registry::start().unwrap();
    let (small, torture) = (image("small").unwrap(), image("torture-zstd").unwrap());
    let name = registry.push(&small, "app", "v1").unwrap();
    let mut host = Host::unprepared(&[]).unwrap();
    host.site.ctl().ok(&["pull", &name]).unwrap();
    host.init(&host.data).unwrap().ok().unwrap();
    host.start_docker().unwrap();
    host.docker().ok(&["run", "--name", "one", "--network", "none", &name, "true"]).unwrap();
    host.docker().ok(&["tag", &name, "mine:1"]).unwrap();
    registry.push(&torture, "app", "v1").unwrap();
    host.site.ctl().ok(&["pull", &name]).unwrap();
    host.docker_mut().stop().unwrap();
    host.sync(&[]).unwrap();
    host.docker_mut().restart().unwrap();
    let id = |host: &Host, name: &str| host.docker().ok(&["image", "inspect", "--format", "{{.Id}}", name]).unwrap();
    assert_eq!(id(&host, &name), torture.config.digest);
    assert_eq!(id(&host, "mine:1"), small.config.digest);
    host.docker().ok(&["start", "--attach", "one"]).unwrap();
    host.site.ctl().ok(&["remove", &name]).unwrap();
    assert_eq!(host.sync(&[]).unwrap()["restart_needed"], true);
    assert!(host.listed().unwrap().contains(&name));
    host.docker_mut().stop().unwrap();
    let done = host.sync(&[]).unwrap();
    assert_eq!(done["images_removed"], 1, "{done}");
    // The catalogue has forgotten the container's image; the list beside the link says what its tree is made of.
    host.mount.restart().unwrap();
    host.docker_mut().restart().unwrap();
    assert_eq!(host.listed().unwrap(), ["mine:1"]);
    host.docker().ok(&["start", "--attach", "one"]).unwrap();
    host.docker().ok(&["rm", "one"]).unwrap();
    host.docker().ok(&["rmi", "mine:1"]).unwrap();
    assert_eq!(host.status().unwrap()["in_sync"], true);
}

#[test]
fn what_dockerd_had_before_stays_as_it_was() {
    let registry = Registry::start().unwrap();
    let (small, torture) = (image("small").unwrap(), image("torture-zstd").unwrap());
    let name = registry.push(&small, "app", "v1").unwrap();
    let mut host = Host::unprepared(std::slice::from_ref(&torture)).unwrap();
    host.start_docker().unwrap();
    host.docker_mut().forward(&registry.address()).unwrap();
    host.docker().ok(&["pull", "--quiet", &name]).unwrap();
    host.docker().ok(&["tag", &name, "torture-zstd:latest"]).unwrap();
    let before = host.docker().extracted(&small).unwrap();
    host.docker_mut().stop().unwrap();
    host.site.ctl().ok(&["pull", &name]).unwrap();
    let output = host.init(&host.data).unwrap();
    assert!(output.stderr.contains("torture-zstd:latest names a local image and stays as it is"), "{}", output.stderr);
    host.docker_mut().restart().unwrap();
    assert_eq!(host.docker().extracted(&small).unwrap(), before);
    assert!(before.iter().all(|diff| !diff.is_symlink()));
    assert_eq!(
        host.docker().ok(&["image", "inspect", "--format", "{{.Id}}", "torture-zstd"]).unwrap(),
        small.config.digest
    );
    // Layers of the store are on top of the layer that Docker pulled.
    assert_eq!(torture.diff_ids()[0], small.diff_ids()[0]);
    assert_eq!(
        host.docker().ok(&["run", "--rm", "--network", "none", &torture.config.digest, "echo", "up"]).unwrap(),
        "up"
    );
    host.docker_mut().stop().unwrap();
    host.site.ctl().ok(&["remove", &name]).unwrap();
    host.site.ctl().ok(&["remove", "torture-zstd"]).unwrap();
    assert_eq!(host.sync(&[]).unwrap()["images_removed"], 1);
    host.docker_mut().restart().unwrap();
    assert_eq!(host.docker().extracted(&small).unwrap(), before);
    assert_eq!(host.docker().ok(&["run", "--rm", "--network", "none", &name, "echo", "up"]).unwrap(), "up");
}

/// The trigger in the world is a nightly prune and a nightly sync.
#[test]
fn beside_a_sync_a_running_dockerd_pulls_loads_and_builds_what_shares_layers_with_the_store() {
    let registry = Registry::start().unwrap();
    let (small, torture) = (image("small").unwrap(), image("torture-zstd").unwrap());
    assert_eq!(torture.diff_ids()[0], small.diff_ids()[0], "they share a layer");
    let name = registry.push(&small, "app", "v1").unwrap();
    let mut host = Host::start(&["torture-zstd"]).unwrap();
    host.docker_mut().forward(&registry.address()).unwrap();
    host.docker().ok(&["image", "prune", "--all", "--force"]).unwrap();
    assert_eq!(host.sync(&[]).unwrap()["waiting"]["layers"], torture.layers.len());
    host.docker().ok(&["pull", "--quiet", &name]).unwrap();
    host.docker().load(&small).unwrap();
    let context = tempfile::tempdir().unwrap();
    std::fs::write(context.path().join("Dockerfile"), "FROM small\nRUN echo built > /built\n").unwrap();
    for (builder, tag) in [("0", "classic"), ("1", "buildkit")] {
        let directory = context.path().to_string_lossy();
        let mut command = host.docker().command(&["build", "--network", "none", "--tag", tag, &directory]);
        tests::process::run(command.env("DOCKER_BUILDKIT", builder)).unwrap().ok().unwrap();
        assert_eq!(host.shell(tag, "cat /built").unwrap(), "built");
    }
    host.docker_mut().stop().unwrap();
    host.sync(&[]).unwrap();
    host.docker_mut().restart().unwrap();
    assert_eq!(host.shell("classic", "cat /built").unwrap(), "built");
    assert_eq!(host.shell("torture-zstd", "echo up").unwrap(), "up");
    assert_eq!(host.status().unwrap()["in_sync"], true);
}

#[test]
fn two_hosts_share_one_store() {
    let mut first = Host::start(&["small"]).unwrap();
    let mount = hosts::mount(&first.site, "b").unwrap();
    let data = first.site.path().join("docker-b");
    std::fs::create_dir(&data).unwrap();
    let mut init = data_root("init", &data).unwrap();
    init.arg("--mount").arg(mount.path());
    tests::process::run(&mut init).unwrap().ok().unwrap();
    let spec = tests::docker::DockerSpec { data_root: Some(data), ..Default::default() };
    let second = Docker::start_with(spec).unwrap();
    let arguments = ["run", "--rm", "--network", "none", "small", "cat", "/data/greeting"];
    assert_eq!(second.ok(&arguments).unwrap(), "hello again");
    first.site.coordinator().kill9().unwrap();
    assert_eq!(first.docker().ok(&arguments).unwrap(), "hello again");
    assert_eq!(second.ok(&arguments).unwrap(), "hello again");
}
