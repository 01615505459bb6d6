//! Hosts, and the leases by which they hold the layers that they use.
//!
//! ```text
//!            renew                    silent for a lease's life
//!  (unknown) ─────▶ live ────────────────────────────▶ expired ─┐
//!                   ▲ │ └── released ──▶ unmounted ─┐           │ nothing heard for [`REMEMBERED`]
//!                   └─┴────────── renew ────────────┴───────────┴──────────────────────────▶ (forgotten)
//! ```
//!
//! A coordinator that has just begun to lead has not heard of what hosts took into use meanwhile: for the life of one
//! lease it does not know what is held ([`Held::NotYetKnown`]), and no lease expires.
//!
//! `held`: which layers that makes, to be asked under the lock that removals take.
//!
//! `kept` guards the records and is not held during I/O. Renewals survive the end of the process; a power failure may
//! take the last ones, which the rule above makes good.

mod held;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use coordinator_api::access::Role;
use coordinator_api::event::Severity;
use coordinator_api::host::{Host, HostList, HostState, LeaseGranted, LeaseRequest};
use jiff::{SignedDuration, Timestamp};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use store::Digest;

use crate::access::{Caller, Proof};
use crate::events::{Events, News};
use crate::hosts::held::HeldLayers;
use crate::journal::{Durability, Journal, JournalError, Table};
use crate::tokens::{Tokens, is_name};

/// A host that was not heard of for so long is forgotten.
const REMEMBERED: SignedDuration = SignedDuration::from_hours(30 * 24);
/// The most hosts that are remembered.
const HOSTS_MAX: usize = 20_000;
/// The most layers, and the most images, of one host.
const LISTED_MAX: usize = 10_000;
/// The longest text in a renewal.
const TEXT_MAX: usize = 1024;

/// What cannot be done with a lease.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// A renewal that makes no sense.
    #[error("the lease of host {host:?} cannot be renewed: {why}")]
    Malformed {
        /// The host's name.
        host: String,
        /// What is wrong.
        why: &'static str,
    },
    /// Somebody else's host.
    #[error("host {host} belongs to {owner}: use that token, or revoke it first")]
    Taken {
        /// The host's name.
        host: String,
        /// Who renewed before.
        owner: String,
    },
    /// No such host.
    #[error("host {0} has no lease here")]
    Unknown(String),
    /// Too many.
    #[error(
        "this coordinator looks after {HOSTS_MAX} hosts already: give daemons that start anew their old cache directories"
    )]
    TooMany,
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// The layers that hosts hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Held {
    /// Hosts may hold layers that this coordinator has not heard of yet.
    NotYetKnown {
        /// When every host has had the time to say so.
        until: Timestamp,
    },
    /// These, and no others.
    Layers(BTreeSet<Digest>),
}

/// What is kept of a host.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    name: String,
    report: LeaseRequest,
    state: HostState,
    /// Who renewed last, for people.
    caller: String,
    /// The token that it belongs to.
    token: Option<String>,
    registered_at: Timestamp,
    last_seen_at: Timestamp,
    expires_at: Timestamp,
}

impl Record {
    fn layers(&self) -> impl Iterator<Item = Digest> + '_ {
        self.report.layers.iter().filter_map(|layer| layer.parse().ok())
    }

    fn view(&self) -> Host {
        let reads = self.report.reads_hit.saturating_add(self.report.reads_missed);
        Host {
            name: self.name.clone(),
            report: self.report.clone(),
            hit_ratio: (reads > 0).then(|| self.report.reads_hit as f64 / reads as f64),
            state: self.state,
            caller: self.caller.clone(),
            registered_at: self.registered_at,
            last_seen_at: self.last_seen_at,
            expires_at: self.expires_at,
        }
    }
}

/// The records by id, and what those of live hosts hold.
#[derive(Debug, Default)]
struct Kept {
    records: HashMap<String, Record>,
    held: HeldLayers,
}

impl Kept {
    /// Takes a record up, in place of the one of the same id.
    fn insert(&mut self, record: Record) {
        if let Some(before) = self.records.remove(&record.report.id) {
            self.unhold(&before);
        }
        if record.state == HostState::Live {
            self.held.add(record.layers(), record.expires_at);
        }
        self.records.insert(record.report.id.clone(), record);
    }

    fn unhold(&mut self, record: &Record) {
        if record.state == HostState::Live {
            self.held.remove(record.layers(), record.expires_at);
        }
    }
}

/// All hosts.
pub struct Hosts {
    journal: Arc<dyn Journal>,
    events: Arc<Events>,
    /// How long a lease lives.
    lease: SignedDuration,
    /// When this coordinator began to lead.
    since: Timestamp,
    kept: Mutex<Kept>,
}

/// What is wrong with a renewal, if anything is.
fn fault(name: &str, request: &LeaseRequest) -> Option<&'static str> {
    let LeaseRequest { id, version, mountpoint, images, layers, .. } = request;
    let is_text = |text: &String| text.len() <= TEXT_MAX && !text.chars().any(char::is_control);
    if !is_name(name) {
        Some("a host's name has 1 to 64 letters, digits, dots, dashes and underscores; give one with --host-name")
    } else if !is_name(id) {
        Some("its id has other characters than letters and digits")
    } else if images.len().max(layers.len()) > LISTED_MAX {
        Some("it claims to use more than 10000 layers")
    } else if ![version, mountpoint].into_iter().chain(images).all(is_text) {
        Some("it sends texts that are too long, or with control characters")
    } else if !layers.iter().all(|layer| layer.parse::<Digest>().is_ok()) {
        Some("a layer's diffID is not a digest")
    } else {
        None
    }
}

impl Hosts {
    /// Reads the hosts that the journal keeps, at the time `since`, when this coordinator begins to lead.
    pub fn open(
        journal: Arc<dyn Journal>,
        events: Arc<Events>,
        lease: Duration,
        since: Timestamp,
    ) -> Result<Hosts, JournalError> {
        let lease = SignedDuration::try_from(lease).unwrap_or(SignedDuration::MAX);
        let mut kept = Kept::default();
        for (key, json) in journal.records(Table::Hosts)? {
            match serde_json::from_slice::<Record>(&json) {
                // A lease from a clock that was ahead is over when every host has had the time to renew its own.
                Ok(mut record) => {
                    let latest = since.checked_add(lease).unwrap_or(Timestamp::MAX);
                    record.expires_at = record.expires_at.min(latest);
                    kept.insert(record);
                }
                Err(error) => {
                    let id = String::from_utf8_lossy(&key).into_owned();
                    tracing::warn!("host {id} in the database is left out: {error}");
                }
            }
        }
        Ok(Hosts { journal, events, lease, since, kept: Mutex::new(kept) })
    }

    /// When every host has had the time to renew since this coordinator began to lead.
    fn known_at(&self) -> Timestamp {
        self.since.checked_add(self.lease).unwrap_or(Timestamp::MAX)
    }

    fn granted(&self) -> LeaseGranted {
        LeaseGranted { lease_seconds: u64::try_from(self.lease.as_secs()).unwrap_or(0).max(1) }
    }

    /// Renews the lease of a host: from now on it holds what `request` says, and nothing else. A host belongs to the token
    /// that it was first heard of with, as long as that is good. Blocks on the journal.
    pub fn renew(
        &self,
        name: &str,
        request: LeaseRequest,
        caller: &Caller,
        tokens: &Tokens,
        now: Timestamp,
    ) -> Result<LeaseGranted, HostError> {
        if let Some(why) = fault(name, &request) {
            return Err(HostError::Malformed { host: name.chars().take(64).collect(), why });
        }
        let token = match &caller.proof {
            Proof::Token { name } => Some(name.clone()),
            Proof::Local { .. } | Proof::Nothing => None,
        };
        let (record, before) = {
            let mut kept = self.kept.lock();
            let before = kept.records.get(&request.id);
            if let Some(before) = before {
                check_owner(before, caller, tokens, now)?;
            } else if kept.records.len() >= HOSTS_MAX {
                return Err(HostError::TooMany);
            }
            let before = before.map(|before| (before.state, before.registered_at));
            let record = Record {
                name: name.to_owned(),
                report: request,
                state: HostState::Live,
                caller: caller.actor(),
                token,
                registered_at: before.map_or(now, |(_, at)| at),
                last_seen_at: now,
                expires_at: now.checked_add(self.lease).unwrap_or(Timestamp::MAX),
            };
            kept.insert(record.clone());
            (record, before.map(|(state, _)| state))
        };
        self.write(&record)?;
        let news = match before {
            Some(HostState::Live) => None,
            Some(HostState::Expired) => Some("is back"),
            Some(HostState::Unmounted) => Some("has mounted the store again"),
            None => Some("has mounted the store for the first time"),
        };
        if let Some(news) = news {
            let message = format!("host {name} {news} ({})", record.report.mountpoint);
            self.events.record(News::new(Severity::Info, "host.registered", name, message).by(caller.actor()));
        }
        Ok(self.granted())
    }

    /// Ends the lease of a host that has unmounted. Blocks on the journal.
    pub fn release(
        &self,
        name: &str,
        id: &str,
        caller: &Caller,
        tokens: &Tokens,
        now: Timestamp,
    ) -> Result<LeaseGranted, HostError> {
        let record = {
            let mut kept = self.kept.lock();
            let record = kept.records.get(id).ok_or_else(|| HostError::Unknown(name.chars().take(64).collect()))?;
            check_owner(record, caller, tokens, now)?;
            let mut record =
                Record { state: HostState::Unmounted, last_seen_at: now, expires_at: now, ..record.clone() };
            record.report.layers.clear();
            record.report.images.clear();
            kept.insert(record.clone());
            record
        };
        self.write(&record)?;
        let message = format!("host {} has unmounted the store", record.name);
        self.events.record(News::new(Severity::Info, "host.unmounted", &record.name, message).by(caller.actor()));
        Ok(self.granted())
    }

    fn write(&self, record: &Record) -> Result<(), JournalError> {
        // A record is made of texts and numbers only: it can always be written as JSON.
        let json = serde_json::to_vec(record).unwrap_or_default();
        self.journal.change_records(Table::Hosts, &[(record.report.id.as_bytes(), Some(&json))], Durability::Eventual)
    }

    /// Ends the leases of hosts that were silent for too long, and forgets those that were for much longer. Blocks on the
    /// journal.
    pub fn expire(&self, now: Timestamp) {
        if now < self.known_at() {
            return;
        }
        let (expired, forgotten) = {
            let mut kept = self.kept.lock();
            let is_over = |record: &&Record| record.state == HostState::Live && record.expires_at <= now;
            let mut expired: Vec<Record> = kept.records.values().filter(is_over).cloned().collect();
            for record in &mut expired {
                record.state = HostState::Expired;
                kept.insert(record.clone());
            }
            let is_old = |record: &Record| {
                record.state != HostState::Live && now.duration_since(record.last_seen_at) >= REMEMBERED
            };
            let old: Vec<_> = kept.records.extract_if(|_, record| is_old(record)).map(|(id, _)| id).collect();
            (expired, old)
        };
        for record in expired {
            let (name, layers) = (&record.name, record.report.layers.len());
            let message = format!(
                "host {name} has not been heard of since {}: its lease on {layers} layers has expired",
                record.last_seen_at
            );
            self.events.record(News::new(Severity::Warning, "host.expired", name, message));
            if let Err(error) = self.write(&record) {
                tracing::warn!("that host {name} has expired is not written down: {error}");
            }
        }
        for id in forgotten {
            let gone = self.journal.change_records(Table::Hosts, &[(id.as_bytes(), None)], Durability::Eventual);
            if let Err(error) = gone {
                tracing::warn!("a host that was forgotten may be back after a restart: {error}");
            }
        }
    }

    /// The layers that hosts hold at the time `now`.
    pub fn held(&self, now: Timestamp) -> Held {
        let until = self.known_at();
        if now < until {
            return Held::NotYetKnown { until };
        }
        Held::Layers(self.kept.lock().held.at(now))
    }

    /// Whether a host holds the layer at the time `now`, or may.
    pub fn holds(&self, layer: &Digest, now: Timestamp) -> bool {
        now < self.known_at() || self.kept.lock().held.holds(layer, now)
    }

    /// The hosts, by name.
    pub fn list(&self) -> HostList {
        let mut hosts: Vec<_> = self.kept.lock().records.values().map(Record::view).collect();
        hosts.sort_unstable_by(|a, b| (&a.name, &a.report.id).cmp(&(&b.name, &b.report.id)));
        HostList { lease_seconds: self.granted().lease_seconds, hosts }
    }

    /// How long to wait between two calls of [`Hosts::expire`].
    pub fn patience(&self) -> Duration {
        let lease = Duration::try_from(self.lease).unwrap_or(Duration::from_secs(1));
        (lease / 10).clamp(Duration::from_millis(100), Duration::from_secs(30))
    }
}

/// Refuses a caller who is not the one that the host belongs to. Admins may do anything.
fn check_owner(record: &Record, caller: &Caller, tokens: &Tokens, now: Timestamp) -> Result<(), HostError> {
    let Some(owner) = &record.token else { return Ok(()) };
    let is_own = matches!(&caller.proof, Proof::Token { name } if name == owner);
    match is_own || caller.role == Role::Admin || !tokens.is_good(owner, now) {
        true => Ok(()),
        false => Err(HostError::Taken { host: record.name.clone(), owner: format!("token {owner}") }),
    }
}

#[cfg(test)]
mod tests;
