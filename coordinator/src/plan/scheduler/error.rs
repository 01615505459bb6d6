//! Why the scheduler refuses a request.

use crate::jobs::queue::QueueError;
use crate::plan::spec::BadSchedule;
use crate::state::state_db::StateError;

/// A request that the scheduler refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// There is no such schedule.
    #[error("there is no schedule {0}: cachefsctl schedule list shows them")]
    Unknown(String),
    /// The name is taken.
    #[error("there is a schedule {0} already: remove it first, or use cachefsctl apply")]
    Exists(String),
    /// The schedule is not valid.
    #[error(transparent)]
    Bad(#[from] BadSchedule),
    /// The images could not be found out, or the jobs could not be made.
    #[error("schedule {name} cannot run: {why}")]
    CannotRun {
        /// The schedule.
        name: String,
        /// The reason.
        why: String,
    },
    /// The database failed.
    #[error(transparent)]
    StateDb(#[from] StateError),
    /// The job queue refused.
    #[error(transparent)]
    JobQueue(#[from] QueueError),
}
