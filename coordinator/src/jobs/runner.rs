//! The loop that starts jobs: as many at a time as configured, each a task of its own.
//!
//! A job whose registry asks to wait for longer than [`SHORT_WAIT`] gives up its slot and is queued again, once nothing more arrives for
//! it.
//!
//! On shutdown, running jobs are dropped where they are and queued again in the database: the next start resumes them.

use std::sync::Arc;
use std::time::Duration;

use coordinator_api::event::Severity;
use coordinator_api::printable::printable;
use jiff::Timestamp;
use store::Digest;
use store::crash::{CrashPoint, crash_point};
use store::image::RequestedBy;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::jobs::pull::error::PullError;
use crate::jobs::pull::progress::LayerCell;
use crate::jobs::pull::{Goal, Observer, PullTask, Puller};
use crate::jobs::queue::{JobQueue, Postponed, Started};
use crate::profiles::Profiles;
use crate::registries::archive::Archive;
use crate::registries::limits::jobs::JobSlots;
use crate::registries::{Registry, RegistryError};
use crate::state::events::{Events, NewEvent};
use crate::state::job::{JobId, Phase, PullJob, Source};

/// Why a job fails if its archive is on another coordinator's disk.
const GONE: &str = "it lay on the disk of the coordinator that took it; run cachefsctl load again";

/// Runs jobs. Cloned for each running job.
#[derive(Clone)]
pub struct JobRunner {
    /// The jobs.
    pub queue: Arc<JobQueue>,
    /// Pulls the images.
    pub puller: Arc<Puller>,
    /// Told of images that were published.
    pub profiles: Arc<Profiles>,
    /// Where images without an archive come from.
    pub registry: Arc<dyn Registry>,
    /// The shared store's directory, for messages.
    pub store: Arc<str>,
    /// Where the ends of jobs are recorded.
    pub events: Arc<Events>,
}

/// If a registry asks for a wait no longer than this, the job waits in its slot.
const SHORT_WAIT: Duration = Duration::from_secs(5);
/// How often to check whether anything arrives for a job that is kept waiting.
const LOOK: Duration = Duration::from_secs(1);
/// After this many checks without anything, the job gives up its slot.
const IDLE_LOOKS: u32 = 4;

/// Reasons are cut after this many bytes: names in them may be a stranger's, and reasons are kept and listed for long.
const REASON_MAX: usize = 1500;

/// Reports a running job's steps to the queue.
struct Reporter<'a> {
    queue: &'a JobQueue,
    id: JobId,
}

impl Observer for Reporter<'_> {
    fn fetching(&self, manifest: Digest, layers: Arc<[LayerCell]>) {
        self.queue.fetching(self.id, manifest, layers);
    }

    fn publishing(&self) -> RequestedBy {
        self.queue.publishing(self.id);
        self.queue.ordered_by(self.id)
    }
}

/// Whose slots a job takes: its registry's, or those shared by all archives.
fn origin(job: &PullJob) -> &str {
    match job.source {
        Source::Registry | Source::Restore => job.image.registry(),
        Source::Archive { .. } => "",
    }
}

/// The event for a job that has ended.
fn end(job: &PullJob, phase: &Phase) -> NewEvent {
    let (id, image) = (job.id, &job.image);
    match phase {
        Phase::Failed { reason } => {
            NewEvent::new(Severity::Error, "job.failed", image, format!("job {id} ({image}) failed: {reason}"))
        }
        Phase::Cancelled => {
            NewEvent::new(Severity::Info, "job.cancelled", image, format!("job {id} ({image}) was cancelled"))
        }
        _ => NewEvent::new(Severity::Info, "job.published", image, format!("image {image} is published (job {id})")),
    }
}

impl JobRunner {
    /// Runs jobs, `parallel` at a time (and one more for a registry that has none under way), until `stop` is cancelled.
    pub async fn run(self, parallel: usize, stop: CancellationToken) {
        let slots = Arc::new(JobSlots::new(parallel));
        let mut running = JoinSet::new();
        loop {
            let started = tokio::select! {
                () = stop.cancelled() => break,
                started = self.queue.start_next_of(|job| slots.admits(origin(job))) => started,
            };
            let slot = slots.take(origin(&started.job));
            let runner = self.clone();
            running.spawn(async move {
                runner.job(started).await;
                drop(slot);
                runner.queue.look_again();
            });
            while running.try_join_next().is_some() {}
        }
        running.shutdown().await;
        let queue = Arc::clone(&self.queue);
        let _ = tokio::task::spawn_blocking(move || queue.suspend()).await;
    }

    /// Runs one job from start to end.
    async fn job(&self, started: Started) {
        let id = started.job.id;
        tracing::info!(job = id.0, attempt = started.job.attempts, "pulling {}", started.job.image);
        let queue = Arc::clone(&self.queue);
        let Ok(begun) = tokio::task::spawn_blocking(move || queue.begin(id)).await else { return };
        let pulled = match begun {
            Ok(()) => tokio::select! {
                biased;
                pulled = self.pull(&started) => pulled,
                until = self.kept_waiting(&started.job) => match self.postpone(&started.job, until).await {
                    None => return,
                    Some(error) => Err(error),
                },
            },
            Err(error) => Err(PullError::StateDb(error.to_string())),
        };
        let phase = match pulled {
            Ok(()) => Phase::Published,
            Err(PullError::Cancelled) => Phase::Cancelled,
            Err(error) => Phase::Failed { reason: self.reason(id, &error) },
        };
        let event = end(&started.job, &phase);
        let (queue, events) = (Arc::clone(&self.queue), Arc::clone(&self.events));
        let ending = move || {
            queue.end(id, phase);
            events.record(event);
        };
        // An error means that the runtime is ending: the job stays unfinished and will be resumed.
        let _ = tokio::task::spawn_blocking(ending).await;
    }

    /// Completes when a job can only wait, because its registry asks for it. Returns until when.
    async fn kept_waiting(&self, job: &PullJob) -> Timestamp {
        let (mut before, mut idle) = (None, 0);
        loop {
            tokio::time::sleep(LOOK).await;
            let arrived = self.queue.arrived(job.id);
            let asked = self.queue.kept_waiting(job, SHORT_WAIT).filter(|_| arrived.is_some() && arrived == before);
            (before, idle) = (arrived, if asked.is_some() { idle + 1 } else { 0 });
            if let Some(asked) = asked.filter(|_| idle >= IDLE_LOOKS) {
                return asked;
            }
        }
    }

    /// Queues a job again that is kept waiting; an error if that has happened too often.
    async fn postpone(&self, job: &PullJob, until: Timestamp) -> Option<PullError> {
        let (id, registry) = (job.id, job.image.registry().to_owned());
        tracing::info!(job = id.0, "{} waits: registry {registry} asks for it until {until}", job.image);
        let queue = Arc::clone(&self.queue);
        match tokio::task::spawn_blocking(move || queue.postpone(id)).await {
            Ok(Postponed::Queued) => None,
            // An error means that the runtime is ending: the job stays unfinished and will be resumed.
            Err(_) => None,
            Ok(Postponed::TooOften) => {
                let why = "it has asked us to wait again and again, and given nothing in between".to_owned();
                Some(RegistryError::Postponed { registry, until, why }.into())
            }
        }
    }

    async fn pull(&self, started: &Started) -> Result<(), PullError> {
        let job = &started.job;
        let registry = self.registry_of(job).await?;
        let goal = if job.source == Source::Restore { Goal::Content } else { Goal::Image };
        let order = PullTask {
            registry,
            image: &job.image,
            platform: job.platform.as_ref(),
            goal,
            priority: &started.priority,
            stop: &started.stop,
        };
        let reporter = Reporter { queue: &self.queue, id: job.id };
        let image = self.puller.pull(order, &reporter).await?;
        self.profiles.published(&image);
        Ok(())
    }

    /// The configured registry, or the job's archive.
    async fn registry_of(&self, job: &PullJob) -> Result<Arc<dyn Registry>, RegistryError> {
        let Source::Archive { spool, name } = job.source.clone() else { return Ok(Arc::clone(&self.registry)) };
        let open = tokio::task::spawn_blocking(move || match spool.try_exists() {
            Ok(false) => Err(RegistryError::Archive { why: GONE.to_owned() }),
            _ => Archive::open(&spool, name.as_ref()),
        });
        let interrupted = |_| RegistryError::Archive { why: "reading it was interrupted".to_owned() };
        let archive = open.await.map_err(interrupted)??;
        crash_point(CrashPoint::ArchiveOpened);
        Ok(Arc::new(archive))
    }

    /// A failure in one sentence, with what to do about it.
    fn reason(&self, id: JobId, error: &PullError) -> String {
        if error.is_full() {
            return format!("shared store {} is full: free space and run cachefsctl retry {id}", self.store);
        }
        // Names of a layer's entries and a registry's answers are written by strangers, at any length.
        cut(printable(&error.to_string()).into_owned())
    }
}

/// The text, cut after about [`REASON_MAX`] bytes.
fn cut(mut text: String) -> String {
    if text.len() > REASON_MAX {
        text.truncate(text.floor_char_boundary(REASON_MAX));
        text.push_str("...");
    }
    text
}

/// The event for a job that was given up when the coordinator started.
pub fn given_up(job: &PullJob) -> NewEvent {
    end(job, &job.phase)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_cut_between_characters() {
        assert_eq!(cut("short".to_owned()), "short");
        let long = cut("é".repeat(1 << 20));
        assert!(long.len() <= REASON_MAX + 3 && long.ends_with("é..."), "{}", long.len());
    }
}
