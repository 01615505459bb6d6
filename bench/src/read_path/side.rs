//! One side of the comparison: where its trees are, and how it reaches a state.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Serialize;
use tests::cluster::{Mount, MountSpec};
use tests::mounts::Overlay;
use tests::process::run;
use tests::site::Site;

use super::mode::{Mode, NATIVE};
use crate::process;

/// What must be read from the disk again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) enum State {
    /// Everything: page cache dropped; for cachefs also a fresh daemon with an empty local cache.
    Cold,
    /// Page cache dropped, local cache full. The native side has no local cache, so it is cold in this state.
    Local,
    /// Nothing.
    Warm,
}

impl State {
    /// The name shown in tables.
    pub(super) fn name(self) -> &'static str {
        match self {
            State::Cold => "cold",
            State::Local => "local",
            State::Warm => "warm",
        }
    }
}

/// Which of the images a workload reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// The image whose tree is walked and read whole.
    Tree,
    /// One large file.
    Large,
    /// A Python that can be started.
    Python,
}

impl Part {
    /// All of them.
    pub(super) const ALL: [Part; 3] = [Part::Tree, Part::Large, Part::Python];
}

/// One side of the comparison. The overlays use the mount, so they are dropped first.
pub(super) struct Side {
    name: String,
    /// What is mounted: only what is used, because a look into an image begins a start of it.
    overlays: BTreeMap<Part, Overlay>,
    source: Source,
}

enum Source {
    /// Plain layers, base first, by part.
    Native(Vec<Vec<PathBuf>>),
    /// The mounted store.
    Cachefs(Box<Host>),
}

struct Host {
    spec: MountSpec,
    mount: Option<Mount>,
    /// The chainIDs, by part.
    chains: Vec<String>,
}

impl Host {
    /// What an engine is given for a part's image.
    fn lower(&self, part: Part) -> Option<PathBuf> {
        Some(self.mount.as_ref()?.tree(self.chains.get(part as usize)?))
    }
}

impl Side {
    pub(super) fn native(layers: Vec<Vec<PathBuf>>) -> Side {
        Side { name: NATIVE.to_owned(), overlays: BTreeMap::new(), source: Source::Native(layers) }
    }

    /// A side that mounts the site's store with these arguments.
    pub(super) fn cachefs(mode: &Mode, site: &Site, chains: Vec<String>) -> Result<Side> {
        let name = &mode.name;
        let directory = site.path().join(format!("host-{name}"));
        fs::create_dir(&directory).with_context(|| format!("two modes have the name {name}"))?;
        let mut spec = MountSpec::new(&directory, &site.store());
        spec.arguments = mode.arguments.clone();
        spec.program = mode.program.clone();
        let source = Source::Cachefs(Box::new(Host { spec, mount: None, chains }));
        Ok(Side { name: name.to_owned(), overlays: BTreeMap::new(), source })
    }

    /// The name shown in tables.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The root that a container of this part's image would have, mounted if it is not yet. Call [`Side::prepare`] first.
    pub(super) fn root(&mut self, part: Part) -> Result<PathBuf> {
        if let Some(overlay) = self.overlays.get(&part) {
            return Ok(overlay.root());
        }
        let lowers = match &self.source {
            Source::Native(layers) => layers.get(part as usize).cloned(),
            Source::Cachefs(host) => host.lower(part).map(|lower| vec![lower]),
        };
        let overlay = Overlay::mount(&lowers.context("nothing is prepared")?)?;
        let root = overlay.root();
        self.overlays.insert(part, overlay);
        Ok(root)
    }

    /// Brings the side into `state`. Every side is warm after a run.
    pub(super) fn prepare(&mut self, state: State) -> Result<()> {
        if state == State::Warm {
            return Ok(());
        }
        self.overlays.clear();
        if let Source::Cachefs(host) = &mut self.source
            && state == State::Cold
        {
            host.mount = None;
            if host.spec.cache.exists() {
                fs::remove_dir_all(&host.spec.cache)?;
            }
        }
        process::drop_kernel_caches()?;
        if let Source::Cachefs(host) = &mut self.source
            && host.mount.is_none()
        {
            host.mount = Some(Mount::start(host.spec.clone())?);
        }
        Ok(())
    }

    /// Reads everything once, so that the local cache holds all of it.
    pub(super) fn fill(&mut self) -> Result<()> {
        self.prepare(State::Cold)?;
        for part in Part::ALL {
            let root = self.root(part)?;
            let mut tar = Command::new("bash");
            run(tar.args(["-c", "set -o pipefail; tar cf - . | cat >/dev/null"]).current_dir(root))?.ok()?;
        }
        Ok(())
    }

    /// How many requests the daemon has answered so far, counted by its writes; `None` for the native side.
    pub(super) fn replies(&mut self) -> Result<Option<u64>> {
        let Source::Cachefs(host) = &mut self.source else { return Ok(None) };
        host.mount.as_mut().map(|mount| process::writes(mount.worker()?)).transpose()
    }
}
