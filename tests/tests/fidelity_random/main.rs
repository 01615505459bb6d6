//! Random trees go as tars through coordinator, store and mount, and come out unchanged.
//!
//! One coordinator and one mount serve all cases, as on a real host, so the cases also interact through deduplication
//! and the local cache. proptest shrinks a failing case to the smallest layers that still fail. The expected tree is
//! derived from the generated items (`expected`). Another test checks that Docker and the kernel make the same tree of
//! the same tars.

mod expected;
mod model;

use std::cell::Cell;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use proptest::prelude::ProptestConfig;
use proptest::test_runner::{TestCaseError, TestRunner};
use tests::cluster::Mount;
use tests::docker::Docker;
use tests::hosts;
use tests::images::{Compression, ImageBuilder, ImageFiles, Pools};
use tests::mounts::Overlay;
use tests::site::Site;
use tests::tree::{diff, snapshot};

use expected::Expected;
use model::Layer;

/// Number of random images. Each one goes through three processes.
const CASES: u32 = 40;
/// Number of random images that dockerd extracts, which takes seconds each.
const CASES_FOR_DOCKER: u32 = 8;

#[test]
fn what_goes_in_comes_out() {
    let site = Site::start().unwrap();
    let mounts = ["native", "loop"].map(|kind| hosts::mount_trees(&site, kind, kind).unwrap());
    for_random_layers(CASES, |name, layers| round_trip(&site, &mounts, name, layers));
}

#[test]
fn what_is_expected_is_what_docker_and_the_kernel_make() {
    let docker = Docker::start().unwrap();
    for_random_layers(CASES_FOR_DOCKER, |name, layers| extraction(&docker, name, layers));
}

fn for_random_layers(cases: u32, check: impl Fn(&str, &[Layer]) -> Result<()>) {
    let config =
        ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 200, ..ProptestConfig::default() };
    let number = Cell::new(0);
    let outcome = TestRunner::new(config).run(&model::layers(), |layers| {
        number.set(number.get() + 1);
        let name = format!("random-{}", number.get());
        check(&name, &layers).map_err(|error| TestCaseError::fail(format!("{error:#}")))
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}

fn round_trip(site: &Site, [mount, loops]: &[Mount; 2], name: &str, layers: &[Layer]) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let image = build(name, layers, directory.path())?;
    site.ctl().ok(&["load", &image.oci.to_string_lossy()])?;
    for (diff_id, layer) in image.diff_ids().iter().zip(layers) {
        same(&mount.layer(diff_id), &expected::layer(layer)).with_context(|| format!("layer {diff_id}"))?;
    }
    for (number, chain) in image.chain_ids().iter().enumerate() {
        let expected = expected::chain(&layers[..=number]);
        same(&mount.chain(chain), &expected).with_context(|| format!("chain {number}"))?;
        same(&mount.tree(chain), &expected).with_context(|| format!("native tree {number}"))?;
        same(&loops.tree(chain), &expected).with_context(|| format!("native tree {number} on loop devices"))?;
    }
    Ok(())
}

fn extraction(docker: &Docker, name: &str, layers: &[Layer]) -> Result<()> {
    let (layers, directory) = (&expected::without_vain_whiteouts(layers)[..], tempfile::tempdir()?);
    let image = build(name, layers, directory.path())?;
    docker.load(&image)?;
    let extracted = docker.extracted(&image)?;
    for (place, layer) in extracted.iter().zip(layers) {
        same(place, &expected::layer(layer)).with_context(|| format!("layer at {}", place.display()))?;
    }
    if layers.len() > 1 {
        let overlay = Overlay::mount(&extracted)?;
        same(&overlay.root(), &expected::chain(layers)).context("the overlay of all layers")?;
    }
    Ok(())
}

fn build(name: &str, layers: &[Layer], directory: &Path) -> Result<ImageFiles> {
    let pools = Pools::open(directory)?;
    let mut builder = ImageBuilder::new(name);
    for (number, layer) in layers.iter().enumerate() {
        let compression = [Compression::Gzip, Compression::Zstd, Compression::None][number % 3];
        builder = builder.layer(pools.layer(&layer.tar()?, compression)?);
    }
    builder.build(&pools, directory)
}

fn same(found: &Path, expected: &Expected) -> Result<()> {
    let differences = diff(&snapshot(found)?, &expected.tree, &expected.ignore());
    ensure!(differences.is_empty(), "left is what is there, right is what the tar says:\n{}", differences.join("\n"));
    Ok(())
}
