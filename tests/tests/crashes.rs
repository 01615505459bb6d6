//! The coordinator is killed at every crash point and started again. Nothing is lost, half done or fetched twice.
//!
//! Each point is armed for its first, second, ... pass, until a run ends without another pass. A point that no run
//! reaches is an error. After every death the store passes a deep check, the work completes, and the blobs of published
//! layers are not fetched again. The files of `crashes/` contain the work that leads to the points of each kind.

use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use store::crash::CrashPoint;
use tests::process::{Process, TIMEOUT, wait_until};
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

/// The highest pass for which a point is armed.
const PASSES: u32 = 5;
/// How long one run may take on a loaded machine.
const LONG: Duration = Duration::from_secs(120);

/// Work during which the coordinator dies at its nth pass of a point. Returns whether it died.
type Work = fn(&Registry, CrashPoint, u32) -> Result<bool>;

/// The work that passes a point.
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

/// Starts the site's coordinator so that it dies at `point`, and waits until it accepts connections or is dead.
fn doom(site: &mut Site, point: CrashPoint, nth: u32) -> Result<Process> {
    site.coordinator().stop()?;
    let spec = site.coordinator().spec().clone();
    let mut command = spec.command()?;
    command.env("CACHEFS_CRASH_AT", format!("{}:{nth}", point.name()));
    let mut process = Process::spawn("doomed coordinator", &mut command, &spec.state.with_extension("doomed.log"))?;
    wait_until("the doomed coordinator's start", TIMEOUT, || {
        Ok(process.exited()?.is_some() || UnixStream::connect(spec.socket()).is_ok())
    })?;
    Ok(process)
}

/// Runs the client until it ends or the coordinator dies, and returns whether the coordinator died. `in_vain` is the
/// expected error of work that cannot succeed.
fn work_until_death(site: &Site, doomed: &mut Process, arguments: &[&str], in_vain: Option<&str>) -> Result<bool> {
    let mut client = site.begin("client", arguments)?;
    wait_until("the end of either", LONG, || Ok(doomed.exited()?.is_some() || client.exited()?.is_some()))?;
    if doomed.exited()?.is_none() {
        let succeeded = client.wait(LONG)?.success();
        if succeeded || in_vain.is_some_and(|words| client.log().contains(words)) {
            // The orderly stop waits for work that continues after the answer.
            doomed.terminate(TIMEOUT)?;
        } else {
            // The client may notice the death before this test does.
            doomed.wait(TIMEOUT).with_context(|| client.log())?;
        }
    }
    died(doomed)
}

/// Whether a coordinator that has ended killed itself at a crash point; otherwise it was told to stop.
fn died(doomed: &mut Process) -> Result<bool> {
    let status = doomed.wait(TIMEOUT)?;
    match status.signal() {
        Some(9) => Ok(true),
        _ if status.success() => Ok(false),
        _ => bail!("the doomed coordinator ended with {status}: {}", doomed.log()),
    }
}

/// Runs a deep check, which compares every byte of the store, and returns its result.
fn deep_check(site: &Site) -> Result<Value> {
    let check = site.ctl().run(&["--json", "fsck", "--deep"])?;
    ensure!(check.succeeded(), "the store is not whole: {}{}", check.stdout, check.stderr);
    Ok(serde_json::from_str(&check.stdout)?)
}

/// Runs a deep check, and also checks that nothing in the store is unreferenced and that staging is empty.
fn tidy_check(site: &Site) -> Result<()> {
    let check = deep_check(site)?;
    for kind in ["layers", "packs", "blobs", "strangers"] {
        ensure!(check["orphans"][kind] == 0, "nothing refers to some {kind}: {}", check["orphans"]);
    }
    ensure!(site.staged()?.is_empty(), "staging holds {:?}", site.staged()?);
    Ok(())
}

/// Tests one of `parts` parts of all points.
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
    let end = tests::site::run_to_end("coordinator", &mut command, TIMEOUT).unwrap();
    assert_eq!(end.code, 1);
    assert!(end.stderr.contains("nowhere"), "{}", end.stderr);
}
