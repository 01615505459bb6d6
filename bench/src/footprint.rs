//! Is the store smaller than the compressed layers, and does the daemon stay small with twenty images mounted and walked?
//!
//! Twenty images as in a fleet: the test images, and images on top of them that add one layer each.

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::Result;
use serde_json::json;
use tests::cluster::{Coordinator, CoordinatorSpec, Mount, MountSpec};
use tests::images::archive::{Archive, Header, Kind};
use tests::images::{self, Compression, ImageBuilder, ImageFiles, Pools};

use crate::process;
use crate::report::{Bar, Bound, Report};

const IMAGES: usize = 20;
/// Files that each derived image adds.
const OWN_FILES: usize = 2000;
/// The store's size, as a ratio to the size of the compressed layers.
const SIZE_TARGET: Bound = Bound::AtMost(1.0);
/// The daemon's resident memory, MiB.
const MEMORY_TARGET: Bound = Bound::AtMost(60.0);

/// A layer of small files that no other image has.
fn own_layer(seed: usize) -> Result<Vec<u8>> {
    let mut tar = Archive::new(Vec::new());
    for n in 0..OWN_FILES {
        let content = format!("image {seed}, file {n}: {}\n", n * 7919 + seed).repeat(1 + n % 40);
        tar.add(&Header::new(Kind::File, format!("opt/app{seed}/{}/{n}.txt", n % 50)), content)?;
    }
    Ok(tar.finish()?)
}

/// `base` with one more layer, under the name `appN`.
pub(crate) fn derived(base: &ImageFiles, number: usize, layer: &[u8], directory: &Path) -> Result<ImageFiles> {
    let pools = Pools::open(directory)?;
    let mut builder = ImageBuilder::new(&format!("app{number}"));
    for layer in &base.layers {
        fs::copy(base.blob_path(&layer.blob.digest), pools.blobs.path(&layer.blob.digest))?;
        builder = builder.layer(layer.clone());
    }
    builder.layer(pools.layer(layer, Compression::Gzip)?).build(&pools, directory)
}

fn twenty(directory: &Path) -> Result<Vec<ImageFiles>> {
    let names = images::all_images().into_iter().filter(|name| *name != "torture-zstd");
    let mut all = names.map(images::image).collect::<Result<Vec<_>>>()?;
    for seed in all.len()..IMAGES {
        let bases = images::debian_images().len();
        let directory = directory.join(format!("derived{seed}"));
        all.push(derived(&all[seed % bases], seed, &own_layer(seed)?, &directory)?);
    }
    Ok(all)
}

/// Adds to `seen` the number of entries and, with `read`, the bytes read from files below 64 MiB.
fn walk(dir: &Path, read: bool, seen: &mut (u64, u64)) -> Result<()> {
    let mut buffer = vec![0; 1 << 20];
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let metadata = fs::symlink_metadata(entry.path())?;
        seen.0 += 1;
        if metadata.is_dir() {
            walk(&entry.path(), read, seen)?;
        } else if read && metadata.is_file() && metadata.size() < 64 << 20 {
            let mut file = fs::File::open(entry.path())?;
            loop {
                match file.read(&mut buffer)? {
                    0 => break,
                    n => seen.1 += n as u64,
                }
            }
        }
    }
    Ok(())
}

/// Measures the store's size and the daemon's memory.
pub(crate) fn run() -> Result<Report> {
    let dir = tempfile::tempdir()?;
    let (store, state) = (dir.path().join("store"), dir.path().join("state"));
    fs::create_dir(&store)?;
    let images = twenty(&dir.path().join("images"))?;
    let coordinator = Coordinator::start(CoordinatorSpec::new(&store, &state))?;
    let mut compressed = std::collections::BTreeMap::new();
    for image in &images {
        coordinator.ctl().ok(&["load", &image.docker_archive()?.display().to_string()])?;
        for layer in &image.layers {
            compressed.insert(layer.diff_id.clone(), layer.blob.size);
        }
    }
    let compressed: u64 = compressed.values().sum();
    let size = process::bytes_below(&store)?;
    let mut report = Report::new("footprint", vec!["what", "value", "bound"]);
    let mib = |bytes: u64| format!("{:.1} MB", bytes as f64 / 1e6);
    report.row(vec!["distinct compressed layers of 20 images".into(), mib(compressed), String::new()]);
    let ratio = size as f64 / compressed as f64;
    report.row(vec!["store".into(), mib(size), format!("<= {} ({ratio:.2})", mib(compressed))]);
    report.target("store / compressed layers, bytes", ratio, SIZE_TARGET);
    report.bar(Bar::new("bytes / compressed layers", "store", ratio).bound(SIZE_TARGET));
    let mut mount = Mount::start(MountSpec::new(dir.path(), &store))?;
    for (what, read) in [("walked", false), ("walked and read", true)] {
        let mut seen = (0, 0);
        for image in &images {
            let chains = image.chain_ids();
            let top = chains.last().map(|chain| mount.tree(chain)).unwrap_or_default();
            walk(&top, read, &mut seen)?;
        }
        let memory = process::memory_of_mount(&mut mount)?;
        let named = format!("daemon, {} images {what}: {} inodes, {} read", images.len(), seen.0, mib(seen.1));
        report.row(vec![
            named,
            format!("{:.1} MiB resident, {:.1} MiB its own", memory.resident, memory.anonymous),
            "<= 60 MiB".into(),
        ]);
        report.target(format!("daemon, {what}: MiB resident"), memory.resident, MEMORY_TARGET);
        report.bar(Bar::new("daemon, MiB resident", what, memory.resident).bound(MEMORY_TARGET));
        report.add_samples(
            what,
            json!({ "resident_mib": memory.resident, "anonymous_mib": memory.anonymous, "inodes": seen.0 }),
        );
    }
    report.add_samples("store", json!({ "bytes": size, "compressed_layers": compressed }));
    Ok(report)
}
