//! The hosts of a site: how each one mounts the store, and what its daemon reports.

use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::cluster::{Mount, MountSpec, binary};
use crate::images::ImageFiles;
use crate::process::run;
use crate::site::Site;

/// The mount of the host `name`, with mount point and cache below `host-NAME`. The host knows the site's coordinator.
pub fn host(site: &Site, name: &str) -> Result<MountSpec> {
    let directory = site.path().join(format!("host-{name}"));
    std::fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let mut spec = MountSpec::new(&directory, &site.store());
    spec.coordinator = Some(site.ctl().server);
    Ok(spec)
}

/// Mounts the site's store on the host `name`.
pub fn mount(site: &Site, name: &str) -> Result<Mount> {
    Mount::start(host(site, name)?)
}

/// The host `name` with trees of one kind: `--tree native` or `fuse`.
pub fn host_trees(site: &Site, name: &str, kind: &str) -> Result<MountSpec> {
    let mut host = host(site, name)?;
    host.arguments = vec!["--tree".into(), kind.into()];
    Ok(host)
}

/// The mount of that host.
pub fn mount_trees(site: &Site, name: &str, kind: &str) -> Result<Mount> {
    Mount::start(host_trees(site, name, kind)?)
}

/// Loads an image into the site's store from its `docker save` archive.
pub fn load(site: &Site, image: &ImageFiles) -> Result<()> {
    let archive = image.docker_archive()?;
    site.ctl().ok(&["load", &archive.to_string_lossy()]).map(drop)
}

/// The output of `cachefs status --json` for a host's daemon.
pub fn status(host: &MountSpec) -> Result<Value> {
    let mut command = Command::new(binary("cachefs")?);
    command.arg("status").arg("--mount").arg(&host.mountpoint).arg("--json");
    let text = run(&mut command)?.ok()?;
    let status: Value =
        serde_json::from_str(&text).with_context(|| format!("cachefs status --json printed no JSON: {text}"))?;
    Ok(status["mounts"][0].clone())
}

/// The value of one of the daemon's counters.
pub fn counter(host: &MountSpec, name: &str) -> Result<u64> {
    let status = status(host)?;
    status["counters"][name].as_u64().with_context(|| format!("there is no counter {name} in {status}"))
}
