//! Does a container on cachefs read as fast as on its own disk?
//!
//! The same images are in a store on the local disk, mounted by cachefs, and unpacked on ext4. Both are seen through
//! the kernel's overlayfs, as containers see them: natively above the image's own layers, as Docker's overlay2 keeps them,
//! with cachefs above the one lower directory that an engine is given. Every workload runs on all sides in shuffled order.
//! There are three states:
//!
//! - cold: page cache dropped, fresh daemon, empty local cache; compared with native with its page cache dropped;
//! - local: page cache dropped, local cache full; compared with the same;
//! - warm: run again; compared with native run again.
//!
//! `workload` holds what is run, `side` where it runs and how a state is reached, `inputs` the images, `memory` the
//! daemon's memory. Mounting is never timed.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use rand::seq::SliceRandom;
use serde_json::json;
// With the leading colons, because this file has a module `tests` of its own.
use ::tests::process::run as finish;
use ::tests::site::Site;

use crate::report::{Bar, Report};
use crate::samples::Samples;
use inputs::Inputs;
use mode::{Mode, NATIVE};
use side::{Part, Side, State};
use workload::{Quantity, Workload};

mod inputs;
mod memory;
mod mode;
mod side;
mod workload;

/// What is measured, and how often.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How often each workload runs on each side in each state.
    #[arg(long, default_value_t = 5)]
    samples: usize,
    /// The test image whose tree is walked and read whole.
    #[arg(long, default_value = "gcc")]
    image: String,
    /// Arguments of `cachefs mount` for all modes.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    mount_arguments: String,
    /// Ways to mount that are compared, NAME:ARGUMENTS; NAME=PROGRAM:ARGUMENTS for another build's `cachefs`.
    #[arg(long, value_delimiter = ',', default_value = "default:", allow_hyphen_values = true)]
    modes: Vec<Mode>,
    /// Only these workloads (names of the table; `memory` is the daemon's memory); all of them unless given.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
}

impl Options {
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == name)
    }

    fn workloads(&self) -> Result<Vec<Workload>> {
        let all = workload::all();
        let known = |only: &String| only == memory::NAME || all.iter().any(|workload| workload.name == *only);
        if let Some(unknown) = self.only.iter().find(|only| !known(only)) {
            let names: Vec<_> = all.iter().map(|workload| workload.name).collect();
            bail!("there is no workload {unknown:?}; known are {}, {}", names.join(", "), memory::NAME);
        }
        Ok(all.into_iter().filter(|workload| self.wants(workload.name)).collect())
    }

    /// The modes, each with the arguments that all of them share.
    fn all_modes(&self) -> Vec<Mode> {
        let common = self.mount_arguments.split_whitespace().map(str::to_owned);
        let with = |mode: &Mode| Mode {
            arguments: mode.arguments.iter().cloned().chain(common.clone()).collect(),
            ..mode.clone()
        };
        self.modes.iter().map(with).collect()
    }
}

/// The samples of one workload in one state on one side.
#[derive(Debug, Default, serde::Serialize)]
struct Cell {
    values: Samples,
    /// Requests that the daemon answered in each run; empty for the native side.
    requests: Samples,
}

/// Cells by workload, state and side.
type Cells = BTreeMap<(&'static str, State, String), Cell>;

/// Measures everything.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let workloads = options.workloads()?;
    let site = Site::start()?;
    let inputs = Inputs::load(&site, &options.image)?;
    let modes = options.all_modes();
    let columns = vec!["workload", "state", "way", "median (p95)", "of native", "requests a run"];
    let mut report = Report::new("read-path", columns);
    if !workloads.is_empty() {
        let mut native = Side::native(inputs.unpack(&site)?);
        native.prepare(State::Cold)?;
        let files = inputs::sample_files(&native.root(Part::Tree)?)?;
        let mut sides = vec![native];
        for mode in &modes {
            sides.push(Side::cachefs(mode, &site, inputs.chains())?);
        }
        same_names(&mut sides)?;
        let mut cells = Cells::new();
        // Each cold run needs a fresh daemon, so half as many rounds must do.
        for round in 0..options.samples.div_ceil(2) {
            eprintln!("read-path: cold round {}", round + 1);
            cold_round(&workloads, &mut sides, &files, &mut cells)?;
        }
        for side in &mut sides {
            side.fill()?;
        }
        for round in 0..options.samples {
            eprintln!("read-path: round {} of {} with a full cache", round + 1, options.samples);
            cached_round(&workloads, &mut sides, &files, &mut cells)?;
        }
        tell(&mut report, &workloads, &cells, &modes);
    }
    if options.wants(memory::NAME) {
        let image = inputs::load_million(&site)?;
        eprintln!("read-path: memory");
        for mode in &modes {
            memory::measure(&mut report, &site, mode, &image)?;
        }
    }
    Ok(report)
}

/// Fails unless all sides show the same names: else they would not do the same work.
fn same_names(sides: &mut [Side]) -> Result<()> {
    let mut first = None;
    for side in sides {
        side.prepare(State::Cold)?;
        for part in Part::ALL {
            let mut find = Command::new("bash");
            find.args(["-c", "find . | sort | sha256sum"]).current_dir(side.root(part)?);
            let names = finish(&mut find)?.ok()?;
            let expected =
                first.get_or_insert_with(BTreeMap::new).entry(part as usize).or_insert_with(|| names.clone());
            ensure!(*expected == names, "{} shows other names than {NATIVE}", side.name());
        }
    }
    Ok(())
}

/// Runs a workload once and adds its result to the samples of `state`.
fn sample(work: &Workload, side: &mut Side, state: State, files: &[PathBuf], cells: &mut Cells) -> Result<()> {
    let root = side.root(work.part)?;
    let before = side.replies()?;
    let value = work.run(&root, state, files);
    let value = value.with_context(|| format!("{} on {}, {}", work.name, side.name(), state.name()))?;
    let cell = cells.entry((work.name, state, side.name().to_owned())).or_default();
    cell.values.add(value);
    if let (Some(before), Some(after)) = (before, side.replies()?) {
        cell.requests.add((after - before) as f64);
    }
    Ok(())
}

fn shuffled<T>(things: &mut [T]) -> impl Iterator<Item = &mut T> {
    things.shuffle(&mut rand::rng());
    things.iter_mut()
}

fn cold_round(workloads: &[Workload], sides: &mut [Side], files: &[PathBuf], cells: &mut Cells) -> Result<()> {
    let mut order: Vec<_> = workloads.iter().filter(|work| work.states.contains(&State::Cold)).collect();
    for work in shuffled(&mut order) {
        for side in shuffled(sides) {
            side.prepare(State::Cold)?;
            sample(work, side, State::Cold, files, cells)?;
        }
    }
    Ok(())
}

fn cached_round(workloads: &[Workload], sides: &mut [Side], files: &[PathBuf], cells: &mut Cells) -> Result<()> {
    let mut order: Vec<_> = workloads.iter().collect();
    for work in shuffled(&mut order) {
        for side in shuffled(sides) {
            if work.states.contains(&State::Local) {
                side.prepare(State::Local)?;
                sample(work, side, State::Local, files, cells)?;
            }
            work.settle(&side.root(work.part)?, files)?;
            sample(work, side, State::Warm, files, cells)?;
        }
    }
    Ok(())
}

/// Turns the cells into rows, bars and targets.
fn tell(report: &mut Report, workloads: &[Workload], cells: &Cells, modes: &[Mode]) {
    for state in [State::Cold, State::Local, State::Warm] {
        for work in workloads.iter().filter(|work| work.states.contains(&state)) {
            let Some(native) = cells.get(&(work.name, state, NATIVE.to_owned())) else { continue };
            let reference = native.values.median();
            row(report, work, state, NATIVE, native, None);
            for mode in modes {
                let Some(cell) = cells.get(&(work.name, state, mode.name.clone())) else { continue };
                let ratio = cell.values.median() / reference;
                row(report, work, state, &mode.name, cell, Some(ratio));
                let quantity = match work.quantity {
                    Quantity::Seconds => "time",
                    Quantity::BytesPerSecond | Quantity::PerSecond => "rate",
                };
                let group = format!("{}, {quantity} / native {quantity}", state.name());
                let bar = Bar::new(group, format!("{}, {}", work.name, mode.name), ratio);
                let mut bar = bar.p95(work.quantity.tail(&cell.values) / reference);
                if let Some(bound) = work.bound(state) {
                    report.target(
                        format!("{}, {}, {}: {quantity} / native", state.name(), work.name, mode.name),
                        ratio,
                        bound,
                    );
                    bar = bar.bound(bound);
                }
                report.bar(bar);
            }
        }
    }
    for ((work, state, side), cell) in cells {
        report.add_samples(&format!("{work}, {}, {side}", state.name()), json!(cell));
    }
}

fn row(report: &mut Report, work: &Workload, state: State, side: &str, cell: &Cell, ratio: Option<f64>) {
    let show = |value: f64| work.quantity.show(value);
    report.row(vec![
        work.name.to_owned(),
        state.name().to_owned(),
        side.to_owned(),
        format!("{} ({})", show(cell.values.median()), show(work.quantity.tail(&cell.values))),
        ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}")),
        ratio.map_or("-".to_owned(), |_| format!("{:.0}", cell.requests.median())),
    ]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_is_a_name_and_arguments() {
        let mode: Mode = "no-open:--open no-open".parse().unwrap();
        assert_eq!(
            (mode.name.as_str(), mode.arguments.as_slice()),
            ("no-open", &["--open".into(), "no-open".into()][..])
        );
        assert!("default:".parse::<Mode>().unwrap().arguments.is_empty());
        for wrong in ["default", ":--open", "native:", "a/b:"] {
            assert!(wrong.parse::<Mode>().is_err(), "{wrong}");
        }
    }
}
