//! Deadlines: what is missing for them, when to start, and whether they will be met.
//!
//! Sizes come from the manifests, which are fetched once and then only checked (a conditional request) every [`REFRESH`]. The plan itself
//! ([`crate::plan::deadlines`]) is made anew whenever the scheduler looks, so that it follows every change of speed, limits, breakers and
//! layers. If the registry tells nothing about a deadline's images, the run starts [`UNKNOWN_SIZE_LEAD_TIME`] before the deadline.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use coordinator_api::event::Severity;
use coordinator_api::schedule::{Plan, PlanEntry, PlanState, RunState};
use jiff::{SignedDuration, Timestamp};
use store::Digest;
use store::image::ImageRef;

use crate::plan::deadlines::{Stretch, Task, plan};
use crate::plan::scheduler::forecast::{Forecasted, Prediction, Sized};
use crate::plan::scheduler::record::ScheduleEntry;
use crate::plan::scheduler::state::Scheduler;
use crate::plan::spec::{Schedule, Trigger};
use crate::registries::{RegistryError, TagLook};
use crate::state::clock::until;

/// How often the tags of deadlines are checked.
const REFRESH: Duration = Duration::from_secs(3600);
/// How soon after a failure they are checked again.
const REFRESH_FAILED: Duration = Duration::from_secs(5 * 60);
/// How long before a deadline of unknown size to start.
const UNKNOWN_SIZE_LEAD_TIME: SignedDuration = SignedDuration::from_hours(1);
/// Bytes that the store needs for each compressed byte: packs are compressed, too; indexes and recipes come on top.
const STORED: f64 = 1.15;
/// Requests for one image before its layers: index, manifest, config.
const REQUESTS: u64 = 3;

/// A deadline before it is planned.
struct Draft {
    schedule: String,
    deadline: Timestamp,
    running: bool,
    images: Vec<ImageRef>,
    layers: Option<Vec<(Digest, u64)>>,
    /// Bytes that running jobs still have to fetch, once they know it.
    left: Option<u64>,
    unknown: Option<String>,
    said: bool,
}

impl Scheduler {
    /// All deadlines, and how they will be met.
    pub async fn plan(&self) -> Plan {
        self.replan().await;
        let entries = self.forecast.lock().deadlines.iter().map(|deadline| deadline.entry.clone()).collect();
        Plan { at: self.now(), entries }
    }

    /// Deadlines that will be missed as things stand.
    pub fn at_risk(&self) -> usize {
        let forecast = self.forecast.lock();
        forecast.deadlines.iter().filter(|deadline| deadline.entry.state == PlanState::AtRisk).count()
    }

    /// Schedules with deadlines whose sizes are to be requested now. Marks them as requested.
    pub(super) fn take_unsized(&self, now: Timestamp) -> Vec<String> {
        let mut book = self.book.lock();
        let mut names = Vec::new();
        for (name, entry) in book.iter_mut() {
            if entry.record.spec.paused || !matches!(entry.schedule.trigger, Trigger::ReadyBy(_)) {
                continue;
            }
            let refresh = if entry.unknown.is_some() { REFRESH_FAILED } else { REFRESH };
            if entry.sized_at.is_none_or(|at| until(at, now) >= refresh) {
                entry.sized_at = Some(now);
                names.push(name.clone());
            }
        }
        names
    }

    /// Finds out what a schedule's images consist of.
    pub(super) async fn measure(self: Arc<Self>, name: String) {
        let Some(schedule) = self.book.lock().get(&name).map(|entry| entry.schedule.clone()) else { return };
        let measured = self.measure_all(&schedule).await;
        if let Some(entry) = self.book.lock().get_mut(&name) {
            match measured {
                Ok(images) => (entry.meant, entry.unknown) = (images, None),
                Err(error) => entry.unknown = Some(error.to_string()),
            }
        }
        self.changed.notify_one();
    }

    async fn measure_all(&self, schedule: &Schedule) -> Result<Vec<ImageRef>, RegistryError> {
        let images = self.expand(schedule).await?;
        for image in &images {
            let key = (image.clone(), schedule.platform.clone());
            let known = self.sizes.lock().get(&key).map(|sized| sized.target);
            if known.is_some() && self.components.tag_lister.look(image, known).await? == TagLook::Same {
                continue;
            }
            let resolved = self.components.registry.resolve(image, schedule.platform.as_ref()).await?;
            let target = resolved.index.as_ref().unwrap_or(&resolved.manifest).digest;
            let layers = resolved.layers.iter().map(|layer| (layer.diff_id, layer.claimed)).collect();
            self.sizes.lock().insert(key, Sized { target, layers });
        }
        Ok(images)
    }

    /// Makes the plan anew, and reports deadlines that have come at risk.
    pub(super) async fn replan(&self) {
        let now = self.now();
        let drafts = self.drafts();
        if drafts.is_empty() {
            self.forecast.lock().deadlines.clear();
            return;
        }
        let all: HashSet<Digest> =
            drafts.iter().flat_map(|draft| draft.layers.iter().flatten()).map(|layer| layer.0).collect();
        let (publisher, store_path) = (Arc::clone(&self.components.publisher), self.components.store_path.clone());
        let looked = tokio::task::spawn_blocking(move || {
            let missing = |digest: &Digest| !publisher.store().has_layer(digest).unwrap_or(false);
            (all.into_iter().filter(missing).collect::<HashSet<_>>(), free_space(&store_path))
        });
        let Ok((missing, free)) = looked.await else { return };
        let deadlines = self.forecast_all(&drafts, missing, free, now);
        let fresh: Vec<PlanEntry> = drafts
            .iter()
            .zip(&deadlines)
            .filter(|(draft, deadline)| !draft.said && deadline.entry.state == PlanState::AtRisk)
            .map(|(_, deadline)| deadline.entry.clone())
            .collect();
        let mut deadlines = deadlines;
        deadlines.sort_by_key(|deadline| (deadline.entry.deadline, deadline.entry.schedule.clone()));
        self.forecast.lock().deadlines = deadlines;
        for entry in fresh {
            self.warn(entry).await;
        }
    }

    async fn warn(&self, entry: PlanEntry) {
        let name = entry.schedule;
        self.amend(&name, |own| own.record.warned_for = Some(entry.deadline));
        let why = entry.why.unwrap_or_default();
        let message = format!("schedule {name} is about to miss its deadline {}: {why}", entry.deadline);
        self.say(Severity::Warning, "schedule.at_risk", &name, message);
    }

    /// Runs with deadlines that are under way, and the next deadline of each schedule.
    fn drafts(&self) -> Vec<Draft> {
        let book = self.book.lock();
        let mut drafts = Vec::new();
        for (name, entry) in book.iter().filter(|(_, entry)| matches!(entry.schedule.trigger, Trigger::ReadyBy(_))) {
            for run in entry.record.runs.iter().filter(|run| run.state == RunState::Running) {
                let Some(deadline) = run.deadline else { continue };
                let draft = self.draft(name, entry, deadline, run.images.clone());
                drafts.push(Draft { running: true, left: self.left(run), ..draft });
            }
            if let Some(deadline) = entry.next_slot() {
                drafts.push(self.draft(name, entry, deadline, entry.meant.clone()));
            }
        }
        drafts
    }

    fn draft(&self, name: &str, entry: &ScheduleEntry, deadline: Timestamp, images: Vec<ImageRef>) -> Draft {
        let sizes = self.sizes.lock();
        let layers = images.iter().map(|image| {
            let key = (image.clone(), entry.schedule.platform.clone());
            sizes.get(&key).map(|sized| sized.layers.clone())
        });
        let layers: Option<Vec<Vec<_>>> = layers.collect();
        Draft {
            schedule: name.to_owned(),
            deadline,
            running: false,
            layers: layers.filter(|layers| !layers.is_empty()).map(|layers| layers.concat()),
            images,
            left: None,
            unknown: entry.unknown.clone(),
            said: entry.record.warned_for == Some(deadline) || entry.record.missed_for == Some(deadline),
        }
    }

    /// Bytes that a run's jobs still have to fetch. `None` while one of them has not been resolved.
    fn left(&self, run: &crate::plan::scheduler::record::RunRecord) -> Option<u64> {
        let jobs = run.jobs.iter().filter_map(|job| self.components.queue.get(*job).ok());
        jobs.map(|job| (job.bytes_total > 0).then(|| job.bytes_total.saturating_sub(job.bytes_done))).sum()
    }

    /// Forecasts all deadlines. A layer that several of them lack is counted for the first.
    fn forecast_all(
        &self,
        drafts: &[Draft],
        mut missing: HashSet<Digest>,
        free: Option<u64>,
        now: Timestamp,
    ) -> Vec<Forecasted> {
        let mut order: Vec<usize> = (0..drafts.len()).collect();
        order.sort_by_key(|draft| (!drafts[*draft].running, drafts[*draft].deadline));
        let mut tasks: Vec<Option<Task>> = drafts.iter().map(|_| None).collect();
        for index in order {
            let draft = &drafts[index];
            let Some(layers) = &draft.layers else { continue };
            let own: Vec<u64> = layers.iter().filter(|layer| missing.remove(&layer.0)).map(|layer| layer.1).collect();
            tasks[index] = Some(self.task(draft, own.len(), draft.left.unwrap_or(own.iter().sum())));
        }
        let rules = self.components.limits.rules();
        let known: Vec<Task> = tasks.iter().flatten().cloned().collect();
        let mut stretches = plan(&known, &rules, now).into_iter();
        let needed = (known.iter().map(|task| task.bytes).sum::<u64>() as f64 * STORED) as u64;
        let space = free.filter(|free| *free < needed).map(|free| (needed, free));
        let each = drafts.iter().zip(tasks);
        each.map(|(draft, task)| match task.and_then(|task| Some((task, stretches.next()?))) {
            Some((task, stretch)) => known_deadline(draft, &task, stretch, task.speed_at(&rules, stretch.start), space),
            None => unknown_deadline(draft),
        })
        .collect()
    }

    fn task(&self, draft: &Draft, layers: usize, bytes: u64) -> Task {
        let registry = draft.images.first().map(|image| image.registry().to_owned()).unwrap_or_default();
        let limits = &self.components.limits;
        let spent = limits.rate_limit(&registry).filter(|left| left.remaining < REQUESTS * draft.images.len() as u64);
        let held = limits.held(&registry).map(|held| held.until);
        Task {
            deadline: draft.deadline,
            bytes,
            layers,
            speed: limits.speed(&registry),
            not_before: held.into_iter().chain(spent.map(|spent| spent.more_at)).max(),
            running: draft.running,
            registry,
        }
    }
}

fn known_deadline(draft: &Draft, task: &Task, stretch: Stretch, speed: f64, space: Option<(u64, u64)>) -> Forecasted {
    let slack = draft.deadline.duration_since(stretch.end).as_secs();
    let late = (stretch.end > draft.deadline).then(|| {
        let down = task.not_before.map(|at| format!("; registry {} is not asked before {at}", task.registry));
        format!(
            "{} bytes at {speed:.0} bytes a second end {} seconds after it{}",
            task.bytes,
            -slack,
            down.unwrap_or_default()
        )
    });
    let full = space.map(|(needed, free)| format!("the shared store needs {needed} bytes and has {free} free"));
    let why = late.or(full);
    let state = match (why.is_some(), draft.running) {
        (true, _) => PlanState::AtRisk,
        (false, true) => PlanState::Running,
        (false, false) => PlanState::Planned,
    };
    Forecasted {
        promise: Some(Prediction { end: stretch.end, bytes: task.bytes }),
        start: stretch.start,
        running: draft.running,
        entry: PlanEntry {
            schedule: draft.schedule.clone(),
            images: draft.images.iter().map(ToString::to_string).collect(),
            deadline: draft.deadline,
            start_at: Some(stretch.start),
            forecast_at: Some(stretch.end),
            slack_seconds: Some(slack),
            missing_bytes: Some(task.bytes),
            bytes_per_second: Some(speed as u64),
            state,
            why,
        },
    }
}

fn unknown_deadline(draft: &Draft) -> Forecasted {
    // While the registry is still being asked, nothing starts before its answer.
    let start = match draft.unknown {
        Some(_) => draft.deadline.checked_sub(UNKNOWN_SIZE_LEAD_TIME).unwrap_or(Timestamp::MIN),
        None => draft.deadline,
    };
    let why = draft.unknown.clone().unwrap_or_else(|| "the registry has not been asked yet".to_owned());
    Forecasted {
        promise: None,
        start,
        running: draft.running,
        entry: PlanEntry {
            schedule: draft.schedule.clone(),
            images: draft.images.iter().map(ToString::to_string).collect(),
            deadline: draft.deadline,
            start_at: Some(start),
            forecast_at: None,
            slack_seconds: None,
            missing_bytes: None,
            bytes_per_second: None,
            state: PlanState::Unknown,
            why: Some(why),
        },
    }
}

/// Bytes that may still be written to the shared store; `None` if its file system does not say.
pub fn free_space(store: &std::path::Path) -> Option<u64> {
    let status = nix::sys::statvfs::statvfs(store).ok()?;
    (status.blocks() > 0).then(|| status.blocks_available().saturating_mul(status.fragment_size()))
}
