//! Docker 28 with its images in containerd, as Docker 29 has them by default.

use anyhow::Result;
use tests::cluster::{Mount, binary};
use tests::containerd::Snapshotter;
use tests::containerd_store::ContainerdStore;
use tests::engine_tree::EngineTree;
use tests::hosts;
use tests::images::{ImageFiles, small};
use tests::process::{TIMEOUT, run, wait_until};
use tests::registry::Registry;
use tests::site::{Site, SiteSpec};

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
        let tree = EngineTree::of("sid")?;
        let registry = Registry::start()?;
        let site = Site::start_with(&SiteSpec { settings: "host_lease = '2s'\n".to_owned(), ..SiteSpec::default() })?;
        let mount = hosts::mount(&site, "one")?;
        let snapshotter = Snapshotter::start(&site.path().join("host-one"), mount.path())?;
        let mut docker = ContainerdStore::start(&tree, &snapshotter)?;
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
    let mut fleet = Fleet::start().unwrap();
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
    tests::containerd::wait_for_snapshots(&fleet.snapshotter, 0).unwrap();
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
