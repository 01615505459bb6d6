//! Schedules, settings, webhooks and the readiness gate, through the command line and a real registry.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::cluster::binary;
use tests::http;
use tests::images::small;
use tests::process::{TIMEOUT, exit_code, wait_until};
use tests::registry::{Fault, FaultyRegistry, Match, Registry, free_port};
use tests::site::{Site, SiteSpec};

/// How long a small image may take on a loaded machine.
const LONG: Duration = Duration::from_secs(120);

fn published(site: &Site, image: &str) -> Result<()> {
    wait_until(&format!("{image} published"), LONG, || Ok(site.images()?.iter().any(|name| name == image)))
}

/// The standard error of a command that must fail.
fn refusal(site: &Site, arguments: &[&str]) -> Result<String> {
    let output = site.ctl().run(arguments)?;
    ensure!(output.code == 1, "{arguments:?} exited with {}", output.code);
    Ok(output.stderr)
}

#[test]
fn a_schedule_lives_and_survives_its_coordinator() {
    let (registry, mut site) = (Registry::start().unwrap(), Site::start().unwrap());
    let image = registry.push(&small().unwrap(), "app", "v1").unwrap();
    let ctl = site.ctl();
    let added = ctl.json(&[
        "schedule",
        "add",
        "nightly",
        "--image",
        &image,
        "--cron",
        "0 3 * * *",
        "--time-zone",
        "Europe/Berlin",
    ]);
    let added = added.unwrap();
    assert_eq!(added["trigger"], "cron 0 3 * * * (Europe/Berlin)");
    assert!(added["next_at"].as_str().is_some_and(|next| next.ends_with(":00:00Z")), "{added}");
    let again = refusal(&site, &["schedule", "add", "nightly", "--image", &image, "--every", "1h"]).unwrap();
    assert!(again.contains("there is a schedule nightly already"), "{again}");
    let bad = refusal(&site, &["schedule", "add", "bad", "--image", &image, "--cron", "99 * * * *"]).unwrap();
    assert!(bad.contains("schedule bad: \"99 * * * *\" is not a cron expression"), "{bad}");
    let run = ctl.run(&["schedule", "pause", "nobody", "nightly", "nowhere"]).unwrap();
    assert!(run.code == 1 && run.stdout.contains("paused nightly"), "the others are done: {}", run.stdout);
    assert!(run.stderr.contains("schedule nobody") && run.stderr.contains("schedule nowhere"), "{}", run.stderr);
    site.coordinator().kill9().unwrap();
    site.coordinator().restart().unwrap();
    let shown = ctl.json(&["schedule", "show", "nightly"]).unwrap();
    assert_eq!((&shown["spec"]["paused"], &shown["next_at"]), (&Value::Bool(true), &Value::Null));
    ctl.ok(&["schedule", "resume", "nightly"]).unwrap();
    let run = ctl.json(&["schedule", "run", "nightly"]).unwrap();
    published(&site, &image).unwrap();
    assert_eq!(site.job(&image).unwrap()["id"], run["jobs"][0]);
    assert_eq!(site.job(&image).unwrap()["origin"], "schedule nightly");
    wait_until("the run is over", TIMEOUT, || {
        Ok(ctl.json(&["schedule", "show", "nightly"])?["runs"][0]["state"] == "published")
    })
    .unwrap();
    let list = ctl.ok(&["schedule", "list"]).unwrap();
    assert!(list.contains("nightly") && list.contains("published"), "{list}");
    ctl.ok(&["schedule", "remove", "nightly"]).unwrap();
    assert!(refusal(&site, &["schedule", "show", "nightly"]).unwrap().contains("there is no schedule nightly"));
}

#[test]
fn tags_are_chosen_by_pattern_and_watched() {
    let (registry, site) = (Registry::start().unwrap(), Site::start().unwrap());
    let small = small().unwrap();
    for tag in ["v1.2.0", "v1.10.0", "v1.9.0", "v2.0.0", "latest"] {
        registry.push(&small, "app", tag).unwrap();
    }
    let images = registry.reference("app", "v*");
    let arguments = ["schedule", "add", "new", "--image", &images, "--tag-move", "--every", "10s", "--newest", "2"];
    site.ctl().ok(&[&arguments[..], &["--semver", "^1"]].concat()).unwrap();
    published(&site, &registry.reference("app", "v1.10.0")).unwrap();
    published(&site, &registry.reference("app", "v1.9.0")).unwrap();
    registry.push(&small, "app", "v1.11.0").unwrap();
    published(&site, &registry.reference("app", "v1.11.0")).unwrap();
    let images = site.images().unwrap();
    assert!(!images.iter().any(|name| name.ends_with("v2.0.0") || name.ends_with("v1.2.0")), "{images:?}");
    let jobs = site.ctl().json(&["jobs"]).unwrap();
    assert_eq!(jobs["jobs"].as_array().unwrap().len(), 3, "only what moved made jobs: {jobs}");
}

#[test]
fn a_deadline_is_planned_shown_and_met() {
    let (registry, site) = (Registry::start().unwrap(), Site::start().unwrap());
    let image = registry.push(&small().unwrap(), "app", "v1").unwrap();
    let soon = std::time::SystemTime::now() + Duration::from_secs(25);
    let deadline = run_date(soon).unwrap();
    site.ctl().ok(&["schedule", "add", "soon", "--image", &image, "--ready-by", &deadline]).unwrap();
    let mut plan = Value::Null;
    wait_until("a forecast", TIMEOUT, || {
        plan = site.ctl().json(&["schedule", "plan"])?;
        Ok(plan["entries"][0]["missing_bytes"].as_u64().is_some_and(|bytes| bytes > 100_000))
    })
    .unwrap();
    // So close to the deadline, the job may be running already.
    assert!(["planned", "running"].contains(&plan["entries"][0]["state"].as_str().unwrap()), "{plan}");
    let text = site.ctl().ok(&["schedule", "plan"]).unwrap();
    assert!(text.contains("TIMELINE") && text.contains("soon") && text.contains('|'), "{text}");
    published(&site, &image).unwrap();
    let mut shown = Value::Null;
    wait_until("a score", TIMEOUT, || {
        shown = site.ctl().json(&["schedule", "show", "soon"])?;
        Ok(shown["accuracy"]["scored"] == 1)
    })
    .unwrap();
    assert_eq!(shown["accuracy"]["in_time"], 1, "{shown}");
}

/// The time in RFC 3339 format, in whole seconds.
fn run_date(time: std::time::SystemTime) -> Result<String> {
    let seconds = time.duration_since(std::time::UNIX_EPOCH)?.as_secs();
    let mut date = std::process::Command::new("date");
    tests::process::run(date.args(["-u", "-d", &format!("@{seconds}"), "+%Y-%m-%dT%H:%M:%SZ"]))?.ok()
}

const DOCUMENT: &str = "\
schedules:
  - name: nightly
    images: [registry.example.com/app:1]
    cron: 0 3 * * *
  - name: pushed
    images: ['registry.example.com/team/app:v1.*']
    on_push: true
    priority: 5
pins: [registry.example.com/app:1]
retention:
  rules: [{pattern: 'registry.example.com/team/*:pr-*', keep_last: 5}]
limits:
  bandwidth: 20M
  windows:
    - {from: '08:00', to: '18:00', time_zone: Europe/Berlin, bandwidth: 2M}
  registries:
    registry.example.com: {parallel_layers: 2, requests_per_minute: 600}
pull_on_demand: true
";

#[test]
fn a_document_is_applied_once_and_shown_back() {
    let site = Site::start().unwrap();
    let file = site.path().join("settings.yaml");
    let path = file.to_string_lossy().into_owned();
    let wrong = "schedules:\n  - {name: never, images: [registry.example.com/app:1], cron: 0 0 30 2 *}\n";
    std::fs::write(&file, format!("{wrong}pull_on_demand: true\n")).unwrap();
    for refused in [&["apply", path.as_str(), "--dry-run"][..], &["apply", path.as_str()]] {
        assert!(refusal(&site, refused).unwrap().contains("no time that ever comes"));
    }
    assert!(!site.ctl().ok(&["apply", "--show"]).unwrap().contains("pull_on_demand: true"), "all of it or nothing");
    std::fs::write(&file, DOCUMENT).unwrap();
    let ctl = site.ctl();
    let dry = ctl.ok(&["apply", &path, "--dry-run"]).unwrap();
    assert!(dry.contains("+ schedule nightly: ") && dry.contains("nothing was changed"), "{dry}");
    assert_eq!(ctl.json(&["schedule", "list"]).unwrap()["schedules"], Value::Array(Vec::new()));
    let diff = ctl.run(&["diff", &path]).unwrap();
    assert!(diff.code == 1 && diff.stdout.contains("+ schedule nightly: "), "{diff:?}");
    assert!(diff.stderr.contains("differences: cachefsctl apply "), "{diff:?}");
    assert!(ctl.ok(&["apply", &path]).unwrap().ends_with("applied: 6 added, 2 changed"));
    assert_eq!(ctl.ok(&["diff", "-f", &path]).unwrap(), "nothing differs");
    assert_eq!(ctl.ok(&["apply", "--filename", &path]).unwrap(), "nothing differs");
    assert_eq!(ctl.run(&["apply", "-f", &path, &path]).unwrap().code, 2, "one document");
    let shown = ctl.ok(&["apply", "--show"]).unwrap();
    std::fs::write(&file, format!("{shown}\n")).unwrap();
    assert_eq!(ctl.ok(&["apply", &path]).unwrap(), "nothing differs", "{shown}");
    std::fs::write(&file, "schedules:\n  - {name: nightly, images: [registry.example.com/app:1], cron: 0 4 * * *}\n")
        .unwrap();
    let changed = ctl.ok(&["apply", &path]).unwrap();
    assert!(changed.contains("~ schedule nightly: cron: 0 3 * * * -> 0 4 * * *"), "{changed}");
    assert!(changed.contains("- schedule pushed: "), "{changed}");
    assert!(ctl.ok(&["apply", "--show"]).unwrap().contains("bandwidth"), "what is not named stays");
    std::fs::write(&file, "schedules:\n  - name: x\n    image: [a]\n").unwrap();
    let unknown = refusal(&site, &["apply", &path]).unwrap();
    assert!(unknown.contains("settings.yaml:3:5: ") && unknown.contains("image"), "{unknown}");
    std::fs::write(&file, "limits: {bandwidth: '0'}\n").unwrap();
    assert!(refusal(&site, &["apply", &path]).unwrap().contains("stop everything"));
}

/// Runs `cachefsctl apply FILE` in a terminal, with this answer to its question.
fn apply_at_a_terminal(site: &Site, path: &str, answer: &str) -> Result<(i32, String)> {
    let command = format!("{} --server {} apply {path}", binary("cachefsctl")?.display(), site.ctl().server);
    let mut script = Command::new("script");
    script.args(["-qec", &command, "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = script.spawn()?;
    child.stdin.take().context("no input")?.write_all(answer.as_bytes())?;
    let output = child.wait_with_output()?;
    Ok((exit_code(output.status), String::from_utf8_lossy(&output.stdout).into_owned()))
}

#[test]
fn a_deadline_that_has_passed_keeps_no_document_from_being_applied() {
    let site = Site::start().unwrap();
    let file = site.path().join("settings.yaml");
    let path = file.to_string_lossy().into_owned();
    let past = "schedules:\n  - {name: past, images: [registry.example.com/app:1], ready_by: '2026-01-01T00:00:00Z'}\n";
    std::fs::write(&file, format!("{past}pull_on_demand: true\n")).unwrap();
    let applied = site.ctl().run(&["apply", &path]).unwrap();
    assert!(
        applied.code == 0 && applied.stderr.contains("past: ready_by 2026-01-01T00:00:00Z has passed"),
        "{applied:?}"
    );
    assert!(site.ctl().ok(&["apply", "--show"]).unwrap().contains("pull_on_demand: true"));
    let again = site.ctl().run(&["apply", &path]).unwrap();
    assert_eq!((again.stdout.trim(), again.stderr.as_str()), ("nothing differs", ""));
    let list = site.ctl().ok(&["schedule", "list"]).unwrap();
    assert!(list.lines().any(|line| line.starts_with("past") && line.contains("over")), "{list}");
    let one = ["--image", "r.io/app:1", "--ready-by", "2026-01-01T00:00:00Z"];
    let added = site.ctl().run(&[&["schedule", "add", "late"][..], &one[..]].concat()).unwrap();
    assert!(added.code == 1 && added.stderr.contains("has passed"), "{added:?}");
}

#[test]
fn only_a_terminal_is_asked_before_something_is_removed() {
    let site = Site::start().unwrap();
    let file = site.path().join("settings.yaml");
    let path = file.to_string_lossy().into_owned();
    std::fs::write(&file, DOCUMENT).unwrap();
    let (code, said) = apply_at_a_terminal(&site, &path, "").unwrap();
    assert!(code == 0 && said.contains("applied: ") && !said.contains("[y/N]"), "nothing is removed: {said}");
    std::fs::write(&file, "schedules: []\n").unwrap();
    let (code, said) = apply_at_a_terminal(&site, &path, "n\n").unwrap();
    assert!(code == 1 && said.contains("- schedule nightly: ") && said.contains("[y/N]"), "{said}");
    assert!(said.contains("nothing was changed"), "{said}");
    assert_eq!(site.ctl().json(&["schedule", "list"]).unwrap()["schedules"].as_array().unwrap().len(), 2);
    let (code, said) = apply_at_a_terminal(&site, &path, "y\n").unwrap();
    assert!(code == 0 && said.contains("applied: 2 removed"), "{said}");
    std::fs::write(&file, DOCUMENT).unwrap();
    site.ctl().ok(&["apply", &path]).unwrap();
    std::fs::write(&file, "schedules: []\n").unwrap();
    assert!(site.ctl().ok(&["apply", &path]).unwrap().ends_with("applied: 2 removed"), "nobody is there to be asked");
}

#[test]
fn what_is_in_a_zone_that_has_gone_is_kept_and_told() {
    let zones = tempfile::tempdir().unwrap();
    for zone in ["Berlin", "Paris"] {
        std::fs::create_dir_all(zones.path().join("Europe")).unwrap();
        std::fs::copy(format!("/usr/share/zoneinfo/Europe/{zone}"), zones.path().join("Europe").join(zone)).unwrap();
    }
    let environment = vec![("TZDIR".to_owned(), zones.path().to_string_lossy().into_owned())];
    let mut site = Site::start_with(&SiteSpec { environment, ..SiteSpec::default() }).unwrap();
    let (ctl, file) = (site.ctl(), site.path().join("settings.yaml"));
    let path = file.to_string_lossy().into_owned();
    std::fs::write(&file, DOCUMENT).unwrap();
    ctl.ok(&["apply", &path]).unwrap();
    let add = |name: &str, zone: &str| {
        let when = ["--cron", "@midnight", "--time-zone", zone];
        ctl.run(&[&["schedule", "add", name, "--image", "r.io/app:1"], &when[..]].concat()).unwrap()
    };
    assert_eq!((add("berlin", "Europe/Berlin").code, add("paris", "Europe/Paris").code), (0, 0));
    let unknown = add("mars", "Mars/Olympus");
    assert!(unknown.code == 1 && unknown.stderr.contains("\"Mars/Olympus\" is not a time zone"), "{unknown:?}");
    let before = ctl.ok(&["apply", "--show"]).unwrap();
    std::fs::remove_file(zones.path().join("Europe/Berlin")).unwrap();
    site.coordinator().restart().unwrap();
    wait_until("the coordinator leads", TIMEOUT, || Ok(ctl.run(&["schedule", "list"])?.code == 0)).unwrap();
    let shown = |name: &str| ctl.json(&["schedule", "show", name]).unwrap();
    let broken = shown("berlin");
    assert_eq!((&broken["broken"], &broken["next_at"]), (&Value::Bool(true), &Value::Null), "{broken}");
    assert!(broken["trouble"].as_str().is_some_and(|why| why.contains("Europe/Berlin")), "{broken}");
    assert_eq!((&shown("paris")["broken"], shown("paris")["next_at"].is_string()), (&Value::Bool(false), true));
    let list = ctl.ok(&["schedule", "list"]).unwrap();
    let line = list.lines().find(|line| line.starts_with("berlin")).unwrap();
    assert!(line.contains("cron @midnight (Europe/Berlin)") && line.contains("broken"), "{list}");
    let events = ctl.ok(&["events", "--since", "0"]).unwrap();
    assert!(events.contains("schedule berlin is kept and makes no jobs"), "{events}");
    assert!(events.contains("08:00 to 18:00 holds its 2M at all times"), "{events}");
    let status = ctl.ok(&["status"]).unwrap();
    assert_eq!(status.matches("Trouble: ").count(), 2, "{status}");
    assert_eq!(ctl.ok(&["apply", "--show"]).unwrap(), before, "all of it is kept");
    std::fs::write(&file, &before).unwrap();
    assert_eq!(ctl.ok(&["apply", &path]).unwrap(), "nothing differs");
    std::fs::write(&file, "pins: []\n").unwrap();
    assert!(ctl.ok(&["apply", &path]).unwrap().contains("1 removed"), "other settings can be changed");
    let run = refusal(&site, &["schedule", "run", "berlin"]).unwrap();
    assert!(run.contains("schedule berlin cannot run") && run.contains("Europe/Berlin"), "{run}");
    std::fs::copy("/usr/share/zoneinfo/Europe/Berlin", zones.path().join("Europe/Berlin")).unwrap();
    let status = || ctl.ok(&["status"]);
    wait_until("the zone is found again", LONG, || Ok(!status()?.contains("Trouble: "))).unwrap();
    assert_eq!((&shown("berlin")["broken"], shown("berlin")["next_at"].is_string()), (&Value::Bool(false), true));
    let events = ctl.ok(&["events", "--since", "0"]).unwrap();
    assert!(events.contains("schedule berlin is understood again"), "{events}");
    assert!(events.contains("all limits are understood again"), "{events}");
}

#[test]
fn bandwidth_is_kept_and_may_change_while_a_pull_runs() {
    let (registry, site) = (Registry::start().unwrap(), Site::start().unwrap());
    let small = small().unwrap();
    let image = registry.push(&small, "app", "v1").unwrap();
    let file = site.path().join("limits.yaml");
    let path = file.to_string_lossy().into_owned();
    std::fs::write(&file, "limits: {bandwidth: 20k}\n").unwrap();
    site.ctl().ok(&["apply", &path]).unwrap();
    site.ctl().ok(&["pull", "--detach", &image]).unwrap();
    site.wait_for_job(&image, &["fetching"], TIMEOUT).unwrap();
    let began = Instant::now();
    std::thread::sleep(Duration::from_secs(3));
    let job = site.job(&image).unwrap();
    let (done, seconds) = (job["bytes_fetched"].as_u64().unwrap(), began.elapsed().as_secs_f64());
    assert_eq!(job["state"], "fetching", "{} bytes take longer than that", small.compressed_size());
    assert!((done as f64) < 20_000.0 * (seconds + 30.0), "{done} bytes in {seconds} s");
    std::fs::write(&file, "limits: {}\n").unwrap();
    site.ctl().ok(&["apply", &path]).unwrap();
    site.wait_for_job(&image, &["published"], LONG).unwrap();
}

#[test]
fn a_real_registrys_webhook_pulls_what_was_pushed() {
    let port = free_port().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let secret = directory.path().join("secret");
    std::fs::write(&secret, "a-long-random-word\n").unwrap();
    let spec = SiteSpec {
        settings: format!("webhook_secret_file = {:?}", secret.display().to_string()),
        listen: Some(format!("127.0.0.1:{port}")),
        ..SiteSpec::default()
    };
    let site = Site::start_with(&spec).unwrap();
    let url = format!("http://127.0.0.1:{port}/v1/hooks/docker-registry");
    let registry = Registry::start_notifying(&url, "a-long-random-word").unwrap();
    let images = registry.reference("team/app", "v*");
    site.ctl().ok(&["schedule", "add", "pushed", "--image", &images, "--on-push"]).unwrap();
    let small = small().unwrap();
    let image = registry.push_through(&small, "team/app", "v1").unwrap();
    published(&site, &image).unwrap();
    registry.push_through(&small, "team/other", "v1").unwrap();
    registry.push_through(&small, "team/app", "v2").unwrap();
    published(&site, &registry.reference("team/app", "v2")).unwrap();
    assert!(!site.images().unwrap().contains(&registry.reference("team/other", "v1")));
    let post = |path: &str, headers: &[(&str, &str)]| {
        http::request(&format!("127.0.0.1:{port}"), "POST", path, headers, 2, &b"{}"[..]).unwrap().status
    };
    assert_eq!(post("/v1/hooks/docker-hub", &[]), 401);
    assert_eq!(post("/v1/hooks/docker-hub", &[("Authorization", "Bearer wrong")]), 401);
    assert_eq!(post("/v1/hooks/docker-hub?token=a-long-random-word", &[]), 400, "no payload of Docker Hub");
    assert_eq!(post("/v1/hooks/gitlab?token=a-long-random-word", &[]), 404);
}

#[test]
fn without_a_secret_no_webhook_is_accepted() {
    let port = free_port().unwrap();
    let site =
        Site::start_with(&SiteSpec { listen: Some(format!("127.0.0.1:{port}")), ..SiteSpec::default() }).unwrap();
    let ask = || http::request(&format!("127.0.0.1:{port}"), "POST", "/v1/hooks/harbor", &[], 2, &b"{}"[..]);
    wait_until("the coordinator leads", TIMEOUT, || Ok(ask()?.status != 503)).unwrap();
    let answer = ask().unwrap();
    assert_eq!(answer.status, 401);
    assert!(String::from_utf8_lossy(&answer.body).contains("webhook_secret_file"), "{answer:?}");
    drop(site);
}

#[test]
fn waiting_raises_pulls_and_says_why_it_was_in_vain() {
    let (registry, site) = (Registry::start().unwrap(), Site::start().unwrap());
    let faulty = FaultyRegistry::start(&registry.address()).unwrap();
    registry.push(&small().unwrap(), "app", "v1").unwrap();
    let image = faulty.reference("app", "v1");
    let nobody = refusal(&site, &["wait", &image, "--timeout", "1s"]).unwrap();
    assert!(nobody.contains("no job pulls it"), "{nobody}");
    site.ctl().ok(&["schedule", "add", "nightly", "--image", &image, "--cron", "0 3 * * *"]).unwrap();
    let later = refusal(&site, &["wait", &image, "--timeout", "1s"]).unwrap();
    assert!(later.contains("schedule nightly pulls it at"), "{later}");
    let (began, absent) = (std::time::Instant::now(), faulty.reference("app", "absent"));
    let failed = refusal(&site, &["wait", &absent, "--timeout", "10m", "--pull"]).unwrap();
    assert!(failed.contains("failed: ") && failed.contains("has no image"), "{failed}");
    assert!(began.elapsed() < LONG, "nobody waits for what has failed");
    faulty.inject(Match::Blobs, Fault::Slow(5000, Duration::from_millis(100)), 100);
    let slow = refusal(&site, &["wait", &image, "--timeout", "3s", "--pull"]).unwrap();
    assert!(slow.contains("is fetching: ") && slow.contains(" bytes are there"), "{slow}");
    assert_eq!(site.job(&image).unwrap()["priority"], 100);
    let ready = site.ctl().ok(&["wait", &image, "--timeout", "120s"]).context("the image comes").unwrap();
    assert!(ready.contains("is published"), "{ready}");
}

#[test]
fn what_a_host_looks_for_in_vain_is_hurried_or_pulled() {
    let (registry, site) = (Registry::start().unwrap(), Site::start().unwrap());
    let faulty = FaultyRegistry::start(&registry.address()).unwrap();
    let small = small().unwrap();
    ["v1", "v2", "v3"].iter().for_each(|tag| drop(registry.push(&small, "app", tag).unwrap()));
    site.ctl().ok(&["pull", &faulty.reference("app", "v1")]).unwrap();
    let mount = tests::hosts::mount(&site, "one").unwrap();
    let path = |tag: &str| mount.path().join("images").join(faulty.address()).join("app").join(tag);
    wait_until("v1 on the host", TIMEOUT, || Ok(path("v1").exists())).unwrap();
    // The job does not progress. The host's request for the image raises its priority.
    faulty.inject(Match::Manifests, Fault::Hang(0), 1);
    site.ctl().ok(&["pull", "--detach", &faulty.reference("app", "v2")]).unwrap();
    assert!(!path("v2").exists());
    wait_until("the job raised", TIMEOUT, || Ok(site.job(&faulty.reference("app", "v2"))?["priority"] == 100)).unwrap();
    assert!(!path("v3").exists());
    std::thread::sleep(Duration::from_millis(500));
    assert!(site.job(&faulty.reference("app", "v3")).is_err(), "nothing is pulled on demand unless that is set");
    let file = site.path().join("settings.yaml");
    std::fs::write(&file, "pull_on_demand: true\n").unwrap();
    site.ctl().ok(&["apply", &file.to_string_lossy()]).unwrap();
    // The host reports a missing name only once in a while.
    wait_until("v3 on the host", LONG, || Ok(path("v3").exists())).unwrap();
    assert_eq!(site.job(&faulty.reference("app", "v3")).unwrap()["origin"], "a host");
}
