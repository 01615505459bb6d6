//! The compared clients: this project's registry library and its coordinator, skopeo, and dockerd.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use coordinator::registries::image::platform;
use coordinator::registries::oci::docker_config::CredentialStore;
use coordinator::registries::oci::registry::OciRegistry;
use coordinator::registries::oci::retry::RetryPolicy;
use coordinator::registries::oci::transport::TransportSettings;
use coordinator::registries::{Registry, RegistryError};
use futures::TryStreamExt;
use store::Digest;
use store::image::ImageRef;
use store::reader::Store;
use tests::docker::Docker;
use tests::process::run;

/// The outcome of a pull.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The image was pulled.
    Pulled,
    /// The pull failed with this message.
    Refused(String),
}

impl Outcome {
    pub(crate) fn is_pulled(&self) -> bool {
        *self == Outcome::Pulled
    }

    fn of(output: &tests::process::Output) -> Outcome {
        if output.succeeded() {
            Outcome::Pulled
        } else {
            Outcome::Refused(output.stderr.lines().last().unwrap_or_default().to_owned())
        }
    }
}

/// Few retries with short pauses, so that every attempt ends soon.
const IMPATIENT: RetryPolicy = RetryPolicy {
    attempts: 3,
    base: Duration::from_millis(5),
    cap: Duration::from_millis(20),
    longest_wait: Duration::from_secs(5),
};

/// The coordinator's registry client, run in this process.
pub(crate) struct Library {
    runtime: tokio::runtime::Runtime,
    store: Store,
    authority: PathBuf,
}

impl Library {
    /// A client with an empty store below `directory` that trusts this authority.
    pub(crate) fn new(directory: &Path, authority: &Path) -> Result<Library> {
        let store = directory.join("store");
        std::fs::create_dir(&store)?;
        store::publisher::create(&store)?;
        Ok(Library {
            runtime: tokio::runtime::Runtime::new()?,
            store: Store::open(&store)?,
            authority: authority.to_owned(),
        })
    }

    fn registry(&self, config: &Path) -> Result<OciRegistry> {
        let settings = TransportSettings {
            ca_certificates: vec![self.authority.clone()],
            retry: IMPATIENT,
            ..TransportSettings::default()
        };
        let credentials = CredentialStore { config: Some(config.to_owned()) };
        Ok(OciRegistry::new(&settings, credentials, self.store.clone(), Arc::default())?)
    }

    /// Resolves an image for a platform. Returns the comment in its config, or the error.
    pub(crate) fn taken(
        &self,
        reference: &str,
        platform: Option<&str>,
        config: &Path,
    ) -> Result<Result<String, String>> {
        let registry = self.registry(config)?;
        let image: ImageRef = reference.parse()?;
        let platform = platform.map(platform::parse).transpose()?;
        let resolved = self.runtime.block_on(registry.resolve(&image, platform.as_ref()));
        let comment = |bytes: &[u8]| {
            let config: serde_json::Value = serde_json::from_slice(bytes).unwrap_or_default();
            config["comment"].as_str().unwrap_or_default().to_owned()
        };
        Ok(resolved.map(|resolved| comment(&resolved.config.bytes)).map_err(|error| error.to_string()))
    }

    /// Resolves an image and reads its layers.
    pub(crate) fn pull(&self, reference: &str, config: &Path) -> Result<Outcome> {
        let registry = self.registry(config)?;
        let image: ImageRef = reference.parse()?;
        let pulled: Result<(), RegistryError> = self.runtime.block_on(async {
            let resolved = registry.resolve(&image, None).await?;
            for layer in &resolved.layers {
                let bytes: Vec<u8> = registry.layer(&image, layer).map_ok(|bytes| bytes.to_vec()).try_concat().await?;
                let actual = Digest::of(&bytes);
                if actual != layer.blob {
                    return Err(RegistryError::DigestMismatch {
                        what: "layer".to_owned(),
                        expected: layer.blob,
                        actual,
                    });
                }
            }
            Ok(())
        });
        Ok(pulled.map_or_else(|error| Outcome::Refused(error.to_string()), |()| Outcome::Pulled))
    }
}

/// Runs `skopeo copy` to a directory below `scratch`.
pub(crate) fn skopeo(reference: &str, config: &Path, scratch: &Path) -> Result<Outcome> {
    let to = scratch.join("copy");
    let mut command = Command::new("skopeo");
    command.args(["--insecure-policy", "--command-timeout", "20s", "copy", "--src-tls-verify=false", "--authfile"]);
    command.arg(config).arg(format!("docker://{reference}")).arg(format!("dir:{}", to.display()));
    let output = run(&mut command)?;
    if to.exists() {
        std::fs::remove_dir_all(&to)?;
    }
    Ok(Outcome::of(&output))
}

/// Runs `docker pull` while these addresses are forwarded into the dockerd's namespace. `config` is the path of a `config.json`.
pub(crate) fn docker(docker: &Docker, addresses: &[String], reference: &str, config: &Path) -> Result<Outcome> {
    let forward = |address: &String| docker.namespace().forward(address);
    let _ways = addresses.iter().map(forward).collect::<Result<Vec<_>>>()?;
    let outcome = docker_keeps(docker, reference, config)?;
    if outcome.is_pulled() {
        docker.ok(&["rmi", "--force", reference])?;
    }
    Ok(outcome)
}

/// Runs `docker pull` without forwarding any address, and keeps the image.
pub(crate) fn docker_keeps(docker: &Docker, reference: &str, config: &Path) -> Result<Outcome> {
    let directory = config.parent().context("the configuration has no directory")?;
    let output = run(docker.command(&["pull", "--quiet", reference]).env("DOCKER_CONFIG", directory))?;
    Ok(Outcome::of(&output))
}
