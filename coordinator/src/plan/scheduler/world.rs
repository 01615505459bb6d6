//! A coordinator and a registry in simulated time. All except sockets and the lease is the product's own code.

use std::sync::Arc;
use std::time::Duration;

use coordinator_api::event::Event;
use coordinator_api::limits::Limits as LimitsSpec;
use coordinator_api::schedule::ScheduleSpec;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{StreamExt, stream};
use jiff::Timestamp;
use store::Digest;
use store::image::{ImageRef, Platform};
use store::publisher::{Publisher, create};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::jobs::pull::Puller;
use crate::jobs::queue::JobQueue;
use crate::jobs::runner::JobRunner;
use crate::plan::scheduler::{Components, Scheduler};
use crate::profiles::{Guesses, Profiles};
use crate::registries::limits::Limits;
use crate::registries::limits::rules::Rules;
use crate::registries::oci::docker_config::CredentialStore;
use crate::registries::oci::registry::OciRegistry;
use crate::registries::oci::simulated::{HOST, Simulated};
use crate::registries::oci::transport::{Transport, TransportSettings};
use crate::registries::{BlobStream, Registry, RegistryError, RemoteLayer, ResolvedImage};
use crate::state::clock::{Clock, TestClock, until};
use crate::state::events::Events;
use crate::state::state_db::StateDb;
use crate::state::state_db::memory::MemoryStateDb;

/// The registry, but a layer's bytes come in one piece, once all have arrived. While a thread unpacks, simulated time stands still, so no
/// thread may wait for bytes that are on their way.
struct Whole(Arc<OciRegistry>);

impl Registry for Whole {
    fn resolve<'a>(
        &'a self,
        image: &'a ImageRef,
        platform: Option<&'a Platform>,
    ) -> BoxFuture<'a, Result<ResolvedImage, RegistryError>> {
        self.0.resolve(image, platform)
    }

    fn confirm_blob<'a>(
        &'a self,
        image: &'a ImageRef,
        layer: &'a RemoteLayer,
    ) -> BoxFuture<'a, Result<(), RegistryError>> {
        self.0.confirm_blob(image, layer)
    }

    fn layer(&self, image: &ImageRef, layer: &RemoteLayer) -> BlobStream {
        let pieces = self.0.layer(image, layer);
        let all = async move { stream::iter(pieces.collect::<Vec<_>>().await) };
        let all: BoxStream<'static, _> = stream::once(all).flatten().boxed();
        all
    }
}

/// A running coordinator.
pub(super) struct Running {
    pub(super) scheduler: Arc<Scheduler>,
    pub(super) queue: Arc<JobQueue>,
    pub(super) limits: Arc<Limits>,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

/// The registry, the store, the database, and a coordinator that may be running.
pub(super) struct World {
    pub(super) hub: Simulated,
    pub(super) clock: TestClock,
    pub(super) publisher: Arc<Publisher>,
    pub(super) events: Arc<Events>,
    state_db: Arc<dyn StateDb>,
    rules: LimitsSpec,
    running: Option<Running>,
    directory: tempfile::TempDir,
}

/// An image of the simulated registry.
pub(super) fn image(name: &str) -> String {
    format!("{HOST}/{name}")
}

impl World {
    /// A world that begins at `time`, with a running coordinator. One connection brings `speed` bytes a second.
    pub(super) fn new(time: &str, seed: u64, speed: f64) -> World {
        let directory = tempfile::tempdir().unwrap();
        create(directory.path()).unwrap();
        let publisher = Arc::new(Publisher::open(directory.path(), "world").unwrap());
        let state_db: Arc<dyn StateDb> = Arc::new(MemoryStateDb::default());
        let mut world = World {
            hub: Simulated::new(seed, speed),
            clock: TestClock::at(time),
            publisher,
            events: Arc::new(Events::open(Arc::clone(&state_db)).unwrap()),
            state_db,
            rules: LimitsSpec::default(),
            running: None,
            directory,
        };
        world.start();
        world
    }

    /// Sets other limits, now and for coordinators that start later.
    pub(super) fn set_limits(&mut self, rules: LimitsSpec) {
        self.rules = rules;
        self.now_running().limits.set(Rules::parse(&self.rules).unwrap());
    }

    pub(super) fn start(&mut self) {
        let clock: Arc<dyn Clock> = Arc::new(self.clock);
        let limits = Arc::new(Limits::new(Arc::clone(&clock), 3));
        limits.set(Rules::parse(&self.rules).unwrap());
        let mut transport = Transport::new(&TransportSettings::default(), Arc::clone(&limits)).unwrap();
        transport.stand_in = Some(Arc::new(self.hub.clone()));
        let credentials = CredentialStore { config: None };
        let registry = Arc::new(OciRegistry::over(transport, credentials, self.publisher.store().clone()));
        let whole: Arc<dyn Registry> = Arc::new(Whole(Arc::clone(&registry)));
        let state_db = Arc::clone(&self.state_db);
        let queue = Arc::new(JobQueue::open_with(state_db, Arc::clone(&clock), Arc::clone(&limits)).unwrap());
        let puller = Puller::new(Arc::clone(&self.publisher), Arc::clone(&self.state_db), Arc::clone(&limits));
        let (profiles, _inbox) = Profiles::new(Arc::clone(&self.state_db), Arc::clone(&self.publisher), Guesses::None);
        let runner = JobRunner {
            queue: Arc::clone(&queue),
            puller: Arc::new(puller),
            profiles,
            registry: Arc::clone(&whole),
            store: "store".into(),
            events: Arc::clone(&self.events),
        };
        let components = Components {
            clock,
            state_db: Arc::clone(&self.state_db),
            queue: Arc::clone(&queue),
            limits: Arc::clone(&limits),
            tag_lister: registry,
            registry: whole,
            publisher: Arc::clone(&self.publisher),
            store_path: self.directory.path().to_owned(),
            events: Arc::clone(&self.events),
        };
        let scheduler = Arc::new(Scheduler::open(components).unwrap());
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(runner.run(4, stop.clone()));
        tasks.spawn(Arc::clone(&scheduler).run(stop.clone()));
        self.running = Some(Running { scheduler, queue, limits, stop, tasks });
    }

    /// Kills the coordinator. Only the database and the store stay.
    pub(super) async fn kill(&mut self) {
        if let Some(mut running) = self.running.take() {
            running.stop.cancel();
            running.tasks.shutdown().await;
        }
    }

    pub(super) fn now_running(&self) -> &Running {
        self.running.as_ref().expect("the coordinator runs")
    }

    pub(super) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    pub(super) fn add(&self, spec: ScheduleSpec) {
        self.now_running().scheduler.add(spec).unwrap();
    }

    /// Lets time pass.
    pub(super) async fn pass(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }

    /// Lets time pass until `time`.
    pub(super) async fn pass_until(&self, time: &str) {
        let time: Timestamp = time.parse().unwrap();
        self.pass(until(self.clock.now(), time)).await;
    }

    /// The digest that the catalogue has for an image.
    pub(super) fn published(&self, name: &str) -> Option<Digest> {
        let image: ImageRef = image(name).parse().unwrap();
        self.publisher.catalogue().find(&image).map(|state| state.image.target)
    }

    /// Events of one kind.
    pub(super) fn said(&self, kind: &str) -> Vec<Event> {
        self.events.after(0, usize::MAX).into_iter().filter(|event| event.kind == kind).collect()
    }
}
