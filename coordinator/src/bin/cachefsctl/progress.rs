//! Waits for jobs. Shows a bar per layer and job on a terminal, lines of text or JSON elsewhere; always on stderr.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::Duration;

use anyhow::bail;
use coordinator_api::job::{Job, JobState, LayerProgress, LayerState};
use coordinator_api::printable::printable;
use coordinator_api::report;
use coordinator_api::{Client, ClientError};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::interrupt::{Interrupted, Interrupts};
use crate::output::{Output, short, size};
use crate::patience::{Bound, Patience};

/// How often a running job is looked at.
const LOOK: Duration = Duration::from_millis(150);

/// Shows the progress of jobs.
pub(crate) enum Display {
    Bars(Bars),
    Lines(HashMap<u64, JobState>),
    /// One object per line, for programs.
    Json(HashMap<u64, Value>),
}

/// Bars of several jobs.
pub(crate) struct Bars {
    all: MultiProgress,
    jobs: HashMap<u64, JobBars>,
}

struct JobBars {
    total: ProgressBar,
    layers: HashMap<String, ProgressBar>,
}

impl Display {
    /// Bars if stderr is a terminal, lines otherwise; JSON for programs.
    pub(crate) fn new(output: Output) -> Display {
        match output {
            Output::Json => Display::Json(HashMap::new()),
            Output::Text if std::io::stderr().is_terminal() => {
                Display::Bars(Bars { all: MultiProgress::new(), jobs: HashMap::new() })
            }
            Output::Text => Display::Lines(HashMap::new()),
        }
    }

    fn show(&mut self, job: &Job) {
        match self {
            Display::Bars(bars) => bars.show(job),
            Display::Lines(shown) => {
                if shown.insert(job.id, job.state) != Some(job.state) {
                    report::say(&line(job));
                }
            }
            Display::Json(shown) => {
                let progress = progress(job);
                if shown.insert(job.id, progress.clone()).as_ref() != Some(&progress) {
                    report::say_json(&json!({ "progress": progress }));
                }
            }
        }
    }
}

/// The fields of a job that its progress line shows.
fn progress(job: &Job) -> Value {
    json!({
        "job": job.id,
        "image": job.image,
        "state": job.state,
        "bytes_done": job.bytes_done,
        "bytes_total": job.bytes_total,
        "reason": job.reason,
    })
}

fn line(job: &Job) -> String {
    let detail = match job.state {
        JobState::Published => {
            let present = job.layers.iter().filter(|layer| layer.state == LayerState::Present).count();
            format!(" ({} layers, {present} already present, {} fetched)", job.layers.len(), size(job.bytes_fetched))
        }
        _ => String::new(),
    };
    let trouble = job.reason.as_ref().filter(|_| !job.state.is_final());
    let trouble = trouble.map(|reason| format!(" ({reason})")).unwrap_or_default();
    printable(&format!("{}: {}{detail}{trouble}", job.image, job.state)).into_owned()
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}

impl Bars {
    fn show(&mut self, job: &Job) {
        let all = &self.all;
        let bars = self.jobs.entry(job.id).or_insert_with(|| {
            let total = all.add(ProgressBar::new(0));
            total.set_style(style("{prefix:.bold} {msg:<10} [{bar:30}] {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}"));
            total.set_prefix(printable(&job.image).into_owned());
            JobBars { total, layers: HashMap::new() }
        });
        for layer in &job.layers {
            let bar = bars.layers.entry(layer.digest.clone()).or_insert_with(|| {
                let bar = all.insert_before(&bars.total, ProgressBar::new(layer.bytes_total));
                bar.set_style(style("  {prefix} {msg:<10} [{bar:30}] {decimal_bytes}/{decimal_total_bytes}"));
                bar.set_prefix(printable(&short(&layer.digest)).into_owned());
                bar
            });
            show_layer(bar, layer);
        }
        bars.total.set_length(job.bytes_total);
        bars.total.set_position(job.bytes_done);
        bars.total.set_message(job.state.word());
        if job.state.is_final() {
            bars.total.abandon();
        }
    }
}

fn show_layer(bar: &ProgressBar, layer: &LayerProgress) {
    let word = match layer.state {
        LayerState::Waiting => "waiting",
        LayerState::Fetching => "fetching",
        LayerState::Unpacking => "unpacking",
        LayerState::Done => "done",
        LayerState::Present => "present",
        LayerState::Failed => "failed",
    };
    bar.set_position(layer.bytes_done);
    bar.set_message(word);
    if matches!(layer.state, LayerState::Done | LayerState::Present | LayerState::Failed) && !bar.is_finished() {
        bar.abandon();
    }
}

/// How long [`follow`] waits for a coordinator that does not answer: longer than a restart or a takeover by another one takes.
const AWAY: Duration = Duration::from_secs(120);

/// Says what happens to the unfinished jobs when nobody waits for them any more.
fn left(jobs: &[Job]) -> String {
    let open: Vec<String> = jobs.iter().filter(|job| !job.state.is_final()).map(|job| job.id.to_string()).collect();
    match &open[..] {
        [one] => format!("job {one} goes on: cachefsctl cancel {one} ends it"),
        several => format!("jobs {} go on: cachefsctl cancel ID ends one", several.join(", ")),
    }
}

/// Waits until all jobs have ended, even across a restart of the coordinator or a takeover by another one. Returns the ended
/// jobs.
pub(crate) async fn follow(client: &Client, jobs: Vec<Job>, output: Output) -> anyhow::Result<Vec<Job>> {
    let (mut jobs, mut display) = (jobs, Display::new(output));
    let (mut patience, mut interrupts) = (Patience::new(output, Bound::Away(AWAY)), Interrupts::watch()?);
    loop {
        jobs.iter().for_each(|job| display.show(job));
        if jobs.iter().all(|job| job.state.is_final()) {
            return Ok(jobs);
        }
        let looked = tokio::select! {
            looked = look(client, &mut jobs, &mut patience) => looked,
            exit = interrupts.next() => {
                return Err(Interrupted::new(exit, format!("not waiting any longer; {}", left(&jobs))).into());
            }
        };
        if let Err(error) = looked {
            let words = if error.may_pass() {
                format!("{error}; not waiting any longer than {} s, but {}", AWAY.as_secs(), left(&jobs))
            } else {
                error.to_string()
            };
            return Err(anyhow::Error::new(error).context(words));
        }
    }
}

/// Waits a moment, then asks for the jobs that have not ended.
async fn look(client: &Client, jobs: &mut [Job], patience: &mut Patience) -> Result<(), ClientError> {
    tokio::time::sleep(LOOK).await;
    for job in jobs.iter_mut().filter(|job| !job.state.is_final()) {
        let id = job.id;
        *job = patience.ask(async || client.job(id).await).await?;
    }
    Ok(())
}

/// Fails with a message that names each job that was not published.
pub(crate) fn check(jobs: &[Job]) -> anyhow::Result<()> {
    let sentence = |job: &Job| printable(&words(job)).into_owned();
    let bad: Vec<_> = jobs.iter().filter(|job| job.state != JobState::Published).map(sentence).collect();
    if bad.is_empty() { Ok(()) } else { bail!("{}", bad.join("\n")) }
}

/// How a job that was not published ended.
fn words(job: &Job) -> String {
    match (&job.reason, job.state) {
        (Some(reason), JobState::Failed) => format!("job {} ({}) failed: {reason}", job.id, job.image),
        (_, state) => format!("job {} ({}) was {state}", job.id, job.image),
    }
}
