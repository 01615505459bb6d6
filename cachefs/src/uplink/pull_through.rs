//! Pulls through the coordinator: an engine on this host pulls an image that the store lacks, and waits while the coordinator
//! brings it, so that many hosts cause one fetch.
//!
//! The wait is bounded, and so is the trouble: an image that was not to be had is not waited for again for a while, because an
//! engine asks once for each layer. While the coordinator is away, the engine pulls for itself.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use coordinator_api::Client;
use coordinator_api::client::Absent;
use coordinator_api::wanted::{Wanted, WantedAnswer, WantedOutcome};
use parking_lot::Mutex;

use crate::uplink::coordinator::{AskError, Coordinator};

/// How long nobody waits for an image that was not to be had.
const AGAIN: Duration = Duration::from_secs(60);
/// How long the coordinator may take to say whether it brings an image.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The most images that are remembered as not to be had.
const REFUSED_MAX: usize = 1024;

/// Asks the coordinator for images.
#[derive(Debug)]
pub struct PullThrough {
    client: Client,
    /// Guards the images that were not to be had, with the time until which nobody waits for them; never held during I/O.
    refused: Mutex<HashMap<String, Instant>>,
}

impl PullThrough {
    /// Asks the coordinator behind `client`.
    pub fn new(client: Client) -> PullThrough {
        PullThrough { client, refused: Mutex::default() }
    }

    /// Waits at most `limit` for the image to be published; returns whether it is. Blocks.
    pub fn bring(&self, image: &str, limit: Duration) -> bool {
        let now = Instant::now();
        if self.refused.lock().get(image).is_some_and(|until| now < *until) {
            return false;
        }
        let brought = self.ask(image, limit);
        match &brought {
            Ok(true) => {}
            Ok(false) => tracing::info!("image {image} is left to the engine: the coordinator does not pull on demand"),
            Err(error) => tracing::warn!("image {image} is left to the engine: {error}"),
        }
        let is_there = brought.unwrap_or(false);
        if !is_there {
            self.refuse(image, Instant::now());
        }
        is_there
    }

    fn ask(&self, image: &str, limit: Duration) -> Result<bool, AskError> {
        let coordinator = Coordinator::new(self.client.clone())?;
        let wanted = Wanted { image: image.to_owned() };
        let WantedAnswer { outcome, .. } =
            coordinator.ask(TIMEOUT.min(limit), async |client| client.want(&wanted).await)?;
        match outcome {
            WantedOutcome::Published => Ok(true),
            WantedOutcome::Noted => Ok(false),
            WantedOutcome::Raised | WantedOutcome::Pulled => {
                coordinator.ask(limit + TIMEOUT, async |client| client.wait(image, limit, Absent::Wait).await)?;
                Ok(true)
            }
        }
    }

    fn refuse(&self, image: &str, now: Instant) {
        let mut refused = self.refused.lock();
        refused.retain(|_, until| now < *until);
        if refused.len() < REFUSED_MAX {
            refused.insert(image.to_owned(), now + AGAIN);
        }
    }
}
