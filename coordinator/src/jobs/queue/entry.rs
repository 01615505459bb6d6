//! One job in the queue: what it is made from, and what it shows.

use std::sync::Arc;
use std::time::Instant;

use coordinator_api::job::{Job, JobSource, JobState};
use jiff::Timestamp;
use store::Digest;
use store::image::{ImageRef, Platform, RequestedBy};
use tokio_util::sync::CancellationToken;

use crate::jobs::pull::progress::LayerCell;
use crate::registries::limits::priority::LivePriority;
use crate::state::job::{JobId, Phase, PullJob, Report, Source};

/// What a new job is to do.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// The image.
    pub image: ImageRef,
    /// The platform.
    pub platform: Option<Platform>,
    /// The priority.
    pub priority: i32,
    /// Who asks for it, if not a person.
    pub origin: Option<String>,
    /// Whether the image counts as ordered by an operator or by a host.
    pub ordered_by: RequestedBy,
    /// Where the image comes from.
    pub source: Source,
}

impl NewJob {
    pub(super) fn into_job(self, id: JobId, now: Timestamp) -> PullJob {
        PullJob {
            id,
            image: self.image,
            platform: self.platform,
            priority: self.priority,
            origin: self.origin,
            ordered_by: self.ordered_by,
            source: self.source,
            attempts: 0,
            deaths: 0,
            created_at: now,
            updated_at: now,
            phase: Phase::Queued,
            report: Report::default(),
        }
    }
}

/// The progress of a running job.
pub(super) struct Progress {
    pub(super) manifest: Digest,
    pub(super) layers: Arc<[LayerCell]>,
    pub(super) began: Instant,
}

/// Whether a queued job may be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MayStart {
    Yes,
    OnceWritten,
}

pub(super) struct QueueEntry {
    pub(super) job: PullJob,
    pub(super) may_start: MayStart,
    pub(super) progress: Option<Progress>,
    pub(super) stop: CancellationToken,
    /// The job's priority, for its layers.
    pub(super) priority: LivePriority,
    /// How often in a row the job had to wait for its registry without completing a layer in between.
    pub(super) postponed: u32,
}

impl QueueEntry {
    pub(super) fn new(job: PullJob) -> QueueEntry {
        let priority = LivePriority::new(job.priority);
        QueueEntry {
            job,
            may_start: MayStart::Yes,
            progress: None,
            stop: CancellationToken::new(),
            priority,
            postponed: 0,
        }
    }

    /// Raises the job, and what is under way for it, to at least this priority.
    pub(super) fn raise(&mut self, priority: i32) {
        self.job.priority = self.job.priority.max(priority);
        self.priority.raise(priority);
    }

    pub(super) fn report(&self) -> Report {
        let Some(progress) = &self.progress else { return self.job.report.clone() };
        let meters: Vec<_> = progress.layers.iter().map(LayerCell::meter).collect();
        let bytes_fetched = progress.layers.iter().map(LayerCell::fetched).sum();
        // What another job fetches also brings this one forward.
        let arrived: u64 = meters.iter().map(|meter| meter.fetched()).sum();
        let seconds = progress.began.elapsed().as_secs_f64().max(0.001);
        Report {
            manifest: Some(progress.manifest),
            layers: meters.iter().map(|meter| meter.view()).collect(),
            bytes_fetched,
            bytes_per_second: (arrived as f64 / seconds) as u64,
        }
    }

    pub(super) fn view(&self) -> Job {
        let (job, report) = (&self.job, self.report());
        let total: u64 = report.layers.iter().map(|layer| layer.bytes_total).sum();
        let done: u64 = report.layers.iter().map(|layer| layer.bytes_done).sum();
        let eta = (job.state() == JobState::Fetching && report.bytes_per_second > 0)
            .then(|| (total - done.min(total)).div_ceil(report.bytes_per_second));
        Job {
            id: job.id.0,
            image: job.image.to_string(),
            platform: job.platform.as_ref().map(ToString::to_string),
            priority: job.priority,
            origin: job.origin.clone(),
            source: match job.source {
                Source::Registry | Source::Restore => JobSource::Registry,
                Source::Archive { .. } => JobSource::Archive,
            },
            state: job.state(),
            reason: match &job.phase {
                Phase::Failed { reason } => Some(reason.clone()),
                _ => None,
            },
            attempts: job.attempts,
            created_at: job.created_at,
            updated_at: job.updated_at,
            manifest: report.manifest.map(|digest| digest.to_string()),
            bytes_done: done,
            bytes_total: total,
            bytes_fetched: report.bytes_fetched,
            unpacked_bytes: report.layers.iter().map(|layer| layer.unpacked_bytes).sum(),
            bytes_per_second: report.bytes_per_second,
            eta_seconds: eta,
            layers: report.layers,
        }
    }
}
