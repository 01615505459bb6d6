//! The HTTP API: routes onto the modules that do the work.
//!
//! [`routes`] is the one table: path, methods, whom each is for, and handlers. The router is built from it, the [`gate`]
//! stands before each of its rows, and tests hold it against the OpenAPI description and walk it with every role.
//! Handlers parse, ask, and convert; they hold no logic of their own. Disk work runs where it may block.
//!
//! A coordinator that stands by answers questions about the store and refuses the rest by naming the leader.

pub mod body;
mod conditions;
pub mod events;
pub mod export;
pub mod fsck;
pub mod garbage;
pub mod gate;
pub mod hosts;
pub mod images;
pub mod jobs;
pub mod load;
pub mod metrics;
pub mod mirror;
pub mod openapi;
pub mod origin;
pub mod pages;
pub mod problem;
pub mod profiles;
pub mod schedules;
pub mod settings;
pub mod status;
pub mod streams;
pub mod tokens;
pub mod wanted;

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

use crate::blob_cache::BlobCache;
use crate::board::Board;
use crate::demand::Demand;
use crate::events::Events;
use crate::fsck::Fsck;
use crate::garbage::Garbage;
use crate::hooks::HookSecret;
use crate::hosts::Hosts;
use crate::limits::Limits;
use crate::mirror::Plains;
use crate::profiles::Profiles;
use crate::pull::Puller;
use crate::quota::Quota;
use crate::scheduler::Scheduler;
use crate::server::gate::Access::{Admins, Any, Hosts as ForHosts, LimitedViewers, Open, TellingAdmins, Viewers};
use crate::server::gate::{Gate, Guard, Methods};
use crate::server::problem::Problem;
use crate::server::streams::Streams;
use crate::settings::SettingsBook;

/// What a leading coordinator has.
pub struct Leader {
    /// The right to write.
    pub publisher: Arc<Publisher>,
    /// The jobs.
    pub board: Arc<Board>,
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
    pub counts: status::Counts,
    /// Room for requests' bodies.
    pub bodies: Quota,
    /// Places for those who send traces.
    pub traces: Quota,
    /// What streams to clients may hold.
    pub streams: Streams,
}

impl App {
    /// The leader's part, or the refusal that names who leads.
    pub fn leader(&self) -> Result<Arc<Leader>, Problem> {
        match &*self.leadership.borrow() {
            Leadership::Leading(leader) => Ok(Arc::clone(leader)),
            Leadership::Standby { leader: Some((name, _)) } => Err(Problem::standby(name)),
            Leadership::Standby { leader: None } => Err(Problem::standby("another coordinator")),
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
    ) -> Result<T, Problem>
    where
        T: Send + 'static,
        E: Into<Problem> + Send + 'static,
    {
        let app = Arc::clone(self);
        let result = tokio::task::spawn_blocking(move || work(&app)).await;
        result
            .map_err(|_| Problem::internal("the request was interrupted: see the coordinator's log"))?
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
        (route::VERSION, &[("get", Open)], get(status::version)),
        (route::STATUS, &[("get", Any)], get(status::status)),
        (route::METRICS, &[("get", Viewers)], get(metrics::metrics)),
        (route::IMAGES, &[("get", Any)], get(images::list)),
        (route::IMAGE, &[("get", Any), ("delete", TellingAdmins)], get(images::detail).merge(delete(images::remove))),
        (route::EXPORT, &[("get", Any)], get(export::export)),
        (route::WAIT, &[("get", Any)], get(images::wait)),
        (route::PULLS, &[("post", ForHosts)], post(jobs::pull)),
        (route::LOAD, &[("post", TellingAdmins)], post(load::load)),
        (route::JOBS, &[("get", Any)], get(jobs::list)),
        (route::JOB, &[("get", Any)], get(jobs::detail)),
        (route::CANCEL, &[("post", TellingAdmins)], post(jobs::cancel)),
        (route::RETRY, &[("post", TellingAdmins)], post(jobs::retry)),
        (route::GC, &[("get", Viewers), ("post", TellingAdmins)], get(garbage::status).merge(post(garbage::collect))),
        (route::GC_PLAN, &[("get", Viewers)], get(garbage::plan)),
        (
            route::RETENTION,
            &[("get", Viewers), ("put", TellingAdmins)],
            get(garbage::policy).merge(put(garbage::set_policy)),
        ),
        (
            route::PINS,
            &[("get", Viewers), ("post", TellingAdmins), ("delete", TellingAdmins)],
            get(garbage::pins).merge(post(garbage::pin)).merge(delete(garbage::unpin)),
        ),
        (route::TRACES, &[("post", ForHosts)], post(profiles::trace)),
        (route::PROFILE, &[("get", Any)], get(profiles::profile)),
        (route::EVENTS, &[("get", LimitedViewers)], get(events::list)),
        (route::HOSTS, &[("get", LimitedViewers)], get(hosts::list)),
        (route::LEASE, &[("post", ForHosts), ("delete", ForHosts)], post(hosts::renew).merge(delete(hosts::release))),
        (route::TOKENS, &[("get", Admins), ("post", TellingAdmins)], get(tokens::list).merge(post(tokens::create))),
        (route::TOKEN, &[("delete", TellingAdmins)], delete(tokens::revoke)),
        (route::MIRROR, &[("get", Any)], get(mirror::version)),
        (route::MIRROR_PATH, &[("get", Any)], get(mirror::answer)),
        (route::FSCK, &[("get", Viewers), ("post", TellingAdmins)], get(fsck::show).merge(post(fsck::start))),
        (route::FSCK_STOP, &[("post", TellingAdmins)], post(fsck::stop)),
    ]
}

/// The routes of schedules and settings.
fn standing_routes() -> Vec<Route> {
    vec![
        (
            route::SCHEDULES,
            &[("get", Viewers), ("post", TellingAdmins)],
            get(schedules::list).merge(post(schedules::add)),
        ),
        (
            route::SCHEDULE,
            &[("get", Viewers), ("delete", TellingAdmins)],
            get(schedules::detail).merge(delete(schedules::remove)),
        ),
        (route::SCHEDULE_PAUSE, &[("post", TellingAdmins)], post(schedules::pause)),
        (route::SCHEDULE_RESUME, &[("post", TellingAdmins)], post(schedules::resume)),
        (route::SCHEDULE_RUN, &[("post", TellingAdmins)], post(schedules::run)),
        (route::PLAN, &[("get", Viewers)], get(schedules::plan)),
        (
            route::SETTINGS,
            &[("get", Viewers), ("put", TellingAdmins)],
            get(settings::present).merge(put(settings::apply)),
        ),
        (route::REGISTRIES, &[("get", Viewers)], get(settings::registries)),
        (route::WANTED, &[("post", ForHosts)], post(wanted::wanted)),
        // Webhooks show a secret of their own.
        (route::HOOK, &[("post", Open)], post(wanted::hook)),
    ]
}

/// The whole API.
pub fn router(app: Shared) -> Router {
    let mut router = Router::new();
    for (path, methods, handlers) in routes() {
        let guard = Guard { app: Arc::clone(&app), path, methods };
        let fallback = if path.starts_with(route::MIRROR) {
            handlers.fallback(mirror::no_such_method)
        } else {
            handlers.fallback(problem::no_such_method)
        };
        let guarded = fallback.layer(from_fn_with_state(guard, gate::admit));
        router = router.route(path, guarded);
    }
    router = router.route(route::MIRROR_BARE, get(mirror::moved).fallback(mirror::no_such_method));
    router.fallback(problem::no_such_path).with_state(app)
}
