//! Is pulling into the store as fast as `docker pull` from the same registry?
//!
//! Each sample starts from nothing: an empty store and a fresh coordinator, or a dockerd that has just removed the
//! image. Only the command itself is timed.

use std::time::Instant;

use anyhow::{Context, Result};
use rand::seq::SliceRandom;
use serde_json::json;
use tests::cluster::{Coordinator, CoordinatorSpec};
use tests::docker::Docker;
use tests::images;
use tests::registry::Registry;

use crate::process;
use crate::report::Report;
use crate::samples::Samples;

#[derive(Clone, Copy)]
enum Way {
    Docker,
    Store,
}

/// Wall and processor seconds of one way.
#[derive(Default)]
struct Cost {
    wall: Samples,
    cpu: Samples,
}

impl Cost {
    fn add(&mut self, (wall, cpu): (f64, f64)) {
        self.wall.add(wall);
        self.cpu.add(cpu);
    }
}

fn docker_pull(docker: &mut Docker, reference: &str) -> Result<(f64, f64)> {
    // Everything goes, so that no layer is there already from another image.
    docker.ok(&["image", "prune", "--all", "--force"])?;
    let pid = docker.process().pid();
    let before = process::cpu_seconds(pid)?;
    let start = Instant::now();
    docker.ok(&["pull", "-q", reference])?;
    Ok((start.elapsed().as_secs_f64(), process::cpu_seconds(pid)? - before))
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

/// Measures every image.
pub(crate) fn run(samples: usize, names: &[String]) -> Result<Report> {
    let registry = Registry::start()?;
    let mut docker = Docker::start()?;
    docker.forward(&registry.address())?;
    let columns = vec![
        "image",
        "compressed MB",
        "docker pull s (p95)",
        "cachefs pull s (p95)",
        "ratio",
        "docker cpu s",
        "cachefs cpu s",
        "coordinator peak MiB",
    ];
    let mut report = Report::new("pull", columns);
    for name in names {
        let image = images::image(name)?;
        registry.push(&image, name, "bench").with_context(|| format!("cannot push {name}"))?;
        let reference = registry.reference(name, "bench");
        let (mut theirs, mut ours, mut peak) = (Cost::default(), Cost::default(), 0.0_f64);
        for _ in 0..samples {
            let mut order = [Way::Docker, Way::Store];
            order.shuffle(&mut rand::rng());
            for way in order {
                match way {
                    Way::Docker => theirs.add(docker_pull(&mut docker, &reference)?),
                    Way::Store => {
                        let (wall, cpu, memory) = store_pull(&reference)?;
                        ours.add((wall, cpu));
                        peak = peak.max(memory);
                    }
                }
            }
        }
        report.add_samples(name, json!({ "docker": [theirs.wall, theirs.cpu], "cachefs": [ours.wall, ours.cpu] }));
        let both = |s: &Samples| format!("{:.2} ({:.2})", s.median(), s.quantile(0.95));
        report.row(vec![
            name.clone(),
            format!("{:.1}", image.compressed_size() as f64 / 1e6),
            both(&theirs.wall),
            both(&ours.wall),
            format!("{:.2}", ours.wall.median() / theirs.wall.median()),
            format!("{:.2}", theirs.cpu.median()),
            format!("{:.2}", ours.cpu.median()),
            format!("{peak:.0}"),
        ]);
    }
    Ok(report)
}
