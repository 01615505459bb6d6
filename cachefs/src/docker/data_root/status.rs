//! Compares a data-root with its store: what is there, what is missing, what is stale.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;
use store::Digest;

use super::actual::ActualState;
use super::desired::{DesiredState, Skipped};
use super::error::Result;
use super::layer;
use super::owned_entries::OwnedEntries;
use super::plan::Plan;
use super::root::Root;
use crate::docker::mount::{self, State};

/// The health of a data-root after a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It is as it should be, or the command has done what it is for.
    Good,
    /// Something is to be done; one sentence says what.
    Wanting(String),
}

/// What `status` prints.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    data_root: PathBuf,
    store: PathBuf,
    generation: u64,
    mount: PathBuf,
    mount_state: State,
    /// Nothing to add, repair or remove.
    in_sync: bool,
    images: Count,
    layers: Count,
    names: Count,
    /// Names that belong to somebody else's image here.
    names_kept: BTreeSet<String>,
    /// Layers whose links lead elsewhere or whose files are incomplete; `sync` repairs them.
    layers_to_repair: BTreeSet<Digest>,
    skipped: Vec<Skipped>,
    /// The process id of the running dockerd.
    dockerd: Option<u32>,
    /// What is missing or stale waits until dockerd is stopped.
    restart_needed: bool,
}

/// Numbers of one kind of thing.
#[derive(Debug, Serialize)]
struct Count {
    /// Wanted by the store and here.
    present: usize,
    /// Wanted by the store and not here.
    missing: BTreeSet<String>,
    /// Added by this program, and gone from the store.
    stale: BTreeSet<String>,
}

fn texts<T: ToString>(things: impl IntoIterator<Item = T>) -> BTreeSet<String> {
    things.into_iter().map(|thing| thing.to_string()).collect()
}

impl Report {
    /// Compares a data-root with what the store wants there.
    pub(super) fn new(
        root: &Root,
        wanted: &DesiredState,
        owned: &OwnedEntries,
        running: Option<u32>,
    ) -> Result<Report> {
        let present = ActualState::read(root)?;
        let plan = Plan::new(wanted, &present, owned);
        let broken = |chain: &&Digest| !layer::is_intact(root, &owned.mount, chain);
        let layers_to_repair: BTreeSet<Digest> = plan.check_layers.iter().filter(broken).copied().collect();
        let (adds, removes) = (plan.adds(), plan.removes());
        Ok(Report {
            data_root: root.path().into(),
            store: owned.store.clone(),
            generation: wanted.generation,
            mount: owned.mount.clone(),
            mount_state: mount::state(&owned.mount),
            in_sync: !adds && !removes && layers_to_repair.is_empty(),
            images: Count {
                present: wanted.images.len() - plan.add_images.len(),
                missing: texts(&plan.add_images),
                stale: texts(&plan.remove_images),
            },
            layers: Count {
                present: wanted.layers.len() - plan.add_layers.len(),
                missing: texts(&plan.add_layers),
                stale: texts(&plan.remove_layers),
            },
            names: Count {
                present: wanted.references.len() - plan.set_references.len() - plan.kept_references.len(),
                missing: texts(plan.set_references.keys()),
                stale: plan.remove_references.clone(),
            },
            names_kept: plan.kept_references,
            layers_to_repair,
            skipped: wanted.skipped.clone(),
            dockerd: running,
            restart_needed: running.is_some() && (adds || removes),
        })
    }
}

impl Report {
    /// What is to be done, if anything.
    pub(super) fn health(&self) -> Health {
        let dir = self.data_root.display();
        let why = match (self.mount_state, self.in_sync) {
            (State::Absent, _) => format!("{} is not mounted: run cachefs mount", self.mount.display()),
            (State::Dead, _) => {
                format!("the daemon of {} does not answer: run cachefs mount again", self.mount.display())
            }
            (_, false) => format!("{dir} is out of date: run {}", self.remedy()),
            (State::Serving, true) => return Health::Good,
        };
        Health::Wanting(why)
    }

    /// The command that brings the data-root up to date.
    fn remedy(&self) -> String {
        let restart = if self.restart_needed { " --restart" } else { "" };
        format!("cachefs data-root sync {}{restart}", self.data_root.display())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mount = match self.mount_state {
            State::Serving => "serving",
            State::Dead => "dead: its daemon does not answer; run cachefs mount again",
            State::Absent => "not mounted: run cachefs mount, else containers cannot start",
        };
        writeln!(f, "data-root  {}", self.data_root.display())?;
        writeln!(f, "store      {}, generation {}", self.store.display(), self.generation)?;
        writeln!(f, "mount      {}, {mount}", self.mount.display())?;
        match self.dockerd {
            Some(0) => writeln!(f, "dockerd    running")?,
            Some(pid) => writeln!(f, "dockerd    running, process {pid}")?,
            None => writeln!(f, "dockerd    not running")?,
        }
        for (what, count) in [("images", &self.images), ("layers", &self.layers), ("names", &self.names)] {
            let (missing, stale) = (count.missing.len(), count.stale.len());
            writeln!(f, "{what:10} {} present, {missing} missing, {stale} stale", count.present)?;
        }
        for name in &self.names.missing {
            writeln!(f, "missing    {name}")?;
        }
        for name in &self.names.stale {
            writeln!(f, "stale      {name}")?;
        }
        for name in &self.names_kept {
            writeln!(f, "kept       {name}: it names a local image")?;
        }
        for skipped in &self.skipped {
            writeln!(f, "left out   {}: {}", skipped.image, skipped.why)?;
        }
        if !self.layers_to_repair.is_empty() {
            writeln!(
                f,
                "repair     {} layers lead elsewhere or lack files: run cachefs data-root sync",
                self.layers_to_repair.len()
            )?;
        }
        if self.in_sync { write!(f, "to do      nothing") } else { write!(f, "to do      run {}", self.remedy()) }
    }
}
