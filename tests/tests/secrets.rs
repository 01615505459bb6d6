//! Secrets stay where they belong: whatever happens, however much is logged, none is found in a log, an event, an answer,
//! an error, the database or the store.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use tests::cluster::Mount;
use tests::http;
use tests::images::{ImageFiles, small};
use tests::process::{PATIENCE, wait_until};
use tests::registry::{Access, Fault, FaultyRegistry, Match, Registry, Transport};
use tests::secured::Secured;
use tests::site::SiteSpec;

/// Passwords that look like nothing else.
const GOOD: &str = "Zwetschgenkompott-4711";
const WRONG: &str = "Zwiebelrostbraten-0815";
const SIGNATURE: &str = "Quittengelee2349";

/// A credential helper that counts how often it is asked.
struct Helper {
    directory: tempfile::TempDir,
}

impl Helper {
    fn new(user: &str, password: &str) -> Result<Helper> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("docker-credential-counting");
        let asked = directory.path().join("asked");
        let answer = json!({"Username": user, "Secret": password});
        // Slow, so that many ask at the same time.
        let script = format!(
            "#!/bin/sh\nread registry\necho \"$registry\" >> {}\nsleep 0.3\necho '{answer}'\n",
            asked.display()
        );
        std::fs::write(&path, script)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        Ok(Helper { directory })
    }

    fn path(&self) -> String {
        format!("{}:{}", self.directory.path().display(), std::env::var("PATH").unwrap_or_default())
    }

    fn asked(&self) -> usize {
        std::fs::read_to_string(self.directory.path().join("asked")).unwrap_or_default().lines().count()
    }
}

/// Every file below a directory.
fn files(directory: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))? {
        let entry = entry?;
        match entry.file_type()? {
            kind if kind.is_dir() => files(&entry.path(), found)?,
            kind if kind.is_file() => found.push(entry.path()),
            _ => {}
        }
    }
    Ok(())
}

/// The secrets that are found in a text, with where it is from.
fn leaks(secrets: &[(String, String)], place: &str, text: &[u8]) -> Vec<String> {
    let holds = |secret: &str| text.windows(secret.len()).any(|window| window == secret.as_bytes());
    let found = secrets.iter().filter(|(_, secret)| holds(secret));
    found.map(|(name, _)| format!("{place} holds {name}")).collect()
}

/// Writes Docker's configuration of a site: logins as they stand there, and registries with a helper.
fn configure(secured: &Secured, logins: &[(String, &str)], helped: &[String]) -> Result<()> {
    let login = |(registry, password): &(String, &str)| {
        (registry.clone(), json!({"auth": STANDARD.encode(format!("eve:{password}"))}))
    };
    let logins: serde_json::Map<_, _> = logins.iter().map(login).collect();
    let helpers: serde_json::Map<_, _> = helped.iter().map(|registry| (registry.clone(), json!("counting"))).collect();
    let text = json!({"auths": logins, "credHelpers": helpers}).to_string();
    Ok(std::fs::write(secured.site.path().join("state-docker/config.json"), text)?)
}

/// Registries that want passwords and tokens, behind proxies that see what is shown to them.
struct Guarded {
    _registries: [Registry; 2],
    password: FaultyRegistry,
    token: FaultyRegistry,
    image: ImageFiles,
    /// The challenge of the second.
    challenge: String,
}

impl Guarded {
    fn start() -> Result<Guarded> {
        let access = |make: fn(String, String) -> Access| make("eve".to_owned(), GOOD.to_owned());
        let password = access(|user, password| Access::Password { user, password });
        let token = access(|user, password| Access::Token { user, password });
        let registries =
            [Registry::start_with(&password, Transport::Http)?, Registry::start_with(&token, Transport::Http)?];
        let image = small()?;
        for registry in &registries {
            for name in ["a", "b", "c", "d", "e", "f"] {
                registry.push(&image, name, "1")?;
            }
        }
        let answer = http::get(&registries[1].address(), "/v2/a/manifests/1", &[])?;
        let challenge = answer.head.header("WWW-Authenticate").context("no challenge")?.to_owned();
        let [password, token] = [0, 1].map(|n: usize| FaultyRegistry::start(&registries[n].address()));
        Ok(Guarded { _registries: registries, password: password?, token: token?, image, challenge })
    }

    /// What was shown to the registries: whole headers' values without their scheme.
    fn shown(&self) -> Vec<String> {
        let requests = [self.password.requests(), self.token.requests()].concat();
        let headers = requests.into_iter().filter_map(|request| request.authorization);
        let mut shown: Vec<_> = headers.filter_map(|value| Some(value.split_once(' ')?.1.to_owned())).collect();
        shown.sort_unstable();
        shown.dedup();
        shown
    }
}

#[test]
fn no_secret_is_found_anywhere() {
    let (guarded, helper) = (Guarded::start().unwrap(), Helper::new("eve", GOOD).unwrap());
    let mut secured = Secured::start(&SiteSpec {
        settings: "retry_attempts = 2\nparallel_jobs = 6\nhost_lease = '3s'\n".to_owned(),
        arguments: vec!["--log=trace".to_owned()],
        environment: vec![("PATH".to_owned(), helper.path())],
        ..SiteSpec::default()
    })
    .unwrap();
    let (password, token) = (&guarded.password, &guarded.token);
    let mut said = Vec::new();
    let mut run = |arguments: &[&str]| {
        let output = secured.site.ctl().run(arguments).unwrap();
        said.push((arguments.join(" "), format!("{}{}", output.stdout, output.stderr)));
        output
    };
    // Wrong passwords, then right ones, without a restart.
    configure(&secured, &[(password.address(), WRONG), (token.address(), WRONG)], &[]).unwrap();
    for proxy in [password, token] {
        let refused = run(&["pull", &proxy.reference("a", "1")]);
        assert!(refused.code == 1 && refused.stderr.contains("refuses"), "{}", refused.stderr);
    }
    configure(&secured, &[(password.address(), GOOD)], &[token.address()]).unwrap();
    run(&["pull", &password.reference("a", "1")]).ok().unwrap();
    assert_eq!(helper.asked(), 0);
    // Many at once: one look-up for all.
    let names: Vec<_> = ["a", "b", "c", "d", "e", "f"].iter().map(|name| token.reference(name, "1")).collect();
    let mut pull = vec!["pull"];
    pull.extend(names.iter().map(String::as_str));
    run(&pull).ok().unwrap();
    assert_eq!(helper.asked(), 1, "a helper is asked once for a crowd");
    // A token that is refused although it was good, and a redirect to a signed address.
    let blob = &guarded.image.config.digest;
    run(&["remove", &names[0]]).ok().unwrap();
    let expired = Fault::Status(401, vec![("WWW-Authenticate".to_owned(), guarded.challenge.clone())]);
    token.inject(Match::Manifests, expired, 1);
    let signed = format!("http://{}/v2/a/manifests/1?X-Signature={SIGNATURE}", token.address());
    token.inject(Match::Manifests, Fault::Status(307, vec![("Location".to_owned(), signed.clone())]), 1);
    run(&["pull", &names[0]]).ok().unwrap();
    // The same where it fails in the end.
    token.inject(Match::Path(SIGNATURE.to_owned()), Fault::Status(500, Vec::new()), 100);
    token.inject(Match::Manifests, Fault::Status(307, vec![("Location".to_owned(), signed)]), 100);
    run(&["remove", &names[1]]).ok().unwrap();
    assert_eq!(run(&["pull", &names[1]]).code, 1, "{blob}");

    // Our own tokens: made, used, mistyped, by people and by a host that logs everything.
    let node = secured.token("node", "host", &[]).unwrap();
    let admin = secured.token("boss", "admin", &[]).unwrap();
    let mut spec = secured.host("one", &node).unwrap();
    spec.environment.push(("CACHEFS_LOG".to_owned(), "trace".to_owned()));
    let mount = Mount::start(spec).unwrap();
    wait_until("the host", PATIENCE, || Ok(secured.site.ctl().ok(&["hosts"])?.contains("live"))).unwrap();
    let mistyped = format!("{admin}0");
    for (token, arguments) in
        [(&admin, &["status"][..]), (&admin, &["token", "list"]), (&mistyped, &["images"]), (&node, &["token", "list"])]
    {
        let output = secured.ctl(Some(token)).run(arguments).unwrap();
        said.push((arguments.join(" "), format!("{}{}", output.stdout, output.stderr)));
    }
    for arguments in [
        &["jobs"][..],
        &["events", "--since", "0", "-n", "1000"],
        &["images"],
        &["hosts"],
        &["token", "list"],
        &["status"],
    ] {
        said.push((arguments.join(" "), secured.site.ctl().json(arguments).unwrap().to_string()));
    }
    drop(mount);
    secured.site.coordinator().stop().unwrap();

    let mut secrets =
        vec![("the password".to_owned(), GOOD.to_owned()), ("the wrong password".to_owned(), WRONG.to_owned())];
    for (name, password) in [("the login", GOOD), ("the wrong login", WRONG)] {
        secrets.push((name.to_owned(), STANDARD.encode(format!("eve:{password}"))));
    }
    secrets.push(("the signature".to_owned(), SIGNATURE.to_owned()));
    for token in [&node, &admin] {
        secrets.push(("a token of ours".to_owned(), token.rsplit('_').next().unwrap().to_owned()));
    }
    let shown = guarded.shown();
    assert!(shown.len() >= 8, "{} headers: two logins and a token for each repository", shown.len());
    secrets.extend(shown.into_iter().map(|header| ("what was shown to a registry".to_owned(), header)));

    let mut found = Vec::new();
    for (what, text) in &said {
        found.extend(leaks(&secrets, &format!("what cachefsctl {what} says"), text.as_bytes()));
    }
    let mut paths = Vec::new();
    files(secured.site.path(), &mut paths).unwrap();
    let is_source = |path: &Path| path.starts_with(secured.site.path().join("state-docker"));
    let mut searched = 0;
    for path in paths.iter().filter(|path| !is_source(path)) {
        let bytes = std::fs::read(path).unwrap();
        searched += bytes.len();
        found.extend(leaks(&secrets, &path.display().to_string(), &bytes));
    }
    let log = secured.site.coordinator().process().log();
    assert!(log.contains("TRACE") && log.contains("DEBUG"), "everything was logged");
    assert!(token.count(&Match::Path(SIGNATURE.to_owned())) > 1, "the redirects were followed");
    let user = [("the user, who is no secret".to_owned(), "eve".to_owned())];
    assert!(!leaks(&user, "the log", log.as_bytes()).is_empty(), "what is there is found");
    assert!(searched > 1_000_000, "{searched} bytes were searched");
    assert!(found.is_empty(), "{}", found.join("\n"));
}
