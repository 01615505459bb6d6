//! The result of building a startup pack.

use std::sync::Arc;

use store::profile::StartupRecord;

use crate::state::state_db::StateError;

/// Why there is no new startup pack.
#[derive(Debug, thiserror::Error)]
pub(super) enum BuildError {
    /// The coordinator is stopping.
    #[error("the coordinator stops")]
    Stopped,
    /// The database failed.
    #[error(transparent)]
    StateDb(#[from] StateError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] store::Error),
}

/// What a check of a chain led to.
pub(super) enum Built {
    /// A new pack was published.
    Published {
        /// Its record in the catalogue.
        record: Arc<StartupRecord>,
        /// How many pieces it has.
        pieces: usize,
    },
    /// No new pack is needed.
    Unchanged,
    /// Nothing is known of the chain's starts.
    Unknown,
}
