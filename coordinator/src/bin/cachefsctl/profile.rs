//! `profile`: what starts of an image read.

use clap::Args;
use coordinator_api::Client;
use coordinator_api::profile::{Profile, ProfileFile, ProfileOrigin, ProfileStart};

use crate::output::{Output, ago, size, table};

/// The arguments of `profile`.
#[derive(Args)]
pub(crate) struct Show {
    /// The image, as docker pull takes it
    image: String,
    /// How many files to list, in the order in which starts need them
    #[arg(long, default_value_t = 20, value_name = "N")]
    files: usize,
}

/// Runs `cachefsctl profile`.
pub(crate) async fn show(client: &Client, output: Output, arguments: &Show) -> anyhow::Result<()> {
    output.print(&client.profile(&arguments.image, Some(arguments.files)).await?, |profile: &Profile| {
        let (Some(pack), Some(published_at)) = (&profile.pack, profile.published_at) else {
            return match profile.starts {
                0 if profile.origin.is_none() => {
                    format!("No start of {} has been traced yet: run it once on a host that mounts this store.", profile.name)
                }
                0 => format!("The startup pack of {} is being made: ask again soon.", profile.name),
                _ => format!("{} has been started, and its startup pack is being made: ask again soon.", profile.name),
            };
        };
        let share = |value: Option<f64>, of: &str| match value {
            Some(value) => format!("{:.0} % {of}", value * 100.0),
            None => "not known yet: no start has used the pack".to_owned(),
        };
        let facts = format!(
            "Image:        {}\nChain:        {}\nStarts:       {}\nLearned from: {}\nPieces:       {} of {} files, {} of content\nStartup pack: {pack}, {}\n\
             Published:    {published_at} ({})\nPrecision:    {}\nRecall:       {}\n",
            profile.name,
            profile.chain,
            profile.starts,
            learned_from(profile),
            profile.pieces,
            profile.files_total,
            size(profile.content_bytes),
            size(profile.pack_bytes),
            ago(published_at),
            share(profile.precision, "of what was prefetched was read"),
            share(profile.recall, "of what was read had been prefetched"),
        );
        [Some(facts), starts(&profile.recent), files(&profile.files)].into_iter().flatten().collect::<Vec<_>>().join("\n")
    })
}

fn learned_from(profile: &Profile) -> String {
    match (profile.origin, &profile.inherited_from) {
        (Some(ProfileOrigin::Inherited), Some(from)) if profile.starts == 0 => format!("inherited from {from}"),
        (Some(ProfileOrigin::Inherited), Some(from)) => format!("inherited from {from}, and starts of its own"),
        (Some(ProfileOrigin::Guessed), _) => "a guess by what its command is; the first start replaces it".to_owned(),
        _ => "traced starts".to_owned(),
    }
}

/// The last starts that had a pack; nothing if there were none.
fn starts(recent: &[ProfileStart]) -> Option<String> {
    let percent = |share: Option<f64>| share.map_or("-".to_owned(), |share| format!("{:.0} %", share * 100.0));
    let row = |start: &ProfileStart| {
        let (read, prefetched) = (size(start.read_bytes), size(start.prefetched_bytes));
        [ago(start.started_at), read, prefetched, percent(start.precision), percent(start.recall)]
    };
    (!recent.is_empty()).then(|| table(["START", "READ", "PREFETCHED", "PRECISION", "RECALL"], recent.iter().map(row)))
}

/// The first files of the pack; nothing if there are none.
fn files(files: &[ProfileFile]) -> Option<String> {
    let row = |file: &ProfileFile| {
        [format!("{:.0} %", file.weight * 100.0), size(file.bytes), file.layer.to_string(), file.path.clone()]
    };
    (!files.is_empty()).then(|| table(["WEIGHT", "BYTES", "LAYER", "FILE"], files.iter().map(row)))
}
