//! `events`: lists events, and follows new ones.

use std::io::Write;
use std::time::Duration;

use anyhow::bail;
use clap::Args;
use coordinator_api::event::{Event, EventList};
use coordinator_api::printable::printable;
use coordinator_api::quantity::parse_duration;
use coordinator_api::{Client, ClientError};
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

use crate::output::{Layout, Output, json, warn};
use crate::patience::{Bound, Patience};
use crate::reader;

/// How long one request waits when following.
const WAIT: Duration = Duration::from_secs(30);
/// How many events one request returns at most.
const LIMIT: usize = 1000;
/// How many events are shown by default.
const LAST: usize = 100;

/// The arguments of `events`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  cachefsctl events --since 2h                      # what happened in the last two hours
  cachefsctl events --since 2026-11-29T08:00:00Z    # since then; without a zone in that of this machine
  cachefsctl events --since 4711 --json             # what came after event 4711
  cachefsctl events -n 0 --follow                   # only what happens from now on")]
pub(crate) struct Events {
    /// Go on with what happens, until interrupted; also over restarts of the coordinator
    #[arg(short, long)]
    follow: bool,
    /// Only events with higher numbers than this, or since a time, or as long ago as this [default: the last ones]
    #[arg(long, value_name = "NUMBER|TIME|DURATION", value_parser = since)]
    since: Option<Since>,
    /// How many events to show, the first ones after --since [default: 100; all with --since]
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=1000))]
    limit: Option<u16>,
}

/// Where a listing of events begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Since {
    /// After the event with this number.
    Number(u64),
    /// With the first event at or after this time.
    Time(Timestamp),
}

/// Parses an event's number, a duration back from now, or a time.
fn since(text: &str) -> Result<Since, String> {
    if let Ok(number) = text.parse() {
        return Ok(Since::Number(number));
    }
    let wrong = || format!("{text:?} is neither an event's number nor a time: write 4711, 10m or 2026-11-29T08:00:00Z");
    if let Ok(back) = parse_duration(text) {
        return Timestamp::now().checked_sub(back).map(Since::Time).map_err(|_| wrong());
    }
    if let Ok(time) = text.parse() {
        return Ok(Since::Time(time));
    }
    let local: DateTime = text.parse().map_err(|_| wrong())?;
    local.to_zoned(TimeZone::system()).map(|time| Since::Time(time.timestamp())).map_err(|_| wrong())
}

/// Runs `cachefsctl events`.
pub(crate) async fn show(client: &Client, output: Output, arguments: &Events) -> anyhow::Result<()> {
    let newest = client.events(u64::MAX, 1, None, Duration::ZERO).await?;
    let list = first(client, arguments, newest.clone()).await?;
    if let Some(Since::Number(number)) = arguments.since
        && number > newest.last
    {
        let words = format!(
            "event {number} has not happened yet: the last one is {}, and numbers begin anew where a coordinator's state was lost",
            newest.last
        );
        if !arguments.follow {
            bail!("{words}");
        }
        warn(output, &words);
    }
    if !arguments.follow {
        return output.print(&list, |list: &EventList| list.events.iter().map(line).collect());
    }
    print(output, &list)?;
    tokio::select! {
        ended = follow(client, output, list) => ended,
        () = reader::gone() => Ok(()),
    }
}

/// The events to show before following.
async fn first(client: &Client, arguments: &Events, newest: EventList) -> Result<EventList, ClientError> {
    let limit = arguments.limit.map(usize::from);
    let (after, time) = match arguments.since {
        _ if limit == Some(0) => return Ok(EventList { events: Vec::new(), ..newest }),
        Some(Since::Number(number)) => (number, None),
        Some(Since::Time(time)) => (0, Some(time)),
        None => (newest.last.saturating_sub(limit.unwrap_or(LAST) as u64), None),
    };
    let wanted = limit.unwrap_or(if arguments.since.is_some() { usize::MAX } else { LAST });
    let mut list = client.events(after, wanted.min(LIMIT), time, Duration::ZERO).await?;
    // Events that happen in the meantime must not keep this going for ever.
    while list.events.len() < wanted && list.last < newest.last {
        let left = wanted - list.events.len();
        let page = client.events(list.last, left.min(LIMIT), None, Duration::ZERO).await?;
        if page.last <= list.last || page.log != list.log {
            break;
        }
        list.last = page.last;
        list.events.extend(page.events);
    }
    Ok(list)
}

/// Shows the events after `seen` until interrupted.
async fn follow(client: &Client, output: Output, seen: EventList) -> anyhow::Result<()> {
    let (mut log, mut last) = (seen.log, seen.last);
    let mut patience = Patience::new(output, Bound::Endless);
    loop {
        let list = patience.ask(async || client.events(last, LIMIT, None, WAIT).await).await?;
        if list.log == log {
            print(output, &list)?;
            last = list.last;
        } else {
            warn(output, "another coordinator leads now; its events follow from their beginning");
            (log, last) = (list.log, 0);
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_begins_at_a_number_a_time_or_a_while_ago() {
        let time = |text: &str| Ok(Since::Time(text.parse().unwrap()));
        assert_eq!((since("0"), since("4711")), (Ok(Since::Number(0)), Ok(Since::Number(4711))));
        assert_eq!(since("2026-11-29T08:00:00Z"), time("2026-11-29T08:00:00Z"));
        assert_eq!(since("2026-11-29T08:00:00+01:00"), time("2026-11-29T07:00:00Z"));
        for local in ["2026-11-29T08:00:00", "2026-11-29T08:00", "2026-11-29"] {
            assert!(matches!(since(local), Ok(Since::Time(_))), "{local}: {:?}", since(local));
        }
        let Ok(Since::Time(ago)) = since("10m") else { panic!("{:?}", since("10m")) };
        let seconds = Timestamp::now().duration_since(ago).as_secs();
        assert!((600..660).contains(&seconds), "{seconds}");
        for bad in ["", "-1", "soon", "1.5", "08:00", "99999999w", "2026-13-01", "18446744073709551616"] {
            assert!(since(bad).unwrap_err().contains("write 4711, 10m or 2026-"), "{bad}");
        }
    }
}
