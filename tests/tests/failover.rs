//! When a coordinator dies for good, its successor keeps every promise: jobs, schedules, settings, tokens.

use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tests::cluster::{Coordinator, Ctl};
use tests::images::{ImageFiles, small};
use tests::process::{Process, TIMEOUT, run, wait_until};
use tests::registry::{Fault, FaultyRegistry, Match, Registry};
use tests::site::{Site, SiteSpec, coordinator_spec};

/// How long work on small images may take on a loaded machine.
const LONG: Duration = Duration::from_secs(120);

const SETTINGS: &str = r#"
limits:
  parallel_layers: 2
retention:
  rules:
    - {pattern: "**", keep_last: 3}
pins: [keep:1]
pull_on_demand: true
"#;

fn leads(coordinator: &Coordinator) -> anyhow::Result<bool> {
    Ok(coordinator.ctl().json(&["status"])?["role"] == "leader")
}

/// All settings, schedules and pins, as one document.
fn orders(ctl: &Ctl) -> anyhow::Result<String> {
    ctl.ok(&["apply", "--show"])
}

/// A `cachefsctl` for the same coordinator that sends a token.
fn with_token(ctl: &Ctl, token: &str) -> Ctl {
    Ctl { environment: vec![("CACHEFS_TOKEN".to_owned(), token.to_owned())], ..ctl.clone() }
}

fn layer(image: &ImageFiles, position: usize) -> Match {
    Match::Blob(image.layers[position].blob.digest.clone())
}

#[test]
fn the_next_leader_goes_on_with_every_promise() {
    let (registry, mut site, image) = (Registry::start().unwrap(), Site::start().unwrap(), small().unwrap());
    let faulty = FaultyRegistry::start(&registry.address()).unwrap();
    registry.push(&image, "small", "1").unwrap();
    let reference = faulty.reference("small", "1");
    let file = site.path().join("settings.yaml");
    std::fs::write(&file, SETTINGS).unwrap();
    let ctl = site.ctl();
    ctl.ok(&["apply", &file.display().to_string()]).unwrap();
    ctl.ok(&["schedule", "add", "yearly", "--image", &reference, "--cron", "0 4 1 1 *"]).unwrap();
    let token = ctl.ok(&["token", "create", "ci", "--role", "viewer"]).unwrap();
    let token = token.lines().find(|line| line.starts_with("cfs_")).unwrap_or(&token).to_owned();
    faulty.inject(layer(&image, 1), Fault::Hang(100), 1);
    ctl.ok(&["pull", "--detach", &reference]).unwrap();
    faulty.wait_for(&layer(&image, 1), 1, TIMEOUT).unwrap();
    wait_until("the first layer", TIMEOUT, || site.has_layer(&image.layers[0].diff_id)).unwrap();
    let (job, ordered) = (site.job(&reference).unwrap()["id"].clone(), orders(&ctl).unwrap());
    for word in ["yearly", "parallel_layers: 2", "keep:1", "keep_last: 3", "pull_on_demand: true"] {
        assert!(ordered.contains(word), "no {word} in {ordered}");
    }

    let mut second = site.second().unwrap();
    assert!(!leads(&second).unwrap());
    with_token(&second.ctl(), &token).ok(&["images"]).unwrap();
    site.coordinator().kill9().unwrap();
    faulty.heal();
    wait_until("the other coordinator to lead", TIMEOUT, || leads(&second)).unwrap();
    assert_eq!(orders(&second.ctl()).unwrap(), ordered);
    with_token(&second.ctl(), &token).ok(&["images"]).unwrap();
    second.ctl().ok(&["wait", &reference, "--timeout", "120s"]).unwrap();
    let jobs = second.ctl().json(&["jobs"]).unwrap();
    let published: Vec<&Value> = jobs["jobs"].as_array().unwrap().iter().collect();
    assert_eq!(
        (published.len(), &published[0]["id"], &published[0]["state"]),
        (1, &job, &"published".into()),
        "{jobs}"
    );
    assert_eq!(registry.blob_fetches(&image.layers[0].blob.digest), 1, "what was published is not fetched again");

    // The first coordinator must know these changes when it is back.
    second.ctl().ok(&["schedule", "remove", "yearly"]).unwrap();
    second.ctl().ok(&["schedule", "add", "hourly", "--image", &reference, "--every", "1h"]).unwrap();
    second.ctl().ok(&["token", "revoke", "ci"]).unwrap();
    let ordered = orders(&second.ctl()).unwrap();
    site.coordinator().restart().unwrap();
    let refused = with_token(&site.ctl(), &token).run(&["images"]).unwrap();
    assert!(refused.code == 1 && refused.stderr.contains("stands by"), "{}", refused.stderr);
    second.kill9().unwrap();
    wait_until("the return", TIMEOUT, || Ok(site.ctl().json(&["status"])?["role"] == "leader")).unwrap();
    assert_eq!(orders(&site.ctl()).unwrap(), ordered);
    assert!(!ordered.contains("yearly") && ordered.contains("hourly"), "{ordered}");
    let refused = with_token(&site.ctl(), &token).run(&["images"]).unwrap();
    assert!(refused.code == 1 && refused.stderr.contains("not known here"), "{}", refused.stderr);
}

#[test]
fn a_standby_hears_of_changes_while_it_waits() {
    let site = Site::start().unwrap();
    let second = site.second().unwrap();
    let token = site.ctl().json(&["token", "create", "ci", "--role", "viewer"]).unwrap();
    let token = token["token"].as_str().unwrap();
    let knows = || Ok(with_token(&second.ctl(), token).run(&["images"])?.succeeded());
    wait_until("the token at the standby", LONG, knows).unwrap();
    site.ctl().ok(&["token", "revoke", "ci"]).unwrap();
    wait_until("its end", LONG, || Ok(!knows()?)).unwrap();
}

/// harbor #15110: a token revoked at one instance was accepted by another until its cache was renewed.
#[test]
fn a_token_that_the_leader_has_revoked_is_refused_by_the_standby_at_once() {
    let site = Site::start().unwrap();
    let second = site.second().unwrap();
    for round in 0..5 {
        let name = format!("ci-{round}");
        let token = site.ctl().json(&["token", "create", &name, "--role", "viewer"]).unwrap();
        let token = token["token"].as_str().unwrap().to_owned();
        let ask = || with_token(&second.ctl(), &token).run(&["images"]).unwrap();
        assert_eq!(ask().code, 0, "{}", ask().stderr);
        site.ctl().ok(&["token", "revoke", &name]).unwrap();
        let refused = ask();
        assert!(refused.code == 1 && refused.stderr.contains("stands by"), "round {round}: {refused:?}");
    }
}

#[test]
fn a_lost_database_loses_no_order() {
    let mut site = Site::start().unwrap();
    site.ctl().ok(&["schedule", "add", "nightly", "--image", "127.0.0.1:1/a:1", "--cron", "0 4 * * *"]).unwrap();
    let token = site.ctl().json(&["token", "create", "ci", "--role", "viewer"]).unwrap();
    let ordered = orders(&site.ctl()).unwrap();
    site.coordinator().kill9().unwrap();
    std::fs::remove_dir_all(&site.coordinator().spec().state).unwrap();
    site.coordinator().restart().unwrap();
    assert_eq!(orders(&site.ctl()).unwrap(), ordered);
    with_token(&site.ctl(), token["token"].as_str().unwrap()).ok(&["images"]).unwrap();
    let handover_logs = site.files("ledger").unwrap();
    assert_eq!(handover_logs.len(), 1, "{handover_logs:?}");
    let secret = token["token"].as_str().unwrap().rsplit('_').next().unwrap();
    let handover_log = std::fs::read(&handover_logs[0]).unwrap();
    assert!(
        !handover_log.windows(secret.len()).any(|bytes| bytes == secret.as_bytes()),
        "the secret is not in the store"
    );
}

#[test]
fn an_archive_that_stayed_behind_is_said_to_have() {
    let image = small().unwrap();
    // The coordinator dies after it has opened the archive's job.
    let dying = SiteSpec { arguments: vec!["--crash-at=load.job_opened".to_owned()], ..SiteSpec::default() };
    let mut site = Site::start_with(&dying).unwrap();
    let archive = site.path().join("small.tar");
    run(Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&image.oci).arg(".")).unwrap().ok().unwrap();
    let _loading = site.begin("load", &["load", &archive.display().to_string()]).unwrap();
    site.coordinator().process().wait(TIMEOUT).unwrap();
    // The machine is lost together with its disk.
    std::fs::remove_dir_all(&site.coordinator().spec().state).unwrap();
    let spec = coordinator_spec(site.path(), "second", &SiteSpec::default()).unwrap();
    let second = Coordinator::start(spec).unwrap();
    wait_until("the archive's job to end", TIMEOUT, || {
        let jobs = second.ctl().json(&["jobs"])?;
        let archive = jobs["jobs"].as_array().into_iter().flatten().find(|job| job["source"] == "archive").cloned();
        let reason = archive.as_ref().and_then(|job| job["reason"].as_str()).unwrap_or_default();
        Ok(archive.as_ref().is_some_and(|job| job["state"] == "failed") && reason.contains("run cachefsctl load again"))
    })
    .unwrap();
}

/// kubernetes PR #75368, consul-helm #698: clients ended when a coordinator restarted, although its job continued.
#[test]
fn whoever_waits_goes_on_over_a_restart() {
    let (registry, mut site, image) = (Registry::start().unwrap(), Site::start().unwrap(), small().unwrap());
    let faulty = FaultyRegistry::start(&registry.address()).unwrap();
    registry.push(&image, "small", "1").unwrap();
    let reference = faulty.reference("small", "1");
    faulty.inject(Match::Blobs, Fault::Slow(5000, Duration::from_millis(100)), 100);
    let mut pull = site.begin("pull", &["pull", &reference]).unwrap();
    let is_under_way = || Ok(site.job(&reference).is_ok_and(|job| job["state"] == "fetching"));
    wait_until("a job under way", TIMEOUT, is_under_way).unwrap();
    let mut wait = site.begin("wait", &["wait", &reference, "--timeout", "5m"]).unwrap();
    let watch = site.begin("watch", &["--json", "jobs", "--watch"]).unwrap();
    wait_until("the list of jobs", TIMEOUT, || Ok(watch.log().contains("fetching"))).unwrap();
    assert!(site.coordinator().stop().unwrap().success());
    let still_there = |process: &Process| Ok(process.log().contains("trying again"));
    for waiting in [&pull, &wait, &watch] {
        wait_until("another try", TIMEOUT, || still_there(waiting)).unwrap();
    }
    faulty.heal();
    site.coordinator().restart().unwrap();
    for waiting in [&mut pull, &mut wait] {
        assert!(waiting.wait(LONG).unwrap().success(), "{}", waiting.log());
    }
    assert_eq!(pull.log().matches("trying again").count(), 1, "said once: {}", pull.log());
    wait_until("its end in the list", TIMEOUT, || Ok(watch.log().contains("published"))).unwrap();
    assert_eq!(site.job(&reference).unwrap()["id"], 1, "the job went on");

    site.coordinator().stop().unwrap();
    let away = site.ctl().run(&["wait", &reference, "--timeout", "2s"]).unwrap();
    assert!(away.code == 1 && away.stderr.contains("cannot reach the coordinator"), "{away:?}");
}

#[test]
fn whoever_waits_goes_on_when_another_takes_over() {
    let (registry, mut site, image) = (Registry::start().unwrap(), Site::start().unwrap(), small().unwrap());
    let faulty = FaultyRegistry::start(&registry.address()).unwrap();
    registry.push(&image, "small", "1").unwrap();
    let reference = faulty.reference("small", "1");
    let second = site.second().unwrap();
    // One address that leads to the active coordinator, like a DNS name or a load balancer.
    let address = site.path().join("address.sock");
    std::os::unix::fs::symlink(site.coordinator().socket(), &address).unwrap();
    let ctl = Ctl { server: format!("unix:{}", address.display()), environment: Vec::new() };
    let begin = |name: &str, arguments: &[&str]| {
        Process::spawn(name, &mut ctl.command(arguments).unwrap(), &site.path().join(name)).unwrap()
    };
    faulty.inject(layer(&image, 1), Fault::Hang(100), 1);
    let mut pull = begin("pull.log", &["pull", &reference]);
    faulty.wait_for(&layer(&image, 1), 1, TIMEOUT).unwrap();
    let mut wait = begin("wait.log", &["wait", &reference, "--timeout", "5m"]);
    std::fs::remove_file(&address).unwrap();
    std::os::unix::fs::symlink(second.socket(), &address).unwrap();
    site.coordinator().kill9().unwrap();
    faulty.heal();
    for waiting in [&mut pull, &mut wait] {
        assert!(waiting.wait(LONG).unwrap().success(), "{}", waiting.log());
    }
    assert!(pull.log().contains("trying again"), "{}", pull.log());
    assert!(leads(&second).unwrap());
}
