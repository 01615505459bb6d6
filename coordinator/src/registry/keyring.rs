//! Credentials that were looked up, kept for a while: a crowd of jobs asks a helper once.
//!
//! Helpers and `config.json` do not say until when what they give is good. So it is kept for some minutes at most, and less as
//! soon as a registry refuses it ([`Keyring::forget`]). Each registry's time differs by chance, so that what was looked up
//! together is not looked up again together.
//!
//! `state` guards what is kept and the look-ups under way; it is never held across an await.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use parking_lot::Mutex;

use crate::registry::credentials::{CredentialStore, Credentials};
use crate::registry::error::RegistryError;

/// How long credentials are kept at most.
const LIFE: Duration = Duration::from_secs(5 * 60);
/// The share of that by which times differ.
const SPREAD: f64 = 0.2;

/// Until when what is made of credentials that were looked up now is good.
pub(super) fn life_from(now: tokio::time::Instant) -> Option<tokio::time::Instant> {
    now.checked_add(spread_out(LIFE, SPREAD))
}

type LookUp = Shared<BoxFuture<'static, Result<Credentials, RegistryError>>>;

/// `whole`, less a part of it that differs each time: at most `spread` of it.
pub fn spread_out(whole: Duration, spread: f64) -> Duration {
    whole.mul_f64(1.0 - spread * rand::random::<f64>())
}

#[derive(Default)]
struct State {
    kept: HashMap<String, (Credentials, Instant)>,
    under_way: HashMap<String, LookUp>,
}

/// Credentials by registry.
pub struct Keyring {
    store: CredentialStore,
    state: Mutex<State>,
}

impl Keyring {
    /// Looks up in `store`.
    pub fn new(store: CredentialStore) -> Keyring {
        Keyring { store, state: Mutex::default() }
    }

    /// Who we are to `registry`. Of those who ask at the same time one looks up.
    pub async fn credentials(&self, registry: &str) -> Result<Credentials, RegistryError> {
        let looking = {
            let mut state = self.state.lock();
            match state.kept.get(registry) {
                Some((kept, until)) if Instant::now() < *until => return Ok(kept.clone()),
                _ => {}
            }
            let start = || look_up(self.store.clone(), registry.to_owned());
            state.under_way.entry(registry.to_owned()).or_insert_with(start).clone()
        };
        let found = looking.clone().await;
        let mut state = self.state.lock();
        if state.under_way.get(registry).is_some_and(|present| present.ptr_eq(&looking)) {
            state.under_way.remove(registry);
            if let Ok(credentials) = &found {
                let until = Instant::now() + spread_out(LIFE, SPREAD);
                state.kept.insert(registry.to_owned(), (credentials.clone(), until));
            }
        }
        found
    }

    /// The registry refused `used`: if that is what is kept, it is looked up again the next time.
    pub fn forget(&self, registry: &str, used: &Credentials) {
        let mut state = self.state.lock();
        if state.kept.get(registry).is_some_and(|(kept, _)| kept == used) {
            state.kept.remove(registry);
        }
    }
}

/// Looks up on a thread where blocking is allowed: a helper is a process.
fn look_up(store: CredentialStore, registry: String) -> LookUp {
    async move {
        let name = registry.clone();
        tokio::task::spawn_blocking(move || store.lookup(&registry)).await.unwrap_or_else(|_| {
            Err(RegistryError::Credentials { registry: name, why: "reading them was interrupted".to_owned() })
        })
    }
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

    #[tokio::test]
    async fn what_was_looked_up_is_kept_until_it_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        let keyring = Keyring::new(CredentialStore { config: Some(path.clone()) });
        write(&path, "one");
        let first = keyring.credentials("r").await.unwrap();
        write(&path, "two");
        assert_eq!(keyring.credentials("r").await.unwrap(), first);
        keyring.forget("r", &first);
        let second = keyring.credentials("r").await.unwrap();
        assert_ne!(second, first);
        write(&path, "three");
        keyring.forget("r", &first);
        assert_eq!(keyring.credentials("r").await.unwrap(), second, "what came after it is not refused with it");
    }

    #[tokio::test]
    async fn failures_are_not_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        let keyring = Keyring::new(CredentialStore { config: Some(path.clone()) });
        std::fs::write(&path, "{").unwrap();
        assert!(keyring.credentials("r").await.is_err());
        write(&path, "one");
        assert!(keyring.credentials("r").await.is_ok());
    }

    #[test]
    fn times_differ_by_their_share() {
        for _ in 0..100 {
            let time = spread_out(Duration::from_secs(100), 0.2);
            assert!((80..=100).contains(&time.as_secs()), "{time:?}");
        }
    }
}
