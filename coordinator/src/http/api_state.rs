//! The state that handlers work with.
//!
//! `catalogue` guards the catalogue as it was last read. It is cloned for reading, and the lock is not held during I/O.

use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;
use parking_lot::Mutex;
use store::catalogue::Catalogue;
use store::publisher::Publisher;
use store::reader::Store;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::admin::fsck::Fsck;
use crate::admin::gc::GarbageCollector;
use crate::admin::settings::SettingsStore;
use crate::http::auth::Auth;
use crate::http::counts::Counts;
use crate::http::error::ApiError;
use crate::http::mirror::Plains;
use crate::http::on_demand_limiter::OnDemandLimiter;
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

/// The components of a coordinator that leads.
pub struct Leader {
    /// The only way to write to the store.
    pub publisher: Arc<Publisher>,
    /// The pull jobs.
    pub queue: Arc<JobQueue>,
    /// Runs pulls.
    pub puller: Arc<Puller>,
    /// Profiles of images' starts.
    pub profiles: Arc<Profiles>,
    /// Checks of the store.
    pub fsck: Arc<Fsck>,
    /// The schedules.
    pub scheduler: Arc<Scheduler>,
    /// All settings as one document.
    pub settings: Arc<SettingsStore>,
    /// Limits on pulls: slots, bandwidth, breakers.
    pub limits: Arc<Limits>,
    /// The rates at which hosts may ask for pulls.
    pub demand: OnDemandLimiter,
    /// The secret that webhooks must present; without one, no webhook is accepted.
    pub hook_secret: Option<HookSecret>,
    /// Garbage collection, retention and pins.
    pub garbage: Arc<GarbageCollector>,
    /// Records and lists events.
    pub events: Arc<Events>,
    /// Hosts and their leases.
    pub hosts: Arc<Hosts>,
    /// The directory for uploaded archives.
    pub spools: PathBuf,
}

/// Whether this coordinator leads.
#[derive(Clone)]
pub enum Leadership {
    /// Another coordinator leads.
    Standby {
        /// The leader's name and epoch, once known.
        leader: Option<(String, u64)>,
    },
    /// This coordinator leads.
    Leading(Arc<Leader>),
}

/// The state that handlers work with.
pub struct ApiState {
    /// The shared store, for reading.
    pub store: Store,
    /// The directory of the shared store.
    pub store_path: PathBuf,
    /// The directory of the coordinator's own database.
    pub state_path: PathBuf,
    /// The name of this coordinator.
    pub name: String,
    /// When the process started.
    pub started_at: Timestamp,
    /// Authenticates callers.
    pub auth: Auth,
    /// Records and lists events.
    pub events: Arc<Events>,
    /// Cancelled when the coordinator shuts down; waiting requests are then answered at once.
    pub stopping: CancellationToken,
    /// Whether this coordinator leads.
    pub leadership: watch::Receiver<Leadership>,
    /// Layers as registries sent them.
    pub originals: Arc<BlobCache>,
    /// Digests of the documents that the mirror generates for images.
    pub plains: Plains,
    /// The catalogue as last read. The lock guards it alone; it is cloned for reading.
    pub catalogue: Mutex<Catalogue>,
    /// Numbers of images and layers in the catalogue.
    pub counts: Counts,
    /// Memory for requests' bodies.
    pub bodies: Quota,
    /// Places for callers that send traces.
    pub traces: Quota,
    /// Memory that streams to clients may hold.
    pub streams: Streams,
}

impl ApiState {
    /// The leader's components; on a standby, a refusal that names the leader.
    pub fn leader(&self) -> Result<Arc<Leader>, ApiError> {
        match &*self.leadership.borrow() {
            Leadership::Leading(leader) => Ok(Arc::clone(leader)),
            Leadership::Standby { leader: Some((name, _)) } => Err(ApiError::standby(name)),
            Leadership::Standby { leader: None } => Err(ApiError::standby("another coordinator")),
        }
    }

    /// Reads the newest catalogue. Blocks on the shared disk.
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

    /// Runs `work` on a thread that may block.
    pub async fn blocking<T, E>(
        self: &Arc<Self>,
        work: impl FnOnce(&ApiState) -> Result<T, E> + Send + 'static,
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
