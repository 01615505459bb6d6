//! Registries behind a proxy: the coordinator uses the same proxy as skopeo with the same variables.

use std::net::IpAddr;
use std::process::Command;

use anyhow::Result;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tests::images::{ImageFiles, small};
use tests::process::{Output, run};
use tests::proxy::{Asked, ForwardProxy};
use tests::registry::{Authority, Reply, ScriptedRegistry, content_of};
use tests::site::{Site, SiteSpec};

/// An address that no machine has (RFC 5737), so that it can be reached only through a proxy.
const NOWHERE: &str = "192.0.2.10";

/// A registry with one image `app`, over plain HTTP or TLS with this certificate.
fn registry(image: &ImageFiles, tls: Option<(&std::path::Path, &std::path::Path)>) -> Result<ScriptedRegistry> {
    let image = image.clone();
    ScriptedRegistry::start_at("127.0.0.1:0", tls, move |seen| match seen.path() {
        "/v2/" => Reply::body("application/json", "{}"),
        path => content_of(&image, "app", path).unwrap_or(Reply::status(404)),
    })
}

/// All variables that have to do with proxies.
const NAMES: [&str; 8] =
    ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY", "REQUEST_METHOD"];

/// A site whose coordinator has only these of the variables.
fn site(variables: &[(&str, &str)], settings: &str, authority: Option<&Authority>) -> Result<Site> {
    Site::start_with(&SiteSpec {
        settings: settings.to_owned(),
        authorities: authority.map(|authority| authority.pem().to_owned()).into_iter().collect(),
        environment: NAMES
            .map(|name| (name, ""))
            .iter()
            .chain(variables)
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect(),
        ..SiteSpec::default()
    })
}

/// Runs skopeo with only these of the variables.
fn skopeo(variables: &[(&str, &str)], reference: &str, trust: &[&str]) -> Result<Output> {
    let mut command = Command::new("skopeo");
    for name in NAMES {
        command.env_remove(name);
    }
    command.envs(variables.iter().copied()).args(["inspect", "--raw"]).args(trust);
    run(command.arg(format!("docker://{reference}")))
}

/// The kind of request, the server and the credentials of each request, without repetitions.
fn ways(asked: &[Asked]) -> Vec<(String, String, Option<String>)> {
    let server = |asked: &Asked| match asked.what.strip_prefix("http://") {
        Some(url) => url.split('/').next().unwrap_or_default().to_owned(),
        None => asked.what.clone(),
    };
    let method = |asked: &Asked| if asked.what.starts_with("http://") { "absolute" } else { &asked.how }.to_owned();
    let mut ways: Vec<_> = asked.iter().map(|asked| (method(asked), server(asked), asked.who.clone())).collect();
    ways.sort();
    ways.dedup();
    ways
}

#[test]
fn a_registry_with_tls_is_reached_through_a_tunnel() {
    let (image, authority, directory) = (small().unwrap(), Authority::new().unwrap(), tempfile::tempdir().unwrap());
    let address: IpAddr = NOWHERE.parse().unwrap();
    let (certificate, key) = authority.issue_for(directory.path(), "server", address).unwrap();
    let trusted = tempfile::tempdir().unwrap();
    std::fs::write(trusted.path().join("ca.crt"), authority.pem()).unwrap();
    let trust = format!("--cert-dir={}", trusted.path().display());
    let registry = registry(&image, Some((&certificate, &key))).unwrap();
    let named = format!("{NOWHERE}:5000");
    let proxy = ForwardProxy::start(&[(&named, &registry.address())]).unwrap();
    let basic = format!("Basic {}", STANDARD.encode("anna:pass word"));
    for (variable, value, way) in [
        ("HTTPS_PROXY", proxy.address(), ("CONNECT", None)),
        ("https_proxy", format!("http://anna:pass%20word@{}", proxy.address()), ("CONNECT", Some(basic.clone()))),
        ("HTTPS_PROXY", format!("socks5://anna:pw@{}", proxy.address()), ("SOCKS", Some("anna:pw".to_owned()))),
        ("HTTPS_PROXY", format!("socks5://{}", proxy.address()), ("SOCKS", None)),
    ] {
        let variables = [(variable, value.as_str()), ("HTTP_PROXY", "http://127.0.0.1:9")];
        let expected = vec![(way.0.to_owned(), named.clone(), way.1)];
        skopeo(&variables, &format!("{named}/app:1"), &[&trust]).unwrap().ok().unwrap();
        assert_eq!(ways(&proxy.take()), expected, "skopeo with {value}");
        let site = site(&variables, "", Some(&authority)).unwrap();
        site.ctl().ok(&["pull", &format!("{named}/app:1")]).unwrap();
        assert_eq!(ways(&proxy.take()), expected, "the coordinator with {value}");
        assert_eq!(site.images().unwrap(), [format!("{named}/app:1")]);
    }
    assert!(
        registry.seen().iter().all(|seen| seen.head.header("Proxy-Authorization").is_none()),
        "for the proxy alone"
    );
}

#[test]
fn a_registry_without_tls_is_asked_for_in_absolute_form() {
    let image = small().unwrap();
    let registry = registry(&image, None).unwrap();
    let named = "registry.test:5000";
    let proxy = ForwardProxy::start(&[(named, &registry.address())]).unwrap();
    let url = format!("http://anna:pw@{}", proxy.address());
    let basic = format!("Basic {}", STANDARD.encode("anna:pw"));
    // For a host that may use plain HTTP, TLS is tried first, and TLS has another proxy here.
    let variables = [("HTTP_PROXY", url.as_str()), ("HTTPS_PROXY", "http://127.0.0.1:9")];
    let expected = vec![("absolute".to_owned(), named.to_owned(), Some(basic))];
    skopeo(&variables, &format!("{named}/app:1"), &["--tls-verify=false"]).unwrap().ok().unwrap();
    assert_eq!(ways(&proxy.take()), expected);
    let site = site(&variables, &format!("insecure_registries = ['{named}']\n"), None).unwrap();
    site.ctl().ok(&["pull", &format!("{named}/app:1")]).unwrap();
    assert_eq!(ways(&proxy.take()), expected);
    assert!(
        registry.seen().iter().all(|seen| seen.head.header("Proxy-Authorization").is_none()),
        "for the proxy alone"
    );
}

#[test]
fn exceptions_and_this_machine_are_reached_directly() {
    let image = small().unwrap();
    let registry = registry(&image, None).unwrap();
    let proxy = ForwardProxy::start(&[]).unwrap();
    let address = proxy.address();
    let proxies = |exceptions| [("HTTP_PROXY", address.as_str()), ("HTTPS_PROXY", &address), ("NO_PROXY", exceptions)];
    let here = format!("127.0.0.1:{}/app:1", registry.port());
    skopeo(&proxies(""), &here, &["--tls-verify=false"]).unwrap().ok().unwrap();
    let site = site(&proxies(""), "", None).unwrap();
    site.ctl().ok(&["pull", &here]).unwrap();
    assert_eq!(proxy.take(), [], "this machine is never reached through a proxy");
    drop(site);
    // Whether the request for a host goes to the proxy, which has no routes. Names that end in .invalid cannot be resolved.
    for (exceptions, host, is_proxied) in [
        ("other.invalid", "r.invalid", true),
        ("r.invalid", "r.invalid", false),
        (".invalid", "r.invalid", false),
        ("*.r.invalid", "r.invalid", true),
        ("r.invalid:443", "r.invalid", false),
        ("r.invalid:5000", "r.invalid", true),
        ("r.invalid:5000", "r.invalid:5000", false),
        ("R.INVALID ", "r.invalid", false),
        ("*", "r.invalid", false),
    ] {
        let variables = proxies(exceptions);
        let reference = format!("{host}/app:1");
        assert!(!skopeo(&variables, &reference, &[]).unwrap().succeeded());
        assert_eq!(!proxy.take().is_empty(), is_proxied, "skopeo: {host} with NO_PROXY={exceptions}");
        let site = self::site(&variables, "retry_attempts = 1\n", None).unwrap();
        assert!(!site.ctl().run(&["pull", &reference]).unwrap().succeeded());
        assert_eq!(!proxy.take().is_empty(), is_proxied, "the coordinator: {host} with NO_PROXY={exceptions}");
    }
}

#[test]
fn a_proxy_that_refuses_is_told_of_and_one_that_cannot_be_used_is_refused_at_the_start() {
    let proxy = ForwardProxy::start_refusing(&[], Some(407)).unwrap();
    let url = format!("http://anna:hush-hush@{}", proxy.address());
    let site = site(&[("HTTPS_PROXY", &url)], "retry_attempts = 1\n", None).unwrap();
    let error = site.ctl().run(&["pull", "r.invalid/app:1"]).unwrap();
    assert!(error.code == 1 && error.stderr.contains("proxy"), "{}", error.stderr);
    assert!(!error.stderr.contains("hush-hush"), "{}", error.stderr);
    for (variable, value) in [("HTTPS_PROXY", "foo://anna:hush-hush@host"), ("http_proxy", "socks4://host")] {
        let error = format!("{:#}", self::site(&[(variable, value)], "", None).err().unwrap());
        let variable = variable.to_uppercase();
        assert!(error.contains(&format!("{variable} does not name a proxy that can be used")), "{error}");
        assert!(!error.contains("hush-hush"), "{error}");
    }
}
