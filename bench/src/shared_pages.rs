//! What do ten images on one base take of the page cache, once each has started?
//!
//! A native tree belongs to one chain, so the kernel keeps the pages of a shared layer once for each image. On the mount's own trees a
//! layer's files are the same for all images. Both are counted, each with the local cache's files behind it.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;
use tests::cluster::{Mount, MountSpec};
use tests::hosts;
use tests::images::archive::{Archive, Header, Kind};
use tests::images::{self, ImageFiles};
use tests::process::run as command;
use tests::site::Site;

use crate::footprint::derived;
use crate::report::{Bar, Report};
use crate::{application, process, start};

const IMAGES: usize = 10;
const BASE: &str = "python3";
/// Paths for one call of `fincore`.
const PATHS: usize = 500;

/// Files that may have pages in memory, each once.
#[derive(Default)]
struct Files {
    seen: HashSet<(u64, u64)>,
    paths: Vec<PathBuf>,
}

impl Files {
    fn add_below(&mut self, directory: &Path) -> Result<()> {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            let status = fs::symlink_metadata(&path)?;
            if status.is_dir() {
                self.add_below(&path)?;
            } else if status.is_file() && status.len() > 0 && self.seen.insert((status.dev(), status.ino())) {
                self.paths.push(path);
            }
        }
        Ok(())
    }

    /// Bytes of their pages in memory.
    fn resident(&self) -> Result<u64> {
        let mut bytes = 0;
        for paths in self.paths.chunks(PATHS) {
            let mut fincore = Command::new("fincore");
            fincore.args(["--bytes", "--raw", "--noheadings", "--output", "RES", "--"]).args(paths);
            let shown = command(&mut fincore)?.ok()?;
            for line in shown.lines() {
                bytes += line.trim().parse::<u64>().with_context(|| format!("fincore says {line}"))?;
            }
        }
        Ok(bytes)
    }
}

/// The images: one base, each with a layer of its own.
fn ten(directory: &Path) -> Result<Vec<ImageFiles>> {
    let base = images::image(BASE)?;
    let build = |number: usize| {
        let mut tar = Archive::new(Vec::new());
        tar.add(&Header::new(Kind::File, "release").mode(0o644), number.to_string())?;
        derived(&base, number, &tar.finish()?, &directory.join(number.to_string()))
    };
    (0..IMAGES).map(build).collect()
}

/// Measures both kinds of trees.
pub(crate) fn run() -> Result<Report> {
    let columns = vec!["trees", "one image, MB", "ten, MB", "the local cache's files, MB"];
    let mut report = Report::new("shared-pages", columns);
    let (site, directory) = (Site::start()?, tempfile::tempdir()?);
    let images = ten(directory.path())?;
    for image in &images {
        hosts::load(&site, image)?;
    }
    let application = application::of(BASE)?;
    for tree in ["native", "fuse"] {
        let mut spec = MountSpec::new(&directory.path().join(tree), &site.store());
        spec.arguments = vec!["--tree".into(), tree.into()];
        let mount = Mount::start(spec.clone())?;
        process::drop_kernel_caches()?;
        let (mut trees, mut cache, mut first) = (Files::default(), Files::default(), 0);
        for (number, image) in images.iter().enumerate() {
            let top = mount.tree(image.chain_ids().last().context("an image without layers")?);
            start::seconds(std::slice::from_ref(&top), application)?;
            trees.add_below(&fs::canonicalize(top)?)?;
            if number == 0 {
                first = trees.resident()?;
            }
        }
        cache.add_below(&spec.cache.join("objects"))?;
        let (all, behind) = (trees.resident()?, cache.resident()?);
        let mb = |bytes: u64| bytes as f64 / 1e6;
        let mut row = vec![tree.to_owned()];
        row.extend([first, all, behind].map(|bytes| format!("{:.1}", mb(bytes))));
        report.row(row);
        report.bar(Bar::new(format!("page cache of {IMAGES} images on one base, MB"), tree, mb(all + behind)));
        report.add_samples(tree, json!({ "one": first, "ten": all, "local_cache": behind }));
    }
    Ok(report)
}
