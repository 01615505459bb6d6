//! Secrets are not leaked: whatever happens, and however much is logged, none is found in a log, an event, an answer,
//! an error, the database or the store.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use tests::cluster::{Ctl, Mount};
use tests::http;
use tests::images::small;
use tests::process::{Output, TIMEOUT, wait_until};
use tests::registry::{Access, Fault, FaultyRegistry, Match, Registry, Transport};
use tests::secured::Secured;
use tests::site::SiteSpec;

/// Passwords that occur nowhere else.
const GOOD: &str = "Zwetschgenkompott-4711";
const WRONG: &str = "Zwiebelrostbraten-0815";
const SIGNATURE: &str = "Quittengelee2349";

/// A credential helper that counts its calls.
struct Helper {
    directory: tempfile::TempDir,
}

impl Helper {
    fn new(user: &str, password: &str) -> Result<Helper> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("docker-credential-counting");
        let asked = directory.path().join("asked");
        let answer = json!({"Username": user, "Secret": password});
        // Slow, so that many clients ask at the same time.
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

/// Collects every file below a directory.
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

/// The secrets that a text contains, with the place where it was found.
fn leaks(secrets: &[(String, String)], place: &str, text: &[u8]) -> Vec<String> {
    let holds = |secret: &str| text.windows(secret.len()).any(|window| window == secret.as_bytes());
    let found = secrets.iter().filter(|(_, secret)| holds(secret));
    found.map(|(name, _)| format!("{place} holds {name}")).collect()
}

/// Writes Docker's configuration of a site: the logins, and the registries for which the helper is used.
fn configure(secured: &Secured, logins: &[(String, &str)], helped: &[String]) -> Result<()> {
    let login = |(registry, password): &(String, &str)| {
        (registry.clone(), json!({"auth": STANDARD.encode(format!("eve:{password}"))}))
    };
    let logins: serde_json::Map<_, _> = logins.iter().map(login).collect();
    let helpers: serde_json::Map<_, _> = helped.iter().map(|registry| (registry.clone(), json!("counting"))).collect();
    let text = json!({"auths": logins, "credHelpers": helpers}).to_string();
    Ok(std::fs::write(secured.site.path().join("state-docker/config.json"), text)?)
}

/// Registries with passwords and with tokens, behind proxies that record the credentials of requests.
struct Guarded {
    _registries: [Registry; 2],
    password: FaultyRegistry,
    token: FaultyRegistry,
    /// The challenge of the registry with tokens.
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
        Ok(Guarded { _registries: registries, password: password?, token: token?, challenge })
    }

    /// The credentials that the registries received: values of the headers without their scheme.
    fn shown(&self) -> Vec<String> {
        let requests = [self.password.requests(), self.token.requests()].concat();
        let headers = requests.into_iter().filter_map(|request| request.authorization);
        let mut shown: Vec<_> = headers.filter_map(|value| Some(value.split_once(' ')?.1.to_owned())).collect();
        shown.sort_unstable();
        shown.dedup();
        shown
    }
}

/// A coordinator that logs everything, and all command lines with their output.
struct Scene {
    guarded: Guarded,
    helper: Helper,
    secured: Secured,
    said: Vec<(String, String)>,
}

impl Scene {
    fn start() -> Result<Scene> {
        let (guarded, helper) = (Guarded::start()?, Helper::new("eve", GOOD)?);
        let secured = Secured::start(&SiteSpec {
            settings: "retry_attempts = 2\nparallel_jobs = 6\nhost_lease = '3s'\n".to_owned(),
            arguments: vec!["--log=trace".to_owned()],
            environment: vec![("PATH".to_owned(), helper.path())],
            ..SiteSpec::default()
        })?;
        Ok(Scene { guarded, helper, secured, said: Vec::new() })
    }

    fn run(&mut self, ctl: &Ctl, arguments: &[&str]) -> Result<Output> {
        let output = ctl.run(arguments)?;
        self.said.push((arguments.join(" "), format!("{}{}", output.stdout, output.stderr)));
        Ok(output)
    }

    /// Tries wrong passwords, then correct ones, without a restart.
    fn log_in(&mut self) -> Result<()> {
        let ctl = self.secured.site.ctl();
        let (password, token) = (self.guarded.password.address(), self.guarded.token.address());
        configure(&self.secured, &[(password, WRONG), (token, WRONG)], &[])?;
        for reference in [self.guarded.password.reference("a", "1"), self.guarded.token.reference("a", "1")] {
            let refused = self.run(&ctl, &["pull", &reference])?;
            ensure!(refused.code == 1 && refused.stderr.contains("refuses"), "{}", refused.stderr);
        }
        configure(&self.secured, &[(self.guarded.password.address(), GOOD)], &[self.guarded.token.address()])?;
        let reference = self.guarded.password.reference("a", "1");
        self.run(&ctl, &["pull", &reference])?.ok()?;
        ensure!(self.helper.asked() == 0, "the helper was asked for another registry's login");
        Ok(())
    }

    /// Pulls many images at once, with a token that is refused although it was valid, and with redirects to a signed address.
    fn pull(&mut self) -> Result<()> {
        let ctl = self.secured.site.ctl();
        let names: Vec<_> =
            ["a", "b", "c", "d", "e", "f"].iter().map(|name| self.guarded.token.reference(name, "1")).collect();
        let mut pull = vec!["pull"];
        pull.extend(names.iter().map(String::as_str));
        self.run(&ctl, &pull)?.ok()?;
        ensure!(self.helper.asked() == 1, "a helper is asked once for a crowd");
        self.run(&ctl, &["remove", &names[0]])?.ok()?;
        let expired = Fault::Status(401, vec![("WWW-Authenticate".to_owned(), self.guarded.challenge.clone())]);
        self.guarded.token.inject(Match::Manifests, expired, 1);
        self.run(&ctl, &["pull", &names[0]])?.ok()?;
        // No credentials are sent to the redirect's target. The registry refuses such a request, and the original path is requested again.
        self.run(&ctl, &["remove", &names[0]])?.ok()?;
        let address = self.guarded.token.address();
        let signed = format!("http://{address}/v2/a/manifests/1?X-Signature={SIGNATURE}");
        let redirect = Fault::Status(307, vec![("Location".to_owned(), signed)]);
        self.guarded.token.inject(Match::Manifests, redirect.clone(), 1);
        self.run(&ctl, &["pull", &names[0]])?.ok()?;
        // The same, but the pull fails in the end.
        self.guarded.token.inject(Match::Path(SIGNATURE.to_owned()), Fault::Status(500, Vec::new()), 100);
        self.guarded.token.inject(Match::Manifests, redirect, 100);
        self.run(&ctl, &["remove", &names[1]])?.ok()?;
        ensure!(self.run(&ctl, &["pull", &names[1]])?.code == 1, "a pull that cannot work worked");
        Ok(())
    }

    /// Creates, uses and mistypes the coordinator's own tokens, as users do and as a host that logs everything does.
    fn use_tokens(&mut self) -> Result<[String; 2]> {
        let node = self.secured.token("node", "host", &[])?;
        let admin = self.secured.token("boss", "admin", &[])?;
        let mut spec = self.secured.host("one", &node)?;
        spec.environment.push(("CACHEFS_LOG".to_owned(), "trace".to_owned()));
        let mount = Mount::start(spec)?;
        wait_until("the host", TIMEOUT, || Ok(self.secured.site.ctl().ok(&["hosts"])?.contains("live")))?;
        let mistyped = format!("{admin}0");
        for (token, arguments) in [
            (&admin, &["status"][..]),
            (&admin, &["token", "list"]),
            (&mistyped, &["images"]),
            (&node, &["token", "list"]),
        ] {
            let ctl = self.secured.ctl(Some(token));
            self.run(&ctl, arguments)?;
        }
        let events = ["events", "--since", "0", "-n", "1000"];
        for arguments in [&["jobs"][..], &events, &["images"], &["hosts"], &["token", "list"], &["status"]] {
            let said = self.secured.site.ctl().json(arguments)?.to_string();
            self.said.push((arguments.join(" "), said));
        }
        drop(mount);
        Ok([node, admin])
    }

    /// Everything that must not be found, with a name for each.
    fn secrets(&self, tokens: &[String; 2]) -> Vec<(String, String)> {
        let of_login = |password: &str| STANDARD.encode(format!("eve:{password}"));
        let mut secrets = vec![
            ("the password".to_owned(), GOOD.to_owned()),
            ("the wrong password".to_owned(), WRONG.to_owned()),
            ("the login".to_owned(), of_login(GOOD)),
            ("the wrong login".to_owned(), of_login(WRONG)),
            ("the signature".to_owned(), SIGNATURE.to_owned()),
        ];
        let secret = |token: &String| token.rsplit('_').next().unwrap_or(token).to_owned();
        secrets.extend(tokens.iter().map(|token| ("a token of ours".to_owned(), secret(token))));
        let shown = self.guarded.shown().into_iter();
        secrets.extend(shown.map(|header| ("what was shown to a registry".to_owned(), header)));
        secrets
    }

    /// Searches all command output and all files for secrets. Returns what was found and the number of bytes searched.
    fn search(&self, secrets: &[(String, String)]) -> Result<(Vec<String>, usize)> {
        let mut found = Vec::new();
        for (what, text) in &self.said {
            found.extend(leaks(secrets, &format!("what cachefsctl {what} says"), text.as_bytes()));
        }
        let mut paths = Vec::new();
        files(self.secured.site.path(), &mut paths)?;
        let source = self.secured.site.path().join("state-docker");
        let mut searched = 0;
        for path in paths.iter().filter(|path| !path.starts_with(&source)) {
            let bytes = std::fs::read(path)?;
            searched += bytes.len();
            found.extend(leaks(secrets, &path.display().to_string(), &bytes));
        }
        Ok((found, searched))
    }
}

#[test]
fn no_secret_is_found_anywhere() -> Result<()> {
    let mut scene = Scene::start()?;
    scene.log_in()?;
    scene.pull()?;
    let tokens = scene.use_tokens()?;
    scene.secured.site.coordinator().stop()?;
    let shown = scene.guarded.shown().len();
    assert!(shown >= 8, "{shown} headers: two logins and a token for each repository");
    let secrets = scene.secrets(&tokens);
    let (found, searched) = scene.search(&secrets)?;
    let log = scene.secured.site.coordinator().process().log();
    assert!(log.contains("TRACE") && log.contains("DEBUG"), "everything was logged");
    assert!(scene.guarded.token.count(&Match::Path(SIGNATURE.to_owned())) > 1, "the redirects were followed");
    let user = [("the user, who is no secret".to_owned(), "eve".to_owned())];
    assert!(!leaks(&user, "the log", log.as_bytes()).is_empty(), "what is there is found");
    assert!(searched > 1_000_000, "{searched} bytes were searched");
    assert!(found.is_empty(), "{}", found.join("\n"));
    Ok(())
}
