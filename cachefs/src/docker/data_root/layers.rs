//! Adds many layers: graph driver directories in order, database entries in parallel, then all names at once.
//!
//! The slow part is to read indexes and recipes from the shared disk and to write `tar-split.json.gz`; each layer does
//! that independently of the others. What depends on the layer below is small and is done first.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use store::Digest;
use store::reader::Store;

use super::daemon;
use super::desired::DesiredState;
use super::error::{Error, Result};
use super::layer;
use super::plan::Plan;
use super::root::Root;
use crate::docker::files::{self, FileError};
use crate::docker::workers;

/// A progress bar is shown from this many layers on.
const BAR_FROM: usize = 4;

/// The result of adding layers.
#[derive(Debug)]
pub(super) struct Added {
    /// Layers added.
    pub(super) count: usize,
    /// Layers that were there and not intact.
    pub(super) repaired: usize,
    /// Layers that could not be added, each with its own reason or that of a layer below.
    pub(super) failed: BTreeMap<Digest, String>,
}

/// Layers to add to a data-root.
pub(super) struct Addition<'a> {
    /// The data-root.
    pub(super) root: &'a Root,
    /// The store.
    pub(super) store: &'a Store,
    /// Where the store is mounted.
    pub(super) mount: &'a Path,
    /// What the store asks for.
    pub(super) wanted: &'a DesiredState,
}

/// Sorts errors: one that concerns a single layer goes into `failed`, any other (a full disk) ends the whole run.
fn note(failed: &mut BTreeMap<Digest, String>, chain: &Digest, result: Result<()>) -> Result<()> {
    match result {
        Err(e @ (Error::Store(_) | Error::Damaged { .. } | Error::File(FileError::NoLink { .. }))) => {
            failed.insert(*chain, e.to_string());
            Ok(())
        }
        other => other,
    }
}

impl Addition<'_> {
    /// Adds and repairs the layers that a plan names.
    pub(super) fn carry_out(&self, plan: &Plan) -> Result<Added> {
        let mut failed = BTreeMap::new();
        let is_broken = |chain: &&Digest| !layer::is_intact(self.root, self.mount, chain);
        let broken: Vec<Digest> = plan.check_layers.iter().filter(is_broken).copied().collect();
        let concerned: BTreeSet<_> = plan.add_layers.iter().chain(&plan.check_layers).collect();
        for chain in self.wanted.order.iter().filter(|chain| concerned.contains(chain)) {
            match self.cause_below(chain, &failed) {
                Some(why) => _ = failed.insert(*chain, why),
                None => note(&mut failed, chain, layer::ensure_overlay(self.root, self.mount, chain, self.wanted))?,
            }
        }
        let to_stage: Vec<_> = plan.add_layers.iter().filter(|chain| !failed.contains_key(*chain)).collect();
        for (chain, result) in to_stage.iter().zip(self.stage(&to_stage)) {
            note(&mut failed, chain, result)?;
        }
        for chain in &plan.add_layers {
            if let Some(why) = self.cause_below(chain, &failed) {
                failed.entry(*chain).or_insert(why);
            }
        }
        let (unusable, whole): (Vec<_>, Vec<_>) = plan.add_layers.iter().partition(|chain| failed.contains_key(*chain));
        self.publish(&whole)?;
        for chain in unusable {
            layer::remove_overlay(self.root, chain)?;
        }
        let repaired = broken.iter().filter(|chain| !failed.contains_key(*chain)).count();
        Ok(Added { count: whole.len(), repaired, failed })
    }

    /// Why the layer below could not be added, if that is so.
    fn cause_below(&self, chain: &Digest, failed: &BTreeMap<Digest, String>) -> Option<String> {
        failed.get(&self.wanted.layers.get(chain)?.parent?).cloned()
    }

    /// Writes database entries into the staging directory, in parallel; returns the result of each.
    fn stage(&self, chains: &[&Digest]) -> Vec<Result<()>> {
        let bar = progress(chains.len());
        let results = workers::each(chains, |chain| {
            let staged = layer::stage_entry(self.root, self.store, chain, &self.wanted.layers[*chain]);
            bar.inc(1);
            staged
        });
        bar.finish_and_clear();
        let crashed = || Err(store::Error::corrupt("a layer", "writing its files crashed").into());
        results.into_iter().map(|result| result.unwrap_or_else(crashed)).collect()
    }

    fn publish(&self, chains: &[&Digest]) -> Result<()> {
        files::sync_all(&self.root.overlay())?;
        files::sync_all(&self.root.layer_db())?;
        // Until here dockerd could not see anything. It may have started meanwhile, and must not meet layers it does not know.
        if !chains.is_empty() {
            daemon::stopped(self.root)?;
        }
        for chain in chains {
            layer::publish_entry(self.root, chain)?;
        }
        files::forget_tree(&self.root.staging())?;
        Ok(files::sync_dir(&self.root.layer_db().join("sha256"))?)
    }
}

fn progress(layers: usize) -> ProgressBar {
    if layers < BAR_FROM {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("adding layers {bar:40} {pos}/{len} {eta}");
    ProgressBar::new(layers as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
