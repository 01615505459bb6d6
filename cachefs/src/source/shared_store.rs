//! The shared store as this host sees it: opened when it can be, retried while somebody waits.
//!
//! A mount must start while the shared disk is away, so the store is opened at first use and again until that works.
//! [`SharedStore::open`] and [`SharedStore::fetch`] may hang for as long as the disk does: only threads that may wait
//! call them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use store::Error;
use store::reader::Store;

use crate::source::failure::{Failure, Result};
use crate::source::metrics::Metrics;

/// First pause after a failed attempt; it doubles up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_millis(50);
/// Longest pause: soon enough after a file server's restart, seldom enough not to hinder it.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// The same error is logged once in this time.
const REPEAT: Duration = Duration::from_secs(60);
/// How long a hint is waited for at most.
const HINT_WAIT: Duration = Duration::from_secs(2);

/// The shared store, and how long to wait for it.
pub struct SharedStore {
    root: PathBuf,
    store: OnceLock<Store>,
    timeout: Duration,
    metrics: Arc<Metrics>,
    /// Guards when the store last answered.
    answered: Mutex<Option<Instant>>,
    /// Guards the errors that were logged lately.
    complaints: Mutex<HashMap<String, Instant>>,
}

/// What to do about a failed attempt.
enum Remedy {
    /// The disk may come back.
    Wait,
    /// The bytes may have been damaged on their way: they are read once more.
    OnceMore,
    /// It will not get better.
    GiveUp,
}

impl SharedStore {
    /// The store at `root`, not opened yet. Requests wait `timeout` for it.
    pub fn new(root: &Path, timeout: Duration, metrics: Arc<Metrics>) -> SharedStore {
        let (answered, complaints) = (Mutex::default(), Mutex::default());
        SharedStore { root: root.to_owned(), store: OnceLock::new(), timeout, metrics, answered, complaints }
    }

    /// The store's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The store, which is opened if it was not.
    pub fn open(&self) -> store::error::Result<&Store> {
        if let Some(store) = self.store.get() {
            return Ok(store);
        }
        let opened = Store::open(&self.root)?;
        Ok(self.store.get_or_init(|| opened))
    }

    /// Uses a store that was opened elsewhere.
    #[cfg(test)]
    pub(crate) fn preset(&self, store: Store) {
        let _ = self.store.set(store);
    }

    /// When the store last answered.
    pub fn answered(&self) -> Option<Instant> {
        *self.answered.lock()
    }

    /// The deadline of a request that starts now.
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.timeout
    }

    /// Until when a request that starts now waits for a hint, if what it asks for can also be had elsewhere.
    pub fn hint_deadline(&self) -> Instant {
        Instant::now() + self.hint_wait()
    }

    /// How long a hint is waited for.
    pub fn hint_wait(&self) -> Duration {
        HINT_WAIT.min(self.timeout / 2)
    }

    /// Counters, shared with everything that reads.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The counters, for holders that outlive a call.
    pub fn shared_metrics(&self) -> Arc<Metrics> {
        Arc::clone(&self.metrics)
    }

    /// Calls `read`, again and again while the disk is away and the result is `wanted`. Damaged bytes are read once
    /// more.
    pub fn fetch<T>(&self, wanted: impl Fn() -> bool, read: impl Fn(&Store) -> store::error::Result<T>) -> Result<T> {
        let mut pause = PAUSE;
        let mut doubted = false;
        loop {
            let error = match self.open().and_then(&read) {
                Ok(value) => {
                    *self.answered.lock() = Some(Instant::now());
                    return Ok(value);
                }
                Err(error) => error,
            };
            let remedy = self.remedy(&error);
            match remedy {
                Remedy::GiveUp if error.is_missing() => {}
                Remedy::Wait if error.is_missing() => self.complain(&self.away()),
                _ => self.complain(&error.to_string()),
            }
            match remedy {
                Remedy::Wait if wanted() => {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(PAUSE_MAX);
                }
                Remedy::OnceMore if !doubted => doubted = true,
                Remedy::OnceMore => {
                    self.metrics.damaged_in_store.one();
                    return Err(Failure::from(&error));
                }
                Remedy::Wait => return Err(Failure::Unreachable),
                Remedy::GiveUp => return Err(Failure::from(&error)),
            }
        }
    }

    fn remedy(&self, error: &Error) -> Remedy {
        match error {
            Error::Corrupt { .. } => Remedy::OnceMore,
            Error::Unsupported { .. } | Error::Invalid { .. } => Remedy::GiveUp,
            // A file that is missing while the store is there was removed; else the disk is not mounted just now.
            Error::Missing { .. } if self.is_there() => Remedy::GiveUp,
            Error::Missing { .. } | Error::NotAStore { .. } | Error::Io { .. } => Remedy::Wait,
            Error::Full { .. } | Error::ReadOnly { .. } | Error::Held { .. } | Error::Fenced { .. } => Remedy::Wait,
        }
    }

    fn is_there(&self) -> bool {
        store::layout::Layout::new(&self.root).superblock().try_exists().unwrap_or(false)
    }

    fn away(&self) -> String {
        format!("store {} is away: check that the shared disk is mounted", self.root.display())
    }

    /// Counts an error, and logs it unless the same was logged a moment ago.
    fn complain(&self, text: &str) {
        self.metrics.store_errors.one();
        let now = Instant::now();
        let mut complaints = self.complaints.lock();
        complaints.retain(|_, at| now.duration_since(*at) < REPEAT);
        if complaints.len() < 1000 && !complaints.contains_key(text) {
            tracing::error!("{text}");
            complaints.insert(text.to_owned(), now);
        }
    }
}
