//! `gc`, `retention`: collects garbage and shows the retention policy.

use std::time::Duration;

use anyhow::bail;
use clap::Args;
use coordinator_api::Client;
use coordinator_api::retention::{
    CollectRequest, CollectionPhase, CollectionPlan, CollectionReport, GarbageItem, GarbageKind, GarbageReason,
    RetentionPolicy,
};
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;

use crate::output::{Output, short, size, table};
use coordinator_api::quantity::{format_duration, parse_duration};

/// How often a running collection is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// The arguments of `gc`.
#[derive(Args)]
pub(crate) struct Collect {
    /// Only show what would go, when, and why
    #[arg(long)]
    dry_run: bool,
    /// How long what nothing refers to stays, instead of the setting: 0s, 30m, 24h. Shorter than the hosts take to notice
    /// a new catalogue, it may take layers from under an image that is just being started
    #[arg(long, value_parser = parse_duration, value_name = "D")]
    grace: Option<Duration>,
}

/// Runs `cachefsctl gc`.
pub(crate) async fn collect(client: &Client, output: Output, arguments: &Collect) -> anyhow::Result<()> {
    if arguments.dry_run {
        return output.print(&client.collection_plan(arguments.grace).await?, plan);
    }
    let request = CollectRequest { grace_seconds: arguments.grace.map(|grace| grace.as_secs()) };
    let mut status = client.begin_collection(&request).await?;
    let number = status.number;
    let bar = if output == Output::Json { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
        bar.set_style(style);
    }
    while let Some(progress) = status.running.filter(|_| status.number == number) {
        let step =
            if progress.total > 0 { format!(" ({} of {})", progress.done, progress.total) } else { String::new() };
        bar.set_message(format!("{}{step}", phase(progress.phase)));
        bar.tick();
        tokio::time::sleep(LOOK).await;
        status = client.collection().await?;
    }
    bar.finish_and_clear();
    let Some(done) = status.last else { bail!("the coordinator does not tell how the collection ended: see its log") };
    output.print(&done, report)?;
    match (done.stopped, done.failures.len()) {
        (Some(why), _) => bail!("the collection ended early: {why}"),
        (None, 0) => Ok(()),
        (None, 1) => bail!("the collection left one thing undone, and tries it again the next time"),
        (None, failures) => bail!("the collection left {failures} things undone, and tries them again the next time"),
    }
}

/// Runs `cachefsctl retention`.
pub(crate) async fn retention(client: &Client, output: Output) -> anyhow::Result<()> {
    output.print(&client.retention().await?, policy)
}

fn phase(phase: CollectionPhase) -> &'static str {
    match phase {
        CollectionPhase::Surveying => "looking at what the store holds",
        CollectionPhase::Images => "taking images out of the catalogue",
        CollectionPhase::Layers => "removing layers and blobs",
        CollectionPhase::Waiting => "waiting for layers that are being unpacked",
        CollectionPhase::Packs => "removing and rewriting packs",
    }
}

fn kind(kind: GarbageKind) -> &'static str {
    match kind {
        GarbageKind::Image => "image",
        GarbageKind::Layer => "layer",
        GarbageKind::Pack => "pack",
        GarbageKind::PackPart => "part of pack",
        GarbageKind::Blob => "blob",
    }
}

fn reason(reason: &GarbageReason) -> String {
    match reason {
        GarbageReason::Rule { pattern } => format!("no limit of rule {pattern} keeps it"),
        GarbageReason::Quota => "the store is larger than its quota".to_owned(),
        GarbageReason::Unreferenced => "nothing refers to it".to_owned(),
        GarbageReason::NoLayer => "no layer has it".to_owned(),
        GarbageReason::MostlyUnused => "little of it is in use".to_owned(),
    }
}

fn name(item: &GarbageItem) -> String {
    match item.kind {
        GarbageKind::Image => item.name.clone(),
        _ => short(&item.name),
    }
}

/// When an object is due, such as `in 3 h`.
fn when(due: Timestamp) -> String {
    let seconds = due.duration_since(Timestamp::now()).as_secs();
    match seconds {
        ..=0 => "now".to_owned(),
        1..120 => format!("in {seconds} s"),
        120..7200 => format!("in {} min", (seconds + 30) / 60),
        _ => format!("in {} h", (seconds + 1800) / 3600),
    }
}

fn plan(plan: &CollectionPlan) -> String {
    let rows = plan
        .items
        .iter()
        .map(|item| [kind(item.kind).to_owned(), name(item), size(item.bytes), when(item.due), reason(&item.reason)]);
    let listed = if plan.items.is_empty() {
        "nothing to collect\n".to_owned()
    } else {
        table(["KIND", "NAME", "SIZE", "WHEN", "WHY"], rows)
    };
    let now: u64 = plan.items.iter().filter(|item| is_freed(item) && item.due <= plan.at).map(|item| item.bytes).sum();
    let later: u64 = plan.items.iter().filter(|item| is_freed(item) && item.due > plan.at).map(|item| item.bytes).sum();
    let waiting = plan.waiting.as_ref().map(|why| format!("Waiting: {why}\n")).unwrap_or_default();
    let over = match plan.over_quota_bytes {
        0 => String::new(),
        over => format!("Quota:   {} over the low mark even so\n", size(over)),
    };
    let (stored, needed) = (size(plan.store_bytes), size(plan.needed_bytes));
    format!(
        "{listed}\n{waiting}{over}Store:   {stored}, of which images need {needed}\nFreed:   {} now, {} later\n",
        size(now),
        size(later)
    )
}

/// Whether the item frees its bytes itself. An image does not: the objects behind it do.
fn is_freed(item: &GarbageItem) -> bool {
    item.kind != GarbageKind::Image
}

fn report(report: &CollectionReport) -> String {
    let rows = report
        .items
        .iter()
        .map(|item| [kind(item.kind).to_owned(), name(item), size(item.bytes), reason(&item.reason)]);
    let listed = if report.items.is_empty() {
        String::new()
    } else {
        format!("{}\n", table(["REMOVED", "NAME", "SIZE", "WHY"], rows))
    };
    let failures: String = report.failures.iter().map(|failure| format!("not done: {failure}\n")).collect();
    let marked = match report.marked {
        0 => String::new(),
        marked => format!(", {marked} objects wait for their grace to end"),
    };
    format!("{listed}{failures}{} freed in {:.1} s{marked}\n", size(report.freed_bytes), report.seconds)
}

fn policy(policy: &RetentionPolicy) -> String {
    let time = |seconds: u64| format_duration(Duration::from_secs(seconds));
    let rows = policy.rules.iter().map(|rule| {
        let last = rule.keep_last.map_or("-".to_owned(), |last| last.to_string());
        [rule.pattern.clone(), last, rule.keep_for_seconds.map_or("-".to_owned(), time)]
    });
    let rules = if policy.rules.is_empty() {
        "no rules: all images are kept\n".to_owned()
    } else {
        table(["PATTERN", "KEEP LAST", "KEEP FOR"], rows)
    };
    let quota = policy.quota.map_or("none".to_owned(), |quota| {
        format!("{}, from {}% down to {}%", size(quota.limit_bytes), quota.high_percent, quota.low_percent)
    });
    let every = match policy.collect.every_seconds {
        0 => "on request".to_owned(),
        seconds => format!("every {}", time(seconds)),
    };
    let (grace, thin) = (time(policy.collect.grace_seconds), policy.collect.thin_below_percent);
    format!("{rules}\nQuota:       {quota}\nCollections: {every}\nGrace:       {grace}\nThin below:  {thin}%\n")
}
