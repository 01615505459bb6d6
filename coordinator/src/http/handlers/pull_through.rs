//! Pulls on demand behind the mirror. An engine that asks for an image which the store lacks waits while the coordinator pulls it,
//! so that many hosts that start one new image cause one fetch from its registry.
//!
//! The wait is bounded, and nothing that goes wrong here is an error for the engine: it gets the answer that the image is not here,
//! and asks the registry itself, as it does while no coordinator answers.

use std::sync::Arc;
use std::time::Duration;

use coordinator_api::job::JobState;
use coordinator_api::wanted::WantedOutcome;
use store::image::ImageRef;

use crate::http::access::Access::Hosts as ForHosts;
use crate::http::api_state::{ApiState, Leader};
use crate::http::handlers::wanted;
use crate::identity::caller::{Caller, Peer};
use crate::state::job::JobId;

/// How long a request waits: well below the time after which engines end a whole pull, mirrors and registry together
/// (containerd's `image_pull_progress_timeout` is 5 minutes from 1.7 on), and often proxies, too.
const WAIT_MAX: Duration = Duration::from_secs(120);
/// How often a waiting request looks whether this coordinator still leads.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Who would pull an image for this caller. Nothing is pulled for callers who may only look, or unless images are pulled on
/// demand.
pub fn leader(app: &ApiState, caller: &Caller) -> Option<Arc<Leader>> {
    let leader = app.leader().ok()?;
    (leader.settings.pull_on_demand() && ForHosts.admits(caller.role)).then_some(leader)
}

/// Waits until an image that the store lacks has been pulled.
pub async fn wait(app: &Arc<ApiState>, leader: &Arc<Leader>, (caller, peer): (&Caller, Peer), image: &ImageRef) {
    let (asked, by, wanted) = (Arc::clone(leader), caller.clone(), image.clone());
    let answer = app.blocking(move |app| wanted::on_demand(app, &asked, (&by, peer), &wanted)).await;
    let job = match answer {
        Ok(answer) if matches!(answer.outcome, WantedOutcome::Raised | WantedOutcome::Pulled) => answer.job,
        Ok(_) => None,
        Err(error) => {
            tracing::debug!("image {image} is not pulled for the mirror: {}", error.message());
            None
        }
    };
    let Some(job) = job.map(JobId) else { return };
    let ended = async {
        loop {
            let mut ended = leader.queue.ended();
            let state = leader.queue.get(job).map(|job| job.state);
            let is_over = matches!(state, Err(_) | Ok(JobState::Published | JobState::Failed | JobState::Cancelled));
            if is_over || app.leader().is_err() {
                return;
            }
            let _ = tokio::time::timeout(LOOK_AGAIN, ended.changed()).await;
        }
    };
    let _ = tokio::time::timeout(WAIT_MAX, ended).await;
}
