//! The coordinator receives an archive: a `docker save` tar, or the directory of an OCI layout.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use store::crash::CrashPoint;
use tests::images::{ImageFiles, small};
use tests::registry::Registry;
use tests::site::Site;

use super::{LONG, deep_check, doom, tidy_check, work_until_death};

/// The points before the client is told that there is a job.
const UNPROMISED: [CrashPoint; 3] = [CrashPoint::UploadArriving, CrashPoint::UploadSpooled, CrashPoint::UploadOpened];

/// Dies once while loading, for each kind of archive.
pub(crate) fn die(_: &Registry, point: CrashPoint, nth: u32) -> Result<bool> {
    let image = small()?;
    let saved = die_with(&image, &image.docker_archive()?, point, nth).context("docker save")?;
    let layout = die_with(&image, &image.oci, point, nth).context("OCI layout")?;
    Ok(saved || layout)
}

fn die_with(image: &ImageFiles, archive: &Path, point: CrashPoint, nth: u32) -> Result<bool> {
    let (mut site, archive) = (Site::start()?, archive.to_string_lossy());
    let mut doomed = doom(&mut site, point, nth)?;
    let died = work_until_death(&site, &mut doomed, &["load", &archive], None)?;
    if died {
        ensure!(spools(&mut site)?.len() == 1, "it was to die while the archive is there");
    }
    site.coordinator().restart()?;
    deep_check(&site).context("after the crash")?;
    let jobs = site.ctl().json(&["jobs"])?;
    let jobs = jobs["jobs"].as_array().context("no list of jobs")?.len();
    ensure!(jobs == usize::from(!died || !UNPROMISED.contains(&point)), "{jobs} jobs");
    if jobs == 0 {
        ensure!(spools(&mut site)?.is_empty(), "{:?} is left of the upload", spools(&mut site)?);
        tidy_check(&site).context("after an upload that nobody was told of")?;
        ensure!(site.layers()?.is_empty() && site.files("packs")?.is_empty(), "there is content without a job");
        site.ctl().ok(&["load", &archive]).context("once more")?;
    }
    // If there is a job, nobody sends the archive again: the coordinator has it.
    site.wait_for_job("small:latest", &["published"], LONG)?;
    ensure!(site.ctl().json(&["image", "small"])?["config"] == image.config.digest, "another image");
    tests::process::wait_until("the archive's end", LONG, || Ok(spools(&mut site)?.is_empty()))?;
    tidy_check(&site).context("after the load")?;
    Ok(died)
}

/// The archives that the coordinator has spooled.
fn spools(site: &mut Site) -> Result<Vec<String>> {
    let directory = site.coordinator().spec().state.join("spool");
    let entries = std::fs::read_dir(&directory).with_context(|| format!("cannot list {}", directory.display()))?;
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}
