//! How long until a container does useful work, for each way of bringing its image to the host?
//!
//! This is HelloBench's question. Each kind of lower directory is measured with a start without an engine
//! ([`crate::start`]), and `docker pull` followed by `docker run` is measured beside them. The ways are measured round
//! by round in shuffled order. Before each cold start the page cache of the whole machine is dropped, including that of
//! the slow disk's server.
//!
//! [`share`]: what the ways share. [`timeline`]: what a start asks of the shared disk. [`way`]: the ways.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::Result;
use rand::seq::SliceRandom;
use serde_json::json;
use tests::images;
use tests::slowdisk::Asked;

use crate::report::{Bar, Bound, Report};
use crate::samples::Samples;
use crate::{application, quantity};

pub(crate) mod share;
mod timeline;
mod way;

use share::Share;
use way::{Cost, Engine, Subject, Way};

/// The latency at which the targets for cold starts are stated.
const TARGET_LATENCY: Duration = Duration::from_millis(5);

/// All ways, as tables list them.
const WAYS: [Way; 10] = [
    Way::Docker,
    Way::Naive,
    Way::Cold,
    Way::Guess,
    Way::NextBuild,
    Way::Profile,
    Way::Local,
    Way::Warm,
    Way::NativeCold,
    Way::NativeWarm,
];
/// The ways in which a startup pack helps.
const LEARNED: [Way; 3] = [Way::Guess, Way::NextBuild, Way::Profile];
/// The ways in which cachefs starts with an empty local cache.
const COLD: [Way; 4] = [Way::Cold, Way::Guess, Way::NextBuild, Way::Profile];

/// What is measured.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How often each way is measured
    #[arg(long, default_value_t = 5)]
    samples: usize,
    /// The slow disk's latencies
    #[arg(long, value_delimiter = ',', default_value = "1ms,5ms", value_parser = quantity::duration)]
    latency: Vec<Duration>,
    /// Bytes a second, of the slow disk and of the way to the registry
    #[arg(long, default_value = "100M", value_parser = quantity::rate)]
    bandwidth: u64,
    /// Which images: bash, python3, nginx, redis, gcc, nodejs; large ones: ai, weights
    #[arg(long, value_delimiter = ',', default_value = "python3,nginx")]
    images: Vec<String>,
    /// Which ways; all when not given
    #[arg(long, value_delimiter = ',', value_enum)]
    ways: Vec<Way>,
    /// How far the kernel reads ahead on the slow disk, KiB
    #[arg(long, default_value_t = 1024)]
    read_ahead_kib: u32,
    /// Print what a cold start of each way asks of the slow disk, request by request
    #[arg(long)]
    timeline: bool,
    /// Additional arguments of `cachefs mount`, separated by spaces
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    mount_arguments: String,
}

/// The samples of one way.
#[derive(Default, Clone)]
struct Cell {
    seconds: Samples,
    registry: (Samples, Samples),
    disk: (Samples, Samples),
    cache: Samples,
}

impl Cell {
    fn add(&mut self, cost: Cost) {
        self.seconds.add(cost.seconds);
        self.registry.0.add(cost.registry_bytes as f64);
        self.registry.1.add(cost.registry_requests as f64);
        self.disk.0.add(cost.disk_bytes as f64);
        self.disk.1.add(cost.disk_requests as f64);
        self.cache.add(cost.cache_bytes as f64);
    }
}

/// The cells of one image at one latency.
struct Table<'a> {
    image: &'a str,
    latency: Duration,
    touched: u64,
    cells: HashMap<Way, Cell>,
}

impl Table<'_> {
    fn median(&self, way: Way) -> Option<f64> {
        self.cells.get(&way).map(|cell| cell.seconds.median())
    }

    fn ratio(&self, way: Way, to: Way) -> Option<f64> {
        Some(self.median(way)? / self.median(to)?)
    }

    fn title(&self) -> String {
        format!("{}, {} ms", self.image, self.latency.as_secs_f64() * 1e3)
    }
}

/// Measures every image.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let columns = vec![
        "image, latency",
        "way",
        "s (p95)",
        "/ native cold",
        "/ naive",
        "registry MB (requests)",
        "shared disk MB (requests)",
        "local cache MB",
    ];
    let mut report = Report::new("cold-start", columns);
    let ways = if options.ways.is_empty() { WAYS.to_vec() } else { options.ways.clone() };
    let arguments: Vec<String> = options.mount_arguments.split_whitespace().map(str::to_owned).collect();
    let engine = ways.contains(&Way::Docker).then(|| Engine::start(options.bandwidth)).transpose()?;
    let mut share = Share::start(&arguments, options.read_ahead_kib)?;
    for name in &options.images {
        let Ok(application) = application::of(name) else {
            report.row(missing(name, "there is no such test image"));
            continue;
        };
        let image = images::image(name)?;
        share.add(&image)?;
        if let Some(engine) = &engine {
            engine.add(&image)?;
        }
        let mut ways = ways.clone();
        if ways.iter().any(|way| LEARNED.contains(way)) {
            share.train(&image, application)?;
        }
        if let Some(why) = share.untrained(name) {
            ways.retain(|way| !LEARNED.contains(way));
            report.row(missing(name, &format!("with a startup pack: not measured: {why}")));
        }
        let touched = share.touched(application)?;
        let mut subject = Subject::new(&share, engine.as_ref(), application, &image)?;
        let mut docker = None;
        for latency in &options.latency {
            let mut table = Table { image: name, latency: *latency, touched, cells: HashMap::new() };
            share.slow_down(*latency, options.bandwidth)?;
            for _ in 0..options.samples {
                ways.shuffle(&mut rand::rng());
                for way in &ways {
                    let cost = subject.sample(*way)?;
                    eprintln!("{}, {}: {:.3} s", table.title(), way.name(), cost.seconds);
                    table.cells.entry(*way).or_default().add(cost);
                }
            }
            // Docker does not use the slow disk, so its samples at the first latency count for the other latencies as well.
            docker = docker.or_else(|| table.cells.get(&Way::Docker).cloned());
            ways.retain(|way| *way != Way::Docker);
            table.cells.extend(docker.clone().map(|cell| (Way::Docker, cell)));
            tell(&mut report, &table, &WAYS);
            for way in ways.iter().filter(|way| options.timeline && COLD.contains(way)) {
                account(&mut report, &table, *way, &subject.timeline(*way)?);
            }
        }
    }
    Ok(report)
}

fn missing(image: &str, why: &str) -> Vec<String> {
    let mut row = vec![image.to_owned(), why.to_owned()];
    row.extend(std::iter::repeat_n(String::new(), 6));
    row
}

fn tell(report: &mut Report, table: &Table<'_>, ways: &[Way]) {
    let megabytes = |(bytes, requests): &(Samples, Samples)| match requests.median() {
        0.0 => "0".to_owned(),
        requests => format!("{:.2} ({requests:.0})", bytes.median() / 1e6),
    };
    let ratio = |ratio: Option<f64>| ratio.map_or(String::new(), |ratio| format!("{ratio:.2}"));
    for way in ways {
        let Some(cell) = table.cells.get(way) else { continue };
        report.row(vec![
            table.title(),
            way.name().to_owned(),
            format!("{:.3} ({:.3})", cell.seconds.median(), cell.seconds.quantile(0.95)),
            ratio(table.ratio(*way, Way::NativeCold)),
            ratio(table.ratio(*way, Way::Naive)),
            megabytes(&cell.registry),
            megabytes(&cell.disk),
            format!("{:.2}", cell.cache.median() / 1e6),
        ]);
        report.bar(
            Bar::new(format!("{} start, s", table.title()), way.name(), cell.seconds.median())
                .p95(cell.seconds.quantile(0.95)),
        );
        report.add_samples(
            &format!("{}, {}", table.title(), way.name()),
            json!({
                "seconds": cell.seconds,
                "registry_bytes": cell.registry.0,
                "registry_requests": cell.registry.1,
                "disk_bytes": cell.disk.0,
                "disk_requests": cell.disk.1,
                "cache_bytes": cell.cache,
            }),
        );
    }
    report.add_samples(&format!("{}, touched", table.title()), json!({ "bytes": table.touched }));
    hold_against_targets(report, table);
}

fn hold_against_targets(report: &mut Report, table: &Table<'_>) {
    let always =
        [(Way::Warm, Way::NativeWarm, 1.0), (Way::Local, Way::NativeCold, 1.0), (Way::Profile, Way::Docker, 0.03)];
    let slow = [
        (Way::Profile, Way::NativeCold, 1.2),
        (Way::NextBuild, Way::NativeCold, 1.5),
        (Way::Guess, Way::NativeCold, 2.0),
        (Way::Profile, Way::Naive, 0.06),
        (Way::Cold, Way::NativeCold, 4.0),
    ];
    let slow = if table.latency == TARGET_LATENCY { &slow[..] } else { &[] };
    for (way, to, most) in always.iter().chain(slow) {
        if let Some(ratio) = table.ratio(*way, *to) {
            report.target(format!("{}: {} / {}", table.title(), way.name(), to.name()), ratio, Bound::AtMost(*most));
        }
    }
    for way in COLD {
        if let Some(cell) = table.cells.get(&way) {
            let ratio = cell.disk.0.median() / table.touched as f64;
            let touched = table.touched as f64 / 1e6;
            let measure = format!(
                "{}: {}, bytes from the shared disk / {touched:.2} MB of pages touched",
                table.title(),
                way.name()
            );
            let most = if way == Way::Profile { 1.05 } else { 1.3 };
            report.target(measure, ratio, Bound::AtMost(most));
        }
    }
}

/// Prints what a start asked of the shared disk, and holds its round trips against the target.
fn account(report: &mut Report, table: &Table<'_>, way: Way, timeline: &[Asked]) {
    let start = format!("{}: {}", table.title(), way.name());
    eprintln!("{start}: requests to the shared disk\n{}", timeline::table(timeline));
    if let Some(trips) = timeline::trips_to_content(timeline) {
        report.target(format!("{start}: round trips until the first content"), trips as f64, Bound::AtMost(3.0));
    }
    let requests: Vec<_> = timeline
        .iter()
        .map(|asked| json!([asked.at_ms, asked.wait_ms, asked.kind, asked.object, asked.bytes]))
        .collect();
    report.add_samples(&format!("{start}, timeline"), json!(requests));
}
