//! `events`: what happened, and what happens.

use std::io::Write;
use std::time::Duration;

use clap::Args;
use coordinator_api::error::ErrorCode;
use coordinator_api::event::{Event, EventList};
use coordinator_api::printable::printable;
use coordinator_api::{Client, ClientError};

use crate::output::{Layout, Output, json, warn};
use crate::reader;

/// How long one request of a follower waits.
const WAIT: Duration = Duration::from_secs(30);
/// How many events one request brings.
const LIMIT: usize = 1000;
/// The pause after a request that failed.
const PAUSE: Duration = Duration::from_secs(1);

/// The arguments of `events`.
#[derive(Args)]
pub(crate) struct Events {
    /// Go on with what happens, until interrupted; also over restarts of the coordinator
    #[arg(short, long)]
    follow: bool,
    /// Only events with higher numbers than this [default: the last ones]
    #[arg(long, value_name = "NUMBER")]
    since: Option<u64>,
    /// How many events to show
    #[arg(short = 'n', long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    limit: u16,
}

/// `events`.
pub(crate) async fn show(client: &Client, output: Output, arguments: &Events) -> anyhow::Result<()> {
    let limit = usize::from(arguments.limit);
    let after = match arguments.since {
        Some(number) => number,
        None => client.events(u64::MAX, 1, Duration::ZERO).await?.last.saturating_sub(limit as u64),
    };
    let list = client.events(after, limit, Duration::ZERO).await?;
    if !arguments.follow {
        return output.print(&list, |list: &EventList| list.events.iter().map(line).collect());
    }
    print(output, &list)?;
    tokio::select! {
        ended = follow(client, output, list) => ended,
        () = reader::gone() => Ok(()),
    }
}

/// Shows what comes after `seen`, for ever.
async fn follow(client: &Client, output: Output, seen: EventList) -> anyhow::Result<()> {
    let (mut log, mut last) = (seen.log, seen.last);
    let mut is_away = false;
    loop {
        match client.events(last, LIMIT, WAIT).await {
            Ok(list) if list.log != log => {
                warn(output, "another coordinator leads now; its events follow from their beginning");
                (log, last) = (list.log, 0);
            }
            Ok(list) => {
                print(output, &list)?;
                (last, is_away) = (list.last, false);
            }
            Err(error) if may_pass(&error) => {
                if !std::mem::replace(&mut is_away, true) {
                    warn(output, &format!("{error}; trying again"));
                }
                tokio::time::sleep(PAUSE).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether the same request may succeed later.
fn may_pass(error: &ClientError) -> bool {
    match error {
        ClientError::Unreachable { .. } | ClientError::Broken { .. } => true,
        ClientError::Refused(detail) => {
            matches!(detail.code, ErrorCode::Standby | ErrorCode::Busy | ErrorCode::Internal | ErrorCode::Full)
        }
        _ => false,
    }
}

/// Prints events as they come: lines of text, or of JSON.
fn print(output: Output, list: &EventList) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    for event in &list.events {
        match output {
            Output::Text => stdout.write_all(line(event).as_bytes())?,
            Output::Json => writeln!(stdout, "{}", json(event, Layout::Line)?)?,
        }
    }
    Ok(stdout.flush()?)
}

fn line(event: &Event) -> String {
    let actor = event.actor.as_ref().map(|actor| format!(" (by {actor})")).unwrap_or_default();
    let (at, word) = (event.at.strftime("%FT%TZ"), event.severity.word());
    let text = printable(&format!("{:<18}  {}{actor}", event.kind, event.message)).into_owned();
    format!("{at}  {:>6}  {word:<7}  {text}\n", event.id)
}
