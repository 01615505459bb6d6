//! What is kept of a host: compact in memory, as JSON in the database.
//!
//! A host says much of itself, and a stranger with a host's token could say more. So layers are kept as bytes, not as text, and of the
//! images' names, which are for people only, the first few are kept.

use coordinator_api::access::Role;
use coordinator_api::host::{Host, HostState, LeaseRequest, NAMES_MAX};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use store::Digest;

use crate::identity::caller::Caller;

/// The most bytes of one host's image names together.
const NAMES_BYTES_MAX: usize = 64 << 10;
/// How many layers of one host a list of hosts shows. The list also says how many the host holds.
const SHOWN_MAX: usize = 1000;

/// A record as it is in the database and, without its layers, in memory.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Form {
    name: String,
    report: LeaseRequest,
    state: HostState,
    /// Who renewed last, for people.
    caller: String,
    /// The token that the host belongs to.
    token: Option<String>,
    registered_at: Timestamp,
    last_seen_at: Timestamp,
    expires_at: Timestamp,
}

/// What is kept of a host.
#[derive(Debug, Clone)]
pub(super) struct HostRecord {
    form: Form,
    layers: Box<[Digest]>,
}

/// When a host was first heard of, the present time, and the end of its lease.
pub(super) struct Times {
    pub(super) registered_at: Timestamp,
    pub(super) now: Timestamp,
    pub(super) expires_at: Timestamp,
}

/// Takes the layers out of the report: sorted, each once.
fn layers_of(report: &mut LeaseRequest) -> Box<[Digest]> {
    let mut layers: Vec<Digest> =
        std::mem::take(&mut report.layers).iter().filter_map(|layer| layer.parse().ok()).collect();
    layers.sort_unstable();
    layers.dedup();
    layers.into_boxed_slice()
}

/// Drops the image names that do not fit.
fn bound_names(report: &mut LeaseRequest) {
    let mut bytes = 0;
    report.images.truncate(NAMES_MAX);
    report.images.retain(|name| {
        bytes += name.len();
        bytes <= NAMES_BYTES_MAX
    });
    report.images.shrink_to_fit();
}

impl HostRecord {
    /// A host that renews now.
    pub(super) fn live(
        name: &str,
        mut report: LeaseRequest,
        caller: &Caller,
        token: Option<String>,
        times: Times,
    ) -> HostRecord {
        let layers = layers_of(&mut report);
        bound_names(&mut report);
        let Times { registered_at, now, expires_at } = times;
        let (name, caller, state) = (name.to_owned(), caller.actor(), HostState::Live);
        HostRecord {
            form: Form { name, report, state, caller, token, registered_at, last_seen_at: now, expires_at },
            layers,
        }
    }

    /// The same host, with a lease that ends at `latest` or before.
    pub(super) fn expiring_by(mut self, latest: Timestamp) -> HostRecord {
        self.form.expires_at = self.form.expires_at.min(latest);
        self
    }

    /// The same host after it has unmounted.
    pub(super) fn unmounted(&self, now: Timestamp) -> HostRecord {
        let mut form = Form { state: HostState::Unmounted, last_seen_at: now, expires_at: now, ..self.form.clone() };
        form.report.images.clear();
        HostRecord { form, layers: Box::default() }
    }

    /// The same host after its lease has ended: it holds nothing any more.
    pub(super) fn expired(&self) -> HostRecord {
        HostRecord { form: Form { state: HostState::Expired, ..self.form.clone() }, layers: Box::default() }
    }

    /// The same host without what is only for people to read.
    pub(super) fn without_names(&self) -> HostRecord {
        let mut record = self.clone();
        record.form.report.images = Vec::new();
        record
    }

    /// Decodes a record from the database.
    pub(super) fn decode(json: &[u8]) -> serde_json::Result<HostRecord> {
        let mut form: Form = serde_json::from_slice(json)?;
        let layers = layers_of(&mut form.report);
        bound_names(&mut form.report);
        Ok(HostRecord { form, layers })
    }

    /// Encodes the record for the database.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut form = self.form.clone();
        form.report.layers = self.layers.iter().map(ToString::to_string).collect();
        // Text and numbers can always be written as JSON.
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

    /// Bytes of the image names.
    pub(super) fn name_bytes(&self) -> usize {
        self.form.report.images.iter().map(String::len).sum()
    }

    /// The host as the API shows it: at most [`SHOWN_MAX`] of the layers that `is_seen` lets pass.
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

/// Whether the limits of one token apply to the hosts of this caller. An administrator's hosts are exempt.
pub(super) fn is_bounded(caller: &Caller) -> bool {
    caller.role != Role::Admin
}
