//! Carries a plan out, in an order in which dockerd can be started after a crash at any point.
//!
//! Ledger, layers (graph driver, then layer database, base first), registries' blobs, images, names; then removals the
//! other way round: names, images, layers, ledger.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use store::Digest;
use store::image_config::diff_ids;
use store::reader::Store;

use super::daemon::Identity;
use super::error::{Error, Result};
use super::layer;
use super::layers::Addition;
use super::ledger::Ledger;
use super::plan::Plan;
use super::present::Present;
use super::references::References;
use super::root::Root;
use super::wanted::{Skipped, Wanted, chain_ids};
use super::write;

/// dockerd remembers at most so many origins of a layer.
const ORIGINS_MAX: usize = 50;

/// What was done.
#[derive(Debug, Default, Serialize)]
pub(super) struct Outcome {
    /// Generation of the store's catalogue.
    pub(super) generation: u64,
    /// Images added.
    pub(super) images_added: usize,
    /// Layers added.
    pub(super) layers_added: usize,
    /// Names given or moved.
    pub(super) names_set: BTreeSet<String>,
    /// Names left as somebody else had set them.
    pub(super) names_kept: BTreeSet<String>,
    /// Names taken away.
    pub(super) names_removed: BTreeSet<String>,
    /// Images removed.
    pub(super) images_removed: usize,
    /// Layers removed.
    pub(super) layers_removed: usize,
    /// Removals put off because dockerd runs.
    pub(super) removals_put_off: bool,
    /// Images left out, and why.
    pub(super) skipped: Vec<Skipped>,
    /// Whether a running dockerd has not seen everything yet.
    pub(super) restart_needed: bool,
}

/// A data-root and what is to be brought into it.
pub(super) struct Work<'a> {
    /// The data-root.
    pub(super) root: &'a Root,
    /// The store.
    pub(super) store: &'a Store,
    /// What the store asks for.
    pub(super) wanted: &'a Wanted,
    /// What is there.
    pub(super) present: &'a Present,
    /// The dockerd that runs on the data-root.
    pub(super) running: Option<Identity>,
}

impl Work<'_> {
    /// Does it.
    pub(super) fn apply(&self, ledger: &mut Ledger) -> Result<Outcome> {
        let mut plan = Plan::new(self.wanted, self.present, ledger);
        let mut outcome = Outcome {
            generation: self.wanted.generation,
            names_kept: plan.kept_references.clone(),
            skipped: self.wanted.skipped.clone(),
            removals_put_off: self.running.is_some() && plan.removes(),
            ..Outcome::default()
        };
        if self.running.is_some() {
            plan.keep_everything();
        }
        self.root.make_directories()?;
        write::forget_tree(&self.root.staging())?;
        self.announce(&plan, ledger)?;
        let Work { root, store, wanted, present, .. } = *self;
        let added = Addition { root, store, mount: &ledger.mount, wanted, present }.carry_out(&plan)?;
        outcome.layers_added = added.count;
        self.add_origins(&added.failed)?;
        let left_out = self.add_images(&plan, &added.failed, &mut outcome)?;
        self.names(&plan, &left_out, &mut outcome)?;
        self.remove(&plan, ledger, &mut outcome)?;
        for name in &outcome.names_set {
            let image = self.wanted.references.get(name).copied();
            ledger.references.insert(name.clone(), image.into_iter().collect());
        }
        ledger.references.retain(|name, _| !outcome.names_kept.contains(name));
        ledger.write(self.root)?;
        outcome.restart_needed = self.running.is_some() && ledger.unseen_by == self.running;
        Ok(outcome)
    }

    /// Notes in the ledger what is about to be there.
    fn announce(&self, plan: &Plan, ledger: &mut Ledger) -> Result<()> {
        ledger.layers.extend(&plan.add_layers);
        ledger.images.extend(&plan.add_images);
        for (name, image) in &plan.set_references {
            ledger.references.entry(name.clone()).or_default().insert(*image);
        }
        if self.running.is_none() {
            ledger.unseen_by = None;
        } else if plan.adds() {
            ledger.unseen_by.clone_from(&self.running);
        }
        ledger.write(self.root)
    }

    /// Tells dockerd where registries have the layers, so that it neither downloads nor uploads them again.
    fn add_origins(&self, failed: &BTreeMap<Digest, String>) -> Result<()> {
        let left_out: BTreeSet<_> =
            failed.keys().filter_map(|chain| self.wanted.layers.get(chain)).map(|l| l.diff_id).collect();
        let dir = self.root.distribution();
        let (by_diff_id, by_digest) = (dir.join("v2metadata-by-diffid/sha256"), dir.join("diffid-by-digest/sha256"));
        write::make_dir(&by_diff_id, 0o755)?;
        write::make_dir(&by_digest, 0o755)?;
        for (diff_id, origins) in self.wanted.origins.iter().filter(|(diff_id, _)| !left_out.contains(*diff_id)) {
            let path = by_diff_id.join(diff_id.hex());
            let text = write::read_text(&path)?.unwrap_or_default();
            let mut known: Vec<Origin> = serde_json::from_str(&text).unwrap_or_default();
            let before = known.len();
            for (blob, repository) in origins {
                if !known.iter().any(|o| o.digest == blob.to_string() && o.source_repository == *repository) {
                    known.push(Origin {
                        digest: blob.to_string(),
                        source_repository: repository.clone(),
                        hmac: String::new(),
                    });
                }
                write::ensure_file(&by_digest.join(blob.hex()), diff_id.to_string().as_bytes(), 0o644)?;
            }
            if known.len() > before {
                let newest = &known[known.len().saturating_sub(ORIGINS_MAX)..];
                let bytes = serde_json::to_vec(newest).map_err(|e| Error::io("write", &path, e.into()))?;
                write::ensure_file(&path, &bytes, 0o644)?;
            }
        }
        write::sync_all(&dir)
    }

    /// Adds image configs; gives the images whose layers could not be added.
    fn add_images(
        &self,
        plan: &Plan,
        failed: &BTreeMap<Digest, String>,
        outcome: &mut Outcome,
    ) -> Result<BTreeSet<Digest>> {
        let mut left_out = BTreeSet::new();
        for (id, config) in &self.wanted.images {
            let chains = diff_ids(config).map(|ids| chain_ids(&ids)).unwrap_or_default();
            if let Some(why) = chains.iter().find_map(|chain| failed.get(chain)) {
                left_out.insert(*id);
                let named = |(name, image): &(&String, &Digest)| *image == id && !name.contains('@');
                let name =
                    self.wanted.references.iter().find(named).map_or_else(|| id.to_string(), |(name, _)| name.clone());
                outcome.skipped.push(Skipped { image: name, why: why.clone() });
            } else if plan.add_images.contains(id) {
                write::replace(&self.root.image_content().join(id.hex()), config, 0o600)?;
                outcome.images_added += 1;
            }
        }
        Ok(left_out)
    }

    /// Gives and takes names. dockerd may have changed the file since it was read: what changed stays changed.
    fn names(&self, plan: &Plan, left_out: &BTreeSet<Digest>, outcome: &mut Outcome) -> Result<()> {
        let mut references = References::read(self.root)?;
        for (name, image) in plan.set_references.iter().filter(|(_, image)| !left_out.contains(*image)) {
            match references.get(name) == self.present.references.get(name) {
                true => {
                    references.set(name, *image);
                    outcome.names_set.insert(name.clone());
                }
                false => _ = outcome.names_kept.insert(name.clone()),
            }
        }
        for name in &plan.remove_references {
            if references.get(name) == self.present.references.get(name) {
                references.remove(name);
                outcome.names_removed.insert(name.clone());
            }
        }
        match outcome.names_set.is_empty() && outcome.names_removed.is_empty() && self.root.repositories().is_file() {
            true => Ok(()),
            false => references.write(self.root),
        }
    }

    fn remove(&self, plan: &Plan, ledger: &mut Ledger, outcome: &mut Outcome) -> Result<()> {
        for id in &plan.remove_images {
            write::forget_tree(&self.root.image_metadata().join(id.hex()))?;
            write::forget_file(&self.root.image_content().join(id.hex()))?;
        }
        for chain in &plan.remove_layers {
            layer::remove(self.root, chain)?;
        }
        (outcome.images_removed, outcome.layers_removed) = (plan.remove_images.len(), plan.remove_layers.len());
        if self.running.is_none() {
            let gone = |name: &String| {
                !self.wanted.references.contains_key(name) && !self.wanted.untouchable.references.contains(name)
            };
            ledger.references.retain(|name, _| !gone(name));
            for chain in ledger.layers.intersection(&plan.forget) {
                layer::remove_overlay(self.root, chain)?;
            }
            ledger.images.retain(|id| !plan.remove_images.contains(id) && !plan.forget.contains(id));
            ledger.layers.retain(|chain| !plan.remove_layers.contains(chain) && !plan.forget.contains(chain));
        }
        Ok(())
    }
}

/// Where a registry has a layer, as dockerd writes it.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Origin {
    digest: String,
    source_repository: String,
    #[serde(rename = "HMAC", default)]
    hmac: String,
}

#[cfg(test)]
mod tests;
