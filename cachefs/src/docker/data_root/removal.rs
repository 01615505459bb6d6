//! Takes everything of ours out of a data-root again, and leaves dockerd what it had.
//!
//! All or nothing: as long as something local needs a layer or an image of ours, nothing is removed, and the error names
//! what needs it. The order is that of `apply`, so that dockerd starts after a crash at any point, and the command can be run
//! again: names, images, layers, what dockerd was told about registries' blobs, at last the list of owned entries.

use std::collections::BTreeSet;

use serde::Serialize;
use store::Digest;

use super::actual::ActualState;
use super::apply;
use super::desired::DesiredState;
use super::error::{Error, Result};
use super::owned_entries::OwnedEntries;
use super::plan::{Plan, is_our_image, is_ours};
use super::root::Root;
use crate::docker::files;

/// How much was removed.
#[derive(Debug, Serialize)]
pub(super) struct Removed {
    /// Images.
    pub(super) images: usize,
    /// Layers.
    pub(super) layers: usize,
    /// Names.
    pub(super) names: usize,
}

/// Removes everything of ours.
pub(super) fn remove(root: &Root, owned: &OwnedEntries) -> Result<Removed> {
    let present = ActualState::read(root)?;
    // A store that wants nothing.
    let plan = Plan::new(&DesiredState::default(), &present, owned);
    let users = users(&plan, &present, owned);
    if !users.is_empty() {
        return Err(Error::InUse { path: root.path().into(), users: users.into_iter().collect() });
    }
    let mut references = present.references.clone();
    plan.remove_references.iter().for_each(|name| references.remove(name));
    if references != present.references {
        references.write(root)?;
    }
    apply::remove_entries(root, &plan, owned)?;
    forget_blobs(root, &plan, &present)?;
    files::forget_tree(&root.staging())?;
    if !root.volume_database().exists() {
        // dockerd has never run here: not even its directories were there, and they would decide which store it takes.
        if references.is_empty() {
            files::forget_file(&root.repositories())?;
        }
        root.remove_directories()?;
    }
    files::sync_all(root.path())?;
    files::forget_file(&root.owned())?;
    files::sync_dir(root.path())?;
    Ok(Removed {
        images: plan.remove_images.len(),
        layers: plan.remove_layers.len(),
        names: plan.remove_references.len(),
    })
}

/// What still needs something of ours, in words.
fn users(plan: &Plan, present: &ActualState, owned: &OwnedEntries) -> BTreeSet<String> {
    let ours = owned.layers.iter().filter(|chain| is_ours(present, owned, chain));
    let layers: BTreeSet<_> = ours.filter(|chain| !plan.remove_layers.contains(*chain)).copied().collect();
    let ours = owned.images.iter().filter(|id| is_our_image(present, owned, id));
    let images: BTreeSet<_> = ours.filter(|id| !plan.remove_images.contains(*id)).copied().collect();
    let needs = |id: &Digest| {
        let top = present.images.get(id).and_then(|image| image.top);
        images.contains(id) || top.is_some_and(|top| !present.chain(top).is_disjoint(&layers))
    };
    let mut users = BTreeSet::new();
    for (_, containers) in present.container_images.iter().filter(|(image, _)| needs(image)) {
        users.extend(containers.iter().map(|name| format!("container {name}")));
    }
    let mut named = BTreeSet::new();
    let names =
        present.references.iter().filter(|(name, image)| !plan.remove_references.contains(*name) && needs(image));
    for (name, image) in names {
        named.insert(image);
        users.insert(format!("image {name}"));
    }
    let unnamed = present.images.keys().filter(|id| !owned.images.contains(*id) && !named.contains(*id) && needs(id));
    users.extend(unnamed.map(|id| format!("image {}", &id.hex()[..12])));
    if !present.build_cache.is_disjoint(&layers) {
        users.insert("the build cache".to_owned());
    }
    if users.is_empty() && !(layers.is_empty() && images.is_empty()) {
        users.insert("a container that is being removed".to_owned());
    }
    users
}

/// Removes what dockerd knows about registries' blobs of layers that are no longer here.
fn forget_blobs(root: &Root, plan: &Plan, present: &ActualState) -> Result<()> {
    let (gone, stay): (Vec<_>, Vec<_>) =
        present.layers.iter().partition(|(chain, _)| plan.remove_layers.contains(*chain));
    let mut gone: BTreeSet<_> = gone.into_iter().map(|(_, layer)| layer.diff_id).collect();
    stay.into_iter().for_each(|(_, layer)| _ = gone.remove(&layer.diff_id));
    for diff_id in &gone {
        files::forget_file(&root.blobs_of_layers().join(diff_id.hex()))?;
    }
    for blob in files::names(&root.layers_of_blobs())? {
        let path = root.layers_of_blobs().join(blob);
        let diff_id = files::read_text(&path)?.and_then(|text| text.parse().ok());
        if diff_id.is_some_and(|diff_id| gone.contains(&diff_id)) {
            files::forget_file(&path)?;
        }
    }
    Ok(())
}
