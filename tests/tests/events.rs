//! Events: what happened is told once, in order, to those who look and to those who follow, also over restarts.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;
use tests::hosts::load;
use tests::images::small;
use tests::process::{PATIENCE, Process, wait_until};
use tests::registry::Registry;
use tests::site::Site;

/// What a follower with `--json` has printed.
fn followed(follower: &Process) -> Result<Vec<Value>> {
    let log = follower.log();
    let lines = log.lines().filter(|line| line.starts_with('{'));
    lines.map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

fn has(events: &[Value], kind: &str, subject: &str) -> bool {
    events.iter().any(|event| event["kind"] == kind && event["subject"] == subject)
}

#[test]
fn a_follower_survives_a_restart_and_is_told_everything_once() {
    let (registry, mut site) = (Registry::start().unwrap(), Site::start().unwrap());
    let image = registry.push(&small().unwrap(), "small", "1").unwrap();
    let follower = site.begin("follower", &["--json", "events", "--follow", "--since", "0"]).unwrap();
    site.ctl().ok(&["pull", &image]).unwrap();
    wait_until("the first end", PATIENCE, || Ok(has(&followed(&follower)?, "job.published", &image))).unwrap();
    site.coordinator().kill9().unwrap();
    wait_until("the follower notices", PATIENCE, || Ok(follower.log().contains("trying again"))).unwrap();
    site.coordinator().restart().unwrap();
    let absent = registry.reference("absent", "1");
    assert_eq!(site.ctl().run(&["pull", &absent]).unwrap().code, 1);
    wait_until("the second end", PATIENCE, || Ok(has(&followed(&follower)?, "job.failed", &absent))).unwrap();
    let events = followed(&follower).unwrap();
    let ids: Vec<u64> = events.iter().filter_map(|event| event["id"].as_u64()).collect();
    assert_eq!(ids, (1..=ids.len() as u64).collect::<Vec<_>>(), "each once, in order");
    let list = site.ctl().json(&["events", "--since", "0"]).unwrap();
    assert_eq!(list["events"].as_array(), Some(&events), "the same to those who look");
    let text = site.ctl().ok(&["events", "-n", "1"]).unwrap();
    assert!(text.lines().count() == 1 && text.contains("job.failed") && text.contains(&absent), "{text}");
}

#[test]
fn who_waits_for_events_does_not_hold_up_a_stop() {
    let mut site = Site::start().unwrap();
    let follower = site.begin("follower", &["--json", "events", "--follow", "--since", "0"]).unwrap();
    load(&site, &small().unwrap()).unwrap();
    wait_until("an event", PATIENCE, || Ok(!followed(&follower)?.is_empty())).unwrap();
    let begun = Instant::now();
    assert!(site.coordinator().stop().unwrap().success());
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(4), "the follower's request was waited for: {took:?}");
}

#[test]
fn cancelled_and_retried_jobs_name_who_did_it() {
    let (mut registry, site) = (Registry::start().unwrap(), Site::start().unwrap());
    let image = registry.push(&small().unwrap(), "small", "1").unwrap();
    // A registry that hangs keeps the job under way.
    registry.process().signal(nix::sys::signal::Signal::SIGSTOP).unwrap();
    let id = site.ctl().ok(&["pull", "-d", &image]).unwrap();
    site.ctl().ok(&["cancel", &id]).unwrap();
    site.wait_for_job(&image, &["cancelled"], PATIENCE).unwrap();
    registry.process().signal(nix::sys::signal::Signal::SIGCONT).unwrap();
    site.ctl().ok(&["retry", &id]).unwrap();
    site.wait_for_job(&image, &["published"], PATIENCE).unwrap();
    let of_job = |list: &Value| -> Vec<(String, String)> {
        let text = |event: &Value, name: &str| event[name].as_str().unwrap_or_default().to_owned();
        list["events"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|event| (text(event, "kind"), text(event, "actor")))
            .collect()
    };
    let mut events = Vec::new();
    wait_until("the last event", PATIENCE, || {
        events = of_job(&site.ctl().json(&["events", "--since", "0"])?);
        Ok(events.iter().any(|(kind, _)| kind == "job.published"))
    })
    .unwrap();
    for expected in [("job.submitted", "uid 0"), ("job.retried", "uid 0"), ("job.cancelled", ""), ("job.published", "")]
    {
        let found = events.iter().any(|(kind, actor)| (kind.as_str(), actor.as_str()) == expected);
        assert!(found, "no {expected:?} in {events:?}");
    }
}
