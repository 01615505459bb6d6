//! `jobs`, `job`, `cancel`, `retry`: pull jobs.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use clap::Args;
use coordinator_api::Client;
use coordinator_api::job::{Job, JobList};

use crate::output::{Layout, Output, ago, json, short, shown, size, table};
use crate::patience::{Bound, Patience};
use crate::reader;

/// The arguments of `jobs`.
#[derive(Args)]
pub(crate) struct List {
    /// Show the list again whenever it changes, until interrupted; also over restarts of the coordinator
    #[arg(short, long)]
    watch: bool,
}

/// One job.
#[derive(Args)]
pub(crate) struct Id {
    /// The job's number, as cachefsctl jobs shows it
    #[arg(value_parser = number)]
    id: u64,
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("{text:?} is not a job's number: cachefsctl jobs lists them"))
}

const LOOK: Duration = Duration::from_millis(500);

fn percent(job: &Job) -> String {
    match job.bytes_total {
        0 => "-".to_owned(),
        total => format!("{}%", job.bytes_done.min(total) * 100 / total),
    }
}

fn rows(list: &JobList) -> String {
    let row = |job: &Job| {
        [
            job.id.to_string(),
            job.image.clone(),
            job.state.to_string(),
            percent(job),
            size(job.bytes_fetched),
            job.priority.to_string(),
            ago(job.created_at),
            job.reason.clone().unwrap_or_default(),
        ]
    };
    table(["JOB", "IMAGE", "STATE", "DONE", "FETCHED", "PRIORITY", "CREATED", "REASON"], list.jobs.iter().map(row))
}

/// Runs `cachefsctl jobs`.
pub(crate) async fn list(client: &Client, output: Output, arguments: &List) -> anyhow::Result<()> {
    let mut shown = client.jobs().await?;
    if !arguments.watch {
        return output.print(&shown, rows);
    }
    print(output, &shown)?;
    let mut gone = std::pin::pin!(reader::gone());
    let mut patience = Patience::new(output, Bound::Endless);
    loop {
        let look = async {
            tokio::time::sleep(LOOK).await;
            patience.ask(async || client.jobs().await).await
        };
        let jobs = tokio::select! {
            jobs = look => jobs?,
            () = &mut gone => return Ok(()),
        };
        if jobs != shown {
            shown = jobs;
            print(output, &shown)?;
        }
    }
}

/// Prints the list once more: in place on a terminal, as a line of JSON for programs.
fn print(output: Output, list: &JobList) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout();
    match output {
        Output::Json => writeln!(stdout, "{}", json(list, Layout::Line)?)?,
        // Cursor to the top left, then clear below.
        Output::Text if stdout.is_terminal() => write!(stdout, "\x1b[H\x1b[J{}", rows(&shown(list)?))?,
        Output::Text => write!(stdout, "{}", rows(&shown(list)?))?,
    }
    Ok(stdout.flush()?)
}

fn text(job: &Job) -> String {
    let layers = job.layers.iter().map(|layer| {
        let done = format!("{} / {}", size(layer.bytes_done), size(layer.bytes_total));
        [short(&layer.digest), format!("{:?}", layer.state).to_lowercase(), done, size(layer.unpacked_bytes)]
    });
    let reason = job.reason.as_ref().map(|reason| format!("Reason:   {reason}\n")).unwrap_or_default();
    format!(
        "Job:      {}\nImage:    {}\nState:    {}\n{reason}Attempts: {}\nCreated:  {}\nDone:     {} of {}, {} fetched\n\n{}",
        job.id,
        job.image,
        job.state,
        job.attempts,
        job.created_at,
        size(job.bytes_done),
        size(job.bytes_total),
        size(job.bytes_fetched),
        table(["LAYER", "STATE", "DONE", "UNPACKED"], layers),
    )
}

/// Runs `cachefsctl job`.
pub(crate) async fn show(client: &Client, output: Output, id: &Id) -> anyhow::Result<()> {
    output.print(&client.job(id.id).await?, text)
}

/// Runs `cachefsctl cancel`.
pub(crate) async fn cancel(client: &Client, output: Output, id: &Id) -> anyhow::Result<()> {
    output.print(&client.cancel(id.id).await?, |job| format!("job {} is being cancelled", job.id))
}

/// Runs `cachefsctl retry`.
pub(crate) async fn retry(client: &Client, output: Output, id: &Id) -> anyhow::Result<()> {
    output.print(&client.retry(id.id).await?, |job| format!("job {} is queued again", job.id))
}
