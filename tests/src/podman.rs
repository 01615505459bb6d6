//! A real Podman with a storage of its own, and `cachefs image-store` for it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use tempfile::TempDir;

use crate::cluster::binary;
use crate::engine_tree::{EngineTree, EnteredTree};
use crate::mounts;
use crate::namespace::{Forward, Namespace};
use crate::process::{Output, Process, TIMEOUT, run};

/// A running `cachefs image-store`.
#[derive(Debug)]
pub struct ImageStore {
    process: Process,
    directory: PathBuf,
    mount: PathBuf,
    graph_root: PathBuf,
}

impl ImageStore {
    /// Keeps a directory for the engine whose own storage is `graph_root`, and waits until it can be used.
    pub fn start(directory: &Path, mount: &Path, graph_root: &Path) -> Result<ImageStore> {
        let process = spawn(directory, mount, graph_root)?;
        let (directory, mount) = (directory.to_owned(), mount.to_owned());
        Ok(ImageStore { process, directory, mount, graph_root: graph_root.to_owned() })
    }

    /// The directory that engines are told of.
    pub fn path(&self) -> &Path {
        &self.directory
    }

    /// Ends it with SIGKILL and starts it again.
    pub fn restart(&mut self) -> Result<()> {
        self.process.kill()?;
        self.process = spawn(&self.directory, &self.mount, &self.graph_root)?;
        Ok(())
    }
}

/// The command `cachefs image-store`.
pub fn image_store(directory: &Path, mount: &Path) -> Result<Command> {
    let mut command = Command::new(binary("cachefs")?);
    command.arg("image-store").arg(directory).arg("--mount").arg(mount);
    Ok(command)
}

fn spawn(directory: &Path, mount: &Path, graph_root: &Path) -> Result<Process> {
    let mut command = image_store(directory, mount)?;
    command.arg("--graph-root").arg(graph_root);
    let mut process = Process::spawn("image-store", &mut command, &directory.with_extension("log"))?;
    process.wait_ready(TIMEOUT, || Ok(directory.join("overlay-images/images.json").exists()))?;
    Ok(process)
}

/// This machine's Podman, or that of a tree.
#[derive(Debug)]
pub struct Podman {
    tree: Option<EnteredTree>,
    forwards: Vec<Forward>,
    namespace: Namespace,
    store: PathBuf,
    directory: TempDir,
}

impl Podman {
    /// A Podman whose storage is empty and that knows an image store besides.
    pub fn new(tree: Option<&EngineTree>, store: &Path) -> Result<Podman> {
        let directory = tempfile::Builder::new().prefix("podman-").tempdir()?;
        let namespace = Namespace::new()?;
        let tree = tree.map(|tree| tree.enter(&namespace, directory.path())).transpose()?;
        let limits = "[containers]\ndefault_ulimits = ['nofile=20000:20000', 'nproc=32768:32768']\n";
        std::fs::write(directory.path().join("containers.conf"), limits)?;
        std::fs::write(directory.path().join("policy.json"), r#"{"default":[{"type":"insecureAcceptAnything"}]}"#)?;
        Ok(Podman { tree, forwards: Vec::new(), namespace, store: store.to_owned(), directory })
    }

    /// Makes `127.0.0.1:PORT` inside the namespace lead to the same address outside.
    pub fn forward(&mut self, address: &str) -> Result<()> {
        self.forwards.push(self.namespace.forward(address)?);
        Ok(())
    }

    /// Its own storage.
    pub fn graph_root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    /// Runs `podman` and returns the output, also if it failed.
    pub fn run(&self, arguments: &[&str]) -> Result<Output> {
        let directory = self.directory.path();
        let mut command = match &self.tree {
            Some(tree) => tree.command("podman"),
            None => self.namespace.command("podman"),
        };
        command.arg("--root").arg(self.graph_root()).arg("--runroot").arg(directory.join("run"));
        command.arg("--tmpdir").arg(directory.join("tmp"));
        command.args(["--storage-driver", "overlay", "--runtime", "runc", "--cgroup-manager", "cgroupfs"]);
        command.args(["--events-backend", "file", "--storage-opt"]);
        command.arg(format!("additionalimagestore={}", self.store.display())).args(arguments);
        command.env("CONTAINERS_CONF", directory.join("containers.conf")).env("TMPDIR", directory);
        command.env("PODMAN_IGNORE_CGROUPSV1_WARNING", "1");
        run(&mut command)
    }

    /// Runs `podman` and returns its standard output. If it fails, the error quotes its standard error.
    pub fn ok(&self, arguments: &[&str]) -> Result<String> {
        self.run(arguments)?.ok()
    }

    /// What a command prints in a new container without network.
    pub fn output(&self, image: &str, command: &[&str]) -> Result<String> {
        self.ok(&[&["run", "--rm", "--network", "none", "--pull", "never", image], command].concat())
    }

    /// Names and tags of images, sorted.
    pub fn listed(&self) -> Result<Vec<String>> {
        let text = self.ok(&["images", "--format", "{{.Repository}}:{{.Tag}}"])?;
        let mut names: Vec<_> = text.lines().map(str::to_owned).collect();
        names.sort();
        Ok(names)
    }

    /// Fails if its own storage has become large, in bytes.
    pub fn check_storage(&self, limit: u64) -> Result<()> {
        let text = run(Command::new("du").args(["-s", "-B1"]).arg(self.graph_root()))?.ok()?;
        let size: u64 = text.split_whitespace().next().unwrap_or_default().parse()?;
        ensure!(size < limit, "its own storage has {size} bytes");
        Ok(())
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let _ = self.run(&["rm", "--all", "--force", "--time", "0"]);
        mounts::detach_below(self.directory.path());
    }
}
