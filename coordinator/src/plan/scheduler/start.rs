//! Makes jobs from a due slot, a push or a user's request.

use std::sync::Arc;

use coordinator_api::event::Severity;
use coordinator_api::schedule::{Run, RunState};
use jiff::Timestamp;
use store::image::{ImageRef, RequestedBy};

use crate::jobs::queue::NewJob;
use crate::plan::pattern::{Pattern, choose};
use crate::plan::scheduler::error::ScheduleError;
use crate::plan::scheduler::pauses::{jitter, pause};
use crate::plan::scheduler::record::{RunRecord, ScheduleEntry};
use crate::plan::scheduler::state::Scheduler;
use crate::plan::spec::{Schedule, Trigger};
use crate::plan::times::{Due, due};
use crate::registries::webhook::Push;
use crate::registries::{RegistryError, TagLook};
use crate::state::clock::after;
use crate::state::job::{JobId, Source};

/// The most images that one run of a schedule pulls: people who may push tags must not order any number of pulls.
const MOST_IMAGES: usize = 1000;

/// Which of a schedule's images a run pulls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    /// All.
    All,
    /// Those whose tag has moved.
    Moved,
}

/// A run that is to be made.
pub(super) struct DueRun {
    name: String,
    due: Due,
    deadline: Option<Timestamp>,
    which: Which,
}

/// The run of a schedule that is due now. `start_at` is when the plan starts the next deadline's run.
fn due_now(entry: &ScheduleEntry, start_at: Option<Timestamp>, now: Timestamp) -> Option<DueRun> {
    if entry.busy || entry.record.spec.paused || now < entry.not_before {
        return None;
    }
    let name = entry.record.spec.name.clone();
    let start = |due, deadline, which| Some(DueRun { name: name.clone(), due, deadline, which });
    match &entry.schedule.trigger {
        Trigger::OnPush | Trigger::Broken(_) => None,
        Trigger::Cron(_) | Trigger::Every(_) => start(due(&entry.slots, entry.record.covered, now)?, None, Which::All),
        Trigger::TagMove(every) => {
            let due = due(&entry.slots, entry.record.covered, now)?;
            let asked = now >= after(due.slot, jitter(&name, due.slot, *every));
            if asked { start(due, None, Which::Moved) } else { None }
        }
        Trigger::ReadyBy(_) => match due(&entry.slots, entry.record.covered, now) {
            Some(late) => start(late, Some(late.slot), Which::All),
            None => {
                let deadline = entry.slots.next(entry.record.covered)?;
                let reached = start_at.is_some_and(|start_at| start_at <= now);
                if reached { start(Due { slot: deadline, missed: 0 }, Some(deadline), Which::All) } else { None }
            }
        },
    }
}

impl Scheduler {
    /// All runs that are due; marks their schedules as busy.
    pub(super) fn take_due(&self, now: Timestamp) -> Vec<DueRun> {
        let forecast = self.forecast.lock();
        let mut book = self.book.lock();
        let mut starts = Vec::new();
        for (name, entry) in book.iter_mut() {
            let start_at = entry.next_slot().and_then(|deadline| forecast.start_of(name, deadline));
            if let Some(start) = due_now(entry, start_at, now) {
                entry.busy = true;
                starts.push(start);
            }
        }
        starts
    }

    /// Makes one run. A failed attempt is repeated after a pause.
    pub(super) async fn start(self: Arc<Self>, start: DueRun) {
        let name = start.name.clone();
        let schedule = self.book.lock().get(&name).map(|entry| entry.schedule.clone());
        let Some(schedule) = schedule else { return };
        let images = match start.which {
            Which::All => self.expand(&schedule).await,
            Which::Moved => self.moved(&schedule).await,
        };
        let result = match images {
            Ok(images) => {
                let scheduler = Arc::clone(&self);
                let launch = tokio::task::spawn_blocking(move || scheduler.launch(&schedule, start, images));
                launch.await.unwrap_or(Ok(())).map_err(|error| error.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        self.after_start(&name, result);
    }

    /// Ends an attempt, and notes its result.
    fn after_start(&self, name: &str, result: Result<(), String>) {
        let now = self.now();
        let mut trouble = None;
        if let Some(entry) = self.book.lock().get_mut(name) {
            entry.busy = false;
            match result {
                Ok(()) => (entry.trouble, entry.failures) = (None, 0),
                Err(why) => {
                    entry.failures += 1;
                    entry.not_before = after(now, pause(entry.failures));
                    if entry.trouble.replace(why.clone()).is_none() {
                        trouble = Some(format!("schedule {name} cannot start, trying again: {why}"));
                    }
                }
            }
        }
        if let Some(message) = trouble {
            self.say(Severity::Warning, "schedule.trouble", name, message);
        }
        self.changed.notify_one();
    }

    /// The images that a schedule means now. Where patterns mean more than [`MOST_IMAGES`], the newest are taken.
    pub(super) async fn expand(&self, schedule: &Schedule) -> Result<Vec<ImageRef>, RegistryError> {
        let (mut images, mut left_out) = (Vec::new(), 0);
        for pattern in &schedule.images {
            match pattern {
                Pattern::Image(image) => images.push(image.clone()),
                Pattern::Tags { repository, tags } => {
                    let all = self.components.tag_lister.tags(repository).await?;
                    let (repository, tags, choice) = (repository.clone(), tags.clone(), schedule.choice.clone());
                    // Very many tags are work for a thread that may block.
                    let chosen = tokio::task::spawn_blocking(move || choose(&repository, &tags, &choice, &all)).await;
                    let mut chosen = chosen.unwrap_or_default();
                    let room = MOST_IMAGES.saturating_sub(images.len());
                    left_out += chosen.len().saturating_sub(room);
                    chosen.truncate(room);
                    images.extend(chosen);
                }
            }
        }
        self.note_left_out(&schedule.spec.name, left_out);
        images.sort();
        images.dedup();
        Ok(images)
    }

    /// Reports how many images a run leaves out, whenever that number changes.
    fn note_left_out(&self, name: &str, left_out: usize) {
        let before = self.book.lock().get_mut(name).map(|entry| std::mem::replace(&mut entry.left_out, left_out));
        if left_out > 0 && before.is_some_and(|before| before != left_out) {
            let message = format!(
                "schedule {name} means {left_out} images more than the {MOST_IMAGES} that one run pulls: the oldest are left out; \
                 narrow its patterns, or say how many of the newest it means"
            );
            self.say(Severity::Warning, "schedule.left_out", name, message);
        }
    }

    /// The images whose tag points elsewhere than the catalogue says. The first failure ends the check: a registry that fails is not asked
    /// for the others.
    async fn moved(&self, schedule: &Schedule) -> Result<Vec<ImageRef>, RegistryError> {
        let catalogue = self.components.publisher.catalogue();
        let mut moved = Vec::new();
        for image in self.expand(schedule).await? {
            let known = catalogue.find(&image).map(|state| state.image.target);
            // An image that is named by digest never moves.
            if image.digest().is_some() && known.is_some() {
                continue;
            }
            if self.components.tag_lister.look(&image, known).await? != TagLook::Same {
                moved.push(image);
            }
        }
        Ok(moved)
    }

    /// Makes the jobs, then covers the slot. A check of tags that found nothing leaves no run. Blocks on the database.
    fn launch(&self, schedule: &Schedule, start: DueRun, images: Vec<ImageRef>) -> Result<(), ScheduleError> {
        let (name, now) = (&start.name, self.now());
        if images.is_empty() && start.which == Which::Moved {
            self.amend(name, |entry| entry.record.covered = entry.record.covered.max(start.due.slot));
            return Ok(());
        }
        let run = self.make_run(schedule, start.due, start.deadline, images)?;
        tracing::info!("schedule {name} runs for {}: {} images", run.slot, run.images.len());
        let late = start.deadline.filter(|deadline| *deadline <= now);
        self.amend(name, |entry| {
            entry.record.covered = entry.record.covered.max(start.due.slot);
            entry.record.begin(run);
            entry.record.missed_for = late.or(entry.record.missed_for);
        });
        if let Some(deadline) = late {
            let message =
                format!("schedule {name} starts only now for its deadline {deadline}: it was not started before");
            self.say(Severity::Error, "schedule.missed", name, message);
        }
        Ok(())
    }

    fn make_run(
        &self,
        schedule: &Schedule,
        due: Due,
        deadline: Option<Timestamp>,
        images: Vec<ImageRef>,
    ) -> Result<RunRecord, ScheduleError> {
        let name = &schedule.spec.name;
        let job = |image: &ImageRef| NewJob {
            image: image.clone(),
            platform: schedule.platform.clone(),
            priority: schedule.spec.priority,
            origin: Some(format!("schedule {name}")),
            ordered_by: RequestedBy::Operator,
            source: Source::Registry,
        };
        let promise = deadline.and_then(|deadline| self.forecast.lock().promise(name, deadline));
        let jobs = self.components.queue.submit(images.iter().map(job).collect())?;
        Ok(RunRecord {
            slot: due.slot,
            started_at: self.now(),
            ended_at: None,
            state: RunState::Running,
            images,
            jobs: jobs.iter().map(|job| JobId(job.id)).collect(),
            made_up: due.missed,
            reason: None,
            deadline,
            predicted_at: promise.map(|promise| promise.end),
            predicted_bytes: promise.map(|promise| promise.bytes),
            tries: 0,
            retry_at: None,
        })
    }

    /// Makes a schedule's jobs now, whatever its trigger. Its slots stay as they are.
    pub async fn run_now(self: &Arc<Self>, name: &str) -> Result<Run, ScheduleError> {
        let found = self.book.lock().get(name).map(|entry| entry.schedule.clone());
        let schedule = found.ok_or_else(|| ScheduleError::Unknown(name.to_owned()))?;
        let cannot = |why: String| ScheduleError::CannotRun { name: name.to_owned(), why };
        if let Some(why) = schedule.why_broken() {
            return Err(cannot(why.to_owned()));
        }
        let images = self.expand(&schedule).await.map_err(|error| cannot(error.to_string()))?;
        if images.is_empty() {
            return Err(cannot("no tag matches its patterns".to_owned()));
        }
        let scheduler = Arc::clone(self);
        let due = Due { slot: self.now(), missed: 0 };
        let made = tokio::task::spawn_blocking(move || {
            let run = scheduler.make_run(&schedule, due, None, images)?;
            scheduler.amend(&schedule.spec.name, |entry| entry.record.begin(run.clone()));
            scheduler.changed.notify_one();
            Ok::<_, ScheduleError>(run.view())
        });
        made.await.map_err(|_| cannot("the request was interrupted".to_owned()))?
    }

    /// Makes jobs for the pushes that on-push schedules mean, and returns the jobs. Blocks on the database.
    pub fn pushed(&self, pushes: &[Push]) -> Result<Vec<u64>, ScheduleError> {
        let due = Due { slot: self.now(), missed: 0 };
        let mut jobs = Vec::new();
        for (schedule, images) in self.meant(pushes) {
            let run = self.make_run(&schedule, due, None, images)?;
            jobs.extend(run.jobs.iter().map(|job| job.0));
            self.amend(&schedule.spec.name, |entry| entry.record.begin(run));
        }
        jobs.sort_unstable();
        jobs.dedup();
        self.changed.notify_one();
        Ok(jobs)
    }

    /// The on-push schedules that mean one of the pushes, with the images as these schedules name them.
    fn meant(&self, pushes: &[Push]) -> Vec<(Schedule, Vec<ImageRef>)> {
        let book = self.book.lock();
        let on_push = book.values().filter(|entry| matches!(entry.schedule.trigger, Trigger::OnPush));
        let mut meant = Vec::new();
        for schedule in on_push.filter(|entry| !entry.record.spec.paused).map(|entry| &entry.schedule) {
            let named = schedule.images.iter().map(Pattern::repository);
            let mut images: Vec<ImageRef> = named
                .flat_map(|own| pushes.iter().filter(|push| push.names(own)).map(move |push| (own, push)))
                .filter_map(|(own, push)| own.with_tag(&push.tag).ok())
                .filter(|image| schedule.means(image))
                .collect();
            images.sort();
            images.dedup();
            images.truncate(MOST_IMAGES);
            if !images.is_empty() {
                meant.push((schedule.clone(), images));
            }
        }
        meant
    }
}
