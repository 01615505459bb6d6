//! A few dozen of the behaviours, pulled by a coordinator. Where the library pulls, the image gets into the store; else
//! there is a short error.

use anyhow::{Result, ensure};
use tests::registry::{Behaviour, Played, write_logins};
use tests::site::{Site, SiteSpec};

use crate::Stage;

/// First the fixed cases of public reports, then those that only a complete pull shows: layers, and images without layers.
const CASES: &[(&str, &str)] = &[
    ("place", "root, hidden 404"),
    ("place", "root, hidden 403"),
    ("redirect", "signed here"),
    ("redirect", "api"),
    ("redirect", "place of its own"),
    ("redirect", "signed exactly"),
    ("coding", "manifest gzip"),
    ("coding", "blob gzip"),
    ("coding", "blob said to be gzip"),
    ("document", "config untyped"),
    ("document", "config type absent"),
    ("document", "config json"),
    ("document", "config helm"),
    ("document", "no layers"),
    ("document", "null layers"),
    ("document", "index and image"),
    ("document", "key in another case"),
    ("document", "layer untyped"),
    ("document", "layer octet-stream"),
    ("document", "layer plain"),
    ("document", "layer zstd"),
    ("document", "layer foreign"),
    ("document", "layer foreign and absent"),
    ("document", "size absent"),
    ("document", "size too small"),
    ("document", "size too large"),
    ("document", "size negative"),
    ("document", "config size too small"),
    ("document", "index with sizes absent"),
    ("document", "schema 1 signed"),
    ("type", "absent"),
    ("type", "kind"),
    ("head", "405"),
    ("head", "501"),
    ("challenge", "bearer with another scope"),
    ("challenge", "negotiate; basic"),
    ("token", "post only"),
    ("token", "two requests long"),
    ("framing", "chunked"),
    ("framing", "cut"),
];

/// Pulls each case twice, because the second pull must verify what the store already has, and compares with the library.
pub(crate) fn compare(stage: &Stage) -> Result<()> {
    let site = Site::start_with(&SiteSpec { settings: "retry_attempts = 3\n".to_owned(), ..SiteSpec::default() })?;
    let behaviours: Vec<Behaviour> =
        CASES.iter().map(|(dimension, value)| Behaviour::good().with(dimension, value)).collect();
    let played: Vec<Played> = behaviours
        .iter()
        .enumerate()
        .map(|(number, behaviour)| Played::start(behaviour, number as u64, &stage.tls))
        .collect::<Result<_>>()?;
    let logins: Vec<_> = played.iter().map(Played::address).zip(&behaviours).collect();
    write_logins(&site.path().join("state-docker/config.json"), &logins)?;
    for (number, (behaviour, played)) in behaviours.iter().zip(&played).enumerate() {
        let library = stage.ours(number, behaviour)?.outcome;
        for _ in 0..2 {
            let pulled = site.ctl().run(&["pull", &played.reference()])?;
            let said = format!("{behaviour}: {:?} by the library, {} {}", library, pulled.code, pulled.stderr);
            ensure!(pulled.succeeded() == library.is_pulled(), "{said} {:#?}", played.log());
            ensure!(pulled.succeeded() || pulled.stderr.trim_end().lines().count() <= 3, "{said}");
        }
    }
    Ok(())
}
