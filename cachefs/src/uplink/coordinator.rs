//! The coordinator's client for this host's threads: one request at a time, each with a timeout.

use std::io;
use std::time::Duration;

use coordinator_api::client::{Client, ClientError};
use tokio::runtime::{Builder, Runtime};

/// A blocking client, for a thread of its own.
pub(super) struct Coordinator {
    runtime: Runtime,
    client: Client,
}

/// Why a request has no result.
#[derive(Debug, thiserror::Error)]
pub(super) enum AskError {
    /// The coordinator refused it, or could not be reached.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The coordinator did not answer within the limit.
    #[error("the coordinator takes too long to answer")]
    TooSlow,
}

impl Coordinator {
    /// Makes a client; fails if the system gives no event queue or no descriptors.
    pub(super) fn new(client: Client) -> io::Result<Coordinator> {
        Ok(Coordinator { runtime: Builder::new_current_thread().enable_all().build()?, client })
    }

    /// Makes a request, and waits at most `limit` for its answer. Blocks.
    pub(super) fn ask<T>(
        &self,
        limit: Duration,
        request: impl AsyncFnOnce(&Client) -> Result<T, ClientError>,
    ) -> Result<T, AskError> {
        let answer = async { tokio::time::timeout(limit, request(&self.client)).await };
        Ok(self.runtime.block_on(answer).map_err(|_| AskError::TooSlow)??)
    }
}
