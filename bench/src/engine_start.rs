//! How long until a container that Docker 28 starts does useful work: with an image of the share that this host has never
//! seen, against the same engine's own pull and run?
//!
//! Both image stores are measured: overlay2 with a prepared data-root, and containerd's with the snapshotter. The share has a
//! profile of the image. Each start on the share has an empty local cache; each pull starts without any image. Share and
//! registry transfer the same number of bytes a second; the page cache of the whole machine is dropped before each start.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use rand::seq::SliceRandom;
use serde_json::json;
use tempfile::TempDir;
use tests::cluster::{Mount, MountSpec, binary};
use tests::containerd::Snapshotter;
use tests::containerd_store::ContainerdStore;
use tests::docker::{Docker, DockerSpec};
use tests::engine_tree::EngineTree;
use tests::images::{self, ImageFiles};
use tests::mounts::SharedDirectory;
use tests::process::run as run_command;
use tests::registry::Registry;

use crate::application::{self, Application};
use crate::cold_start::share::{Share, Store};
use crate::engine_run::{self, Pull};
use crate::quantity;
use crate::report::{Bar, Bound, Report};
use crate::samples::Samples;
use crate::throttle::Throttle;

/// What is measured.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How often each way is measured
    #[arg(long, default_value_t = 5)]
    samples: usize,
    /// The slow disk's latency
    #[arg(long, default_value = "5ms", value_parser = quantity::duration)]
    latency: Duration,
    /// Bytes a second, of the slow disk and of the way to the registry
    #[arg(long, default_value = "100M", value_parser = quantity::rate)]
    bandwidth: u64,
    /// Which images: bash, python3, nginx, redis, gcc, nodejs
    #[arg(long, value_delimiter = ',', default_value = "python3,nginx")]
    images: Vec<String>,
}

/// A way of starting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    OwnOverlay2,
    DataRoot,
    OwnContainerd,
    Snapshotter,
}

impl Way {
    const ALL: [Way; 4] = [Way::OwnOverlay2, Way::DataRoot, Way::OwnContainerd, Way::Snapshotter];

    fn name(self) -> &'static str {
        match self {
            Way::OwnOverlay2 => "overlay2, pull + run",
            Way::DataRoot => "overlay2, run on the share",
            Way::OwnContainerd => "containerd, pull + run",
            Way::Snapshotter => "containerd, pull + run on the share",
        }
    }
}

/// A host of the share whose cache can be emptied.
struct Host {
    mount: Option<Mount>,
    spec: MountSpec,
    _shared: SharedDirectory,
    directory: TempDir,
}

impl Host {
    fn start(share: &Share) -> Result<Host> {
        let directory = tempfile::Builder::new().prefix("host-").tempdir()?;
        let shared = SharedDirectory::new(directory.path())?;
        let spec = share.host(Store::Trained, directory.path())?;
        Ok(Host { mount: Some(Mount::start(spec.clone())?), spec, _shared: shared, directory })
    }

    fn path(&self) -> &Path {
        &self.spec.mountpoint
    }

    /// Mounts the store again with an empty cache that knows the engine's directory.
    fn forget(&mut self) -> Result<()> {
        self.mount = None;
        for entry in std::fs::read_dir(&self.spec.cache)? {
            let path = entry?.path();
            let is_list = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("data-roots"));
            match path.is_dir() {
                true => std::fs::remove_dir_all(path)?,
                false if is_list => {}
                false => std::fs::remove_file(path)?,
            }
        }
        self.mount = Some(Mount::start(self.spec.clone())?);
        Ok(())
    }
}

/// The engines, each with one way of starting. Dropped before the hosts that they stand on.
struct Engines {
    own_overlay2: Docker,
    own_containerd: ContainerdStore,
    data_root: Docker,
    on_snapshotter: ContainerdStore,
    _snapshotter: Snapshotter,
    data_root_host: Host,
    snapshotter_host: Host,
    throttle: Throttle,
    _registry: Registry,
}

impl Engines {
    fn start(share: &Share, bandwidth: u64, all: &[ImageFiles]) -> Result<Engines> {
        let tree = EngineTree::of("sid")?;
        let registry = Registry::start()?;
        for image in all {
            registry.push(image, &image.name, "bench")?;
        }
        let throttle = Throttle::start(&registry.address(), bandwidth)?;
        let engine = Some(tree.clone());
        let mut own_overlay2 = Docker::start_with(DockerSpec { engine: engine.clone(), ..DockerSpec::default() })?;
        own_overlay2.forward(throttle.address())?;
        let mut own_containerd = ContainerdStore::start_plain(&tree)?;
        own_containerd.forward(throttle.address())?;
        let data_root_host = Host::start(share)?;
        let data = data_root_host.directory.path().join("docker");
        std::fs::create_dir(&data)?;
        let mut init = Command::new(binary("cachefs")?);
        init.args(["data-root", "init"]).arg(&data).arg("--mount").arg(data_root_host.path());
        run_command(&mut init)?.ok()?;
        let data_root = Docker::start_with(DockerSpec { engine, data_root: Some(data), ..DockerSpec::default() })?;
        let snapshotter_host = Host::start(share)?;
        let snapshotter = Snapshotter::start(snapshotter_host.directory.path(), snapshotter_host.path())?;
        let mut on_snapshotter = ContainerdStore::start(&tree, &snapshotter)?;
        on_snapshotter.forward(throttle.address())?;
        Ok(Engines {
            own_overlay2,
            own_containerd,
            data_root,
            on_snapshotter,
            _snapshotter: snapshotter,
            data_root_host,
            snapshotter_host,
            throttle,
            _registry: registry,
        })
    }

    fn sample(&mut self, way: Way, application: &Application) -> Result<f64> {
        let pulled = format!("{}/{}:bench", self.throttle.address(), application.image);
        let prune = ["system", "prune", "--all", "--force"];
        match way {
            Way::OwnOverlay2 => {
                self.own_overlay2.ok(&prune)?;
                engine_run::seconds(|arguments| self.own_overlay2.ok(arguments), &pulled, application, Pull::First)
            }
            Way::OwnContainerd => {
                self.own_containerd.ok(&prune)?;
                engine_run::seconds(|arguments| self.own_containerd.ok(arguments), &pulled, application, Pull::First)
            }
            Way::DataRoot => {
                self.data_root_host.forget()?;
                let here = format!("{}:latest", application.image);
                engine_run::seconds(|arguments| self.data_root.ok(arguments), &here, application, Pull::No)
            }
            Way::Snapshotter => {
                self.on_snapshotter.ok(&prune)?;
                self.snapshotter_host.forget()?;
                engine_run::seconds(|arguments| self.on_snapshotter.ok(arguments), &pulled, application, Pull::First)
            }
        }
    }
}

/// Measures every image.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let mut report = Report::new("engine-start", vec!["image", "way", "s (p95)", "/ the engine's own"]);
    let mut share = Share::start(&[], 1024)?;
    let mut all = Vec::new();
    for name in &options.images {
        let image = images::image(name)?;
        share.add(&image)?;
        share.train(&image, application::of(name)?)?;
        if let Some(why) = share.untrained(name) {
            anyhow::bail!("{name} has no profile: {why}");
        }
        all.push(image);
    }
    let mut engines = Engines::start(&share, options.bandwidth, &all)?;
    share.slow_down(options.latency, options.bandwidth)?;
    for image in &all {
        let application = application::of(&image.name)?;
        let mut cells: Vec<(Way, Samples)> = Way::ALL.iter().map(|way| (*way, Samples::default())).collect();
        for _ in 0..options.samples {
            cells.shuffle(&mut rand::rng());
            for (way, samples) in &mut cells {
                let seconds = engines.sample(*way, application)?;
                eprintln!("{}, {}: {seconds:.3} s", image.name, way.name());
                samples.add(seconds);
            }
        }
        let of = |way: Way| cells.iter().find(|(other, _)| *other == way).map(|(_, samples)| samples);
        for way in Way::ALL {
            let own =
                if matches!(way, Way::OwnOverlay2 | Way::DataRoot) { Way::OwnOverlay2 } else { Way::OwnContainerd };
            let (samples, own) = (of(way).context("no samples")?, of(own).context("no samples")?);
            let ratio = samples.median() / own.median();
            let p95 = samples.quantile(0.95);
            let seconds = format!("{:.3} ({p95:.3})", samples.median());
            report.row(vec![image.name.clone(), way.name().to_owned(), seconds, format!("{ratio:.2}")]);
            let chart = format!("{} start by Docker 28, s", image.name);
            report.bar(Bar::new(chart, way.name(), samples.median()).p95(p95));
            report.add_samples(&format!("{}, {}", image.name, way.name()), json!({ "seconds": samples }));
            if matches!(way, Way::DataRoot | Way::Snapshotter) {
                report.target(format!("{}: {} / its own", image.name, way.name()), ratio, Bound::AtMost(0.1));
            }
        }
    }
    Ok(report)
}
