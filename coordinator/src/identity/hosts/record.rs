//! What is kept of a host: compact in memory, as JSON in the journal.
//!
//! A host says much of itself, and a stranger with a host's token could say more: so layers are kept as bytes, not as text, and of
//! the names of images, which are for people only, the first few.

use coordinator_api::access::Role;
use coordinator_api::host::{Host, HostState, LeaseRequest, NAMES_MAX};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use store::Digest;

use crate::identity::caller::Caller;

/// The bytes that the names of images of one host may have together.
const NAMES_BYTES_MAX: usize = 64 << 10;
/// The layers of one host that a list of hosts shows; it tells how many there are.
const SHOWN_MAX: usize = 1000;

/// A record as the database has it, and, without its layers, as it is in memory.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Form {
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

/// What is kept of a host.
#[derive(Debug, Clone)]
pub(super) struct Record {
    form: Form,
    layers: Box<[Digest]>,
}

/// When a host was first heard of, and until when its lease is to live.
pub(super) struct Times {
    pub(super) registered_at: Timestamp,
    pub(super) now: Timestamp,
    pub(super) expires_at: Timestamp,
}

/// Each layer once, in order.
fn layers_of(report: &mut LeaseRequest) -> Box<[Digest]> {
    let mut layers: Vec<Digest> =
        std::mem::take(&mut report.layers).iter().filter_map(|layer| layer.parse().ok()).collect();
    layers.sort_unstable();
    layers.dedup();
    layers.into_boxed_slice()
}

/// Leaves out the names for which there is no room.
fn bound_names(report: &mut LeaseRequest) {
    let mut bytes = 0;
    report.images.truncate(NAMES_MAX);
    report.images.retain(|name| {
        bytes += name.len();
        bytes <= NAMES_BYTES_MAX
    });
    report.images.shrink_to_fit();
}

impl Record {
    /// A host that renews now.
    pub(super) fn live(
        name: &str,
        mut report: LeaseRequest,
        caller: &Caller,
        token: Option<String>,
        times: Times,
    ) -> Record {
        let layers = layers_of(&mut report);
        bound_names(&mut report);
        let Times { registered_at, now, expires_at } = times;
        let (name, caller, state) = (name.to_owned(), caller.actor(), HostState::Live);
        Record {
            form: Form { name, report, state, caller, token, registered_at, last_seen_at: now, expires_at },
            layers,
        }
    }

    /// The same host, with a lease that is over at `latest` or before.
    pub(super) fn expiring_by(mut self, latest: Timestamp) -> Record {
        self.form.expires_at = self.form.expires_at.min(latest);
        self
    }

    /// The same host, that has unmounted.
    pub(super) fn unmounted(&self, now: Timestamp) -> Record {
        let mut form = Form { state: HostState::Unmounted, last_seen_at: now, expires_at: now, ..self.form.clone() };
        form.report.images.clear();
        Record { form, layers: Box::default() }
    }

    /// The same host, whose lease is over: it holds nothing any more.
    pub(super) fn expired(&self) -> Record {
        Record { form: Form { state: HostState::Expired, ..self.form.clone() }, layers: Box::default() }
    }

    /// The same host without what is only for people to read.
    pub(super) fn without_names(&self) -> Record {
        let mut record = self.clone();
        record.form.report.images = Vec::new();
        record
    }

    /// Reads a record of the journal.
    pub(super) fn decode(json: &[u8]) -> serde_json::Result<Record> {
        let mut form: Form = serde_json::from_slice(json)?;
        let layers = layers_of(&mut form.report);
        bound_names(&mut form.report);
        Ok(Record { form, layers })
    }

    /// The record's bytes for the journal.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut form = self.form.clone();
        form.report.layers = self.layers.iter().map(ToString::to_string).collect();
        // It is made of texts and numbers only, which can always be written as JSON.
        serde_json::to_vec(&form).unwrap_or_default()
    }

    pub(super) fn id(&self) -> &str {
        &self.form.report.id
    }

    pub(super) fn name(&self) -> &str {
        &self.form.name
    }

    pub(super) fn state(&self) -> HostState {
        self.form.state
    }

    pub(super) fn token(&self) -> Option<&str> {
        self.form.token.as_deref()
    }

    pub(super) fn layers(&self) -> &[Digest] {
        &self.layers
    }

    pub(super) fn mountpoint(&self) -> &str {
        &self.form.report.mountpoint
    }

    pub(super) fn registered_at(&self) -> Timestamp {
        self.form.registered_at
    }

    pub(super) fn last_seen_at(&self) -> Timestamp {
        self.form.last_seen_at
    }

    pub(super) fn expires_at(&self) -> Timestamp {
        self.form.expires_at
    }

    /// Bytes of the names of images.
    pub(super) fn name_bytes(&self) -> usize {
        self.form.report.images.iter().map(String::len).sum()
    }

    /// What the API shows of it: the layers that `is_seen` lets pass, up to some number.
    pub(super) fn view(&self, is_seen: &dyn Fn(&Digest) -> bool) -> Host {
        let Form { name, report, state, caller, registered_at, last_seen_at, expires_at, .. } = self.form.clone();
        let reads = report.reads_hit.saturating_add(report.reads_missed);
        let seen = || self.layers.iter().filter(|layer| is_seen(layer));
        let layers = seen().take(SHOWN_MAX).map(ToString::to_string).collect();
        Host {
            name,
            hit_ratio: (reads > 0).then(|| report.reads_hit as f64 / reads as f64),
            report: LeaseRequest { layers, ..report },
            layers_held: seen().count() as u64,
            state,
            caller,
            registered_at,
            last_seen_at,
            expires_at,
        }
    }
}

/// Whether hosts that come with a caller's proof may be counted with those of others: an administrator's are everybody's.
pub(super) fn is_bounded(caller: &Caller) -> bool {
    caller.role != Role::Admin
}
