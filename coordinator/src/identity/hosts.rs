//! Hosts, and the leases that hold the layers that they use.
//!
//! ```text
//!            renew                    silent for a lease's life
//!  (unknown) ─────▶ live ────────────────────────────▶ expired ─┐
//!                   ▲ │ └── released ──▶ unmounted ─┐           │ nothing heard for [`REMEMBERED`]
//!                   └─┴────────── renew ────────────┴───────────┴──────────────────────────▶ (forgotten)
//! ```
//!
//! A coordinator that has just begun to lead has not heard which layers hosts took into use meanwhile. For the duration of one lease it
//! does not know what is held ([`LayersInUse::NotYetKnown`]), and no lease expires.
//!
//! `held`: the layers that live leases hold, looked up under the lock that removals take. `record`: what is kept of one host. `tally`: what
//! the hosts of one token add up to, so that nobody with a token makes the coordinator remember without bound.
//!
//! `kept` guards the records and is not held during I/O. Renewals survive the end of the process. A power failure may lose the last ones,
//! which the rule above makes good.

mod held;
mod record;
mod tally;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use coordinator_api::access::Role;
use coordinator_api::event::Severity;
use coordinator_api::host::{Host, HostList, HostState, LAYERS_MAX, LeaseGranted, LeaseRequest};
use jiff::{SignedDuration, Timestamp};
use parking_lot::Mutex;
use store::Digest;

use crate::identity::caller::{Caller, Proof};
use crate::identity::hosts::held::HeldLayers;
use crate::identity::hosts::record::{HostRecord, Times, is_bounded};
use crate::identity::hosts::tally::{NoRoom, Tally};
use crate::identity::tokens::{Tokens, is_name};
use crate::state::events::{Events, NewEvent};
use crate::state::state_db::{Durability, StateDb, StateError, Table};

/// A host that was silent for this long is forgotten.
const REMEMBERED: SignedDuration = SignedDuration::from_hours(30 * 24);
/// The most hosts that are remembered.
const HOSTS_MAX: usize = 20_000;
/// The longest text in a renewal, in bytes.
const TEXT_MAX: usize = 1024;

/// Why a lease cannot be renewed or released.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// The renewal is malformed.
    #[error("the lease of host {host:?} cannot be renewed: {why}")]
    Malformed {
        /// The host's name.
        host: String,
        /// What is wrong.
        why: &'static str,
    },
    /// The host belongs to another token.
    #[error("host {host} belongs to {owner}: use that token, or revoke it first")]
    Taken {
        /// The host's name.
        host: String,
        /// The token that it belongs to.
        owner: String,
    },
    /// There is no such host.
    #[error("host {0} has no lease here")]
    Unknown(String),
    /// The hosts of one token are too many, or hold too much.
    #[error("the hosts of {owner} {what}: give some of them a token of their own")]
    TokenFull {
        /// The token, or this machine's users.
        owner: String,
        /// What they have too much of.
        what: &'static str,
    },
    /// All hosts together hold too many layers.
    #[error(
        "the hosts hold more layers together than this coordinator can look after: unmount some, or give them stores of their own"
    )]
    Full,
    /// There are too many hosts.
    #[error(
        "this coordinator looks after {HOSTS_MAX} hosts already: give daemons that start anew their old cache directories"
    )]
    TooMany,
    /// The database failed.
    #[error(transparent)]
    StateDb(#[from] StateError),
}

/// The layers that hosts hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayersInUse {
    /// Hosts may hold layers that this coordinator has not heard of yet.
    NotYetKnown {
        /// When every host has had the time to report them.
        until: Timestamp,
    },
    /// Exactly these layers.
    Layers(BTreeSet<Digest>),
}

/// The records by id, the layers that live hosts hold, and the totals of all hosts.
#[derive(Debug, Default)]
struct Kept {
    records: HashMap<String, HostRecord>,
    held: HeldLayers,
    tally: Tally,
}

impl Kept {
    /// Inserts a record, in place of the one with the same id.
    fn insert(&mut self, record: HostRecord) {
        self.remove(record.id());
        if record.state() == HostState::Live {
            self.held.add(record.layers(), record.expires_at());
        }
        self.tally.add(&record);
        self.records.insert(record.id().to_owned(), record);
    }

    fn remove(&mut self, id: &str) -> Option<HostRecord> {
        let record = self.records.remove(id)?;
        if record.state() == HostState::Live {
            self.held.remove(record.layers(), record.expires_at());
        }
        self.tally.remove(&record);
        Some(record)
    }

    /// Applies a renewal. Returns the record as it is kept, and the host's state before.
    fn renew(&mut self, record: HostRecord, bounded: bool) -> Result<(HostRecord, Option<HostState>), HostError> {
        let before = self.records.get(record.id());
        if before.is_none() && self.records.len() >= HOSTS_MAX {
            return Err(HostError::TooMany);
        }
        self.tally.room(&record, before, bounded).map_err(|why| no_room(&record, why))?;
        let state = before.map(HostRecord::state);
        self.remove(record.id());
        let record = if self.tally.has_room_for_names(&record) { record } else { record.without_names() };
        self.insert(record.clone());
        Ok((record, state))
    }
}

fn no_room(record: &HostRecord, why: NoRoom) -> HostError {
    let owner = record.token().map_or_else(|| "this machine's users".to_owned(), |token| format!("token {token}"));
    match why {
        NoRoom::Hosts => HostError::TokenFull { owner, what: "are too many" },
        NoRoom::Layers => HostError::TokenFull { owner, what: "hold too many layers together" },
        NoRoom::All => HostError::Full,
    }
}

/// All hosts.
pub struct Hosts {
    state_db: Arc<dyn StateDb>,
    events: Arc<Events>,
    /// The duration of a lease.
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
    } else if images.len().max(layers.len()) > LAYERS_MAX {
        Some("it claims to use more than 100000 layers")
    } else if ![version, mountpoint].into_iter().chain(images).all(is_text) {
        Some("it sends texts that are too long, or with control characters")
    } else if !layers.iter().all(|layer| layer.parse::<Digest>().is_ok()) {
        Some("a layer's diffID is not a digest")
    } else {
        None
    }
}

impl Hosts {
    /// Reads the hosts from the database. `since` is the time at which this coordinator begins to lead.
    pub fn open(
        state_db: Arc<dyn StateDb>,
        events: Arc<Events>,
        lease: Duration,
        since: Timestamp,
    ) -> Result<Hosts, StateError> {
        let lease = SignedDuration::try_from(lease).unwrap_or(SignedDuration::MAX);
        let mut kept = Kept::default();
        for (key, json) in state_db.records(Table::Hosts)? {
            match HostRecord::decode(&json) {
                // A lease from a clock that was ahead ends when every host has had the time to renew its own.
                Ok(record) => kept.insert(record.expiring_by(since.checked_add(lease).unwrap_or(Timestamp::MAX))),
                Err(error) => {
                    let id = String::from_utf8_lossy(&key).into_owned();
                    tracing::warn!("host {id} in the database is left out: {error}");
                }
            }
        }
        Ok(Hosts { state_db, events, lease, since, kept: Mutex::new(kept) })
    }

    /// When every host has had the time to renew after this coordinator began to lead.
    fn known_at(&self) -> Timestamp {
        self.since.checked_add(self.lease).unwrap_or(Timestamp::MAX)
    }

    fn granted(&self) -> LeaseGranted {
        LeaseGranted { lease_seconds: u64::try_from(self.lease.as_secs()).unwrap_or(0).max(1) }
    }

    /// Renews the lease of a host: from now on it holds what `request` says, and nothing else. As long as the token that a host belongs to
    /// is good, only that token and admins may renew its lease. Blocks on the database.
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
            before.map_or(Ok(()), |before| check_owner(before, caller, tokens, now))?;
            let times = Times {
                registered_at: before.map_or(now, HostRecord::registered_at),
                now,
                expires_at: now.checked_add(self.lease).unwrap_or(Timestamp::MAX),
            };
            kept.renew(HostRecord::live(name, request, caller, token, times), is_bounded(caller))?
        };
        self.write(&record)?;
        let change = match before {
            Some(HostState::Live) => None,
            Some(HostState::Expired) => Some("is back"),
            Some(HostState::Unmounted) => Some("has mounted the store again"),
            None => Some("has mounted the store for the first time"),
        };
        if let Some(change) = change {
            let message = format!("host {name} {change} ({})", record.mountpoint());
            self.events.record(NewEvent::new(Severity::Info, "host.registered", name, message).by(caller.actor()));
        }
        Ok(self.granted())
    }

    /// Ends the lease of a host that has unmounted. Blocks on the database.
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
            let record = record.unmounted(now);
            kept.insert(record.clone());
            record
        };
        self.write(&record)?;
        let message = format!("host {} has unmounted the store", record.name());
        self.events.record(NewEvent::new(Severity::Info, "host.unmounted", record.name(), message).by(caller.actor()));
        Ok(self.granted())
    }

    fn write(&self, record: &HostRecord) -> Result<(), StateError> {
        let json = record.encode();
        self.state_db.change_records(Table::Hosts, &[(record.id().as_bytes(), Some(&json))], Durability::Eventual)
    }

    /// Ends the leases of hosts that were silent for too long, and forgets hosts that were silent for much longer. Blocks on the database.
    pub fn expire(&self, now: Timestamp) {
        if now < self.known_at() {
            return;
        }
        let (expired, forgotten) = {
            let mut kept = self.kept.lock();
            let is_over = |record: &&HostRecord| record.state() == HostState::Live && record.expires_at() <= now;
            let expired: Vec<HostRecord> = kept.records.values().filter(is_over).cloned().collect();
            expired.iter().for_each(|record| kept.insert(record.expired()));
            let is_old = |record: &&HostRecord| {
                record.state() != HostState::Live && now.duration_since(record.last_seen_at()) >= REMEMBERED
            };
            let old: Vec<String> = kept.records.values().filter(is_old).map(|record| record.id().to_owned()).collect();
            old.iter().for_each(|id| drop(kept.remove(id)));
            (expired, old)
        };
        for record in expired {
            let (name, layers) = (record.name(), record.layers().len());
            let message = format!(
                "host {name} has not been heard of since {}: its lease on {layers} layers has expired",
                record.last_seen_at()
            );
            self.events.record(NewEvent::new(Severity::Warning, "host.expired", name, message));
            if let Err(error) = self.write(&record.expired()) {
                tracing::warn!("that host {name} has expired is not written down: {error}");
            }
        }
        self.forget(&forgotten);
    }

    /// Forgets the hosts of tokens that are no longer good, once their leases are over. Hosts with a live lease lose what is only for
    /// people to read, and keep what they hold until then: containers may run from it. Blocks on the database.
    pub fn forget_revoked(&self, tokens: &Tokens, now: Timestamp) {
        let good = tokens.good_names(now);
        let (changed, forgotten) = {
            let mut kept = self.kept.lock();
            let is_nobodys = |record: &&HostRecord| record.token().is_some_and(|token| !good.contains(token));
            let nobodys: Vec<HostRecord> = kept.records.values().filter(is_nobodys).cloned().collect();
            let (mut changed, mut forgotten) = (Vec::new(), Vec::new());
            for record in nobodys {
                if record.state() != HostState::Live {
                    kept.remove(record.id());
                    forgotten.push(record.id().to_owned());
                } else if record.name_bytes() > 0 {
                    kept.insert(record.without_names());
                    changed.push(record.without_names());
                }
            }
            (changed, forgotten)
        };
        for record in changed {
            if let Err(error) = self.write(&record) {
                tracing::warn!("what host {} said with a token that was revoked may be back: {error}", record.name());
            }
        }
        self.forget(&forgotten);
    }

    /// Removes hosts from the database.
    fn forget(&self, ids: &[String]) {
        for id in ids {
            let gone = self.state_db.change_records(Table::Hosts, &[(id.as_bytes(), None)], Durability::Eventual);
            if let Err(error) = gone {
                tracing::warn!("a host that was forgotten may be back after a restart: {error}");
            }
        }
    }

    /// The layers that hosts hold at the time `now`.
    pub fn layers_in_use(&self, now: Timestamp) -> LayersInUse {
        let until = self.known_at();
        if now < until {
            return LayersInUse::NotYetKnown { until };
        }
        LayersInUse::Layers(self.kept.lock().held.at(now))
    }

    /// Whether a host holds the layer at the time `now`, or might hold it.
    pub fn holds(&self, layer: &Digest, now: Timestamp) -> bool {
        now < self.known_at() || self.kept.lock().held.holds(layer, now)
    }

    /// All hosts, by name.
    #[cfg(test)]
    pub(crate) fn list(&self) -> HostList {
        self.list_with(None, &|_| true, |hosts| (hosts.collect(), None))
    }

    /// The hosts that `take` takes, sorted by name and id, beginning after `after`, with the layers that `is_seen` lets pass; and the next
    /// page. A host's view is put together only when `take` asks for it.
    pub fn list_with(
        &self,
        after: Option<&(String, String)>,
        is_seen: &dyn Fn(&Digest) -> bool,
        take: impl FnOnce(&mut dyn Iterator<Item = Host>) -> (Vec<Host>, Option<String>),
    ) -> HostList {
        let kept = self.kept.lock();
        let sort_key = |record: &&HostRecord| (record.name().to_owned(), record.id().to_owned());
        let mut records: Vec<&HostRecord> =
            kept.records.values().filter(|record| after.is_none_or(|after| sort_key(record) > *after)).collect();
        records.sort_unstable_by_key(sort_key);
        let (hosts, next_page) = take(&mut records.into_iter().map(|record| record.view(is_seen)));
        HostList { lease_seconds: self.granted().lease_seconds, hosts, next_page }
    }

    /// How many hosts are in a state.
    pub fn count(&self, state: HostState) -> u64 {
        self.kept.lock().records.values().filter(|record| record.state() == state).count() as u64
    }

    /// How long to wait between two calls of [`Hosts::expire`].
    pub fn patience(&self) -> Duration {
        let lease = Duration::try_from(self.lease).unwrap_or(Duration::from_secs(1));
        (lease / 10).clamp(Duration::from_millis(100), Duration::from_secs(30))
    }
}

/// Refuses a caller that the host does not belong to. Admins may do anything.
fn check_owner(record: &HostRecord, caller: &Caller, tokens: &Tokens, now: Timestamp) -> Result<(), HostError> {
    let Some(owner) = record.token() else { return Ok(()) };
    let is_own = matches!(&caller.proof, Proof::Token { name } if name == owner);
    if is_own || caller.role == Role::Admin || !tokens.is_good(owner, now) {
        Ok(())
    } else {
        Err(HostError::Taken { host: record.name().to_owned(), owner: format!("token {owner}") })
    }
}

#[cfg(test)]
mod tests;
