//! What a container sees through the mount is what it would see on a disk where dockerd extracted the same layers.
//!
//! Each real image goes through coordinator and store to a mount. It is also exported again: its layer tars must equal
//! the original ones byte for byte, and a real dockerd with overlay2 must take them for the same image. Then every
//! layer in the mount is compared with dockerd's own extraction, and the image's merged root with a kernel overlay of
//! these extractions, attribute by attribute. Only what [`docker_chose_the_time`] and [`leave_out_empty_attributes`]
//! explain is left out.

use std::collections::BTreeSet;
use std::io::Read;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use tests::cluster::Mount;
use tests::docker::Docker;
use tests::hosts;
use tests::images::{ImageFiles, digest_of_reader, image};
use tests::mounts::Overlay;
use tests::process::run;
use tests::registry::Registry;
use tests::site::Site;
use tests::tree::{Entry, Ignore, Kind, RelativePath, Tree, diff, snapshot};

/// How an image is brought into the store.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// `cachefsctl load` of a `docker save` archive.
    DockerSave,
    /// `cachefsctl load` of an OCI layout directory.
    OciLayout,
    /// `cachefsctl pull` from a real registry.
    Registry,
}

#[test]
fn bash() {
    check("bash", Way::DockerSave).unwrap();
}

#[test]
fn python3() {
    check("python3", Way::OciLayout).unwrap();
}

#[test]
fn nginx() {
    check("nginx", Way::Registry).unwrap();
}

#[test]
fn redis() {
    check("redis", Way::DockerSave).unwrap();
}

#[test]
fn nodejs() {
    check("nodejs", Way::OciLayout).unwrap();
}

#[test]
fn gcc() {
    check("gcc", Way::Registry).unwrap();
}

#[test]
fn torture() {
    check("torture", Way::Registry).unwrap();
}

/// An image with zstd layers. dockerd 20.10 cannot pull them but can load them, since `docker save` archives hold plain tars.
#[test]
fn torture_zstd() {
    check("torture-zstd", Way::Registry).unwrap();
}

fn check(name: &str, way: Way) -> Result<()> {
    let (site, image) = (Site::start()?, image(name)?);
    let [mount, loops] = [hosts::mount_trees(&site, "one", "native")?, hosts::mount_trees(&site, "two", "loop")?];
    let reference = bring(&site, &image, way)?;

    let file = export(&site, &image, &reference).with_context(|| format!("export of {name}"))?;
    let docker = Docker::start()?;
    let begun = now()?;
    docker.ok(&["load", "--quiet", "--input", &file.to_string_lossy()]).context("Docker does not take the export")?;
    let extracting = begun..=now()?;
    let id = docker.ok(&["images", "--quiet", "--no-trunc"])?;
    ensure!(id == image.config.digest, "Docker takes the export for {id}, not {}", image.config.digest);

    let extracted = docker.extracted(&image)?;
    for (number, (diff_id, directory)) in image.diff_ids().iter().zip(&extracted).enumerate() {
        same(&mount.layer(diff_id), directory, &extracting).with_context(|| format!("layer {number} of {name}"))?;
    }
    let chains = image.chain_ids();
    let overlay = Overlay::mount(&extracted)?;
    let chain = chains.last().context("no layers")?;
    // As FUSE shows it, and then as native trees.
    for tree in [mount.chain(chain), mount.tree(chain), loops.tree(chain)] {
        same(&tree, &overlay.root(), &extracting).with_context(|| format!("the root of {name}, {}", tree.display()))?;
    }
    half_of_the_chain(&mount, &chains, &extracted, &extracting).with_context(|| format!("a lower chain of {name}"))
}

/// Compares a chain that is not a whole image, as a container of a parent image would see it.
fn half_of_the_chain(
    mount: &Mount,
    chains: &[String],
    extracted: &[PathBuf],
    extracting: &RangeInclusive<i64>,
) -> Result<()> {
    let length = chains.len() - 1;
    let overlay = Overlay::mount(&extracted[..length])?;
    same(&mount.chain(&chains[length - 1]), &overlay.root(), extracting)
}

/// Brings the image into the store and returns its name there.
fn bring(site: &Site, image: &ImageFiles, way: Way) -> Result<String> {
    let name = format!("{}:latest", image.name);
    match way {
        Way::DockerSave => hosts::load(site, image).map(|()| name),
        Way::OciLayout => site.ctl().ok(&["load", &image.oci.to_string_lossy()]).map(|_| name),
        Way::Registry => {
            let registry = Registry::start()?;
            let reference = registry.push(image, &image.name, "latest")?;
            site.ctl().ok(&["pull", &reference])?;
            for layer in &image.layers {
                let fetches = registry.blob_fetches(&layer.blob.digest);
                ensure!(fetches == 1, "the blob {} was fetched {fetches} times", layer.blob.digest);
            }
            Ok(reference)
        }
    }
}

fn now() -> Result<i64> {
    Ok(i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())?)
}

/// Compares the tree in the mount with the tree that Docker made.
fn same(mounted: &Path, docker: &Path, extracting: &RangeInclusive<i64>) -> Result<()> {
    // No waiting is needed: a layer is visible as soon as its pull has ended.
    let (ours, theirs) = std::thread::scope(|scope| {
        let ours = scope.spawn(|| snapshot(mounted));
        let theirs = snapshot(docker);
        (ours.join(), theirs)
    });
    let (Ok(ours), theirs) = (ours, theirs?) else { bail!("reading {} panicked", mounted.display()) };
    let mut ours = ours?;
    leave_out_empty_attributes(&mut ours, &theirs);
    let ignore =
        Ignore { directory_nlink: false, mtime_of: docker_chose_the_time(&theirs, extracting), ..Ignore::default() };
    let differences = diff(&ours, &theirs, &ignore);
    ensure!(ours.len() > 1, "{} is empty", mounted.display());
    ensure!(differences.is_empty(), "left is the mount, right is Docker:\n{}", summary(&differences));
    sizes_of_directories_are_plausible(mounted)
}

/// The entries without a time in the tar, which get the time of Docker's extraction: whiteouts (overlay2 makes the
/// device and sets only its owner), directories that the tar implies, and the layer's root.
fn docker_chose_the_time(theirs: &Tree, extracting: &RangeInclusive<i64>) -> BTreeSet<RelativePath> {
    let untold = |entry: &Entry| {
        let whiteout = entry.kind == Kind::CharDevice && entry.rdev == 0;
        (whiteout || entry.kind == Kind::Directory) && extracting.contains(&entry.mtime)
    };
    theirs.iter().filter(|(_, entry)| untold(entry)).map(|(path, _)| path.clone()).collect()
}

/// Removes extended attributes with an empty value that Docker lost. The tar holds them and containerd sets them, but
/// dockerd 20.10 treats an empty PAX record as absent. The mount serves what the tar holds.
fn leave_out_empty_attributes(ours: &mut Tree, theirs: &Tree) {
    for (path, entry) in ours {
        let lost = |name: &Vec<u8>| theirs.get(path).is_some_and(|entry| !entry.xattrs.contains_key(name));
        entry.xattrs.retain(|name, value| !(value.is_empty() && lost(name)));
    }
}

/// The size of a directory has a meaning only on its own file system. Programs may expect only that it is not 0.
fn sizes_of_directories_are_plausible(root: &Path) -> Result<()> {
    ensure!(root.metadata()?.len() > 0, "the directory {} has size 0", root.display());
    Ok(())
}

/// The first differences, and their number.
fn summary(differences: &[String]) -> String {
    let mut text = differences.iter().take(40).cloned().collect::<Vec<_>>().join("\n");
    text.push_str(&format!("\n({} differences)", differences.len()));
    text
}

/// Exports the image, checks that each layer comes back byte for byte, and returns the archive.
fn export(site: &Site, image: &ImageFiles, reference: &str) -> Result<PathBuf> {
    let file = site.path().join("export.tar");
    site.ctl().ok(&["export", reference, &file.to_string_lossy()])?;
    let manifest: serde_json::Value = serde_json::from_str(&run(tar(&file).arg("manifest.json"))?.ok()?)?;
    let layers = manifest[0]["Layers"].as_array().context("the archive's manifest has no layers")?;
    ensure!(layers.len() == image.layers.len(), "{} layers instead of {}", layers.len(), image.layers.len());
    for (layer, expected) in layers.iter().zip(image.diff_ids()) {
        let path = layer.as_str().context("a layer has no path")?;
        let digest = digest_of_member(&file, path)?;
        ensure!(digest == expected, "the layer {path} comes back as {digest}, it was {expected}");
    }
    Ok(file)
}

fn tar(archive: &Path) -> Command {
    let mut command = Command::new("tar");
    command.arg("--extract").arg("--to-stdout").arg("--file").arg(archive);
    command
}

fn digest_of_member(archive: &Path, member: &str) -> Result<String> {
    let mut child = tar(archive).arg(member).stdout(Stdio::piped()).spawn()?;
    let mut output = child.stdout.take().context("tar has no output")?;
    let digest = digest_of_reader(&mut output)?;
    let mut rest = Vec::new();
    output.read_to_end(&mut rest)?;
    ensure!(child.wait()?.success(), "tar found no {member} in the export");
    Ok(digest)
}
