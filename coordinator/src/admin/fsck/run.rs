//! One running check: its inputs, its progress, whether it is to stop, and the cursor to resume from.
//!
//! `shown` guards the view for the API, `findings` the findings; neither is held during I/O.

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

/// Key of the record that holds the cursor of a deep check.
const CURSOR: &[u8] = b"cursor";
/// Key of the record that holds the last check, as the API shows it.
pub(super) const LAST: &[u8] = b"last";
/// How often the cursor is saved.
const PACE: Duration = Duration::from_secs(1);

/// Why a check stops early.
#[derive(Debug, thiserror::Error)]
pub(super) enum Halt {
    /// An administrator stopped it, or the coordinator shuts down.
    #[error("it was interrupted")]
    Interrupted,
    /// The store can no longer be read or written.
    #[error(transparent)]
    Store(#[from] Error),
    /// The state database failed.
    #[error(transparent)]
    StateDb(#[from] StateError),
    /// The job queue failed.
    #[error(transparent)]
    JobQueue(#[from] QueueError),
}

/// Position of a deep check: everything up to these names has been compared.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Cursor {
    /// The last pack.
    pub(super) pack: Option<ContentDigest>,
    /// The last layer. Once it is set, all packs are done.
    pub(super) layer: Option<Digest>,
    started_at: Option<Timestamp>,
    /// What the check had found so far.
    found: Vec<(Object, String)>,
    /// Bytes compared so far.
    bytes: u64,
}

/// What a check works with.
pub(super) struct Components {
    pub(super) publisher: Arc<Publisher>,
    pub(super) state_db: Arc<dyn StateDb>,
    pub(super) queue: Arc<JobQueue>,
    /// Where damaged objects are fetched from.
    pub(super) registry: Arc<dyn Registry>,
    pub(super) profiles: Arc<Profiles>,
}

/// One check.
pub(super) struct Run {
    pub(super) components: Arc<Components>,
    pub(super) request: FsckRequest,
    pub(super) stop: CancellationToken,
    store: Store,
    shown: Mutex<View>,
    pub(super) findings: Mutex<Findings>,
    cursor: Mutex<(Cursor, Instant)>,
}

impl Run {
    /// Starts a check, or resumes the one that was interrupted.
    pub(super) fn new(
        components: Arc<Components>,
        request: FsckRequest,
        stop: CancellationToken,
    ) -> Result<Run, StateError> {
        let kept = if request.depth == FsckDepth::Deep && !request.restart {
            components.state_db.record(Table::Fsck, CURSOR)?
        } else {
            None
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
        let store = components.publisher.store().afresh();
        Ok(Run { components, request, stop, store, shown, findings, cursor: Mutex::new((cursor, Instant::now())) })
    }

    /// The store, for reading. Opened for this check alone.
    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    /// Whether every byte is compared.
    pub(super) fn is_deep(&self) -> bool {
        self.request.depth == FsckDepth::Deep
    }

    /// Fails if the check is to stop.
    pub(super) fn go_on(&self) -> Result<(), Halt> {
        if self.stop.is_cancelled() { Err(Halt::Interrupted) } else { Ok(()) }
    }

    /// Enters a phase of `total` objects or bytes.
    pub(super) fn enter(&self, phase: FsckPhase, total: u64) -> Result<(), Halt> {
        let mut shown = self.shown.lock();
        (shown.phase, shown.done, shown.total) = (phase, 0, total);
        drop(shown);
        self.go_on()
    }

    /// Advances a phase that counts objects.
    pub(super) fn advance(&self, by: u64) {
        self.shown.lock().done += by;
    }

    /// Advances a phase that counts bytes. Ignored in other phases, where single objects are read again.
    pub(super) fn compared(&self, bytes: u64) {
        let mut shown = self.shown.lock();
        if shown.phase.counts_bytes() {
            shown.done += bytes;
            shown.checked.bytes += bytes;
        }
    }

    /// Changes the view for the API.
    pub(super) fn show(&self, change: impl FnOnce(&mut View)) {
        change(&mut self.shown.lock());
    }

    /// The current view for the API.
    pub(super) fn view(&self) -> View {
        let (findings, left_out, damaged) = {
            let findings = self.findings.lock();
            let damaged = findings.damaged().len() as u64 + findings.left_out();
            (findings.view(), findings.left_out(), damaged)
        };
        View { findings, findings_left_out: left_out, damaged, ..self.shown.lock().clone() }
    }

    /// Records a finding and logs it.
    pub(super) fn found(&self, object: Object, message: impl Into<String>) {
        let message = message.into();
        if self.findings.lock().add(object, message.clone()) {
            tracing::warn!("fsck: {message}");
        }
    }

    /// Turns an error of one object into a finding; an error of the whole store ends the check.
    pub(super) fn judge(&self, object: Object, error: Error) -> Result<(), Halt> {
        match error {
            Error::Missing { .. } | Error::Corrupt { .. } | Error::Unsupported { .. } => {}
            // One bad sector is a finding. An unreachable disk is not ten thousand findings.
            error @ Error::Io { .. } if self.store().generation().is_err() => return Err(error.into()),
            Error::Io { .. } | Error::NotAStore { .. } | Error::Invalid { .. } => {}
            other => return Err(other.into()),
        }
        self.found(object, error.to_string());
        Ok(())
    }

    /// Where a deep check resumes.
    pub(super) fn cursor(&self) -> Cursor {
        self.cursor.lock().0.clone()
    }

    /// Moves the cursor and saves it when [`PACE`] has passed.
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
        if due { self.save_cursor() } else { Ok(()) }
    }

    /// Saves the cursor, so that the check can be resumed from it.
    pub(super) fn save_cursor(&self) -> Result<(), Halt> {
        let found = {
            let findings = self.findings.lock();
            let records = findings.records().iter().filter(|(_, finding)| finding.outcome == FsckOutcome::Damaged);
            records.map(|(object, finding)| (*object, finding.message.clone())).collect()
        };
        let bytes = self.shown.lock().checked.bytes;
        let cursor = Cursor { found, bytes, ..self.cursor() };
        let Ok(json) = serde_json::to_vec(&cursor) else { return Ok(()) };
        Ok(self.components.state_db.change_records(Table::Fsck, &[(CURSOR, Some(&json))], Durability::Eventual)?)
    }

    /// Deletes the cursor: everything has been compared.
    pub(super) fn forget_cursor(&self) -> Result<(), Halt> {
        Ok(self.components.state_db.change_records(Table::Fsck, &[(CURSOR, None)], Durability::Eventual)?)
    }
}
