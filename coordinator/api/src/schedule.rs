//! Schedules: standing orders that make pull jobs, what they did, and what they will do.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

fn is_zero(number: &i32) -> bool {
    *number == 0
}

fn is_false(flag: &bool) -> bool {
    !*flag
}

/// A standing order, as people write it. Exactly one of `cron`, `every` (without `tag_move`), `on_push`, `tag_move` and
/// `ready_by` is its trigger.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ScheduleSpec {
    /// Its name: letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// Images as `docker pull` takes them; the tag may be a pattern (`app:v1.*`).
    pub images: Vec<String>,
    /// `os/architecture[/variant]`; without it, the coordinator's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// Priority of its jobs; higher goes first, 0 is ordinary.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub priority: i32,
    /// Whether it is paused and makes no jobs.
    #[serde(default, skip_serializing_if = "is_false")]
    pub paused: bool,
    /// Five cron fields, or `@daily` and the like, as in crontab(5).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cron: Option<String>,
    /// Zone of `cron` and of a daily `ready_by`, e.g. `Europe/Berlin` [default: UTC].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
    /// Interval, e.g. `6h`; with `tag_move`, how often to look [default there: 5m].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every: Option<String>,
    /// Triggered whenever the registry's webhook says that a matching tag was pushed.
    #[serde(default, skip_serializing_if = "is_false")]
    pub on_push: bool,
    /// Triggered whenever a tag is found to point elsewhere.
    #[serde(default, skip_serializing_if = "is_false")]
    pub tag_move: bool,
    /// When the images must be there: RFC 3339 (once), `08:00` (daily), or cron fields.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_by: Option<String>,
    /// Of the tags that match, only this many, newest first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newest: Option<usize>,
    /// Of the tags that match, only versions in this range, e.g. `>=1.2, <2`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub semver: Option<String>,
}

/// A schedule with its past and its future.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Schedule {
    /// The order itself.
    pub spec: ScheduleSpec,
    /// The trigger, in words.
    pub trigger: String,
    /// When it will next do something on its own.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub next_at: Option<Timestamp>,
    /// The schedule is kept but makes no jobs: the coordinator's machine no longer understands it, for the reason in
    /// `trouble`.
    #[serde(default)]
    pub broken: bool,
    /// Why its last attempt to start made no jobs, if it made none. The attempt is repeated.
    pub trouble: Option<String>,
    /// For `ready_by`: the next deadline's forecast.
    pub forecast: Option<PlanEntry>,
    /// Its last runs, newest first.
    pub runs: Vec<Run>,
    /// How good its forecasts were.
    pub accuracy: Option<Accuracy>,
}

/// The schedules, by name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ScheduleList {
    /// The schedules.
    pub schedules: Vec<Schedule>,
    /// Set if there are more: where the next page continues.
    #[serde(rename = "continue", default, skip_serializing_if = "Option::is_none")]
    pub next_page: Option<String>,
}

/// The state of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// Its jobs are under way, or will be tried again.
    Running,
    /// All its images are published.
    Published,
    /// Some image is not published, and this run will not try it again.
    Failed,
}

/// One time that a schedule made jobs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Run {
    /// The time that the run is for: a slot, a deadline or a push.
    #[schema(value_type = String, format = DateTime)]
    pub slot: Timestamp,
    /// When its jobs were made.
    #[schema(value_type = String, format = DateTime)]
    pub started_at: Timestamp,
    /// When the last of them ended.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub ended_at: Option<Timestamp>,
    /// The state of the run.
    pub state: RunState,
    /// The images, as resolved from patterns.
    pub images: Vec<String>,
    /// The jobs.
    pub jobs: Vec<u64>,
    /// Earlier slots that passed while the coordinator was down, and that this run makes up for.
    pub made_up: u64,
    /// Why it failed.
    pub reason: Option<String>,
    /// An attempt has failed, and the next one comes at this time.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(default)]
    pub retry_at: Option<Timestamp>,
    /// For `ready_by`: the deadline.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub deadline: Option<Timestamp>,
    /// The end that was expected when it started.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub predicted_at: Option<Timestamp>,
    /// Bytes that were expected to be fetched.
    pub predicted_bytes: Option<u64>,
}

/// How a schedule's forecasts compare with what happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Accuracy {
    /// Runs that had a forecast and ended well.
    pub scored: u64,
    /// Of those, runs that ended before their deadline.
    pub in_time: u64,
    /// Mean of actual minus predicted duration, seconds: above 0, runs take longer than predicted.
    pub mean_error_seconds: f64,
    /// Mean of the absolute value of that difference, seconds.
    pub mean_absolute_error_seconds: f64,
}

/// The state of a deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PlanState {
    /// It starts in time.
    Planned,
    /// Its jobs are under way and will end in time.
    Running,
    /// The forecast misses the deadline, or something stands in the way.
    AtRisk,
    /// Nothing is known yet: the registry has not been asked, or does not answer.
    Unknown,
}

impl PlanState {
    /// The word used in tables.
    pub const fn word(self) -> &'static str {
        match self {
            PlanState::Planned => "planned",
            PlanState::Running => "running",
            PlanState::AtRisk => "at risk",
            PlanState::Unknown => "unknown",
        }
    }
}

/// One deadline and how it will be met.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PlanEntry {
    /// The schedule.
    pub schedule: String,
    /// The images.
    pub images: Vec<String>,
    /// When they must be there.
    #[schema(value_type = String, format = DateTime)]
    pub deadline: Timestamp,
    /// When fetching starts, or started.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub start_at: Option<Timestamp>,
    /// When it is expected to end.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub forecast_at: Option<Timestamp>,
    /// From the forecast to the deadline, seconds; below 0 it is missed.
    pub slack_seconds: Option<i64>,
    /// Compressed bytes of layers that the store lacks.
    pub missing_bytes: Option<u64>,
    /// The speed that the forecast assumes when fetching starts.
    pub bytes_per_second: Option<u64>,
    /// The state of the deadline.
    pub state: PlanState,
    /// Why it is at risk or unknown: one sentence.
    pub why: Option<String>,
}

/// The deadlines, and how they will be met.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Plan {
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    /// The deadlines, soonest first.
    pub entries: Vec<PlanEntry>,
}
