//! `schedule`: schedules, their runs, and the plan of deadlines. `registries`: the condition of the registries.

use clap::{Args, Subcommand};
use coordinator_api::Client;
use coordinator_api::limits::{BreakerState, RegistryCondition};
use coordinator_api::schedule::{Plan, PlanEntry, PlanState, Run, RunState, Schedule, ScheduleList, ScheduleSpec};
use jiff::Timestamp;

use crate::output::{Output, ago, each, size, table};

/// The commands of `schedule`.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Add a schedule
    Add(Box<Add>),
    /// List the schedules
    #[command(visible_alias = "ls")]
    List,
    /// Show one schedule: its runs and how good its forecasts were
    Show(Name),
    /// Remove schedules (their jobs go on)
    #[command(visible_alias = "rm")]
    Remove(Names),
    /// Make no jobs for the time being
    Pause(Names),
    /// Make jobs again
    Resume(Names),
    /// Make the jobs now
    Run(Name),
    /// Show deadlines, when their pulls start, and whether they will be met
    Plan,
}

/// One schedule.
#[derive(Args)]
pub(crate) struct Name {
    /// The schedule's name
    name: String,
}

/// Several schedules.
#[derive(Args)]
pub(crate) struct Names {
    /// The schedules' names
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

/// The arguments of `schedule add`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  cachefsctl schedule add nightly --image registry.example.com/team/app:1.4 --cron '0 3 * * *' --time-zone Europe/Berlin
  cachefsctl schedule add tools --image 'registry.example.com/team/tools:v1.*' --every 6h --newest 3
  cachefsctl schedule add morning --image registry.example.com/team/big:live --ready-by 08:00")]
pub(crate) struct Add {
    /// What to call it
    name: String,
    /// An image as docker pull takes it; its tag may be a pattern (app:v1.*)
    #[arg(long = "image", required = true, value_name = "IMAGE")]
    images: Vec<String>,
    /// When, as in crontab(5): minute hour day month weekday ("0 3 * * mon-fri"), or @hourly, @daily, @weekly, @monthly, @yearly
    #[arg(long, value_name = "FIELDS")]
    cron: Option<String>,
    /// The zone of --cron and of a daily --ready-by, e.g. Europe/Berlin [default: UTC]
    #[arg(long, value_name = "ZONE")]
    time_zone: Option<String>,
    /// So often: 30m, 6h, 1d; with --tag-move, how often to look
    #[arg(long, value_name = "DURATION")]
    every: Option<String>,
    /// Whenever the registry's webhook tells of a push
    #[arg(long)]
    on_push: bool,
    /// Whenever a tag points elsewhere
    #[arg(long)]
    tag_move: bool,
    /// The images must be there at this time: 2026-12-24T08:00:00+01:00, 08:00 (daily), or cron fields
    #[arg(long, value_name = "TIME")]
    ready_by: Option<String>,
    /// Of the tags that match, only so many, newest first
    #[arg(long, value_name = "N")]
    newest: Option<usize>,
    /// Of the tags that match, only versions in this range, e.g. ">=1.2, <2"
    #[arg(long, value_name = "RANGE")]
    semver: Option<String>,
    /// Platform to pull, os/architecture[/variant] [default: the coordinator's]
    #[arg(long)]
    platform: Option<String>,
    /// Its jobs go before those with a lower number
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    priority: i32,
}

impl Add {
    fn into_spec(self) -> ScheduleSpec {
        ScheduleSpec {
            name: self.name,
            images: self.images,
            platform: self.platform,
            priority: self.priority,
            paused: false,
            cron: self.cron,
            time_zone: self.time_zone,
            every: self.every,
            on_push: self.on_push,
            tag_move: self.tag_move,
            ready_by: self.ready_by,
            newest: self.newest,
            semver: self.semver,
        }
    }
}

/// Runs `cachefsctl schedule`.
pub(crate) async fn run(client: &Client, output: Output, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Add(arguments) => {
            let added = client.add_schedule(&arguments.into_spec()).await?;
            output.print(&added, |schedule| {
                // The start of a deadline's pulls is unknown until its registry has been asked.
                let next = schedule.next_at.filter(|_| schedule.spec.ready_by.is_none());
                let next = next.map(|at| format!(", next {}", minute(at))).unwrap_or_default();
                format!("schedule {} is added: {}{next}", schedule.spec.name, schedule.trigger)
            })
        }
        Command::List => output.print(&client.schedules().await?, list),
        Command::Show(name) => output.print(&client.schedule(&name.name).await?, show),
        Command::Remove(names) => {
            each(output, &names.names, async |name| client.remove_schedule(name).await, |one| line("removed", one))
                .await
        }
        Command::Pause(names) => {
            each(output, &names.names, async |name| client.pause_schedule(name).await, |one| line("paused", one)).await
        }
        Command::Resume(names) => {
            each(output, &names.names, async |name| client.resume_schedule(name).await, |one| line("resumed", one))
                .await
        }
        Command::Run(name) => {
            let run = client.run_schedule(&name.name).await?;
            output.print(&run, |run| run.jobs.iter().map(|job| format!("{job}\n")).collect())
        }
        Command::Plan => output.print(&client.plan().await?, plan),
    }
}

fn line(done: &str, schedule: &Schedule) -> String {
    format!("{done} {}", schedule.spec.name)
}

fn next(schedule: &Schedule) -> String {
    match schedule.next_at {
        _ if schedule.broken => "broken".to_owned(),
        _ if schedule.spec.paused => "paused".to_owned(),
        Some(at) => minute(at),
        None if schedule.spec.ready_by.is_some() => "over".to_owned(),
        None => "when told".to_owned(),
    }
}

/// A time in UTC, without seconds.
fn minute(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%MZ").to_string()
}

fn state(run: &Run) -> &'static str {
    match run.state {
        RunState::Running if run.retry_at.is_some() => "failed",
        RunState::Running => "running",
        RunState::Published => "published",
        RunState::Failed => "failed",
    }
}

/// When a failed run is tried again.
fn again(run: &Run) -> String {
    run.retry_at.map(|at| format!(", again {}", minute(at))).unwrap_or_default()
}

fn list(list: &ScheduleList) -> String {
    let row = |schedule: &Schedule| {
        let last = schedule.runs.first();
        [
            schedule.spec.name.clone(),
            schedule.spec.images.join(", "),
            schedule.trigger.clone(),
            next(schedule),
            last.map_or_else(|| "-".to_owned(), |run| format!("{} {}{}", state(run), ago(run.started_at), again(run))),
            schedule.trouble.clone().unwrap_or_default(),
        ]
    };
    table(["NAME", "IMAGES", "WHEN", "NEXT", "LAST", "TROUBLE"], list.schedules.iter().map(row))
}

fn show(schedule: &Schedule) -> String {
    let spec = &schedule.spec;
    let mut text = format!(
        "Name:     {}\nImages:   {}\nWhen:     {}\nNext:     {}\nPriority: {}\n",
        spec.name,
        spec.images.join(", "),
        schedule.trigger,
        next(schedule),
        spec.priority
    );
    if let Some(trouble) = &schedule.trouble {
        text += &format!("Trouble:  {trouble}\n");
    }
    if let Some(accuracy) = &schedule.accuracy {
        text += &format!(
            "Forecast: {} of {} in time; {:+.1} s off in the mean, {:.1} s either way\n",
            accuracy.in_time, accuracy.scored, accuracy.mean_error_seconds, accuracy.mean_absolute_error_seconds
        );
    }
    let row = |run: &Run| {
        let took = run.ended_at.map(|ended| ended.duration_since(run.started_at).as_secs_f64());
        let predicted = run.predicted_at.map(|at| at.duration_since(run.started_at).as_secs_f64());
        let seconds = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1} s"));
        [
            minute(run.slot),
            state(run).to_owned(),
            run.images.len().to_string(),
            seconds(predicted),
            seconds(took),
            run.made_up.to_string(),
            run.reason.clone().unwrap_or_default(),
        ]
    };
    let heads = ["RUN FOR", "STATE", "IMAGES", "PREDICTED", "TOOK", "MADE UP", "REASON"];
    format!("{text}\n{}", table(heads, schedule.runs.iter().map(row)))
}

/// Width of a timeline, in columns.
const WIDTH: usize = 40;

/// The timeline of an entry from `from` to `to`: `=` fetching, `|` the deadline, `!` fetching after it, `.` otherwise.
fn bar(entry: &PlanEntry, from: Timestamp, to: Timestamp) -> String {
    let whole = to.duration_since(from).as_secs_f64().max(1.0);
    let column = |at: Timestamp| {
        let part = at.duration_since(from).as_secs_f64() / whole;
        ((part.clamp(0.0, 1.0) * (WIDTH - 1) as f64).round()) as usize
    };
    let deadline = column(entry.deadline);
    let stretch = entry.start_at.zip(entry.forecast_at).map(|(start, end)| column(start)..=column(end));
    let cell = |at: usize| match &stretch {
        _ if at == deadline => '|',
        Some(stretch) if stretch.contains(&at) => {
            if at > deadline {
                '!'
            } else {
                '='
            }
        }
        _ => '.',
    };
    (0..WIDTH).map(cell).collect()
}

fn plan(plan: &Plan) -> String {
    if plan.entries.is_empty() {
        return "no schedule has a deadline: cachefsctl schedule add NAME --image IMAGE --ready-by TIME adds one"
            .to_owned();
    }
    let ends = plan.entries.iter().flat_map(|entry| [Some(entry.deadline), entry.forecast_at]).flatten();
    let to = ends.max().unwrap_or(plan.at);
    let row = |entry: &PlanEntry| {
        let unknown = || "?".to_owned();
        [
            entry.schedule.clone(),
            bar(entry, plan.at, to),
            entry.start_at.map_or_else(unknown, minute),
            entry.forecast_at.map_or_else(unknown, minute),
            minute(entry.deadline),
            entry.slack_seconds.map_or_else(unknown, slack),
            entry.missing_bytes.map_or_else(unknown, size),
            entry.state.word().to_owned(),
        ]
    };
    let heads = ["SCHEDULE", "TIMELINE", "START", "FORECAST", "DEADLINE", "SLACK", "MISSING", "STATE"];
    let table = table(heads, plan.entries.iter().map(row));
    let why = |entry: &PlanEntry| {
        let words = entry.why.as_ref().filter(|_| matches!(entry.state, PlanState::AtRisk | PlanState::Unknown))?;
        Some(format!("{} ({}): {words}\n", entry.schedule, entry.state.word()))
    };
    let reasons: String = plan.entries.iter().filter_map(why).collect();
    let legend = format!("{} to {}: = fetching, | deadline, ! too late", minute(plan.at), minute(to));
    format!("{table}\n{legend}\n{reasons}")
}

/// Formats slack: `+1h05m`, `-30s`.
fn slack(seconds: i64) -> String {
    let sign = if seconds < 0 { '-' } else { '+' };
    match seconds.unsigned_abs() {
        short @ 0..60 => format!("{sign}{short}s"),
        middle @ 60..3600 => format!("{sign}{}m{:02}s", middle / 60, middle % 60),
        long => format!("{sign}{}h{:02}m", long / 3600, long % 3600 / 60),
    }
}

/// Runs `cachefsctl registries`.
pub(crate) async fn registries(client: &Client, output: Output) -> anyhow::Result<()> {
    output.print(&client.registries().await?, |conditions| {
        let row = |condition: &RegistryCondition| {
            [
                condition.registry.clone(),
                match condition.breaker {
                    BreakerState::Closed => "closed".to_owned(),
                    BreakerState::Open => "open".to_owned(),
                    BreakerState::HalfOpen => "half-open".to_owned(),
                },
                condition.fetching.to_string(),
                condition.bytes_per_second.map_or_else(|| "-".to_owned(), |speed| format!("{}/s", size(speed))),
                condition.rate_limit_remaining.map_or_else(|| "-".to_owned(), |left| left.to_string()),
                condition.waits_until.map_or_else(|| "-".to_owned(), |at| at.to_string()),
                condition.why.clone().unwrap_or_default(),
            ]
        };
        let heads = ["REGISTRY", "BREAKER", "FETCHING", "SPEED", "REQUESTS LEFT", "WAITS UNTIL", "WHY"];
        table(heads, conditions.iter().map(row))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeline_shows_the_stretch_and_the_deadline() {
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        let entry = PlanEntry {
            schedule: "s".to_owned(),
            images: Vec::new(),
            deadline: at(200),
            start_at: Some(at(100)),
            forecast_at: Some(at(390)),
            slack_seconds: Some(-190),
            missing_bytes: Some(1),
            bytes_per_second: Some(1),
            state: PlanState::AtRisk,
            why: Some("slow".to_owned()),
        };
        assert_eq!(bar(&entry, at(0), at(390)), "..........==========|!!!!!!!!!!!!!!!!!!!");
        let text = plan(&Plan { at: at(0), entries: vec![entry] });
        assert!(text.contains("at risk") && text.contains("s (at risk): slow") && text.contains("-3m10s"), "{text}");
    }
}
