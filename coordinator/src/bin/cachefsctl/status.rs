//! `status`: the coordinator's condition.

use coordinator_api::Client;
use coordinator_api::status::{Role, Status};

use crate::output::{Output, ago, size};

/// Runs `cachefsctl status`.
pub(crate) async fn show(client: &Client, output: Output) -> anyhow::Result<()> {
    output.print(&client.status().await?, |status: &Status| {
        let role = match status.role {
            Role::Leader => "leader".to_owned(),
            Role::Standby => format!("standby for {}", status.leader.as_deref().unwrap_or("another coordinator")),
        };
        let jobs = &status.jobs;
        let text = format!(
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
        );
        let risk = match status.deadlines_at_risk {
            0 => String::new(),
            count => format!("\nAt risk:    {count} deadlines (cachefsctl schedule plan)"),
        };
        let waiting = status.registries_waiting.iter().map(|registry| {
            let (name, why) = (&registry.registry, registry.why.as_deref().unwrap_or_default());
            let until = registry.waits_until.map(|at| at.to_string()).unwrap_or_default();
            format!("\nWaiting:    registry {name} until {until}: {why}")
        });
        let troubles: String = status.troubles.iter().map(|trouble| format!("\nTrouble:    {trouble}")).collect();
        format!("{text}{risk}{}{troubles}", waiting.collect::<String>())
    })
}
