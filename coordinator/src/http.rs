//! The HTTP API: routes onto the modules that do the work.
//!
//! [`routes`] is the one table: path, methods, whom each is for, and handlers. The router is built from it, [`auth`]
//! stands before each of its rows, and tests hold it against the OpenAPI description and walk it with every role.
//! Handlers parse, ask, and convert; they hold no logic of their own. Disk work runs where it may block.
//!
//! A coordinator that stands by answers questions about the store and refuses the rest by naming the leader.

pub mod connections;
pub mod demand;
pub mod handlers;
pub mod mirror;
pub mod quota;

pub mod auth;
pub mod bodies;
mod conditions;
pub mod error;
pub mod openapi;
pub mod origin;
pub mod pages;
pub mod streams;

use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::routing::{MethodRouter, delete, get, post, put};
use coordinator_api::route;
use jiff::Timestamp;
use parking_lot::Mutex;
use store::catalogue::Catalogue;
use store::publisher::Publisher;
use store::reader::Store;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::admin::fsck::Fsck;
use crate::admin::gc::Garbage;
use crate::admin::settings::SettingsBook;
use crate::http::auth::Access::{Admins, Any, Hosts as ForHosts, LimitedViewers, Open, TellingAdmins, Viewers};
use crate::http::auth::{Gate, Guard, Methods};
use crate::http::demand::Demand;
use crate::http::error::ApiError;
use crate::http::mirror::Plains;
use crate::http::quota::Quota;
use crate::http::streams::Streams;
use crate::identity::hosts::Hosts;
use crate::jobs::pull::Puller;
use crate::jobs::queue::JobQueue;
use crate::plan::scheduler::Scheduler;
use crate::profiles::Profiles;
use crate::registries::blob_cache::BlobCache;
use crate::registries::limits::Limits;
use crate::registries::webhook::HookSecret;
use crate::state::events::Events;

/// What a leading coordinator has.
pub struct Leader {
    /// The right to write.
    pub publisher: Arc<Publisher>,
    /// The jobs.
    pub queue: Arc<JobQueue>,
    /// Who pulls.
    pub puller: Arc<Puller>,
    /// What is known of images' starts.
    pub profiles: Arc<Profiles>,
    /// Checks of the store.
    pub fsck: Arc<Fsck>,
    /// The schedules.
    pub scheduler: Arc<Scheduler>,
    /// All settings as one document.
    pub settings: Arc<SettingsBook>,
    /// What pulling may use up.
    pub limits: Arc<Limits>,
    /// What hosts have asked for.
    pub demand: Demand,
    /// What webhooks must show; none are accepted without.
    pub hook_secret: Option<HookSecret>,
    /// What is kept.
    pub garbage: Arc<Garbage>,
    /// What happened.
    pub events: Arc<Events>,
    /// Who uses what.
    pub hosts: Arc<Hosts>,
    /// Where uploaded archives go.
    pub spools: PathBuf,
}

/// Whether this coordinator leads.
#[derive(Clone)]
pub enum Leadership {
    /// Another one does.
    Standby {
        /// Its name and epoch, once seen.
        leader: Option<(String, u64)>,
    },
    /// This one does.
    Leading(Arc<Leader>),
}

/// What handlers work with.
pub struct App {
    /// The shared store, for reading.
    pub store: Store,
    /// Where it lies.
    pub store_path: PathBuf,
    /// The state directory.
    pub state_path: PathBuf,
    /// This coordinator's own name.
    pub name: String,
    /// When the process started.
    pub started_at: Timestamp,
    /// Who may do what.
    pub gate: Gate,
    /// What happened.
    pub events: Arc<Events>,
    /// Raised when the coordinator ends: who waits is answered at once.
    pub stopping: CancellationToken,
    /// Whether we lead.
    pub leadership: watch::Receiver<Leadership>,
    /// Layers as registries sent them.
    pub originals: Arc<BlobCache>,
    /// The digests of what the mirror makes of images.
    pub plains: Plains,
    /// The catalogue as last read; guards itself only, and is cloned out for reading.
    pub catalogue: Mutex<Catalogue>,
    /// How much there is in it.
    pub counts: crate::http::handlers::status::Counts,
    /// Room for requests' bodies.
    pub bodies: Quota,
    /// Places for those who send traces.
    pub traces: Quota,
    /// What streams to clients may hold.
    pub streams: Streams,
}

impl App {
    /// The leader's part, or the refusal that names who leads.
    pub fn leader(&self) -> Result<Arc<Leader>, ApiError> {
        match &*self.leadership.borrow() {
            Leadership::Leading(leader) => Ok(Arc::clone(leader)),
            Leadership::Standby { leader: Some((name, _)) } => Err(ApiError::standby(name)),
            Leadership::Standby { leader: None } => Err(ApiError::standby("another coordinator")),
        }
    }

    /// The newest catalogue. Blocks on the shared disk.
    pub fn read_catalogue(&self) -> Result<Catalogue, store::Error> {
        let mut catalogue = self.catalogue.lock().clone();
        if self.store.refresh(&mut catalogue)? {
            let mut kept = self.catalogue.lock();
            if kept.generation() < catalogue.generation() {
                *kept = catalogue.clone();
            }
        }
        Ok(catalogue)
    }

    /// Runs `work` where it may block.
    pub async fn blocking<T, E>(
        self: &Arc<Self>,
        work: impl FnOnce(&App) -> Result<T, E> + Send + 'static,
    ) -> Result<T, ApiError>
    where
        T: Send + 'static,
        E: Into<ApiError> + Send + 'static,
    {
        let app = Arc::clone(self);
        let result = tokio::task::spawn_blocking(move || work(&app)).await;
        result
            .map_err(|_| ApiError::internal("the request was interrupted: see the coordinator's log"))?
            .map_err(Into::into)
    }
}

/// The state type of all handlers.
type Shared = Arc<App>;

/// One route: its path, the methods it answers and whom each is for, and the handlers.
type Route = (&'static str, Methods, MethodRouter<Shared>);

/// All routes.
fn routes() -> Vec<Route> {
    let mut routes = standing_routes();
    routes.extend(store_routes());
    routes
}

/// The routes of images, jobs, hosts and the coordinator itself.
fn store_routes() -> Vec<Route> {
    vec![
        (route::OPENAPI, &[("get", Open)], get(openapi::document)),
        (route::VERSION, &[("get", Open)], get(crate::http::handlers::status::version)),
        (route::STATUS, &[("get", Any)], get(crate::http::handlers::status::status)),
        (route::METRICS, &[("get", Viewers)], get(crate::http::handlers::metrics::metrics)),
        (route::IMAGES, &[("get", Any)], get(crate::http::handlers::images::list)),
        (
            route::IMAGE,
            &[("get", Any), ("delete", TellingAdmins)],
            get(crate::http::handlers::images::detail).merge(delete(crate::http::handlers::images::remove)),
        ),
        (route::EXPORT, &[("get", Any)], get(crate::http::handlers::export::export)),
        (route::WAIT, &[("get", Any)], get(crate::http::handlers::images::wait)),
        (route::PULLS, &[("post", ForHosts)], post(crate::http::handlers::jobs::pull)),
        (route::LOAD, &[("post", TellingAdmins)], post(crate::http::handlers::load::load)),
        (route::JOBS, &[("get", Any)], get(crate::http::handlers::jobs::list)),
        (route::JOB, &[("get", Any)], get(crate::http::handlers::jobs::detail)),
        (route::CANCEL, &[("post", TellingAdmins)], post(crate::http::handlers::jobs::cancel)),
        (route::RETRY, &[("post", TellingAdmins)], post(crate::http::handlers::jobs::retry)),
        (
            route::GC,
            &[("get", Viewers), ("post", TellingAdmins)],
            get(crate::http::handlers::garbage::status).merge(post(crate::http::handlers::garbage::collect)),
        ),
        (route::GC_PLAN, &[("get", Viewers)], get(crate::http::handlers::garbage::plan)),
        (
            route::RETENTION,
            &[("get", Viewers), ("put", TellingAdmins)],
            get(crate::http::handlers::garbage::policy).merge(put(crate::http::handlers::garbage::set_policy)),
        ),
        (
            route::PINS,
            &[("get", Viewers), ("post", TellingAdmins), ("delete", TellingAdmins)],
            get(crate::http::handlers::garbage::pins)
                .merge(post(crate::http::handlers::garbage::pin))
                .merge(delete(crate::http::handlers::garbage::unpin)),
        ),
        (route::TRACES, &[("post", ForHosts)], post(crate::http::handlers::profiles::trace)),
        (route::PROFILE, &[("get", Any)], get(crate::http::handlers::profiles::profile)),
        (route::EVENTS, &[("get", LimitedViewers)], get(crate::http::handlers::events::list)),
        (route::HOSTS, &[("get", LimitedViewers)], get(crate::http::handlers::hosts::list)),
        (
            route::LEASE,
            &[("post", ForHosts), ("delete", ForHosts)],
            post(crate::http::handlers::hosts::renew).merge(delete(crate::http::handlers::hosts::release)),
        ),
        (
            route::TOKENS,
            &[("get", Admins), ("post", TellingAdmins)],
            get(crate::http::handlers::tokens::list).merge(post(crate::http::handlers::tokens::create)),
        ),
        (route::TOKEN, &[("delete", TellingAdmins)], delete(crate::http::handlers::tokens::revoke)),
        (route::MIRROR, &[("get", Any)], get(crate::http::handlers::mirror::version)),
        (route::MIRROR_PATH, &[("get", Any)], get(crate::http::handlers::mirror::answer)),
        (
            route::FSCK,
            &[("get", Viewers), ("post", TellingAdmins)],
            get(crate::http::handlers::fsck::show).merge(post(crate::http::handlers::fsck::start)),
        ),
        (route::FSCK_STOP, &[("post", TellingAdmins)], post(crate::http::handlers::fsck::stop)),
    ]
}

/// The routes of schedules and settings.
fn standing_routes() -> Vec<Route> {
    vec![
        (
            route::SCHEDULES,
            &[("get", Viewers), ("post", TellingAdmins)],
            get(crate::http::handlers::schedules::list).merge(post(crate::http::handlers::schedules::add)),
        ),
        (
            route::SCHEDULE,
            &[("get", Viewers), ("delete", TellingAdmins)],
            get(crate::http::handlers::schedules::detail).merge(delete(crate::http::handlers::schedules::remove)),
        ),
        (route::SCHEDULE_PAUSE, &[("post", TellingAdmins)], post(crate::http::handlers::schedules::pause)),
        (route::SCHEDULE_RESUME, &[("post", TellingAdmins)], post(crate::http::handlers::schedules::resume)),
        (route::SCHEDULE_RUN, &[("post", TellingAdmins)], post(crate::http::handlers::schedules::run)),
        (route::PLAN, &[("get", Viewers)], get(crate::http::handlers::schedules::plan)),
        (
            route::SETTINGS,
            &[("get", Viewers), ("put", TellingAdmins)],
            get(crate::http::handlers::settings::present).merge(put(crate::http::handlers::settings::apply)),
        ),
        (route::REGISTRIES, &[("get", Viewers)], get(crate::http::handlers::settings::registries)),
        (route::WANTED, &[("post", ForHosts)], post(crate::http::handlers::wanted::wanted)),
        // Webhooks show a secret of their own.
        (route::HOOK, &[("post", Open)], post(crate::http::handlers::wanted::hook)),
    ]
}

/// The whole API.
pub fn router(app: Shared) -> Router {
    let mut router = Router::new();
    for (path, methods, handlers) in routes() {
        let guard = Guard { app: Arc::clone(&app), path, methods };
        let fallback = if path.starts_with(route::MIRROR) {
            handlers.fallback(crate::http::handlers::mirror::no_such_method)
        } else {
            handlers.fallback(crate::http::error::no_such_method)
        };
        let guarded = fallback.layer(from_fn_with_state(guard, crate::http::auth::admit));
        router = router.route(path, guarded);
    }
    router = router.route(
        route::MIRROR_BARE,
        get(crate::http::handlers::mirror::moved).fallback(crate::http::handlers::mirror::no_such_method),
    );
    router.fallback(crate::http::error::no_such_path).with_state(app)
}
