//! What all ways of starting share: one slow disk with four stores and plain trees on it.
//!
//! The store `plain` has only the images. The coordinator of the store `guessed` has made a guess at what each of them
//! needs. In the store `trained`, each application was started once by a host that is gone now, so that the coordinator
//! could learn from it. In the store `inherited` as well, and then each image's next build was published, which nobody
//! has started. The trees are the images' merged roots, unpacked.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::TempDir;
use tests::cluster::{Mount, MountSpec};
use tests::images::ImageFiles;
use tests::images::archive::{Archive, Header, Kind};
use tests::process::{run, wait_until};
use tests::site::{Site, SiteSpec};
use tests::slowdisk::SlowDisk;
use tests::{hosts, slowdisk};

use crate::application::Application;
use crate::{own_layers, slowdisk as server, start};

/// How long a coordinator may take to build a profile from a start.
const LEARNING: Duration = Duration::from_secs(60);
/// The disk's latency while nothing is measured.
const QUICK: Duration = Duration::from_micros(50);

/// The slow disk and everything on it.
pub(crate) struct Share {
    disk: SlowDisk,
    plain: Site,
    guessed: Site,
    trained: Site,
    inherited: Site,
    /// The top chainIDs of the next builds.
    next: HashMap<String, String>,
    /// For images without a profile: why there is none.
    untrained: HashMap<&'static str, String>,
    /// The images' layers on the local disk, base first.
    layers: HashMap<String, Vec<PathBuf>>,
    arguments: Vec<String>,
    /// How far the kernel reads ahead on the disk.
    read_ahead_kib: u32,
    directory: TempDir,
}

/// Which of the stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Store {
    Plain,
    Guessed,
    Trained,
    Inherited,
}

impl Share {
    /// Starts with an empty disk; hosts get these additional arguments.
    pub(crate) fn start(arguments: &[String], read_ahead_kib: u32) -> Result<Share> {
        let directory = tempfile::Builder::new().prefix("cold-start-").tempdir()?;
        let behind = directory.path().join("behind");
        fs::create_dir_all(behind.join("trees"))?;
        fs::create_dir_all(directory.path().join("layers"))?;
        let site = |name: &str, guesses: bool| -> Result<Site> {
            let place = tempfile::Builder::new().prefix(name).tempdir_in(&behind)?;
            fs::create_dir(place.path().join("store"))?;
            Site::start_in(place, &SiteSpec { guesses, ..SiteSpec::default() })
        };
        let (plain, guessed) = (site("plain-", false)?, site("guessed-", true)?);
        let (trained, inherited) = (site("trained-", false)?, site("inherited-", false)?);
        let disk = SlowDisk::start(&behind, &directory.path().join("share"), QUICK, None)?;
        server::read_ahead(disk.path(), read_ahead_kib)?;
        let arguments = arguments.to_vec();
        Ok(Share {
            disk,
            plain,
            guessed,
            trained,
            inherited,
            next: HashMap::new(),
            untrained: HashMap::new(),
            layers: HashMap::new(),
            arguments,
            read_ahead_kib,
            directory,
        })
    }

    pub(crate) fn disk(&self) -> &SlowDisk {
        &self.disk
    }

    /// Makes the disk slow for a measurement.
    pub(crate) fn slow_down(&self, latency: Duration, bandwidth: u64) -> Result<()> {
        self.disk.set_latency(latency)?;
        self.disk.set_bandwidth(Some(bandwidth))
    }

    /// Makes the disk fast again for work that is not measured.
    pub(crate) fn speed_up(&self) -> Result<()> {
        self.disk.set_latency(QUICK)?;
        self.disk.set_bandwidth(None)
    }

    /// The layers of an image on the local disk, base first.
    pub(crate) fn layers(&self, image: &str) -> &[PathBuf] {
        self.layers.get(image).map_or(&[], Vec::as_slice)
    }

    /// The merged tree of an image, behind the slow disk.
    fn tree(&self, image: &str) -> PathBuf {
        self.directory.path().join("behind/trees").join(image)
    }

    /// The merged tree of an image on the slow disk.
    pub(crate) fn slow_tree(&self, image: &str) -> PathBuf {
        self.disk.path().join("trees").join(image)
    }

    /// The mount of a new host over the slow disk, with its files below `directory`.
    pub(crate) fn host(&self, store: Store, directory: &Path) -> Result<MountSpec> {
        let site = match store {
            Store::Plain => &self.plain,
            Store::Guessed => &self.guessed,
            Store::Inherited => &self.inherited,
            Store::Trained => &self.trained,
        };
        let behind = self.directory.path().join("behind");
        let path = self.disk.path().join(site.store().strip_prefix(behind)?);
        let mut spec = MountSpec::new(directory, &path);
        spec.arguments.clone_from(&self.arguments);
        if matches!(store, Store::Trained | Store::Inherited) {
            spec.coordinator = Some(site.ctl().server);
        }
        Ok(spec)
    }

    /// Why there is no profile of this image, if there is none.
    pub(crate) fn untrained(&self, image: &str) -> Option<&str> {
        self.untrained.get(image).map(String::as_str)
    }

    /// Brings an image into all stores, unpacks its tree on the slow disk and its layers on the local one.
    pub(crate) fn add(&mut self, image: &ImageFiles) -> Result<()> {
        self.speed_up()?;
        for site in [&self.plain, &self.guessed, &self.trained, &self.inherited] {
            hosts::load(site, image)?;
        }
        let scratch = tempfile::tempdir()?;
        let mount = Mount::start(MountSpec::new(scratch.path(), &self.plain.store()))?;
        let top = image.chain_ids().pop().context("an image without layers")?;
        let tree = self.tree(&image.name);
        fs::create_dir(&tree)?;
        let source = mount.chain(&top).join(".");
        run(Command::new("cp").arg("-a").arg(source).arg(&tree))?.ok()?;
        let layers = own_layers::copy(&mount, image, &self.directory.path().join("layers"))?;
        self.layers.insert(image.name.clone(), layers);
        Ok(())
    }

    /// Lets a host start the application once on each store that learns, waits for the profiles, and publishes the next
    /// build. Remembers the reason when there is no profile.
    pub(crate) fn train(&mut self, image: &ImageFiles, application: &Application) -> Result<()> {
        let top = image.chain_ids().pop().context("an image without layers")?;
        // The hosts send their traces while the profiles are waited for.
        let mut hosts_alive = Vec::new();
        for store in [Store::Trained, Store::Inherited] {
            let scratch = tempfile::tempdir()?;
            let mount = Mount::start(self.host(store, scratch.path())?)?;
            start::seconds(&[mount.tree(&top)], application)?;
            hosts_alive.push((mount, scratch));
        }
        let name = format!("{}:latest", image.name);
        let learned = [&self.trained, &self.inherited, &self.guessed].map(|site| wait_for_profile(site, &name));
        let mut tar = Archive::new(Vec::new());
        tar.add(&Header::new(Kind::File, "release").mode(0o644), "2")?;
        let next = image.next_build(&tar.finish()?, &self.directory.path().join("next").join(&image.name))?;
        hosts::load(&self.inherited, &next)?;
        self.next.insert(image.name.clone(), next.chain_ids().pop().context("an image without layers")?);
        let inherits = wait_for_profile(&self.inherited, &name);
        if let Some(why) = learned.into_iter().chain([inherits]).find_map(Result::err) {
            self.untrained.insert(application.image, format!("{why:#}"));
        }
        Ok(())
    }

    /// The top chainID of an image's next build.
    pub(crate) fn next(&self, image: &str) -> Option<&str> {
        self.next.get(image).map(String::as_str)
    }

    /// Bytes of the pages that a start touches: what it reads through the slow disk while the kernel's read-ahead is off.
    pub(crate) fn touched(&self, application: &Application) -> Result<u64> {
        self.speed_up()?;
        server::read_ahead(self.disk.path(), 0)?;
        start::make_cold()?;
        self.disk.reset()?;
        let started = start::seconds(&[self.slow_tree(application.image)], application);
        let stats: slowdisk::DiskStats = self.disk.stats()?;
        server::read_ahead(self.disk.path(), self.read_ahead_kib)?;
        started.map(|_| stats.bytes_read)
    }
}

/// Waits until the coordinator of a site has a startup pack for an image.
fn wait_for_profile(site: &Site, name: &str) -> Result<()> {
    wait_until(&format!("a startup pack of {name}"), LEARNING, || {
        let output = site.ctl().run(&["--json", "profile", name])?;
        if output.code == 2 {
            anyhow::bail!("this cachefsctl has no command `profile`");
        }
        let profile: serde_json::Value = serde_json::from_str(&output.stdout).unwrap_or_default();
        Ok(profile["pack"].is_string())
    })
}
