//! Access traces that are made by hand from the indexes in a store, and sent as hosts send them.

use anyhow::Result;
use store::blocks::Blocks;
use store::image::ImageRecord;
use store::layer::{InodeIndex, Source};
use store::reader::Store;
use store::trace::{AccessTrace, Outcome, Touch};
use tests::http::{Answer, request};

/// The path on which a coordinator accepts traces.
pub(crate) const TRACES: &str = "/v1/traces";

/// Touches of every `step`th stored piece of all layers of an image, topmost layer first.
pub(crate) fn touches(store: &Store, image: &ImageRecord, step: usize) -> Result<Vec<Touch>> {
    let mut touches = Vec::new();
    for layer in (0..image.layers.len() as u16).rev() {
        let index = store.index(&image.layers[usize::from(layer)].diff_id)?;
        for inode in (0..index.inode_count()).map(InodeIndex) {
            let file = index.inode(inode)?;
            for piece in (0..file.piece_count()).filter(|_| file.nlink > 0) {
                if matches!(index.piece(&file, piece)?.source, Source::Chunk { .. }) {
                    touches.push(Touch { layer, inode, piece, blocks: Blocks::ALL, at_ms: touches.len() as u32 });
                }
            }
        }
    }
    Ok(touches.into_iter().step_by(step).collect())
}

/// The trace of `host` for a start with these touches, in this order.
pub(crate) fn trace(image: &ImageRecord, host: &str, touches: Vec<Touch>) -> AccessTrace {
    AccessTrace {
        chain: image.top_chain().expect("every test image has layers"),
        layers: image.layers.iter().map(|layer| layer.diff_id).collect(),
        host: host.to_owned(),
        started_at: 1_700_000_000,
        millis: 1234,
        touches,
        outcome: Outcome::default(),
        profile: None,
    }
}

/// Sends a body to the path for traces; it need not be a valid trace.
pub(crate) fn post(address: &str, body: &[u8]) -> Result<Answer> {
    request(address, "POST", TRACES, &[], body.len() as u64, body)
}
