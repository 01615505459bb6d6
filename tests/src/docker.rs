//! A real dockerd in a network namespace of its own: this machine's 20.10, or a newer one from an [`EngineTree`]. Everything
//! that it owns is below one directory.
//!
//! Each dockerd gets its own namespace, because a dockerd started without a bridge deletes the bridge of another one.
//! The registries of the test listen on the host's loopback. [`Docker::forward`] makes them reachable inside under the
//! same address; Docker accepts plain HTTP there, since it is a loopback address.
//!
//! Dropping it stops everything by process id, unmounts what is below the directory, and removes the namespace.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::engine_tree::{EngineTree, EnteredTree};
use crate::images::ImageFiles;
use crate::namespace::{Forward, Namespace};
use crate::process::{Output, Process, TIMEOUT, run, wait_until};
use crate::{leftovers, mounts};

/// Debian's client. The path is fixed, because PATH may name another client first.
const CLIENT: &str = "/usr/bin/docker";
/// Debian's daemon.
const DAEMON: &str = "/usr/sbin/dockerd";

/// What a dockerd is started with.
#[derive(Debug, Clone, Default)]
pub struct DockerSpec {
    /// The data-root. Without one, dockerd gets a new directory that is removed with the [`Docker`].
    pub data_root: Option<PathBuf>,
    /// Whether containers outlive the daemon (`--live-restore`).
    pub live_restore: bool,
    /// More arguments of dockerd.
    pub arguments: Vec<String>,
    /// Environment of dockerd, such as `DOCKER_TMPDIR`.
    pub environment: Vec<(String, String)>,
    /// Where dockerd comes from, if it is not this machine's. The client is this machine's in any case.
    pub engine: Option<EngineTree>,
}

/// A running dockerd.
#[derive(Debug)]
pub struct Docker {
    spec: DockerSpec,
    data_root: PathBuf,
    process: Process,
    forwards: Vec<Forward>,
    engine: Option<EnteredTree>,
    namespace: Namespace,
    directory: TempDir,
}

impl Docker {
    /// Starts a dockerd with a new, empty data-root.
    pub fn start() -> Result<Self> {
        Self::start_with(DockerSpec::default())
    }

    /// Starts a dockerd and waits until it answers.
    pub fn start_with(spec: DockerSpec) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("dockerd-").tempdir()?;
        let data_root = spec.data_root.clone().unwrap_or_else(|| directory.path().join("data"));
        let namespace = Namespace::new()?;
        let engine = spec.engine.as_ref().map(|tree| tree.enter(&namespace, directory.path())).transpose()?;
        let command = daemon(engine.as_ref(), &namespace);
        let process = spawn(&spec, &data_root, directory.path(), command);
        if process.is_err() {
            clean(directory.path(), &data_root);
        }
        Ok(Self { process: process?, spec, data_root, forwards: Vec::new(), engine, namespace, directory })
    }

    /// Makes `127.0.0.1:PORT` inside the namespace lead to the same address outside. Use it for a registry's address.
    pub fn forward(&mut self, address: &str) -> Result<()> {
        self.forwards.push(self.namespace.forward(address)?);
        Ok(())
    }

    /// Runs `docker` with these arguments and returns the output, also if it failed.
    pub fn run(&self, arguments: &[&str]) -> Result<Output> {
        run(&mut self.command(arguments))
    }

    /// Runs `docker` and returns its standard output. If it fails, the error quotes its standard error.
    pub fn ok(&self, arguments: &[&str]) -> Result<String> {
        self.run(arguments)?.ok()
    }

    /// The command, to run it in parallel to the test or with input.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(CLIENT);
        command.args(["--host", &self.host()]).args(arguments);
        // The user's own settings must have no effect.
        command.env("DOCKER_CONFIG", self.directory.path().join("config")).env_remove("DOCKER_HOST");
        command
    }

    /// The environment that points any command, such as docker-compose, to this dockerd.
    pub fn environment(&self) -> Vec<(String, String)> {
        let config = self.directory.path().join("config").to_string_lossy().into_owned();
        vec![("DOCKER_HOST".into(), self.host()), ("DOCKER_CONFIG".into(), config)]
    }

    /// The daemon's address: `unix:///…/docker.sock`.
    pub fn host(&self) -> String {
        format!("unix://{}", self.directory.path().join("docker.sock").display())
    }

    /// The data-root.
    pub fn data_root(&self) -> &Path {
        &self.data_root
    }

    /// Its network namespace. Published ports of containers listen there.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Its process: log, pid.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Loads an image from its `docker save` archive.
    pub fn load(&self, image: &ImageFiles) -> Result<()> {
        let archive = image.docker_archive()?;
        self.ok(&["load", "--quiet", "--input", &archive.to_string_lossy()]).map(drop)
    }

    /// The directories that overlay2 made of an image's layers, lowest first.
    pub fn layer_directories(&self, image: &str) -> Result<Vec<PathBuf>> {
        let format = "{{with .GraphDriver.Data}}{{.UpperDir}}:{{index . \"LowerDir\"}}{{end}}";
        let found = self.ok(&["image", "inspect", "--format", format, image])?;
        let mut paths: Vec<_> = found.split(':').filter(|path| path.starts_with('/')).map(PathBuf::from).collect();
        paths.reverse();
        if paths.is_empty() {
            bail!("Docker shows no layers of {image}: `{found}`");
        }
        Ok(paths)
    }

    /// Where overlay2 extracted each of an image's layers, lowest first, found as dockerd finds it: by chainID.
    pub fn extracted(&self, image: &ImageFiles) -> Result<Vec<PathBuf>> {
        let find = |chain: &String| {
            let entry = self.data_root.join("image/overlay2/layerdb/sha256").join(crate::images::hex(chain));
            let cache = std::fs::read_to_string(entry.join("cache-id"));
            let cache = cache.with_context(|| format!("Docker has no layer {chain} of {}", image.name))?;
            Ok(self.data_root.join("overlay2").join(cache.trim()).join("diff"))
        };
        image.chain_ids().iter().map(find).collect()
    }

    /// Sends SIGTERM. Containers end too, unless `live_restore` is set.
    pub fn stop(&mut self) -> Result<()> {
        self.process.terminate(Duration::from_secs(90)).map(drop)
    }

    /// Ends the daemon with SIGKILL. The kernel then ends its containerd too, but not the containers. A new daemon
    /// would wait in vain for a containerd that is still dying, so this waits until that is gone.
    pub fn kill9(&mut self) -> Result<()> {
        let containerd = std::fs::read_to_string(self.directory.path().join("exec/containerd/containerd.pid"));
        self.process.kill()?;
        let Ok(containerd) = containerd else { return Ok(()) };
        let process = Path::new("/proc").join(containerd.trim());
        wait_until("the end of dockerd's containerd", TIMEOUT, || Ok(!process.exists()))
    }

    /// Restarts it so that containers outlive it from now on, or do not.
    pub fn set_live_restore(&mut self, live_restore: bool) -> Result<()> {
        self.stop()?;
        self.spec.live_restore = live_restore;
        self.restart()
    }

    /// Starts it again with the same arguments. Stops it first if it still runs.
    pub fn restart(&mut self) -> Result<()> {
        self.stop()?;
        let command = daemon(self.engine.as_ref(), &self.namespace);
        self.process = spawn(&self.spec, &self.data_root, self.directory.path(), command)?;
        Ok(())
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        if self.process.exited().ok().flatten().is_none() {
            // An orderly end first: dockerd then ends its containers and its containerd.
            let containers = self.ok(&["ps", "--quiet"]).unwrap_or_default();
            for container in containers.lines() {
                let _ = self.run(&["kill", container]);
            }
            let _ = self.process.terminate(Duration::from_secs(20));
        }
        clean(self.directory.path(), &self.data_root);
    }
}

/// The command of this machine's dockerd, or of the one in a tree.
fn daemon(engine: Option<&EnteredTree>, namespace: &Namespace) -> Command {
    match engine {
        Some(tree) => tree.command("dockerd"),
        None => namespace.command(DAEMON),
    }
}

fn spawn(spec: &DockerSpec, data_root: &Path, directory: &Path, mut command: Command) -> Result<Process> {
    let config = directory.join("daemon.json");
    std::fs::write(&config, "{}")?;
    std::fs::create_dir_all(directory.join("config"))?;
    let socket = directory.join("docker.sock");
    command.arg("--config-file").arg(&config).arg("--data-root").arg(data_root);
    command.arg("--exec-root").arg(directory.join("exec")).arg("--pidfile").arg(directory.join("dockerd.pid"));
    command.arg("--host").arg(format!("unix://{}", socket.display()));
    command.args(["--group", "root", "--storage-driver", "overlay2"]);
    if spec.live_restore {
        command.arg("--live-restore");
    }
    command.args(&spec.arguments).envs(spec.environment.iter().map(|(name, value)| (name, value)));
    // The pid file of a daemon that was killed may name another process by now.
    let _ = std::fs::remove_file(directory.join("dockerd.pid"));
    let mut process = Process::spawn("dockerd", &mut command, &directory.join("dockerd.log"))?;
    process.wait_ready(TIMEOUT * 2, || {
        let mut ping = Command::new(CLIENT);
        ping.arg("--host").arg(format!("unix://{}", socket.display())).args(["version", "--format", "ok"]);
        Ok(ping.stderr(Stdio::null()).stdout(Stdio::null()).status()?.success())
    })?;
    Ok(process)
}

/// Ends the processes that a dockerd leaves behind (its containerd, the shims of containers) and unmounts what it mounted.
fn clean(directory: &Path, data_root: &Path) {
    leftovers::end_processes(&directory.join("exec"));
    mounts::detach_below(directory);
    mounts::detach_below(data_root);
}
