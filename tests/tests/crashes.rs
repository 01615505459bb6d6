//! The coordinator is killed for real at every crash point, starts again, and nothing is lost, half done or fetched twice.
//!
//! Each point is armed for its first, second, ... passing until a run ends without coming by once more; a point that no
//! run reaches is an error. After every death the store passes a deep check, the job completes, and no blob is
//! fetched again whose layer was published.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use store::crash::CrashPoint;
use tests::images::archive::{Archive, Header, Kind};
use tests::images::{Compression, ImageBuilder, ImageFiles, Pools, hex, oddities, small};
use tests::process::{PATIENCE, Process, wait_until};
use tests::registry::Registry;
use tests::site::{Site, SiteSpec};

/// No point is armed for a later passing than this.
const PASSES: u32 = 5;
/// How long one run may take on a loaded machine.
const LONG: Duration = Duration::from_secs(120);

/// What the coordinator is doing when it dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    /// It starts, and pulls an image.
    Pull,
    /// It repairs a damaged pack.
    Repair,
    /// It removes what nothing needs, and thins a pack that two layers share.
    Collect,
}

impl Work {
    /// The work that comes by a point.
    fn of(point: CrashPoint) -> Work {
        match point.name().split('.').next() {
            Some("repair") => Work::Repair,
            Some("collect") => Work::Collect,
            _ => Work::Pull,
        }
    }
}

/// Starts the site's coordinator such that it will die at `point`, and waits until it answers or is dead.
fn doom(site: &mut Site, point: CrashPoint, nth: u32) -> Result<Process> {
    site.coordinator().stop()?;
    let spec = site.coordinator().spec().clone();
    let mut command = spec.command()?;
    command.env("CACHEFS_CRASH_AT", format!("{}:{nth}", point.name()));
    let mut process = Process::spawn("doomed coordinator", &mut command, &spec.state.with_extension("doomed.log"))?;
    wait_until("the doomed coordinator's start", PATIENCE, || {
        Ok(process.exited()?.is_some() || UnixStream::connect(spec.socket()).is_ok())
    })?;
    Ok(process)
}

/// Does the work until the coordinator dies; tells whether it did.
fn work_until_death(site: &Site, doomed: &mut Process, arguments: &[&str]) -> Result<bool> {
    let mut client = site.begin("client", arguments)?;
    wait_until("the end of either", LONG, || Ok(doomed.exited()?.is_some() || client.exited()?.is_some()))?;
    if doomed.exited()?.is_none() {
        match client.wait(LONG)?.success() {
            // What it does after the answer is over when it has stopped in good order.
            true => drop(doomed.terminate(PATIENCE)?),
            // The client may be told of the death before this test sees it.
            false => drop(doomed.wait(PATIENCE).with_context(|| client.log())?),
        }
    }
    let status = doomed.wait(PATIENCE)?;
    match status.signal() {
        Some(9) => Ok(true),
        _ if status.success() => Ok(false),
        _ => bail!("the doomed coordinator ended with {status}: {}", doomed.log()),
    }
}

/// How often each layer's blob was fetched.
fn fetches(registry: &Registry, image: &ImageFiles) -> BTreeMap<String, usize> {
    let count = |layer: &tests::images::Layer| (layer.diff_id.clone(), registry.blob_fetches(&layer.blob.digest));
    image.layers.iter().map(count).collect()
}

fn deep_check(site: &Site) -> Result<()> {
    let check = site.ctl().run(&["--json", "fsck", "--deep"])?;
    ensure!(check.succeeded(), "the store is not whole: {}{}", check.stdout, check.stderr);
    Ok(())
}

/// One death while pulling, and what comes after; tells whether the point was reached.
fn die_pulling(registry: &Registry, point: CrashPoint, nth: u32) -> Result<bool> {
    let (image, mut site) = (small()?, Site::start()?);
    let reference = registry.push(&image, "small", "1")?;
    let before = fetches(registry, &image);
    let mut doomed = doom(&mut site, point, nth)?;
    let died = work_until_death(&site, &mut doomed, &["pull", &reference])?;
    let safe = site.layers()?;
    site.coordinator().restart()?;
    deep_check(&site).context("after the crash")?;
    let jobs = site.ctl().json(&["jobs"])?;
    match jobs["jobs"].as_array().is_some_and(|jobs| !jobs.is_empty()) {
        true => site.ctl().ok(&["wait", &reference, "--timeout", "60s"])?,
        false => site.ctl().ok(&["pull", &reference])?,
    };
    site.wait_for_job(&reference, &["published"], LONG)?;
    deep_check(&site).context("after the pull")?;
    ensure!(site.staged()?.is_empty(), "staging holds {:?}", site.staged()?);
    let detail = site.ctl().json(&["image", &reference])?;
    ensure!(detail["config"] == image.config.digest, "{reference} is {detail}");
    for (diff_id, count) in fetches(registry, &image) {
        let count = count - before[&diff_id];
        let was_safe = safe.iter().any(|layer| layer == hex(&diff_id));
        ensure!(count == 1 || (!was_safe && count <= 2), "layer {diff_id} was fetched {count} times, safe: {was_safe}");
    }
    Ok(died)
}

/// One death while repairing a damaged pack.
fn die_repairing(registry: &Registry, point: CrashPoint, nth: u32) -> Result<bool> {
    let (image, mut site) = (small()?, Site::start()?);
    let reference = registry.push(&image, "small", "1")?;
    site.ctl().ok(&["pull", &reference])?;
    let pack = site.files("packs")?.into_iter().next().context("the store has no pack")?;
    let mut bytes = std::fs::read(&pack)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&pack, bytes)?;
    let mut doomed = doom(&mut site, point, nth)?;
    let died = work_until_death(&site, &mut doomed, &["fsck", "--deep", "--repair"])?;
    site.coordinator().restart()?;
    site.ctl().ok(&["fsck", "--deep", "--repair"]).context("the repair, once more")?;
    deep_check(&site)?;
    Ok(died)
}

/// An image of one layer with files of noise, by their seeds.
fn noisy(pools: &Pools, directory: &Path, name: &str, seeds: std::ops::Range<u64>) -> Result<ImageFiles> {
    let mut tar = Archive::new(Vec::new());
    for seed in seeds {
        tar.add(&Header::new(Kind::File, format!("{name}-{seed}")), oddities::noise(seed, 300_000))?;
    }
    let layer = pools.layer(&tar.finish()?, Compression::Gzip)?;
    ImageBuilder::new(name).layer(layer).build(pools, &directory.join(name))
}

/// One death while collecting what a removed image leaves: its layer goes, and most of a pack that another image shares.
fn die_collecting(registry: &Registry, point: CrashPoint, nth: u32) -> Result<bool> {
    let directory = tempfile::tempdir()?;
    let pools = Pools::open(directory.path())?;
    let settings = "host_lease = '1s'\n".to_owned();
    let mut site = Site::start_with(&SiteSpec { settings, ..SiteSpec::default() })?;
    let gone = registry.push(&noisy(&pools, directory.path(), "gone", 1..9)?, "gone", "1")?;
    let kept = registry.push(&noisy(&pools, directory.path(), "kept", 8..11)?, "kept", "1")?;
    site.ctl().ok(&["pull", &gone])?;
    site.ctl().ok(&["pull", &kept])?;
    site.ctl().ok(&["remove", &gone])?;
    let hosts_known = |site: &Site| {
        let known = || Ok(site.ctl().json(&["gc", "--dry-run"])?["waiting"].is_null());
        wait_until("all hosts to be known", PATIENCE, known)
    };
    let mut doomed = doom(&mut site, point, nth)?;
    hosts_known(&site)?;
    let died = work_until_death(&site, &mut doomed, &["gc", "--grace", "0s"])?;
    site.coordinator().restart()?;
    deep_check(&site).context("after the crash")?;
    hosts_known(&site)?;
    site.ctl().ok(&["gc", "--grace", "0s"]).context("the collection, once more")?;
    deep_check(&site).context("after the collection")?;
    let rest = site.ctl().json(&["gc", "--dry-run", "--grace", "0s"])?;
    ensure!(rest["items"].as_array().is_some_and(Vec::is_empty), "there is something left to collect: {rest}");
    let room = rest["store_bytes"].as_u64().unwrap_or(u64::MAX);
    ensure!(room < 1_300_000, "{room} bytes are left of an image of 900,000");
    // What went comes back whole, and shares what is still there.
    site.ctl().ok(&["pull", &gone])?;
    deep_check(&site).context("after pulling it again")?;
    Ok(died)
}

/// Goes through one part of all points.
fn go_through(part: usize, parts: usize) -> Result<()> {
    let registry = Registry::start()?;
    let mut failures = Vec::new();
    for point in CrashPoint::ALL.iter().skip(part).step_by(parts) {
        let mut deaths = 0;
        for nth in 1..=PASSES {
            let result = match Work::of(*point) {
                Work::Pull => die_pulling(&registry, *point, nth),
                Work::Repair => die_repairing(&registry, *point, nth),
                Work::Collect => die_collecting(&registry, *point, nth),
            };
            match result {
                Ok(true) => deaths += 1,
                Ok(false) => break,
                Err(error) => failures.push(format!("{}:{nth}: {error:#}", point.name())),
            }
        }
        println!("{}: died {deaths} times", point.name());
        if deaths == 0 {
            failures.push(format!("{}: no run comes by", point.name()));
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

#[test]
fn a_death_at_any_point_loses_nothing_first_third() {
    go_through(0, 3).unwrap();
}

#[test]
fn a_death_at_any_point_loses_nothing_second_third() {
    go_through(1, 3).unwrap();
}

#[test]
fn a_death_at_any_point_loses_nothing_last_third() {
    go_through(2, 3).unwrap();
}

#[test]
fn a_place_to_die_that_does_not_exist_is_refused() {
    let mut site = Site::start().unwrap();
    site.coordinator().stop().unwrap();
    let mut command = site.coordinator().spec().command().unwrap();
    command.env("CACHEFS_CRASH_AT", "nowhere");
    let end = tests::site::run_to_end("coordinator", &mut command, PATIENCE).unwrap();
    assert_eq!(end.code, 1);
    assert!(end.stderr.contains("nowhere"), "{}", end.stderr);
}
