//! What does it cost when many hosts start one image at the same moment?
//!
//! One coordinator pulls the image from a real registry, once. Then N daemons start the image's application at the same
//! time. Each has its own mount point, its own empty cache and its own client of one slow disk, so hosts share no page
//! cache. They know no coordinator, so no start teaches the next one: each storm is the image's first. All of them
//! share this machine's processors, which real hosts would not.

use std::path::Path;
use std::sync::Barrier;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use tempfile::TempDir;
use tests::cluster::{Mount, MountSpec};
use tests::images::{self, ImageFiles};
use tests::registry::Registry;
use tests::site::Site;
use tests::slowdisk::SlowDisk;

use crate::application::{self, Application};
use crate::report::{Bar, Bound, Report};
use crate::samples::Samples;
use crate::{process, quantity, start};

/// What is measured.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How many hosts start at once
    #[arg(long, value_delimiter = ',', default_value = "1,4,16,64")]
    hosts: Vec<usize>,
    /// How often each number of hosts is measured
    #[arg(long, default_value_t = 2)]
    samples: usize,
    /// The image: bash, python3, nginx, redis, gcc or nodejs
    #[arg(long, default_value = "python3")]
    image: String,
    /// The slow disk's latency
    #[arg(long, default_value = "1ms", value_parser = quantity::duration)]
    latency: Duration,
    /// The slow disk's bandwidth, bytes a second of all hosts together
    #[arg(long, default_value = "100M", value_parser = quantity::rate)]
    bandwidth: u64,
    /// Additional arguments of `cachefs mount`, separated by spaces
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    mount_arguments: String,
}

/// What all hosts of a storm have in common.
struct Storm<'a> {
    disk: &'a SlowDisk,
    application: &'static Application,
    top: String,
    arguments: Vec<String>,
}

/// What one storm cost.
#[derive(Default)]
struct Cost {
    /// Of each host's start.
    seconds: Samples,
    /// Of each daemon after its start, MiB.
    resident: Samples,
    disk_bytes: Samples,
    disk_requests: Samples,
}

/// Bytes and requests that it takes to fetch an image from a registry when nothing is requested twice.
fn once(image: &ImageFiles) -> (u64, u64) {
    let mut blobs: Vec<_> = image.layers.iter().map(|layer| (layer.blob.digest.clone(), layer.blob.size)).collect();
    blobs.push((image.config.digest.clone(), image.config.size));
    blobs.sort();
    blobs.dedup();
    (blobs.iter().map(|(_, size)| size).sum::<u64>() + image.manifest.size, blobs.len() as u64 + 1)
}

/// Bytes of manifests and blobs that the registry sent, and the number of these answers.
fn sent(registry: &Registry) -> (u64, u64) {
    let accesses = registry.accesses();
    let sent = accesses.iter().filter(|access| access.method == "GET" && matches!(access.status, 200 | 206));
    let sent: Vec<_> =
        sent.filter(|access| access.path.contains("/blobs/") || access.path.contains("/manifests/")).collect();
    (sent.iter().map(|access| access.bytes).sum(), sent.len() as u64)
}

impl Storm<'_> {
    /// Host number `number`, whose directories lie below `directory`.
    fn host(&self, number: usize, directory: &Path) -> Result<Mount> {
        let share = self.disk.path().join(number.to_string());
        let mut spec = MountSpec::new(&directory.join(number.to_string()), &share);
        spec.arguments.clone_from(&self.arguments);
        Mount::start(spec)
    }

    fn run(&self, hosts: usize, cost: &mut Cost) -> Result<()> {
        let directory: TempDir = tempfile::Builder::new().prefix("storm-").tempdir()?;
        let mut mounts = Vec::new();
        for number in 0..hosts {
            std::fs::create_dir(directory.path().join(number.to_string()))?;
            mounts.push(self.host(number, directory.path())?);
        }
        start::make_cold()?;
        self.disk.reset()?;
        let barrier = Barrier::new(hosts);
        let results: Vec<Result<f64>> = std::thread::scope(|scope| {
            let start = |mount: &Mount| {
                let lower = mount.tree(&self.top);
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    start::seconds(&[lower], self.application)
                })
            };
            let threads: Vec<_> = mounts.iter().map(start).collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, Result<f64>>| match thread.join() {
                Ok(result) => result,
                Err(_) => bail!("a start panicked"),
            };
            threads.into_iter().map(join).collect()
        });
        for seconds in results {
            cost.seconds.add(seconds?);
        }
        let disk = self.disk.stats()?;
        cost.disk_bytes.add(disk.bytes_read as f64 / hosts as f64);
        cost.disk_requests.add(disk.requests as f64 / hosts as f64);
        for mount in &mut mounts {
            cost.resident.add(process::memory_of_mount(mount)?.resident);
        }
        Ok(())
    }
}

/// Measures every number of hosts.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let application = application::of(&options.image)?;
    let image = images::image(&options.image)?;
    let most = options.hosts.iter().copied().max().context("no number of hosts is given")?;
    ensure!(!options.hosts.contains(&0), "a storm needs at least one host");
    let registry = Registry::start()?;
    let reference = registry.push(&image, &options.image, "storm")?;
    let site = Site::start()?;
    site.ctl().ok(&["pull", &reference])?;
    let share = site.path().join("share");
    let disk = SlowDisk::start_copies(&site.store(), &share, options.latency, Some(options.bandwidth), most)?;
    let top = image.chain_ids().pop().context("an image without layers")?;
    let arguments = options.mount_arguments.split_whitespace().map(str::to_owned).collect();
    let storm = Storm { disk: &disk, application, top, arguments };
    let columns = vec![
        "hosts at once",
        "ready p50 s",
        "ready p99 s",
        "registry MB (requests)",
        "shared disk MB / host",
        "requests / host",
        "daemon MiB resident p50",
        "daemon MiB resident, most",
    ];
    let mut report = Report::new("boot-storm", columns);
    for hosts in &options.hosts {
        let mut cost = Cost::default();
        for _ in 0..options.samples {
            storm.run(*hosts, &mut cost)?;
            eprintln!("{hosts} hosts: p50 {:.3} s", cost.seconds.median());
        }
        tell(&mut report, *hosts, &cost, sent(&registry));
    }
    let ((bytes, requests), (least, fewest)) = (sent(&registry), once(&image));
    report.add_samples("registry", json!({ "bytes": bytes, "requests": requests, "image": least, "parts": fewest }));
    let all: usize = options.hosts.iter().map(|hosts| hosts * options.samples).sum();
    report.target(
        format!("bytes from the registry for {all} hosts / image once"),
        bytes as f64 / least as f64,
        Bound::AtMost(1.0),
    );
    let measure = format!("requests for manifests and blobs for {all} hosts / parts of the image");
    report.target(measure, requests as f64 / fewest as f64, Bound::AtMost(1.0));
    Ok(report)
}

fn tell(report: &mut Report, hosts: usize, cost: &Cost, (bytes, requests): (u64, u64)) {
    report.row(vec![
        hosts.to_string(),
        format!("{:.3}", cost.seconds.median()),
        format!("{:.3}", cost.seconds.quantile(0.99)),
        format!("{:.2} ({requests})", bytes as f64 / 1e6),
        format!("{:.2}", cost.disk_bytes.median() / 1e6),
        format!("{:.0}", cost.disk_requests.median()),
        format!("{:.1}", cost.resident.median()),
        format!("{:.1}", cost.resident.quantile(1.0)),
    ]);
    report.bar(
        Bar::new("time to ready, s", format!("{hosts} hosts"), cost.seconds.median()).p95(cost.seconds.quantile(0.95)),
    );
    report.add_samples(
        &format!("{hosts} hosts"),
        json!({
            "seconds": cost.seconds,
            "resident_mib": cost.resident,
            "disk_bytes_per_host": cost.disk_bytes,
            "disk_requests_per_host": cost.disk_requests,
        }),
    );
}
