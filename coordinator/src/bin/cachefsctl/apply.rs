//! `apply` and `diff`: compares a YAML document of settings with the present ones, and applies it.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::Args;
use coordinator_api::Client;
use coordinator_api::report;
use coordinator_api::settings::{ChangeKind, Difference, SettingsAnswer, SettingsRequest};

use crate::document;
use crate::output::{Answer, Output, warn};

/// The arguments of `apply`.
#[derive(Args)]
#[command(after_help = "\
Example:
  cachefsctl apply --show > settings.yaml     # what is now
  cachefsctl diff settings.yaml               # what would change; exit code 1 if anything, 3 if that cannot be found out
  cachefsctl apply settings.yaml              # asks first if something is removed")]
pub(crate) struct Apply {
    /// YAML with schedules, limits, pins, retention, pull_on_demand (- reads standard input); a key that is absent changes nothing
    #[arg(required_unless_present_any = ["show", "filename"])]
    file: Option<PathBuf>,
    /// The same, as kubectl takes it
    #[arg(short = 'f', long, value_name = "FILE", conflicts_with = "file")]
    filename: Option<PathBuf>,
    /// Only show what would change
    #[arg(long)]
    dry_run: bool,
    /// Do not ask before something is removed (only a terminal is asked)
    #[arg(short, long)]
    yes: bool,
    /// Print what is now, as YAML that applies without a difference
    #[arg(long, conflicts_with_all = ["file", "filename", "dry_run", "yes"])]
    show: bool,
}

/// The arguments of `diff`.
#[derive(Args)]
pub(crate) struct Diff {
    /// The document that apply takes (- reads standard input)
    #[arg(required_unless_present = "filename")]
    file: Option<PathBuf>,
    /// The same, as kubectl takes it
    #[arg(short = 'f', long, value_name = "FILE", conflicts_with = "file")]
    filename: Option<PathBuf>,
}

fn line(difference: &Difference) -> String {
    let Difference { kind, object, old, new } = difference;
    let (old, new) = (old.as_deref().unwrap_or_default(), new.as_deref().unwrap_or_default());
    match kind {
        ChangeKind::Added => format!("+ {object}: {new}\n"),
        ChangeKind::Removed => format!("- {object}: {old}\n"),
        ChangeKind::Changed => format!("~ {object}: {old} -> {new}\n"),
    }
}

/// `1 added, 2 changed, 1 removed`.
fn counts(differences: &[Difference]) -> String {
    let kinds = [(ChangeKind::Added, "added"), (ChangeKind::Changed, "changed"), (ChangeKind::Removed, "removed")];
    let count = |kind| differences.iter().filter(|difference| difference.kind == kind).count();
    let counted = kinds.iter().map(|(kind, word)| (count(*kind), word)).filter(|(count, _)| *count > 0);
    counted.map(|(count, word)| format!("{count} {word}")).collect::<Vec<_>>().join(", ")
}

fn text(answer: &SettingsAnswer) -> String {
    let lines: String = answer.differences.iter().map(line).collect();
    match (answer.differences.len(), answer.dry_run) {
        (0, _) => "nothing differs".to_owned(),
        (_, true) => format!("{lines}would be: {}; nothing was changed", counts(&answer.differences)),
        (_, false) => format!("{lines}applied: {}", counts(&answer.differences)),
    }
}

/// A person's answer to the question whether to apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Consent {
    /// Nobody was asked.
    Assumed,
    /// The person saw the differences and agreed.
    Given,
    /// The person declined.
    Refused,
}

/// Asks before anything is removed, if stdin and stderr are a terminal.
fn ask(differences: &[Difference]) -> anyhow::Result<Consent> {
    let removed = differences.iter().filter(|difference| difference.kind == ChangeKind::Removed).count();
    if removed == 0 || !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return Ok(Consent::Assumed);
    }
    differences.iter().for_each(|difference| report::say(line(difference).trim_end()));
    let mut stderr = std::io::stderr();
    write!(stderr, "Apply this, of which {removed} removed? [y/N] ")?;
    stderr.flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    match answer.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Ok(Consent::Given),
        _ => Ok(Consent::Refused),
    }
}

/// Runs `cachefsctl apply`.
pub(crate) async fn apply(client: &Client, output: Output, arguments: &Apply) -> anyhow::Result<()> {
    let Some(path) = arguments.file.as_ref().or(arguments.filename.as_ref()) else {
        let settings = client.settings().await?;
        return output.print(&settings, |settings| serde_saphyr::to_string(settings).unwrap_or_default());
    };
    let settings = document::read(path)?;
    // A dry run finds the differences first. If it is refused, it is certain that nothing was changed.
    let answer = client.apply(&SettingsRequest { settings: settings.clone(), dry_run: true }).await?;
    answer.warnings.iter().for_each(|warning| warn(output, warning));
    if arguments.dry_run || answer.differences.is_empty() {
        return output.print(&answer, text);
    }
    let consent = if arguments.yes { Consent::Assumed } else { ask(&answer.differences)? };
    if consent == Consent::Refused {
        bail!("nothing was changed");
    }
    let done = client.apply(&SettingsRequest { settings, dry_run: false }).await?;
    output.print(&done, |done| match consent {
        // The differences were already shown above the question.
        Consent::Given => format!("applied: {}", counts(&done.differences)),
        _ => text(done),
    })
}

/// Runs `cachefsctl diff`.
pub(crate) async fn diff(client: &Client, output: Output, arguments: &Diff) -> anyhow::Result<()> {
    let path = arguments.file.as_deref().or(arguments.filename.as_deref()).unwrap_or(Path::new("-"));
    let settings = document::read(path)?;
    let answer = client.apply(&SettingsRequest { settings, dry_run: true }).await?;
    answer.warnings.iter().for_each(|warning| warn(output, warning));
    output.print(&answer, text)?;
    let file = path.display();
    let words = match answer.differences.len() {
        0 => return Ok(()),
        1 => format!("1 difference: cachefsctl apply {file} brings it about"),
        count => format!("{count} differences: cachefsctl apply {file} brings them about"),
    };
    Err(Answer(words).into())
}
