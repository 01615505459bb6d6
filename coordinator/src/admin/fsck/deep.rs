//! The deep check: compares every byte of every pack with the pack's name, and every layer's reassembled tar with its diffID.
//!
//! Packs come first, each read from front to back, which suits the disk. Then each layer's tar is reassembled, which also proves
//! that the indexes point to the right bytes. Both walks are in the order of names. The cursor is the last name, and an
//! interrupted check resumes there. Objects published behind the cursor in the meantime were verified when they were published.

use coordinator_api::fsck::FsckPhase;
use store::layer::LayerIndex;
use store::{ContentDigest, Digest, Error};

use crate::admin::fsck::check;
use crate::admin::fsck::finding::Object;
use crate::admin::fsck::run::{Halt, Run};
use crate::admin::fsck::survey::SurveyResult;

/// Compares everything that the cursor has not passed yet.
pub(super) fn compare(run: &Run, surveyed: &SurveyResult) -> Result<(), Halt> {
    let cursor = run.cursor();
    if cursor.layer.is_none() {
        let passed = |pack: &ContentDigest| cursor.pack.as_ref().is_some_and(|last| pack <= last);
        let total = surveyed.packs.iter().map(|(_, len)| len).sum();
        run.enter(FsckPhase::Packs, total)?;
        for (name, len) in &surveyed.packs {
            if passed(name) {
                run.show(|view| view.done += len);
                continue;
            }
            if let Err(error) = check::pack(run, name)? {
                run.judge(Object::Pack(*name), error)?;
            }
            run.reached(|cursor| cursor.pack = Some(*name))?;
        }
    }
    let sizes: std::collections::HashMap<Digest, u64> = surveyed
        .catalogue
        .images()
        .flat_map(|image| image.layers.iter().map(|layer| (layer.diff_id, layer.size)))
        .collect();
    run.enter(FsckPhase::Content, sizes.values().sum())?;
    for diff_id in &surveyed.survey.layers {
        if cursor.layer.as_ref().is_some_and(|last| diff_id <= last) {
            run.show(|view| view.done += sizes.get(diff_id).copied().unwrap_or(0));
            continue;
        }
        content(run, diff_id)?;
        run.reached(|cursor| cursor.layer = Some(*diff_id))?;
    }
    Ok(())
}

/// Compares one layer's tar; if it differs, finds out which object is damaged.
fn content(run: &Run, diff_id: &Digest) -> Result<(), Halt> {
    let Err(error) = check::tar(run, diff_id)? else { return Ok(()) };
    let Ok(index) = run.store().index(diff_id) else {
        // The fast check has already reported it, or it was removed.
        return Ok(());
    };
    let broken = broken_packs(run, &index)?;
    if broken.is_empty() {
        return run.judge(Object::Layer(*diff_id), error);
    }
    for (pack, error) in broken {
        run.judge(check::find_culprit(run, &index, pack)?, error)?;
    }
    Ok(())
}

/// The packs whose chunks differ from what a layer's index says.
fn broken_packs(run: &Run, index: &LayerIndex) -> Result<Vec<(ContentDigest, Error)>, Halt> {
    let mut broken: Vec<(ContentDigest, Error)> = Vec::new();
    for number in 0..index.chunk_count() {
        run.go_on()?;
        let Ok(chunk) = index.chunk(number) else { continue };
        if broken.iter().any(|(pack, _)| *pack == chunk.pack) {
            continue;
        }
        if let Err(error) = run.store().read_chunk(&chunk) {
            broken.push((chunk.pack, error));
        }
    }
    Ok(broken)
}
