//! The job queue: all jobs, unfinished and ended, what they show and who may move them.
//!
//! Each step of a job's life goes through here. It is checked by the table in [`crate::state::job`], written to the database where it must
//! survive, and announced to those who wait. Only its runner moves a running job; a request to cancel it only raises its stop signal.
//!
//! `entry`: one job, and what it shows. `crash_count`: what the database knows of jobs under way. `waiting`: jobs whose registry asks to wait.
//!
//! `jobs` guards the table; it is never held during I/O or across an await. A job's first and last states are written to the database, and
//! the fact that it is under way, before anything is done for it. The states between are not, because a restart begins again at `queued`
//! anyway.
//!
//! Jobs that were under way when a coordinator died run one at a time. If one of several is the cause, that shows which.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use coordinator_api::job::{Job, JobState};
use coordinator_api::status::JobCounts;
use parking_lot::Mutex;
use store::Digest;
use store::crash::{CrashPoint, crash_point};
use store::image::{ImageRef, Platform, RequestedBy};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::jobs::pull::progress::LayerCell;
use crate::jobs::queue_order;
use crate::registries::limits::priority::LivePriority;
use crate::registries::limits::{Limits, OnHold};
use crate::state::clock::{Clock, SystemClock};
use crate::state::job::{BadTransition, DEATHS_MAX, JobId, Phase, PullJob, Report, Source};
use crate::state::state_db::{StateDb, StateError};

mod crash_count;
mod entry;
mod waiting;

pub use entry::NewJob;
use entry::{MayStart, Progress, QueueEntry};
pub use waiting::Postponed;

/// Ended jobs beyond this number are forgotten, oldest first.
const KEEP_ENDED: usize = 1000;

/// The most unfinished jobs that are accepted. A caller who orders more has made a mistake, or somebody else has with their tags.
const MOST_UNFINISHED: usize = 10_000;

/// How long to wait before checking again whether queued jobs may start.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// A request that the queue refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// There is no such job.
    #[error("there is no job {0}: cachefsctl jobs lists them")]
    Unknown(JobId),
    /// The job's state does not allow it.
    #[error(transparent)]
    Transition(#[from] BadTransition),
    /// The archive that the job came from is gone.
    #[error("job {0} came from an archive that is not kept: run cachefsctl load again")]
    ArchiveGone(JobId),
    /// There are too many jobs.
    #[error(
        "{unfinished} pull jobs are unfinished and {more} more are not taken: wait, or cancel some (cachefsctl jobs lists them)"
    )]
    Full {
        /// How many jobs are unfinished.
        unfinished: usize,
        /// How many more would come.
        more: usize,
    },
    /// The database failed.
    #[error(transparent)]
    StateDb(#[from] StateError),
}

/// All jobs.
pub struct JobQueue {
    state_db: Arc<dyn StateDb>,
    clock: Arc<dyn Clock>,
    /// Says which registries may not be asked at present; their jobs wait.
    limits: Arc<Limits>,
    jobs: Mutex<BTreeMap<JobId, QueueEntry>>,
    /// The last number given out.
    last: AtomicU64,
    /// Jobs that failed because coordinators died while they were under way, not yet reported.
    given_up: Mutex<Vec<PullJob>>,
    /// Notified when a job becomes queued.
    queued: Notify,
    /// Counts ended jobs, for those who wait for an image.
    ended: watch::Sender<u64>,
}

/// A job that is to run now.
pub struct Started {
    /// The job.
    pub job: PullJob,
    /// Cancelled when somebody cancels the job.
    pub stop: CancellationToken,
    /// The job's priority, raised when somebody waits for it.
    pub priority: LivePriority,
}

/// What a job does. Unfinished jobs that do the same are one.
type Purpose = (ImageRef, Option<Platform>, Source);

/// The unfinished jobs, by what they do.
fn under_way(jobs: &BTreeMap<JobId, QueueEntry>) -> HashMap<Purpose, JobId> {
    let unfinished = jobs.values().map(|entry| &entry.job).filter(|job| !job.state().is_final());
    unfinished.map(|job| ((job.image.clone(), job.platform.clone(), job.source.clone()), job.id)).collect()
}

/// The deaths that a new job begins with. If the last job that did the same was given up, a standing order is suspect from the start, and
/// is given up after one more death. A person's order begins at zero.
fn inherited_deaths(jobs: &BTreeMap<JobId, QueueEntry>, new: &NewJob) -> u32 {
    let same = |job: &PullJob| (&job.image, &job.platform, &job.source) == (&new.image, &new.platform, &new.source);
    let last = jobs.values().rev().map(|entry| &entry.job).find(|job| same(job));
    match last {
        Some(last) if new.origin.is_some() && last.deaths >= DEATHS_MAX => DEATHS_MAX - 1,
        _ => 0,
    }
}

impl JobQueue {
    /// Reads the jobs from the database. Jobs that were under way are queued again, and ended jobs beyond [`KEEP_ENDED`] are forgotten.
    pub fn open(state_db: Arc<dyn StateDb>) -> Result<JobQueue, StateError> {
        JobQueue::open_with(state_db, Arc::new(SystemClock), Arc::default())
    }

    /// Like [`JobQueue::open`], with a clock, and with the limits that decide which jobs may start.
    pub fn open_with(
        state_db: Arc<dyn StateDb>,
        clock: Arc<dyn Clock>,
        limits: Arc<Limits>,
    ) -> Result<JobQueue, StateError> {
        let (mut jobs, mut given_up) = (BTreeMap::new(), Vec::new());
        for mut job in state_db.jobs()? {
            if job.resume(clock.now()) {
                // Written before the job can be started again, so that no death is counted twice and none is forgotten.
                if let Err(error) = state_db.put_job(&job) {
                    tracing::error!(
                        "that a coordinator ended with job {} under way is not written down: {error}",
                        job.id
                    );
                }
                if job.state().is_final() {
                    given_up.push(job.clone());
                }
            }
            jobs.insert(job.id, QueueEntry::new(job));
        }
        let last = AtomicU64::new(jobs.last_key_value().map_or(0, |(id, _): (&JobId, _)| id.0));
        let (queued, ended) = (Notify::new(), watch::Sender::new(0));
        let (jobs, given_up) = (Mutex::new(jobs), Mutex::new(given_up));
        let queue = JobQueue { state_db, clock, limits, jobs, last, given_up, queued, ended };
        queue.forget_old()?;
        queue.queued.notify_one();
        Ok(queue)
    }

    /// The archives that unfinished jobs still need.
    pub fn spools(&self) -> Vec<std::path::PathBuf> {
        let jobs = self.jobs.lock();
        let unfinished = jobs.values().filter(|entry| !entry.job.state().is_final());
        let spool = |entry: &QueueEntry| match &entry.job.source {
            Source::Archive { spool, .. } => Some(spool.clone()),
            Source::Registry | Source::Restore => None,
        };
        unfinished.filter_map(spool).collect()
    }

    /// Adds jobs, all at once (jobs of one archive must not outlive it one by one). If an unfinished job already does the same, it is
    /// returned instead, with its priority raised. Blocks on the database.
    pub fn submit(&self, new: Vec<NewJob>) -> Result<Vec<Job>, QueueError> {
        let (answer, fresh) = self.announce(new)?;
        let written = if fresh.is_empty() { Ok(()) } else { self.state_db.put_jobs(&fresh) };
        crash_point(CrashPoint::JobWritten);
        let mut jobs = self.jobs.lock();
        for job in &fresh {
            match (&written, jobs.get_mut(&job.id)) {
                (Ok(()), Some(entry)) => entry.may_start = MayStart::Yes,
                _ => drop(jobs.remove(&job.id)),
            }
        }
        drop(jobs);
        written?;
        self.queued.notify_one();
        Ok(answer)
    }

    /// Puts new jobs into the queue, where others find them, but does not let them start yet: a job's end must not be written before its
    /// beginning.
    fn announce(&self, new: Vec<NewJob>) -> Result<(Vec<Job>, Vec<PullJob>), QueueError> {
        let mut jobs = self.jobs.lock();
        let mut known = under_way(&jobs);
        let added = new.iter().map(|new| (new.image.clone(), new.platform.clone(), new.source.clone()));
        let added: HashSet<Purpose> = added.filter(|purpose| !known.contains_key(purpose)).collect();
        if !added.is_empty() && known.len() + added.len() > MOST_UNFINISHED {
            return Err(QueueError::Full { unfinished: known.len(), more: added.len() });
        }
        let (mut answer, mut fresh) = (Vec::new(), Vec::new());
        for new in new {
            let purpose = (new.image.clone(), new.platform.clone(), new.source.clone());
            if let Some(twin) = known.get(&purpose).and_then(|id| jobs.get_mut(id)) {
                twin.raise(new.priority);
                if new.ordered_by == RequestedBy::Operator {
                    // Not written to the database, like the priority: after a restart the next order says so again.
                    twin.job.ordered_by = RequestedBy::Operator;
                }
                answer.push(twin.view());
                continue;
            }
            let deaths = inherited_deaths(&jobs, &new);
            let job = new.into_job(JobId(self.last.fetch_add(1, Ordering::Relaxed) + 1), self.clock.now());
            let job = PullJob { deaths, ..job };
            let entry = QueueEntry { may_start: MayStart::OnceWritten, ..QueueEntry::new(job.clone()) };
            answer.push(entry.view());
            jobs.insert(job.id, entry);
            known.insert(purpose, job.id);
            fresh.push(job);
        }
        Ok((answer, fresh))
    }

    /// What a job shows. For an unfinished one, also what is wrong with its registry.
    fn view(&self, entry: &QueueEntry) -> Job {
        let mut job = entry.view();
        if !job.state.is_final() && entry.job.source == Source::Registry {
            job.reason = self.limits.trouble(&entry.job.image);
        }
        job
    }

    /// All jobs, newest first.
    pub fn list(&self) -> Vec<Job> {
        self.with_jobs(None, &|_| true, |jobs| jobs.collect())
    }

    /// Gives `take` the jobs that `is_seen` lets pass, newest first and older than `before`, and returns its result. What a job shows is
    /// put together only when `take` asks for it: there may be very many jobs.
    pub fn with_jobs<T>(
        &self,
        before: Option<JobId>,
        is_seen: &dyn Fn(&PullJob) -> bool,
        take: impl FnOnce(&mut dyn Iterator<Item = Job>) -> T,
    ) -> T {
        let jobs = self.jobs.lock();
        let older = jobs.range(..before.unwrap_or(JobId(u64::MAX))).rev().map(|(_, entry)| entry);
        let mut seen = older.filter(|entry| is_seen(&entry.job)).map(|entry| self.view(entry));
        take(&mut seen)
    }

    /// One job.
    pub fn get(&self, id: JobId) -> Result<Job, QueueError> {
        self.jobs.lock().get(&id).map(|entry| self.view(entry)).ok_or(QueueError::Unknown(id))
    }

    /// How many jobs are in which state.
    pub fn counts(&self) -> JobCounts {
        let mut counts = JobCounts::default();
        for entry in self.jobs.lock().values() {
            *match entry.job.state() {
                JobState::Queued => &mut counts.queued,
                JobState::Resolving | JobState::Fetching | JobState::Publishing => &mut counts.running,
                JobState::Published => &mut counts.published,
                JobState::Failed => &mut counts.failed,
                JobState::Cancelled => &mut counts.cancelled,
            } += 1;
        }
        counts
    }

    /// The newest job for an image, in whatever state.
    pub fn last_for(&self, image: &ImageRef) -> Option<Job> {
        self.jobs.lock().values().rev().find(|entry| entry.job.image == *image).map(|entry| self.view(entry))
    }

    /// Raises the unfinished jobs for an image to at least this priority: somebody waits. Not written to the database: whoever waits asks
    /// again.
    pub fn raise(&self, image: &ImageRef, priority: i32) -> Option<Job> {
        let mut jobs = self.jobs.lock();
        let unfinished = jobs.values_mut().filter(|entry| !entry.job.state().is_final());
        let mut raised = None;
        for entry in unfinished.filter(|entry| entry.job.image == *image) {
            entry.raise(priority);
            raised = Some(entry.view());
        }
        raised
    }

    /// Why `image` may not be asked for at present, if that is so.
    pub fn held(&self, image: &ImageRef) -> Option<OnHold> {
        self.limits.held_from(image)
    }

    /// How many queued jobs go before this queued one.
    pub fn before(&self, id: JobId) -> usize {
        let jobs = self.jobs.lock();
        let Some(own) = jobs.get(&id) else { return 0 };
        queue_order::before(jobs.values().map(|entry| &entry.job), &own.job, self.clock.now())
    }

    /// A receiver that is notified whenever a job ends.
    pub fn ended(&self) -> watch::Receiver<u64> {
        self.ended.subscribe()
    }

    /// Cancels a job: a queued one at once, a running one as soon as it notices. Blocks on the database.
    pub fn cancel(&self, id: JobId) -> Result<Job, QueueError> {
        let ended = {
            let mut jobs = self.jobs.lock();
            let entry = jobs.get_mut(&id).ok_or(QueueError::Unknown(id))?;
            match entry.job.state() {
                JobState::Queued => {
                    entry.job.enter(Phase::Cancelled, self.clock.now())?;
                    Some(entry.job.clone())
                }
                from if from.is_final() => return Err(BadTransition { id, from, to: JobState::Cancelled }.into()),
                _ => {
                    entry.stop.cancel();
                    None
                }
            }
        };
        if let Some(job) = ended {
            self.state_db.put_job(&job)?;
            self.after_end(&job);
        }
        self.get(id)
    }

    /// Queues an ended job again. Blocks on the database.
    pub fn retry(&self, id: JobId) -> Result<Job, QueueError> {
        let mut job = self.jobs.lock().get(&id).map(|entry| entry.job.clone()).ok_or(QueueError::Unknown(id))?;
        if matches!(&job.source, Source::Archive { spool, .. } if !spool.exists()) {
            return Err(QueueError::ArchiveGone(id));
        }
        job.enter(Phase::Queued, self.clock.now())?;
        (job.report, job.deaths, job.ordered_by) = (Report::default(), 0, RequestedBy::Operator);
        // Written before the job can be started, so that its end is written after it.
        self.state_db.put_job(&job)?;
        {
            let mut jobs = self.jobs.lock();
            let entry = jobs.get_mut(&id).ok_or(QueueError::Unknown(id))?;
            // If two callers retry at once, the second one finds the job queued.
            entry.job.clone().enter(Phase::Queued, job.updated_at)?;
            *entry = QueueEntry::new(job);
        }
        self.queued.notify_one();
        self.get(id)
    }

    /// Waits for a queued job and starts it.
    #[cfg(test)]
    pub(crate) async fn start_next(&self) -> Started {
        self.start_next_of(|_| true).await
    }

    /// Has the queue check again whether queued jobs may start: a slot has become free.
    pub fn look_again(&self) {
        self.queued.notify_one();
    }

    /// Waits for a queued job that there is a slot for, and starts it: from now on it is resolving.
    pub async fn start_next_of(&self, has_place: impl Fn(&PullJob) -> bool) -> Started {
        loop {
            let rung = self.queued.notified();
            if let Some(started) = self.try_start(&has_place) {
                return started;
            }
            if self.has_queued() {
                // They wait for their registry: check again later whether it may be asked.
                let _ = tokio::time::timeout(LOOK_AGAIN, rung).await;
            } else {
                rung.await;
            }
        }
    }

    fn has_queued(&self) -> bool {
        self.jobs.lock().values().any(|entry| entry.job.state() == JobState::Queued)
    }

    fn try_start(&self, has_place: &impl Fn(&PullJob) -> bool) -> Option<Started> {
        let mut jobs = self.jobs.lock();
        let ready = jobs.values().filter(|entry| entry.may_start == MayStart::Yes);
        let now = self.clock.now();
        let is_running = |job: &PullJob| !job.state().is_final() && job.state() != JobState::Queued;
        let suspect = jobs.values().any(|entry| entry.job.is_suspect() && is_running(&entry.job));
        let may = |job: &PullJob| !(suspect && job.is_suspect()) && has_place(job) && self.is_allowed(job);
        let id = queue_order::next(ready.map(|entry| &entry.job), now, may)?;
        let entry = jobs.get_mut(&id)?;
        entry.job.enter(Phase::Resolving, now).ok()?;
        Some(Started { job: entry.job.clone(), stop: entry.stop.clone(), priority: entry.priority.clone() })
    }

    /// Whether the job's registry may be asked.
    fn is_allowed(&self, job: &PullJob) -> bool {
        job.source != Source::Registry || self.limits.held_from(&job.image).is_none()
    }

    /// Reported by the runner: the name is resolved.
    pub fn fetching(&self, id: JobId, manifest: Digest, layers: Arc<[LayerCell]>) {
        self.step(id, Phase::Fetching, |entry| {
            entry.progress = Some(Progress { manifest, layers, began: Instant::now() });
        });
    }

    /// Whose order a running job counts as by now.
    pub fn ordered_by(&self, id: JobId) -> RequestedBy {
        self.jobs.lock().get(&id).map_or(RequestedBy::Operator, |entry| entry.job.ordered_by)
    }

    /// Reported by the runner: all layers are there.
    pub fn publishing(&self, id: JobId) {
        self.step(id, Phase::Publishing, |_| {});
    }

    /// Reported by the runner: the job has ended. Blocks on the database.
    pub fn end(&self, id: JobId, phase: Phase) {
        let ended = self.step(id, phase, |entry| {
            entry.job.report = entry.report();
            entry.progress = None;
        });
        let Some(job) = ended else { return };
        crash_point(CrashPoint::JobEnding);
        if let Err(error) = self.state_db.put_job(&job) {
            tracing::error!("the end of job {id} is not written down, it will run again after a restart: {error}");
        }
        self.after_end(&job);
    }

    fn step(&self, id: JobId, phase: Phase, then: impl FnOnce(&mut QueueEntry)) -> Option<PullJob> {
        let mut jobs = self.jobs.lock();
        let entry = jobs.get_mut(&id)?;
        match entry.job.enter(phase, self.clock.now()) {
            Ok(()) => {
                then(entry);
                Some(entry.job.clone())
            }
            Err(error) => {
                tracing::error!("{error}");
                None
            }
        }
    }

    /// Removes an archive that no job needs any more, and notifies those who wait.
    fn after_end(&self, job: &PullJob) {
        if let Source::Archive { spool, .. } = &job.source
            && !self.spools().contains(spool)
        {
            crash_point(CrashPoint::ArchiveDone);
            let _ = std::fs::remove_file(spool);
        }
        if let Err(error) = self.forget_old() {
            tracing::warn!("old jobs are not forgotten: {error}");
        }
        self.ended.send_modify(|count| *count += 1);
    }

    fn forget_old(&self) -> Result<(), StateError> {
        let old: Vec<JobId> = {
            let mut jobs = self.jobs.lock();
            let ended = jobs.values().filter(|entry| entry.job.state().is_final()).map(|entry| entry.job.id);
            let ended: Vec<JobId> = ended.collect();
            let old = ended[..ended.len().saturating_sub(KEEP_ENDED)].to_vec();
            old.iter().for_each(|id| drop(jobs.remove(id)));
            old
        };
        if old.is_empty() { Ok(()) } else { self.state_db.remove_jobs(&old) }
    }
}

#[cfg(test)]
mod tests;
