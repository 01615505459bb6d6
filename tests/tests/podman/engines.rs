//! A real Podman 4.3, and the newest that Debian has: what users do, once through.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use nix::sys::signal::Signal;
use tests::cluster::Mount;
use tests::docker::Docker;
use tests::engine_tree::EngineTree;
use tests::hosts;
use tests::images::{ImageFiles, digest_of, image, small};
use tests::mounts::SharedDirectory;
use tests::podman::{ImageStore, Podman, image_store};
use tests::process::{Process, TIMEOUT, run, wait_until};
use tests::registry::Registry;
use tests::site::{Site, SiteSpec};

/// Dropped in this order: Podman, the image store, the mount, the coordinator.
struct Host {
    podman: Podman,
    store: ImageStore,
    mount: Mount,
    _shared: SharedDirectory,
    site: Site,
    registry: Registry,
}

impl Host {
    /// With this machine's Podman, or that of a tree; on the mount's trees of one kind.
    fn start(tree: Option<&EngineTree>, trees: &str) -> Result<Host> {
        let registry = Registry::start()?;
        let site = Site::start_with(&SiteSpec {
            settings: "host_lease = '2s'\n".to_owned(),
            guesses: true,
            ..SiteSpec::default()
        })?;
        let shared = SharedDirectory::new(site.path())?;
        let mount = hosts::mount_trees(&site, "one", trees)?;
        let directory = site.path().join("host-one/image-store");
        let mut podman = Podman::new(tree, &directory)?;
        let store = ImageStore::start(&directory, mount.path(), &podman.graph_root())?;
        podman.forward(&registry.address())?;
        Ok(Host { podman, store, mount, _shared: shared, site, registry })
    }

    /// Pushes an image and brings it into the store; returns its name once Podman knows it.
    fn publish(&self, image: &ImageFiles, name: &str) -> Result<String> {
        self.registry.push(image, name, "1")?;
        let reference = self.registry.reference(name, "1");
        self.site.ctl().ok(&["pull", &reference])?;
        wait_until(&format!("{reference} in podman images"), TIMEOUT, || {
            Ok(self.podman.listed().is_ok_and(|listed| listed.contains(&reference)))
        })?;
        Ok(reference)
    }

    /// Takes an image out of the store, and waits until Podman no longer knows it.
    fn remove(&self, reference: &str) -> Result<()> {
        self.site.ctl().ok(&["remove", reference])?;
        // Podman reads the list first and the images then, and fails over one that goes in between.
        let is_gone = || Ok(self.podman.listed().is_ok_and(|listed| !listed.contains(&reference.to_owned())));
        wait_until(&format!("the end of {reference} in podman images"), TIMEOUT, is_gone)
    }
}

/// Goes through what users do with a Podman.
fn works(tree: Option<&EngineTree>, version: &str, trees: &str) {
    let mut host = Host::start(tree, trees).unwrap();
    let running = host.podman.ok(&["version", "--format", "{{.Client.Version}}"]).unwrap();
    assert!(running.starts_with(version), "{running}");
    let small = small().unwrap();
    let reference = host.publish(&small, "small").unwrap();
    let fetches = |host: &Host| -> Vec<usize> {
        small.layers.iter().map(|layer| host.registry.blob_fetches(&layer.blob.digest)).collect()
    };
    let before = fetches(&host);
    assert_eq!(host.podman.output(&reference, &["cat", "/data/greeting"]).unwrap(), "hello again");
    let script = "rm /data/noise; echo changed > /data/greeting; ls /data";
    let run = ["run", "--name", "one", "--network", "none", &reference, "sh", "-c", script];
    assert_eq!(host.podman.ok(&run).unwrap(), "greeting");
    let diff = host.podman.ok(&["diff", "one"]).unwrap();
    assert!(diff.contains("D /data/noise") && diff.contains("C /data/greeting"), "{diff}");
    // Another image appears, without a restart of anything.
    let bash = host.publish(&image("bash").unwrap(), "bash").unwrap();
    assert!(host.podman.output(&bash, &["bash", "--version"]).unwrap().starts_with("GNU bash"));
    host.podman.check_storage(1_000_000).unwrap();
    assert_eq!(fetches(&host), before, "nothing was fetched");
    derived_images(&host, &reference);
    vanishing(&mut host, &reference, &bash);
}

/// Images made on top of the store's: committed, built, pushed, saved.
fn derived_images(host: &Host, reference: &str) {
    let podman = &host.podman;
    podman.ok(&["commit", "--quiet", "one", "committed"]).unwrap();
    assert_eq!(podman.output("committed", &["cat", "/data/greeting"]).unwrap(), "changed");
    let context = tempfile::Builder::new().prefix("context-").tempdir().unwrap();
    let recipe = format!("FROM {reference}\nRUN rm /data/noise && echo built > /built\n");
    std::fs::write(context.path().join("Containerfile"), recipe).unwrap();
    let directory = context.path().to_string_lossy();
    podman.ok(&["build", "--quiet", "--network", "none", "--tag", "built", &directory]).unwrap();
    assert_eq!(podman.output("built", &["sh", "-c", "cat /built; ls /data"]).unwrap(), "built\ngreeting");
    let pushed = host.registry.reference("built", "1");
    podman.ok(&["push", "--quiet", "--tls-verify=false", "built", &pushed]).unwrap();
    let mut docker = Docker::start().unwrap();
    docker.forward(&host.registry.address()).unwrap();
    assert_eq!(docker.ok(&["run", "--rm", "--network", "none", &pushed, "cat", "/built"]).unwrap(), "built");
    // The layers of the store leave it as the tars that they were.
    let archive = context.path().join("saved.tar");
    podman.ok(&["save", "--quiet", "--output", &archive.to_string_lossy(), reference]).unwrap();
    let saved = saved_layers(&archive, context.path()).unwrap();
    assert_eq!(saved, small().unwrap().diff_ids());
    podman.ok(&["rmi", "built"]).unwrap();
    // An image on top of the store's is pulled without the layers that the store has.
    podman.ok(&["pull", "--quiet", "--tls-verify=false", &pushed]).unwrap();
    assert_eq!(podman.output(&pushed, &["cat", "/built"]).unwrap(), "built");
    podman.check_storage(1_000_000).unwrap();
    podman.ok(&["rmi", &pushed]).unwrap();
    let changes = podman.ok(&["image", "diff", reference]).unwrap();
    assert!(changes.contains("C /data/greeting"), "{changes}");
}

/// The digests of the layers in an archive, base first.
fn saved_layers(archive: &Path, directory: &Path) -> Result<Vec<String>> {
    let tree = directory.join("tree");
    std::fs::create_dir(&tree)?;
    run(Command::new("tar").arg("-C").arg(&tree).arg("-xf").arg(archive))?.ok()?;
    let manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(tree.join("manifest.json"))?)?;
    let layers = manifest[0]["Layers"].as_array().into_iter().flatten().filter_map(|layer| layer.as_str());
    layers.map(|layer| Ok(digest_of(&std::fs::read(tree.join(layer))?))).collect()
}

/// Images go with the catalogue; what a container stands on stays, over restarts of everything.
fn vanishing(host: &mut Host, reference: &str, bash: &str) {
    // What has a name of its own here stays as long as it has.
    host.podman.ok(&["tag", bash, "mine:1"]).unwrap();
    host.site.ctl().ok(&["remove", bash]).unwrap();
    let list = host.store.path().join("overlay-images/images.json");
    let is_gone = || Ok(!std::fs::read_to_string(&list)?.contains(bash));
    wait_until("the store's name to go", TIMEOUT, is_gone).unwrap();
    assert!(host.podman.output("localhost/mine:1", &["bash", "--version"]).unwrap().starts_with("GNU bash"));
    // With the new name Podman has noted the old one as its own.
    let id = host.podman.ok(&["image", "inspect", "--format", "{{.Id}}", "localhost/mine:1"]).unwrap();
    host.podman.ok(&["rmi", "--force", &id]).unwrap();
    let other = host.publish(&image("torture-zstd").unwrap(), "torture").unwrap();
    host.remove(&other).unwrap();
    // Another image may go while Podman lists them.
    let left = [reference, "localhost/committed:latest"];
    wait_until("the images that are left", TIMEOUT, || Ok(host.podman.listed().is_ok_and(|listed| listed == left)))
        .unwrap();
    let overlay = host.store.path().join("overlay");
    let directories = || std::fs::read_dir(&overlay).unwrap().count() - 1;
    wait_until("the layers of bash to go", TIMEOUT, || Ok(directories() == small()?.layers.len())).unwrap();
    host.remove(reference).unwrap();
    host.mount.restart().unwrap();
    host.store.restart().unwrap();
    assert_eq!(host.podman.ok(&["start", "--attach", "one"]).unwrap(), "greeting");
    assert_eq!(host.podman.output("localhost/committed", &["cat", "/data/greeting"]).unwrap(), "changed");
    host.podman.ok(&["save", "--quiet", "--output", "/dev/null", "localhost/committed"]).unwrap();
    host.podman.ok(&["rm", "one"]).unwrap();
    host.podman.ok(&["rmi", "localhost/committed"]).unwrap();
    // The next change of the catalogue takes along what nothing stands on any more.
    let name = host.publish(&image("bash").unwrap(), "bash").unwrap();
    host.remove(&name).unwrap();
    wait_until("the layers of small to go", TIMEOUT, || Ok(directories() == 0)).unwrap();
}

#[test]
fn podman_4() {
    works(None, "4.3", "fuse");
}

#[test]
fn podman_5() {
    works(Some(&EngineTree::of("sid").unwrap()), "5.", "native");
}

#[test]
fn a_directory_is_kept_once_and_by_one() {
    let host = Host::start(None, "native").unwrap();
    host.publish(&small().unwrap(), "small").unwrap();
    let second = run(&mut image_store(host.store.path(), host.mount.path()).unwrap()).unwrap();
    assert!(second.code == 1 && second.stderr.contains("is kept by another cachefs image-store"), "{second:?}");
    let other = host.site.path().join("other");
    let once = |directory: &Path, mount: &Path| run(image_store(directory, mount).unwrap().arg("--once")).unwrap();
    once(&other, host.mount.path()).ok().unwrap();
    let list = |directory: &Path| std::fs::read(directory.join("overlay-images/images.json")).unwrap();
    assert_eq!(list(&other), list(host.store.path()));
    let refused = once(&other, host.site.path());
    assert!(refused.code == 1 && refused.stderr.contains("is not a cachefs mount"), "{refused:?}");
    assert_eq!(list(&other), list(host.store.path()), "nothing is lost");
    let occupied = host.site.path().join("occupied");
    std::fs::create_dir_all(occupied.join("somebody")).unwrap();
    run(Command::new("chmod").arg("755").arg(&occupied)).unwrap().ok().unwrap();
    let refused = once(&occupied, host.mount.path());
    assert!(refused.code == 1 && refused.stderr.contains("cannot hold an image store"), "{refused:?}");
}

/// Checks what engines rely on: whatever a list names is complete.
fn assert_consistent(directory: &Path) {
    let list = |name: &str| -> Vec<serde_json::Value> {
        let text = std::fs::read(directory.join(format!("overlay-{name}/{name}.json")));
        text.map(|text| serde_json::from_slice(&text).unwrap()).unwrap_or_default()
    };
    let layers = list("layers");
    for layer in &layers {
        let overlay = directory.join("overlay").join(layer["id"].as_str().unwrap());
        let short = std::fs::read_to_string(overlay.join("link")).unwrap();
        assert_eq!(
            directory.join("overlay/l").join(short).canonicalize().unwrap(),
            overlay.join("diff").canonicalize().unwrap()
        );
        let parent = layer["parent"].as_str();
        assert!(parent.is_none_or(|parent| layers.iter().any(|layer| layer["id"] == parent)));
        let tar_split =
            directory.join("overlay-layers").join(format!("{}.tar-split.gz", layer["id"].as_str().unwrap()));
        run(Command::new("gzip").arg("--test").arg(tar_split)).unwrap().ok().unwrap();
    }
    for image in list("images") {
        assert!(layers.iter().any(|layer| layer["id"] == image["layer"]));
        let documents =
            std::fs::read_dir(directory.join("overlay-images").join(image["id"].as_str().unwrap())).unwrap();
        assert_eq!(documents.count(), image["big-data-names"].as_array().unwrap().len());
    }
}

#[test]
fn killed_at_any_moment_it_leaves_what_podman_can_read() {
    let host = Host::start(None, "native").unwrap();
    let small = host.publish(&small().unwrap(), "small").unwrap();
    let bash = host.publish(&image("bash").unwrap(), "bash").unwrap();
    let directory = host.site.path().join("killed");
    let log = host.site.path().join("killed.log");
    let (mut pause, mut killed) = (Duration::from_millis(1), 0);
    loop {
        let mut command = image_store(&directory, host.mount.path()).unwrap();
        let mut process = Process::spawn("image-store", command.arg("--once"), &log).unwrap();
        // This sleep is no synchronisation. It sets the moment of death, which is later each time.
        std::thread::sleep(pause);
        process.signal(Signal::SIGKILL).unwrap();
        let ended = process.wait(TIMEOUT).unwrap();
        assert_consistent(&directory);
        if ended.success() {
            break;
        }
        assert_eq!(ended.code(), None, "{}", process.log());
        killed += 1;
        pause = pause.mul_f64(1.1) + Duration::from_millis(1);
        if killed % 3 == 0 {
            let _ = std::fs::remove_dir_all(&directory);
        }
    }
    assert!(killed >= 5, "only {killed} runs were killed");
    let podman = Podman::new(None, &directory).unwrap();
    assert_eq!(podman.listed().unwrap(), [bash, small.clone()]);
    assert_eq!(podman.output(&small, &["cat", "/data/greeting"]).unwrap(), "hello again");
}
