//! Pods and containers through the container runtime interface.

use std::time::Duration;

use anyhow::{Result, bail};
use tests::cluster::Mount;
use tests::containerd::{Containerd, Snapshotter, wait_for_snapshots};
use tests::cri::{Cri, Pod};
use tests::engine_tree::EngineTree;
use tests::hosts;
use tests::images::archive::{Archive, Header, Kind};
use tests::images::{Compression, ImageBuilder, ImageFiles, Pools, image, small};
use tests::process::{TIMEOUT, wait_until};
use tests::registry::Registry;
use tests::site::{Site, SiteSpec};

/// A registry, a store with its coordinator, and a host with containerd.
pub(super) struct Fleet {
    pub(super) cri: Cri,
    containerd: Containerd,
    snapshotter: Snapshotter,
    pub(super) mount: Mount,
    site: Site,
    registry: Registry,
}

/// What holds pods: nothing but a program that sleeps. It is no image of the store.
fn pause(registry: &Registry) -> Result<String> {
    let directory = tempfile::tempdir()?;
    let pools = Pools::open(directory.path())?;
    let mut archive = Archive::new(Vec::new());
    archive.add(&Header::new(Kind::File, "sleep").mode(0o755), std::fs::read("/bin/busybox")?)?;
    let layer = pools.layer(&archive.finish()?, Compression::Gzip)?;
    let image = ImageBuilder::new("pause")
        .layer(layer)
        .cmd(&["/sleep", "1000000"])
        .build(&pools, &directory.path().join("pause"))?;
    registry.push(&image, "pause", "1")?;
    Ok(registry.reference("pause", "1"))
}

impl Fleet {
    pub(super) fn start() -> Result<Fleet> {
        Self::start_of(None, "native")
    }

    /// With this machine's containerd, or that of a tree; on the mount's trees of one kind.
    fn start_of(tree: Option<&EngineTree>, trees: &str) -> Result<Fleet> {
        let registry = Registry::start()?;
        let pause = pause(&registry)?;
        let site = Site::start_with(&SiteSpec {
            settings: "host_lease = '2s'\n".to_owned(),
            guesses: true,
            ..SiteSpec::default()
        })?;
        let mount = hosts::mount_trees(&site, "one", trees)?;
        let snapshotter = Snapshotter::start(&site.path().join("host-one"), mount.path())?;
        let mut containerd = Containerd::start_of(tree, &snapshotter, &pause)?;
        containerd.forward(&registry.address())?;
        let cri = containerd.cri()?;
        // The pod's own image is pulled once, so that tests count the others.
        cri.pull(&pause)?;
        Ok(Fleet { cri, containerd, snapshotter, mount, site, registry })
    }

    /// Pushes an image; returns its name.
    pub(super) fn push(&self, image: &ImageFiles, name: &str) -> Result<String> {
        self.registry.push(image, name, "1")?;
        Ok(self.registry.reference(name, "1"))
    }

    /// Pushes an image and brings it into the store; returns its name.
    pub(super) fn publish(&self, image: &ImageFiles, name: &str) -> Result<String> {
        let reference = self.push(image, name)?;
        self.site.ctl().ok(&["pull", &reference])?;
        Ok(reference)
    }

    /// How often each of an image's layers left the registry.
    pub(super) fn fetches(&self, image: &ImageFiles) -> Vec<usize> {
        image.layers.iter().map(|layer| self.registry.blob_fetches(&layer.blob.digest)).collect()
    }

    /// Starts a container that sleeps.
    fn sleeper(&self, pod: &Pod, name: &str, image: &str) -> Result<String> {
        self.cri.run(pod, name, image, &["/bin/sleep", "1000000"])
    }
}

#[test]
fn an_image_of_the_store_runs_and_no_layer_is_fetched() {
    runs_and_fetches_no_layer("1.6.", &Fleet::start().unwrap());
}

#[test]
fn on_containerd_1_7() {
    runs_and_fetches_no_layer("1.7.", &Fleet::start_of(Some(&EngineTree::of("trixie").unwrap()), "fuse").unwrap());
}

#[test]
fn on_containerd_2() {
    runs_and_fetches_no_layer("2.", &Fleet::start_of(Some(&EngineTree::of("sid").unwrap()), "native").unwrap());
}

/// `hostUsers: false`. containerd gives the files to the pod's ids itself, and copies them for that: it can map the ids of lower
/// directories only if they lie below one mount, and trees of the store do not.
#[test]
fn a_pod_has_users_of_its_own() {
    let fleet = Fleet::start_of(Some(&EngineTree::of("sid").unwrap()), "native").unwrap();
    let reference = fleet.publish(&small().unwrap(), "small").unwrap();
    fleet.cri.pull(&reference).unwrap();
    let pod = fleet.cri.pod_with_own_users("one", 100_000).unwrap();
    let container = fleet.sleeper(&pod, "a", &reference).unwrap();
    let script = "id -u; stat -c %u /data/greeting /bin/busybox; echo mine > /data/greeting; cat /proc/self/uid_map";
    let (code, said) = fleet.cri.exec(&container, &["/bin/sh", "-c", script]).unwrap();
    let said: Vec<&str> = said.split_whitespace().collect();
    assert_eq!((code, said), (0, vec!["0", "0", "0", "0", "100000", "65536"]));
    fleet.cri.remove_pod(&pod).unwrap();
}

fn runs_and_fetches_no_layer(version: &str, fleet: &Fleet) {
    let running = fleet.containerd.ok(&["version"]).unwrap();
    let running = running.split_once("Server:").unwrap().1;
    assert!(running.contains(&format!("Version:  {version}")), "{running}");
    // containerd asks for `exports` from 1.6.32 on.
    if version != "1.6." {
        let told = fleet.cri.image_directory().unwrap();
        assert_eq!(std::path::Path::new(&told), fleet.snapshotter.root(), "a kubelet looks there");
    }
    let image = small().unwrap();
    let reference = fleet.publish(&image, "small").unwrap();
    let before = fleet.fetches(&image);
    fleet.cri.pull(&reference).unwrap();
    assert_eq!(fleet.fetches(&image), before, "manifest and config are enough");
    assert!(fleet.cri.list().unwrap().contains(&reference));
    let pod = fleet.cri.pod("one").unwrap();
    let containers: Vec<String> = ["a", "b", "c"].map(|name| fleet.sleeper(&pod, name, &reference).unwrap()).into();
    for (number, container) in containers.iter().enumerate() {
        let script = format!("echo {number} > /written && cat /written && ls / | wc -l");
        let (code, output) = fleet.cri.exec(container, &["/bin/sh", "-c", &script]).unwrap();
        assert!(code == 0 && output.starts_with(&format!("{number}\n")), "{code} {output}");
    }
    // The image goes while it runs: containers go on, and the store keeps what it has.
    let layers = fleet.site.layers().unwrap();
    fleet.cri.remove_image(&reference).unwrap();
    let (code, _) = fleet.cri.exec(&containers[0], &["/bin/sh", "-c", "cat /bin/* > /dev/null"]).unwrap();
    assert_eq!(code, 0);
    fleet.cri.remove_pod(&pod).unwrap();
    // The pod's image alone is left.
    wait_for_snapshots(&fleet.snapshotter, 1, |arguments| fleet.containerd.ok(arguments)).unwrap();
    wait_until("a collection", TIMEOUT, || Ok(fleet.site.ctl().run(&["gc"])?.succeeded())).unwrap();
    assert_eq!(fleet.site.layers().unwrap(), layers);
    fleet.cri.pull(&reference).unwrap();
    assert_eq!(fleet.fetches(&image), before, "and it comes again");
}

/// An image on top of another one: its layers and one with a file of this content.
fn on_top_of(image: &ImageFiles, name: &str, content: &str) -> Result<ImageFiles> {
    let directory = image.directory.with_file_name(format!("{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&directory);
    std::fs::create_dir_all(&directory)?;
    let pools = Pools::open(&directory)?;
    let mut archive = Archive::new(Vec::new());
    archive.add(&Header::new(Kind::File, "etc/top"), content)?;
    let mut builder = ImageBuilder::new(name);
    for layer in &image.layers {
        builder = builder.layer(pools.layer(&std::fs::read(&layer.tar)?, Compression::Gzip)?);
    }
    builder.layer(pools.layer(&archive.finish()?, Compression::Gzip)?).build(&pools, &directory)
}

#[test]
fn only_the_layers_that_the_store_lacks_are_fetched() {
    let fleet = Fleet::start().unwrap();
    let base = small().unwrap();
    fleet.publish(&base, "base").unwrap();
    let derived = on_top_of(&base, "derived", "local").unwrap();
    let reference = fleet.push(&derived, "derived").unwrap();
    let before = fleet.fetches(&derived);
    fleet.cri.pull(&reference).unwrap();
    let after = fleet.fetches(&derived);
    let fetched: Vec<usize> = after.iter().zip(&before).map(|(after, before)| after - before).collect();
    let (top, below) = fetched.split_last().unwrap();
    assert_eq!((*top, below.iter().sum::<usize>()), (1, 0));
    let pod = fleet.cri.pod("one").unwrap();
    let container = fleet.sleeper(&pod, "a", &reference).unwrap();
    assert_eq!(fleet.cri.exec(&container, &["/bin/cat", "/etc/top"]).unwrap(), (0, "local".to_owned()));
    let _ = std::fs::remove_dir_all(&derived.directory);
}

/// The mount of the store is nosuid and nodev; neither containers on it nor read-only ones, which are views, are.
#[test]
fn setuid_programs_run_as_their_owner_in_read_only_containers_too() {
    let fleet = Fleet::start().unwrap();
    let reference = fleet.publish(&image("bash").unwrap(), "bash").unwrap();
    fleet.cri.pull(&reference).unwrap();
    for (number, flags) in [&[][..], &["--read-only"]].into_iter().enumerate() {
        let name = format!("setuid-{number}");
        let line = [&["run", "--rm", "--allow-new-privs", "--snapshotter", "cachefs"][..], flags, &[&reference, &name]]
            .concat();
        let as_user = ["/usr/sbin/chroot", "--userspec=1234:1234", "/", "/opt/tools/id", "-un"];
        let who = fleet.containerd.ok(&[&line[..], &as_user].concat()).unwrap();
        assert_eq!(who, "root", "{flags:?}");
    }
}

/// Removes the image from the catalogue and collects what nobody holds. Returns how many layers are left.
fn collect(fleet: &Fleet, reference: &str) -> Result<usize> {
    if fleet.site.images()?.iter().any(|image| image == reference) {
        fleet.site.ctl().ok(&["remove", reference])?;
    }
    // Nothing is collected before all hosts have been heard of.
    wait_until("a collection", TIMEOUT, || Ok(fleet.site.ctl().run(&["gc", "--grace", "0s"])?.succeeded()))?;
    Ok(fleet.site.layers()?.len())
}

/// Waits until a host's lease names as many layers.
fn wait_for_lease(fleet: &Fleet, count: usize) -> Result<()> {
    wait_until("the lease to name the layers", Duration::from_secs(30), || {
        let hosts = fleet.site.ctl().json(&["hosts"])?;
        let names = |host: &serde_json::Value| host["layers"].as_array().is_some_and(|layers| layers.len() == count);
        Ok(hosts["hosts"]
            .as_array()
            .is_some_and(|hosts| hosts.iter().any(|host| host["state"] == "live" && names(host))))
    })
}

#[test]
fn images_that_containerd_has_are_held_in_the_store_even_if_nothing_runs() {
    let mut fleet = Fleet::start().unwrap();
    let image = small().unwrap();
    let reference = fleet.publish(&image, "small").unwrap();
    fleet.cri.pull(&reference).unwrap();
    let count = image.layers.len();
    wait_for_lease(&fleet, count).unwrap();
    assert_eq!(collect(&fleet, &reference).unwrap(), count, "held for containerd");
    // What the daemon has in memory of the catalogue is gone, and so is its cache.
    fleet.mount.stop().unwrap();
    std::fs::remove_dir_all(fleet.site.path().join("host-one/cache")).unwrap();
    fleet.mount.restart().unwrap();
    let pod = fleet.cri.pod("one").unwrap();
    let container = fleet.sleeper(&pod, "a", &reference).unwrap();
    let (code, _) = fleet.cri.exec(&container, &["/bin/sh", "-c", "cat /bin/* > /dev/null"]).unwrap();
    assert_eq!(code, 0, "an image that the catalogue has forgotten starts");
    fleet.cri.remove_pod(&pod).unwrap();
    fleet.mount.forget().unwrap();
    // The new daemon holds it for the snapshotter's links alone.
    wait_for_lease(&fleet, count).unwrap();
    assert_eq!(collect(&fleet, &reference).unwrap(), count, "held for containerd still");
    fleet.cri.remove_image(&reference).unwrap();
    wait_for_snapshots(&fleet.snapshotter, 1, |arguments| fleet.containerd.ok(arguments)).unwrap();
    wait_until("the store to let go", Duration::from_secs(60), || {
        fleet.mount.forget()?;
        Ok(collect(&fleet, &reference)? == 0)
    })
    .unwrap();
}

#[test]
fn each_part_may_die_and_come_back() {
    let mut fleet = Fleet::start().unwrap();
    let image = small().unwrap();
    let reference = fleet.publish(&image, "small").unwrap();
    let before = fleet.fetches(&image);
    fleet.cri.pull(&reference).unwrap();
    let pod = fleet.cri.pod("one").unwrap();
    let mut containers = vec![fleet.sleeper(&pod, "first", &reference).unwrap()];
    for round in 0..3 {
        match round {
            0 => fleet.snapshotter.restart().unwrap(),
            1 => fleet.containerd.restart().unwrap(),
            _ => {
                fleet.containerd.process().kill().unwrap();
                fleet.snapshotter.restart().unwrap();
                fleet.containerd.restart().unwrap();
            }
        }
        fleet.cri = fleet.containerd.cri().unwrap();
        // containerd connects again within three seconds.
        let mut made = None;
        wait_until("a container after a restart", TIMEOUT, || {
            let again = fleet.sleeper(&pod, &format!("after-{round}"), &reference);
            let why = again.as_ref().err().map(|error| format!("{error:#}")).unwrap_or_default();
            if !(why.is_empty() || why.contains("unavailable") || why.contains("not initialized yet")) {
                bail!("{why}");
            }
            made = again.ok();
            Ok(made.is_some())
        })
        .unwrap();
        containers.extend(made);
        for container in &containers {
            let (code, _) = fleet.cri.exec(container, &["/bin/sh", "-c", "cat /bin/* > /dev/null"]).unwrap();
            assert_eq!(code, 0, "round {round}");
        }
    }
    assert_eq!(fleet.fetches(&image), before);
    fleet.cri.remove_pod(&pod).unwrap();
    fleet.cri.remove_image(&reference).unwrap();
    wait_for_snapshots(&fleet.snapshotter, 1, |arguments| fleet.containerd.ok(arguments)).unwrap();
}

#[test]
fn while_the_mount_is_away_containerd_fetches_for_itself() {
    let mut fleet = Fleet::start().unwrap();
    let image = small().unwrap();
    let reference = fleet.publish(&image, "small").unwrap();
    let other = on_top_of(&image, "later", "later").unwrap();
    let later = fleet.publish(&other, "later").unwrap();
    fleet.mount.stop().unwrap();
    // It starts without the mount too.
    fleet.snapshotter.restart().unwrap();
    let before = fleet.fetches(&image);
    wait_until("containerd to find the snapshotter", TIMEOUT, || Ok(fleet.cri.pull(&reference).is_ok())).unwrap();
    assert_eq!(fleet.fetches(&image).iter().sum::<usize>(), before.iter().sum::<usize>() + image.layers.len());
    let pod = fleet.cri.pod("one").unwrap();
    let runs = |fleet: &Fleet, image: &str, name: &str| {
        let container = fleet.sleeper(&pod, name, image).unwrap();
        fleet.cri.exec(&container, &["/bin/echo", "runs"]).unwrap()
    };
    assert_eq!(runs(&fleet, &reference, "a"), (0, "runs\n".to_owned()));
    // Once the mount is back, the store counts again, for layers on top of fetched ones too.
    fleet.mount.restart().unwrap();
    let before = fleet.fetches(&other);
    fleet.cri.pull(&later).unwrap();
    assert_eq!(fleet.fetches(&other), before);
    for (image, name) in [(&reference, "b"), (&later, "c")] {
        assert_eq!(runs(&fleet, image, name), (0, "runs\n".to_owned()));
    }
    let _ = std::fs::remove_dir_all(&other.directory);
}

#[test]
fn containerd_may_start_before_the_snapshotter() {
    let mut fleet = Fleet::start().unwrap();
    let reference = fleet.publish(&small().unwrap(), "small").unwrap();
    let before = fleet.fetches(&small().unwrap());
    fleet.snapshotter.process().kill().unwrap();
    fleet.containerd.restart().unwrap();
    fleet.snapshotter.restart().unwrap();
    fleet.cri = fleet.containerd.cri().unwrap();
    wait_until("containerd to find the snapshotter", TIMEOUT, || Ok(fleet.cri.pull(&reference).is_ok())).unwrap();
    let pod = fleet.cri.pod("one").unwrap();
    fleet.sleeper(&pod, "a", &reference).unwrap();
    assert_eq!(fleet.fetches(&small().unwrap()), before);
}

#[test]
fn nobody_notices_a_restart_on_a_socket_that_is_held() {
    let registry = Registry::start().unwrap();
    let (site, image) = (Site::start().unwrap(), small().unwrap());
    registry.push(&image, "small", "1").unwrap();
    let reference = registry.reference("small", "1");
    site.ctl().ok(&["pull", &reference]).unwrap();
    let mount = hosts::mount(&site, "one").unwrap();
    let mut snapshotter = Snapshotter::start_held(&site.path().join("host-one"), mount.path()).unwrap();
    let containerd = Containerd::start(&snapshotter, &pause(&registry).unwrap()).unwrap();
    let cri = containerd.cri().unwrap();
    cri.pull(&reference).unwrap();
    let pod = cri.pod("one").unwrap();
    snapshotter.process().kill().unwrap();
    std::thread::scope(|scope| {
        let made = scope.spawn(|| cri.run(&pod, "a", &reference, &["/bin/sleep", "1000000"]));
        wait_until("a request at the held socket", TIMEOUT, || snapshotter.is_asked()).unwrap();
        snapshotter.restart().unwrap();
        made.join().unwrap().unwrap();
    });
    assert!(image.layers.iter().all(|layer| registry.blob_fetches(&layer.blob.digest) == 1), "the coordinator's alone");
}

#[test]
fn what_cannot_be_served_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let absent = directory.path().join("absent");
    let mut alone = Snapshotter::start(directory.path(), &absent).unwrap();
    let log = alone.process().log();
    let warning = format!("{} is not a cachefs mount: run cachefs mount", absent.display());
    assert!(log.contains(&warning) && log.contains("containerd fetches everything for itself"), "{log}");
    for (root, socket, why) in [
        (alone.root(), directory.path().join("other.sock"), "in use by another snapshotter"),
        (&directory.path().join("other-root"), alone.socket().to_owned(), "another snapshotter listens there"),
    ] {
        let output = tests::process::run(&mut Snapshotter::command(root, &socket, &absent).unwrap()).unwrap();
        assert!(output.code == 1 && output.stderr.contains(why), "{}", output.stderr);
    }
}
