//! One shared store with its coordinator in a temporary directory, and the contents of that store seen from outside.
//!
//! The store's directory is read by its documented layout (`store/FORMAT.md`) and not through the crate that wrote it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::cluster::{Coordinator, CoordinatorSpec, Ctl};
use crate::process::{Output, Process, exit_code, wait_until};

/// What a site's coordinator is configured with, besides its directories.
#[derive(Debug, Clone, Default)]
pub struct SiteSpec {
    /// Registry, user and password of each login, as `docker login` would store it.
    pub logins: Vec<(String, String, String)>,
    /// Certificates (PEM) of the authorities to trust.
    pub authorities: Vec<String>,
    /// Whether the coordinator guesses what first starts need. It does so by default. Most sites here go without, because a
    /// pack that it publishes when it has time for it is in the way of tests that count packs, damage them, or kill it.
    pub guesses: bool,
    /// Further lines of the configuration file.
    pub settings: String,
    /// A TCP address to listen on besides the socket.
    pub listen: Option<String>,
    /// Certificate and key files for that address. Without them it is open to everybody on this machine.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// More arguments of `serve`.
    pub arguments: Vec<String>,
    /// The coordinator's environment.
    pub environment: Vec<(String, String)>,
}

/// A store and its coordinator. Both are gone when it is dropped.
#[derive(Debug)]
pub struct Site {
    coordinator: Coordinator,
    directory: TempDir,
}

impl Site {
    /// Starts a coordinator for a new, empty store.
    pub fn start() -> Result<Self> {
        Self::start_with(&SiteSpec::default())
    }

    /// Starts a coordinator for a new, empty store, configured as `spec` says.
    pub fn start_with(spec: &SiteSpec) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("site-").tempdir()?;
        std::fs::create_dir(directory.path().join("store"))?;
        Self::start_in(directory, spec)
    }

    /// Starts a coordinator in a directory that already contains a directory `store`.
    pub fn start_in(directory: TempDir, spec: &SiteSpec) -> Result<Self> {
        let coordinator = Coordinator::start(coordinator_spec(directory.path(), "state", spec)?)?;
        Ok(Self { coordinator, directory })
    }

    /// Starts a second coordinator for the same store, with its own state directory.
    pub fn second(&self) -> Result<Coordinator> {
        Coordinator::start(coordinator_spec(self.path(), "second", &SiteSpec::default())?)
    }

    /// The directory that holds store, state and configuration.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The shared store.
    pub fn store(&self) -> PathBuf {
        self.path().join("store")
    }

    /// The coordinator.
    pub fn coordinator(&mut self) -> &mut Coordinator {
        &mut self.coordinator
    }

    /// A `cachefsctl` that connects to the coordinator.
    pub fn ctl(&self) -> Ctl {
        self.coordinator.ctl()
    }

    /// The names of the images in the catalogue.
    pub fn images(&self) -> Result<Vec<String>> {
        let list = self.ctl().json(&["images"])?;
        let images = list["images"].as_array().context("`images` is no list")?;
        Ok(images.iter().map(|image| image["name"].as_str().unwrap_or_default().to_owned()).collect())
    }

    /// The diffIDs of the layers in the store, sorted and without `sha256:`.
    pub fn layers(&self) -> Result<Vec<String>> {
        let mut layers = Vec::new();
        for fan in names(&self.store().join("layers"))? {
            layers.extend(names(&self.store().join("layers").join(fan))?);
        }
        layers.sort();
        Ok(layers)
    }

    /// Whether the store has this layer, given with or without `sha256:`.
    pub fn has_layer(&self, diff_id: &str) -> Result<bool> {
        Ok(self.layers()?.iter().any(|layer| layer == crate::images::hex(diff_id)))
    }

    /// All files below a directory of the store, such as `packs`, sorted. An empty name means the store itself.
    pub fn files(&self, directory: &str) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        let mut directories = vec![self.store().join(directory)];
        while let Some(directory) = directories.pop() {
            for name in names(&directory)? {
                let path = directory.join(name);
                if path.is_dir() { directories.push(path) } else { files.push(path) }
            }
        }
        files.sort();
        Ok(files)
    }

    /// The names in the staging directory.
    pub fn staged(&self) -> Result<Vec<String>> {
        names(&self.store().join("staging"))
    }

    /// Starts `cachefsctl` with these arguments in parallel to the test. Its outputs go to a file `NAME.log`.
    pub fn begin(&self, name: &str, arguments: &[&str]) -> Result<Process> {
        Process::spawn(name, &mut self.ctl().command(arguments)?, &self.path().join(format!("{name}.log")))
    }

    /// The newest job for an image.
    pub fn job(&self, image: &str) -> Result<Value> {
        let list = self.ctl().json(&["jobs"])?;
        let jobs = list["jobs"].as_array().context("`jobs` is no list")?;
        let job = jobs.iter().find(|job| job["image"] == image);
        Ok(job.with_context(|| format!("no job for {image} in {list}"))?.clone())
    }

    /// Waits until the newest job for an image is in one of these states, and returns the job.
    pub fn wait_for_job(&self, image: &str, states: &[&str], limit: Duration) -> Result<Value> {
        let mut last = Value::Null;
        let waited = wait_until(&format!("a job for {image} in {states:?}"), limit, || {
            last = self.job(image).unwrap_or_default();
            Ok(last["state"].as_str().is_some_and(|state| states.contains(&state)))
        });
        waited.with_context(|| format!("the job is {last}")).map(|()| last)
    }
}

/// The specification of a coordinator on the store below `directory`, with its state in `directory/NAME`.
pub fn coordinator_spec(directory: &Path, name: &str, spec: &SiteSpec) -> Result<CoordinatorSpec> {
    // The user's own logins must have no effect.
    let docker = directory.join(format!("{name}-docker"));
    std::fs::create_dir_all(&docker)?;
    let login = |(registry, user, password): &(String, String, String)| {
        (registry.clone(), json!({"auth": STANDARD.encode(format!("{user}:{password}"))}))
    };
    let logins: serde_json::Map<String, Value> = spec.logins.iter().map(login).collect();
    std::fs::write(docker.join("config.json"), json!({"auths": logins}).to_string())?;
    let mut files = Vec::new();
    for (number, pem) in spec.authorities.iter().enumerate() {
        let path = directory.join(format!("{name}-authority-{number}.pem"));
        std::fs::write(&path, pem)?;
        files.push(path.display().to_string());
    }
    // The settings of the test may contain TOML tables, so they come last.
    let settings = format!("guess_starts = {}\nca_certificates = {}\n{}", spec.guesses, json!(files), spec.settings);
    let file = directory.join(format!("{name}.toml"));
    std::fs::write(&file, settings)?;
    let mut coordinator = CoordinatorSpec::new(&directory.join("store"), &directory.join(name))
        .environment("DOCKER_CONFIG", &docker.to_string_lossy());
    coordinator.listen.clone_from(&spec.listen);
    coordinator.environment.extend(spec.environment.iter().cloned());
    coordinator.arguments = vec!["--config".to_owned(), file.display().to_string()];
    match (&spec.listen, &spec.tls) {
        (Some(_), None) => coordinator.arguments.push("--insecure".to_owned()),
        (_, Some((certificate, key))) => {
            let files = [("--tls-certificate", certificate), ("--tls-key", key)];
            coordinator.arguments.extend(files.map(|(flag, file)| format!("{flag}={}", file.display())));
        }
        (None, None) => {}
    }
    coordinator.arguments.extend(spec.arguments.iter().cloned());
    Ok(coordinator)
}

/// Runs a command that should end soon, such as a daemon that must refuse to start. Both outputs are returned in `stderr`.
pub fn run_to_end(name: &str, command: &mut Command, limit: Duration) -> Result<Output> {
    let log = tempfile::NamedTempFile::new()?;
    let mut process = Process::spawn(name, command, log.path())?;
    let status = process.wait(limit).with_context(|| format!("{name} goes on: {}", process.log()))?;
    Ok(Output { code: exit_code(status), stdout: String::new(), stderr: process.log(), command: name.to_owned() })
}

/// The names in a directory.
fn names(directory: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}
