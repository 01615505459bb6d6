//! The metrics that Prometheus reads from a coordinator.

use anyhow::{Context, Result};
use tests::hosts;
use tests::http::request;
use tests::images::{self, small};
use tests::process::{TIMEOUT, wait_until};
use tests::registry::{Registry, free_port};
use tests::site::{Site, SiteSpec};

/// The value of the metric with these labels (`NAME` or `NAME{label="value"}`).
fn value(text: &str, metric: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(metric)?.strip_prefix(' '));
    let value = line.with_context(|| format!("no metric {metric} in\n{text}"))?;
    value.parse().with_context(|| format!("{metric} is {value}"))
}

#[test]
fn metrics_tell_what_the_store_holds_and_what_will_be_late() -> Result<()> {
    let address = format!("127.0.0.1:{}", free_port()?);
    let site = Site::start_with(&SiteSpec { listen: Some(address.clone()), ..SiteSpec::default() })?;
    let read = || -> Result<String> {
        let answer = request(&address, "GET", "/metrics", &[], 0, std::io::empty())?;
        assert!(
            answer.head.header("content-type").is_some_and(|kind| kind.starts_with("application/openmetrics-text"))
        );
        Ok(String::from_utf8(answer.body)?)
    };
    let empty = read()?;
    assert!(empty.ends_with("# EOF\n"), "{empty}");
    assert_eq!(value(&empty, "cachefs_coordinator_images")?, 0);
    assert_eq!(value(&empty, "cachefs_coordinator_leading")?, 1);
    assert_eq!(value(&empty, "cachefs_coordinator_schedules_at_risk")?, 0);
    let (registry, image) = (Registry::start()?, small()?);
    hosts::load(&site, &image)?;
    let python = registry.push(&images::image("python3")?, "python3", "v1")?;
    // At this bandwidth the pull takes hours, but the image is wanted in a minute.
    let slow = site.path().join("slow.yaml");
    std::fs::write(&slow, "limits:\n  bandwidth: 10k\n")?;
    site.ctl().ok(&["apply", &slow.display().to_string()])?;
    let soon = (jiff::Timestamp::now() + jiff::SignedDuration::from_secs(60)).to_string();
    site.ctl().ok(&["schedule", "add", "late", "--image", &python, "--ready-by", &soon])?;
    wait_until("the deadline is at risk", TIMEOUT, || {
        Ok(value(&read()?, "cachefs_coordinator_schedules_at_risk")? == 1)
    })?;
    let full = read()?;
    assert_eq!(value(&full, "cachefs_coordinator_images")?, 1);
    assert_eq!(value(&full, "cachefs_coordinator_layers")?, image.layers.len() as u64);
    assert_eq!(value(&full, "cachefs_coordinator_jobs{state=\"published\"}")?, 1);
    assert_eq!(value(&full, "cachefs_coordinator_schedules")?, 1);
    assert_eq!(value(&full, "cachefs_coordinator_hosts{state=\"live\"}")?, 0);
    assert!(value(&full, "cachefs_coordinator_store_free_bytes")? > 0);
    assert_eq!(value(&full, "cachefs_coordinator_schedules_late")?, 0);
    // There are no metrics of checks and collections before the first ones.
    assert!(!full.contains("last_check") && !full.contains("last_collection"), "{full}");
    let pack = site.files("packs")?.pop().context("the store has packs")?;
    std::fs::write(&pack, b"damaged")?;
    assert_eq!(site.ctl().run(&["fsck", "--deep"])?.code, 1);
    assert_eq!(site.ctl().run(&["gc"])?.code, 1, "hosts have not been heard of yet");
    let checked = read()?;
    assert!(value(&checked, "cachefs_coordinator_damaged_objects")? >= 1);
    assert_eq!(value(&checked, "cachefs_coordinator_last_collection_failures")?, 1);
    for metric in ["last_check_timestamp_seconds", "last_collection_timestamp_seconds"] {
        assert!(value(&checked, &format!("cachefs_coordinator_{metric}"))? > 1_700_000_000);
    }
    Ok(())
}
