//! Each blob is fetched once from the registry, the most urgent one first. This also holds when a job is cancelled
//! whose layer another job needs, when a job fails and is retried, and when another coordinator takes over.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use tests::images::archive::{Archive, Header, Kind};
use tests::images::{Compression, ImageBuilder, ImageFiles, Pools, oddities};
use tests::process::{TIMEOUT, wait_until};
use tests::registry::{Fault, FaultyRegistry, Match, Registry};
use tests::site::{Site, SiteSpec};

/// How long a pull of small images may take on a loaded machine.
const LONG: Duration = Duration::from_secs(120);

/// A registry that can be made to fail, and a site.
struct Bench {
    registry: Registry,
    faulty: FaultyRegistry,
    site: Site,
    directory: tempfile::TempDir,
}

impl Bench {
    fn new() -> Result<Bench> {
        Bench::with(&SiteSpec::default())
    }

    fn with(spec: &SiteSpec) -> Result<Bench> {
        let registry = Registry::start()?;
        let faulty = FaultyRegistry::start(&registry.address())?;
        Ok(Bench { faulty, registry, site: Site::start_with(spec)?, directory: tempfile::tempdir()? })
    }

    /// Pushes an image with one layer of noise for each seed. Returns it with its reference through the faulty proxy.
    fn image(&self, name: &str, seeds: &[u64]) -> Result<(ImageFiles, String)> {
        let image = noisy(self.directory.path(), name, seeds)?;
        self.registry.push(&image, name, "1")?;
        Ok((image, self.faulty.reference(name, "1")))
    }

    fn blob(&self, image: &ImageFiles, layer: usize) -> Match {
        Match::Blob(image.layers[layer].blob.digest.clone())
    }

    fn fetches(&self, image: &ImageFiles, layer: usize) -> usize {
        self.registry.blob_fetches(&image.layers[layer].blob.digest)
    }
}

fn noisy(directory: &Path, name: &str, seeds: &[u64]) -> Result<ImageFiles> {
    let pools = Pools::open(directory)?;
    let mut builder = ImageBuilder::new(name);
    for seed in seeds {
        let mut tar = Archive::new(Vec::new());
        tar.add(&Header::new(Kind::File, format!("noise-{seed}")), oddities::noise(*seed, 400_000))?;
        builder = builder.layer(pools.layer(&tar.finish()?, Compression::Gzip)?);
    }
    builder.build(&pools, &directory.join(name)).context("cannot build an image")
}

#[test]
fn a_layer_of_a_cancelled_job_that_another_needs_is_not_fetched_again() {
    let bench = Bench::new().unwrap();
    let (first, first_name) = bench.image("first", &[1, 2]).unwrap();
    let (_, second_name) = bench.image("second", &[2, 3]).unwrap();
    let shared = bench.blob(&first, 1);
    bench.faulty.inject(shared.clone(), Fault::Slow(10_000, Duration::from_millis(500)), 99);
    bench.site.ctl().ok(&["pull", "--detach", &first_name]).unwrap();
    bench.faulty.wait_for(&shared, 1, TIMEOUT).unwrap();
    bench.site.ctl().ok(&["pull", "--detach", &second_name]).unwrap();
    // The second job has its own layer and waits for the shared one.
    wait_until("the second job's own layer", TIMEOUT, || Ok(bench.site.layers()?.len() >= 2)).unwrap();
    bench.site.wait_for_job(&second_name, &["fetching"], TIMEOUT).unwrap();
    let id = bench.site.job(&first_name).unwrap()["id"].to_string();
    bench.site.ctl().ok(&["cancel", &id]).unwrap();
    bench.site.wait_for_job(&first_name, &["cancelled"], TIMEOUT).unwrap();
    bench.faulty.heal();
    bench.site.wait_for_job(&second_name, &["published"], LONG).unwrap();
    assert_eq!(bench.fetches(&first, 1), 1, "the fetch outlived the job that had started it");
    bench.site.ctl().ok(&["retry", &id]).unwrap();
    bench.site.wait_for_job(&first_name, &["published"], LONG).unwrap();
    assert_eq!((bench.fetches(&first, 0), bench.fetches(&first, 1)), (1, 1));
}

/// A failing layer fails its job, but only when the layers that are already arriving are in the store.
#[test]
fn a_layer_that_fails_lets_those_that_are_arriving_end_and_a_retry_fetches_only_the_rest() {
    let bench = Bench::new().unwrap();
    let (image, name) = bench.image("image", &[1, 2]).unwrap();
    let (good, broken) = (bench.blob(&image, 0), bench.blob(&image, 1));
    bench.faulty.inject(good.clone(), Fault::Slow(10_000, Duration::from_millis(500)), 99);
    bench.faulty.inject(broken, Fault::CorruptAfter(1000, Box::new(good)), 99);
    bench.site.ctl().ok(&["pull", "--detach", &name]).unwrap();
    // The broken layer has failed. The good layer, a twentieth of which was delivered, is still arriving.
    let layer_state =
        |layer: usize| anyhow::Ok(bench.site.job(&name)?["layers"][layer]["state"].as_str().map(str::to_owned));
    wait_until("the failure", TIMEOUT, || Ok(layer_state(1)?.as_deref() == Some("failed"))).unwrap();
    assert_eq!(bench.site.job(&name).unwrap()["state"], "fetching", "the job waits for the good layer");
    assert!(!bench.site.has_layer(&image.layers[0].diff_id).unwrap());
    bench.faulty.heal();
    let failed = bench.site.wait_for_job(&name, &["failed", "published"], LONG).unwrap();
    assert_eq!(failed["state"], "failed");
    assert!(failed["reason"].as_str().unwrap().contains(&image.layers[1].blob.digest), "{failed}");
    assert!(bench.site.has_layer(&image.layers[0].diff_id).unwrap(), "what had arrived is kept");
    assert!(!bench.site.has_layer(&image.layers[1].diff_id).unwrap());
    let id = failed["id"].to_string();
    let before = bench.fetches(&image, 1);
    bench.site.ctl().ok(&["retry", &id]).unwrap();
    bench.site.wait_for_job(&name, &["published"], LONG).unwrap();
    assert_eq!((bench.fetches(&image, 0), bench.fetches(&image, 1)), (1, before + 1));
}

/// Layers that still wait for a slot when another layer of the job fails are not started.
#[test]
fn a_layer_that_fails_keeps_those_that_wait_from_being_begun() {
    let bench = Bench::with(&SiteSpec { settings: "parallel_layers = 1\n".to_owned(), ..SiteSpec::default() }).unwrap();
    let (image, name) = bench.image("image", &[1, 2, 3]).unwrap();
    for layer in 0..3 {
        bench.faulty.inject(bench.blob(&image, layer), Fault::Corrupt(1000), 99);
    }
    let failed = bench.site.ctl().run(&["pull", &name]).unwrap();
    assert_eq!(failed.code, 1, "{}", failed.stderr);
    let fetches: usize = (0..3).map(|layer| bench.fetches(&image, layer)).sum();
    assert_eq!(fetches, 1, "one failed, and that was the end");
}

#[test]
fn layers_of_the_job_that_somebody_waits_for_are_fetched_first() {
    let bench = Bench::with(&SiteSpec { settings: "parallel_layers = 1\n".to_owned(), ..SiteSpec::default() }).unwrap();
    let (obstacle, obstacle_name) = bench.image("obstacle", &[1]).unwrap();
    let (large, large_name) = bench.image("large", &[2, 3, 4, 5]).unwrap();
    let (shared, shared_name) = bench.image("shared", &[5]).unwrap();
    let (urgent, urgent_name) = bench.image("urgent", &[6]).unwrap();
    let hanging = bench.blob(&obstacle, 0);
    bench.faulty.inject(hanging.clone(), Fault::Hang(0), 1);
    bench.site.ctl().ok(&["pull", "--detach", &obstacle_name]).unwrap();
    bench.faulty.wait_for(&hanging, 1, TIMEOUT).unwrap();
    // All of these wait for the one slot. Then one job becomes urgent, because somebody waits for it.
    for (name, priority) in [(&large_name, "0"), (&shared_name, "5"), (&urgent_name, "0")] {
        bench.site.ctl().ok(&["pull", "--detach", "--priority", priority, name]).unwrap();
        bench.site.wait_for_job(name, &["fetching"], TIMEOUT).unwrap();
    }
    bench.site.ctl().ok(&["pull", "--detach", "--priority", "9", &urgent_name]).unwrap();
    let id = bench.site.job(&obstacle_name).unwrap()["id"].to_string();
    bench.site.ctl().ok(&["cancel", &id]).unwrap();
    bench.site.wait_for_job(&large_name, &["published"], LONG).unwrap();
    let blobs: Vec<String> = bench.faulty.requests().into_iter().map(|request| request.path).collect();
    let position = |image: &ImageFiles| {
        let digest = &image.layers[0].blob.digest;
        blobs.iter().position(|path| path.ends_with(digest.as_str())).expect("its layer was fetched")
    };
    let layers: Vec<&str> = large.layers.iter().chain(&urgent.layers).map(|layer| layer.blob.digest.as_str()).collect();
    let layers_before = |position: usize| {
        blobs[..position].iter().filter(|path| layers.iter().any(|digest| path.ends_with(digest))).count()
    };
    assert_eq!(layers_before(position(&urgent)), 0, "{blobs:?}");
    assert_eq!(layers_before(position(&shared)), 1, "the large image's layer that the other job wants: {blobs:?}");
    // The bytes of a layer that two jobs wanted count for one of them.
    let jobs = [&large_name, &shared_name, &urgent_name].map(|name| bench.site.job(name).unwrap());
    let fetched: u64 = jobs.iter().map(|job| job["bytes_fetched"].as_u64().unwrap()).sum();
    let whole: u64 = large.layers.iter().chain(&urgent.layers).map(|layer| layer.blob.size).sum();
    assert_eq!(fetched, whole, "{jobs:?}");
}

#[test]
fn a_coordinator_that_takes_over_fetches_only_what_is_not_in_the_store() {
    let mut bench = Bench::new().unwrap();
    let (image, name) = bench.image("image", &[1, 2]).unwrap();
    let hanging = bench.blob(&image, 1);
    bench.faulty.inject(hanging.clone(), Fault::Hang(100_000), 1);
    let second = bench.site.second().unwrap();
    bench.site.ctl().ok(&["pull", "--detach", &name]).unwrap();
    bench.faulty.wait_for(&hanging, 1, TIMEOUT).unwrap();
    wait_until("the first layer", TIMEOUT, || bench.site.has_layer(&image.layers[0].diff_id)).unwrap();
    bench.site.coordinator().kill9().unwrap();
    assert_eq!(second.ctl().json(&["images"]).unwrap()["images"], Value::Array(Vec::new()), "nothing half done");
    bench.faulty.heal();
    let leads = || Ok(second.ctl().json(&["status"])?["role"] == "leader");
    wait_until("the other coordinator to lead", TIMEOUT, leads).unwrap();
    // It resumes the job by itself, and this pull of the same image joins the job.
    second.ctl().ok(&["pull", &name]).unwrap();
    assert_eq!(bench.fetches(&image, 0), 1, "what the first one had published");
    let check = second.ctl().run(&["fsck", "--deep"]).unwrap();
    assert_eq!(check.code, 0, "{}{}", check.stdout, check.stderr);
    // The first coordinator comes back as a standby, learns that its job is done, and fetches nothing.
    bench.site.coordinator().restart().unwrap();
    assert_eq!(bench.site.ctl().json(&["status"]).unwrap()["role"], "standby");
    assert_eq!(bench.fetches(&image, 0), 1);
    assert!(bench.fetches(&image, 1) <= 2, "the one that hung, and the one that did not");
}
