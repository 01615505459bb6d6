//! `fsck`: checks the store. Shows a bar and a table of damage; exits with 1 if any damage is left.

use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;
use coordinator_api::Client;
use coordinator_api::fsck::{Fsck, FsckDepth, FsckFinding, FsckOutcome, FsckPhase, FsckRequest, FsckState};
use indicatif::{ProgressBar, ProgressStyle};

use crate::output::{Answer, Output, size, table, warn};
use crate::patience::{Bound, Patience};

/// How often a running check is looked at.
const LOOK: Duration = Duration::from_millis(150);
/// How long an unreachable coordinator may take to restart.
const AWAY: Duration = Duration::from_secs(120);

/// The arguments of `fsck`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  cachefsctl fsck                   # is everything there that images refer to? seconds
  cachefsctl fsck --deep --repair   # every byte; what is damaged is fetched again
  cachefsctl fsck --rebuild         # after losing --state")]
pub(crate) struct Check {
    /// Compare every byte with its digest, not only what is there with what should be
    #[arg(long)]
    deep: bool,
    /// Move what is damaged into quarantine and fetch it again from the images' registries
    #[arg(long)]
    repair: bool,
    /// Learn again from the store what a lost database or catalogue knew
    #[arg(long)]
    rebuild: bool,
    /// Begin at the beginning, not where a deep check was interrupted
    #[arg(long)]
    restart: bool,
    /// Do not wait for the end
    #[arg(short, long)]
    detach: bool,
    /// Start nothing: show the check that runs, or the last one
    #[arg(long, conflicts_with_all = ["deep", "repair", "rebuild", "restart", "stop"])]
    status: bool,
    /// Start nothing: interrupt the check that runs
    #[arg(long, conflicts_with_all = ["deep", "repair", "rebuild", "restart", "detach"])]
    stop: bool,
}

impl Check {
    /// Whether the command reports the store's condition.
    pub(crate) fn asks(&self) -> bool {
        !self.stop && !self.detach
    }
}

/// Runs `cachefsctl fsck`.
pub(crate) async fn fsck(client: &Client, output: Output, arguments: Check) -> anyhow::Result<()> {
    let check = match (arguments.status, arguments.stop) {
        (true, _) => client.fsck().await?,
        (_, true) => client.stop_fsck().await?,
        _ => start(client, &arguments).await?,
    };
    if arguments.detach || arguments.stop || (arguments.status && check.state == FsckState::Running) {
        return output.print(&check, sentence);
    }
    let check = match check.state {
        FsckState::Running => follow(client, check, output).await?,
        _ => check,
    };
    output.print(&check, text)?;
    verdict(&check)
}

async fn start(client: &Client, arguments: &Check) -> anyhow::Result<Fsck> {
    let depth = if arguments.deep { FsckDepth::Deep } else { FsckDepth::Fast };
    let Check { repair, rebuild, restart, .. } = *arguments;
    Ok(client.start_fsck(&FsckRequest { depth, repair, rebuild, restart }).await?)
}

/// Waits for the check to end. An interrupt stops the check and waits for that.
async fn follow(client: &Client, check: Fsck, output: Output) -> anyhow::Result<Fsck> {
    let mut check = check;
    let shows = output == Output::Text && std::io::stderr().is_terminal();
    let bar = if shows { ProgressBar::new(0) } else { ProgressBar::hidden() };
    if check.resumed {
        warn(output, "resuming the check that was interrupted; --restart begins anew");
    }
    let mut patience = Patience::new(output, Bound::Away(AWAY));
    while check.state == FsckState::Running {
        show(&bar, &check);
        let look = async {
            tokio::time::sleep(LOOK).await;
            patience.ask(async || client.fsck().await).await
        };
        tokio::select! {
            looked = look => check = looked?,
            _ = tokio::signal::ctrl_c() => match client.stop_fsck().await {
                // The coordinator cannot be reached, so the check cannot be stopped.
                Err(error) if error.may_pass() => return Err(error.into()),
                // The check may have ended just now, which the next look shows.
                _ => {}
            },
        }
    }
    bar.finish_and_clear();
    Ok(check)
}

fn show(bar: &ProgressBar, check: &Fsck) {
    let template = if check.phase.counts_bytes() {
        "{prefix:<10} [{bar:30}] {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta} {msg}"
    } else {
        "{prefix:<10} [{bar:30}] {pos}/{len} {msg}"
    };
    if bar.prefix() != check.phase.word() {
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style.progress_chars("=> "));
        bar.set_prefix(check.phase.word());
        bar.reset();
    }
    bar.set_length(check.total);
    bar.set_position(check.done.min(check.total));
    match check.damaged {
        0 => bar.set_message(""),
        damaged => bar.set_message(format!("{damaged} damaged")),
    }
}

/// The state of a check in one sentence.
fn sentence(check: &Fsck) -> String {
    let done = match (check.phase.counts_bytes(), check.total) {
        (_, 0) => String::new(),
        (true, total) => format!(" ({} of {})", size(check.done.min(total)), size(total)),
        (false, total) => format!(" ({} of {total})", check.done.min(total)),
    };
    match check.state {
        FsckState::Running => {
            format!("a check is under way: {}{done}, {} damaged so far", check.phase.word(), check.damaged)
        }
        FsckState::Interrupted => format!("the check was interrupted: {}{done}", check.phase.word()),
        FsckState::Failed => format!("the check failed: {}", check.reason.as_deref().unwrap_or_default()),
        FsckState::Finished => format!("the check ended: {} damaged", check.damaged),
    }
}

fn row(finding: &FsckFinding) -> [String; 4] {
    let outcome = match finding.outcome {
        FsckOutcome::Damaged => "damaged",
        FsckOutcome::Repaired => "repaired",
        FsckOutcome::NotRepaired => "not repaired",
    };
    let images = match finding.images.first() {
        None => "none".to_owned(),
        Some(first) if finding.images_affected > 1 => format!("{first} and {} more", finding.images_affected - 1),
        Some(first) => first.clone(),
    };
    let message = match &finding.reason {
        Some(reason) => format!("{}; {reason}", finding.message),
        None => finding.message.clone(),
    };
    [finding.kind.clone(), outcome.to_owned(), images, message]
}

/// The full report: what was checked, and what is damaged.
fn text(check: &Fsck) -> String {
    let counts = &check.checked;
    let mut text = format!(
        "Checked:    {} images, {} layers, {} packs, {} documents, {} generations\n",
        counts.images, counts.layers, counts.packs, counts.blobs, counts.generations
    );
    if check.request.depth == FsckDepth::Deep {
        text += &format!("Compared:   {}\n", size(counts.bytes));
    }
    let orphans = &check.orphans;
    text += &format!(
        "Unused:     {} layers, {} packs ({}), {} documents, {} other files\n",
        orphans.layers,
        orphans.packs,
        size(orphans.pack_bytes),
        orphans.blobs,
        orphans.unknown_files
    );
    if let Some(rebuilt) = &check.rebuilt {
        text += &format!(
            "Rebuilt:    {} pieces, {} blobs, {} images\n",
            rebuilt.pieces,
            rebuilt.blobs,
            rebuilt.images.len()
        );
        for image in &rebuilt.images {
            text += &format!("            {image}: nobody knows what it was called; pull it by its name if you do\n");
        }
    }
    text += &format!("Damaged:    {}\n", check.damaged);
    if !check.findings.is_empty() {
        text += "\n";
        text += &table(["OBJECT", "STATE", "IMAGES", "WHY"], check.findings.iter().map(row));
    }
    if check.findings_left_out > 0 {
        text += &format!("and {} more\n", check.findings_left_out);
    }
    text
}

/// An error with exit code 1 if the store is damaged or the check did not finish.
fn verdict(check: &Fsck) -> anyhow::Result<()> {
    let words = match check.state {
        FsckState::Interrupted if check.phase == FsckPhase::Repairing => {
            "the repair was interrupted; what was not fetched yet is as it was, run the same command again".to_owned()
        }
        FsckState::Interrupted if check.request.depth == FsckDepth::Deep => {
            let repair = if check.request.repair { " --repair" } else { "" };
            format!("the check was interrupted; cachefsctl fsck --deep{repair} goes on from here")
        }
        FsckState::Interrupted => "the check was interrupted; run cachefsctl fsck again".to_owned(),
        FsckState::Failed => format!("the check could not go on: {}", check.reason.as_deref().unwrap_or_default()),
        _ if check.damaged == 0 => return Ok(()),
        _ if check.request.repair => format!("{} damaged objects are left", check.damaged),
        _ => format!("{} objects are damaged; run cachefsctl fsck --repair", check.damaged),
    };
    Err(Answer(words).into())
}
