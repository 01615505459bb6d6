//! From the first try for the lease to the end of leading.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use coordinator_api::event::Severity;
use jiff::Timestamp;
use store::publisher::{Candidacy, Candidate, Publisher};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::admin::fsck::{Fsck, put_back};
use crate::admin::gc::Garbage;
use crate::admin::settings::{SettingsBook, SettingsParts};
use crate::app::config::Config;
use crate::app::heartbeat::Heartbeat;
use crate::app::serve::{ServeError, first_failure};
use crate::app::upkeep::{go_on_above, tend};
use crate::http::demand::Demand;
use crate::http::{Leader, Leadership};
use crate::identity::hosts::Hosts;
use crate::identity::tokens::Tokens;
use crate::jobs::pull::Puller;
use crate::jobs::queue::JobQueue;
use crate::jobs::runner::{JobRunner, given_up};
use crate::plan::scheduler::{Parts, Scheduler};
use crate::profiles::{Inbox, Profiles};
use crate::registries::blob_cache::BlobCache;
use crate::registries::limits::Limits;
use crate::registries::oci::client::OciRegistry;
use crate::state::clock::{self, SystemClock};
use crate::state::events::{Events, NewEvent};
use crate::state::replicated::{ReplicatedState, TakenOver};
use crate::state::state_db::{StateDb, StateError};

/// How often a standby looks whether the store is free.
const TRY_AGAIN: Duration = Duration::from_secs(1);
/// How often it reads what the leader has changed, in tries.
const FOLLOW_EVERY: u32 = 10;

/// Everything that leading needs and standing by does not.
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

/// What the first try for the lease gave.
pub(crate) enum Candidacy0 {
    Leading(LeaderTasks),
    Standby(Candidate),
}

/// A leader's parts.
pub(crate) struct LeaderTasks {
    publisher: Arc<Publisher>,
    heartbeat: Heartbeat,
    runner: JobRunner,
    scheduler: Arc<Scheduler>,
    profiles: Arc<Profiles>,
    inbox: Inbox,
    garbage: Arc<Garbage>,
    hosts: Arc<Hosts>,
    settings: Arc<SettingsBook>,
}

/// Runs work that blocks on the shared disk.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, store::Error> + Send + 'static,
) -> Result<T, store::Error> {
    let crashed = |_| store::Error::corrupt("this coordinator", "a thread of it crashed: see its log");
    tokio::task::spawn_blocking(work).await.map_err(crashed)?
}

impl LeaderContext {
    /// The database, for those whom it does not concern that others know it, too.
    fn state_db(&self) -> Arc<dyn StateDb> {
        Arc::clone(&self.shared) as _
    }

    pub(crate) fn stand_by(&self, holder: &str, epoch: u64) {
        let next = Leadership::Standby { leader: Some((holder.to_owned(), epoch)) };
        let news =
            !matches!(&*self.leadership.borrow(), Leadership::Standby { leader: Some((_, known)) } if *known == epoch);
        self.leadership.send_replace(next);
        if news {
            tracing::info!("standing by: {holder} leads {} (epoch {epoch})", self.config.store.display());
        }
    }

    /// Reads what the leader has changed of what coordinators share.
    pub(crate) async fn follow(&self) {
        let tokens = Arc::clone(&self.tokens);
        match tokio::task::spawn_blocking(move || tokens.follow_leader()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!("{error}: trying again"),
            Err(error) => tracing::error!("a thread that reads what the leader has changed crashed: {error}"),
        }
    }

    /// Tokens are also checked by those who stand by.
    fn took_over(&self, taken: Option<TakenOver>) -> Result<(), StateError> {
        let Some(TakenOver { epoch, records }) = taken else { return Ok(()) };
        tracing::debug!("{records} records of the leader with epoch {epoch} are known now");
        self.tokens.reload()
    }

    /// From having the lease to leading: knows what the last leader knew, and goes on with it.
    pub(crate) async fn become_leader(
        &self,
        publisher: Publisher,
        stop: &CancellationToken,
    ) -> Result<LeaderTasks, ServeError> {
        let publisher = Arc::new(publisher);
        // From now on: what follows takes as long as there is to take over.
        let heartbeat = Heartbeat::start(Arc::clone(&publisher))?;
        let leader = Arc::clone(&publisher);
        let taken = blocking_journal(&self.shared, move |shared| shared.lead(&leader)).await?;
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

    /// Takes up the jobs that the database holds, and tells the API.
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
        let state_db = self.state_db();
        let puller = Puller::new(Arc::clone(&publisher), state_db, Arc::clone(&self.limits));
        let puller = Arc::new(puller.keeping(Arc::clone(&self.originals)));
        puller.forget_unneeded();
        let scheduler = self.scheduler(&queue, &publisher)?;
        let (profiles, inbox) = Profiles::new(self.state_db(), Arc::clone(&publisher));
        let (lease, now) = (self.config.host_lease, clock::steady());
        let hosts = Hosts::open(self.state_db(), Arc::clone(&self.events), lease, now)?;
        let hosts = Arc::new(hosts);
        let state_db = self.state_db();
        let (holds, events) = (Arc::clone(&hosts) as _, Arc::clone(&self.events));
        let garbage = Arc::new(Garbage::open(Arc::clone(&publisher), state_db, holds, events)?);
        let fsck = Fsck::new(
            Arc::clone(&publisher),
            self.state_db(),
            Arc::clone(&queue),
            Arc::clone(&self.registry) as _,
            Arc::clone(&profiles),
            Arc::clone(&self.events),
            stop.clone(),
        )?;
        let settings = Arc::new(SettingsBook::open(SettingsParts {
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
            demand: Demand::default(),
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

    /// The schedules, not yet running.
    fn scheduler(&self, queue: &Arc<JobQueue>, publisher: &Arc<Publisher>) -> Result<Arc<Scheduler>, StateError> {
        let parts = Parts {
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

    /// Waits for the lease if need be, then runs jobs until stopped or replaced.
    pub(crate) async fn reign(&self, seat: Candidacy0, stop: &CancellationToken) -> Result<(), ServeError> {
        let mut reign = match seat {
            Candidacy0::Leading(reign) => reign,
            Candidacy0::Standby(candidate) => match self.wait(candidate, stop).await? {
                Some(publisher) => self.become_leader(publisher, stop).await?,
                None => return Ok(()),
            },
        };
        let dispatching = tokio::spawn(reign.runner.run(self.config.parallel_jobs, stop.clone()));
        let scheduling = tokio::spawn(reign.scheduler.run(stop.clone()));
        let learning = tokio::spawn(reign.profiles.run(reign.inbox, stop.clone()));
        let collecting = tokio::spawn(reign.garbage.run(stop.clone()));
        let settling = tokio::spawn(reign.settings.run(stop.clone()));
        let expiring = tokio::spawn(expire_leases(Arc::clone(&reign.hosts), Arc::clone(&self.tokens), stop.clone()));
        let tended = (Arc::clone(&self.shared), Arc::clone(&reign.publisher), Arc::clone(&self.events));
        let sharing = tokio::spawn(tend(tended, stop.clone()));
        let result = tokio::select! {
            () = stop.cancelled() => Ok(()),
            why = reign.heartbeat.lost() => Err(why),
        };
        stop.cancel();
        let _ = tokio::join!(dispatching, scheduling, learning, collecting, settling, expiring, sharing);
        drop(reign.heartbeat);
        if result.is_ok() {
            let publisher = Arc::clone(&reign.publisher);
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

/// Removes archives that no job needs: uploads that broke off when the last coordinator died.
fn sweep(spools: &Path, needed: &[PathBuf]) {
    for entry in std::fs::read_dir(spools).into_iter().flatten().flatten() {
        if !needed.contains(&entry.path()) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// The same for what coordinators share.
pub(crate) async fn blocking_journal<T: Send + 'static>(
    shared: &Arc<ReplicatedState>,
    work: impl FnOnce(&ReplicatedState) -> Result<T, StateError> + Send + 'static,
) -> Result<T, StateError> {
    let shared = Arc::clone(shared);
    let crashed = |_| StateError::Ledger { why: "a thread crashed: see the log".to_owned() };
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
