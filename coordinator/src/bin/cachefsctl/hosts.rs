//! `hosts`: the hosts that mount the store, with their caches.

use coordinator_api::Client;
use coordinator_api::host::{Host, HostList};

use crate::output::{Output, ago, size, table};

/// Images that are listed by name; further ones are counted.
const NAMED: usize = 3;

/// Runs `cachefsctl hosts`.
pub(crate) async fn list(client: &Client, output: Output) -> anyhow::Result<()> {
    output.print(&client.hosts().await?, |list: &HostList| {
        let row = |host: &Host| {
            let report = &host.report;
            [
                host.name.clone(),
                report.version.clone(),
                images(&report.images),
                host.layers_held.max(report.layers.len() as u64).to_string(),
                format!("{} / {}", size(report.cache_used), size(report.cache_limit)),
                host.hit_ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{:.1} %", ratio * 100.0)),
                ago(host.last_seen_at),
                host.state.to_string(),
            ]
        };
        let head = ["NAME", "VERSION", "IMAGES", "LAYERS", "CACHE", "HIT RATIO", "LAST SEEN", "STATE"];
        if list.hosts.is_empty() {
            "No host has registered: mount with cachefs mount --coordinator URL.".to_owned()
        } else {
            table(head, list.hosts.iter().map(row))
        }
    })
}

fn images(names: &[String]) -> String {
    let named = names.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    match names.len().checked_sub(NAMED) {
        _ if names.is_empty() => "-".to_owned(),
        Some(more) if more > 0 => format!("{named} and {more} more"),
        _ => named,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_images_are_counted() {
        let names = |n: usize| (0..n).map(|n| format!("i{n}")).collect::<Vec<_>>();
        assert_eq!(images(&names(0)), "-");
        assert_eq!(images(&names(3)), "i0, i1, i2");
        assert_eq!(images(&names(5)), "i0, i1, i2 and 2 more");
    }
}
