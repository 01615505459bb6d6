//! The workloads that run on every side. Each one yields seconds, or a rate.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::Value;
// With the leading colons, because this file has a module `tests` of its own.
use ::tests::process::run;

use super::inputs::{LARGE_FILE, LARGE_MIB};
use super::side::{Part, State};
use crate::report::Bound;
use crate::samples::Samples;

/// How many passes the loops over files make when only the kernel answers.
const WARM_PASSES: usize = 10;
/// How much the random reads request in total when the disk answers, MiB.
const RANDOM_MIB: usize = 32;

/// What a workload's number measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Quantity {
    /// Less is better.
    Seconds,
    /// More is better.
    BytesPerSecond,
    /// Operations a second; more is better.
    PerSecond,
}

impl Quantity {
    /// The bad end of the samples: 95% of them are no worse than this.
    pub(super) fn tail(self, samples: &Samples) -> f64 {
        match self {
            Quantity::Seconds => samples.quantile(0.95),
            Quantity::BytesPerSecond | Quantity::PerSecond => samples.quantile(0.05),
        }
    }

    /// The value with its unit.
    pub(super) fn show(self, value: f64) -> String {
        match self {
            Quantity::Seconds => format!("{value:.3} s"),
            Quantity::BytesPerSecond => format!("{:.0} MB/s", value / 1e6),
            Quantity::PerSecond => format!("{:.0} k/s", value / 1e3),
        }
    }
}

/// One workload.
#[derive(Debug)]
pub(super) struct Workload {
    /// The name in tables and in `--only`.
    pub(super) name: &'static str,
    /// The image it reads.
    pub(super) part: Part,
    /// The states in which it is run; warm is always one of them.
    pub(super) states: &'static [State],
    /// What its number measures.
    pub(super) quantity: Quantity,
    /// The bound when warm, as a ratio to warm native.
    warm: Option<Bound>,
    /// The bound when the local cache is full, as a ratio to cold native.
    local: Option<Bound>,
    action: Action,
}

#[derive(Debug, Clone, Copy)]
enum Action {
    /// fio on the large file.
    Fio { pattern: &'static str, block: &'static str, engine: &'static str, threads: usize },
    /// A shell command line, run in the root.
    Shell(&'static str),
    /// A command in a chroot of the root.
    Start(&'static [&'static str]),
    /// A loop over the sampled files.
    Loop(Step),
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// open and close.
    Open,
    /// lstat.
    Stat,
    /// lstat of a name that does not exist.
    Absent,
}

const ALL: &[State] = &[State::Cold, State::Local, State::Warm];
const CACHED: &[State] = &[State::Local, State::Warm];
const WARM: &[State] = &[State::Warm];

/// All workloads.
pub(super) fn all() -> Vec<Workload> {
    let fio = |name, states, pattern, block, engine, threads| Workload {
        name,
        part: Part::Large,
        states,
        quantity: Quantity::BytesPerSecond,
        warm: Some(Bound::AtLeast(0.95)),
        local: None,
        action: Action::Fio { pattern, block, engine, threads },
    };
    let shell = |name, states, warm, line| Workload {
        name,
        part: Part::Tree,
        states,
        quantity: Quantity::Seconds,
        warm: Some(Bound::AtMost(warm)),
        local: None,
        action: Action::Shell(line),
    };
    let step = |name, step| Workload {
        name,
        part: Part::Tree,
        states: WARM,
        quantity: Quantity::PerSecond,
        warm: None,
        local: None,
        action: Action::Loop(step),
    };
    let python: &[&str] = &["/usr/bin/python3", "-c", "import json,ssl,sqlite3,asyncio"];
    vec![
        fio("random-4k-1", ALL, "randread", "4k", "psync", 1),
        fio("random-4k-4", WARM, "randread", "4k", "psync", 4),
        fio("sequential-1m-1", ALL, "read", "1m", "psync", 1),
        fio("sequential-1m-4", WARM, "read", "1m", "psync", 4),
        fio("mmap-4k-1", CACHED, "randread", "4k", "mmap", 1),
        fio("mmap-4k-4", WARM, "randread", "4k", "mmap", 4),
        // Writes into a pipe, because GNU tar does not read files that go to /dev/null.
        shell("tar", ALL, 1.3, "set -o pipefail; tar cf - . | cat >/dev/null"),
        shell("find", ALL, 1.1, "find . >/dev/null"),
        shell("du", WARM, 1.1, "du -s . >/dev/null"),
        shell("ls", WARM, 1.1, "ls -lR . >/dev/null"),
        step("open", Step::Open),
        step("stat", Step::Stat),
        step("absent", Step::Absent),
        Workload {
            name: "python",
            part: Part::Python,
            states: ALL,
            quantity: Quantity::Seconds,
            warm: None,
            local: Some(Bound::AtMost(1.1)),
            action: Action::Start(python),
        },
    ]
}

impl Workload {
    /// The promised bound for a state, as a ratio to native.
    pub(super) fn bound(&self, state: State) -> Option<Bound> {
        match state {
            State::Cold => None,
            State::Local => self.local,
            State::Warm => self.warm,
        }
    }

    /// Runs the workload in `root` and returns seconds, or a rate. `files` are those that loops visit.
    pub(super) fn run(&self, root: &Path, state: State, files: &[PathBuf]) -> Result<f64> {
        match self.action {
            Action::Fio { pattern, block, engine, threads } => {
                fio(&root.join(LARGE_FILE), pattern, &[block, engine], threads, state)
            }
            Action::Shell(line) => timed(Command::new("bash").args(["-c", line]).current_dir(root)),
            Action::Start(words) => timed(Command::new("chroot").arg(root).args(words).env("HOME", "/root")),
            Action::Loop(step) => {
                let passes = if state == State::Warm { WARM_PASSES } else { 1 };
                rate(root, step, files, passes)
            }
        }
    }

    /// Makes sure that the next run is warm.
    pub(super) fn settle(&self, root: &Path, files: &[PathBuf]) -> Result<()> {
        match self.action {
            // A random read may not have touched every page.
            Action::Fio { .. } => {
                std::io::copy(&mut File::open(root.join(LARGE_FILE))?, &mut std::io::sink())?;
            }
            Action::Loop(step) => rate(root, step, files, 1).map(|_| ())?,
            Action::Shell(_) | Action::Start(_) => self.run(root, State::Warm, files).map(|_| ())?,
        }
        Ok(())
    }
}

/// Seconds that a command took.
fn timed(command: &mut Command) -> Result<f64> {
    let start = Instant::now();
    let output = run(command)?;
    let seconds = start.elapsed().as_secs_f64();
    output.ok().map(|_| seconds)
}

/// Runs fio and returns bytes a second. A warm run lasts half a second. Otherwise sequential reads cover the file once,
/// and random reads request [`RANDOM_MIB`].
fn fio(file: &Path, pattern: &str, block_and_engine: &[&str; 2], threads: usize, state: State) -> Result<f64> {
    let [block, engine] = block_and_engine;
    let mut command = Command::new("fio");
    command.args(["--name=read", "--readonly", "--thread", "--group_reporting", "--output-format=json"]);
    // By default fio drops the file's pages first.
    command.args(["--invalidate=0", "--allow_file_create=0"]).arg(format!("--filename={}", file.display()));
    command.arg(format!("--rw={pattern}")).arg(format!("--bs={block}")).arg(format!("--ioengine={engine}"));
    command.arg(format!("--numjobs={threads}"));
    if pattern == "read" {
        let share = LARGE_MIB / threads;
        command.arg(format!("--size={share}m")).arg(format!("--offset_increment={share}m"));
    } else {
        command.arg(format!("--size={LARGE_MIB}m"));
    }
    if state == State::Warm {
        command.args(["--time_based", "--runtime=500ms"]);
    } else if pattern != "read" {
        command.arg(format!("--io_size={}m", RANDOM_MIB / threads));
    }
    let text = run(&mut command)?.ok()?;
    let start = text.find('{').with_context(|| format!("fio printed no JSON: {text}"))?;
    let result: Value = serde_json::from_str(&text[start..]).context("fio printed half a document")?;
    result["jobs"][0]["read"]["bw_bytes"].as_f64().filter(|rate| *rate > 0.0).context("fio read nothing")
}

/// Operations a second over all files, visited `passes` times.
fn rate(root: &Path, step: Step, files: &[PathBuf], passes: usize) -> Result<f64> {
    let path = |file: &PathBuf| match step {
        Step::Open | Step::Stat => root.join(file),
        Step::Absent => root.join(file).with_file_name("no-such-name"),
    };
    let paths: Vec<_> = files.iter().map(path).collect();
    let start = Instant::now();
    for _ in 0..passes {
        for path in &paths {
            match step {
                Step::Open => drop(File::open(path).with_context(|| format!("cannot open {}", path.display()))?),
                Step::Stat => fs::symlink_metadata(path).map(|_| ())?,
                Step::Absent => match fs::symlink_metadata(path) {
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    other => bail!("{} gave {other:?}", path.display()),
                },
            }
        }
    }
    Ok((passes * paths.len()) as f64 / start.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_the_bad_end() {
        let mut samples = Samples::default();
        (1..=20).for_each(|n| samples.add(f64::from(n)));
        assert_eq!(Quantity::Seconds.tail(&samples), 19.0);
        assert_eq!(Quantity::PerSecond.tail(&samples), 1.0);
    }

    #[test]
    fn loops_count_only_what_came_out_as_it_should() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("file"), "x").unwrap();
        let files = [PathBuf::from("file")];
        for step in [Step::Open, Step::Stat, Step::Absent] {
            assert!(rate(root.path(), step, &files, 3).unwrap() > 0.0, "{step:?}");
        }
        fs::write(root.path().join("no-such-name"), "x").unwrap();
        assert!(rate(root.path(), Step::Absent, &files, 1).is_err());
        assert!(rate(root.path(), Step::Open, &[PathBuf::from("other")], 1).is_err());
    }

    #[test]
    fn every_workload_has_its_own_name_and_is_run_warm() {
        let all = all();
        let names: std::collections::BTreeSet<_> = all.iter().map(|workload| workload.name).collect();
        assert_eq!(names.len(), all.len());
        assert!(all.iter().all(|workload| workload.states.contains(&State::Warm)));
    }
}
