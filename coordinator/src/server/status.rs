//! Which program this is, and how it is.

use std::collections::HashMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use coordinator_api::limits::RegistryCondition;
use coordinator_api::route;
use coordinator_api::status::{JobCounts, Role, Status, Version};
use jiff::Timestamp;
use store::Digest;

use crate::limits::Limits;
use crate::server::problem::Problem;
use crate::server::{App, Leadership};

/// Which program answers.
#[utoipa::path(get, path = route::VERSION, responses((status = 200, body = Version)))]
pub async fn version() -> Json<Version> {
    Json(Version {
        name: "cachefs-coordinator".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        api: vec!["v1".to_owned()],
    })
}

/// The coordinator's condition.
#[utoipa::path(get, path = route::STATUS, responses((status = 200, body = Status)))]
pub async fn status(State(app): State<Arc<App>>) -> Result<Json<Status>, Problem> {
    condition(&app).await.map(Json)
}

/// The coordinator's condition, put together.
pub(super) async fn condition(app: &Arc<App>) -> Result<Status, Problem> {
    let catalogue = app.blocking(App::read_catalogue).await?;
    let layers: HashMap<Digest, u64> =
        catalogue.images().flat_map(|image| image.layers.iter().map(|layer| (layer.diff_id, layer.size))).collect();
    let leadership = app.leadership.borrow().clone();
    let (mut deadlines_at_risk, mut registries_waiting) = (0, Vec::new());
    let (role, leader, epoch, jobs, bytes_fetched) = match leadership {
        Leadership::Leading(leader) => {
            (deadlines_at_risk, registries_waiting) = (leader.scheduler.at_risk() as u64, waiting(&leader.limits));
            let epoch = leader.publisher.epoch();
            (Role::Leader, Some(app.name.clone()), Some(epoch), leader.board.counts(), leader.puller.bytes_fetched())
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
        generation: catalogue.generation(),
        images: catalogue.images().count() as u64,
        layers: layers.len() as u64,
        layer_bytes: layers.values().sum(),
        jobs,
        bytes_fetched,
        deadlines_at_risk,
        registries_waiting,
    })
}

/// The registries to which nothing goes out at present.
fn waiting(limits: &Limits) -> Vec<RegistryCondition> {
    limits.view().into_iter().filter(|condition| condition.waits_until.is_some()).collect()
}
