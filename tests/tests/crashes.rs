//! The coordinator is killed for real at every crash point, starts again, and nothing is lost, half done or fetched twice.
//!
//! Each point is armed for its first, second, ... passing until a run ends without coming by once more; a point that no
//! run reaches is an error. After every death the store passes a deep check, the work completes, and no blob is
//! fetched again whose layer was published. What is being done at the points of each kind is in the files of `crashes/`.

use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use store::crash::CrashPoint;
use tests::process::{PATIENCE, Process, wait_until};
use tests::registry::Registry;
use tests::site::Site;

#[path = "crashes/collecting.rs"]
mod collecting;
#[path = "crashes/learning.rs"]
mod learning;
#[path = "crashes/loading.rs"]
mod loading;
#[path = "crashes/pulling.rs"]
mod pulling;
#[path = "crashes/repairing.rs"]
mod repairing;
#[path = "profiles/traces.rs"]
mod traces;

/// No point is armed for a later passing than this.
const PASSES: u32 = 5;
/// How long one run may take on a loaded machine.
const LONG: Duration = Duration::from_secs(120);

/// What the coordinator is doing when it dies: it comes to a point for that time, and this tells whether it did.
type Work = fn(&Registry, CrashPoint, u32) -> Result<bool>;

/// The works that come by a point.
fn works(point: CrashPoint) -> &'static [Work] {
    match point.name().split('.').next() {
        Some("load") => &[loading::die],
        Some("startup") => &[learning::die],
        Some("repair") => &[repairing::die, repairing::die_in_vain],
        Some("put_back") => &[repairing::die_in_vain],
        Some("refill") => &[collecting::die_refilling],
        Some("collect") => &[collecting::die],
        _ => &[pulling::die],
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

/// Does the work until the coordinator dies; tells whether it did. Work that fails as it should says `in_vain`.
fn work_until_death(site: &Site, doomed: &mut Process, arguments: &[&str], in_vain: Option<&str>) -> Result<bool> {
    let mut client = site.begin("client", arguments)?;
    wait_until("the end of either", LONG, || Ok(doomed.exited()?.is_some() || client.exited()?.is_some()))?;
    if doomed.exited()?.is_none() {
        let succeeded = client.wait(LONG)?.success();
        match succeeded || in_vain.is_some_and(|words| client.log().contains(words)) {
            // What it does after the answer is over when it has stopped in good order.
            true => drop(doomed.terminate(PATIENCE)?),
            // The client may be told of the death before this test sees it.
            false => drop(doomed.wait(PATIENCE).with_context(|| client.log())?),
        }
    }
    died(doomed)
}

/// Whether an ended coordinator was killed by itself rather than told to end.
fn died(doomed: &mut Process) -> Result<bool> {
    let status = doomed.wait(PATIENCE)?;
    match status.signal() {
        Some(9) => Ok(true),
        _ if status.success() => Ok(false),
        _ => bail!("the doomed coordinator ended with {status}: {}", doomed.log()),
    }
}

/// Compares every byte of the store; what the check says.
fn deep_check(site: &Site) -> Result<Value> {
    let check = site.ctl().run(&["--json", "fsck", "--deep"])?;
    ensure!(check.succeeded(), "the store is not whole: {}{}", check.stdout, check.stderr);
    Ok(serde_json::from_str(&check.stdout)?)
}

/// The same, and there is nothing in the store that nothing refers to, nor in staging.
fn tidy_check(site: &Site) -> Result<()> {
    let check = deep_check(site)?;
    for kind in ["layers", "packs", "blobs", "strangers"] {
        ensure!(check["orphans"][kind] == 0, "nothing refers to some {kind}: {}", check["orphans"]);
    }
    ensure!(site.staged()?.is_empty(), "staging holds {:?}", site.staged()?);
    Ok(())
}

/// Goes through one part of all points.
fn go_through(part: usize, parts: usize) -> Result<()> {
    let registry = Registry::start()?;
    let mut failures = Vec::new();
    let works = CrashPoint::ALL.iter().flat_map(|point| works(*point).iter().map(move |work| (*point, work)));
    for (point, work) in works.skip(part).step_by(parts) {
        let mut deaths = 0;
        for nth in 1..=PASSES {
            match work(&registry, point, nth) {
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
fn a_death_at_any_point_loses_nothing_first_quarter() {
    go_through(0, 4).unwrap();
}

#[test]
fn a_death_at_any_point_loses_nothing_second_quarter() {
    go_through(1, 4).unwrap();
}

#[test]
fn a_death_at_any_point_loses_nothing_third_quarter() {
    go_through(2, 4).unwrap();
}

#[test]
fn a_death_at_any_point_loses_nothing_last_quarter() {
    go_through(3, 4).unwrap();
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
