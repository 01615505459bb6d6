//! Docker's `config.json` in all forms found in practice: which user the coordinator authenticates as, compared with
//! docker and skopeo on the same file. One coordinator reads all files, one after the other, without a restart.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};
use serde_json::Value;
use tempfile::TempDir;
use tests::process::run;
use tests::registry::{Reply, ScriptedRegistry};
use tests::site::{Site, SiteSpec};

/// The client sends no credentials.
const NOBODY: &str = "nobody";
/// The client sends no request, because the file is invalid.
const FAULT: &str = "fault";

/// The result is random.
const CHANCE: &str = "chance";

/// A file, and the users as which the coordinator, docker and skopeo authenticate with it. `R` stands for the registry
/// and `A` for the base64 of `anna:pw`.
struct Case(&'static str, &'static str, &'static str, &'static str);

/// A file with which all three authenticate as the same user.
const fn same(file: &'static str, who: &'static str) -> Case {
    Case(file, who, who, who)
}

/// Observed with docker 20.10.24 and skopeo 1.9.3. Where the three differ, a comment explains the coordinator's behaviour.
const CASES: &[Case] = &[
    same(r#"{"auths": {"R": {"auth": "A"}}}"#, "anna:pw"),
    same(r#"{"auths": {"https://R": {"auth": "A"}}}"#, "anna:pw"),
    same(r#"{"auths": {"http://R": {"auth": "A"}}}"#, "anna:pw"),
    same(r#"{"auths": {"https://R/v1/": {"auth": "A"}}}"#, "anna:pw"),
    same(r#"{"auths": {"https://R/v2/": {"auth": "A"}}}"#, "anna:pw"),
    same(
        r#"{"auths": {"R": {"auth": "A", "identitytoken": ""}}, "credsStore": "", "HttpHeaders": {"a": "b"}}"#,
        "anna:pw",
    ),
    same(r#"{"auths": {"other.io": {"auth": "A"}}}"#, NOBODY),
    same(r#"{"auths": {"R": {}}}"#, NOBODY),
    same(r#"{"auths": {"R": null}, "credHelpers": null}"#, NOBODY),
    same(r#"{}"#, NOBODY),
    same(r#"{"Auths": {"R": {"Auth": "A"}}}"#, "anna:pw"),
    same(r#"{"auths": {"R": {"auth": "A", "username": "eve", "password": "x"}}}"#, "anna:pw"),
    same(r#"{"auths": {"R": {"auth": "YW5uYTpw\nYTpz\r\ncw=="}}}"#, "anna:pa:ss"),
    same(r#"{"auths": {"R": {"auth": "YW5uYTpwdwAA"}}}"#, "anna:pw"),
    same(r#"{"credHelpers": {"R": "known"}, "auths": {"R": {"auth": "A"}}}"#, "known:R"),
    same(r#"{"credHelpers": {"other.io": "known"}, "auths": {"R": {"auth": "A"}}}"#, "anna:pw"),
    // skopeo does not support `credsStore`.
    Case(r#"{"credsStore": "known"}"#, "known:R", "known:R", NOBODY),
    Case(r#"{"credsStore": "known", "auths": {"R": {}}}"#, "known:R", "known:R", NOBODY),
    Case(r#"{"credsStore": "known", "auths": {"R": {"auth": "A"}}}"#, "known:R", "known:R", "anna:pw"),
    Case(
        r#"{"credsStore": "known", "credHelpers": {"R": ""}, "auths": {"R": {"auth": "A"}}}"#,
        "anna:pw",
        "anna:pw",
        FAULT,
    ),
    Case(r#"{"credHelpers": {"R": "small"}}"#, "small:R", "small:R", "small:R"),
    // A login in the file is used if the helper has none. docker does not use it then, and with `credHelpers` neither does skopeo.
    Case(r#"{"credsStore": "none", "auths": {"R": {"auth": "A"}}}"#, "anna:pw", NOBODY, "anna:pw"),
    Case(r#"{"credHelpers": {"R": "none"}, "auths": {"R": {"auth": "A"}}}"#, "anna:pw", NOBODY, NOBODY),
    Case(r#"{"credHelpers": {"R": "none"}}"#, NOBODY, NOBODY, NOBODY),
    // A helper that fails or is missing is an error and does not make the client anonymous. A login in the file is still used.
    Case(r#"{"credHelpers": {"R": "broken"}}"#, FAULT, NOBODY, FAULT),
    Case(r#"{"credsStore": "missing"}"#, FAULT, NOBODY, NOBODY),
    Case(r#"{"credsStore": "missing", "auths": {"R": {"auth": "A"}}}"#, "anna:pw", "anna:pw", "anna:pw"),
    // Separate fields for user and password, which docker reads and skopeo does not.
    Case(r#"{"auths": {"R": {"username": "anna", "password": "pw"}}}"#, "anna:pw", "anna:pw", NOBODY),
    // Podman's keys with a path: the longest match is used. docker uses any entry of the host.
    Case(r#"{"auths": {"R/team": {"auth": "A"}}}"#, "anna:pw", "anna:pw", "anna:pw"),
    Case(r#"{"auths": {"R/others": {"auth": "A"}}}"#, NOBODY, "anna:pw", NOBODY),
    Case(r#"{"auths": {"R": {"auth": "ZXZlOng="}, "R/team": {"auth": "A"}}}"#, "anna:pw", "eve:x", "anna:pw"),
    // Other forms of base64.
    Case(r#"{"auths": {"R": {"auth": "YW5uYTpwdw"}}}"#, "anna:pw", NOBODY, FAULT),
    Case(r#"{"auths": {"R": {"auth": "YW5uYTo_Pz8-"}}}"#, "anna:???>", NOBODY, FAULT),
    // An unreadable entry is an error for its own registry only. docker reads entries in random order until it finds such an entry.
    Case(r#"{"auths": {"R": {"auth": "A"}, "other.io": {"auth": "%"}}}"#, "anna:pw", CHANCE, "anna:pw"),
    Case(r#"{"auths": {"R": {"auth": "%"}}}"#, FAULT, NOBODY, FAULT),
    Case(r#"{"auths": {"R": {"auth": "YW5uYQ=="}}}"#, FAULT, NOBODY, NOBODY),
    // Old, empty and odd files.
    Case(r#"{"R": {"auth": "A", "email": "anna@r.io"}}"#, "anna:pw", NOBODY, NOBODY),
    Case("", NOBODY, NOBODY, FAULT),
    Case("\u{feff}{\"auths\": {\"R\": {\"auth\": \"A\"}}}", "anna:pw", NOBODY, FAULT),
    Case(r#"{"auths": {"R": {"auth": "A"}}} // mine"#, "anna:pw", "anna:pw", FAULT),
    Case("{", FAULT, NOBODY, FAULT),
    Case("// mine\n{}", FAULT, NOBODY, FAULT),
];

/// The user and password in a `Basic` header.
fn basic(header: &str) -> String {
    let decoded = header.strip_prefix("Basic ").and_then(|text| STANDARD.decode(text).ok()).unwrap_or_default();
    String::from_utf8_lossy(&decoded).into_owned()
}

/// Credential helpers on a separate PATH: `known` returns its own name and the server that it is asked for, `small`
/// writes field names in lower case, `none` knows no login, `broken` fails.
fn helpers() -> Result<(TempDir, String)> {
    let directory = tempfile::tempdir()?;
    for (name, script) in [
        ("known", r#"printf '{"ServerURL": "%s", "Username": "known", "Secret": "%s"}' "$server" "$server""#),
        ("small", r#"printf '{"username": "small", "secret": "%s"}' "$server""#),
        ("none", "echo 'credentials not found in native keychain'; exit 1"),
        ("broken", "echo 'the key service is on fire'; exit 1"),
    ] {
        let path = directory.path().join(format!("docker-credential-{name}"));
        std::fs::write(&path, format!("#!/bin/sh\nserver=$(cat)\n{script}\n"))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    }
    let path = format!("{}:{}", directory.path().display(), std::env::var("PATH").unwrap_or_default());
    Ok((directory, path))
}

/// A registry that requires a login, accepts any, and has no images.
fn curious() -> Result<ScriptedRegistry> {
    ScriptedRegistry::start(|seen| match seen.authorization() {
        None => Reply::challenge("Basic realm=\"r\""),
        Some(_) if seen.path() == "/v2/" => Reply::body("application/json", "{}"),
        Some(_) => Reply::status(404),
    })
}

/// The user that the registry was last told, in requests after the first `before` recorded ones.
fn told(registry: &ScriptedRegistry, before: usize) -> String {
    let seen = registry.seen();
    let last = seen[before..].iter().rev().find_map(|seen| seen.authorization().map(basic));
    match (last, seen.len() > before) {
        // skopeo answers a challenge even without credentials.
        (Some(who), _) if who == ":" => NOBODY.to_owned(),
        (Some(who), _) => who,
        (None, true) => NOBODY.to_owned(),
        (None, false) => FAULT.to_owned(),
    }
}

fn skopeo(registry: &ScriptedRegistry, file: &Path, path: &str, name: &str) -> Result<String> {
    let before = registry.seen().len();
    let mut command = Command::new("skopeo");
    command.args(["inspect", "--raw", "--tls-verify=false"]).arg("--authfile").arg(file).env("PATH", path);
    run(command.arg(format!("docker://{}/{name}:1", registry.address())))?;
    Ok(told(registry, before))
}

/// The user that the docker client sends to its daemon, which is a script here.
fn docker(daemon: &ScriptedRegistry, directory: &Path, path: &str, reference: &str) -> Result<String> {
    let mut command = Command::new("docker");
    command.arg("--config").arg(directory).args(["--host", &format!("tcp://{}", daemon.address())]);
    run(command.args(["pull", reference]).env("PATH", path))?;
    let seen = daemon.seen_at("/images/create");
    let header =
        seen.last().and_then(|seen| seen.head.header("X-Registry-Auth")).context("docker asked for nothing")?;
    let login: Value = serde_json::from_slice(&URL_SAFE.decode(header)?)?;
    let field = |name: &str| login[name].as_str().unwrap_or_default().to_owned();
    Ok(match (field("username"), field("password")) {
        (user, password) if user.is_empty() && password.is_empty() => NOBODY.to_owned(),
        (user, password) => format!("{user}:{password}"),
    })
}

fn daemon() -> Result<ScriptedRegistry> {
    ScriptedRegistry::start(|seen| match seen.path() {
        path if path.ends_with("/_ping") => Reply::body("text/plain", "OK").with("Api-Version", "1.41"),
        path if path.ends_with("/info") => {
            Reply::body("application/json", r#"{"IndexServerAddress": "https://index.docker.io/v1/"}"#)
        }
        _ => Reply::body("application/json", "{\"status\": \"done\"}\n"),
    })
}

/// The user as which the coordinator authenticates.
fn coordinator(site: &Site, registry: &ScriptedRegistry, name: &str) -> Result<String> {
    let output = site.ctl().run(&["pull", &format!("{}/{name}:1", registry.address())])?;
    let asked = registry.seen_at(&format!("/{name}/"));
    let last = asked.iter().rev().find_map(|seen| seen.authorization().map(basic));
    let is_fault = ["config.json", "docker-credential"].iter().any(|word| output.stderr.contains(word));
    Ok(last.unwrap_or_else(|| if is_fault { FAULT } else { NOBODY }.to_owned()))
}

#[test]
fn every_form_of_docker_configuration_names_the_same_user_as_docker_and_skopeo_do() {
    let (registry, daemon, (_helpers, path)) = (curious().unwrap(), daemon().unwrap(), helpers().unwrap());
    let environment = vec![("PATH".to_owned(), path.clone())];
    let site = Site::start_with(&SiteSpec { environment, ..SiteSpec::default() }).unwrap();
    let directory = site.path().join("state-docker");
    let file = directory.join("config.json");
    let mut wrong = Vec::new();
    for (number, Case(text, ours, dockers, skopeos)) in CASES.iter().enumerate() {
        let address = registry.address();
        let text = text.replace("\"A\"", "\"YW5uYTpwdw==\"").replace('R', &address);
        std::fs::write(&file, &text).unwrap();
        // A separate repository for each case, because answers about a repository are cached.
        let name = format!("team/app{number}");
        let found = [
            coordinator(&site, &registry, &name).unwrap(),
            docker(&daemon, &directory, &path, &format!("{address}/{name}:1")).unwrap(),
            skopeo(&registry, &file, &path, &name).unwrap(),
        ];
        let mut expected = [ours, dockers, skopeos].map(|who| who.replace('R', &address));
        if *dockers == CHANCE {
            expected[1].clone_from(&found[1]);
        }
        if found != expected {
            wrong.push(format!("{text}\n  found {found:?}, not {expected:?}"));
        }
    }
    assert!(wrong.is_empty(), "coordinator, docker, skopeo:\n{}", wrong.join("\n"));
}

#[test]
fn a_file_is_found_where_podman_and_kubernetes_put_it_and_counts_as_soon_as_it_changes() {
    let registry = curious().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let environment = vec![("DOCKER_CONFIG".to_owned(), directory.path().display().to_string())];
    let site = Site::start_with(&SiteSpec { environment, ..SiteSpec::default() }).unwrap();
    assert_eq!(coordinator(&site, &registry, "none").unwrap(), NOBODY);
    let login = |user: &str| {
        let auth = STANDARD.encode(format!("{user}:pw"));
        serde_json::json!({"auths": {registry.address(): {"auth": auth}}}).to_string()
    };
    // As Kubernetes mounts a secret: symbolic links that are swapped.
    for user in ["one", "two"] {
        let version = directory.path().join(format!("..{user}"));
        std::fs::create_dir(&version).unwrap();
        std::fs::write(version.join(".dockerconfigjson"), login(user)).unwrap();
        std::os::unix::fs::symlink(&version, directory.path().join("..next")).unwrap();
        std::fs::rename(directory.path().join("..next"), directory.path().join("..data")).unwrap();
        let link = directory.path().join(".dockerconfigjson");
        if !link.exists() {
            std::os::unix::fs::symlink("..data/.dockerconfigjson", link).unwrap();
        }
        assert_eq!(coordinator(&site, &registry, &format!("app-{user}")).unwrap(), format!("{user}:pw"));
    }
    std::fs::write(directory.path().join("auth.json"), login("podman")).unwrap();
    assert_eq!(coordinator(&site, &registry, "app-podman").unwrap(), "podman:pw");
    std::fs::create_dir(directory.path().join("config.json")).unwrap();
    let refused = site.ctl().run(&["pull", &registry.reference("app-directory", "1")]).unwrap();
    assert!(refused.stderr.contains("config.json cannot be read"), "{}", refused.stderr);
    // The variable may also name the file itself.
    let environment = vec![("DOCKER_CONFIG".to_owned(), directory.path().join("auth.json").display().to_string())];
    let site = Site::start_with(&SiteSpec { environment, ..SiteSpec::default() }).unwrap();
    assert_eq!(coordinator(&site, &registry, "app-file").unwrap(), "podman:pw");
}
