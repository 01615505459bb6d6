//! Carries out a plan, in such an order that dockerd can start after a crash at any point.
//!
//! The order: the list of owned entries, layers (graph driver, then layer database, base first), registries' blobs,
//! images, names; then removals the other way round: names, images, layers, the list of owned entries.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use store::Digest;
use store::image_config::diff_ids;
use store::reader::Store;

use super::actual::ActualState;
use super::desired::{DesiredState, Skipped, chain_ids};
use super::error::{Error, Result};
use super::layer;
use super::layers::Addition;
use super::owned_entries::OwnedEntries;
use super::plan::{Plan, is_ours};
use super::references::References;
use super::root::Root;
use crate::docker::files;

/// The most origins of a layer that dockerd remembers.
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
    /// Layers whose files were incomplete or led elsewhere.
    pub(super) layers_repaired: usize,
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
    /// Images left out, and why.
    pub(super) skipped: Vec<Skipped>,
    /// What waits until dockerd is stopped, because it runs.
    pub(super) waiting: Waiting,
    /// Whether anything waits.
    pub(super) restart_needed: bool,
}

/// How much waits to be added or removed.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Waiting {
    /// Images.
    pub(super) images: usize,
    /// Layers.
    pub(super) layers: usize,
    /// Names.
    pub(super) names: usize,
}

impl Waiting {
    fn new(plan: &Plan) -> Waiting {
        Waiting {
            images: plan.add_images.len() + plan.remove_images.len(),
            layers: plan.add_layers.len() + plan.remove_layers.len(),
            names: plan.set_references.len() + plan.remove_references.len(),
        }
    }
}

/// A data-root, and what the store asks for there.
pub(super) struct Work<'a> {
    /// The data-root.
    pub(super) root: &'a Root,
    /// The store.
    pub(super) store: &'a Store,
    /// What the store asks for.
    pub(super) wanted: &'a DesiredState,
    /// What is there.
    pub(super) present: &'a ActualState,
    /// Whether a dockerd runs on the data-root.
    pub(super) running: bool,
}

impl Work<'_> {
    /// Carries out the plan; returns what was done.
    pub(super) fn apply(&self, owned: &mut OwnedEntries) -> Result<Outcome> {
        let mut plan = Plan::new(self.wanted, self.present, owned);
        let mut outcome = Outcome {
            generation: self.wanted.generation,
            names_kept: plan.kept_references.clone(),
            skipped: self.wanted.skipped.clone(),
            ..Outcome::default()
        };
        if self.running {
            outcome.waiting = Waiting::new(&plan.hold_back());
            outcome.restart_needed = outcome.waiting != Waiting::default();
        }
        self.root.make_directories()?;
        files::forget_tree(&self.root.staging())?;
        self.announce(&plan, owned)?;
        let Work { root, store, wanted, .. } = *self;
        let added = Addition { root, store, mount: &owned.mount, wanted }.carry_out(&plan)?;
        (outcome.layers_added, outcome.layers_repaired) = (added.count, added.repaired);
        if self.running {
            owned.write(self.root)?;
            return Ok(outcome);
        }
        self.add_origins(&added.failed, owned)?;
        let left_out = self.add_images(&plan, &added.failed, &mut outcome)?;
        self.names(&plan, &left_out, &mut outcome)?;
        self.remove(&plan, owned, &mut outcome)?;
        for name in &outcome.names_set {
            let image = self.wanted.references.get(name).copied();
            owned.references.insert(name.clone(), image.into_iter().collect());
        }
        owned.references.retain(|name, _| !outcome.names_kept.contains(name));
        owned.write(self.root)?;
        Ok(outcome)
    }

    /// Adds to the owned entries what is about to be added to the data-root.
    fn announce(&self, plan: &Plan, owned: &mut OwnedEntries) -> Result<()> {
        owned.layers.extend(&plan.add_layers);
        owned.images.extend(&plan.add_images);
        for (name, image) in &plan.set_references {
            owned.references.entry(name.clone()).or_default().insert(*image);
        }
        owned.write(self.root)
    }

    /// Tells dockerd where registries have our layers, so that it neither downloads nor uploads them again. What it knows about
    /// layers of its own is left alone.
    fn add_origins(&self, failed: &BTreeMap<Digest, String>, owned: &OwnedEntries) -> Result<()> {
        let mut left_out: BTreeSet<_> =
            failed.keys().filter_map(|chain| self.wanted.layers.get(chain)).map(|l| l.diff_id).collect();
        let theirs = self.present.layers.iter().filter(|(chain, _)| !is_ours(self.present, owned, chain));
        left_out.extend(theirs.map(|(_, layer)| layer.diff_id));
        let (by_diff_id, by_digest) = (self.root.blobs_of_layers(), self.root.layers_of_blobs());
        for (diff_id, origins) in self.wanted.origins.iter().filter(|(diff_id, _)| !left_out.contains(*diff_id)) {
            let path = by_diff_id.join(diff_id.hex());
            let text = files::read_text(&path)?.unwrap_or_default();
            let mut known: Vec<V2Metadata> = serde_json::from_str(&text).unwrap_or_default();
            let before = known.len();
            for (blob, repository) in origins {
                if !known.iter().any(|o| o.digest == blob.to_string() && o.source_repository == *repository) {
                    known.push(V2Metadata {
                        digest: blob.to_string(),
                        source_repository: repository.clone(),
                        hmac: String::new(),
                    });
                }
                files::ensure_file(&by_digest.join(blob.hex()), diff_id.to_string().as_bytes(), 0o644)?;
            }
            if known.len() > before {
                let newest = &known[known.len().saturating_sub(ORIGINS_MAX)..];
                let bytes = serde_json::to_vec(newest).map_err(|e| Error::io("write", &path, e.into()))?;
                files::ensure_file(&path, &bytes, 0o644)?;
            }
        }
        Ok(files::sync_all(&by_digest)?)
    }

    /// Adds image configs; returns the images whose layers could not be added.
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
                files::replace(&self.root.image_content().join(id.hex()), config, 0o600)?;
                outcome.images_added += 1;
            }
        }
        Ok(left_out)
    }

    /// Sets and removes names. dockerd may have changed the file since it was read: names that changed are left alone.
    fn names(&self, plan: &Plan, left_out: &BTreeSet<Digest>, outcome: &mut Outcome) -> Result<()> {
        let mut references = References::read(self.root)?;
        for (name, image) in plan.set_references.iter().filter(|(_, image)| !left_out.contains(*image)) {
            if references.get(name) == self.present.references.get(name) {
                references.set(name, *image);
                outcome.names_set.insert(name.clone());
            } else {
                _ = outcome.names_kept.insert(name.clone())
            }
        }
        for name in &plan.remove_references {
            if references.get(name) == self.present.references.get(name) {
                references.remove(name);
                outcome.names_removed.insert(name.clone());
            }
        }
        if outcome.names_set.is_empty() && outcome.names_removed.is_empty() && self.root.repositories().is_file() {
            Ok(())
        } else {
            references.write(self.root)
        }
    }

    fn remove(&self, plan: &Plan, owned: &mut OwnedEntries, outcome: &mut Outcome) -> Result<()> {
        remove_entries(self.root, plan, owned)?;
        (outcome.images_removed, outcome.layers_removed) = (plan.remove_images.len(), plan.remove_layers.len());
        let gone = |name: &String| {
            !self.wanted.references.contains_key(name) && !self.wanted.untouchable.references.contains(name)
        };
        owned.references.retain(|name, _| !gone(name));
        owned.images.retain(|id| !plan.remove_images.contains(id) && !plan.forget.contains(id));
        owned.layers.retain(|chain| !plan.remove_layers.contains(chain) && !plan.forget.contains(chain));
        Ok(())
    }
}

/// Removes a plan's images and layers, and what is left of layers that are not ours any more.
pub(super) fn remove_entries(root: &Root, plan: &Plan, owned: &OwnedEntries) -> Result<()> {
    for id in &plan.remove_images {
        files::forget_tree(&root.image_metadata().join(id.hex()))?;
        files::forget_file(&root.image_content().join(id.hex()))?;
    }
    for chain in &plan.remove_layers {
        layer::remove(root, chain)?;
    }
    for chain in owned.layers.intersection(&plan.forget) {
        layer::remove_overlay(root, chain)?;
    }
    Ok(())
}

/// Where a registry has a layer, as dockerd writes it.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct V2Metadata {
    digest: String,
    source_repository: String,
    #[serde(rename = "HMAC", default)]
    hmac: String,
}

#[cfg(test)]
mod tests;
