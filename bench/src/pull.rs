//! Is pulling into the store faster than `docker pull`, and how close does it come to a plain copy by skopeo?
//!
//! Each sample starts from nothing: an empty store and a fresh coordinator, a dockerd that has just removed every
//! image, an empty directory. Only the command itself is timed.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use rand::seq::SliceRandom;
use serde_json::json;
use tests::cluster::{Coordinator, CoordinatorSpec};
use tests::docker::Docker;
use tests::images::{self, Compression, ImageBuilder, ImageFiles, Layer, Pools};
use tests::process::run as command;
use tests::registry::Registry;

use crate::process;
use crate::report::{Bar, Bound, Report};
use crate::samples::Samples;

/// The pull's time, as a ratio to that of `docker pull`.
const TARGET: Bound = Bound::AtMost(0.7);

#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// Fetches, unpacks, writes a tree of files.
    Docker,
    /// Fetches and checks digests, and unpacks nothing. This is the lower bound.
    Skopeo,
    /// Fetches, unpacks, checks digests and diffIDs, writes packs, reads them back.
    Store,
}

impl Way {
    const ALL: [Way; 3] = [Way::Docker, Way::Skopeo, Way::Store];

    fn name(self) -> &'static str {
        match self {
            Way::Docker => "docker pull",
            Way::Skopeo => "skopeo copy",
            Way::Store => "cachefs pull",
        }
    }
}

/// Wall and processor seconds of one way.
#[derive(Default)]
struct Cost {
    wall: Samples,
    cpu: Samples,
}

fn docker_pull(docker: &mut Docker, reference: &str) -> Result<(f64, f64)> {
    // Removes all images, so that no layer is left from another image.
    docker.ok(&["image", "prune", "--all", "--force"])?;
    let pid = docker.process().pid();
    let before = process::cpu_seconds(pid)?;
    let start = Instant::now();
    docker.ok(&["pull", "-q", reference])?;
    Ok((start.elapsed().as_secs_f64(), process::cpu_seconds(pid)? - before))
}

fn skopeo_copy(reference: &str) -> Result<(f64, f64)> {
    let dir = tempfile::tempdir()?;
    let mut skopeo = Command::new("skopeo");
    skopeo.args(["copy", "--quiet", "--insecure-policy", "--src-tls-verify=false"]);
    skopeo.arg(format!("docker://{reference}")).arg(format!("dir:{}", dir.path().join("image").display()));
    let before = process::cpu_of_ended_children()?;
    let start = Instant::now();
    command(&mut skopeo)?.ok()?;
    Ok((start.elapsed().as_secs_f64(), process::cpu_of_ended_children()? - before))
}

fn store_pull(reference: &str) -> Result<(f64, f64, f64)> {
    let dir = tempfile::tempdir()?;
    let (store, state) = (dir.path().join("store"), dir.path().join("state"));
    std::fs::create_dir(&store)?;
    let mut coordinator = Coordinator::start(CoordinatorSpec::new(&store, &state))?;
    let start = Instant::now();
    coordinator.ctl().ok(&["pull", reference])?;
    let wall = start.elapsed().as_secs_f64();
    let pid = coordinator.process().pid();
    Ok((wall, process::cpu_seconds(pid)?, process::memory(pid)?.peak))
}

/// The same image with its layers compressed by zstd.
fn with_zstd(image: &ImageFiles, directory: &std::path::Path) -> Result<ImageFiles> {
    let pools = Pools::open(directory)?;
    let mut builder = ImageBuilder::new(&format!("{}-zstd", image.name));
    for layer in &image.layers {
        let blob = pools.blobs.compress(&layer.tar, Compression::Zstd, Compression::Zstd.layer_type())?;
        builder = builder.layer(Layer { blob, ..layer.clone() });
    }
    builder.build(&pools, directory)
}

/// Measures one image by the given ways and adds it to the report.
fn measure(report: &mut Report, image: &ImageFiles, ways: &[Way], docker: &mut Docker, of: &Place) -> Result<()> {
    let name = &image.name;
    of.registry.push(image, name, "bench").with_context(|| format!("cannot push {name}"))?;
    let reference = of.registry.reference(name, "bench");
    let mut costs = Way::ALL.map(|_| Cost::default());
    let mut peak = 0.0_f64;
    for _ in 0..of.samples {
        let mut order = ways.to_vec();
        order.shuffle(&mut rand::rng());
        for way in order {
            let (wall, cpu) = match way {
                Way::Docker => docker_pull(docker, &reference)?,
                Way::Skopeo => skopeo_copy(&reference)?,
                Way::Store => {
                    let (wall, cpu, memory) = store_pull(&reference)?;
                    peak = peak.max(memory);
                    (wall, cpu)
                }
            };
            costs[way as usize].wall.add(wall);
            costs[way as usize].cpu.add(cpu);
        }
    }
    let megabytes = image.compressed_size() as f64 / 1e6;
    let docker_wall = costs[Way::Docker as usize].wall.median();
    for &way in ways {
        let Cost { wall, cpu } = &costs[way as usize];
        let ratio = wall.median() / docker_wall;
        report.row(vec![
            name.clone(),
            format!("{megabytes:.1}"),
            way.name().to_owned(),
            format!("{:.2} ({:.2})", wall.median(), wall.quantile(0.95)),
            format!("{:.0}", megabytes / wall.median()),
            format!("{:.2}", cpu.median()),
            if ratio.is_nan() { "-".to_owned() } else { format!("{ratio:.2}") },
            if way == Way::Store { format!("{peak:.0}") } else { "-".to_owned() },
        ]);
        let mut bar = Bar::new(format!("{name}, {megabytes:.0} MB compressed, s"), way.name(), wall.median());
        bar = bar.p95(wall.quantile(0.95));
        if way == Way::Store && ratio.is_finite() {
            report.target(format!("{name}: cachefs pull / docker pull, time"), ratio, TARGET);
            bar = bar.bound(Bound::AtMost(TARGET.limit() * docker_wall));
        }
        report.bar(bar);
    }
    let samples =
        Way::ALL.map(|way| (way.name().to_owned(), json!([costs[way as usize].wall, costs[way as usize].cpu])));
    report.add_samples(name, serde_json::Value::Object(samples.into_iter().collect()));
    Ok(())
}

/// The registry that images come from, and how often each image is measured.
struct Place {
    registry: Registry,
    samples: usize,
}

/// Measures every image. The first one is also measured with zstd layers, which Docker 20.10 cannot pull.
pub(crate) fn run(samples: usize, names: &[String]) -> Result<Report> {
    let place = Place { registry: Registry::start()?, samples };
    let mut docker = Docker::start()?;
    docker.forward(&place.registry.address())?;
    let columns =
        vec!["image", "compressed MB", "way", "s (p95)", "MB/s", "cpu s", "of docker pull", "coordinator peak MiB"];
    let mut report = Report::new("pull", columns);
    for name in names {
        measure(&mut report, &images::image(name)?, &Way::ALL, &mut docker, &place)?;
    }
    if let Some(first) = names.first() {
        let dir = tempfile::tempdir()?;
        let image = with_zstd(&images::image(first)?, dir.path())?;
        measure(&mut report, &image, &[Way::Skopeo, Way::Store], &mut docker, &place)?;
    }
    Ok(report)
}
