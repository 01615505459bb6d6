//! The coordinator starts, and pulls an image from a registry.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use store::crash::CrashPoint;
use tests::images::{ImageFiles, Layer, hex, small};
use tests::registry::Registry;
use tests::site::Site;

use super::{LONG, deep_check, doom, work_until_death};

/// How often each layer's blob was fetched.
pub(crate) fn fetches(registry: &Registry, image: &ImageFiles) -> BTreeMap<String, usize> {
    let count = |layer: &Layer| (layer.diff_id.clone(), registry.blob_fetches(&layer.blob.digest));
    image.layers.iter().map(count).collect()
}

/// Dies once while pulling, and then completes the pull.
pub(crate) fn die(registry: &Registry, point: CrashPoint, nth: u32) -> Result<bool> {
    let (image, mut site) = (small()?, Site::start()?);
    let reference = registry.push(&image, "small", "1")?;
    let before = fetches(registry, &image);
    let mut doomed = doom(&mut site, point, nth)?;
    let died = work_until_death(&site, &mut doomed, &["pull", &reference], None)?;
    let safe = site.layers()?;
    site.coordinator().restart()?;
    deep_check(&site).context("after the crash")?;
    let jobs = site.ctl().json(&["jobs"])?;
    if jobs["jobs"].as_array().is_some_and(|jobs| !jobs.is_empty()) {
        site.ctl().ok(&["wait", &reference, "--timeout", "60s"])?
    } else {
        site.ctl().ok(&["pull", &reference])?
    };
    site.wait_for_job(&reference, &["published"], LONG)?;
    deep_check(&site).context("after the pull")?;
    ensure!(site.staged()?.is_empty(), "staging holds {:?}", site.staged()?);
    let detail = site.ctl().json(&["image", &reference])?;
    ensure!(detail["config"] == image.config.digest, "{reference} is {detail}");
    for (diff_id, count) in fetches(registry, &image) {
        let count = count - before[&diff_id];
        let was_safe = safe.iter().any(|layer| layer == hex(&diff_id));
        ensure!(count == 1 || (!was_safe && count <= 2), "layer {diff_id} was fetched {count} times, safe: {was_safe}");
    }
    Ok(died)
}
