//! A newer dockerd that keeps its images in containerd, which asks the snapshotter: what Docker 29 does by default.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::Result;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::containerd::Snapshotter;
use crate::engine_tree::{EngineTree, EnteredTree};
use crate::namespace::{Forward, Namespace};
use crate::process::{Output, Process, TIMEOUT, run};
use crate::{leftovers, mounts};

/// A running dockerd with its containerd.
#[derive(Debug)]
pub struct ContainerdStore {
    dockerd: Process,
    containerd: Process,
    tree: EnteredTree,
    forwards: Vec<Forward>,
    namespace: Namespace,
    directory: TempDir,
}

impl ContainerdStore {
    /// Starts both from the tree, with the snapshotter as dockerd's storage driver.
    pub fn start(tree: &EngineTree, snapshotter: &Snapshotter) -> Result<ContainerdStore> {
        Self::start_configured(tree, snapshotter, &json!({}))
    }

    /// The same with more settings of dockerd. `userns-remap` may name the user `nobody:nogroup`, who then has subordinate ids
    /// from 100,000 on.
    pub fn start_configured(tree: &EngineTree, snapshotter: &Snapshotter, settings: &Value) -> Result<ContainerdStore> {
        Self::start_with(tree, "cachefs", Some(snapshotter.socket()), settings)
    }

    /// Starts both from the tree, with containerd's own overlay snapshotter.
    pub fn start_plain(tree: &EngineTree) -> Result<ContainerdStore> {
        Self::start_with(tree, "overlayfs", None, &json!({}))
    }

    fn start_with(
        tree: &EngineTree,
        driver: &str,
        snapshotter: Option<&Path>,
        settings: &Value,
    ) -> Result<ContainerdStore> {
        let directory = tempfile::Builder::new().prefix("dockerd-").tempdir()?;
        let namespace = Namespace::new()?;
        let path = directory.path();
        std::fs::create_dir_all(path.join("exec"))?;
        std::fs::create_dir_all(path.join("config"))?;
        std::fs::write(path.join("containerd.toml"), containerd_config(path, snapshotter))?;
        let mut config = json!({"features": {"containerd-snapshotter": true}, "storage-driver": driver});
        for (key, value) in settings.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        std::fs::write(path.join("daemon.json"), config.to_string())?;
        let tree = tree.enter(&namespace, path)?;
        if settings.get("userns-remap").is_some() {
            run(tree.command("sh").args(["-ec", SUBORDINATE_IDS]).arg(path))?.ok()?;
        }
        // dockerd mounts the root file systems that containerd's shims then use, so both share their mounts.
        let started =
            start_containerd(&tree, path).and_then(|containerd| Ok((start_dockerd(&tree, path)?, containerd)));
        if started.is_err() {
            clean(path);
        }
        let (dockerd, containerd) = started?;
        Ok(ContainerdStore { dockerd, containerd, tree, forwards: Vec::new(), namespace, directory })
    }

    /// Makes `127.0.0.1:PORT` inside the namespace lead to the same address outside.
    pub fn forward(&mut self, address: &str) -> Result<()> {
        self.forwards.push(self.namespace.forward(address)?);
        Ok(())
    }

    /// Runs `docker` and returns the output, also if it failed.
    pub fn run(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = self.tree.command("docker");
        command.arg("--host").arg(format!("unix://{}", self.socket().display())).args(arguments);
        command.env("DOCKER_CONFIG", self.directory.path().join("config")).env_remove("DOCKER_HOST");
        run(&mut command)
    }

    /// Runs `docker` and returns its standard output. If it fails, the error quotes its standard error.
    pub fn ok(&self, arguments: &[&str]) -> Result<String> {
        self.run(arguments)?.ok()
    }

    /// Runs containerd's own client and returns its standard output.
    pub fn ctr(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.tree.command("ctr");
        command.arg("--address").arg(self.directory.path().join("exec/containerd.sock")).args(arguments);
        run(&mut command)?.ok()
    }

    /// The environment that points any command, such as docker-compose, to this dockerd.
    pub fn environment(&self) -> Vec<(String, String)> {
        let config = self.directory.path().join("config").to_string_lossy().into_owned();
        vec![("DOCKER_HOST".into(), format!("unix://{}", self.socket().display())), ("DOCKER_CONFIG".into(), config)]
    }

    /// dockerd's data-root.
    pub fn data_root(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("docker.sock")
    }

    /// Ends dockerd with SIGKILL and starts it again.
    pub fn restart_dockerd(&mut self) -> Result<()> {
        self.dockerd.kill()?;
        let path = self.directory.path();
        let _ = std::fs::remove_file(path.join("dockerd.pid"));
        self.dockerd = start_dockerd(&self.tree, path)?;
        Ok(())
    }

    /// Ends both with SIGKILL and starts them again.
    pub fn restart(&mut self) -> Result<()> {
        self.dockerd.kill()?;
        self.containerd.kill()?;
        let path = self.directory.path();
        let _ = std::fs::remove_file(path.join("dockerd.pid"));
        self.containerd = start_containerd(&self.tree, path)?;
        self.dockerd = start_dockerd(&self.tree, path)?;
        Ok(())
    }
}

impl Drop for ContainerdStore {
    fn drop(&mut self) {
        let _ = self.dockerd.kill();
        let _ = self.containerd.kill();
        clean(self.directory.path());
    }
}

/// Gives a user of the tree subordinate ids, and leaves the tree's own files as they are.
const SUBORDINATE_IDS: &str = r#"
mkdir "$0/etc" "$0/etc-work"
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$0/etc,workdir=$0/etc-work" /etc
echo nobody:100000:65536 > /etc/subuid
echo nobody:100000:65536 > /etc/subgid
"#;

fn containerd_config(directory: &Path, snapshotter: Option<&Path>) -> String {
    let directory = directory.display();
    let proxy = snapshotter.map_or_else(String::new, |socket| {
        format!("[proxy_plugins.cachefs]\n  type = \"snapshot\"\n  address = \"{}\"", socket.display())
    });
    format!(
        r#"version = 2
root = "{directory}/containerd"
state = "{directory}/exec/containerd"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"]
[grpc]
  address = "{directory}/exec/containerd.sock"
[ttrpc]
  address = "{directory}/exec/containerd.sock.ttrpc"
{proxy}
[plugins."io.containerd.gc.v1.scheduler"]
  schedule_delay = "0s"
  startup_delay = "10ms"
  mutation_threshold = 1
"#
    )
}

fn start_containerd(tree: &EnteredTree, directory: &Path) -> Result<Process> {
    let mut command = tree.command("containerd");
    command.arg("--config").arg(directory.join("containerd.toml"));
    let mut process = Process::spawn("containerd", &mut command, &directory.join("containerd.log"))?;
    let socket = directory.join("exec/containerd.sock");
    process.wait_ready(TIMEOUT, || Ok(std::os::unix::net::UnixStream::connect(&socket).is_ok()))?;
    Ok(process)
}

fn start_dockerd(tree: &EnteredTree, directory: &Path) -> Result<Process> {
    let socket = directory.join("docker.sock");
    let mut command = tree.command("dockerd");
    command.arg("--config-file").arg(directory.join("daemon.json")).arg("--data-root").arg(directory.join("data"));
    command.arg("--exec-root").arg(directory.join("exec/docker")).arg("--pidfile").arg(directory.join("dockerd.pid"));
    command.arg("--containerd").arg(directory.join("exec/containerd.sock"));
    command.arg("--host").arg(format!("unix://{}", socket.display())).args(["--group", "root"]);
    let mut process = Process::spawn("dockerd", &mut command, &directory.join("dockerd.log"))?;
    process.wait_ready(TIMEOUT * 2, || {
        let mut ping = tree.command("docker");
        ping.arg("--host").arg(format!("unix://{}", socket.display())).args(["version", "--format", "ok"]);
        Ok(ping.stderr(Stdio::null()).stdout(Stdio::null()).status()?.success())
    })?;
    Ok(process)
}

fn clean(directory: &Path) {
    leftovers::end_processes(&directory.join("exec"));
    mounts::detach_below(directory);
}
