//! Pods and containers through the container runtime interface.

use std::time::Duration;

use anyhow::{Result, bail};
use tests::cluster::Mount;
use tests::containerd::{Containerd, Snapshotter, wait_for_snapshots};
use tests::cri::{Cri, Pod};
use tests::hosts;
use tests::images::archive::{Archive, Header, Kind};
use tests::images::{Compression, ImageBuilder, ImageFiles, Pools, small};
use tests::process::{TIMEOUT, wait_until};
use tests::registry::Registry;
use tests::site::{Site, SiteSpec};

/// A registry, a store with its coordinator, and a host with containerd.
struct Fleet {
    cri: Cri,
    containerd: Containerd,
    snapshotter: Snapshotter,
    mount: Mount,
    site: Site,
    registry: Registry,
}

/// One more host of the fleet.
struct Host {
    cri: Cri,
    _containerd: Containerd,
    _snapshotter: Snapshotter,
    _mount: Mount,
}

impl Host {
    fn start(fleet: &Fleet, name: &str) -> Result<Host> {
        let mount = hosts::mount(&fleet.site, name)?;
        let directory = fleet.site.path().join(format!("host-{name}"));
        let snapshotter = Snapshotter::start_with(&directory, mount.path(), &["--pull-through", "60s"])?;
        let containerd = Containerd::start(&snapshotter, "none")?;
        Ok(Host { cri: containerd.cri()?, _containerd: containerd, _snapshotter: snapshotter, _mount: mount })
    }
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
    fn start() -> Result<Fleet> {
        Self::start_with(&[])
    }

    /// Starts it with more arguments of the snapshotter.
    fn start_with(arguments: &[&str]) -> Result<Fleet> {
        let registry = Registry::start()?;
        let pause = pause(&registry)?;
        let site = Site::start_with(&SiteSpec { settings: "host_lease = '2s'\n".to_owned(), ..SiteSpec::default() })?;
        let mount = hosts::mount(&site, "one")?;
        let snapshotter = Snapshotter::start_with(&site.path().join("host-one"), mount.path(), arguments)?;
        let containerd = Containerd::start(&snapshotter, &pause)?;
        let cri = containerd.cri()?;
        // The pod's own image is pulled once, so that tests count the others.
        cri.pull(&pause)?;
        Ok(Fleet { cri, containerd, snapshotter, mount, site, registry })
    }

    /// Pushes an image; returns its name.
    fn push(&self, image: &ImageFiles, name: &str) -> Result<String> {
        self.registry.push(image, name, "1")?;
        Ok(self.registry.reference(name, "1"))
    }

    /// Pushes an image and brings it into the store; returns its name.
    fn publish(&self, image: &ImageFiles, name: &str) -> Result<String> {
        let reference = self.push(image, name)?;
        self.site.ctl().ok(&["pull", &reference])?;
        Ok(reference)
    }

    /// How often each of an image's layers left the registry.
    fn fetches(&self, image: &ImageFiles) -> Vec<usize> {
        image.layers.iter().map(|layer| self.registry.blob_fetches(&layer.blob.digest)).collect()
    }

    /// Starts a container that sleeps.
    fn sleeper(&self, pod: &Pod, name: &str, image: &str) -> Result<String> {
        self.cri.run(pod, name, image, &["/bin/sleep", "1000000"])
    }
}

#[test]
fn an_image_of_the_store_runs_and_no_layer_is_fetched() {
    let fleet = Fleet::start().unwrap();
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
    wait_for_snapshots(&fleet.snapshotter, 1).unwrap();
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

/// Removes the image from the catalogue and collects what nobody holds. Returns how many layers are left.
fn collect(fleet: &Fleet, reference: &str) -> Result<usize> {
    if fleet.site.images()?.iter().any(|image| image == reference) {
        fleet.site.ctl().ok(&["remove", reference])?;
    }
    // Nothing is collected before all hosts have been heard of.
    wait_until("a collection", TIMEOUT, || Ok(fleet.site.ctl().run(&["gc", "--grace", "0s"])?.succeeded()))?;
    Ok(fleet.site.layers()?.len())
}

#[test]
fn images_that_containerd_has_are_held_in_the_store_even_if_nothing_runs() {
    let fleet = Fleet::start().unwrap();
    let image = small().unwrap();
    let reference = fleet.publish(&image, "small").unwrap();
    fleet.cri.pull(&reference).unwrap();
    let count = image.layers.len();
    wait_until("the lease to name the layers", Duration::from_secs(30), || {
        let hosts = fleet.site.ctl().json(&["hosts"])?;
        Ok(hosts["hosts"][0]["layers"].as_array().is_some_and(|layers| layers.len() == count))
    })
    .unwrap();
    assert_eq!(collect(&fleet, &reference).unwrap(), count, "held for containerd");
    let pod = fleet.cri.pod("one").unwrap();
    let container = fleet.sleeper(&pod, "a", &reference).unwrap();
    let (code, _) = fleet.cri.exec(&container, &["/bin/sh", "-c", "cat /bin/* > /dev/null"]).unwrap();
    assert_eq!(code, 0, "an image that the catalogue has forgotten starts");
    fleet.cri.remove_pod(&pod).unwrap();
    fleet.cri.remove_image(&reference).unwrap();
    wait_for_snapshots(&fleet.snapshotter, 1).unwrap();
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
            if !(why.is_empty() || why.contains("Error while dialing") || why.contains("not initialized yet")) {
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
    wait_for_snapshots(&fleet.snapshotter, 1).unwrap();
}

#[test]
fn while_the_mount_is_away_containerd_fetches_for_itself() {
    let mut fleet = Fleet::start().unwrap();
    let image = small().unwrap();
    let reference = fleet.publish(&image, "small").unwrap();
    fleet.mount.stop().unwrap();
    let before = fleet.fetches(&image);
    fleet.cri.pull(&reference).unwrap();
    assert_eq!(fleet.fetches(&image).iter().sum::<usize>(), before.iter().sum::<usize>() + image.layers.len());
    let pod = fleet.cri.pod("one").unwrap();
    let container = fleet.sleeper(&pod, "a", &reference).unwrap();
    assert_eq!(fleet.cri.exec(&container, &["/bin/echo", "runs"]).unwrap(), (0, "runs\n".to_owned()));
}

#[test]
fn hosts_that_pull_a_new_image_cause_one_fetch() {
    let mut fleet = Fleet::start_with(&["--pull-through", "60s"]).unwrap();
    let settings = fleet.site.path().join("settings.yaml");
    std::fs::write(&settings, "pull_on_demand: true\n").unwrap();
    fleet.site.ctl().ok(&["apply", "--yes", &settings.to_string_lossy()]).unwrap();
    let other = Host::start(&fleet, "two").unwrap();
    let image = small().unwrap();
    let reference = fleet.push(&image, "small").unwrap();
    std::thread::scope(|scope| {
        for cri in [&fleet.cri, &other.cri] {
            scope.spawn(|| cri.pull(&reference).unwrap());
        }
    });
    assert_eq!(fleet.fetches(&image), vec![1; image.layers.len()]);
    assert_eq!(fleet.site.layers().unwrap().len(), image.layers.len());
    let pod = fleet.cri.pod("one").unwrap();
    let container = fleet.sleeper(&pod, "a", &reference).unwrap();
    assert_eq!(fleet.cri.exec(&container, &["/bin/echo", "runs"]).unwrap(), (0, "runs\n".to_owned()));
    // Without the coordinator each engine is on its own, and waits for nobody.
    let derived = on_top_of(&image, "alone", "alone").unwrap();
    let reference = fleet.push(&derived, "alone").unwrap();
    fleet.site.coordinator().stop().unwrap();
    fleet.cri.pull(&reference).unwrap();
    assert_eq!(fleet.fetches(&derived).last(), Some(&1));
    let _ = std::fs::remove_dir_all(&derived.directory);
}

#[test]
fn a_snapshotter_without_a_mount_or_a_root_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let (root, socket) = (directory.path().join("root"), directory.path().join("sock"));
    let output = tests::process::run(&mut Snapshotter::command(&root, &socket, directory.path()).unwrap()).unwrap();
    assert_eq!(output.code, 1);
    assert!(output.stderr.contains("is not a cachefs mount: run cachefs mount"), "{}", output.stderr);
    let site = Site::start().unwrap();
    let mount = hosts::mount(&site, "one").unwrap();
    let snapshotter = Snapshotter::start(directory.path(), mount.path()).unwrap();
    for (root, socket, why) in [
        (snapshotter.root(), directory.path().join("other.sock"), "metadata"),
        (&directory.path().join("other-root"), snapshotter.socket().to_owned(), "another snapshotter listens there"),
    ] {
        let output = tests::process::run(&mut Snapshotter::command(root, &socket, mount.path()).unwrap()).unwrap();
        assert!(output.code == 1 && output.stderr.contains(why), "{}", output.stderr);
    }
}
