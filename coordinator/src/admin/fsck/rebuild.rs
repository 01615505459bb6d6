//! Restores from the store what a lost database or catalogue knew.
//!
//! The facts in the database are a cache of the store's: the indexes say where pieces lie, and the catalogue's image records say
//! which layer a blob is. Images that a salvaged catalogue lacks come back from their documents: a manifest whose config and
//! layers are all in the store is an image. The documents do not contain the image's name, so it gets a name that says so.

use std::collections::HashSet;
use std::sync::Arc;

use coordinator_api::fsck::{FsckPhase, FsckRebuilt};
use jiff::Timestamp;
use store::Digest;
use store::catalogue::{Catalogue, Change};
use store::image::{ImageRecord, LayerRecord, RequestedBy};

use crate::admin::fsck::run::{Halt, Run};
use crate::admin::fsck::survey::SurveyResult;
use crate::registries::Document;
use crate::registries::image::manifest::{self, MAX_MANIFEST, Parsed};
use crate::unpack::previous_layout::pieces_of;

/// The repository of recovered images, whose real names are lost.
const NAMELESS: &str = "localhost/recovered";
/// Pieces that are written to the database at a time.
const BATCH: usize = 4096;

/// Restores everything.
pub(super) fn rebuild(run: &Run, surveyed: &SurveyResult) -> Result<(), Halt> {
    let mut rebuilt = FsckRebuilt { pieces: pieces(run, surveyed)?, ..FsckRebuilt::default() };
    rebuilt.blobs = blobs(run, &surveyed.catalogue)?;
    if run.store().salvage_note()?.is_some() {
        rebuilt.images = images(run, surveyed)?;
        run.components.publisher.settle_salvage()?;
    }
    run.show(|view| view.rebuilt = Some(rebuilt));
    Ok(())
}

/// Restores where each layer's pieces lie. Returns the number of pieces.
fn pieces(run: &Run, surveyed: &SurveyResult) -> Result<u64, Halt> {
    let layers = &surveyed.survey.layers;
    run.enter(FsckPhase::Rebuilding, layers.len() as u64)?;
    let locations = run.components.state_db.locations();
    let (mut batch, mut count) = (Vec::with_capacity(BATCH), 0);
    for diff_id in layers {
        run.go_on()?;
        run.advance(1);
        // An index that cannot be read is already a finding; the repair takes care of it.
        let Ok(index) = run.store().index(diff_id) else { continue };
        let walked = pieces_of(&index, |digest, location| {
            batch.push((digest, location));
            count += 1;
            if batch.len() == BATCH {
                locations.put(&batch);
                batch.clear();
            }
        });
        if let Err(error) = walked {
            tracing::warn!("not all pieces of layer {diff_id} are known again: {error}");
        }
        locations.put(&batch);
        batch.clear();
    }
    Ok(count)
}

/// Restores which layer each blob unpacks to.
fn blobs(run: &Run, catalogue: &Catalogue) -> Result<u64, Halt> {
    let mut seen = HashSet::new();
    for layer in catalogue.images().flat_map(|image| &image.layers) {
        run.go_on()?;
        if seen.insert(layer.blob) {
            run.components.state_db.record_blob(&layer.blob, &layer.diff_id)?;
        }
    }
    Ok(seen.len() as u64)
}

/// Adds images that are complete in the store but unknown to the catalogue, even as an earlier target of a tag.
fn images(run: &Run, surveyed: &SurveyResult) -> Result<Vec<String>, Halt> {
    let catalogue = run.components.publisher.catalogue();
    let mut known: HashSet<Digest> = catalogue.images().flat_map(|image| [image.manifest, image.target]).collect();
    known.extend(catalogue.tags().flat_map(|state| state.history.iter().map(|step| step.manifest)));
    let mut found = Vec::new();
    for digest in surveyed.survey.blobs.iter().filter(|digest| !known.contains(digest)) {
        run.go_on()?;
        if let Some(image) = image(run, *digest) {
            found.push(Arc::new(image));
        }
    }
    let names = found.iter().map(|image| image.familiar_name()).collect();
    if !found.is_empty() {
        run.components.publisher.commit(found.into_iter().map(Change::Set).collect())?;
    }
    Ok(names)
}

/// The image whose manifest this blob is, if it is a manifest and the whole image is in the store.
fn image(run: &Run, digest: Digest) -> Option<ImageRecord> {
    let bytes = run.store().blob(&digest).ok().filter(|bytes| bytes.len() as u64 <= MAX_MANIFEST)?;
    let media_type = manifest::media_type(&bytes, None, "a blob").ok()?;
    let document = Document { digest, media_type: media_type.clone(), bytes: bytes.into() };
    let Ok(Parsed::Manifest(manifest)) = manifest::parse(&document, "a blob") else { return None };
    let config: Digest = manifest.config.digest.parse().ok()?;
    let (platform, remote) = manifest::join(&manifest, &run.store().blob(&config).ok()?, "a blob").ok()?;
    let layers: Option<Vec<LayerRecord>> = remote
        .into_iter()
        .map(|layer| {
            let size = run.store().layer_header(&layer.diff_id).ok()?.tar_size;
            let (diff_id, blob, blob_size) = (layer.diff_id, layer.blob, layer.claimed);
            Some(LayerRecord { diff_id, size, blob, blob_size, media_type: layer.media_type })
        })
        .collect();
    Some(ImageRecord {
        repository: NAMELESS.to_owned(),
        tag: Some(config.hex()[..12].to_owned()),
        target: digest,
        manifest: digest,
        media_type,
        config,
        platform,
        layers: layers?,
        published_at: u64::try_from(Timestamp::now().as_second()).unwrap_or(0),
        ordered_by: RequestedBy::Operator,
    })
}
