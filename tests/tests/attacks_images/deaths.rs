//! A job during which coordinators die.

use super::*;
use tests::images::{ImageFiles, small};

/// An image whose first layer does not arrive completely until the registry is healed.
fn hanging(registry: &Registry) -> Result<(ImageFiles, FaultyRegistry, Match)> {
    let image = small()?;
    let faulty = FaultyRegistry::start(&registry.address())?;
    registry.push(&image, "small", "1")?;
    let blob = Match::Blob(image.layers[0].blob.digest.clone());
    faulty.inject(blob.clone(), Fault::Hang(100), usize::MAX);
    Ok((image, faulty, blob))
}

#[test]
fn a_job_that_kills_three_coordinators_has_failed() {
    let mut target = Target::new().unwrap();
    let (_image, faulty, blob) = hanging(&target.registry).unwrap();
    let reference = faulty.reference("small", "1");
    target.site.ctl().ok(&["pull", "--detach", &reference]).unwrap();
    for deaths in 1..=3 {
        faulty.wait_for(&blob, deaths, TIMEOUT).unwrap();
        let attempts = target.site.job(&reference).unwrap()["attempts"].clone();
        assert_eq!(attempts, deaths, "each start is written down before anything is done");
        target.site.coordinator().kill9().unwrap();
        target.site.coordinator().restart().unwrap();
    }
    let job = target.site.job(&reference).unwrap();
    let reason = job["reason"].as_str().unwrap_or_default();
    assert_eq!((&job["state"], &job["attempts"]), (&"failed".into(), &3.into()), "{job}");
    assert!(
        reason.contains("3 coordinators ended without a word") && reason.contains("cachefsctl retry 1"),
        "{reason}"
    );
    let events = target.site.ctl().ok(&["events"]).unwrap();
    assert!(events.contains("3 coordinators ended"), "{events}");
    // Neither this restart nor a later one runs the job again; only a person can (`cachefsctl retry`).
    target.site.coordinator().restart().unwrap();
    assert_eq!(target.site.job(&reference).unwrap()["state"], "failed");
    assert_eq!(faulty.count(&blob), 3);
    faulty.heal();
    target.site.ctl().ok(&["retry", "1"]).unwrap();
    target.site.wait_for_job(&reference, &["published"], TIMEOUT).unwrap();
}

#[test]
fn a_standby_knows_at_how_many_deaths_a_job_was_under_way() {
    let mut target = Target::new().unwrap();
    let (_image, faulty, blob) = hanging(&target.registry).unwrap();
    let reference = faulty.reference("small", "1");
    target.site.ctl().ok(&["pull", "--detach", &reference]).unwrap();
    faulty.wait_for(&blob, 1, TIMEOUT).unwrap();
    let mut second = target.site.second().unwrap();
    target.site.coordinator().kill9().unwrap();
    faulty.wait_for(&blob, 2, TIMEOUT).unwrap();
    // The first coordinator is back, and knows of both deaths.
    target.site.coordinator().restart().unwrap();
    second.kill9().unwrap();
    faulty.wait_for(&blob, 3, TIMEOUT).unwrap();
    target.site.coordinator().kill9().unwrap();
    second.restart().unwrap();
    let job = || Ok::<_, anyhow::Error>(second.ctl().json(&["jobs"])?["jobs"][0].clone());
    wait_until("the third successor", TIMEOUT, || Ok(job().is_ok_and(|job| job["state"] == "failed"))).unwrap();
    let job = job().unwrap();
    assert_eq!(job["attempts"], 3, "{job}");
    assert!(job["reason"].as_str().is_some_and(|reason| reason.contains("3 coordinators")), "{job}");
    assert_eq!(faulty.count(&blob), 3, "it does not run at the fourth");
}

#[test]
fn a_stop_in_good_order_is_not_counted() {
    let mut target = Target::new().unwrap();
    let (_image, faulty, blob) = hanging(&target.registry).unwrap();
    let reference = faulty.reference("small", "1");
    target.site.ctl().ok(&["pull", "--detach", &reference]).unwrap();
    for stops in 1..=4 {
        faulty.wait_for(&blob, stops, TIMEOUT).unwrap();
        assert!(target.site.coordinator().stop().unwrap().success());
        target.site.coordinator().restart().unwrap();
    }
    faulty.wait_for(&blob, 5, TIMEOUT).unwrap();
    faulty.heal();
    target.site.coordinator().restart().unwrap();
    target.site.wait_for_job(&reference, &["published"], TIMEOUT).unwrap();
}
