//! Malicious images: what a few bytes from a stranger can make the coordinator store, do or become.
//!
//! Each attack runs against the real coordinator. It passes if an admin's requests were answered all the time, memory
//! stayed within [`MEMORY_KIB`] above that of an idle coordinator, the epoch is unchanged, and the job was published or
//! failed with a sentence that names the entry. The layers are compressed while they are made, so none is ever whole on
//! this machine's disk.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::images::archive::{Archive, Header, Kind};
use tests::images::{Compression, ImageBuilder, Layer, Pools};
use tests::process::{TIMEOUT, peak, wait_until};
use tests::registry::{Fault, FaultyRegistry, Match, Registry};
use tests::site::Site;
use tests::streamed;

#[path = "attacks_images/content.rs"]
mod content;
#[path = "attacks_images/deaths.rs"]
mod deaths;
#[path = "attacks_images/entries.rs"]
mod entries;

/// How much more memory than when idle the coordinator may use.
const MEMORY_KIB: u64 = 256 << 10;
/// How long an attack may keep a loaded machine busy.
const LONG: Duration = Duration::from_secs(300);
/// How long an admin may wait for an answer.
const ANSWER: Duration = Duration::from_secs(1);

type Tar<'a> = Archive<&'a mut dyn Write>;

/// A registry and a store with its coordinator, and the coordinator's state before the attack.
struct Target {
    registry: Registry,
    site: Site,
    pools: Pools,
    directory: tempfile::TempDir,
    idle_kib: u64,
    epoch: Value,
}

impl Target {
    fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let (registry, mut site) = (Registry::start()?, Site::start()?);
        let epoch = site.ctl().json(&["status"])?["epoch"].clone();
        ensure!(epoch.is_u64(), "no epoch: {epoch}");
        let idle_kib = peak(site.coordinator().process().pid())? >> 10;
        Ok(Self { registry, site, pools: Pools::open(directory.path())?, directory, idle_kib, epoch })
    }

    /// A layer whose tar `write` produces, compressed with zstd.
    fn layer(&self, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<Layer> {
        streamed::layer(&self.pools, write)
    }

    /// A layer from the entries that `write` adds. The end of the archive is added here.
    fn archive(&self, write: impl FnOnce(&mut Tar<'_>) -> Result<()>) -> Result<Layer> {
        self.layer(|out| {
            let mut tar = Archive::new(out);
            write(&mut tar)?;
            tar.finish()?;
            Ok(())
        })
    }

    /// Pushes an image with this one layer.
    fn push(&self, name: &str, layer: Layer) -> Result<String> {
        let image = ImageBuilder::new(name).layer(layer).build(&self.pools, &self.directory.path().join(name))?;
        self.registry.push(&image, name, "1")
    }

    /// Pulls an image until its job ends, while an admin sends requests.
    fn pull(&mut self, reference: &str) -> Result<Value> {
        self.site.ctl().ok(&["pull", "--detach", reference])?;
        let mut answers = Vec::new();
        let mut job = Value::Null;
        wait_until("the job's end", LONG, || {
            let asked = Instant::now();
            let status = self.site.ctl().json(&["status"])?;
            answers.push(asked.elapsed());
            ensure!(status["epoch"] == self.epoch, "another epoch than {}: {status}", self.epoch);
            job = self.site.job(reference)?;
            Ok(["published", "failed"].iter().any(|state| job["state"] == *state))
        })?;
        // The client is a process of its own and this machine may be loaded, so the median counts.
        answers.sort();
        let usual = answers[answers.len() / 2];
        ensure!(usual < ANSWER, "an admin waits {usual:?}");
        self.check_memory()?;
        wait_until("an empty staging", TIMEOUT, || Ok(self.site.staged()?.is_empty()))?;
        Ok(job)
    }

    fn check_memory(&mut self) -> Result<()> {
        let peak = peak(self.site.coordinator().process().pid())? >> 10;
        println!("{} MiB of memory, {} when idle", peak >> 10, self.idle_kib >> 10);
        ensure!(peak < self.idle_kib + MEMORY_KIB, "{} MiB of memory, {} when idle", peak >> 10, self.idle_kib >> 10);
        Ok(())
    }

    /// Checks that an attack is refused with one sentence that contains these words.
    fn check_refused(&mut self, name: &str, layer: Layer, words: &[&str]) -> Result<()> {
        let diff_id = layer.diff_id.clone();
        let reference = self.push(name, layer)?;
        let job = self.pull(&reference)?;
        let reason = job["reason"].as_str().unwrap_or_default();
        ensure!(job["state"] == "failed", "{job}");
        ensure!(words.iter().all(|word| reason.contains(word)), "{reason} lacks a word of {words:?}");
        ensure!(reason.len() < 1000, "a reason of {} bytes", reason.len());
        ensure!(!self.site.has_layer(&diff_id)?, "{name} is in the store");
        Ok(())
    }

    /// Checks that a layer that resembles an attack is stored byte for byte.
    fn check_published(&mut self, name: &str, layer: Layer) -> Result<()> {
        let diff_id = layer.diff_id.clone();
        let reference = self.push(name, layer)?;
        let job = self.pull(&reference)?;
        ensure!(job["state"] == "published" && self.site.has_layer(&diff_id)?, "{job}");
        let check = self.site.ctl().run(&["fsck", "--deep"])?;
        ensure!(check.succeeded(), "the store is not whole: {}{}", check.stdout, check.stderr);
        self.check_memory()
    }

    /// Seconds of processor time that the coordinator has used.
    fn cpu_seconds(&mut self) -> Result<f64> {
        let pid = self.site.coordinator().process().pid();
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).context("no times");
        // Fields 14 and 15 of proc(5), in hundredths of a second.
        Ok((ticks(11)? + ticks(12)?) / 100.0)
    }
}

/// Bytes that compress very well, but in which no two blocks of 64 KiB are equal.
struct Numbered {
    at: u64,
}

impl Read for Numbered {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let start = self.at;
        for byte in out.iter_mut() {
            let within = self.at % (64 << 10);
            *byte = if within < 8 { (self.at / (64 << 10)).to_be_bytes()[within as usize] } else { b'.' };
            self.at += 1;
        }
        Ok((self.at - start) as usize)
    }
}

fn file(path: impl AsRef<[u8]>) -> Header {
    Header::new(Kind::File, path)
}
