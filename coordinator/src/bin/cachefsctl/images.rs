//! `images`, `image`, `remove`, `wait`: the images of the store.

use std::time::Duration;

use clap::Args;
use coordinator_api::Client;
use coordinator_api::client::{Absent, Forced};
use coordinator_api::image::{Image, ImageDetail, ImageList};
use coordinator_api::quantity::parse_duration;
use serde_json::value::RawValue;
use tokio::time::Instant;

use crate::output::{Output, ago, each, short, size, table};
use crate::patience::{Bound, Patience};

/// One image.
#[derive(Args)]
pub(crate) struct Name {
    /// The image, as docker pull takes it
    image: String,
}

/// The arguments of `remove`.
#[derive(Args)]
pub(crate) struct Removal {
    /// Images, as docker pull takes them
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
    /// Remove pinned names too, and their pins
    #[arg(long)]
    force: bool,
}

/// The arguments of `wait`.
#[derive(Args)]
#[command(after_help = "\
Example, before a deployment:
  cachefsctl wait registry.example.com/team/app:1.5 --timeout 10m --pull")]
pub(crate) struct Wait {
    /// The image, as docker pull takes it
    image: String,
    /// How long to wait: 30s, 5m, 2h; 0 looks once. A restart of the coordinator counts as waiting
    #[arg(long, default_value = "10m", value_parser = parse_duration)]
    timeout: Duration,
    /// Pull it if nobody does
    #[arg(long)]
    pull: bool,
}

/// The longest timeout. Longer ones are cut to it, so that the end can be computed.
const TIMEOUT_MAX: Duration = Duration::from_secs(366 * 86_400);

/// Runs `cachefsctl images`.
pub(crate) async fn list(client: &Client, output: Output) -> anyhow::Result<()> {
    output.print(&client.images().await?, |list: &ImageList| {
        let row = |image: &Image| {
            let repository = image.name.rsplit_once(['@', ':']).map_or(&*image.name, |(name, _)| name);
            let repository = repository.strip_suffix("@sha256").unwrap_or(repository);
            [
                repository.to_owned(),
                image.tag.clone().unwrap_or_else(|| "<none>".to_owned()),
                short(&image.config),
                image.platform.clone(),
                image.layers.to_string(),
                size(image.size),
                ago(image.published_at),
                if image.pinned { "yes" } else { "" }.to_owned(),
            ]
        };
        let head = ["REPOSITORY", "TAG", "IMAGE ID", "PLATFORM", "LAYERS", "SIZE", "PUBLISHED", "PINNED"];
        table(head, list.images.iter().map(row))
    })
}

/// Runs `cachefsctl image`.
pub(crate) async fn show(client: &Client, output: Output, name: &Name) -> anyhow::Result<()> {
    let mut detail = client.image(&name.image).await?;
    if output == Output::Text {
        // The config is not shown to people, and not every config that a registry has can be parsed here.
        detail.config_document = RawValue::NULL.to_owned();
    }
    output.print(&detail, |detail: &ImageDetail| {
        let image = &detail.image;
        let layers = detail.layers_detail.iter().map(|layer| {
            [layer.diff_id.clone(), size(layer.size), size(layer.compressed_size), layer.media_type.clone()]
        });
        let history = detail.history.iter().map(|version| [version.manifest.clone(), ago(version.published_at)]);
        format!(
            "Name:      {}\nManifest:  {}\nImage ID:  {}\nPlatform:  {}\nSize:      {} ({} compressed)\nPublished: {} ({})\n\n{}\n{}",
            image.name,
            image.manifest,
            image.config,
            image.platform,
            size(image.size),
            size(image.compressed_size),
            image.published_at,
            ago(image.published_at),
            table(["LAYER (DIFF ID)", "SIZE", "COMPRESSED", "MEDIA TYPE"], layers),
            table(["POINTED TO", "SINCE"], history),
        )
    })
}

/// Runs `cachefsctl remove`.
pub(crate) async fn remove(client: &Client, output: Output, arguments: &Removal) -> anyhow::Result<()> {
    let forced = if arguments.force { Forced::Yes } else { Forced::No };
    let remove = async |name: &str| client.remove(name, forced).await;
    each(output, &arguments.images, remove, |image| format!("removed {}", image.name)).await
}

/// Runs `cachefsctl wait`.
pub(crate) async fn wait(client: &Client, output: Output, arguments: &Wait) -> anyhow::Result<()> {
    let absent = if arguments.pull { Absent::Pull } else { Absent::Wait };
    let end = Instant::now() + arguments.timeout.min(TIMEOUT_MAX);
    let wait = async || client.wait(&arguments.image, end.saturating_duration_since(Instant::now()), absent).await;
    let image = Patience::new(output, Bound::Until(end)).ask(wait).await?;
    output.print(&image, |image| format!("{} is published", image.name))
}
