//! `version`: the versions of this program and of the coordinator.

use coordinator_api::Client;
use coordinator_api::status::Version;
use serde::{Deserialize, Serialize};

use crate::output::{Output, PROGRAM};

/// The versions of both.
#[derive(Debug, Serialize, Deserialize)]
struct Versions {
    client: Version,
    /// Absent if the coordinator does not answer.
    server: Option<Version>,
}

/// Runs `cachefsctl version`. Prints this program's version even if no coordinator answers.
pub(crate) async fn show(client: &Client, output: Output) -> anyhow::Result<()> {
    let own =
        Version { name: PROGRAM.to_owned(), version: env!("CARGO_PKG_VERSION").to_owned(), api: vec!["v1".to_owned()] };
    let (server, failure) = match client.version().await {
        Ok(version) => (Some(version), None),
        Err(error) => (None, Some(error)),
    };
    output.print(&Versions { client: own, server }, |versions| {
        let line = |end: &str, version: &Version| {
            format!("{end}  {} {}, API {}\n", version.name, version.version, version.api.join(" "))
        };
        let server = versions.server.as_ref().map(|version| line("Server:", version)).unwrap_or_default();
        format!("{}{server}", line("Client:", &versions.client))
    })?;
    failure.map_or(Ok(()), |error| Err(error.into()))
}
