//! `status`: the coordinator's condition.

use coordinator_api::Client;
use coordinator_api::status::{Role, Status};

use crate::output::{Output, ago, size};

/// `status`.
pub(crate) async fn show(client: &Client, output: Output) -> anyhow::Result<()> {
    output.print(&client.status().await?, |status: &Status| {
        let role = match status.role {
            Role::Leader => "leader".to_owned(),
            Role::Standby => format!("standby for {}", status.leader.as_deref().unwrap_or("another coordinator")),
        };
        let jobs = &status.jobs;
        format!(
            "Role:       {role}{}\nVersion:    {}\nStarted:    {}\nStore:      {} (generation {})\nState:      {}\nImages:     {}\n\
             Layers:     {} ({} of tar)\nJobs:       {} queued, {} running, {} published, {} failed, {} cancelled\nFetched:    {} since the start",
            status.epoch.map(|epoch| format!(" (epoch {epoch})")).unwrap_or_default(),
            status.version,
            ago(status.started_at),
            status.store,
            status.generation,
            status.state,
            status.images,
            status.layers,
            size(status.layer_bytes),
            jobs.queued,
            jobs.running,
            jobs.published,
            jobs.failed,
            jobs.cancelled,
            size(status.bytes_fetched),
        )
    })
}
