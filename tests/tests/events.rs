//! Events: each one is reported once, in order, to readers and to followers, even across restarts.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;
use tests::hosts::load;
use tests::http::request;
use tests::images::small;
use tests::process::{Process, TIMEOUT, wait_until};
use tests::registry::{Registry, free_port};
use tests::secured::Secured;
use tests::site::{Site, SiteSpec};

/// The events that a follower with `--json` has printed, without its warnings.
fn followed(follower: &Process) -> Result<Vec<Value>> {
    let log = follower.log();
    let lines = log.lines().filter(|line| line.starts_with("{\"id\""));
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
    wait_until("the first end", TIMEOUT, || Ok(has(&followed(&follower)?, "job.published", &image))).unwrap();
    site.coordinator().kill9().unwrap();
    wait_until("the follower notices", TIMEOUT, || Ok(follower.log().contains("trying again"))).unwrap();
    site.coordinator().restart().unwrap();
    let absent = registry.reference("absent", "1");
    assert_eq!(site.ctl().run(&["pull", &absent]).unwrap().code, 1);
    wait_until("the second end", TIMEOUT, || Ok(has(&followed(&follower)?, "job.failed", &absent))).unwrap();
    let events = followed(&follower).unwrap();
    let ids: Vec<u64> = events.iter().filter_map(|event| event["id"].as_u64()).collect();
    assert_eq!(ids, (1..=ids.len() as u64).collect::<Vec<_>>(), "each once, in order");
    let list = site.ctl().json(&["events", "--since", "0"]).unwrap();
    assert_eq!(list["events"].as_array(), Some(&events), "the same to those who look");
    let log = site.coordinator().process().log();
    let told = log.lines().find(|line| line.contains("kind=\"job.submitted\"")).unwrap_or_default();
    assert!(told.contains("actor=\"uid 0\""), "the log says who it was: {told:?}");
    let text = site.ctl().ok(&["events", "-n", "1"]).unwrap();
    assert!(text.lines().count() == 1 && text.contains("job.failed") && text.contains(&absent), "{text}");
}

#[test]
fn who_waits_for_events_does_not_hold_up_a_stop() {
    let mut site = Site::start().unwrap();
    let follower = site.begin("follower", &["--json", "events", "--follow", "--since", "0"]).unwrap();
    load(&site, &small().unwrap()).unwrap();
    wait_until("an event", TIMEOUT, || Ok(!followed(&follower)?.is_empty())).unwrap();
    let begun = Instant::now();
    assert!(site.coordinator().stop().unwrap().success());
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(4), "the follower's request was waited for: {took:?}");
}

#[test]
fn cancelled_and_retried_jobs_name_who_did_it() {
    let (mut registry, site) = (Registry::start().unwrap(), Site::start().unwrap());
    let image = registry.push(&small().unwrap(), "small", "1").unwrap();
    // While the registry hangs, the job does not end.
    registry.process().signal(nix::sys::signal::Signal::SIGSTOP).unwrap();
    let id = site.ctl().ok(&["pull", "-d", &image]).unwrap();
    site.ctl().ok(&["cancel", &id]).unwrap();
    site.wait_for_job(&image, &["cancelled"], TIMEOUT).unwrap();
    registry.process().signal(nix::sys::signal::Signal::SIGCONT).unwrap();
    site.ctl().ok(&["retry", &id]).unwrap();
    site.wait_for_job(&image, &["published"], TIMEOUT).unwrap();
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
    wait_until("the last event", TIMEOUT, || {
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

/// All events of one kind, each as actor, subject and message.
fn told(site: &Site, kind: &str) -> Result<Vec<[String; 3]>> {
    let list = site.ctl().json(&["events", "--since", "0", "-n", "1000"])?;
    let events = list["events"].as_array().context("no list of events")?.iter().filter(|event| event["kind"] == kind);
    let text = |event: &Value, name: &str| event[name].as_str().unwrap_or_default().to_owned();
    Ok(events.map(|event| ["actor", "subject", "message"].map(|name| text(event, name))).collect())
}

/// Waits for an event of this kind, actor and subject whose message contains these words.
fn check_told(site: &Site, [kind, actor, subject]: [&str; 3], words: &[&str]) -> Result<()> {
    let mut events = Vec::new();
    let waited = wait_until(&format!("the event {kind}"), TIMEOUT, || {
        events = told(site, kind)?;
        Ok(events.iter().any(|[by, about, message]| {
            (by.as_str(), about.as_str()) == (actor, subject) && words.iter().all(|word| message.contains(word))
        }))
    });
    waited.with_context(|| format!("{kind} by {actor} about {subject} with {words:?}, among {events:?}"))
}

#[test]
fn what_an_admin_does_is_told_in_words_with_name_and_object() {
    let secured =
        Secured::start(&SiteSpec { settings: "host_lease = '1s'\n".to_owned(), ..SiteSpec::default() }).unwrap();
    let (site, boss) = (&secured.site, secured.ctl(Some(&secured.token("boss", "admin", &[]).unwrap())));
    load(site, &small().unwrap()).unwrap();
    let image = site.images().unwrap().remove(0);
    let waits = || Ok(boss.json(&["gc", "--dry-run"])?["waiting"].is_null());
    wait_until("all hosts to be known", TIMEOUT, waits).unwrap();
    let document = site.path().join("wish.yaml").to_string_lossy().into_owned();
    std::fs::write(&document, "retention: {rules: [{pattern: 'x.io/*', keep_last: 5}]}\nlimits: {bandwidth: 9M}\n")
        .unwrap();
    let schedule = ["schedule", "add", "nightly", "--image", &image, "--every", "24h"];
    let archive = small().unwrap().docker_archive().unwrap().to_string_lossy().into_owned();
    for (arguments, kind, subject, words) in [
        (&["pin", &image][..], "image.pinned", image.as_str(), &["was pinned"][..]),
        (&["unpin", &image], "image.unpinned", &image, &["no longer pinned"]),
        (&["fsck", "--deep"], "fsck.started", "store", &["every byte", "was started"]),
        (&["fsck"], "fsck.finished", "store", &["is whole"]),
        (&["gc", "--grace", "7s"], "collection.begun", "store", &["a grace of 7 s"]),
        (&["gc"], "collection.begun", "store", &["the policy's grace"]),
        (&["gc"], "collection.finished", "store", &["0 objects"]),
        (&["apply", &document], "settings.applied", "settings", &["x.io/*", "keep_last 5", "bandwidth", "9M"]),
        (&schedule, "schedule.added", "nightly", &["was added"]),
        (&["schedule", "pause", "nightly"], "schedule.paused", "nightly", &["was paused"]),
        (&["schedule", "resume", "nightly"], "schedule.resumed", "nightly", &["goes on"]),
        (&["schedule", "remove", "nightly"], "schedule.removed", "nightly", &["was removed"]),
        (&["token", "create", "t", "--role", "host"], "token.created", "t", &["role host", "all images"]),
        (&["token", "revoke", "t"], "token.revoked", "t", &["was revoked"]),
        (&["load", &archive], "job.submitted", &image, &["was sent as an archive"]),
        (&["remove", &image], "image.removed", &image, &["taken out of the catalogue"]),
    ] {
        boss.ok(arguments).unwrap();
        check_told(site, [kind, "token boss", subject], words).unwrap();
    }
    let refused = boss.run(&["fsck", "--stop"]).unwrap();
    assert_eq!((refused.code, told(site, "fsck.stopping").unwrap().len()), (1, 0), "what is refused is not told");
    assert_eq!(told(site, "admin.change").unwrap(), Vec::<[String; 3]>::new(), "nothing is told as a request only");
}

#[test]
fn a_collection_at_its_hour_is_nobodys_and_a_change_of_what_is_kept_says_what_changed() {
    let address = format!("127.0.0.1:{}", free_port().unwrap());
    let settings = "host_lease = '1s'\n".to_owned();
    let site = Site::start_with(&SiteSpec { listen: Some(address.clone()), settings, ..SiteSpec::default() }).unwrap();
    let put = |policy: &str| {
        let headers = [("Content-Type", "application/json")];
        request(&address, "PUT", "/v1/retention", &headers, policy.len() as u64, policy.as_bytes()).unwrap()
    };
    let waits = || Ok(site.ctl().json(&["gc", "--dry-run"])?["waiting"].is_null());
    wait_until("all hosts to be known", TIMEOUT, waits).unwrap();
    let policy = r#"{"rules": [{"pattern": "x.io/**", "keep_last": 2}], "collect": {"every_seconds": 1}}"#;
    assert_eq!(put(policy).status, 200);
    let words = ["x.io/**", "keep_last 2", "every_seconds 3600", "every_seconds 1"];
    check_told(&site, ["retention.changed", "loopback", "retention"], &words).unwrap();
    check_told(&site, ["collection.finished", "", "store"], &["0 objects"]).unwrap();
    assert_eq!(put(policy).status, 200);
    assert_eq!(put(r#"{"rules": [{"pattern": "["}]}"#).status, 400);
    assert_eq!(told(&site, "retention.changed").unwrap().len(), 1, "neither what is as it was nor what is refused");
}

#[test]
fn a_look_begins_where_and_when_one_wants() {
    let site = Site::start().unwrap();
    load(&site, &small().unwrap()).unwrap();
    let ids = |arguments: &[&str]| -> Vec<u64> {
        let list = site.ctl().json(&[&["events"], arguments].concat()).unwrap();
        list["events"].as_array().unwrap().iter().filter_map(|event| event["id"].as_u64()).collect()
    };
    let all = ids(&["--since", "0"]);
    let last = *all.last().unwrap();
    assert!(all.len() > 1 && all == (1..=last).collect::<Vec<_>>(), "{all:?}");
    for since in ["10m", "2000-01-01T00:00:00Z", "2000-01-01"] {
        assert_eq!(ids(&["--since", since]), all, "{since}");
    }
    assert_eq!(ids(&["--since", "1h", "-n", "1"]), [1], "the first ones");
    for none in
        [&["-n", "0"][..], &["--since", "0", "-n", "0"], &["--since", "2999-01-01"], &["--since", &last.to_string()]]
    {
        assert_eq!(ids(none), Vec::<u64>::new(), "{none:?}");
    }
    let list = site.ctl().json(&["events", "--since", "0"]).unwrap();
    let second = list["events"][1]["at"].as_str().unwrap();
    assert_eq!(
        ids(&["--since", second])[0],
        all.iter().copied().find(|id| list["events"][*id as usize - 1]["at"].as_str() >= Some(second)).unwrap()
    );

    let beyond = site.ctl().run(&["events", "--since", "4711"]).unwrap();
    let words = format!("event 4711 has not happened yet: the last one is {last}");
    assert!(beyond.code == 1 && beyond.stdout.is_empty() && beyond.stderr.contains(&words), "{beyond:?}");
    let nonsense = site.ctl().run(&["events", "--since", "soon"]).unwrap();
    assert!(nonsense.code == 2 && nonsense.stderr.contains("write 4711, 10m or 2026-"), "{nonsense:?}");

    let new = site.begin("new", &["--json", "events", "-n", "0", "--follow"]).unwrap();
    let late = site.begin("late", &["--json", "events", "--since", "4711", "--follow"]).unwrap();
    wait_until("the warning", TIMEOUT, || Ok(late.log().contains("has not happened yet"))).unwrap();
    let image = site.images().unwrap().remove(0);
    // Followers see only new events, so pins are made until both followers have started.
    wait_until("what is new", TIMEOUT, || {
        site.ctl().ok(&["pin", &image])?;
        site.ctl().ok(&["unpin", &image])?;
        Ok(has(&followed(&new)?, "image.pinned", &image) && has(&followed(&late)?, "image.pinned", &image))
    })
    .unwrap();
    for follower in [new, late] {
        let seen: Vec<u64> = followed(&follower).unwrap().iter().filter_map(|event| event["id"].as_u64()).collect();
        assert!(seen.iter().all(|id| *id > last), "nothing old: {seen:?}");
    }
}
