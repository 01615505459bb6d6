//! Whether the dockerd of a data-root keeps its images there with overlay2: what the directory and `daemon.json` say.
//!
//! Docker 29 decides by what it finds: a new installation keeps images in containerd, but an `overlay2` directory with
//! anything in it makes it fall back to the graph driver, and hides all images that containerd has. So that directory must
//! not be made where containerd is in use.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::error::{Error, Result};
use super::root::Root;
use crate::docker::files;

/// Where dockerd looks for its configuration.
pub(super) const CONFIG_FILE: &str = "/etc/docker/daemon.json";
/// Where dockerd keeps everything, unless its configuration says otherwise.
const DATA_ROOT: &str = "/var/lib/docker";

/// The part of `daemon.json` that says where images are kept.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct DaemonConfig {
    data_root: Option<PathBuf>,
    storage_driver: String,
    userns_remap: String,
    features: Features,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Features {
    containerd_snapshotter: Option<bool>,
}

/// Checks that images put into the data-root would be seen by the dockerd that uses it, and hide none. The process id is that
/// of a dockerd that runs; its command line counts too.
pub(super) fn check(root: &Root, config_file: &Path, running: Option<u32>) -> Result<()> {
    let mut config = read(root, config_file)?;
    if let Some(pid) = running {
        config.add(&command_line(pid));
    }
    if !config.userns_remap.is_empty() {
        return Err(Error::Remapped { path: root.path().into() });
    }
    let in_containerd = match config.features.containerd_snapshotter {
        Some(configured) => configured,
        None => root.uses_containerd(),
    };
    if in_containerd {
        return Err(Error::InContainerd { path: root.path().into() });
    }
    if !matches!(config.storage_driver.as_str(), "" | "overlay2") {
        return Err(Error::Driver { path: root.path().into(), driver: config.storage_driver });
    }
    // dockerd with remapped users keeps everything in a directory of these users.
    match files::names(root.path())?.into_iter().find(|name| super::root::is_remapped(Path::new(name))) {
        Some(name) if !root.has_overlay2() => Err(Error::Remapped { path: root.path().join(name) }),
        _ => Ok(()),
    }
}

impl DaemonConfig {
    /// Adds what dockerd was started with. Its flags and its file must not name the same key.
    fn add(&mut self, arguments: &[String]) {
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let (flag, value) = match argument.split_once('=') {
                Some((flag, value)) => (flag, Some(value.to_owned())),
                None => (argument.as_str(), None),
            };
            let mut value = || value.clone().or_else(|| arguments.next().cloned()).unwrap_or_default();
            match flag {
                "--storage-driver" | "-s" => self.storage_driver = value(),
                "--userns-remap" => self.userns_remap = value(),
                _ => {}
            }
        }
    }
}

/// A process' command line; nothing if it cannot be seen from here.
fn command_line(pid: u32) -> Vec<String> {
    let text = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    text.split(|byte| *byte == 0).map(|argument| String::from_utf8_lossy(argument).into_owned()).collect()
}

/// The configuration, if it is about this data-root. dockerd refuses to start with one that is not JSON.
fn read(root: &Root, config_file: &Path) -> Result<DaemonConfig> {
    let text = files::read_text(config_file)?.unwrap_or_default();
    let config: DaemonConfig = serde_json::from_str(&text).unwrap_or_default();
    let data_root = config.data_root.as_deref().unwrap_or(Path::new(DATA_ROOT));
    let is_ours = data_root.canonicalize().is_ok_and(|data_root| data_root == root.path());
    Ok(if is_ours { config } else { DaemonConfig::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(root: &Root, config: &str) -> Option<String> {
        let file = root.path().parent().unwrap().join("daemon.json");
        std::fs::write(&file, config.replace("HERE", &root.path().to_string_lossy())).unwrap();
        check(root, &file, None).err().map(|error| error.to_string())
    }

    #[test]
    fn what_daemon_json_says_counts_for_its_own_data_root() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docker");
        std::fs::create_dir(&path).unwrap();
        let root = Root::open(&path).unwrap();
        assert!(check(&root, &dir.path().join("none"), None).is_ok());
        for (arguments, expected) in [
            (vec!["dockerd", "--storage-driver", "vfs", "-D"], "vfs"),
            (vec!["dockerd", "-s", "overlay2"], "overlay2"),
            (vec!["dockerd", "-H", "unix:///x", "--storage-driver=zfs"], "zfs"),
            (vec!["dockerd", "--storage-driver"], ""),
        ] {
            let mut config = DaemonConfig::default();
            config.add(&arguments.iter().map(|argument| (*argument).to_owned()).collect::<Vec<_>>());
            assert_eq!(config.storage_driver, expected, "{arguments:?}");
        }
        assert!(command_line(std::process::id()).len() > 1);
        let refused = |more: &str| message(&root, &format!(r#"{{"data-root":"HERE",{more}}}"#)).unwrap();
        assert!(refused(r#""features":{"containerd-snapshotter":true}"#).contains("cachefs snapshotter"));
        assert!(refused(r#""storage-driver":"vfs""#).contains("storage driver vfs"));
        assert!(refused(r#""userns-remap":"default""#).contains("remapped users"));
        assert_eq!(message(&root, r#"{"data-root":"HERE","storage-driver":"overlay2","hosts":["unix:///x"]}"#), None);
        assert_eq!(message(&root, r#"{"data-root":"/elsewhere","userns-remap":"default"}"#), None);
        assert_eq!(message(&root, r#"{"userns-remap":"default"}"#), None, "that one is for /var/lib/docker");
        assert_eq!(message(&root, "not JSON"), None);
    }

    #[test]
    fn what_the_directory_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docker");
        std::fs::create_dir_all(path.join("volumes")).unwrap();
        let root = Root::open(&path).unwrap();
        assert_eq!(message(&root, "{}"), None, "no dockerd has run here");
        std::fs::write(root.volume_database(), "").unwrap();
        assert!(message(&root, "{}").unwrap().contains("in containerd"));
        let classic = r#"{"data-root":"HERE","features":{"containerd-snapshotter":false}}"#;
        assert_eq!(message(&root, classic), None, "dockerd was told to use overlay2");
        std::fs::create_dir_all(path.join("image/overlay2")).unwrap();
        assert_eq!(message(&root, "{}"), None, "both have been in use: dockerd stays with overlay2");
        std::fs::remove_dir_all(path.join("image")).unwrap();
        std::fs::remove_file(root.volume_database()).unwrap();
        std::fs::create_dir(path.join("231072.231072")).unwrap();
        assert!(message(&root, "{}").unwrap().contains("231072.231072 is a data-root with remapped users"));
    }
}
