//! The tar stream from the store, written out at once; [`LayerTar`] gives it block by block.

use std::io::Write;
use std::sync::Arc;

use store::Digest;
use store::reader::Store;

use super::UnpackError;
use super::layer_tar::LayerTar;

/// Bytes that are written at a time.
const BLOCK: usize = 256 << 10;

/// Writes a layer's tar stream, byte for byte as it was pulled; fails if it does not match its diffID. Bytes may have been
/// written by then.
pub fn write_layer_tar(store: &Store, diff_id: &Digest, out: &mut impl Write) -> Result<(), UnpackError> {
    let mut tar = LayerTar::open(store, Arc::new(store.index(diff_id)?))?;
    let mut block = Vec::with_capacity(BLOCK);
    loop {
        block.clear();
        let more = tar.fill(&mut block, BLOCK);
        out.write_all(&block).map_err(UnpackError::Read)?;
        if !more? {
            return Ok(());
        }
    }
}
