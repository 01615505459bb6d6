//! The ways of starting an application, and one measured start of each.

use std::path::PathBuf;

use anyhow::{Context, Result};
use tempfile::TempDir;
use tests::cluster::{Mount, MountSpec};
use tests::docker::Docker;
use tests::hosts;
use tests::images::ImageFiles;
use tests::registry::Registry;
use tests::slowdisk::Asked;

use super::share::{Share, Store};
use crate::application::Application;
use crate::engine_run::{self, Pull};
use crate::start;
use crate::throttle::Throttle;

/// A way of starting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, clap::ValueEnum)]
pub(crate) enum Way {
    /// docker pull, then docker run
    Docker,
    /// An overlay straight on the plain tree on the slow disk
    Naive,
    /// cachefs, empty local cache, no profile
    Cold,
    /// cachefs, empty local cache, an image that nobody has started: with a guess
    Guess,
    /// cachefs, empty local cache, a new build of an image with a profile
    NextBuild,
    /// cachefs, empty local cache, with a profile
    Profile,
    /// cachefs, full local cache, page cache dropped
    Local,
    /// cachefs, once more
    Warm,
    /// An overlay of the image's own layers on the local disk, page cache dropped
    NativeCold,
    /// An overlay of the image's own layers on the local disk, once more
    NativeWarm,
}

impl Way {
    /// The name shown in tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Way::Docker => "docker pull + run",
            Way::Naive => "naive share",
            Way::Cold => "cachefs cold",
            Way::Guess => "cachefs cold, guess",
            Way::NextBuild => "cachefs cold, next build",
            Way::Profile => "cachefs cold, profile",
            Way::Local => "cachefs local",
            Way::Warm => "cachefs warm",
            Way::NativeCold => "native cold",
            Way::NativeWarm => "native warm",
        }
    }
}

/// What one start cost.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Cost {
    pub(super) seconds: f64,
    pub(super) registry_bytes: u64,
    pub(super) registry_requests: u64,
    pub(super) disk_bytes: u64,
    pub(super) disk_requests: u64,
    pub(super) cache_bytes: u64,
}

/// A dockerd, and a registry whose answers reach it at the shared disk's bandwidth.
pub(super) struct Engine {
    docker: Docker,
    throttle: Throttle,
    registry: Registry,
}

impl Engine {
    pub(super) fn start(bandwidth: u64) -> Result<Engine> {
        let registry = Registry::start()?;
        let throttle = Throttle::start(&registry.address(), bandwidth)?;
        let mut docker = Docker::start()?;
        docker.forward(throttle.address())?;
        Ok(Engine { docker, throttle, registry })
    }

    pub(super) fn add(&self, image: &ImageFiles) -> Result<()> {
        self.registry.push(image, &image.name, "bench").map(drop)
    }

    fn sample(&self, application: &Application) -> Result<Cost> {
        // Removes all images, so that no layer is left from another image.
        self.docker.ok(&["image", "prune", "--all", "--force"])?;
        let before = self.registry.accesses().len();
        let reference = format!("{}/{}:bench", self.throttle.address(), application.image);
        let docker = |arguments: &[&str]| self.docker.ok(arguments);
        let seconds = engine_run::seconds(docker, &reference, application, Pull::First)?;
        let accesses = self.registry.accesses();
        let asked = accesses.get(before..).unwrap_or_default();
        let registry_bytes = asked.iter().map(|access| access.bytes).sum();
        Ok(Cost { seconds, registry_bytes, registry_requests: asked.len() as u64, ..Cost::default() })
    }
}

/// A mounted host.
struct Host {
    mount: Mount,
    spec: MountSpec,
    _directory: TempDir,
}

impl Host {
    fn start(share: &Share, store: Store) -> Result<Host> {
        let directory = tempfile::Builder::new().prefix("host-").tempdir()?;
        let spec = share.host(store, directory.path())?;
        Ok(Host { mount: Mount::start(spec.clone())?, spec, _directory: directory })
    }
}

/// One image with everything that its starts need.
pub(super) struct Subject<'a> {
    share: &'a Share,
    engine: Option<&'a Engine>,
    application: &'static Application,
    /// The image's top chainID.
    top: String,
    /// The host whose local cache is full; mounted at the first use.
    full: Option<Host>,
}

impl<'a> Subject<'a> {
    pub(super) fn new(
        share: &'a Share,
        engine: Option<&'a Engine>,
        application: &'static Application,
        image: &ImageFiles,
    ) -> Result<Subject<'a>> {
        let top = image.chain_ids().pop().context("an image without layers")?;
        Ok(Subject { share, engine, application, top, full: None })
    }

    /// Measures one start.
    pub(super) fn sample(&mut self, way: Way) -> Result<Cost> {
        let image = self.application.image;
        match way {
            Way::Docker => self.engine.context("there is no engine")?.sample(self.application),
            Way::Naive => self.cold(&[self.share.slow_tree(image)]),
            Way::NativeCold => self.cold(self.share.layers(image)),
            Way::NativeWarm => {
                start::seconds(self.share.layers(image), self.application)?;
                self.measured(self.share.layers(image))
            }
            Way::Cold | Way::Guess | Way::NextBuild | Way::Profile => {
                let (store, top) = self.cold_store(way)?;
                let host = Host::start(self.share, store)?;
                start::make_cold()?;
                self.on(&host, &top)
            }
            Way::Local => {
                self.fill()?;
                start::make_cold()?;
                self.on(self.full.as_ref().context("no host")?, &self.top)
            }
            Way::Warm => {
                self.fill()?;
                let host = self.full.as_ref().context("no host")?;
                start::seconds(&[host.mount.tree(&self.top)], self.application)?;
                self.on(host, &self.top)
            }
        }
    }

    /// Where a cold start finds its image, and the image's top chainID.
    fn cold_store(&self, way: Way) -> Result<(Store, String)> {
        let next = || self.share.next(self.application.image).map(str::to_owned).context("there is no next build");
        Ok(match way {
            Way::Guess => (Store::Guessed, self.top.clone()),
            Way::NextBuild => (Store::Inherited, next()?),
            Way::Profile => (Store::Trained, self.top.clone()),
            _ => (Store::Plain, self.top.clone()),
        })
    }

    /// What one cold start on a new host asks of the shared disk.
    pub(super) fn timeline(&self, way: Way) -> Result<Vec<Asked>> {
        let (store, top) = self.cold_store(way)?;
        let host = Host::start(self.share, store)?;
        start::make_cold()?;
        self.share.disk().record()?;
        let started = start::seconds(&[host.mount.tree(&top)], self.application);
        let timeline = self.share.disk().timeline()?;
        started.map(|_| timeline)
    }

    /// Mounts the host that keeps its cache, and lets it fetch what a start needs.
    fn fill(&mut self) -> Result<()> {
        if self.full.is_none() {
            let host = Host::start(self.share, Store::Plain)?;
            // The second start fetches what the first one read only in part.
            for _ in 0..2 {
                start::make_cold()?;
                start::seconds(&[host.mount.tree(&self.top)], self.application)?;
            }
            self.full = Some(host);
        }
        Ok(())
    }

    fn cold(&self, lowers: &[PathBuf]) -> Result<Cost> {
        start::make_cold()?;
        self.measured(lowers)
    }

    fn measured(&self, lowers: &[PathBuf]) -> Result<Cost> {
        self.share.disk().reset()?;
        let seconds = start::seconds(lowers, self.application)?;
        let disk = self.share.disk().stats()?;
        Ok(Cost { seconds, disk_bytes: disk.bytes_read, disk_requests: disk.requests, ..Cost::default() })
    }

    fn on(&self, host: &Host, top: &str) -> Result<Cost> {
        let before = hosts::counter(&host.spec, "bytes_from_cache")?;
        let cost = self.measured(&[host.mount.tree(top)])?;
        let cache_bytes = hosts::counter(&host.spec, "bytes_from_cache")? - before;
        Ok(Cost { cache_bytes, ..cost })
    }
}
