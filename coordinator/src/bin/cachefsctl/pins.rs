//! `pin`, `unpin`, `pins`: names that only a person can remove.

use clap::Args;
use coordinator_api::Client;
use coordinator_api::retention::{Pin, PinList};

use crate::output::{Output, ago, table};

/// One name.
#[derive(Args)]
pub(crate) struct Name {
    /// The image, as docker pull takes it
    image: String,
}

/// Runs `cachefsctl pin`.
pub(crate) async fn pin(client: &Client, output: Output, name: &Name) -> anyhow::Result<()> {
    output.print(&client.pin(&name.image).await?, |pin: &Pin| {
        let absent = if pin.present { "" } else { "; it is not in the store yet" };
        format!("pinned {}{absent}", pin.name)
    })
}

/// Runs `cachefsctl unpin`.
pub(crate) async fn unpin(client: &Client, output: Output, name: &Name) -> anyhow::Result<()> {
    output.print(&client.unpin(&name.image).await?, |pin: &Pin| format!("unpinned {}", pin.name))
}

/// Runs `cachefsctl pins`.
pub(crate) async fn list(client: &Client, output: Output) -> anyhow::Result<()> {
    output.print(&client.pins().await?, |list: &PinList| {
        let present = |pin: &Pin| if pin.present { "yes" } else { "no" }.to_owned();
        let rows = list.pins.iter().map(|pin| [pin.name.clone(), ago(pin.since), present(pin)]);
        table(["NAME", "PINNED", "IN THE STORE"], rows)
    })
}
