//! Which program this is, and how it is.

use std::collections::HashMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use coordinator_api::limits::RegistryCondition;
use coordinator_api::route;
use coordinator_api::status::{JobCounts, Role, Status, Version};
use jiff::Timestamp;
use parking_lot::Mutex;
use store::Digest;
use store::catalogue::Catalogue;

use crate::http::error::ApiError;
use crate::http::{App, Leader, Leadership};
use crate::identity::caller::Caller;
use crate::registries::limits::Limits;

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
pub async fn status(State(app): State<Arc<App>>, caller: Caller) -> Result<Json<Status>, ApiError> {
    let mut status = condition(&app).await?;
    // Which registries there are tells whose images there are.
    if caller.images.is_restricted() {
        status.registries_waiting.clear();
        status.troubles.clear();
    }
    Ok(Json(status))
}

/// The coordinator's condition, put together.
pub(in crate::http) async fn condition(app: &Arc<App>) -> Result<Status, ApiError> {
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

/// What the leader keeps and does not understand any more.
fn kept_troubles(leader: &Leader) -> Vec<String> {
    let schedules = leader.scheduler.broken().into_iter();
    let schedules = schedules.map(|(name, why)| format!("schedule {name} makes no jobs: {why}"));
    leader.settings.troubles().into_iter().chain(schedules).collect()
}

/// How much there is in one generation of the catalogue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counted {
    generation: u64,
    images: u64,
    layers: u64,
    layer_bytes: u64,
}

/// What was counted last: all layers are looked at once for each generation that somebody asks about, not for each who asks.
///
/// The lock guards the numbers and is not held while they are counted.
#[derive(Debug, Default)]
pub struct Counts(Mutex<Counted>);

impl Counts {
    fn of(&self, catalogue: &Catalogue) -> Counted {
        let known = *self.0.lock();
        if known.generation == catalogue.generation() {
            return known;
        }
        let layers = catalogue.images().flat_map(|image| image.layers.iter().map(|layer| (layer.diff_id, layer.size)));
        let layers: HashMap<Digest, u64> = layers.collect();
        let counted = Counted {
            generation: catalogue.generation(),
            images: catalogue.images().count() as u64,
            layers: layers.len() as u64,
            layer_bytes: layers.values().sum(),
        };
        let mut known = self.0.lock();
        if known.generation < counted.generation {
            *known = counted;
        }
        counted
    }
}

/// The registries to which nothing goes out at present.
fn waiting(limits: &Limits) -> Vec<RegistryCondition> {
    limits.view().into_iter().filter(|condition| condition.waits_until.is_some()).collect()
}
