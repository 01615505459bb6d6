//! Why a request about garbage collection, retention or pins is refused.

use crate::state::state_db::StateError;

/// Why a request about garbage collection, retention or pins is refused.
#[derive(Debug, thiserror::Error)]
pub enum GarbageError {
    /// A collection is already running.
    #[error("a collection is running already: cachefsctl gc shows the next one when this has ended")]
    Running,
    /// The coordinator is shutting down.
    #[error("the coordinator stops: collect when it is back")]
    Stopping,
    /// The policy is invalid.
    #[error("{0}")]
    Policy(String),
    /// The name is pinned.
    #[error("{0} is pinned: unpin it first, or remove it with --force")]
    Pinned(String),
    /// The name is not pinned.
    #[error("{0} is not pinned: cachefsctl images shows which names are")]
    NotPinned(String),
    /// The shared store failed.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The state database failed.
    #[error(transparent)]
    StateDb(#[from] StateError),
}
