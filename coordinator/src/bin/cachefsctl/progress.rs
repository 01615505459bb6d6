//! Waiting for jobs, with a bar for each layer and one for all on a terminal, and plain lines elsewhere.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::Duration;

use anyhow::bail;
use coordinator_api::Client;
use coordinator_api::job::{Job, JobState, LayerProgress, LayerState};
use coordinator_api::printable::printable;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::output::{short, size};

/// How often a running job is looked at.
const LOOK: Duration = Duration::from_millis(150);

/// Who shows how far jobs are.
pub(crate) enum Display {
    Bars(Bars),
    Lines(HashMap<u64, JobState>),
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
    /// Bars if stderr is a terminal.
    pub(crate) fn new() -> Display {
        match std::io::stderr().is_terminal() {
            true => Display::Bars(Bars { all: MultiProgress::new(), jobs: HashMap::new() }),
            false => Display::Lines(HashMap::new()),
        }
    }

    fn show(&mut self, job: &Job) {
        match self {
            Display::Bars(bars) => bars.show(job),
            Display::Lines(shown) => {
                if shown.insert(job.id, job.state) != Some(job.state) {
                    eprintln!("{}", line(job));
                }
            }
        }
    }
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
            total.set_style(style("{prefix:.bold} {msg:<10} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}"));
            total.set_prefix(printable(&job.image).into_owned());
            JobBars { total, layers: HashMap::new() }
        });
        for layer in &job.layers {
            let bar = bars.layers.entry(layer.digest.clone()).or_insert_with(|| {
                let bar = all.insert_before(&bars.total, ProgressBar::new(layer.bytes_total));
                bar.set_style(style("  {prefix} {msg:<10} [{bar:30}] {bytes}/{total_bytes}"));
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

/// Waits until all jobs have ended; an error if one did not end well. Gives the jobs as they ended.
pub(crate) async fn follow(client: &Client, jobs: Vec<Job>, mut display: Option<Display>) -> anyhow::Result<Vec<Job>> {
    let mut jobs = jobs;
    loop {
        for job in &jobs {
            if let Some(display) = &mut display {
                display.show(job);
            }
        }
        if jobs.iter().all(|job| job.state.is_final()) {
            return Ok(jobs);
        }
        tokio::time::sleep(LOOK).await;
        for job in jobs.iter_mut().filter(|job| !job.state.is_final()) {
            *job = client.job(job.id).await?;
        }
    }
}

/// An error that names each job that did not end well.
pub(crate) fn check(jobs: &[Job]) -> anyhow::Result<()> {
    let sentence = |job: &Job| printable(&words(job)).into_owned();
    let bad: Vec<_> = jobs.iter().filter(|job| job.state != JobState::Published).map(sentence).collect();
    match bad.is_empty() {
        true => Ok(()),
        false => bail!("{}", bad.join("\n")),
    }
}

/// How a job ended that did not end well.
fn words(job: &Job) -> String {
    match (&job.reason, job.state) {
        (Some(reason), JobState::Failed) => format!("job {} ({}) failed: {reason}", job.id, job.image),
        (_, state) => format!("job {} ({}) was {state}", job.id, job.image),
    }
}
