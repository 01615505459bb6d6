//! What a leader runs, from the first attempt to take the lease until it stops leading.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use coordinator_api::event::Severity;
use jiff::Timestamp;
use store::publisher::{Candidacy, Candidate, Publisher};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::admin::fsck::{Fsck, put_back};
use crate::admin::gc::GarbageCollector;
use crate::admin::settings::{SettingsParts, SettingsStore};
use crate::app::config::Config;
use crate::app::error::{ServeError, first_failure};
use crate::app::heartbeat::Heartbeat;
use crate::app::upkeep::{go_on_above, tend};
use crate::http::api_state::{Leader, Leadership};
use crate::http::on_demand_limiter::OnDemandLimiter;
use crate::identity::hosts::Hosts;
use crate::identity::tokens::Tokens;
use crate::jobs::pull::Puller;
use crate::jobs::queue::JobQueue;
use crate::jobs::runner::{JobRunner, given_up};
use crate::plan::scheduler::{Components, Scheduler};
use crate::profiles::{Inbox, Profiles};
use crate::registries::blob_cache::BlobCache;
use crate::registries::limits::Limits;
use crate::registries::oci::registry::OciRegistry;
use crate::state::clock::{self, SystemClock};
use crate::state::events::{Events, NewEvent};
use crate::state::replicated::{ReplicatedState, TakenOver};
use crate::state::state_db::{StateDb, StateError};

/// How often a standby tries to take the lease.
const TRY_AGAIN: Duration = Duration::from_secs(1);
/// Attempts between reads of the handover log.
const FOLLOW_EVERY: u32 = 10;

/// What a coordinator needs in order to lead.
pub(crate) struct LeaderContext {
    pub(crate) config: Config,
    pub(crate) shared: Arc<ReplicatedState>,
    pub(crate) tokens: Arc<Tokens>,
    pub(crate) events: Arc<Events>,
    pub(crate) registry: Arc<OciRegistry>,
    pub(crate) limits: Arc<Limits>,
    pub(crate) originals: Arc<BlobCache>,
    pub(crate) leadership: watch::Sender<Leadership>,
}

/// The result of the first attempt to take the lease.
pub(crate) enum FirstTry {
    Leading(LeaderTasks),
    Standby(Candidate),
}

/// A leader's components, ready to run.
pub(crate) struct LeaderTasks {
    publisher: Arc<Publisher>,
    heartbeat: Heartbeat,
    runner: JobRunner,
    scheduler: Arc<Scheduler>,
    profiles: Arc<Profiles>,
    inbox: Inbox,
    garbage: Arc<GarbageCollector>,
    hosts: Arc<Hosts>,
    settings: Arc<SettingsStore>,
}

/// Runs work that blocks on the shared disk.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, store::Error> + Send + 'static,
) -> Result<T, store::Error> {
    let crashed = |_| store::Error::corrupt("this coordinator", "a thread of it crashed: see its log");
    tokio::task::spawn_blocking(work).await.map_err(crashed)?
}

impl LeaderContext {
    /// The database, for components that need not know that it is replicated.
    fn state_db(&self) -> Arc<dyn StateDb> {
        Arc::clone(&self.shared) as _
    }

    pub(crate) fn stand_by(&self, holder: &str, epoch: u64) {
        let next = Leadership::Standby { leader: Some((holder.to_owned(), epoch)) };
        let is_new =
            !matches!(&*self.leadership.borrow(), Leadership::Standby { leader: Some((_, known)) } if *known == epoch);
        self.leadership.send_replace(next);
        if is_new {
            tracing::info!("standing by: {holder} leads {} (epoch {epoch})", self.config.store.display());
        }
    }

    /// Reads the leader's changes to tokens from the handover log.
    pub(crate) async fn follow(&self) {
        let tokens = Arc::clone(&self.tokens);
        match tokio::task::spawn_blocking(move || tokens.follow_leader()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!("{error}: trying again"),
            Err(error) => tracing::error!("a thread that reads what the leader has changed crashed: {error}"),
        }
    }

    /// Reloads the tokens after a takeover: a standby checks them, too.
    fn took_over(&self, taken: Option<TakenOver>) -> Result<(), StateError> {
        let Some(TakenOver { epoch, records }) = taken else { return Ok(()) };
        tracing::debug!("{records} records of the leader with epoch {epoch} are known now");
        self.tokens.reload()
    }

    /// Becomes the leader: takes over from the last leader and prepares to continue its work.
    pub(crate) async fn become_leader(
        &self,
        publisher: Publisher,
        stop: &CancellationToken,
    ) -> Result<LeaderTasks, ServeError> {
        let publisher = Arc::new(publisher);
        // Renewing starts now: the takeover may take longer than a lease lives.
        let heartbeat = Heartbeat::start(Arc::clone(&publisher))?;
        let leader = Arc::clone(&publisher);
        let taken = blocking_on_database(&self.shared, move |shared| shared.lead(&leader)).await?;
        self.took_over(taken)?;
        if let Some(lost) = self.shared.take_lost() {
            self.events.record(NewEvent::new(Severity::Error, "handover.lost", "store", lost));
        }
        let (newest, leader, events) = (self.shared.newest()?, Arc::clone(&publisher), Arc::clone(&self.events));
        blocking(move || go_on_above(newest, &leader, &events)).await?;
        let leader = Arc::clone(&publisher);
        match blocking(move || put_back(&leader)).await? {
            0 => {}
            count => {
                let message = format!(
                    "{count} damaged objects that a repair had moved away were put back: run cachefsctl fsck --deep --repair"
                );
                self.events.record(NewEvent::new(Severity::Warning, "fsck.put_back", "store", message));
            }
        }
        self.prepare(publisher, heartbeat, stop)
    }

    /// Resumes the jobs in the database, and announces to the API that this coordinator leads.
    fn prepare(
        &self,
        publisher: Arc<Publisher>,
        heartbeat: Heartbeat,
        stop: &CancellationToken,
    ) -> Result<LeaderTasks, ServeError> {
        tracing::info!("leading {} (epoch {})", self.config.store.display(), publisher.epoch());
        let queue = Arc::new(JobQueue::open_with(self.state_db(), Arc::new(SystemClock), Arc::clone(&self.limits))?);
        queue.given_up().iter().for_each(|job| self.events.record(given_up(job)));
        let spools = self.config.state.join("spool");
        sweep(&spools, &queue.spools());
        let puller = Puller::new(Arc::clone(&publisher), self.state_db(), Arc::clone(&self.limits));
        let puller = Arc::new(puller.keeping(Arc::clone(&self.originals)));
        puller.forget_unneeded();
        let scheduler = self.scheduler(&queue, &publisher)?;
        let (profiles, inbox) = Profiles::new(self.state_db(), Arc::clone(&publisher), self.config.guesses);
        let (lease, now) = (self.config.host_lease, clock::steady());
        let hosts = Hosts::open(self.state_db(), Arc::clone(&self.events), lease, now)?;
        let hosts = Arc::new(hosts);
        let state_db = self.state_db();
        let (holds, events) = (Arc::clone(&hosts) as _, Arc::clone(&self.events));
        let garbage = Arc::new(GarbageCollector::open(Arc::clone(&publisher), state_db, holds, events)?);
        let fsck = self.fsck(&publisher, &queue, &profiles, stop)?;
        let settings = Arc::new(SettingsStore::open(SettingsParts {
            state_db: self.state_db(),
            limits: Arc::clone(&self.limits),
            scheduler: Arc::clone(&scheduler),
            garbage: Arc::clone(&garbage),
            publisher: Arc::clone(&publisher),
            events: Arc::clone(&self.events),
        })?);
        self.leadership.send_replace(Leadership::Leading(Arc::new(Leader {
            publisher: Arc::clone(&publisher),
            queue: Arc::clone(&queue),
            puller: Arc::clone(&puller),
            profiles: Arc::clone(&profiles),
            fsck,
            scheduler: Arc::clone(&scheduler),
            settings: Arc::clone(&settings),
            limits: Arc::clone(&self.limits),
            demand: OnDemandLimiter::default(),
            hook_secret: self.config.hook_secret,
            garbage: Arc::clone(&garbage),
            events: Arc::clone(&self.events),
            hosts: Arc::clone(&hosts),
            spools,
        })));
        let store = self.config.store.display().to_string().into();
        Ok(LeaderTasks {
            publisher,
            heartbeat,
            runner: JobRunner {
                queue,
                puller,
                profiles: Arc::clone(&profiles),
                registry: Arc::clone(&self.registry) as _,
                store,
                events: Arc::clone(&self.events),
            },
            scheduler,
            profiles,
            inbox,
            garbage,
            hosts,
            settings,
        })
    }

    /// Checks of the store, not yet running.
    fn fsck(
        &self,
        publisher: &Arc<Publisher>,
        queue: &Arc<JobQueue>,
        profiles: &Arc<Profiles>,
        stop: &CancellationToken,
    ) -> Result<Arc<Fsck>, StateError> {
        Fsck::new(
            Arc::clone(publisher),
            self.state_db(),
            Arc::clone(queue),
            Arc::clone(&self.registry) as _,
            Arc::clone(profiles),
            Arc::clone(&self.events),
            stop.clone(),
        )
    }

    /// The schedules, not yet running.
    fn scheduler(&self, queue: &Arc<JobQueue>, publisher: &Arc<Publisher>) -> Result<Arc<Scheduler>, StateError> {
        let parts = Components {
            clock: Arc::new(SystemClock),
            state_db: self.state_db(),
            queue: Arc::clone(queue),
            limits: Arc::clone(&self.limits),
            tag_lister: Arc::clone(&self.registry) as _,
            registry: Arc::clone(&self.registry) as _,
            publisher: Arc::clone(publisher),
            store_path: self.config.store.clone(),
            events: Arc::clone(&self.events),
        };
        Ok(Arc::new(Scheduler::open(parts)?))
    }

    /// Waits for the lease if necessary, then runs jobs until stopped or replaced.
    pub(crate) async fn lead(&self, first: FirstTry, stop: &CancellationToken) -> Result<(), ServeError> {
        let mut tasks = match first {
            FirstTry::Leading(tasks) => tasks,
            FirstTry::Standby(candidate) => match self.wait(candidate, stop).await? {
                Some(publisher) => self.become_leader(publisher, stop).await?,
                None => return Ok(()),
            },
        };
        let dispatching = tokio::spawn(tasks.runner.run(self.config.parallel_jobs, stop.clone()));
        let scheduling = tokio::spawn(tasks.scheduler.run(stop.clone()));
        let learning = tokio::spawn(tasks.profiles.run(tasks.inbox, stop.clone()));
        let collecting = tokio::spawn(tasks.garbage.run(stop.clone()));
        let settling = tokio::spawn(tasks.settings.run(stop.clone()));
        let expiring = tokio::spawn(expire_leases(Arc::clone(&tasks.hosts), Arc::clone(&self.tokens), stop.clone()));
        let tended = (Arc::clone(&self.shared), Arc::clone(&tasks.publisher), Arc::clone(&self.events));
        let sharing = tokio::spawn(tend(tended, stop.clone()));
        let result = tokio::select! {
            () = stop.cancelled() => Ok(()),
            why = tasks.heartbeat.lost() => Err(why),
        };
        stop.cancel();
        let _ = tokio::join!(dispatching, scheduling, learning, collecting, settling, expiring, sharing);
        drop(tasks.heartbeat);
        if result.is_ok() {
            let publisher = Arc::clone(&tasks.publisher);
            blocking(move || publisher.release()).await?;
        }
        result
    }

    async fn wait(&self, mut candidate: Candidate, stop: &CancellationToken) -> Result<Option<Publisher>, ServeError> {
        let mut attempt = 0_u32;
        loop {
            attempt = attempt.wrapping_add(1);
            tokio::select! {
                () = stop.cancelled() => return Ok(None),
                () = tokio::time::sleep(TRY_AGAIN) => {}
            }
            if attempt.is_multiple_of(FOLLOW_EVERY) {
                self.follow().await;
            }
            let (answer, back) = blocking(move || Ok((candidate.attempt(), candidate))).await?;
            candidate = back;
            match answer {
                Ok(Candidacy::Leading(publisher)) => return Ok(Some(*publisher)),
                Ok(Candidacy::Standby { holder, epoch }) => self.stand_by(&holder, epoch),
                Err(error) => tracing::warn!("this coordinator cannot lead, trying again: {}", first_failure(error)),
            }
        }
    }
}

/// Removes uploaded archives that no job needs: uploads that broke off when the last coordinator died.
fn sweep(spools: &Path, needed: &[PathBuf]) {
    for entry in std::fs::read_dir(spools).into_iter().flatten().flatten() {
        if !needed.contains(&entry.path()) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Runs work that blocks on the replicated database.
pub(crate) async fn blocking_on_database<T: Send + 'static>(
    shared: &Arc<ReplicatedState>,
    work: impl FnOnce(&ReplicatedState) -> Result<T, StateError> + Send + 'static,
) -> Result<T, StateError> {
    let shared = Arc::clone(shared);
    let crashed = |_| StateError::HandoverLog { why: "a thread crashed: see the log".to_owned() };
    tokio::task::spawn_blocking(move || work(&shared)).await.map_err(crashed)?
}

/// Ends the leases of silent hosts until `stop`.
async fn expire_leases(hosts: Arc<Hosts>, tokens: Arc<Tokens>, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(hosts.patience()) => {}
        }
        let (hosts, tokens) = (Arc::clone(&hosts), Arc::clone(&tokens));
        let look = move || {
            hosts.expire(clock::steady());
            hosts.forget_revoked(&tokens, Timestamp::now());
        };
        let _ = tokio::task::spawn_blocking(look).await;
    }
}
