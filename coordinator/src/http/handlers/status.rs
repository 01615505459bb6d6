//! The program's version, and the coordinator's condition.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use coordinator_api::limits::RegistryCondition;
use coordinator_api::route;
use coordinator_api::status::{JobCounts, Role, Status, Version};
use jiff::Timestamp;

use crate::http::api_state::{ApiState, Leader, Leadership};
use crate::http::error::ApiError;
use crate::identity::caller::Caller;
use crate::registries::limits::Limits;

/// Shows the name and version of this program.
#[utoipa::path(get, path = route::VERSION, responses((status = 200, body = Version)))]
pub async fn version() -> Json<Version> {
    Json(Version {
        name: "cachefs-coordinator".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        api: vec!["v1".to_owned()],
    })
}

/// Shows the coordinator's condition.
#[utoipa::path(get, path = route::STATUS, responses((status = 200, body = Status)))]
pub async fn status(State(app): State<Arc<ApiState>>, caller: Caller) -> Result<Json<Status>, ApiError> {
    let mut status = condition(&app).await?;
    // The names of registries reveal whose images the store has.
    if caller.images.is_restricted() {
        status.registries_waiting.clear();
        status.troubles.clear();
    }
    Ok(Json(status))
}

/// Collects the coordinator's condition.
pub(in crate::http) async fn condition(app: &Arc<ApiState>) -> Result<Status, ApiError> {
    let counts = app.blocking(|app| app.read_catalogue().map(|catalogue| app.counts.of(&catalogue))).await?;
    let leadership = app.leadership.borrow().clone();
    let (mut deadlines_at_risk, mut registries_waiting, mut troubles) = (0, Vec::new(), Vec::new());
    let (role, leader, epoch, jobs, bytes_fetched) = match leadership {
        Leadership::Leading(leader) => {
            (deadlines_at_risk, registries_waiting) = (leader.scheduler.at_risk() as u64, waiting(&leader.limits));
            troubles = kept_troubles(&leader);
            let epoch = leader.publisher.epoch();
            (Role::Leader, Some(app.name.clone()), Some(epoch), leader.queue.counts(), leader.puller.bytes_fetched())
        }
        Leadership::Standby { leader } => {
            let (name, epoch) = leader.unzip();
            (Role::Standby, name, epoch, JobCounts::default(), 0)
        }
    };
    let uptime = Timestamp::now().duration_since(app.started_at).as_secs();
    Ok(Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        role,
        leader,
        epoch,
        started_at: app.started_at,
        uptime_seconds: u64::try_from(uptime).unwrap_or(0),
        store: app.store_path.display().to_string(),
        state: app.state_path.display().to_string(),
        generation: counts.generation,
        images: counts.images,
        layers: counts.layers,
        layer_bytes: counts.layer_bytes,
        jobs,
        bytes_fetched,
        deadlines_at_risk,
        registries_waiting,
        troubles,
    })
}

/// Stored schedules and settings that the leader can no longer interpret.
fn kept_troubles(leader: &Leader) -> Vec<String> {
    let schedules = leader.scheduler.broken().into_iter();
    let schedules = schedules.map(|(name, why)| format!("schedule {name} makes no jobs: {why}"));
    leader.settings.troubles().into_iter().chain(schedules).collect()
}

/// The registries to which no requests are sent at present.
fn waiting(limits: &Limits) -> Vec<RegistryCondition> {
    limits.view().into_iter().filter(|condition| condition.waits_until.is_some()).collect()
}
