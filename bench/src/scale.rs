//! Does the coordinator's cost grow no faster than the number of images, layers, schedules and hosts?
//!
//! The store's own publisher writes a store of many images into memory (tmpfs, because the coordinator is measured and
//! not a disk). This is done twice, the second time with a larger store. For each store the benchmark measures: how
//! long a coordinator takes from its start to its first answer, after kill -9 and with the schedules and hosts that it
//! knew; its memory; how long requests take while every host renews its lease; and how long collections and checks of
//! the store take, which look at every layer, and how much memory they need.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use coordinator_api::fsck::{FsckRequest, FsckState};
use coordinator_api::host::LeaseRequest;
use coordinator_api::retention::CollectRequest;
use coordinator_api::schedule::ScheduleSpec;
use coordinator_api::{Address, Client, Credentials};
use serde_json::json;
use tests::cluster::{Coordinator, CoordinatorSpec};

use crate::process;
use crate::report::{Bar, Bound, Report};
use crate::samples::Samples;

mod fleet;

/// Requests in progress at once, in addition to the renewals.
const CLIENTS: usize = 4;
/// Names removed one after the other. Meanwhile two snapshots of the catalogue are written.
const REMOVALS: usize = 130;
/// Images whose layers hosts hold.
const RUNNING: usize = 100;
/// Layers that each host holds.
const HELD: usize = 100;

/// What is measured.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How many images; each has 20 layers of its own
    #[arg(long, value_delimiter = ',', default_value = "1000,10000")]
    images: Vec<usize>,
    /// How many hosts renew their leases
    #[arg(long, default_value_t = 1000)]
    hosts: usize,
    /// How many schedules there are
    #[arg(long, default_value_t = 1000)]
    schedules: usize,
    /// How often each request is sent
    #[arg(long, default_value_t = 200)]
    requests: usize,
    /// How often the coordinator is killed and started again
    #[arg(long, default_value_t = 5)]
    restarts: usize,
    /// Where the stores are written; memory is best
    #[arg(long, default_value = "/dev/shm")]
    directory: PathBuf,
}

/// The results for one size of store.
struct Size {
    images: usize,
    restart: Samples,
    memory: process::Memory,
    /// The requests by name, in seconds.
    requests: Vec<(&'static str, Samples)>,
    /// Seconds of a collection's plan, of a collection, and of a fast check. (The layers have no tar recipes, so a deep
    /// check would find them wrong.)
    plan: f64,
    collection: f64,
    check: f64,
    /// The peak memory of the coordinator during these; each of them looks at all layers.
    memory_of_work: process::Memory,
}

/// Runs `count` requests, [`CLIENTS`] at a time, and returns how long each took.
async fn time<F, T>(count: usize, request: impl Fn(usize) -> F + Send + Sync + 'static) -> Result<Samples>
where
    F: Future<Output = Result<T, coordinator_api::ClientError>> + Send,
    T: Send + 'static,
{
    let request = Arc::new(request);
    let mut tasks = tokio::task::JoinSet::new();
    for client in 0..CLIENTS {
        let request = Arc::clone(&request);
        tasks.spawn(async move {
            let mut took = Vec::new();
            for number in (client..count).step_by(CLIENTS) {
                let begin = Instant::now();
                request(number).await?;
                took.push(begin.elapsed().as_secs_f64());
            }
            Ok::<_, coordinator_api::ClientError>(took)
        });
    }
    let mut samples = Samples::default();
    while let Some(took) = tasks.join_next().await {
        took??.into_iter().for_each(|seconds| samples.add(seconds));
    }
    Ok(samples)
}

/// The lease request of host number `number`.
fn lease(number: usize, layers: &[String]) -> LeaseRequest {
    let of_host = layers.iter().cycle().skip(number * 7 % layers.len().max(1)).take(HELD.min(layers.len()));
    LeaseRequest {
        id: format!("bench-host-{number}"),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        mountpoint: "/run/cachefs/mnt".to_owned(),
        images: vec![fleet::name(number)],
        layers: of_host.cloned().collect(),
        cache_used: 10 << 30,
        cache_limit: 50 << 30,
        reads_hit: 1_000_000,
        reads_missed: 1_000,
        uptime_seconds: 3600,
    }
}

fn schedule(number: usize) -> ScheduleSpec {
    ScheduleSpec {
        name: format!("nightly-{number}"),
        images: vec![fleet::name(number)],
        cron: Some(format!("{} {} * * *", number % 60, number / 60 % 24)),
        time_zone: Some("Europe/Berlin".to_owned()),
        ..ScheduleSpec::default()
    }
}

/// The layers of the images that run on a host.
async fn running_layers(client: &Client, images: usize) -> Result<Vec<String>> {
    let mut layers = Vec::new();
    for number in 0..images.min(RUNNING) {
        let detail = client.image(&fleet::name(number)).await?;
        layers.extend(detail.layers_detail.into_iter().map(|layer| layer.diff_id));
    }
    Ok(layers)
}

/// Times every kind of request while all hosts renew their leases.
async fn ask(options: &Options, client: &Client, images: usize) -> Result<Vec<(&'static str, Samples)>> {
    let layers = running_layers(client, images).await?;
    let with = || client.clone();
    let count = options.requests;
    let (renewing, hosts) = (with(), options.hosts);
    let renewals = time(hosts * 3, move |number| {
        let (client, lease) = (renewing.clone(), lease(number % hosts, &layers));
        async move { client.renew_lease(&format!("host-{}", number % hosts), &lease).await }
    });
    let client_of = with();
    let status = time(count, move |_| {
        let client = client_of.clone();
        async move { client.status().await }
    });
    let client_of = with();
    let image = time(count, move |number| {
        let (client, name) = (client_of.clone(), fleet::name(number * 37 % images));
        async move { client.image(&name).await }
    });
    let client_of = with();
    let hosts = time(count / 10 + 1, move |_| {
        let client = client_of.clone();
        async move { client.hosts().await }
    });
    let client_of = with();
    let list = time(count / 10 + 1, move |_| {
        let client = client_of.clone();
        async move { client.images().await }
    });
    let client_of = with();
    let schedules = time(count / 10 + 1, move |_| {
        let client = client_of.clone();
        async move { client.schedules().await }
    });
    let others = async {
        let status = status.await?;
        let image = image.await?;
        let (hosts, list, schedules) = (hosts.await?, list.await?, schedules.await?);
        Ok::<_, anyhow::Error>((status, image, hosts, list, schedules))
    };
    let (renewals, others) = tokio::join!(renewals, others);
    let (status, image, hosts, list, schedules) = others?;
    let client_of = with();
    let remove = time(REMOVALS.min(images / 2), move |number| {
        let (client, name) = (client_of.clone(), fleet::name(number));
        async move { client.remove(&name, coordinator_api::client::Forced::No).await }
    });
    Ok(vec![
        ("lease renewal", renewals?),
        ("status", status),
        ("one image", image),
        ("all hosts", hosts),
        ("all images", list),
        ("all schedules", schedules),
        ("remove a name", remove.await?),
    ])
}

/// Plans a collection, and then collects what the removals left. Returns the seconds of both.
async fn collect(client: &Client) -> Result<(f64, f64)> {
    let begin = Instant::now();
    client.collection_plan(Some(Duration::ZERO)).await?;
    let plan = begin.elapsed().as_secs_f64();
    let begin = Instant::now();
    client.begin_collection(&CollectRequest { grace_seconds: Some(0) }).await?;
    while client.collection().await?.running.is_some() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok((plan, begin.elapsed().as_secs_f64()))
}

/// Runs a fast check of the store and returns how many seconds it took.
async fn check(client: &Client) -> Result<f64> {
    let begin = Instant::now();
    client.start_fsck(&FsckRequest::default()).await?;
    loop {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let check = client.fsck().await?;
        match check.state {
            FsckState::Running => {}
            FsckState::Finished if check.findings.is_empty() => return Ok(begin.elapsed().as_secs_f64()),
            state => anyhow::bail!("the check of a good store ended {state:?} with {:?}", check.findings),
        }
    }
}

fn measure(options: &Options, images: usize) -> Result<Size> {
    let directory = tempfile::Builder::new().prefix("scale-").tempdir_in(&options.directory)?;
    let store = directory.path().join("store");
    let begin = Instant::now();
    fleet::build(&store, images)?;
    eprintln!("{images} images with {} layers in {:.0} s", images * fleet::LAYERS, begin.elapsed().as_secs_f64());
    let settings = directory.path().join("settings.toml");
    std::fs::write(&settings, "host_lease = '2s'\n")?;
    let mut spec = CoordinatorSpec::new(&store, &directory.path().join("state"));
    spec.arguments = vec!["--config".to_owned(), settings.display().to_string()];
    let mut coordinator = Coordinator::start(spec)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let client = Client::new(coordinator.url().parse::<Address>()?, &Credentials::default())?;
    runtime.block_on(async {
        for number in 0..options.schedules {
            client.add_schedule(&schedule(number)).await?;
        }
        Ok::<_, anyhow::Error>(())
    })?;
    let requests = runtime.block_on(ask(options, &client, images))?;
    let memory = process::memory(coordinator.process().pid())?;
    let mut restart = Samples::default();
    for _ in 0..options.restarts {
        coordinator.kill9()?;
        let begin = Instant::now();
        coordinator.restart()?;
        runtime.block_on(client.status()).context("it does not answer after a restart")?;
        restart.add(begin.elapsed().as_secs_f64());
    }
    // Nothing is collected until every lease has had time to be renewed.
    std::thread::sleep(Duration::from_secs(3));
    let (plan, collection) = runtime.block_on(collect(&client))?;
    let check = runtime.block_on(check(&client))?;
    let memory_of_work = process::memory(coordinator.process().pid())?;
    Ok(Size { images, restart, memory, requests, plan, collection, check, memory_of_work })
}

fn tell(report: &mut Report, size: &Size) {
    let images = size.images.to_string();
    let layers = (size.images * fleet::LAYERS).to_string();
    let mut row = |what: &str, p50: String, p99: String| {
        report.row(vec![images.clone(), layers.clone(), what.to_owned(), p50, p99]);
    };
    let milliseconds = |seconds: f64| format!("{:.1} ms", seconds * 1e3);
    for (what, samples) in &size.requests {
        row(what, milliseconds(samples.median()), milliseconds(samples.quantile(0.99)));
    }
    row("kill -9 to first answer", milliseconds(size.restart.median()), milliseconds(size.restart.quantile(0.99)));
    row("plan of a collection", milliseconds(size.plan), String::new());
    row("collection of what was removed", milliseconds(size.collection), String::new());
    row("fast check", milliseconds(size.check), String::new());
    row("memory, resident", format!("{:.0} MiB", size.memory.resident), String::new());
    row("memory, peak of collection and check", format!("{:.0} MiB", size.memory_of_work.peak), String::new());
    for (what, samples) in &size.requests {
        let bar = Bar::new("p50 of a request, ms", format!("{what}, {images} images"), samples.median() * 1e3);
        report.bar(bar.p95(samples.quantile(0.95) * 1e3));
    }
    let requests: serde_json::Map<_, _> =
        size.requests.iter().map(|(what, samples)| ((*what).to_owned(), json!(samples))).collect();
    report.add_samples(
        &format!("{images} images"),
        json!({
            "requests": requests,
            "restart": size.restart,
            "plan_seconds": size.plan,
            "collection_seconds": size.collection,
            "fast_check_seconds": size.check,
            "peak_mib_of_work": size.memory_of_work.peak,
            "resident_mib": size.memory.resident,
            "peak_mib": size.memory.peak,
        }),
    );
}

/// Measures every size.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let columns = vec!["images", "layers", "what", "p50", "p99"];
    let mut report = Report::new("scale", columns);
    let sizes = options.images.iter().map(|images| measure(options, *images)).collect::<Result<Vec<_>>>()?;
    sizes.iter().for_each(|size| tell(&mut report, size));
    let (Some(small), Some(large)) = (sizes.first(), sizes.last()) else { return Ok(report) };
    let growth = large.images as f64 / small.images as f64;
    let mut target = |what: &str, small: f64, large: f64| {
        report.target(
            format!("{what}: {growth:.0} times the images, times the cost"),
            large / small,
            Bound::AtMost(growth),
        );
    };
    for ((what, small), (_, large)) in small.requests.iter().zip(&large.requests) {
        target(what, small.median(), large.median());
    }
    target("kill -9 to first answer", small.restart.median(), large.restart.median());
    target("plan of a collection", small.plan, large.plan);
    target("fast check", small.check, large.check);
    target("memory, resident", small.memory.resident, large.memory.resident);
    target("memory, peak of collection and check", small.memory_of_work.peak, large.memory_of_work.peak);
    Ok(report)
}
