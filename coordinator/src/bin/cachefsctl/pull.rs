//! `pull`: pulls images from their registries.

use clap::Args;
use coordinator_api::Client;
use coordinator_api::job::{JobList, PullRequest};

use crate::output::Output;
use crate::progress::{check, follow};

/// The arguments of `pull`.
#[derive(Args)]
pub(crate) struct Pull {
    /// Images, as docker pull takes them
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
    /// Platform to pull, os/architecture[/variant] [default: the coordinator's]
    #[arg(long)]
    platform: Option<String>,
    /// Jobs with a higher number go first
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    priority: i32,
    /// Print the jobs and do not wait for them
    #[arg(short, long)]
    detach: bool,
}

/// Submits the jobs and waits for them.
pub(crate) async fn pull(client: &Client, output: Output, arguments: Pull) -> anyhow::Result<()> {
    let Pull { images, platform, priority, detach } = arguments;
    let JobList { jobs, .. } = client.pull(&PullRequest { images, platform, priority }).await?;
    if detach {
        let lines = |list: &JobList| list.jobs.iter().map(|job| format!("{}\n", job.id)).collect();
        return output.print(&JobList { jobs, left_out: Vec::new(), next_page: None }, lines);
    }
    let jobs = follow(client, jobs, output).await?;
    finish(output, jobs)
}

/// Prints how the jobs ended. Fails if one of them was not published.
pub(crate) fn finish(output: Output, jobs: Vec<coordinator_api::job::Job>) -> anyhow::Result<()> {
    let result = check(&jobs);
    let lines = |list: &JobList| {
        let done = list.jobs.iter().filter(|job| job.reason.is_none());
        done.map(|job| format!("{}\n", job.image)).collect()
    };
    if output == Output::Json || result.is_ok() {
        output.print(&JobList { jobs, left_out: Vec::new(), next_page: None }, lines)?;
    }
    result
}
