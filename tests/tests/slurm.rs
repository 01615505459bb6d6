//! What the users of a cluster do with an image of the share: Apptainer and Charliecloud, started by somebody who is not root.
//!
//! Root makes one image visible (a prolog of Slurm does that) by a bind mount of its tree; the mount of the store stays root's.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use tests::cluster::Mount;
use tests::engine_tree::{EngineTree, EnteredTree};
use tests::hosts;
use tests::images::image;
use tests::namespace::Namespace;
use tests::process::{Output, TIMEOUT, run, wait_until};
use tests::site::{Site, SiteSpec};

const PACKAGES: &str = "apptainer,charliecloud-runtime,fuse-overlayfs,mount,procps";

/// Dropped in this order: what is entered, the visible image, the mount, the coordinator.
struct Node {
    tree: EnteredTree,
    visible: Visible,
    mount: Mount,
    site: Site,
    _namespace: Namespace,
}

/// An image's tree, bound to a place that everybody reaches. Gone when dropped.
struct Visible(PathBuf);

impl Visible {
    fn new(image: &Path, place: PathBuf) -> Result<Visible> {
        std::fs::create_dir_all(&place)?;
        let visible = Visible(place);
        run(Command::new("mount").args(["--bind", "-o", "ro,nosuid,nodev"]).arg(image).arg(&visible.0))?.ok()?;
        Ok(visible)
    }
}

impl Drop for Visible {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

impl Node {
    fn start() -> Result<Node> {
        let site = Site::start_with(&SiteSpec { settings: "host_lease = '2s'\n".to_owned(), ..SiteSpec::default() })?;
        hosts::load(&site, &image("bash")?)?;
        let mount = hosts::mount(&site, "one")?;
        let tree = std::fs::canonicalize(mount.path().join("images/bash/latest"))?;
        // A user reaches it through directories that everybody may pass.
        run(Command::new("chmod").arg("755").arg(site.path()))?.ok()?;
        let visible = Visible::new(&tree, site.path().join("visible/bash"))?;
        let namespace = Namespace::new()?;
        let tree = EngineTree::with("sid", PACKAGES)?.enter(&namespace, site.path())?;
        // On most machines everybody may open /dev/fuse, which fuse-overlayfs needs.
        let fuse = site.path().join("fuse");
        mknod(&fuse, SFlag::S_IFCHR, Mode::empty(), makedev(10, 229))?;
        run(Command::new("chmod").arg("666").arg(&fuse))?.ok()?;
        run(tree.command("mount").arg("--bind").arg(&fuse).arg("/dev/fuse"))?.ok()?;
        Ok(Node { tree, visible, mount, site, _namespace: namespace })
    }

    /// Runs a program of the tree as a user without any rights.
    fn user(&self, program: &[&str]) -> Result<Output> {
        let mut command = self.tree.command("setpriv");
        command.args(["--reuid", "nobody", "--regid", "nogroup", "--clear-groups", "env", "HOME=/tmp", "USER=nobody"]);
        run(command.args(program).current_dir("/"))
    }

    /// Runs a shell script in the image by Apptainer.
    fn apptainer(&self, options: &[&str], script: &str) -> Result<Output> {
        let image = self.visible.0.to_string_lossy().into_owned();
        let words = [&["apptainer", "exec", "--no-home"], options, &[&image, "/bin/sh", "-c", script]].concat();
        self.user(&words)
    }

    /// Runs a shell script in the image by Charliecloud.
    fn charliecloud(&self, script: &str) -> Result<Output> {
        let image = self.visible.0.to_string_lossy().into_owned();
        self.user(&["ch-run", &image, "--", "/bin/sh", "-c", script])
    }
}

#[test]
fn users_start_an_image_by_apptainer_and_charliecloud() {
    let node = Node::start().unwrap();
    let version = "cat /etc/debian_version; id -u; bash --version | head -n 1 | cut -c 1-8";
    for started in [node.apptainer(&[], version), node.charliecloud(version)] {
        let text = started.unwrap().ok().unwrap();
        assert!(text.starts_with("12.") && text.ends_with("\n65534\nGNU bash"), "{text}");
    }
    // The image stays as it is; what a job writes is the job's.
    for denied in [node.apptainer(&[], "echo no > /etc/debian_version"), node.charliecloud("echo no > /tmp/../etc/new")]
    {
        denied.unwrap().ok().unwrap_err();
    }
    let written = node.apptainer(&["--writable-tmpfs"], "echo mine > /new && cat /new").unwrap();
    assert_eq!(written.ok().unwrap(), "mine");
    assert!(!node.visible.0.join("new").exists());
    // Directories of the machine appear where the image has none, although nobody can make them in it.
    let bound = node.apptainer(&["--bind", "/usr/share:/not/there"], "ls -d /not/there/doc").unwrap();
    assert_eq!(bound.ok().unwrap(), "/not/there/doc");
    assert_eq!(node.apptainer(&["--fakeroot"], "id -u").unwrap().ok().unwrap(), "0");
    // Nobody sees other images than the one that was made visible.
    let mount = node.mount.path().to_string_lossy().into_owned();
    node.user(&["ls", &mount]).unwrap().ok().unwrap_err();
}

#[test]
fn an_image_that_users_see_outlives_its_removal() {
    let node = Node::start().unwrap();
    let layers = node.site.layers().unwrap();
    node.charliecloud("true").unwrap().ok().unwrap();
    wait_until("the coordinator to know what is in use", TIMEOUT, || {
        let hosts = node.site.ctl().json(&["hosts"])?;
        Ok(hosts["hosts"][0]["layers"].as_array().map(Vec::len) == Some(layers.len()))
    })
    .unwrap();
    let image = node.site.images().unwrap().remove(0);
    node.site.ctl().ok(&["remove", &image]).unwrap();
    // A coordinator that has just begun to lead waits until it has heard of the hosts.
    let collected = || Ok(node.site.ctl().run(&["gc", "--grace", "0s"])?.succeeded());
    wait_until("a collection", TIMEOUT, collected).unwrap();
    // Files that nobody has opened before can still be read.
    node.apptainer(&[], "cat /usr/share/doc/bash/* /var/lib/dpkg/status > /dev/null").unwrap().ok().unwrap();
    assert_eq!(node.site.layers().unwrap(), layers);
    // Without the bind mount nothing holds them.
    let Node { tree, visible, mount, site, _namespace } = node;
    drop((tree, visible));
    wait_until("the image's layers to go", TIMEOUT, || {
        mount.forget()?;
        site.ctl().ok(&["gc", "--grace", "0s"])?;
        Ok(site.layers()?.is_empty())
    })
    .unwrap();
}
