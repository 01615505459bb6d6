//! `profile`: what starts of an image read.

use clap::Args;
use coordinator_api::Client;
use coordinator_api::profile::{Profile, ProfileFile};

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
                0 => format!("No start of {} has been traced yet: run it once on a host that mounts this store.", profile.name),
                _ => format!("{} has been started, and its startup pack is being made: ask again soon.", profile.name),
            };
        };
        let share = |value: Option<f64>, of: &str| match value {
            Some(value) => format!("{:.0} % {of}", value * 100.0),
            None => "not known yet: no start has used the pack".to_owned(),
        };
        let facts = format!(
            "Image:        {}\nChain:        {}\nStarts:       {}\nPieces:       {} of {} files, {} of content\nStartup pack: {pack}, {}\n\
             Published:    {published_at} ({})\nPrecision:    {}\nRecall:       {}\n",
            profile.name,
            profile.chain,
            profile.starts,
            profile.pieces,
            profile.files_total,
            size(profile.content_bytes),
            size(profile.pack_bytes),
            ago(published_at),
            share(profile.precision, "of what was prefetched was read"),
            share(profile.recall, "of what was read had been prefetched"),
        );
        let row = |file: &ProfileFile| {
            [format!("{:.0} %", file.weight * 100.0), size(file.bytes), file.layer.to_string(), file.path.clone()]
        };
        if profile.files.is_empty() { facts } else { format!("{facts}\n{}", table(["WEIGHT", "BYTES", "LAYER", "FILE"], profile.files.iter().map(row))) }
    })
}
