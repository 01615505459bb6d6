//! Misuse of a host's token.

use tests::images::small;
use tests::registry::Registry;

use super::*;

/// A renewal by the host `id` that claims `count` layers, none of which another host claims.
fn renewal(id: &str, count: usize) -> String {
    let layer = |n: usize| format!("sha256:{:0>56}{n:08x}", hex_of(id));
    let layers: Vec<String> = (0..count).map(layer).collect();
    serde_json::json!({
        "id": id, "version": "1", "mountpoint": "/m", "images": [], "layers": layers, "cache_used": 0,
        "cache_limit": 0, "reads_hit": 0, "reads_missed": 0, "uptime_seconds": 0,
    })
    .to_string()
}

fn hex_of(text: &str) -> String {
    text.bytes().map(|byte| format!("{byte:02x}")).collect()
}

fn post(address: &str, path: &str, token: &str, body: &str) -> Result<Answer> {
    let headers = [("Authorization", token), ("Content-Type", "application/json")];
    ask(address, "POST", path, &headers, body.as_bytes())
}

#[test]
fn two_hundred_thousand_names_in_one_request_are_refused_at_once() {
    let (mut site, address) = open_site("").unwrap();
    let host = token(&site, "host", "host", &[]).unwrap();
    let watch = Watch::begin(site.coordinator()).unwrap();
    let request = |count: usize| {
        let images: Vec<String> = (0..count).map(|n| format!("127.0.0.1:1/n{n}")).collect();
        serde_json::json!({"images": images, "priority": 0, "platform": null}).to_string()
    };
    // A request with 200,000 names is larger than a body may be. The smaller counts are still too many names.
    let start = Instant::now();
    for count in [200_000, 60_000, 1001] {
        let (status, answer) = post(&address, "/v1/pulls", &host, &request(count)).unwrap();
        assert_eq!(status, 413, "{}", String::from_utf8_lossy(&answer));
    }
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    // In several requests, until the limit on waiting jobs is reached.
    let names = |round: usize| {
        let images: Vec<String> = (0..1000).map(|n| format!("127.0.0.1:1/r{round}/n{n}")).collect();
        serde_json::json!({"images": images, "priority": 0, "platform": null}).to_string()
    };
    let statuses: Vec<u16> = (0..8).map(|n| post(&address, "/v1/pulls", &host, &names(n)).unwrap().0).collect();
    assert!(statuses[0] == 200 && statuses.contains(&429), "{statuses:?}");
    watch.check(128 * MIB).unwrap();
    wait_for_renewals(&site, &watch.epoch).unwrap();
    // The audit events are not displaced: the token's creator is still recorded.
    let events = events(&site).unwrap();
    assert!(events.iter().any(|(kind, _)| kind == "token.created"), "the audit events are gone");
}

#[test]
fn what_hosts_of_one_token_say_is_bounded_and_goes_with_the_token() {
    let (mut site, address) = open_site("host_lease = '3s'\n").unwrap();
    let (host, other) = (token(&site, "host", "host", &[]).unwrap(), token(&site, "other", "host", &[]).unwrap());
    let watch = Watch::begin(site.coordinator()).unwrap();
    let statuses: Vec<u16> = (0..150)
        .map(|n| post(&address, "/v1/hosts/h/lease", &host, &renewal(&format!("h{n}"), 10_000)).unwrap().0)
        .collect();
    // On a slow machine the first leases of three seconds expire before the last ones are sent, so all requests may be accepted.
    assert!(statuses.iter().all(|status| [200, 429].contains(status)), "{statuses:?}");
    watch.check(256 * MIB).unwrap();
    assert_eq!(post(&address, "/v1/hosts/good/lease", &other, &renewal("good", 100)).unwrap().0, 200);
    site.ctl().ok(&["token", "revoke", "host"]).unwrap();
    let left = |site: &Site| {
        let hosts = site.ctl().json(&["hosts"])?;
        let names = hosts["hosts"].as_array().context("no hosts")?.iter().map(|host| host["name"].clone());
        Ok::<_, anyhow::Error>(names.filter(|name| name == "h").count())
    };
    wait_until("the revoked token's hosts to be forgotten", TIMEOUT, || Ok(left(&site)? == 0)).unwrap();
    site.coordinator().restart().unwrap();
    assert_eq!(left(&site).unwrap(), 0, "nor are they back after a restart");
    let all = site.ctl().json(&["hosts"]).unwrap();
    assert_eq!(all["hosts"].as_array().unwrap().len(), 1, "{all}");
}

#[test]
fn a_crawl_of_very_many_layers_does_not_lose_the_host_its_lease() {
    let (mut site, address) = open_site("").unwrap();
    let host = token(&site, "host", "host", &[]).unwrap();
    let watch = Watch::begin(site.coordinator()).unwrap();
    let (status, answer) = post(&address, "/v1/hosts/crawler/lease", &host, &renewal("c1", 100_000)).unwrap();
    assert_eq!(status, 200, "{}", String::from_utf8_lossy(&answer));
    let hosts = site.ctl().json(&["hosts"]).unwrap();
    assert_eq!((&hosts["hosts"][0]["layers_held"], &hosts["hosts"][0]["state"]), (&100_000.into(), &"live".into()));
    assert_eq!(hosts["hosts"][0]["layers"].as_array().unwrap().len(), 1000, "a list shows the first of them");
    let (status, answer) = post(&address, "/v1/hosts/crawler/lease", &host, &renewal("c1", 100_001)).unwrap();
    assert_eq!(status, 400, "{}", String::from_utf8_lossy(&answer));
    watch.check(192 * MIB).unwrap();
}

/// Reports from `source` that an image is missing. Returns the status and the body of the answer.
fn want(address: &str, source: Ipv4Addr, token: &str, image: &str) -> Result<(u16, Value)> {
    let mut stream = connect_from(source, address)?;
    let body = serde_json::json!({"image": image}).to_string();
    let headers = [("Authorization", token), ("Content-Type", "application/json")];
    send(&mut stream, "POST", "/v1/wanted", &headers, body.as_bytes())?;
    let (status, answer) = receive(&mut stream)?;
    Ok((status, serde_json::from_slice(&answer)?))
}

#[test]
fn names_that_are_not_there_make_few_jobs_and_hold_up_no_other_host() {
    const NAMES: usize = 2000;
    let (registry, image) = (Registry::start().unwrap(), small().unwrap());
    let reference = registry.push(&image, "app", "1").unwrap();
    let second = registry.push(&image, "app", "2").unwrap();
    let (mut site, address) = open_site("").unwrap();
    let document = site.path().join("settings.yaml");
    std::fs::write(&document, "pull_on_demand: true\n").unwrap();
    site.ctl().ok(&["apply", &document.to_string_lossy()]).unwrap();
    let host = token(&site, "host", "host", &[]).unwrap();
    let (bad, good) = (Ipv4Addr::new(127, 0, 0, 2), Ipv4Addr::new(127, 0, 0, 3));
    let watch = Watch::begin(site.coordinator()).unwrap();
    let before = registry.accesses().len();
    let gone = |n: usize| registry.reference("app", &format!("gone-{n}"));
    let statuses: Vec<u16> = (0..NAMES).map(|n| want(&address, bad, &host, &gone(n)).unwrap().0).collect();
    // A host may request four minutes' worth of 30 a minute at once, plus what the rate allowed meanwhile.
    let taken = statuses.iter().filter(|status| **status == 200).count();
    assert!((120..240).contains(&taken) && statuses[NAMES - 1] == 429, "{taken} of {NAMES}");
    // Another host is served at once, with a whole image.
    let (status, answer) = want(&address, good, &host, &reference).unwrap();
    assert_eq!((status, &answer["outcome"]), (200, &"pulled".into()), "{answer}");
    site.ctl().ok(&["wait", &reference, "--timeout", "60s"]).unwrap();
    let unfinished = |site: &Site| {
        let jobs = site.ctl().json(&["jobs"])?;
        let jobs = jobs["jobs"].as_array().context("no jobs")?.clone();
        Ok::<_, anyhow::Error>(
            jobs.iter().filter(|job| !["failed", "published"].iter().any(|end| job["state"] == *end)).count(),
        )
    };
    wait_until("all jobs to end", TIMEOUT * 2, || Ok(unfinished(&site)? == 0)).unwrap();
    let requests = registry.accesses().len() - before;
    assert!(requests < 4 * taken + 20, "{requests} requests for {taken} names");
    // A name that was not found is not looked up again yet, and the answer says for how long.
    let (status, answer) = want(&address, good, &host, &gone(0)).unwrap();
    assert_eq!((status, &answer["outcome"]), (200, &"noted".into()), "{answer}");
    assert!(answer["again_seconds"].as_u64().unwrap() > 0, "{answer}");
    // The host that requested too many names can still get an existing image later.
    let asked = || Ok(want(&address, bad, &host, &second)?.1["outcome"] == "pulled");
    wait_until("the host's turn", TIMEOUT, asked).unwrap();
    site.ctl().ok(&["wait", &second, "--timeout", "60s"]).unwrap();
    watch.check(96 * MIB).unwrap();
}
