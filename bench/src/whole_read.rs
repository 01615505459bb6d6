//! Is a whole image read through cachefs, cold and from a slow shared disk, as fast as a plain copy from that disk?
//!
//! These ways are measured, each with a freshly mounted disk and with all of the kernel's caches dropped:
//!
//! - cachefs: the store is on the slow disk, the daemon is fresh and its local cache empty; `tar` reads the image's tree.
//! - cachefs, start (`--start`): the same, but the image's application starts, which need not read all.
//! - one tar: the same tree is on the slow disk as one uncompressed tar, which `cat` reads.
//! - plain tree: the tree is there as files, which `cp -r` copies to the local disk.
//!
//! The reference is the faster of the two plain ways. Mounting is not timed, but the bytes that it reads are counted.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rand::seq::SliceRandom;
use serde_json::json;
use tests::cluster::{Mount, MountSpec};
use tests::hosts;
use tests::images;
use tests::process::run as command;
use tests::site::Site;
use tests::slowdisk::SlowDisk;

use crate::process;
use crate::quantity;
use crate::report::{Bar, Bound, Report};
use crate::samples::Samples;
use crate::{application, start};

/// The time through cachefs, as a ratio to that of the faster plain way.
const TARGET: Bound = Bound::AtMost(1.0);
/// The tree on the slow disk, and the tar of it.
const TREE: &str = "plain";
const TAR: &str = "plain.tar";

/// What is measured, and how slow the disk is.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How often cachefs and the tar are measured; the plain tree takes long and is measured a third as often.
    #[arg(long, default_value_t = 3)]
    samples: usize,
    /// Which of the test images.
    #[arg(long, default_value = "python3")]
    image: String,
    /// What each request to the shared disk waits.
    #[arg(long, default_value = "5ms", value_parser = quantity::duration)]
    latency: Duration,
    /// Bytes a second of the shared disk.
    #[arg(long, default_value = "100M", value_parser = quantity::rate)]
    bandwidth: u64,
    /// Also start the image's application: an image must never start slower than it is copied.
    #[arg(long)]
    start: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Cachefs,
    Start,
    Tar,
    Tree,
}

impl Way {
    const ALL: [Way; 4] = [Way::Cachefs, Way::Start, Way::Tar, Way::Tree];

    /// Those that are measured.
    fn wanted(options: &Options) -> Vec<Way> {
        Way::ALL.into_iter().filter(|way| options.start || *way != Way::Start).collect()
    }

    fn name(self) -> &'static str {
        match self {
            Way::Cachefs => "cachefs",
            Way::Start => "cachefs, start",
            Way::Tar => "one tar",
            Way::Tree => "plain tree",
        }
    }
}

/// What one way cost.
#[derive(Debug, Default, serde::Serialize)]
struct Cost {
    seconds: Samples,
    megabytes: Samples,
    requests: Samples,
}

/// The site, the image and the options of a run.
struct Place<'a> {
    options: &'a Options,
    site: &'a Site,
    chain: &'a str,
}

impl Place<'_> {
    /// Puts the merged tree and its tar beside the store. Special files such as device nodes are left out, because no way reads them.
    fn prepare(&self) -> Result<()> {
        let directory = tempfile::tempdir()?;
        let mount = Mount::start(MountSpec::new(directory.path(), &self.site.store()))?;
        let tree = self.site.path().join(TREE);
        command(Command::new("cp").arg("-a").arg(mount.chain(self.chain)).arg(&tree))?.ok()?;
        let special = ["!", "-type", "d", "!", "-type", "f", "!", "-type", "l", "-delete"];
        command(Command::new("find").arg(&tree).args(special))?.ok()?;
        command(Command::new("tar").arg("-cf").arg(self.site.path().join(TAR)).arg("-C").arg(&tree).arg("."))?.ok()?;
        Ok(())
    }

    /// Reads everything once in this way.
    fn measure(&self, way: Way, cost: &mut Cost) -> Result<()> {
        let directory = tempfile::tempdir()?;
        let shared = directory.path().join("shared");
        let disk = SlowDisk::start(self.site.path(), &shared, self.options.latency, Some(self.options.bandwidth))?;
        process::drop_kernel_caches()?;
        let seconds = match way {
            Way::Cachefs | Way::Start => {
                let mount = Mount::start(MountSpec::new(&directory.path().join("host"), &disk.path().join("store")))?;
                let tree = mount.tree(self.chain);
                match way {
                    Way::Start => start::seconds(&[tree], application::of(&self.options.image)?)?,
                    _ => timed("tar cf - . | cat >/dev/null", &tree)?,
                }
            }
            Way::Tar => timed(&format!("cat {TAR} | cat >/dev/null"), disk.path())?,
            Way::Tree => timed(&format!("cp -r {TREE} '{}'", directory.path().join("copy").display()), disk.path())?,
        };
        let stats = disk.stats()?;
        cost.seconds.add(seconds);
        cost.megabytes.add(stats.bytes_read as f64 / 1e6);
        cost.requests.add(stats.requests as f64);
        Ok(())
    }
}

/// Runs a shell command line in `directory` and returns the seconds, including the time to enter that directory.
fn timed(line: &str, directory: &Path) -> Result<f64> {
    let start = Instant::now();
    let directory: PathBuf = directory.to_owned();
    let mut shell = Command::new("bash");
    command(shell.args(["-c", &format!("set -o pipefail; {line}")]).current_dir(directory))?.ok()?;
    Ok(start.elapsed().as_secs_f64())
}

/// Measures all ways.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let site = Site::start()?;
    let image = images::image(&options.image)?;
    hosts::load(&site, &image)?;
    let chain = image.chain_ids().pop().context("the image has no layers")?;
    let place = Place { options, site: &site, chain: &chain };
    place.prepare()?;
    let mut costs = Way::ALL.map(|_| Cost::default());
    for round in 0..options.samples {
        let mut order = Way::wanted(options);
        order.shuffle(&mut rand::rng());
        for way in order {
            if way != Way::Tree || round % 3 == 0 {
                place.measure(way, &mut costs[way as usize]).with_context(|| way.name())?;
            }
        }
    }
    let size = fs::metadata(site.path().join(TAR))?.len() as f64 / 1e6;
    Ok(tell(options, size, &costs))
}

fn tell(options: &Options, size: f64, costs: &[Cost; 4]) -> Report {
    let columns = vec!["image", "way", "s (p95)", "samples", "of the faster plain way", "MB from the disk", "requests"];
    let mut report = Report::new("whole-read", columns);
    let disk = format!("{:?} a request, {:.0} MB/s", options.latency, options.bandwidth as f64 / 1e6);
    let plain = [Way::Tar, Way::Tree].map(|way| costs[way as usize].seconds.median());
    let reference = plain[0].min(plain[1]);
    for way in Way::wanted(options) {
        let Cost { seconds, megabytes, requests } = &costs[way as usize];
        report.row(vec![
            format!("{}, {size:.0} MB as tar; {disk}", options.image),
            way.name().to_owned(),
            format!("{:.2} ({:.2})", seconds.median(), seconds.quantile(0.95)),
            seconds.count().to_string(),
            format!("{:.2}", seconds.median() / reference),
            format!("{:.1}", megabytes.median()),
            format!("{:.0}", requests.median()),
        ]);
        let mut bar = Bar::new(format!("{}, whole, cold, {disk}; s", options.image), way.name(), seconds.median());
        bar = bar.p95(seconds.quantile(0.95));
        if [Way::Cachefs, Way::Start].contains(&way) {
            bar = bar.bound(Bound::AtMost(TARGET.limit() * reference));
        }
        report.bar(bar);
        report.add_samples(way.name(), json!(costs[way as usize]));
    }
    for way in Way::wanted(options).into_iter().filter(|way| ![Way::Tar, Way::Tree].contains(way)) {
        let ratio = costs[way as usize].seconds.median() / reference;
        report.target(format!("{}, {disk}: {} / faster plain copy, time", options.image, way.name()), ratio, TARGET);
    }
    report
}
