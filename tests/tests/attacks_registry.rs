//! Malicious registries: they redirect to learn passwords, trickle, list without end, and send text that controls
//! terminals. After each attack an admin is answered at once, memory is within its bound, and the leader is the same as
//! before.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tests::images::{ImageFiles, digest_of, small};
use tests::process::{TIMEOUT, peak, wait_until};
use tests::registry::{Authority, Reply, ScriptedRegistry, Seen, content_of};
use tests::site::{Site, SiteSpec};

#[path = "attacks_registry/words.rs"]
mod words;

/// How long an admin may wait for an answer, whatever a registry does.
const PROMPT: Duration = Duration::from_secs(1);
/// The memory that a coordinator may use under these attacks: two threads and two pipes of 4 MiB for each of a few layers, and a base.
const MEMORY: u64 = 400 << 20;
/// How long a small image may take on a loaded machine.
const LONG: Duration = Duration::from_secs(120);

const USER: &str = "eve";
const PASSWORD: &str = "Holunderbluete-1729";

fn basic() -> String {
    format!("Basic {}", STANDARD.encode(format!("{USER}:{PASSWORD}")))
}

/// A site that has the password for these registries.
fn site(logins: &[&str], settings: &str, authorities: &[&Authority]) -> Result<Site> {
    let login = |registry: &&str| ((*registry).to_owned(), USER.to_owned(), PASSWORD.to_owned());
    Site::start_with(&SiteSpec {
        logins: logins.iter().map(login).collect(),
        authorities: authorities.iter().map(|authority| authority.pem().to_owned()).collect(),
        settings: format!("retry_attempts = 2\n{settings}"),
        ..SiteSpec::default()
    })
}

/// The coordinator's status as an admin sees it, within [`PROMPT`]. The best of three attempts counts, because other
/// processes use this machine too.
fn status(site: &Site) -> Result<Value> {
    let mut slowest = Duration::ZERO;
    for _ in 0..3 {
        let began = Instant::now();
        let status = site.ctl().json(&["status"])?;
        slowest = began.elapsed();
        if slowest <= PROMPT {
            return Ok(status);
        }
    }
    anyhow::bail!("an admin waited {slowest:?}")
}

/// The coordinator's peak memory, bytes.
fn memory(site: &mut Site) -> Result<u64> {
    peak(site.coordinator().process().pid())
}

/// Checks that an attack did no harm: the leader and its epoch are the same, and memory is within its bound.
fn unharmed(site: &mut Site, epoch: &Value) -> Result<()> {
    let after = status(site)?;
    ensure!(after["epoch"] == *epoch && after["role"] == "leader", "{after}");
    let memory = memory(site)?;
    ensure!(memory < MEMORY, "{} MiB", memory >> 20);
    Ok(())
}

fn without_authorization(seen: &[Seen]) -> bool {
    !seen.is_empty() && seen.iter().all(|seen| seen.authorization().is_none())
}

/// An address of this machine outside the loopback.
fn own_address() -> Result<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    // Nothing is sent. This only determines which source address would be used.
    socket.connect("198.51.100.1:9").context("this machine has no network")?;
    Ok(socket.local_addr()?.ip())
}

/// A registry with an image `app` that requires the password and redirects requests for blobs to `storage`.
fn leading<S>(image: &ImageFiles, storage: S) -> impl Fn(&Seen) -> Reply + Send + Sync + 'static + use<S>
where
    S: Fn(&str) -> String + Send + Sync + 'static,
{
    let image = image.clone();
    move |seen| {
        if seen.path().starts_with("/v2/") && seen.authorization() != Some(&basic()) {
            return Reply::challenge("Basic realm=\"r\"");
        }
        match seen.path().strip_prefix("/v2/app/blobs/") {
            Some(digest) => Reply::redirect(&storage(digest)),
            None => content_of(&image, "app", seen.path()).unwrap_or(Reply::status(404)),
        }
    }
}

/// Storage like S3, which refuses a request that sends a second kind of credentials.
fn stored(image: &ImageFiles, seen: &Seen) -> Reply {
    if seen.authorization().is_some() {
        return Reply::status(400);
    }
    let digest = seen.path().trim_start_matches("/minio/").split('?').next().unwrap_or_default();
    content_of(image, "app", &format!("/v2/app/blobs/{digest}")).unwrap_or(Reply::status(404))
}

#[test]
fn a_redirect_carries_no_credentials_to_signed_storage_here_or_elsewhere() -> Result<()> {
    let image = small()?;
    let content = image.clone();
    let elsewhere = ScriptedRegistry::start(move |seen| stored(&content, seen))?;
    for place in [String::new(), format!("http://{}", elsewhere.address())] {
        let (content, target) = (image.clone(), place.clone());
        let registry = leading(&image, move |digest| format!("{target}/minio/{digest}?X-Amz-Signature=abc"));
        let registry = ScriptedRegistry::start(move |seen| {
            if seen.path().starts_with("/minio/") { stored(&content, seen) } else { registry(seen) }
        })?;
        let site = site(&[&registry.address()], "", &[])?;
        site.ctl().ok(&["pull", &registry.reference("app", "1")])?;
        let storage = if place.is_empty() { registry.seen_at("/minio/") } else { elsewhere.seen() };
        assert!(without_authorization(&storage), "{place}");
        assert!(registry.seen().iter().any(|seen| seen.authorization().is_some()), "the registry itself got it");
    }
    Ok(())
}

#[test]
fn only_the_registry_itself_may_ask_who_we_are() -> Result<()> {
    let image = small()?;
    // The storage asks for a token from its own service. The client gets an anonymous token there, and sends no credentials.
    let service = ScriptedRegistry::start(|_| Reply::body("application/json", r#"{"token": "t"}"#))?;
    let challenge = format!("Bearer realm=\"http://{}/token\",service=\"s\"", service.address());
    let storage = ScriptedRegistry::start(move |_| Reply::challenge(&challenge))?;
    let target = format!("http://{}", storage.address());
    let registry = ScriptedRegistry::start(leading(&image, move |digest| format!("{target}/minio/{digest}")))?;
    let site = site(&[&registry.address()], "", &[])?;
    let refused = site.ctl().run(&["pull", &registry.reference("app", "1")])?;
    assert!(refused.code == 1 && refused.stderr.contains("401 Unauthorized from 127.0.0.1"), "{}", refused.stderr);
    assert!(storage.seen().iter().all(|seen| matches!(seen.authorization(), None | Some("Bearer t"))));
    assert!(without_authorization(&service.seen()), "{:?}", service.seen());
    let said = |seen: &Seen| format!("{}{}", seen.path(), String::from_utf8_lossy(&seen.body));
    assert!(!service.seen().iter().any(|seen| said(seen).contains(PASSWORD) || said(seen).contains(USER)));
    Ok(())
}

#[test]
fn nothing_goes_from_https_to_plain_http() -> Result<()> {
    let image = small()?;
    let directory = tempfile::tempdir()?;
    let authority = Authority::new()?;
    let (certificate, key) = authority.issue(directory.path(), "registry")?;
    let tls = Some((certificate.as_path(), key.as_path()));
    let content = image.clone();
    let plain = ScriptedRegistry::start(move |seen| stored(&content, seen))?;
    let there = format!("http://{}", plain.address());

    let target = there.clone();
    let blobs = ScriptedRegistry::start_at(
        "127.0.0.1:0",
        tls,
        leading(&image, move |digest| format!("{target}/minio/{digest}")),
    )?;
    let target = there.clone();
    let manifests = ScriptedRegistry::start_at("127.0.0.1:0", tls, move |seen| match seen.authorization() {
        None => Reply::challenge("Basic realm=\"r\""),
        Some(_) => Reply::redirect(&format!("{target}{}", seen.path())),
    })?;
    let challenge = format!("Bearer realm=\"{there}/token\",service=\"s\"");
    let realm = ScriptedRegistry::start_at("127.0.0.1:0", tls, move |_| Reply::challenge(&challenge))?;
    let target = there.clone();
    let tokens = ScriptedRegistry::start_at("127.0.0.1:0", tls, move |_| Reply::redirect(&format!("{target}/token")))?;
    let challenge = format!("Bearer realm=\"https://{}/token\",service=\"s\"", tokens.address());
    let token = ScriptedRegistry::start_at("127.0.0.1:0", tls, move |_| Reply::challenge(&challenge))?;

    let registries = [&blobs, &manifests, &realm, &token];
    let addresses: Vec<String> = registries.iter().map(|registry| registry.address()).collect();
    let logins: Vec<&str> = addresses.iter().map(String::as_str).collect();
    let site = site(&logins, "", &[&authority])?;
    for (registry, words) in registries.iter().zip([
        "it leads from HTTPS to plain HTTP",
        "it leads from HTTPS to plain HTTP",
        "a token service without TLS",
        "credentials are not sent on",
    ]) {
        let refused = site.ctl().run(&["pull", &registry.reference("app", "1")])?;
        assert!(refused.code == 1 && refused.stderr.contains(words), "{words}: {}", refused.stderr);
    }
    assert_eq!(plain.connections(), 0, "{:?}", plain.seen());
    assert!(tokens.seen().iter().all(|seen| seen.authorization() == Some(&basic())), "the service itself is trusted");
    Ok(())
}

#[test]
fn a_refresh_token_is_posted_to_one_place_alone() -> Result<()> {
    let thief = ScriptedRegistry::start(|_| Reply::body("application/json", r#"{"token": "t"}"#))?;
    let target = format!("http://{}/token", thief.address());
    let service = ScriptedRegistry::start(move |_| Reply::redirect(&target))?;
    let challenge = format!("Bearer realm=\"http://{}/token\",service=\"s\"", service.address());
    let registry = ScriptedRegistry::start(move |_| Reply::challenge(&challenge))?;
    let site = site(&[], "", &[])?;
    let config = json!({"auths": {registry.address(): {"identitytoken": PASSWORD}}});
    std::fs::write(site.path().join("state-docker/config.json"), config.to_string())?;
    let refused = site.ctl().run(&["pull", &registry.reference("app", "1")])?;
    assert!(refused.code == 1 && refused.stderr.contains("credentials are not sent on"), "{}", refused.stderr);
    assert!(service.seen().iter().any(|seen| String::from_utf8_lossy(&seen.body).contains(PASSWORD)));
    assert_eq!(thief.connections(), 0, "{:?}", thief.seen());
    Ok(())
}

#[test]
fn a_registry_elsewhere_leads_neither_to_this_machine_nor_to_its_link() -> Result<()> {
    let image = small()?;
    let own = own_address()?;
    let content = image.clone();
    let inner = ScriptedRegistry::start(move |seen| stored(&content, seen))?;
    let port = inner.port();
    let at = format!("{own}:0");
    let mut registries = Vec::new();
    for host in
        ["127.0.0.1", "localhost", "127.1", "0.0.0.0", "[::ffff:127.0.0.1]", "[::1]", "169.254.169.254", "[fe80::1]"]
    {
        let target = format!("http://{host}:{port}");
        let challenge = format!("Bearer realm=\"{target}/token\",service=\"s\"");
        registries.push(ScriptedRegistry::start_at(&at, None, move |_| Reply::challenge(&challenge))?);
        let redirecting = leading(&image, move |digest| format!("{target}/minio/{digest}"));
        registries.push(ScriptedRegistry::start_at(&at, None, redirecting)?);
    }
    let addresses: Vec<String> = registries.iter().map(ScriptedRegistry::address).collect();
    let settings = format!("insecure_registries = {}\n", json!(addresses));
    let logins: Vec<&str> = addresses.iter().map(String::as_str).collect();
    let site = site(&logins, &settings, &[])?;
    for registry in &registries {
        let refused = site.ctl().run(&["pull", &registry.reference("app", "1")])?;
        let words = "of the coordinator's own";
        assert!(refused.code == 1 && refused.stderr.contains(words), "{registry:?}: {}", refused.stderr);
    }
    assert_eq!(inner.connections(), 0, "{:?}", inner.seen());
    Ok(())
}

#[test]
fn a_registry_that_leads_in_circles_is_left() -> Result<()> {
    let circle = ScriptedRegistry::start(|seen| Reply::redirect(&format!("{}x", seen.path())))?;
    let site = site(&[], "", &[])?;
    let refused = site.ctl().run(&["pull", &circle.reference("app", "1")])?;
    assert!(refused.code == 1 && refused.stderr.contains("redirects more than 10 times"), "{}", refused.stderr);
    assert_eq!(circle.seen_at("/v2/app/manifests/").len(), 11);
    Ok(())
}

/// A loopback address that only this test uses, so that ports 80 and 443 are free.
fn lonely(last: u8) -> Ipv4Addr {
    let id = std::process::id();
    Ipv4Addr::new(127, 64 | (id >> 8) as u8 & 63, id as u8, last)
}

#[test]
fn an_insecure_registry_is_spoken_to_over_tls_where_it_speaks_tls() -> Result<()> {
    let image = small()?;
    let directory = tempfile::tempdir()?;
    let authority = Authority::new()?;
    let host = lonely(2);
    let (certificate, key) = authority.issue_for(directory.path(), "registry", host.into())?;
    // Like most proxies, port 80 redirects to port 443.
    let location = format!("https://{host}");
    let plain = ScriptedRegistry::start_at(&format!("{host}:80"), None, move |seen| {
        Reply::redirect(&format!("{location}{}", seen.path()))
    })?;
    let name = format!("{host}/app:1");
    let settings = format!("insecure_registries = [\"{host}\"]\n");
    let site = site(&[&host.to_string()], &settings, &[&authority])?;

    // While the TLS port is down, the plain one is not used in its place.
    let refused = site.ctl().run(&["pull", &name])?;
    assert!(refused.code == 1 && refused.stderr.contains("cannot reach registry"), "{}", refused.stderr);
    assert!(without_authorization(&plain.seen()), "{:?}", plain.seen());
    let asked = plain.connections();

    let content = image.clone();
    let secure =
        ScriptedRegistry::start_at(&format!("{host}:443"), Some((&certificate, &key)), move |seen| {
            match seen.authorization() {
                Some(_) => content_of(&content, "app", seen.path()).unwrap_or(Reply::status(404)),
                None => Reply::challenge("Basic realm=\"r\""),
            }
        })?;
    site.ctl().ok(&["pull", &name])?;
    assert_eq!(plain.connections(), asked, "the plain side was asked");
    assert!(secure.seen().iter().any(|seen| seen.authorization() == Some(&basic())));
    Ok(())
}

#[test]
fn a_registry_that_trickles_holds_up_no_other() -> Result<()> {
    let image = small()?;
    let content = image.clone();
    let slow = ScriptedRegistry::start(move |seen| {
        let name = if seen.path().starts_with("/v2/layers") { "layers" } else { "manifests" };
        let is_slow =
            name == "manifests" || seen.path().contains("/blobs/") && !seen.path().ends_with(&content.config.digest);
        match content_of(&content, name, seen.path()) {
            Some(reply) if is_slow => reply.trickled(Duration::from_secs(5)),
            Some(reply) => reply,
            None => Reply::status(404),
        }
    })?;
    let answers = other_image();
    let good = ScriptedRegistry::start(move |seen| answers(seen.path()).unwrap_or(Reply::status(404)))?;
    let mut site = site(&[], "parallel_jobs = 4\nparallel_layers = 3\n", &[])?;
    let epoch = status(&site)?["epoch"].clone();

    let layers = slow.reference("layers", "1");
    site.ctl().ok(&["pull", "--detach", &layers])?;
    wait_until("three layers that trickle", TIMEOUT, || Ok(slow.seen_at("/v2/layers/blobs/").len() >= 4))?;
    for tag in 1..=6 {
        site.ctl().ok(&["pull", "--detach", &slow.reference("manifests", &tag.to_string())])?;
    }
    wait_until("manifests that trickle", TIMEOUT, || Ok(slow.seen_at("/v2/manifests/").len() >= 3))?;

    let began = Instant::now();
    site.ctl().ok(&["pull", &good.reference("app", "1")])?;
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    assert_eq!(site.job(&layers)?["state"], "fetching", "the slow ones are still under way");
    unharmed(&mut site, &epoch)
}

/// A registry's answer to each path.
type Answers = Arc<dyn Fn(&str) -> Option<Reply> + Send + Sync>;

/// The answers of a registry with an image `app` that is not in the store: one layer of a few bytes.
fn other_image() -> Answers {
    let tar = vec![0; 1024];
    let config = json!({"os": "linux", "architecture": "amd64",
        "rootfs": {"type": "layers", "diff_ids": [digest_of(&tar)]}});
    let config = config.to_string().into_bytes();
    let manifest = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest_of(&config), "size": config.len()},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest_of(&tar), "size": tar.len()}]});
    let (config_path, layer_path) =
        (format!("/v2/app/blobs/{}", digest_of(&config)), format!("/v2/app/blobs/{}", digest_of(&tar)));
    Arc::new(move |path| {
        if path == config_path {
            Some(Reply::body("application/octet-stream", config.clone()))
        } else if path == layer_path {
            Some(Reply::body("application/octet-stream", tar.clone()))
        } else if path.starts_with("/v2/app/manifests/") {
            Some(Reply::body("application/vnd.oci.image.manifest.v1+json", manifest.to_string()))
        } else {
            None
        }
    })
}

#[test]
fn sixty_thousand_tags_to_a_pattern_make_a_thousand_jobs() -> Result<()> {
    let tags: Vec<String> = (0..60_000).map(|number| format!("v1.0.{number}")).collect();
    let list = json!({"name": "app", "tags": tags}).to_string();
    let registry = ScriptedRegistry::start(move |seen| {
        if seen.path().contains("/tags/list") {
            Reply::body("application/json", list.clone())
        } else {
            Reply::status(404)
        }
    })?;
    let mut site = site(&[], "parallel_jobs = 8\n", &[])?;
    let epoch = status(&site)?["epoch"].clone();
    let pattern = registry.reference("app", "v*");
    site.ctl().ok(&["schedule", "add", "all", "--image", &pattern, "--cron", "0 3 1 1 *"])?;
    let mut running = site.begin("run", &["schedule", "run", "all"])?;
    let mut looks = 0;
    while running.exited()?.is_none() {
        status(&site)?;
        looks += 1;
    }
    assert!(looks > 0);
    let said = running.log();
    let counts = |site: &Site| -> Result<u64> {
        let jobs = status(site)?["jobs"].clone();
        Ok(["queued", "running", "published", "failed", "cancelled"]
            .iter()
            .filter_map(|state| jobs[state].as_u64())
            .sum())
    };
    let jobs = counts(&site)?;
    assert!((1..=1000).contains(&jobs), "{jobs} jobs; {said}");
    let newest = registry.reference("app", "v1.0.59999");
    wait_until("the newest tag's job", TIMEOUT, || Ok(site.job(&newest).is_ok()))?;
    let events = site.ctl().ok(&["events", "--since", "0", "-n", "1000"])?;
    assert!(events.contains("means 59000 images more than the 1000"), "{events}");
    unharmed(&mut site, &epoch)
}

#[test]
fn docker_hubs_names_are_one_and_limits_that_never_match_are_refused() -> Result<()> {
    let site = site(&[], "", &[])?;
    let apply = |text: &str| -> Result<tests::process::Output> {
        let path = site.path().join("settings.yaml");
        std::fs::write(&path, text)?;
        site.ctl().run(&["apply", &path.to_string_lossy()])
    };
    for (text, words) in [
        ("limits: {registries: {\"https://r.io/\": {bandwidth: 1M}}}", "HOST:PORT"),
        ("limits: {windows: [{from: \"08:00\", to: \"08:00\", bandwidth: 1M}]}", "no length"),
        ("limits: {registries: {docker.io: {}, index.docker.io: {}}}", "named twice"),
    ] {
        let refused = apply(text)?;
        assert!(refused.code != 0 && refused.stderr.contains(words), "{text}: {}", refused.stderr);
    }
    apply("limits: {registries: {registry-1.docker.io: {requests_per_minute: 7}}}\n")?.ok()?;
    for name in ["registry-1.docker.io/library/debian:12", "index.docker.io/library/debian:12", "debian:12"] {
        site.ctl().ok(&["pin", name])?;
    }
    assert_eq!(site.ctl().json(&["pins"])?["pins"].as_array().map(Vec::len), Some(1));
    Ok(())
}

#[test]
fn an_answer_that_never_ends_takes_up_little() -> Result<()> {
    // A megabyte of headers, a token of 100 KiB, a manifest of 16 MiB, and many long challenges.
    let long = "x".repeat(1000);
    let headers = ScriptedRegistry::start(move |seen| {
        if seen.path() == "/v2/" {
            return Reply::status(200);
        }
        (0..1000).fold(Reply::status(200), |reply, number| reply.with(&format!("X-{number}"), &long))
    })?;
    let token = ScriptedRegistry::start(|_| {
        Reply::body("application/json", json!({"token": "t".repeat(100 << 10)}).to_string())
    })?;
    let challenge = format!("Bearer realm=\"http://{}/token\",service=\"s\"", token.address());
    let guarded = ScriptedRegistry::start(move |_| Reply::challenge(&challenge))?;
    let endless =
        ScriptedRegistry::start(|_| Reply::body("application/vnd.oci.image.manifest.v1+json", vec![b' '; 16 << 20]))?;
    let challenges = ScriptedRegistry::start(|_| {
        (0..90).fold(Reply::status(401), |reply, _| reply.with("WWW-Authenticate", &"Basic realm=x,".repeat(200)))
    })?;
    let mut site = site(&[], "", &[])?;
    let epoch = status(&site)?["epoch"].clone();
    for (registry, words) in [
        (&headers, "cannot reach registry"),
        (&guarded, "longer than"),
        (&endless, "longer than"),
        (&challenges, "refuses"),
    ] {
        let began = Instant::now();
        let refused = site.ctl().run(&["pull", &registry.reference("app", "1")])?;
        assert!(refused.code == 1 && refused.stderr.contains(words), "{words}: {}", refused.stderr);
        assert!(began.elapsed() < LONG, "{:?}", began.elapsed());
    }
    unharmed(&mut site, &epoch)
}
