//! Rebuilds a damaged startup pack from the layers, which contain everything that is in it.
//!
//! The pack's table says which pieces it holds, in which order. If the table itself is damaged, an empty pack takes its place.
//! Starts are then slower for a while, and the worker of [`Profiles`](crate::profiles::Profiles) looks at the chain again.

use std::collections::BTreeSet;

use jiff::Timestamp;
use store::Error;
use store::catalogue::Catalogue;
use store::layer::{Piece, Source};
use store::profile::{StartupPiece, StartupRecord};
use store::publisher::Suspect;

use coordinator_api::fsck::FsckOutcome;

use crate::admin::fsck::check::{look, packs};
use crate::admin::fsck::finding::Object;
use crate::admin::fsck::run::{Halt, Run};

/// Rebuilds all damaged startup packs.
pub(super) fn make_again(run: &Run) -> Result<(), Halt> {
    let damaged = packs(&run.findings.lock().damaged());
    let catalogue = run.components.publisher.catalogue();
    for record in catalogue.startups().filter(|record| damaged.contains(&record.pack)) {
        run.go_on()?;
        let object = Object::Pack(record.pack);
        let pieces = run.store().startup_table(record).map(|table| table.pieces);
        run.components.publisher.quarantine(Suspect::Pack(record.pack))?;
        let made = publish(run, &catalogue, record, pieces.as_deref().unwrap_or_default());
        let wrong = match made {
            Ok(()) => look(run, object)?,
            Err(error) => Some(error.to_string()),
        };
        let outcome = if wrong.is_none() { FsckOutcome::Repaired } else { FsckOutcome::NotRepaired };
        run.findings.lock().settle(&object, outcome, wrong);
        run.advance(1);
        if pieces.is_err() {
            run.components.profiles.look_again(record.chain);
        }
    }
    Ok(())
}

/// Has the startup packs looked at again whose layers were damaged: a repaired layer may have another index than the one in the pack.
pub(super) fn look_again(run: &Run, damaged: &[Object]) {
    let catalogue = run.components.publisher.catalogue();
    for record in catalogue.startups() {
        let layers = catalogue.image_of_chain(&record.chain).map(|image| image.diff_ids()).unwrap_or_default();
        if layers.into_iter().any(|layer| damaged.contains(&Object::Layer(layer))) {
            run.components.profiles.look_again(record.chain);
        }
    }
}

fn publish(run: &Run, catalogue: &Catalogue, record: &StartupRecord, pieces: &[StartupPiece]) -> Result<(), Error> {
    let missing = || Error::Missing { what: format!("an image with chain {}", record.chain) };
    let image = catalogue.image_of_chain(&record.chain).ok_or_else(missing)?;
    let wrong = || Error::corrupt(format!("the startup table of chain {}", record.chain), "it names no such piece");
    // Layer by layer, so that only one index is in memory at a time. A table has a bounded number of pieces.
    let mut found: Vec<Option<Piece>> = vec![None; pieces.len()];
    let layers: BTreeSet<u16> = pieces.iter().map(|piece| piece.key.layer).collect();
    for position in layers {
        let layer = image.layers.get(usize::from(position)).ok_or_else(wrong)?;
        let index = run.store().index(&layer.diff_id)?;
        for (piece, found) in pieces.iter().zip(&mut found).filter(|(piece, _)| piece.key.layer == position) {
            *found = Some(index.piece(&index.inode(piece.key.inode)?, piece.key.piece)?);
        }
    }
    let mut writer = run.components.publisher.stage_startup(&image.diff_ids())?;
    for (StartupPiece { key, blocks, weight, place }, found) in pieces.iter().zip(found) {
        let found = found.ok_or_else(wrong)?;
        let Source::Chunk { chunk, start, .. } = found.source else { continue };
        if place.is_none() {
            writer.name(*key, *blocks, *weight, blocks.content_len(found.len))?;
            continue;
        }
        let chunk = run.store().read_chunk(&chunk)?;
        let bytes = chunk.piece(start, found.len).ok_or_else(wrong)?;
        writer.add(*key, *blocks, *weight, &found.digest, bytes)?;
    }
    let starts = if pieces.is_empty() { 0 } else { record.starts };
    let now = u64::try_from(Timestamp::now().as_second()).unwrap_or(0);
    let staged = writer.finish()?.learned_from(record.origin);
    run.components.publisher.publish_startup(staged, record.chain, starts, now).map(drop)
}
