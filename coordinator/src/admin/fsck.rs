//! Checks the store while it is in use: everything that images refer to exists, and its bytes match its name.
//!
//! ```text
//! survey (fast) ─> compare (deep) ─> rebuild ─> look again ─> repair
//! catalogue, blobs,   packs, tars      facts      findings     quarantine,
//! indexes, lengths                                that stay    jobs, look again
//! ```
//!
//! One check runs at a time, on one thread of the leader; hosts keep reading and jobs keep running. An object that appears or
//! disappears during the check is not damage: every finding is looked at once more before it is reported. Memory holds the
//! objects' names and one layer's index at a time. A deep check that was interrupted, even by the death of the coordinator,
//! resumes at its cursor when it is started again.
//!
//! - `finding`: the findings of a check. `run`: one running check, and its cursor.
//! - `survey`, `deep`: the two depths. `rebuild`: restores what a lost database knew.
//! - `repair`, `startup`: restore damaged objects. `recover`: puts back what an unfinished repair had moved away.
//!
//! `current` guards the running check or the report of the last one; it is not held during I/O.

mod check;
mod deep;
mod finding;
mod rebuild;
mod recover;
mod repair;
mod run;
mod startup;
mod survey;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use coordinator_api::event::Severity;
use coordinator_api::fsck::{Fsck as View, FsckDepth, FsckRequest, FsckState};
use jiff::Timestamp;
use parking_lot::Mutex;
use store::publisher::Publisher;
use tokio_util::sync::CancellationToken;

use crate::admin::fsck::check::{dependents, look, packs};
use crate::admin::fsck::finding::Object;
pub use crate::admin::fsck::recover::put_back;
use crate::admin::fsck::run::{Components, Halt, LAST, Run};
use crate::jobs::queue::JobQueue;
use crate::profiles::Profiles;
use crate::registries::Registry;
use crate::state::events::{Events, NewEvent};
use crate::state::state_db::{Durability, StateDb, StateError, Table};

/// Why a request about checks is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FsckError {
    /// Only one check runs at a time.
    #[error("a check of the store is under way: wait for it, or stop it with cachefsctl fsck --stop")]
    Running,
    /// The store has never been checked.
    #[error("the store was not checked yet: run cachefsctl fsck")]
    None,
    /// No check is running.
    #[error("no check of the store is under way")]
    NotRunning,
    /// The state database failed.
    #[error(transparent)]
    StateDb(#[from] StateError),
}

/// The running check, or the final report of the last one.
enum Current {
    Running(Arc<Run>),
    Ended(Box<View>),
}

/// Starts, stops and reports the checks of one store.
pub struct Fsck {
    components: Arc<Components>,
    events: Arc<Events>,
    /// Cancelled when the coordinator shuts down.
    stop: CancellationToken,
    current: Mutex<Option<Current>>,
}

impl Fsck {
    /// Sets up checks of the store that `publisher` writes. Missing objects are fetched by jobs in `queue`, from `registry`.
    /// Checks end with `stop`.
    pub fn new(
        publisher: Arc<Publisher>,
        state_db: Arc<dyn StateDb>,
        queue: Arc<JobQueue>,
        registry: Arc<dyn Registry>,
        profiles: Arc<Profiles>,
        events: Arc<Events>,
        stop: CancellationToken,
    ) -> Result<Arc<Fsck>, StateError> {
        let last = state_db.record(Table::Fsck, LAST)?;
        let last: Option<View> = last.and_then(|json| serde_json::from_slice(&json).ok());
        let ended = |view: View| match view.state {
            // The coordinator died during the check.
            FsckState::Running => View { state: FsckState::Interrupted, ..view },
            _ => view,
        };
        let current = Mutex::new(last.map(|view| Current::Ended(Box::new(ended(view)))));
        let components = Arc::new(Components { publisher, state_db, queue, registry, profiles });
        Ok(Arc::new(Fsck { components, events, stop, current }))
    }

    /// Starts a check on behalf of `by`, on a thread of its own. Must be called within the runtime; blocks on the database.
    pub fn start(self: &Arc<Self>, request: FsckRequest, by: String) -> Result<View, FsckError> {
        let run = {
            let mut current = self.current.lock();
            // A check that is shown as ended has ended, even if its end is still being written to the database.
            if let Some(Current::Running(run)) = &*current
                && run.view().state == FsckState::Running
            {
                return Err(FsckError::Running);
            }
            let run = Arc::new(Run::new(Arc::clone(&self.components), request, self.stop.child_token())?);
            *current = Some(Current::Running(Arc::clone(&run)));
            run
        };
        let view = run.view();
        self.keep(&view);
        self.record(Severity::Info, "fsck.started", begun(&view), &by);
        let fsck = Arc::clone(self);
        tokio::task::spawn_blocking(move || fsck.run(&run, &by));
        Ok(view)
    }

    /// The running check, or the last one.
    pub fn view(&self) -> Result<View, FsckError> {
        match &*self.current.lock() {
            Some(Current::Running(run)) => Ok(run.view()),
            Some(Current::Ended(view)) => Ok((**view).clone()),
            None => Err(FsckError::None),
        }
    }

    /// Asks the running check to stop, on behalf of `by`.
    pub fn stop(&self, by: String) -> Result<View, FsckError> {
        let view = match &*self.current.lock() {
            Some(Current::Running(run)) => {
                run.stop.cancel();
                run.view()
            }
            _ => return Err(FsckError::NotRunning),
        };
        self.record(Severity::Info, "fsck.stopping", "the check of the store is to stop".to_owned(), &by);
        Ok(view)
    }

    /// Runs a whole check and records how it ended.
    fn run(&self, run: &Arc<Run>, by: &str) {
        let result = check(run);
        let (state, reason) = match result {
            Ok(()) => (FsckState::Finished, None),
            Err(Halt::Interrupted) => (FsckState::Interrupted, None),
            Err(error) => (FsckState::Failed, Some(error.to_string())),
        };
        if state != FsckState::Finished
            && run.is_deep()
            && let Err(error) = run.save_cursor()
        {
            tracing::warn!("the check of the store will begin at the beginning: {error}");
        }
        run.show(|view| {
            (view.state, view.reason, view.ended_at) = (state, reason, Some(Timestamp::now()));
        });
        let view = run.view();
        self.keep(&view);
        self.tell(&view, by);
        let mut current = self.current.lock();
        if matches!(&*current, Some(Current::Running(other)) if Arc::ptr_eq(other, run)) {
            *current = Some(Current::Ended(Box::new(view)));
        }
    }

    /// Saves the state of a check in the database, to be shown after a restart.
    fn keep(&self, view: &View) {
        let Ok(json) = serde_json::to_vec(view) else { return };
        let kept = self.components.state_db.change_records(Table::Fsck, &[(LAST, Some(&json))], Durability::Eventual);
        if let Err(error) = kept {
            tracing::warn!("what this check of the store finds is forgotten at the next restart: {error}");
        }
    }

    fn record(&self, severity: Severity, kind: &'static str, message: String, by: &str) {
        self.events.record(NewEvent::new(severity, kind, "store", message).by(by));
    }

    /// Records how a check that `by` asked for has ended.
    fn tell(&self, view: &View, by: &str) {
        let (severity, kind, message) = match (view.state, view.damaged) {
            (FsckState::Finished, 0) => (Severity::Info, "fsck.finished", "the store is whole".to_owned()),
            (FsckState::Finished, damaged) => {
                let message =
                    format!("{damaged} objects of the store are damaged: cachefsctl fsck --status names them");
                (Severity::Error, "fsck.damaged", message)
            }
            (FsckState::Failed, _) => {
                let reason = view.reason.clone().unwrap_or_default();
                (Severity::Warning, "fsck.failed", format!("the check of the store could not go on: {reason}"))
            }
            _ => (Severity::Info, "fsck.interrupted", "the check of the store was interrupted".to_owned()),
        };
        self.record(severity, kind, message, by);
    }
}

/// The message of the event that a check has started.
fn begun(view: &View) -> String {
    let depth = match view.request.depth {
        FsckDepth::Fast => "a check of the store",
        FsckDepth::Deep => "a check of every byte of the store",
    };
    let more =
        [(view.request.repair, "what is damaged is repaired"), (view.request.rebuild, "the database is rebuilt")];
    let more: Vec<&str> = more.into_iter().filter_map(|(wanted, words)| wanted.then_some(words)).collect();
    let verb = if view.resumed { "goes on" } else { "was started" };
    if more.is_empty() { format!("{depth} {verb}") } else { format!("{depth} {verb}: {}", more.join(", ")) }
}

/// Runs all phases of one check.
fn check(run: &Run) -> Result<(), Halt> {
    let surveyed = survey::survey(run)?;
    if run.is_deep() {
        deep::compare(run, &surveyed)?;
    }
    if run.request.rebuild {
        rebuild::rebuild(run, &surveyed)?;
    }
    drop(surveyed);
    confirm(run)?;
    if run.is_deep() {
        run.forget_cursor()?;
    }
    if run.request.repair { repair::repair(run) } else { Ok(()) }
}

/// Drops findings that no longer hold, and notes which images need the remaining objects.
fn confirm(run: &Run) -> Result<(), Halt> {
    let damaged = run.findings.lock().damaged();
    for object in &damaged {
        run.go_on()?;
        if look(run, *object)?.is_none() {
            run.findings.lock().forget(object);
        }
    }
    let damaged = run.findings.lock().damaged();
    let dependents = dependents(run, &packs(&damaged))?;
    let catalogue = run.components.publisher.catalogue();
    for object in &damaged {
        let layers: Vec<_> = match object {
            Object::Pack(pack) => dependents.get(pack).into_iter().flatten().map(|(diff_id, _)| *diff_id).collect(),
            _ => Vec::new(),
        };
        run.findings.lock().name_images(object, &catalogue, &layers);
    }
    Ok(())
}
