//! The coordinator collects an image that a retention rule has removed: its layer goes, and so does most of a pack that
//! another image shares. It also pulls that image again, which restores the pack.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use store::crash::CrashPoint;
use tests::images::archive::{Archive, Header, Kind};
use tests::images::{Compression, ImageBuilder, ImageFiles, Pools, oddities};
use tests::process::{TIMEOUT, wait_until};
use tests::registry::Registry;
use tests::site::{Site, SiteSpec};

use super::{deep_check, doom, work_until_death};

/// An image with one layer, which holds a file of noise for each seed.
fn noisy(pools: &Pools, directory: &Path, name: &str, seeds: std::ops::Range<u64>) -> Result<ImageFiles> {
    let mut tar = Archive::new(Vec::new());
    for seed in seeds {
        tar.add(&Header::new(Kind::File, format!("{name}-{seed}")), oddities::noise(seed, 300_000))?;
    }
    let layer = pools.layer(&tar.finish()?, Compression::Gzip)?;
    ImageBuilder::new(name).layer(layer).build(pools, &directory.join(name))
}

/// A site with two images that share a pack. Most of the pack belongs to the image that a retention rule removes.
struct Shared {
    site: Site,
    gone: String,
    _directory: tempfile::TempDir,
}

const COLLECT: [&str; 3] = ["gc", "--grace", "0s"];

impl Shared {
    fn start(registry: &Registry) -> Result<Shared> {
        let directory = tempfile::tempdir()?;
        let pools = Pools::open(directory.path())?;
        let settings = "host_lease = '1s'\n".to_owned();
        let site = Site::start_with(&SiteSpec { settings, ..SiteSpec::default() })?;
        let gone = registry.push(&noisy(&pools, directory.path(), "gone", 1..9)?, "gone", "1")?;
        let kept = registry.push(&noisy(&pools, directory.path(), "kept", 8..11)?, "kept", "1")?;
        site.ctl().ok(&["pull", &gone])?;
        site.ctl().ok(&["pull", &kept])?;
        let wish = format!("retention: {{rules: [{{pattern: '{gone}', keep_last: 0}}]}}\n");
        let file = directory.path().join("wish.yaml");
        std::fs::write(&file, wish)?;
        site.ctl().ok(&["apply", &file.to_string_lossy()])?;
        Ok(Shared { site, gone, _directory: directory })
    }

    /// Waits until the current leader knows all hosts.
    fn wait_for_hosts(&self) -> Result<()> {
        let known = || Ok(self.site.ctl().json(&["gc", "--dry-run"])?["waiting"].is_null());
        wait_until("all hosts to be known", TIMEOUT, known)
    }

    /// Checks that nothing is left to collect and that most of the image's space was freed.
    fn check_collected(&self) -> Result<()> {
        deep_check(&self.site)?;
        let rest = self.site.ctl().json(&["gc", "--dry-run", "--grace", "0s"])?;
        ensure!(rest["items"].as_array().is_some_and(Vec::is_empty), "there is something left to collect: {rest}");
        let room = rest["store_bytes"].as_u64().unwrap_or(u64::MAX);
        ensure!(room < 1_300_000, "{room} bytes are left of an image of 900,000");
        Ok(())
    }
}

/// Dies once during a collection.
pub(crate) fn die(registry: &Registry, point: CrashPoint, nth: u32) -> Result<bool> {
    let mut shared = Shared::start(registry)?;
    let mut doomed = doom(&mut shared.site, point, nth)?;
    shared.wait_for_hosts()?;
    let died = work_until_death(&shared.site, &mut doomed, &COLLECT, None)?;
    shared.site.coordinator().restart()?;
    deep_check(&shared.site).context("after the crash")?;
    shared.wait_for_hosts()?;
    shared.site.ctl().ok(&COLLECT).context("the collection, once more")?;
    shared.check_collected().context("after the collection")?;
    // The collected image can be pulled again completely, and shares what is still there.
    shared.site.ctl().ok(&["pull", &shared.gone])?;
    deep_check(&shared.site).context("after pulling it again")?;
    Ok(died)
}

/// Dies once while the image is pulled again into a thinned pack.
pub(crate) fn die_refilling(registry: &Registry, point: CrashPoint, nth: u32) -> Result<bool> {
    let mut shared = Shared::start(registry)?;
    shared.wait_for_hosts()?;
    shared.site.ctl().ok(&COLLECT)?;
    let records = |site: &Site| -> Result<usize> {
        let files = site.files("packs")?;
        Ok(files.iter().filter(|path| path.extension().is_some_and(|suffix| suffix == "thinned")).count())
    };
    ensure!(records(&shared.site)? == 1, "a pack was to be thinned");
    // Without its database the coordinator does not know where pieces are, so the layer brings all of them again, in
    // the same pack as before.
    shared.site.coordinator().stop()?;
    std::fs::remove_dir_all(&shared.site.coordinator().spec().state)?;
    let mut doomed = doom(&mut shared.site, point, nth)?;
    let died = work_until_death(&shared.site, &mut doomed, &["pull", &shared.gone], None)?;
    shared.site.coordinator().restart()?;
    deep_check(&shared.site).context("after the crash")?;
    shared.site.ctl().ok(&["pull", &shared.gone])?;
    ensure!(records(&shared.site)? == 0, "the pack is whole again, and its record says that it is thin");
    deep_check(&shared.site).context("after pulling it again")?;
    Ok(died)
}
