//! The images that are read: a real one, one with a single large file, one with Python, and one with a million inodes.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tests::cluster::{Mount, MountSpec};
use tests::hosts;
use tests::images::archive::{Archive, Header, Kind};
use tests::images::oddities::noise;
use tests::images::{self, Compression, ImageBuilder, ImageFiles, Pools};
use tests::site::Site;

use crate::own_layers;

/// The name of the file in the image with one large file.
pub(super) const LARGE_FILE: &str = "large";
/// The size of [`LARGE_FILE`], MiB.
pub(super) const LARGE_MIB: usize = 256;
/// How many files the open, stat and lookup loops visit.
const SAMPLED_FILES: usize = 2000;
/// The image with many inodes has this many directories of as many files each.
const FANOUT: usize = 1000;
/// How many of these directories have files with content.
const FILLED: usize = 20;

/// The images, in the order of [`Part`].
pub(super) struct Inputs {
    images: Vec<ImageFiles>,
}

impl Inputs {
    /// Brings all images into the site's store.
    pub(super) fn load(site: &Site, tree: &str) -> Result<Inputs> {
        let images = vec![images::image(tree)?, large(&site.path().join("large"))?, images::image("python3")?];
        for image in &images {
            hosts::load(site, image)?;
        }
        Ok(Inputs { images })
    }

    /// The chainIDs, by part.
    pub(super) fn chains(&self) -> Vec<String> {
        self.images.iter().filter_map(|image| image.chain_ids().pop()).collect()
    }

    /// Copies the images' layers, with all attributes, beside the store, as Docker's overlay2 keeps them. Returns each part's,
    /// base first.
    pub(super) fn unpack(&self, site: &Site) -> Result<Vec<Vec<PathBuf>>> {
        let directory = site.path().join("unpacking");
        fs::create_dir(&directory)?;
        let natives = site.path().join("native");
        fs::create_dir(&natives)?;
        let mount = Mount::start(MountSpec::new(&directory, &site.store()))?;
        let parts = self.images.iter().map(|image| own_layers::copy(&mount, image, &natives)).collect::<Result<_>>()?;
        drop(mount);
        fs::remove_dir_all(&directory)?;
        Ok(parts)
    }
}

/// Regular files of a tree, spread evenly over it, relative to its root.
pub(super) fn sample_files(root: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    list(root, &mut files)?;
    files.sort();
    let step = (files.len() / SAMPLED_FILES).max(1);
    let relative = |path: &PathBuf| path.strip_prefix(root).map(Path::to_owned).context("a file beside its tree");
    files.iter().step_by(step).take(SAMPLED_FILES).map(relative).collect()
}

fn list(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            list(&entry.path(), files)?;
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// An image of one large file that zstd can halve: every page is half noise, half the same sentence.
fn large(directory: &Path) -> Result<ImageFiles> {
    let pools = Pools::open(directory)?;
    let half = 2048;
    let sentence = b"All work and no play makes Jack a dull boy. ".repeat(half / 44 + 1);
    let layer = pools.layer_from(
        |sink| {
            let mut content = Vec::with_capacity(LARGE_MIB << 20);
            for piece in 0..LARGE_MIB as u64 {
                for page in noise(piece, 1 << 19).chunks(half) {
                    content.extend_from_slice(page);
                    content.extend_from_slice(&sentence[..half]);
                }
            }
            let mut tar = Archive::new(sink);
            tar.add(&Header::new(Kind::File, LARGE_FILE), content)?;
            tar.finish()?;
            Ok(())
        },
        Compression::None,
    )?;
    ImageBuilder::new("large-file").layer(layer).build(&pools, directory)
}

/// Builds an image of a million inodes and loads it into the site's store.
pub(super) fn load_million(site: &Site) -> Result<ImageFiles> {
    let directory = site.path().join("million");
    let pools = Pools::open(&directory)?;
    let layer = pools.layer_from(
        |sink| {
            let mut tar = Archive::new(BufWriter::with_capacity(1 << 20, sink));
            for outer in 0..FANOUT {
                tar.add(&Header::new(Kind::Directory, format!("{outer:03}/")), "")?;
                for inner in 0..FANOUT {
                    let path = path_in_million(outer * FANOUT + inner);
                    let content =
                        if outer < FILLED { format!("{path}: {}\n", outer * inner).repeat(4) } else { String::new() };
                    tar.add(&Header::new(Kind::File, path.as_bytes()), content)?;
                }
            }
            tar.finish()?.flush()?;
            Ok(())
        },
        Compression::None,
    )?;
    let image = ImageBuilder::new("million").layer(layer).build(&pools, &directory)?;
    hosts::load(site, &image)?;
    Ok(image)
}

/// The path of file `number` in the image of a million inodes; the first 20,000 files have content.
pub(super) fn path_in_million(number: usize) -> String {
    format!("{:03}/{:03}.file", number / FANOUT, number % FANOUT)
}
