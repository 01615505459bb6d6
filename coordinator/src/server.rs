//! The HTTP API: routes onto the modules that do the work.
//!
//! [`routes`] is the one table; the router is built from it and a test holds it against the OpenAPI description.
//! Handlers parse, ask, and convert; they hold no logic of their own. Disk work runs where it may block.
//!
//! A coordinator that stands by answers questions about the store and refuses the rest by naming the leader.

pub mod export;
pub mod fsck;
pub mod images;
pub mod jobs;
pub mod load;
pub mod openapi;
pub mod problem;
pub mod profiles;
pub mod status;

use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::routing::{MethodRouter, delete, get, post};
use coordinator_api::route;
use jiff::Timestamp;
use parking_lot::Mutex;
use store::catalogue::Catalogue;
use store::publisher::Publisher;
use store::reader::Store;
use tokio::sync::watch;

use crate::board::Board;
use crate::fsck::Fsck;
use crate::profiles::Profiles;
use crate::pull::Puller;
use crate::server::problem::Problem;

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
    /// Whether we lead.
    pub leadership: watch::Receiver<Leadership>,
    /// The catalogue as last read; guards itself only, and is cloned out for reading.
    pub catalogue: Mutex<Catalogue>,
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

/// One route: its path, the methods it answers (for the test), and the handlers.
type Route = (&'static str, &'static [&'static str], MethodRouter<Shared>);

/// All routes.
fn routes() -> Vec<Route> {
    vec![
        (route::OPENAPI, &["get"], get(openapi::document)),
        (route::VERSION, &["get"], get(status::version)),
        (route::STATUS, &["get"], get(status::status)),
        (route::IMAGES, &["get"], get(images::list)),
        (route::IMAGE, &["get", "delete"], get(images::detail).merge(delete(images::remove))),
        (route::EXPORT, &["get"], get(export::export)),
        (route::WAIT, &["get"], get(images::wait)),
        (route::PULLS, &["post"], post(jobs::pull)),
        (route::LOAD, &["post"], post(load::load)),
        (route::JOBS, &["get"], get(jobs::list)),
        (route::JOB, &["get"], get(jobs::detail)),
        (route::CANCEL, &["post"], post(jobs::cancel)),
        (route::RETRY, &["post"], post(jobs::retry)),
        (route::TRACES, &["post"], post(profiles::trace)),
        (route::PROFILE, &["get"], get(profiles::profile)),
        (route::FSCK, &["get", "post"], get(fsck::show).merge(post(fsck::start))),
        (route::FSCK_STOP, &["post"], post(fsck::stop)),
    ]
}

/// The whole API.
pub fn router(app: Shared) -> Router {
    let mut router = Router::new();
    for (path, _, handlers) in routes() {
        router = router.route(path, handlers.fallback(problem::no_such_method));
    }
    router.fallback(problem::no_such_path).with_state(app)
}
