//! One host: the mounted store of a site, and a data-root on top of it with its dockerd.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::cluster::{Mount, binary};
use tests::docker::{Docker, DockerSpec};
use tests::engine_tree::EngineTree;
use tests::hosts;
use tests::images::{ImageFiles, image};
use tests::mounts::SharedDirectory;
use tests::process::{Output, run};
use tests::site::{Site, SiteSpec};

/// Dropped in this order: dockerd, mount, coordinator and store.
pub(crate) struct Host {
    docker: Option<Docker>,
    pub(crate) mount: Mount,
    _shared: SharedDirectory,
    pub(crate) site: Site,
    pub(crate) data: PathBuf,
}

impl Host {
    /// A mounted site with these test images, and a prepared data-root. dockerd is not started yet.
    pub(crate) fn prepare(images: &[&str]) -> Result<Self> {
        let images = images.iter().map(|name| image(name)).collect::<Result<Vec<_>>>()?;
        Self::prepare_with(&images)
    }

    /// Like [`Host::prepare`], with images made by the test.
    pub(crate) fn prepare_with(images: &[ImageFiles]) -> Result<Self> {
        let host = Self::unprepared(images)?;
        host.init(&host.data)?.ok()?;
        Ok(host)
    }

    /// Like [`Host::prepare`], with trees of one kind.
    pub(crate) fn prepare_on(images: &[&str], kind: &str) -> Result<Self> {
        let images = images.iter().map(|name| image(name)).collect::<Result<Vec<_>>>()?;
        let host = Self::mounted(&images, |site| hosts::mount_trees(site, "a", kind))?;
        host.init(&host.data)?.ok()?;
        Ok(host)
    }

    /// Like [`Host::prepare_with`], but the data-root is an empty directory.
    pub(crate) fn unprepared(images: &[ImageFiles]) -> Result<Self> {
        Self::mounted(images, |site| hosts::mount(site, "a"))
    }

    fn mounted(images: &[ImageFiles], mount: impl FnOnce(&Site) -> Result<Mount>) -> Result<Self> {
        let site = Site::start_with(&SiteSpec { guesses: true, ..SiteSpec::default() })?;
        let shared = SharedDirectory::new(site.path())?;
        for image in images {
            hosts::load(&site, image)?;
        }
        let mount = mount(&site)?;
        let data = site.path().join("docker");
        std::fs::create_dir(&data)?;
        Ok(Self { docker: None, mount, _shared: shared, site, data })
    }

    /// A prepared host with a running dockerd. Containers outlive its restarts.
    pub(crate) fn start(images: &[&str]) -> Result<Self> {
        let mut host = Self::prepare(images)?;
        host.start_docker()?;
        Ok(host)
    }

    /// Starts dockerd on the data-root.
    pub(crate) fn start_docker(&mut self) -> Result<()> {
        self.start_docker_of(None)
    }

    /// Starts the dockerd of a tree on the data-root.
    pub(crate) fn start_docker_of(&mut self, engine: Option<EngineTree>) -> Result<()> {
        let data_root = Some(self.data.clone());
        let spec = DockerSpec { data_root, live_restore: true, engine, ..DockerSpec::default() };
        self.docker = Some(Docker::start_with(spec)?);
        Ok(())
    }

    /// The running dockerd.
    pub(crate) fn docker(&self) -> &Docker {
        self.docker.as_ref().expect("dockerd was started")
    }

    /// The running dockerd, mutable so that it can be stopped and restarted.
    pub(crate) fn docker_mut(&mut self) -> &mut Docker {
        self.docker.as_mut().expect("dockerd was started")
    }

    /// Runs `cachefs data-root init` on a directory and returns the output, also if it failed.
    pub(crate) fn init(&self, directory: &Path) -> Result<Output> {
        let mut command = data_root("init", directory)?;
        command.arg("--mount").arg(self.mount.path());
        run(&mut command)
    }

    /// Runs `cachefs data-root sync --json`.
    pub(crate) fn sync(&self, arguments: &[&str]) -> Result<Value> {
        json(data_root("sync", &self.data)?.args(arguments))
    }

    /// Runs `cachefs data-root status --json`, and checks that its exit code agrees with the document.
    pub(crate) fn status(&self) -> Result<Value> {
        let output = run(data_root("status", &self.data)?.arg("--json"))?;
        let status: Value = serde_json::from_str(&output.stdout).with_context(|| format!("no JSON: {output:?}"))?;
        let is_good =
            status["in_sync"] == true && status["restart_needed"] == false && status["mount_state"] == "serving";
        ensure!(output.code == i32::from(!is_good), "the exit code differs from the document: {output:?}");
        ensure!(output.stderr.contains("\"error\"") != is_good, "{output:?}");
        Ok(status)
    }

    /// Names and tags as `docker images` shows them, sorted.
    pub(crate) fn listed(&self) -> Result<Vec<String>> {
        let text = self.docker().ok(&["images", "--format", "{{.Repository}}:{{.Tag}}"])?;
        let mut names: Vec<_> = text.lines().map(str::to_owned).collect();
        names.sort();
        Ok(names)
    }

    /// Runs a shell in a new container of an image and returns its output. If it fails, the error quotes what it printed.
    pub(crate) fn shell(&self, image: &str, script: &str) -> Result<String> {
        self.docker().ok(&["run", "--rm", "--network", "none", image, "sh", "-c", script])
    }
}

/// The command `cachefs data-root VERB DIRECTORY`.
pub(crate) fn data_root(verb: &str, directory: &Path) -> Result<Command> {
    let mut command = Command::new(binary("cachefs")?);
    command.arg("data-root").arg(verb).arg(directory);
    Ok(command)
}

fn json(command: &mut Command) -> Result<Value> {
    let text = run(command.arg("--json"))?.ok()?;
    serde_json::from_str(&text).with_context(|| format!("`{command:?}` printed no JSON: {text}"))
}
