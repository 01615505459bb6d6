//! Credentials by registry: the file is read on every look-up, and helpers' answers are cached for a while.
//!
//! A change of the file takes effect at once. A helper is a process, and many jobs that need it at the same time share one run. Helpers do
//! not say how long their answers are valid: an answer is kept for some minutes at most, and dropped as soon as a registry refuses it
//! ([`CredentialCache::forget`]). Each answer's time is randomised, so that answers that were looked up together do not expire together.
//!
//! `state` guards the cached answers and the look-ups under way; it is never held across an await.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use parking_lot::Mutex;

use crate::registries::error::RegistryError;
use crate::registries::oci::credential_helper::{self, Login};
use crate::registries::oci::credentials::{Credentials, Secret};
use crate::registries::oci::docker_config::{CredentialStore, Source};

/// How long a helper's answer is kept at most.
const LIFE: Duration = Duration::from_secs(5 * 60);
/// The share of that time by which it is randomly shortened.
const SPREAD: f64 = 0.2;

/// When something that is made from credentials expires, if those were looked up at `now`.
pub(super) fn life_from(now: tokio::time::Instant) -> Option<tokio::time::Instant> {
    now.checked_add(spread_out(LIFE, SPREAD))
}

/// A helper's name, and the first server that it is asked for.
type Question = (String, String);
/// A helper's answer; `None` if it has no login. An error is a sentence.
type Known = Result<Option<Credentials>, String>;
type LookUp = Shared<BoxFuture<'static, Known>>;
/// Asks a helper, given by its name, for the login of a server.
type Ask = dyn Fn(&str, &str) -> Result<Login, String> + Send + Sync;

/// `whole`, randomly shortened by at most the share `spread`.
pub fn spread_out(whole: Duration, spread: f64) -> Duration {
    whole.mul_f64(1.0 - spread * rand::random::<f64>())
}

#[derive(Default)]
struct State {
    kept: HashMap<Question, (Option<Credentials>, Instant)>,
    under_way: HashMap<Question, LookUp>,
}

/// Credentials by registry and repository.
pub struct CredentialCache {
    store: CredentialStore,
    ask: Arc<Ask>,
    state: Mutex<State>,
}

impl CredentialCache {
    /// A cache of what `store` and its helpers say.
    pub fn new(store: CredentialStore) -> CredentialCache {
        CredentialCache::with(store, Arc::new(credential_helper::ask))
    }

    /// The same, with `ask` in place of the system's helpers.
    fn with(store: CredentialStore, ask: Arc<Ask>) -> CredentialCache {
        CredentialCache { store, ask, state: Mutex::default() }
    }

    /// The credentials for a repository of `registry`.
    pub async fn credentials(&self, registry: &str, repository: &str) -> Result<Credentials, RegistryError> {
        let failed = |why: String| RegistryError::Credentials { registry: registry.to_owned(), why };
        let (store, names) = (self.store.clone(), (registry.to_owned(), repository.to_owned()));
        let reading = tokio::task::spawn_blocking(move || store.source(&names.0, &names.1)).await;
        let (file, source) = reading.map_err(|_| failed("reading them was interrupted".to_owned()))??;
        let says = |why: String| failed(format!("{file}: {why}"));
        let (name, servers, otherwise) = match source {
            Source::File(read) => return read.map_err(says),
            Source::Helper { name, servers, otherwise } => (name, servers, otherwise),
        };
        match (self.asked(name, servers).await, otherwise) {
            (Ok(Some(credentials)), _) => Ok(credentials),
            (Ok(None), otherwise) => otherwise.unwrap_or(Ok(Credentials::Anonymous)).map_err(says),
            // The login was written before the helper was configured, or by a tool that does not use it.
            (Err(why), Some(Ok(filed))) => {
                tracing::warn!("registry {registry}: {why}: the login in {file} is used");
                Ok(filed)
            }
            (Err(why), _) => Err(says(why)),
        }
    }

    /// Asks a helper, or takes its cached answer. Callers that ask at the same time share one run.
    async fn asked(&self, name: String, servers: Vec<String>) -> Known {
        let question = (name.clone(), servers.first().cloned().unwrap_or_default());
        let asking = {
            let mut state = self.state.lock();
            match state.kept.get(&question) {
                Some((kept, until)) if Instant::now() < *until => return Ok(kept.clone()),
                _ => {}
            }
            let start = || look_up(Arc::clone(&self.ask), name, servers);
            state.under_way.entry(question.clone()).or_insert_with(start).clone()
        };
        let found = asking.clone().await;
        let mut state = self.state.lock();
        if state.under_way.get(&question).is_some_and(|present| present.ptr_eq(&asking)) {
            state.under_way.remove(&question);
            if let Ok(known) = &found {
                let until = Instant::now() + spread_out(LIFE, SPREAD);
                state.kept.insert(question, (known.clone(), until));
            }
        }
        found
    }

    /// Drops `used` after a registry refused it: the helper that gave it is asked again the next time. If `used` is anonymous, this applies
    /// to helpers that had no login.
    pub fn forget(&self, used: &Credentials) {
        let is_same = |kept: &Option<Credentials>| match kept {
            Some(kept) => kept == used,
            None => *used == Credentials::Anonymous,
        };
        self.state.lock().kept.retain(|_, (kept, _)| !is_same(kept));
    }
}

/// Asks a helper on a thread that may block.
fn look_up(ask: Arc<Ask>, name: String, servers: Vec<String>) -> LookUp {
    let look = move || {
        for (number, server) in servers.iter().enumerate() {
            match ask(&name, server) {
                Ok(Login::None) => {}
                Ok(Login::Password(user, password)) => return Ok(Some(Credentials::of(user, password))),
                Ok(Login::Token(token)) => {
                    return Ok(Some(Credentials::Identity { token: Secret::new(token), password: None }));
                }
                // Errors about the additional names are ignored.
                Err(why) if number == 0 => return Err(why),
                Err(_) => {}
            }
        }
        Ok(None)
    };
    async move { tokio::task::spawn_blocking(look).await.unwrap_or_else(|_| Err("asking was interrupted".to_owned())) }
        .boxed()
        .shared()
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;

    use super::*;

    fn write(path: &std::path::Path, password: &str) {
        let auth = base64::engine::general_purpose::STANDARD.encode(format!("anna:{password}"));
        std::fs::write(path, format!(r#"{{"auths": {{"r": {{"auth": "{auth}"}}}}}}"#)).unwrap();
    }

    fn anna(password: &str) -> Credentials {
        Credentials::of("anna".to_owned(), password.to_owned())
    }

    /// A credential cache of this configuration, whose helpers answer as `ask` says.
    fn credential_cache(
        config: &str,
        ask: impl Fn(&str, &str) -> Result<Login, String> + Send + Sync + 'static,
    ) -> (tempfile::TempDir, CredentialCache) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("config.json"), config).unwrap();
        let store = CredentialStore { config: Some(directory.path().to_owned()) };
        (directory, CredentialCache::with(store, Arc::new(ask)))
    }

    #[tokio::test]
    async fn a_file_that_changes_counts_at_once() {
        let (directory, credential_cache) = credential_cache("{}", |_, _| Ok(Login::None));
        let path = directory.path().join("config.json");
        assert_eq!(credential_cache.credentials("r", "app").await, Ok(Credentials::Anonymous));
        for password in ["one", "two"] {
            write(&path, password);
            assert_eq!(credential_cache.credentials("r", "app").await, Ok(anna(password)));
        }
        std::fs::write(&path, "{").unwrap();
        assert!(matches!(credential_cache.credentials("r", "app").await, Err(RegistryError::Credentials { .. })));
        // As Kubernetes changes what it mounts: a link to a link to a file.
        std::fs::remove_file(&path).unwrap();
        for version in ["..one", "..two"] {
            std::fs::create_dir(directory.path().join(version)).unwrap();
            write(&directory.path().join(version).join("config.json"), version);
            let next = directory.path().join("..next");
            std::os::unix::fs::symlink(version, &next).unwrap();
            std::fs::rename(&next, directory.path().join("..data")).unwrap();
            if version == "..one" {
                std::os::unix::fs::symlink("..data/config.json", &path).unwrap();
            }
            assert_eq!(credential_cache.credentials("r", "app").await, Ok(anna(version)));
        }
    }

    #[tokio::test]
    async fn what_a_helper_said_is_kept_until_it_is_refused() {
        let asked = Arc::new(Mutex::new(0));
        let counting = Arc::clone(&asked);
        let (_directory, credential_cache) = credential_cache(r#"{"credsStore": "s"}"#, move |_, _| {
            *counting.lock() += 1;
            Ok(Login::Password("anna".to_owned(), counting.lock().to_string()))
        });
        let first = credential_cache.credentials("r", "one").await.unwrap();
        assert_eq!((credential_cache.credentials("r", "two").await.unwrap(), *asked.lock()), (first.clone(), 1));
        credential_cache.forget(&first);
        let second = credential_cache.credentials("r", "one").await.unwrap();
        assert_eq!((second != first, *asked.lock()), (true, 2));
        credential_cache.forget(&first);
        assert_eq!(
            credential_cache.credentials("r", "one").await.unwrap(),
            second,
            "what came after it is not refused with it"
        );
    }

    #[tokio::test]
    async fn failures_are_not_kept() {
        let fails = Arc::new(Mutex::new(true));
        let failing = Arc::clone(&fails);
        let (_directory, credential_cache) = credential_cache(r#"{"credsStore": "s"}"#, move |_, _| {
            if *failing.lock() { Err("docker-credential-s fails".to_owned()) } else { Ok(Login::Token("t".to_owned())) }
        });
        let error = credential_cache.credentials("r", "app").await.unwrap_err().to_string();
        assert!(error.contains("config.json: docker-credential-s fails"), "{error}");
        *fails.lock() = false;
        let token = Credentials::Identity { token: Secret::new("t".to_owned()), password: None };
        assert_eq!(credential_cache.credentials("r", "app").await, Ok(token));
    }

    /// Answers with what it was asked.
    fn echo(name: &str, server: &str) -> Result<Login, String> {
        match name {
            "none" => Ok(Login::None),
            "broken" => Err("docker-credential-broken fails".to_owned()),
            "second" if !server.starts_with("https://r") => Ok(Login::None),
            name => Ok(Login::Password(name.to_owned(), server.to_owned())),
        }
    }

    #[tokio::test]
    async fn helpers_and_the_file_come_in_dockers_order() {
        for (config, registry, expected) in [
            (r#"{"credHelpers": {"r": "own"}, "credsStore": "all", "auths": {"r": {AUTH}}}"#, "r", Some(("own", "r"))),
            (r#"{"credHelpers": {"r": "own"}, "credsStore": "all"}"#, "q", Some(("all", "q"))),
            (r#"{"credHelpers": {"r": ""}, "credsStore": "all", "auths": {"r": {AUTH}}}"#, "r", Some(("anna", "pw"))),
            (r#"{"credHelpers": {"r": ""}, "credsStore": "all"}"#, "r", None),
            (r#"{"credHelpers": {"r": null}, "credsStore": "all"}"#, "r", None),
            (r#"{"credsStore": "all", "auths": {"r": {AUTH}}}"#, "r", Some(("all", "r"))),
            (r#"{"credsStore": "", "auths": {"r": {AUTH}}}"#, "r", Some(("anna", "pw"))),
            (r#"{"credsStore": "none", "auths": {"r": {AUTH}}}"#, "r", Some(("anna", "pw"))),
            (r#"{"credsStore": "broken", "auths": {"r": {AUTH}}}"#, "r", Some(("anna", "pw"))),
            (r#"{"credsStore": "none", "auths": {"r": {}}}"#, "r", None),
            (r#"{"credHelpers": {"q": "own"}, "auths": {"r": {AUTH}}}"#, "r", Some(("anna", "pw"))),
            (r#"{"CREDHELPERS": {"R": "own"}}"#, "r", Some(("own", "r"))),
            (r#"{"credHelpers": {"https://r": "own"}}"#, "r", Some(("own", "r"))),
            (r#"{"credsStore": "second"}"#, "r", Some(("second", "https://r"))),
            (r#"{"credsStore": "all"}"#, "docker.io", Some(("all", "https://index.docker.io/v1/"))),
            (r#"{"credHelpers": {"docker.io": "own"}}"#, "docker.io", Some(("own", "https://index.docker.io/v1/"))),
            (
                r#"{"credHelpers": {"https://index.docker.io/v1/": "own", "docker.io": "no"}}"#,
                "docker.io",
                Some(("own", "https://index.docker.io/v1/")),
            ),
            // A login that podman stored for a part of the path is for that part only.
            (r#"{"credsStore": "all", "auths": {"r/team": {AUTH}}}"#, "r", Some(("anna", "pw"))),
            (r#"{"credsStore": "all", "auths": {"r/others": {AUTH}}}"#, "r", Some(("all", "r"))),
            (r#"{"credHelpers": {"r": "own"}, "auths": {"r/team": {AUTH}}}"#, "r", Some(("own", "r"))),
        ] {
            let (_directory, credential_cache) =
                credential_cache(&config.replace("AUTH", r#""auth": "YW5uYTpwdw==""#), echo);
            let expected = match expected {
                Some((user, password)) => Credentials::of(user.to_owned(), password.to_owned()),
                None => Credentials::Anonymous,
            };
            assert_eq!(credential_cache.credentials(registry, "team/app").await, Ok(expected), "{config}");
        }
    }

    #[tokio::test]
    async fn a_helper_that_fails_is_an_error_not_anonymity() {
        for config in [
            r#"{"credHelpers": {"r": "broken"}}"#,
            r#"{"credsStore": "broken", "auths": {"r": {}}}"#,
            r#"{"credsStore": "broken", "auths": {"r": {"auth": "%"}}}"#,
        ] {
            let (_directory, credential_cache) = credential_cache(config, echo);
            let error = credential_cache.credentials("r", "app").await.unwrap_err().to_string();
            assert!(error.contains("docker-credential-broken fails"), "{config}: {error}");
        }
        let (_directory, credential_cache) =
            credential_cache(r#"{"credHelpers": {"r": "no-such-helper"}}"#, credential_helper::ask);
        let error = credential_cache.credentials("r", "app").await.unwrap_err().to_string();
        assert!(error.contains("docker-credential-no-such-helper cannot be run"), "{error}");
    }

    #[test]
    fn times_differ_by_their_share() {
        for _ in 0..100 {
            let time = spread_out(Duration::from_secs(100), 0.2);
            assert!((80..=100).contains(&time.as_secs()), "{time:?}");
        }
    }
}
