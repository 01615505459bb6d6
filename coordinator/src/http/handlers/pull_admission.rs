//! Which pulls hosts and people may ask for, and how changes to jobs are recorded.

use coordinator_api::access::Role;
use coordinator_api::error::ErrorCode;
use coordinator_api::event::Severity;
use coordinator_api::job::Job;
use store::image::RequestedBy;

use crate::http::api_state::Leader;
use crate::http::error::ApiError;
use crate::http::on_demand_limiter::DEFAULT_PER_MINUTE;
use crate::identity::caller::{Caller, Peer};
use crate::state::clock;
use crate::state::events::NewEvent;

/// With this many jobs queued, hosts get no new ones.
const QUEUED_MAX: u64 = 5000;
/// The priority of images that somebody waits for: above the priorities that people usually give.
pub const WAITED_FOR: i32 = 100;

/// Whether a caller's pull counts as ordered by a host or by an operator.
pub fn ordered_by(caller: &Caller) -> RequestedBy {
    match caller.role {
        Role::Host => RequestedBy::Host,
        Role::Viewer | Role::Admin => RequestedBy::Operator,
    }
}

/// Refuses a host's jobs if there are too many, of all hosts or of this one. Admins are not limited.
pub fn check_host(leader: &Leader, caller: &Caller, peer: Peer, new: usize) -> Result<(), ApiError> {
    if caller.role == Role::Admin {
        return Ok(());
    }
    check_room(leader, caller, new)?;
    check_rate(leader, caller, peer, new)
}

/// Counts the jobs that a host asks for. A host above its rate is told when to ask again.
pub fn check_rate(leader: &Leader, caller: &Caller, peer: Peer, new: usize) -> Result<(), ApiError> {
    let per_minute = leader.limits.rules().demands_per_minute.unwrap_or(DEFAULT_PER_MINUTE);
    leader.demand.admit((caller, peer), new, per_minute, clock::steady()).map_err(|wait| {
        let who = caller.actor();
        let message = format!(
            "{who} has asked for more pulls than the {per_minute} a minute that a host may ask for: ask again in {} s, or raise \
             demands_per_minute in the limits",
            wait.as_secs_f64().ceil()
        );
        ApiError::later(message, wait)
    })
}

/// Refuses a host's jobs while very many are queued; it can ask again later. Admins are not limited.
pub fn check_room(leader: &Leader, caller: &Caller, new: usize) -> Result<(), ApiError> {
    let queued = leader.queue.counts().queued;
    if caller.role == Role::Admin || queued.saturating_add(new as u64) <= QUEUED_MAX {
        return Ok(());
    }
    let message = format!("{queued} jobs are waiting already: ask again when some of them have ended");
    Err(ApiError::new(ErrorCode::Busy, message))
}

/// Records who changed a job, and how.
pub fn tell(leader: &Leader, kind: &'static str, job: &Job, what: &str, caller: &Caller) {
    let message = format!("job {} ({}) {what}", job.id, job.image);
    leader.events.record(NewEvent::new(Severity::Info, kind, &job.image, message).by(caller.actor()));
}
