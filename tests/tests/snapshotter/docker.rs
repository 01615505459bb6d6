//! Docker 26 and 28 with their images in containerd, as Docker 29 has them by default.

use anyhow::Result;
use serde_json::{Value, json};
use tests::cluster::{Mount, binary};
use tests::containerd::Snapshotter;
use tests::containerd_store::ContainerdStore;
use tests::docker::Docker;
use tests::engine_tree::EngineTree;
use tests::hosts;
use tests::images::archive::{Archive, Header, Kind};
use tests::images::oddities::noise;
use tests::images::{ImageFiles, small};
use tests::process::{TIMEOUT, run, wait_until};
use tests::registry::Registry;
use tests::site::{Site, SiteSpec};
use tests::workloads::{compose, swarm};

/// A registry, a store with its coordinator, and a host with a new Docker.
struct Fleet {
    docker: ContainerdStore,
    snapshotter: Snapshotter,
    mount: Mount,
    site: Site,
    registry: Registry,
}

impl Fleet {
    fn start() -> Result<Fleet> {
        Self::start_of("sid", "native")
    }

    /// The Docker of a suite, on trees of one kind.
    fn start_of(suite: &str, trees: &str) -> Result<Fleet> {
        Self::start_with(suite, trees, &json!({}))
    }

    fn start_configured(settings: &Value) -> Result<Fleet> {
        Self::start_with("sid", "native", settings)
    }

    fn start_with(suite: &str, trees: &str, settings: &Value) -> Result<Fleet> {
        let tree = EngineTree::of(suite)?;
        let registry = Registry::start()?;
        let site = Site::start_with(&SiteSpec {
            settings: "host_lease = '2s'\n".to_owned(),
            guesses: true,
            ..SiteSpec::default()
        })?;
        let mount = hosts::mount_trees(&site, "one", trees)?;
        let snapshotter = Snapshotter::start(&site.path().join("host-one"), mount.path())?;
        let mut docker = ContainerdStore::start_configured(&tree, &snapshotter, settings)?;
        docker.forward(&registry.address())?;
        Ok(Fleet { docker, snapshotter, mount, site, registry })
    }

    /// Pushes an image and brings it into the store; returns its name.
    fn publish(&self, image: &ImageFiles, name: &str) -> Result<String> {
        self.registry.push(image, name, "1")?;
        let reference = self.registry.reference(name, "1");
        self.site.ctl().ok(&["pull", &reference])?;
        Ok(reference)
    }

    fn fetches(&self, image: &ImageFiles) -> Vec<usize> {
        image.layers.iter().map(|layer| self.registry.blob_fetches(&layer.blob.digest)).collect()
    }

    /// What a command prints in a new container without network.
    fn output(&self, image: &str, command: &[&str]) -> Result<String> {
        self.docker.ok(&[&["run", "--rm", "--network", "none", image], command].concat())
    }
}

#[test]
fn an_image_of_the_store_runs_and_no_layer_is_fetched() {
    runs_and_fetches_no_layer("28.", Fleet::start().unwrap());
}

#[test]
fn on_docker_26() {
    runs_and_fetches_no_layer("26.1", Fleet::start_of("trixie", "fuse").unwrap());
}

fn runs_and_fetches_no_layer(version: &str, mut fleet: Fleet) {
    let running = fleet.docker.ok(&["version", "--format", "{{.Server.Version}}"]).unwrap();
    assert!(running.starts_with(version), "{running}");
    let image = small().unwrap();
    let reference = fleet.publish(&image, "small").unwrap();
    let before = fleet.fetches(&image);
    fleet.docker.ok(&["pull", "--quiet", &reference]).unwrap();
    assert_eq!(fleet.output(&reference, &["echo", "runs"]).unwrap(), "runs");
    let id = fleet.docker.ok(&["run", "--detach", "--network", "none", &reference, "sleep", "1000000"]).unwrap();
    fleet.docker.ok(&["exec", &id, "sh", "-c", "echo changed > /etc/changed && rm /bin/ls"]).unwrap();
    let diff = fleet.docker.ok(&["diff", &id]).unwrap();
    assert!(diff.contains("A /etc/changed") && diff.contains("D /bin/ls"), "{diff}");
    fleet.docker.ok(&["commit", &id, "derived:1"]).unwrap();
    assert_eq!(fleet.output("derived:1", &["cat", "/etc/changed"]).unwrap(), "changed");
    assert_eq!(fleet.fetches(&image), before);
    // Everything goes and comes back; the store keeps what it has.
    fleet.docker.ok(&["rm", "--force", &id]).unwrap();
    let layers = fleet.site.layers().unwrap();
    fleet.docker.ok(&["image", "prune", "--all", "--force"]).unwrap();
    tests::containerd::wait_for_snapshots(&fleet.snapshotter, 0, |arguments| fleet.docker.ctr(arguments)).unwrap();
    wait_until("a collection", TIMEOUT, || Ok(fleet.site.ctl().run(&["gc"])?.succeeded())).unwrap();
    assert_eq!(fleet.site.layers().unwrap(), layers);
    fleet.docker.ok(&["pull", "--quiet", &reference]).unwrap();
    fleet.docker.restart().unwrap();
    assert_eq!(fleet.output(&reference, &["echo", "again"]).unwrap(), "again");
    // An overlay2 directory here would make a default Docker 29 fall back to that driver and hide all its images.
    let mut init = std::process::Command::new(binary("cachefs").unwrap());
    init.args(["data-root", "init"]).arg(fleet.docker.data_root()).arg("--mount").arg(fleet.mount.path());
    let refused = run(&mut init).unwrap();
    assert!(refused.code == 1 && refused.stderr.contains("in containerd, where a data-root has no say"), "{refused:?}");
    assert!(!fleet.docker.data_root().join("overlay2").exists());
    assert_eq!(fleet.fetches(&image), before);
}

/// BuildKit takes what a step has changed from the snapshot's own directory. Where it does not understand how the mounts of two
/// snapshots relate, it compares the trees instead, and reads each file whose times do not tell.
#[test]
fn a_build_reads_nothing_of_the_image_that_it_does_not_use() {
    let fleet = Fleet::start().unwrap();
    let context = tempfile::Builder::new().prefix("context-").tempdir().unwrap();
    let mut tar = Archive::new(Vec::new());
    tar.add(&Header::new(Kind::File, "noise"), noise(1, 64 << 20)).unwrap();
    let image = small().unwrap().next_build(&tar.finish().unwrap(), &context.path().join("image")).unwrap();
    let reference = fleet.publish(&image, "noise").unwrap();
    fleet.docker.ok(&["pull", "--quiet", &reference]).unwrap();
    let host = hosts::host_trees(&fleet.site, "one", "native").unwrap();
    let before = hosts::counter(&host, "bytes_from_store").unwrap();
    let dockerfile = format!("FROM {reference}\nRUN echo one > /one\nRUN echo two > /two\n");
    std::fs::write(context.path().join("Dockerfile"), dockerfile).unwrap();
    let mut build = std::process::Command::new("/usr/bin/docker");
    build.args(["build", "--network", "none", "--tag", "built", "--file"]).arg(context.path().join("Dockerfile"));
    let empty = context.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    build.arg(&empty);
    run(build.envs(fleet.docker.environment()).env("DOCKER_BUILDKIT", "1")).unwrap().ok().unwrap();
    let read = hosts::counter(&host, "bytes_from_store").unwrap() - before;
    assert!(read < 16 << 20, "the build has read {read} bytes");
    assert_eq!(fleet.output("built", &["cat", "/one", "/two"]).unwrap(), "one\ntwo");
    let layers = fleet.docker.ok(&["image", "inspect", "--format", "{{len .RootFS.Layers}}", "built"]).unwrap();
    assert_eq!(layers, (image.layers.len() + 2).to_string());
}

/// What users do with images whose layers were never downloaded.
#[test]
fn builds_pushes_compose_and_swarm_work_on_images_of_the_store() {
    let mut fleet = Fleet::start().unwrap();
    let image = small().unwrap();
    let reference = fleet.publish(&image, "small").unwrap();
    fleet.docker.ok(&["pull", "--quiet", &reference]).unwrap();
    compose(&reference, &fleet.docker.environment()).unwrap();
    swarm(&reference, |arguments| fleet.docker.ok(arguments)).unwrap();
    let context = tempfile::Builder::new().prefix("context-").tempdir().unwrap();
    let dockerfile = format!("FROM {reference}\nRUN echo built > /built\n");
    std::fs::write(context.path().join("Dockerfile"), dockerfile).unwrap();
    let other = Registry::start().unwrap();
    fleet.docker.forward(&other.address()).unwrap();
    let mut plain = Docker::start().unwrap();
    plain.forward(&other.address()).unwrap();
    for (builder, tag) in [("0", "classic"), ("1", "buildkit")] {
        let mut build = std::process::Command::new("/usr/bin/docker");
        build.args(["build", "--network", "none", "--tag", tag]).arg(context.path());
        run(build.envs(fleet.docker.environment()).env("DOCKER_BUILDKIT", builder)).unwrap().ok().unwrap();
        assert_eq!(fleet.output(tag, &["cat", "/built"]).unwrap(), "built");
        // Whatever arrives at a registry is whole. BuildKit fetches what it builds upon; of others docker says what is missing.
        let name = other.reference(tag, "1");
        fleet.docker.ok(&["tag", tag, &name]).unwrap();
        let pushed = fleet.docker.run(&["push", &name]).unwrap();
        if builder == "0" {
            assert!(!pushed.succeeded() && pushed.stderr.contains("not found"), "{pushed:?}");
            fleet.docker.ctr(&["--namespace", "moby", "content", "fetch", "--plain-http", &reference]).unwrap();
            fleet.docker.ok(&["push", &name]).unwrap();
        } else {
            pushed.ok().unwrap();
        }
        assert_eq!(plain.ok(&["run", "--rm", "--network", "none", &name, "cat", "/built"]).unwrap(), "built");
        fleet.docker.ok(&["system", "prune", "--all", "--force"]).unwrap();
        fleet.docker.ok(&["pull", "--quiet", &reference]).unwrap();
    }
}

/// Docker saves what its content store has: of an image that was never downloaded, nothing but its manifest.
#[test]
fn a_saved_image_is_whole_once_its_content_was_fetched() {
    let fleet = Fleet::start().unwrap();
    let image = small().unwrap();
    let reference = fleet.publish(&image, "small").unwrap();
    fleet.docker.ok(&["pull", "--quiet", &reference]).unwrap();
    let archive = fleet.docker.data_root().join("saved.tar");
    let save = || {
        fleet.docker.ok(&["save", "--output", &archive.to_string_lossy(), &reference]).unwrap();
        let listed = run(std::process::Command::new("tar").arg("-tf").arg(&archive)).unwrap().ok().unwrap();
        image.layers.iter().filter(|layer| listed.contains(layer.blob.digest.trim_start_matches("sha256:"))).count()
    };
    assert_eq!(save(), 0, "docker would have to fail here, and does not: docs/COMPATIBILITY.md says so");
    fleet.docker.ctr(&["--namespace", "moby", "content", "fetch", "--plain-http", &reference]).unwrap();
    assert_eq!(save(), image.layers.len());
    let plain = Docker::start().unwrap();
    plain.ok(&["load", "--quiet", "--input", &archive.to_string_lossy()]).unwrap();
    assert_eq!(plain.ok(&["run", "--rm", "--network", "none", &reference, "echo", "whole"]).unwrap(), "whole");
}

#[test]
fn users_are_remapped_and_no_layer_is_fetched() {
    let fleet = Fleet::start_configured(&json!({"userns-remap": "nobody:nogroup"})).unwrap();
    let image = small().unwrap();
    let reference = fleet.publish(&image, "small").unwrap();
    let before = fleet.fetches(&image);
    fleet.docker.ok(&["pull", "--quiet", &reference]).unwrap();
    let script = "cat /proc/self/uid_map | tr -s ' '; stat -c %u:%g /data/greeting; echo mine > /data/greeting && cat /data/*ing";
    assert_eq!(fleet.output(&reference, &["sh", "-c", script]).unwrap(), " 0 100000 65536\n0:0\nmine");
    // A container may keep the machine's users.
    let host = ["run", "--rm", "--network", "none", "--userns", "host", &reference, "cat", "/data/greeting"];
    assert_eq!(fleet.docker.ok(&host).unwrap(), "hello again");
    let id = fleet.docker.ok(&["run", "--detach", "--network", "none", &reference, "sleep", "1000000"]).unwrap();
    fleet.docker.ok(&["exec", &id, "sh", "-c", "echo new > /data/new"]).unwrap();
    fleet.docker.ok(&["commit", &id, "derived:1"]).unwrap();
    let owners = ["stat", "-c", "%n %u:%g", "/data/new", "/data/greeting"];
    assert_eq!(fleet.output("derived:1", &owners).unwrap(), "/data/new 0:0\n/data/greeting 0:0");
    assert_eq!(fleet.fetches(&image), before);
}

#[test]
fn containers_go_on_while_dockerd_is_away() {
    let mut fleet = Fleet::start_configured(&json!({"live-restore": true})).unwrap();
    let reference = fleet.publish(&small().unwrap(), "small").unwrap();
    fleet.docker.ok(&["pull", "--quiet", &reference]).unwrap();
    let id = fleet.docker.ok(&["run", "--detach", "--network", "none", &reference, "sleep", "1000000"]).unwrap();
    let started =
        |fleet: &Fleet| fleet.docker.ok(&["inspect", "--format", "{{.State.Pid}} {{.State.Running}}", &id]).unwrap();
    let before = started(&fleet);
    fleet.snapshotter.restart().unwrap();
    fleet.docker.restart_dockerd().unwrap();
    assert_eq!(started(&fleet), before);
    assert!(before.ends_with("true"), "{before}");
    // Files that nobody has opened before are there, and it can be stopped and started.
    assert_eq!(fleet.docker.ok(&["exec", &id, "cat", "/data/greeting"]).unwrap(), "hello again");
    fleet.docker.ok(&["restart", "--time", "0", &id]).unwrap();
    assert_eq!(fleet.docker.ok(&["exec", &id, "cat", "/data/greeting"]).unwrap(), "hello again");
}
