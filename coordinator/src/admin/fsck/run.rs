//! One check under way: what it works with, how far it is, whether it is to stop, and where it could go on.
//!
//! `shown` guards what people see, `findings` what was found; neither is held during I/O.

use std::sync::Arc;
use std::time::{Duration, Instant};

use coordinator_api::fsck::{Fsck as View, FsckDepth, FsckOutcome, FsckPhase, FsckRequest, FsckState};
use jiff::Timestamp;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use store::publisher::Publisher;
use store::reader::Store;
use store::{ContentDigest, Digest, Error};
use tokio_util::sync::CancellationToken;

use crate::admin::fsck::finding::{Findings, Object};
use crate::jobs::queue::{JobQueue, QueueError};
use crate::profiles::Profiles;
use crate::registries::Registry;
use crate::state::state_db::{Durability, StateDb, StateError, Table};

/// The record of where a deep check stands.
const CURSOR: &[u8] = b"cursor";
/// The record of the last check, as it is shown.
pub(super) const LAST: &[u8] = b"last";
/// How often the cursor is written down.
const PACE: Duration = Duration::from_secs(1);

/// Why a check does not go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum Halt {
    /// Somebody stopped it, or the coordinator ends.
    #[error("it was interrupted")]
    Interrupted,
    /// The store cannot be read or written any more.
    #[error(transparent)]
    Store(#[from] Error),
    /// The database.
    #[error(transparent)]
    StateDb(#[from] StateError),
    /// The jobs.
    #[error(transparent)]
    JobQueue(#[from] QueueError),
}

/// Where a deep check stands: everything up to these names was compared.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Cursor {
    /// The last pack.
    pub(super) pack: Option<ContentDigest>,
    /// The last layer; packs are all done then.
    pub(super) layer: Option<Digest>,
    /// When the check first began.
    started_at: Option<Timestamp>,
    /// What it had found.
    found: Vec<(Object, String)>,
    /// Bytes that were compared.
    bytes: u64,
}

/// What a check works with.
pub(super) struct Parts {
    pub(super) publisher: Arc<Publisher>,
    pub(super) state_db: Arc<dyn StateDb>,
    pub(super) queue: Arc<JobQueue>,
    /// Where what is damaged is fetched again.
    pub(super) registry: Arc<dyn Registry>,
    pub(super) profiles: Arc<Profiles>,
}

/// One check.
pub(super) struct Run {
    pub(super) parts: Arc<Parts>,
    pub(super) request: FsckRequest,
    pub(super) stop: CancellationToken,
    store: Store,
    shown: Mutex<View>,
    pub(super) findings: Mutex<Findings>,
    cursor: Mutex<(Cursor, Instant)>,
}

impl Run {
    /// A check that begins now, or goes on where the one before it was interrupted.
    pub(super) fn new(parts: Arc<Parts>, request: FsckRequest, stop: CancellationToken) -> Result<Run, StateError> {
        let kept = match request.depth == FsckDepth::Deep && !request.restart {
            true => parts.state_db.record(Table::Fsck, CURSOR)?,
            false => None,
        };
        let kept: Option<Cursor> = kept.and_then(|json| serde_json::from_slice(&json).ok());
        let resumed = kept.is_some();
        let mut cursor = kept.unwrap_or_default();
        let started_at = *cursor.started_at.get_or_insert_with(Timestamp::now);
        let mut findings = Findings::default();
        for (object, message) in &cursor.found {
            findings.add(*object, message.clone());
        }
        let mut view = View {
            request: request.clone(),
            state: FsckState::Running,
            reason: None,
            started_at,
            ended_at: None,
            resumed,
            phase: FsckPhase::Catalogue,
            done: 0,
            total: 0,
            checked: Default::default(),
            orphans: Default::default(),
            rebuilt: None,
            findings: Vec::new(),
            findings_left_out: 0,
            damaged: 0,
        };
        view.checked.bytes = cursor.bytes;
        let (shown, findings) = (Mutex::new(view), Mutex::new(findings));
        let store = parts.publisher.store().afresh();
        Ok(Run { parts, request, stop, store, shown, findings, cursor: Mutex::new((cursor, Instant::now())) })
    }

    /// The store, for reading: opened for this check alone.
    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    /// Whether every byte is compared.
    pub(super) fn is_deep(&self) -> bool {
        self.request.depth == FsckDepth::Deep
    }

    /// Fails if the check is to stop.
    pub(super) fn go_on(&self) -> Result<(), Halt> {
        match self.stop.is_cancelled() {
            true => Err(Halt::Interrupted),
            false => Ok(()),
        }
    }

    /// Begins a phase of `total` objects or bytes.
    pub(super) fn enter(&self, phase: FsckPhase, total: u64) -> Result<(), Halt> {
        let mut shown = self.shown.lock();
        (shown.phase, shown.done, shown.total) = (phase, 0, total);
        drop(shown);
        self.go_on()
    }

    /// Goes forward in a phase that counts objects.
    pub(super) fn advance(&self, by: u64) {
        self.shown.lock().done += by;
    }

    /// Goes forward in a phase that counts bytes. Where single objects are looked at again, no phase does.
    pub(super) fn compared(&self, bytes: u64) {
        let mut shown = self.shown.lock();
        if shown.phase.counts_bytes() {
            shown.done += bytes;
            shown.checked.bytes += bytes;
        }
    }

    /// Changes what is shown.
    pub(super) fn show(&self, change: impl FnOnce(&mut View)) {
        change(&mut self.shown.lock());
    }

    /// What is shown now.
    pub(super) fn view(&self) -> View {
        let (findings, left_out, damaged) = {
            let findings = self.findings.lock();
            let damaged = findings.damaged().len() as u64 + findings.left_out();
            (findings.view(), findings.left_out(), damaged)
        };
        View { findings, findings_left_out: left_out, damaged, ..self.shown.lock().clone() }
    }

    /// Writes a finding down.
    pub(super) fn found(&self, object: Object, message: impl Into<String>) {
        let message = message.into();
        if self.findings.lock().add(object, message.clone()) {
            tracing::warn!("fsck: {message}");
        }
    }

    /// The error of one object as a finding; an error of the whole store ends the check.
    pub(super) fn judge(&self, object: Object, error: Error) -> Result<(), Halt> {
        match error {
            Error::Missing { .. } | Error::Corrupt { .. } | Error::Unsupported { .. } => {}
            // One bad sector is a finding. A disk that is away is not ten thousand of them.
            error @ Error::Io { .. } if self.store().generation().is_err() => return Err(error.into()),
            Error::Io { .. } | Error::NotAStore { .. } | Error::Invalid { .. } => {}
            other => return Err(other.into()),
        }
        self.found(object, error.to_string());
        Ok(())
    }

    /// Where a deep check goes on.
    pub(super) fn cursor(&self) -> Cursor {
        self.cursor.lock().0.clone()
    }

    /// Moves the cursor; it is written down now and then.
    pub(super) fn reached(&self, step: impl FnOnce(&mut Cursor)) -> Result<(), Halt> {
        let due = {
            let mut cursor = self.cursor.lock();
            step(&mut cursor.0);
            let due = cursor.1.elapsed() >= PACE;
            if due {
                cursor.1 = Instant::now();
            }
            due
        };
        match due {
            true => self.save_cursor(),
            false => Ok(()),
        }
    }

    /// Writes the cursor down, so that the check can be taken up here.
    pub(super) fn save_cursor(&self) -> Result<(), Halt> {
        let found = {
            let findings = self.findings.lock();
            let records = findings.records().iter().filter(|(_, finding)| finding.outcome == FsckOutcome::Damaged);
            records.map(|(object, finding)| (*object, finding.message.clone())).collect()
        };
        let bytes = self.shown.lock().checked.bytes;
        let cursor = Cursor { found, bytes, ..self.cursor() };
        let Ok(json) = serde_json::to_vec(&cursor) else { return Ok(()) };
        Ok(self.parts.state_db.change_records(Table::Fsck, &[(CURSOR, Some(&json))], Durability::Eventual)?)
    }

    /// Forgets the cursor: all was compared.
    pub(super) fn forget_cursor(&self) -> Result<(), Halt> {
        Ok(self.parts.state_db.change_records(Table::Fsck, &[(CURSOR, None)], Durability::Eventual)?)
    }
}
